"""What was asked for, and a view of the cells that are known of it: a data set."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from bnjax import export
from bnjax.export import Damaged, first_line
from bnjax.sweeps import grid
from bnjax.types import Hyperparams

IDENTITY = re.compile(r"[0-9a-f]+(\.[1-9][0-9]{0,9}){2}")  # with a width and a segment


class Variable(NamedTuple):
    """One variable of the results."""

    dims: tuple[str, ...]  # beside the model and the axes
    dtype: str
    attrs: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What was asked for: all of a data set but the values."""

    models: Mapping[str, tuple[str, ...]]  # name: the identities whose cells count, the first its own
    labelled: bool  # whether there is a dimension "model"
    axes: Mapping[str, np.ndarray]
    further: Mapping[str, np.ndarray]  # the coordinates of the other dimensions
    variables: Mapping[str, Variable]
    attributes: Mapping[str, Any]

    @property
    def hyper(self) -> Hyperparams:
        """The values of what is not swept."""
        return Hyperparams(**self.attributes["hyper"])

    @property
    def bases(self) -> dict[str, str]:
        """What each network computes: its own identity without width and segment."""
        return {name: parsed(ids[0])[0] for name, ids in self.models.items()}

    @property
    def identities(self) -> set[str]:
        """Of all cells that count."""
        return {identity for ids in self.models.values() for identity in ids}

    def positions(self, cells: Hyperparams) -> np.ndarray:
        """Where these cells are in the grid; -1: nowhere."""
        return grid.positions(self.axes, self.hyper, cells)

    def extent(self, name: str) -> tuple[int, ...]:
        """Of a variable, beside the model and the axes."""
        return tuple(len(self.further[dim]) for dim in self.variables[name].dims)

    def to_bytes(self) -> bytes:
        """As JSON, after its digest."""
        body = json.dumps(dataclasses.asdict(self), default=np.ndarray.tolist).encode()
        return digest(body).encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, data: bytes) -> "Layout":
        """The inverse.

        Raises:
          Damaged: if it is not what `to_bytes` wrote.
        """
        try:
            found, _, body = data.partition(b"\n")
            if found.decode() != digest(body):
                raise ValueError("its digest differs")
            given = json.loads(body)
            given["models"] = {name: tuple(ids) for name, ids in given["models"].items()}
            given["variables"] = {name: Variable(*v) for name, v in given["variables"].items()}
            given["further"] = {name: _objects(values) for name, values in given["further"].items()}
            given["axes"] = grid.check(given["axes"], Hyperparams(**given["attributes"]["hyper"]))
            found = cls(**given)
            if any(np.dtype(v.dtype).kind not in "bifu" for v in found.variables.values()):
                raise ValueError("the type of a variable")
            if not all([found.models, *found.models.values(), *map(IDENTITY.fullmatch, found.identities)]):
                raise ValueError("its models")
            _ = View(found).dataset(), compared(found.attributes, "plan")
            return found
        except Exception as error:  # whatever odd bytes raise
            raise Damaged(f"cannot be read ({first_line(error)})") from None


class View:
    """The values of a grid's cells, as far as they are known: {variable: [models, cells, ...]}, `done` among them."""

    def __init__(self, layout: Layout):
        self.layout, shape = layout, (len(layout.models), math.prod(len(v) for v in layout.axes.values()))
        self.done = np.zeros(shape, bool)
        self.values = {
            name: np.full((*shape, *layout.extent(name)), export.nothing(v.dtype), v.dtype)
            for name, v in layout.variables.items()
        }

    def place(self, identity: str, cells: Hyperparams, values: Mapping[str, np.ndarray]) -> None:
        """Puts cells where they belong; those that the grid does not have, nowhere."""
        at = self.layout.positions(cells)
        inside = at >= 0
        for i, identities in enumerate(self.layout.models.values()):
            if identity in identities:
                self.done[i, at[inside]] = True
                for name, value in self.values.items():
                    value[i, at[inside]] = values[name][inside]

    def dataset(self) -> xr.Dataset:
        """The labelled data set; with `done` where not all is."""
        layout = self.layout
        done = Variable((), "bool", {"long_name": "whether the cell is done"})
        shape = [len(layout.models)] * layout.labelled + [len(values) for values in layout.axes.values()]
        dims = ("model",) * layout.labelled + tuple(layout.axes)
        found = {
            name: ((*dims, *v.dims), value.reshape((*shape, *value.shape[2:])), dict(v.attrs))
            for (name, v), value in zip(
                [*layout.variables.items(), ("done", done)], [*self.values.values(), self.done], strict=True
            )
        }
        coordinates = {**layout.axes, **layout.further} | (
            {"model": list(layout.models)} if layout.labelled else {}
        )
        identities = {name: list(ids) for name, ids in layout.models.items()}
        found = xr.Dataset(
            found,
            {name: (name, _objects(values)) for name, values in coordinates.items()},
            {**layout.attributes, "identity": identities},
        )
        return found.drop_vars("done") if self.done.all() else found


def compared(attributes: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What must agree: of a plan the width and the segment."""
    value = attributes.get(name) or {}
    return value if name != "plan" else {m: {k: p[k] for k in ("width", "segment")} for m, p in value.items()}


def parsed(identity: str) -> tuple[str, int, int]:
    """(what the network computes, width, segment)."""
    base, width, segment = identity.split(".")
    return base, int(width), int(segment)


def digest(data: bytes) -> str:
    """Of a file."""
    return blake2b(data, digest_size=16).hexdigest()


def _objects(values):
    return np.asarray(values, object) if np.asarray(values).dtype.kind in "OUT" else np.asarray(values)
