"""The request of a sweep, and a view of the cells that are known of it: a data set."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from bnjax import export
from bnjax.export import Damaged
from bnjax.sweeps import grid
from bnjax.types import RANGES, Hyperparams

IDENTITY = re.compile(r"[0-9a-f]+(\.[1-9][0-9]{0,9}){1,2}")  # with a width (once also with a segment)


class Variable(NamedTuple):
    """One variable of the results."""

    dims: tuple[str, ...]  # beside the model and the axes
    dtype: str
    attrs: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The request: all of a data set but the values."""

    models: Mapping[str, tuple[str, ...]]  # name: the identities whose cells count, the first its own
    labelled: bool  # whether there is a dimension "model"
    axes: Mapping[str, np.ndarray]
    further: Mapping[str, Sequence]  # the coordinates of the other dimensions
    variables: Mapping[str, Variable]
    attributes: Mapping[str, Any]
    static: Mapping[str, list] = dataclasses.field(default_factory=dict)  # axes whose product the models are

    @property
    def hyper(self) -> Hyperparams:
        """The values of what is not swept."""
        return _hyper(self.axes, self.attributes)

    @property
    def cells(self) -> Hyperparams:
        """All of the grid, [cells] each."""
        return grid.cells(self.axes, self.hyper)

    @property
    def bases(self) -> dict[str, str]:
        """The identity of each network's computation, without the width."""
        return {name: parsed(ids[0])[0] for name, ids in self.models.items()}

    @property
    def identities(self) -> set[str]:
        """Of all cells that count."""
        return {identity for ids in self.models.values() for identity in ids}

    def compared(self, name: str) -> Any:
        """The description of models, configuration, ...; of the plan the widths."""
        widths = {model: {"width": parsed(ids[0])[1]} for model, ids in self.models.items()}
        return widths if name == "plan" else self.attributes.get(name)

    @property
    def frame(self) -> dict[str, Any]:
        """The parts in which no change can be allowed."""
        variables = {name: [list(v.dims), v.dtype] for name, v in self.variables.items()}
        return {"further": {dim: list(values) for dim, values in self.further.items()}, "variables": variables}

    def positions(self, cells: Hyperparams) -> np.ndarray:
        """Where these cells are in the grid; -1: nowhere."""
        return grid.positions(self.axes, self.hyper, cells)

    def to_bytes(self) -> bytes:
        """As JSON, after its digest."""
        body = json.dumps(dataclasses.asdict(self), default=np.ndarray.tolist).encode()
        return digest(body).encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, data: bytes) -> "Layout":
        """The inverse. Raises an error if it is none."""
        found, _, body = data.partition(b"\n")
        if found.decode() != digest(body):
            raise ValueError("its digest differs")
        given = json.loads(body)
        given["models"] = {name: tuple(ids) for name, ids in given["models"].items()}
        given["variables"] = {name: Variable(*v) for name, v in given["variables"].items()}
        given["axes"] = grid.check(given["axes"], _hyper(given["axes"], given["attributes"]))
        found = cls(**given)
        if any(np.dtype(v.dtype).kind not in "bifu" for v in found.variables.values()):
            raise ValueError("the type of a variable")
        if found.static and math.prod(map(len, found.static.values())) != len(found.models):
            raise ValueError("its axes of networks")
        if not all([found.models, *found.models.values(), *map(IDENTITY.fullmatch, found.identities)]):
            raise ValueError("its models")
        _ = View(found).dataset()
        return found


class View:
    """The values of a grid's cells, as far as they are known: {variable: [models, cells, ...]}, `done` among them."""

    def __init__(self, layout: Layout):
        models = layout.static or ({"model": [*layout.models]} if layout.labelled else {})
        self.layout = layout
        self._coordinates = models | {**layout.axes, **layout.further}
        dims, count = (*models, *layout.axes), math.prod(len(values) for values in layout.axes.values())
        done = Variable((), "bool", {"long_name": "whether the cell is done"})
        self._variables, self.values = {}, {}
        for name, v in {**layout.variables, "done": done}.items():
            shape = [len(self._coordinates[dim]) for dim in (*dims, *v.dims)]
            array = np.full(shape, export.nothing(v.dtype), v.dtype)
            self._variables[name] = ((*dims, *v.dims), array, dict(v.attrs))
            # the same memory
            self.values[name] = array.reshape(len(layout.models), count, *shape[len(dims) :])
        self.done = self.values["done"]

    def place(self, identity: str, cells: Hyperparams, values: Mapping[str, np.ndarray]) -> None:
        """Puts cells where they belong; those that the grid does not have, nowhere.

        Raises:
          Damaged: if the values have other names, types or shapes.
        """
        at = self.layout.positions(cells)
        inside, values = at >= 0, {**values, "done": np.ones(len(at), bool)}
        forms = {name: (v.dtype, (len(at), *v.shape[2:])) for name, v in self.values.items()}
        if {name: (value.dtype, value.shape) for name, value in values.items()} != forms:
            raise Damaged("holds other variables")
        for i, identities in enumerate(self.layout.models.values()):
            if identity in identities:
                for name, value in self.values.items():
                    value[i, at[inside]] = values[name][inside]

    def dataset(self) -> xr.Dataset:
        """The labelled data set; with `done` where not all is."""
        coordinates = {name: (name, _objects(values)) for name, values in self._coordinates.items()}
        identities = {name: list(ids) for name, ids in self.layout.models.items()}
        attributes = {**self.layout.attributes, "identity": identities}
        found = xr.Dataset(self._variables, coordinates, attributes)
        return found.drop_vars("done") if self.done.all() else found


def _hyper(axes, attributes):
    """The hyperparameters that are not swept; those of `extra` that are have some value."""
    return Hyperparams.from_named({name: 0.0 for name in axes if name not in RANGES} | attributes["hyper"])


def parsed(identity: str) -> tuple[str, int]:
    """(what the network computes, width)."""
    base, width, *_ = identity.split(".")
    return base, int(width)


def digest(data: bytes) -> str:
    """Of a file."""
    return blake2b(data, digest_size=16).hexdigest()


def _objects(values):
    return np.asarray(values, object) if np.asarray(values).dtype.kind in "OUT" else np.asarray(values)
