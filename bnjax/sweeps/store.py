"""Results on disk: a log of what was asked for, and parts that hold cells. A data set is a view of the two.

    results.zarr/
        bnjax/log/00000001             what was asked for: the grid, its variables, the identities of its networks
        bnjax/parts/IDENTITY-DIGEST    cells that are done: their hyperparameters and values
        bnjax/states/IDENTITY-DIGEST   a group of cells half way
        bnjax/lock                     who is writing
        zarr.json, test_loss/, ...     the export: the finished grid for `xarray.open_zarr`. Nothing here relies on it

Every file but the export and the lock is put once, only if there is none of its name, and never changed. So a part
can be missing, damaged or of no use, but not be read as something else, whoever wrote it and when (docs/sweeps.md).

To overwrite is a further record. Until its cells are all done, the one before it stands.
"""

import dataclasses
import io
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import xarray as xr

from bnjax import export
from bnjax.export import Damaged, first_line
from bnjax.sweeps.files import Files, PathLike, files_at
from bnjax.sweeps.layout import IDENTITY, Layout, View, digest, parsed
from bnjax.sweeps.program import in_groups
from bnjax.sweeps.provenance import differences
from bnjax.training import RunState
from bnjax.types import RANGES, Hyperparams

log = logging.getLogger("bnjax")

LOG, PARTS, STATES = "bnjax/log", "bnjax/parts", "bnjax/states"
CHANGES = ("models", "config", "data", "versions", "device", "plan")  # what may be allowed to change
READINGS = 10  # of what does not stand still, at most
NUMBER = re.compile(r"[0-9]{8}")  # of a record


# Parts


def pack(identity: str, cells: Hyperparams, arrays: Mapping[str, np.ndarray], *, compress: bool) -> bytes:
    """A part, or the state of a group: its content."""
    text = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    save(text, identity=np.array(identity), **{_cell(n): v for n, v in cells.named().items()}, **arrays)
    return text.getvalue()


def _cell(name):
    """The name of a hyperparameter there; no variable has a "/"."""
    return f"cell {name}" if name in RANGES else f"cell/{name}"


def unpack(name: str, data: bytes) -> tuple[str, Hyperparams, dict[str, np.ndarray]]:
    """(identity, cells, arrays) of the file of that name. Raises an error if it is not what `pack` wrote."""
    identity, _, expected = name.rpartition("-")
    if digest(data) != expected:
        raise Damaged("is not what was stored")
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        arrays = dict(found)
    names = [*RANGES, *(name.removeprefix("cell/") for name in arrays if name.startswith("cell/"))]
    fields = {name: arrays.pop(_cell(name)) for name in names}
    cells = Hyperparams.from_named(fields)
    if str(arrays.pop("identity")) != identity or {a.shape for a in fields.values()} != {(len(cells.seed),)}:
        raise Damaged("is of another sweep")
    return identity, cells, arrays


def read_parts(files: Files, view: View) -> list[str]:
    """Places the cells of all parts. Returns the keys of the damaged ones."""
    damaged = []
    for name in reversed(files.list(PARTS)):
        if name.rpartition("-")[0] in view.layout.identities:
            data = files.get(f"{PARTS}/{name}")
            try:
                _ = data is None or view.place(*unpack(name, data))
            except MemoryError:
                raise
            except Exception:  # whatever odd bytes raise
                damaged.append(f"{PARTS}/{name}")
    return damaged


# The log


def records(files: Files) -> dict[str, Layout | Damaged]:
    """{key: what was asked for}, the newest last; parts alone tell that there was one."""
    lost, found = _identities(files), {}
    keys = _history(files)
    if lost and not keys:
        found[f"{LOG}/{0:08d}"] = Damaged(f"{files.name} is damaged: the record in {LOG} is missing")
    for key in keys:
        data = files.get(key)
        try:
            found |= {} if data is None else {key: Layout.from_bytes(data)}
        except Exception as error:  # whatever odd bytes raise
            found[key] = Damaged(f"{files.name} is damaged: {key} cannot be read ({first_line(error)})")
    return found


def standing(files: Files, history: Mapping[str, Layout | Damaged]) -> tuple[str, View, list[str]] | None:
    """(key of the record that counts, its cells, its damaged parts); None: there is none, or only one to come.

    Raises:
      Damaged: if that record is.
    """
    for key, layout in reversed(history.items()):
        if isinstance(layout, Damaged):
            raise layout
        view = View(layout)
        damaged = read_parts(files, view)
        if view.done.all() or (key == next(iter(history)) and not export.of_others(files)):
            return key, view, damaged
    return None


class Store:
    """One run's place to write to, under `files.writing`. Made by `begin`, or from its `key` in other processes."""

    def __init__(self, files: Files, key: str):
        self.files, self.key, self._record = files, key, files.get(key)
        if self._record is None:
            raise OSError(f"{files.name}: {key} is not there (several processes must all see the same place)")
        self.layout = Layout.from_bytes(self._record)
        self._cells = self.layout.cells
        self.done = self._read().done  # [models, cells]

    def groups(
        self, name: str, places: np.ndarray, size: int, read: Callable[[Mapping[str, np.ndarray]], RunState]
    ) -> list[tuple[np.ndarray, RunState | None, str | None]]:
        """Cells of a network in groups of at most `size`, those furthest first.

        Each: (places, state half way, key of the stored state that is to be removed when the group is done). `read`
        makes a state of stored arrays; what it refuses is reported, removed and trained again.
        """
        found, missing, groups = [], np.zeros(self.done.shape[1], bool), []
        for file in self.files.list(STATES):
            key, identity = f"{STATES}/{file}", file.rpartition("-")[0]
            if identity != self.layout.models[name][0] or (data := self.files.get(key)) is None:
                continue
            try:
                _, cells, arrays = unpack(file, data)
                at = self.layout.positions(cells)
                found.append((_cut(read(arrays), np.argsort(at)), key, np.sort(at)))
            except Exception as error:  # whatever odd arrays raise
                damaged = isinstance(error, Damaged)
                self._discard(key, str(error) if damaged else f"cannot be read ({first_line(error)})")
        missing[places], taken = True, self.done[self.index(name)].copy()
        for state, key, at in sorted(found, key=lambda one: -one[0].step[0]):
            new, rows = (at >= 0) & ~taken[at], np.flatnonzero((at >= 0) & missing[at])
            taken[at[at >= 0]], missing[at[rows]] = True, False
            groups += [(at[some], _cut(state, some), None) for some in in_groups(rows, size)]
            if not new.any():
                self.files.delete(key)
            elif len(rows) == new.sum():  # else some of it is another process's
                groups[-1] = (*groups[-1][:2], key)
        return groups + [(some, None, None) for some in in_groups(np.flatnonzero(missing), size)]

    def index(self, name: str) -> int:
        """A network's place among them."""
        return list(self.layout.models).index(name)

    def dataset(self) -> xr.Dataset:
        """The results, as far as they are there: what others have done, too."""
        view = self._read()
        self.done = view.done
        if not view.done.all():
            self._check()
        return view.dataset()

    def cells(self, places: np.ndarray) -> Hyperparams:
        """Those at these places."""
        return _cut(self._cells, places)

    def commit(
        self, name: str, places: np.ndarray, values: Mapping[str, np.ndarray], states: Iterable[str | None]
    ) -> None:
        """Stores a part: these cells are done, and these states of no more use."""
        self._put(PARTS, name, places, values, compress=True)
        self.done[self.index(name), places] = True
        for key in filter(None, states):
            self.files.delete(key)

    def save_state(self, name: str, places: np.ndarray, arrays: Mapping[str, np.ndarray], before: str | None) -> str:
        """Stores a group half way in the place of its state before. Returns its key."""
        key = self._put(STATES, name, places, arrays, compress=False)
        if before not in (None, key):
            self.files.delete(before)
        return key

    def finished(self) -> bool:
        """True if all is done. Then everything overwritten, or needed no more, is removed."""
        self._check()
        history = _history(self.files)
        if not self.done.all() or history[-1:] != [self.key] or self.files.get(self.key) != self._record:
            return False
        for key in history[:-1]:  # before its parts, so that a reader looks again
            self.files.delete(key)
        for name in self.files.list(PARTS):
            if name.rpartition("-")[0] not in self.layout.identities:
                self.files.delete(f"{PARTS}/{name}")
        for name in self.files.list(STATES):
            self.files.delete(f"{STATES}/{name}")
        return True

    def _put(self, folder, name, places, arrays, *, compress):
        self._check()
        identity = self.layout.models[name][0]
        data = pack(identity, self.cells(places), arrays, compress=compress)
        key = f"{folder}/{identity}-{digest(data)}"
        self.files.create(key, data)
        return key

    def _read(self):
        """Damaged parts are reported and removed: their cells are trained again."""
        view = View(self.layout)
        for key in read_parts(self.files, view):
            self._discard(key, "is damaged")
        return view

    def _discard(self, key, why):
        log.warning("%s: %s %s; its cells are trained again", self.files.name, key, why)
        self.files.delete(key)

    def _check(self):
        """Raises OSError if nobody asks for these cells there any more."""
        own = {ids[0] for ids in self.layout.models.values()}
        if self.files.get(self.key) != self._record and not any(
            isinstance(layout, Layout) and own <= layout.identities for layout in records(self.files).values()
        ):
            raise OSError(f"{self.files.name} was removed, or replaced by another run: this one stops")


def _cut(arrays, rows):
    return jax.tree.map(lambda a: a[rows], arrays)


def begin(
    files: Files,
    asked: Callable[[Iterable[str], bool], Layout],
    *,
    overwrite: bool = False,
    allow_changed: Sequence[str] = (),
    readings: int = READINGS,
) -> Store:
    """Opens what stands there if the sweep that is asked for continues it, or begins it; under `files.writing`.

    `asked`: (identities that are there, whether it is to begin) -> what is asked for, at their widths.

    Raises:
      ValueError: if something else stands there, and is not to be overwritten.
      Damaged: if a record there is, no part tells that it was of this sweep, and it is not to be overwritten.
      OSError: if a record cannot be put, as of files.
    """
    files.make(LOG, PARTS, STATES)
    history, there = records(files), _identities(files)
    damaged = [layout for layout in history.values() if isinstance(layout, Damaged)]
    newest = [key for key, layout in history.items() if isinstance(layout, Layout)][-1:]
    stands = newest if damaged else [found[0]] if (found := standing(files, history)) else []
    layout, why = None, "it was saved at once, or by an earlier version" * export.stands(files)
    for key in dict.fromkeys(newest + stands):
        layout, why = _continued(history[key], asked, allow_changed)
        if layout is history[key] and [key] == newest and not damaged:
            return Store(files, key)
        if layout is not None:
            if key in stands and not damaged:
                stands = []
                if export.of_others(files):  # which it had overwritten
                    export.remove(files)
            break
    if layout is None and why and not (overwrite or damaged):
        raise ValueError(f"{files.name} holds other results: {why}")
    layout = layout or asked(there, True)
    if damaged and not overwrite:  # a part of another network would be removed
        known, parts = ({parsed(one)[0] for one in ids} for ids in (layout.identities, there))
        if parts - known:
            raise damaged[-1]
    for one in damaged:
        log.warning("%s; it is written again", one)
    key = f"{LOG}/{int([*history][-1].rpartition('/')[2]) + 1 if history else 1:08d}"
    if not files.create(key, layout.to_bytes()):
        if readings == 1:
            raise OSError(f"{files.name}: {key} cannot be put: other runs begin there, or something odd is there")
        return begin(files, asked, overwrite=overwrite, allow_changed=allow_changed, readings=readings - 1)
    for old in sorted({*history} - {*stands}, reverse=True):  # what stands, the oldest, as the last
        files.delete(old)
    return Store(files, key)


def _identities(files):
    """Of the parts that are there."""
    found = {name.rpartition("-")[0] for name in files.list(PARTS)}
    return sorted(filter(IDENTITY.fullmatch, found))


def _history(files):
    """The keys of the records, the newest last."""
    return [f"{LOG}/{name}" for name in files.list(LOG) if NUMBER.fullmatch(name)]


def _continued(stored, asked, allow_changed) -> tuple[Layout | None, str]:
    """The layout that goes on from the stored record, the record itself if it says all; or None, and the reason."""
    bases = asked((), False).bases
    called, there = {}, []  # {name there: name now}, and the identities now at the widths there
    for name, (own, *_) in stored.models.items():
        base, width = parsed(own)
        called[name] = next((now for now in (name, *bases) if bases.get(now) == base), name)
        there.append(f"{bases.get(called[name], base)}.{width}")
    new = asked(there, False)
    changed = {}
    if any(new.models.get(called[name], ids)[0] != ids[0] for name, ids in stored.models.items()):
        for name in CHANGES:
            lines = differences(stored.compared(name), new.compared(name), name)
            changed |= {name: lines} if lines else {}
        both = ({name: ids[0] for name, ids in layout.models.items()} for layout in (stored, new))
        changed = changed or {"models": differences(*both, "computes")}
    lines = [line for name in changed if name not in allow_changed for line in changed[name]]
    frame = differences(stored.frame, new.frame, "layout")
    inside = new.positions(stored.cells) >= 0
    if lost := sum((~inside).sum() if one in new.models else len(inside) for one in called.values()):
        frame.append(f"{lost} of the cells there are not among those asked for")
    if lines or frame:
        advice = ", or overwrite" if frame else f", overwrite, or allow_changed={','.join(changed)}"
        return None, f"{'; '.join(lines + frame)}. Choose another place{advice}"
    new, before = asked(there, True), {}
    for name, ids in stored.models.items():
        before[called[name]] = before.get(called[name], ()) + ids
    models = {name: tuple(dict.fromkeys(ids + before.get(name, ()))) for name, ids in new.models.items()}
    new = dataclasses.replace(new, models=models)
    if (
        dataclasses.replace(new, attributes=stored.attributes).to_bytes() == stored.to_bytes()
        and stored.attributes["hyper"] == new.attributes["hyper"]
    ):
        return stored, ""
    now = [line for several in changed.values() for line in several]
    changes = [*stored.attributes.get("changes", []), *[now] * bool(now)]
    return dataclasses.replace(new, attributes=new.attributes | ({"changes": changes} if changes else {})), ""


def load(path: PathLike) -> xr.Dataset:
    """Reads results into memory, and checks them: those of a sweep, running or done, and those of `save_results`.

    Args:
      path: the folder, URL or store.

    Returns:
      The labelled data set. Where a sweep is not done, the boolean `done` says which cells count; the other
      variables are NaN, False or -1 in those that do not.

    Raises:
      FileNotFoundError: if there are no results at `path`.
      Damaged: (a ValueError) if what is there is not what was stored; it says what.
    """
    files = files_at(path)
    for _ in range(READINGS):
        before, error = _snapshot(files), None
        try:
            found = _load(files)
        except (OSError, ValueError) as raised:
            error = raised
        if _snapshot(files) == before:
            break
    if error is not None:
        raise error
    return found


def _load(files):
    files = export.place_of(files)
    found = standing(files, records(files))
    if found is None:
        return export.load(files)
    if found[2]:
        raise Damaged(f"{files.name} is damaged: {', '.join(found[2][:5])} (the same sweep trains these cells again)")
    return found[1].dataset()


def _snapshot(files):
    """Something else when what stands there has changed."""
    contents = [files.get(key) for key in _history(files)]
    return files.stamp(), contents, files.list(PARTS), files.get("zarr.json")


class Status(NamedTuple):
    """The part of a sweep's results that is done; prints as lines."""

    path: str
    cells: Mapping[str, tuple[int, int]]  # model: (done, all)
    damaged: Sequence[str]  # keys of parts
    halfway: int  # groups of cells with a checkpoint
    writer: str  # who writes, in words

    def __str__(self) -> str:
        """One line a model."""
        rows = [f"{name or 'network'}: {done:,} of {n:,} cells done" for name, (done, n) in self.cells.items()]
        rows += [f"damaged: {key}" for key in self.damaged]
        rows += [f"{self.halfway} groups of cells half way"] * bool(self.halfway)
        return "\n  ".join([self.path, *rows, self.writer])


def status(path: PathLike) -> Status:
    """Reports how much of a sweep's results is done, without loading data; of the newest, where one overwrites.

    Raises:
      ValueError: if there are none, or the record is damaged.
    """
    files = files_at(path)
    layout = [ValueError(f"{files.name} holds no results of a sweep"), *records(files).values()][-1]
    if isinstance(layout, ValueError):
        raise layout
    view = View(layout)
    damaged = read_parts(files, view)
    cells = {name: (int(view.done[i].sum()), view.done.shape[1]) for i, name in enumerate(layout.models)}
    return Status(files.name, cells, damaged, len(files.list(STATES)), files.writer())
