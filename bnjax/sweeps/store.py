"""Results on disk: one Zarr v3 group per experiment, which xarray opens, written chunk by chunk while a sweep runs.

    results.zarr/
        zarr.json, test_loss/..., done/..., ...    what `xarray.open_zarr(path, consolidated=False)` shows
        bnjax/zarr.json                  the record: the attributes of the root again
        bnjax/ledger/MODEL.CHUNK         a committed chunk: the digest of its values; written last
        bnjax/checkpoint/MODEL.CHUNK     a chunk in the making: cells done, and the state of those half way
        bnjax/lease/INDEX-of-COUNT       who is writing, and when that was last confirmed

Variables have dimensions (model,) *axes (, step), and are stored in chunks of whole cells, so that no two chunks
share a file. A chunk counts once its ledger entry stands, which is written after its values and holds their digest.
Whatever dies before that leaves a chunk that does not count and is computed again; whatever is damaged afterwards no
longer agrees with its digest. Every array carries CRC32C checksums, too, for readers that know nothing of this.

`path` may be a local folder, a URL that zarr takes (s3://..., with the fsspec package for it), or a zarr store.
"""

import contextlib
import io
import json
import logging
import math
import shutil
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec

from bnjax.sweeps.exchange import cut_off, replace, replaced, watched
from bnjax.sweeps.storage import Files, StoreLike, exclusive

log = logging.getLogger("bnjax")

COMPRESSORS = (zarr.codecs.ZstdCodec(), Crc32cCodec())
RECORD, LEDGER, CHECKPOINT = "bnjax/zarr.json", "bnjax/ledger", "bnjax/checkpoint"
ROOT = {"layout", "checksum"}  # the attributes that a sweep's root has, and no others'


class Damaged(ValueError):
    """Stored results that are not what was stored."""


class Variable(NamedTuple):
    """One variable of the results."""

    dims: tuple[str, ...]  # beside the model and the axes
    dtype: str
    attrs: Mapping[str, str]


class Layout(NamedTuple):
    """What a store holds, but for the values of its variables."""

    models: tuple[str, ...]
    labelled: bool  # whether there is a dimension "model"
    axes: Mapping[str, np.ndarray]
    further: Mapping[str, np.ndarray]  # the coordinates of the other dimensions
    variables: Mapping[str, Variable]
    tile: tuple[int, ...]  # a chunk's extent along the axes
    attributes: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the axes."""
        return tuple(len(values) for values in self.axes.values())

    @property
    def coordinates(self) -> dict[str, np.ndarray]:
        """Of all dimensions."""
        found = {**self.axes, **self.further} | ({"model": self.models} if self.labelled else {})
        return {name: _objects(np.asarray(values)) for name, values in found.items()}

    def dims(self, name: str) -> tuple[str, ...]:
        """Of a variable."""
        return (*(["model"] if self.labelled else []), *self.axes, *self.variables[name].dims)

    def extent(self, name: str) -> tuple[int, ...]:
        """Of a variable, beside the model and the axes."""
        return tuple(len(self.further[dim]) for dim in self.variables[name].dims)

    def region(self, chunk: "Chunk") -> tuple[int | slice, ...]:
        """Where a chunk is in a variable."""
        return (*([chunk.model] if self.labelled else []), *chunk.region)

    def who(self, chunk: "Chunk") -> str:
        """A chunk in words."""
        name = self.models[chunk.model]
        return f"cells {chunk.cells[0]} to {chunk.cells[-1]}{f' of {name}' if name else ''}"

    def chunks(self) -> list["Chunk"]:
        """All chunks, in the order in which they are computed."""
        tiles = [*self._tiles()]
        return [Chunk(i, j, *where) for i in range(len(self.models)) for j, where in enumerate(tiles)]

    def as_attributes(self) -> dict[str, Any]:
        """All of it as JSON holds it, with a checksum: the attributes of the root group."""
        further = {name: np.asarray(values).tolist() for name, values in self.further.items()}
        layout = {
            "models": list(self.models),
            "labelled": self.labelled,
            "axes": {name: values.tolist() for name, values in self.axes.items()},
            "further": further,
            "variables": {name: [list(v.dims), v.dtype, dict(v.attrs)] for name, v in self.variables.items()},
            "tile": list(self.tile),
        }
        attributes = json.loads(json.dumps({**self.attributes, "layout": layout}))
        return attributes | {"checksum": _checksum(attributes)}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "Layout":
        """The inverse.

        Raises:
          ValueError: if the checksum does not agree.
          KeyError: if there is none.
        """
        attributes = dict(attributes)
        if attributes.pop("checksum") != _checksum(attributes):
            raise ValueError("checksum")
        given = attributes.pop("layout")
        return cls(
            tuple(given["models"]),
            given["labelled"],
            {
                name: np.asarray(v, np.int64 if name == "seed" else np.float64)
                for name, v in given["axes"].items()
            },
            {name: _objects(np.asarray(values)) for name, values in given["further"].items()},
            {name: Variable(tuple(v[0]), v[1], v[2]) for name, v in given["variables"].items()},
            tuple(given["tile"]),
            attributes,
        )

    def _tiles(self) -> Iterator[tuple[range, tuple[slice, ...]]]:
        counts = [math.ceil(n / k) for n, k in zip(self.shape, self.tile, strict=True)]
        numbers = np.arange(math.prod(self.shape)).reshape(self.shape)
        for index in np.ndindex(*counts):
            region = tuple(
                slice(i * k, min((i + 1) * k, n))
                for i, k, n in zip(index, self.tile, self.shape, strict=True)
            )
            cells = numbers[region].reshape(-1)
            yield range(int(cells[0]), int(cells[-1]) + 1), region


def _checksum(attributes: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(attributes, sort_keys=True).encode())


class Chunk(NamedTuple):
    """Cells that are committed together."""

    model: int
    number: int  # among the model's
    cells: range  # in the order of `bnjax.sweeps.grid.cells`
    region: tuple[slice, ...]  # the same, in the array of the axes

    @property
    def key(self) -> str:
        """Its name in the store."""
        return f"{self.model}.{self.number}"


def tile_of(shape: Sequence[int], cells: int) -> tuple[int, ...]:
    """The extent of chunks of at most `cells` cells in a row: whole trailing axes, a part of one, 1 of those before."""
    found, room = [], cells
    for n in reversed(shape):
        found.append(max(1, min(n, room)))
        room = room // n if found[-1] == n else 0
    return tuple(reversed(found))


# The store of a sweep


class Store:
    """Results in the making. Made by `create` or `open_store`."""

    def __init__(self, files: Files, layout: Layout, mode: str = "a"):
        self.files, self.layout = files, layout
        self.group = zarr.open_group(files.store, mode=mode)
        self.committed: set[str] = set()

    def describe(self, attributes: Mapping[str, Any]) -> None:
        """Replaces the attributes."""
        self.layout = self.layout._replace(attributes=attributes)
        for key, value in frame(self.layout).items():
            self.files.put(key, value)

    def commit(self, chunk: Chunk, values: Mapping[str, np.ndarray]) -> None:
        """Writes the values [cells, ...] of a chunk, and then that they are there."""
        values = {name: self._prepared(name, chunk, values) for name in self.layout.variables}
        with self.files.named():
            for name, value in values.items():
                self.group[name][self.layout.region(chunk)] = value
        self.files.put(f"{LEDGER}/{chunk.key}", digest(values).encode())
        self.files.delete(f"{CHECKPOINT}/{chunk.key}")
        self.committed.add(chunk.key)

    def read(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """The values [cells, ...] of a committed chunk."""
        n = len(chunk.cells)
        return {
            name: np.asarray(self.group[name][self.layout.region(chunk)]).reshape(
                n, *self.layout.extent(name)
            )
            for name in self.layout.variables
        }

    def remaining(self) -> list[Chunk]:
        """The chunks that are not committed."""
        return [chunk for chunk in self.layout.chunks() if chunk.key not in self.committed]

    def save_checkpoint(self, chunk: Chunk, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps these arrays for the chunk until it is committed."""
        text = io.BytesIO()
        np.savez(text, **arrays)
        data = text.getvalue()
        self.files.put(f"{CHECKPOINT}/{chunk.key}", zlib.crc32(data).to_bytes(4, "big") + data)

    def load_checkpoint(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """The arrays last kept for the chunk; none if there are none, or they are damaged."""
        data = self.files.get(f"{CHECKPOINT}/{chunk.key}")
        if data is None:
            return {}
        if zlib.crc32(data[4:]).to_bytes(4, "big") != data[:4]:
            log.warning(
                "%s: the checkpoint %s is damaged; its cells are trained again", self.files.name, chunk.key
            )
            return {}
        with np.load(io.BytesIO(data[4:])) as found:
            return dict(found)

    def verify(self) -> None:
        """Finds out which chunks are committed; what is damaged no longer is, and says so."""
        entries, checkpoints = ({*self.files.list(folder)} for folder in (LEDGER, CHECKPOINT))
        for chunk in self.layout.chunks():
            if chunk.key not in entries:
                continue
            problem = self.problem(chunk)
            if problem is None:
                self.committed.add(chunk.key)
                if chunk.key in checkpoints:  # its process died before it removed it
                    self.files.delete(f"{CHECKPOINT}/{chunk.key}")
                continue
            self.files.delete(f"{LEDGER}/{chunk.key}")
            log.warning("%s: %s; they are trained again", self.files.name, problem)

    def problem(self, chunk: Chunk) -> str | None:
        """What is wrong with a committed chunk, in words; None: nothing."""
        who = self.layout.who(chunk)
        values = {}
        for variable in self.layout.variables:
            try:
                values[variable] = self.group[variable][self.layout.region(chunk)]
            # Whatever zarr, its codecs and the file system raise for a damaged file.
            except Exception as error:
                return f"{variable} of {who} cannot be read ({_first_line(error)})"
        stored = self.files.get(f"{LEDGER}/{chunk.key}")
        found = {name: self._prepared(name, chunk, values) for name in values}
        return None if stored == digest(found).encode() else f"{who} are not what was committed"

    def _prepared(self, name, chunk, values):
        extent = tuple(s.stop - s.start for s in chunk.region)
        variable = self.layout.variables[name]
        return np.asarray(values[name], variable.dtype).reshape((*extent, *self.layout.extent(name)))


def digest(values: Mapping[str, np.ndarray]) -> str:
    """Of the variables of a chunk."""
    found = blake2b(digest_size=16)
    for name in sorted(values):
        array = np.ascontiguousarray(values[name])
        found.update(f"{name}{array.shape}{array.dtype.str}".encode() + array.tobytes())
    return found.hexdigest()


def frame(layout: Layout) -> dict[str, bytes]:
    """{key: bytes} of everything but values and ledger, the record first."""
    memory = Files(None)
    coordinates = {name: (name, values) for name, values in layout.coordinates.items()}
    save(xr.Dataset(coords=coordinates), memory.store)
    group = zarr.open_group(memory.store, mode="a")
    models = [len(layout.models)] if layout.labelled else []
    for name, variable in layout.variables.items():
        group.create_array(
            name,
            shape=(*models, *layout.shape, *layout.extent(name)),
            chunks=(*(1 for _ in models), *layout.tile, *layout.extent(name)),
            dtype=variable.dtype,
            compressors=COMPRESSORS,
            fill_value=math.nan if np.dtype(variable.dtype).kind == "f" else 0,
            dimension_names=layout.dims(name),
            attributes=dict(variable.attrs),
        )
    attributes = layout.as_attributes()
    group.attrs.update(attributes)
    record = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return {RECORD: json.dumps(record, indent=1).encode()} | {key: memory.get(key) for key in memory.list()}


def _objects(values):
    return np.asarray(values, object) if np.asarray(values).dtype.kind in "OUT" else np.asarray(values)


def create(files: Files, layout: Layout) -> Store:
    """A new store without a cell.

    Args:
      files: where; nothing else of it may stand there.
      layout: what it is to hold.
    """
    for key, value in frame(layout).items():
        files.put(key, value)
    return Store(files, layout)


def open_store(files: Files, layout: Layout) -> Store:
    """The store that stands there, mended and verified: what is damaged in it is said, and computed again.

    Args:
      files: where.
      layout: from `read_layout`, or the same with other attributes, which replace those there.
    """
    stored = None
    with contextlib.suppress(Damaged):
        stored = read_layout(files)
    begun = bool(files.list(LEDGER) + files.list(CHECKPOINT))  # or its process died while it made the frame
    for key, value in frame(layout).items():
        if files.get(key) != value:
            if begun and stored is not None and stored.attributes == layout.attributes:
                log.warning("%s: %s was damaged or missing, and is written again", files.name, key)
            files.put(key, value)
    found = Store(files, layout)
    found.verify()
    return found


def read_layout(files: Files) -> Layout | None:
    """What the store holds; None if there is no store.

    Raises:
      Damaged: if there is one, and neither copy of its record can be read.
    """
    copies = [files.get(key) for key in (RECORD, "zarr.json")]
    if copies == [None, None]:
        return None
    for text in copies:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            return Layout.from_attributes(json.loads(text)["attributes"])
    if copies[0] is None and not _of_a_sweep(copies[1]):
        return None  # saved at once, by `save`
    raise Damaged(f"{files.name} is damaged: neither {RECORD} nor zarr.json can be read")


def _of_a_sweep(root: bytes) -> bool:
    """Whether these bytes are a sweep's zarr.json, or what is left of it."""
    try:
        return json.loads(root)["attributes"].keys() >= ROOT
    except (ValueError, KeyError, TypeError, AttributeError):
        return b'"layout"' in root


# Whole data sets


def save(results: xr.Dataset, path: StoreLike, *, overwrite: bool = False) -> None:
    """Writes a Zarr v3 group at `path` at once, with a checksum on every chunk.

    In a folder it is written beside `path` and renamed, so that there is never a part of it under that name.

    Args:
      results: from `bnjax.sweep`, or any other.
      path: a local folder, to be made; or a zarr store.
      overwrite: replace what is at `path`; it is removed when the new results are in its place.

    Raises:
      FileExistsError: if there is something at `path`, unless `overwrite`.
    """
    if results.attrs.keys() >= ROOT:  # a sweep's, opened by xarray alone
        results = results.assign_attrs()
        results.attrs = {name: value for name, value in results.attrs.items() if name not in ROOT}
    encoding = {name: {"compressors": COMPRESSORS} for name in results.variables}
    options = {"mode": "w", "consolidated": False, "zarr_format": 3, "encoding": encoding}
    if isinstance(path, zarr.abc.store.Store):
        results.to_zarr(path, **options)
        return
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        results.to_zarr(temporary, **options)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists")
        replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(path: StoreLike) -> xr.Dataset:
    """Reads results into memory, and checks them: those of `save`, and those of a sweep, running or done.

    Args:
      path: the folder, URL or zarr store.

    Returns:
      The labelled data set. Where a sweep is not done, the boolean `done` says which cells count; the other
      variables are NaN, False or -1 in those that do not.

    Raises:
      FileNotFoundError: if there are no results at `path`.
      Damaged: (a ValueError) if what is there is not what was stored; it says what.
    """
    files = Files(path, write=False)
    while True:
        with watched(files) as changed:
            try:
                found = _load(files, path)
            except Exception:
                if not changed():
                    raise
            else:
                if not changed():
                    return found


def _load(files: Files, path: StoreLike) -> xr.Dataset:
    """`load`, if nothing is put into its place meanwhile."""
    if cut_off(files):
        with exclusive(files.local.parent):  # while it is being replaced
            if cut_off(files):
                files = Files(replaced(files.local), write=False)
    layout = read_layout(files)
    entries = {} if layout is None else {key: files.get(f"{LEDGER}/{key}") for key in files.list(LEDGER)}
    try:
        if layout is not None and not entries:  # the variables may not be there yet
            return _labelled(layout, {})
        with warnings.catch_warnings():  # what a killed process left of a write is not part of it
            warnings.filterwarnings("ignore", r"Object at \S*\.partial is not recognized")
            found = xr.open_zarr(files.store, consolidated=False, zarr_format=3).load()
        if layout is None:
            return _load(files, path) if found.attrs.keys() >= ROOT else found  # a sweep has begun meanwhile
        return _checked(found, layout, entries)
    except (Damaged, PermissionError):
        raise
    # Whatever xarray, zarr, its codecs and the file system raise for a damaged file.
    except Exception as error:
        if layout is None and isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"no results at {path}") from None
        what = [] if layout is None else _damages(files, layout, entries)
        raise Damaged(f"{path} is damaged: {'; '.join(what[:5]) or _first_line(error)}") from error


def _damages(files: Files, layout: Layout, entries: Mapping[str, bytes]) -> list[str]:
    """What is damaged, in words."""
    found = [
        f"{key} is damaged or missing" for key, value in frame(layout).items() if files.get(key) != value
    ]
    with contextlib.suppress(Exception):
        store = Store(files, layout, "r")
        found += filter(None, (store.problem(chunk) for chunk in layout.chunks() if chunk.key in entries))
    return found


def _checked(found: xr.Dataset, layout: Layout, entries: Mapping[str, bytes]) -> xr.Dataset:
    """The data set with only what is committed, after checking that this is what was committed."""
    for name, values in layout.coordinates.items():
        if found[name].dims != (name,) or found[name].values.tolist() != values.tolist():
            raise ValueError(f"the coordinate {name}")
    values = {name: np.array(found[name].transpose(*layout.dims(name)).values) for name in layout.variables}
    for chunk in layout.chunks():
        region = layout.region(chunk)
        here = {name: value[region].astype(layout.variables[name].dtype) for name, value in values.items()}
        if chunk.key not in entries:
            for name, value in values.items():
                value[region] = _nothing(layout.variables[name].dtype)
        elif digest(here).encode() != entries[chunk.key]:
            raise ValueError(f"{layout.who(chunk)} are not what was committed (a sweep trains them again)")
    return _labelled(layout, values)


def _labelled(layout: Layout, values: Mapping[str, np.ndarray]) -> xr.Dataset:
    """The data set of these values, or of a sweep's that has not begun."""
    sizes = {name: len(v) for name, v in {**layout.axes, **layout.further, "model": layout.models}.items()}
    variables = {
        name: (
            layout.dims(name),
            values.get(name, np.full([sizes[dim] for dim in layout.dims(name)], _nothing(v.dtype), v.dtype)),
            v.attrs,
        )
        for name, v in layout.variables.items()
    }
    coordinates = {name: (name, values) for name, values in layout.coordinates.items()}
    found = xr.Dataset(variables, coordinates, layout.attributes)
    return found.drop_vars("done") if found.done.all() else found


def _nothing(dtype):
    """The value of cells that are not done."""
    return {"f": math.nan, "b": False}.get(np.dtype(dtype).kind, -1)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
