"""Results on disk: a log of what was asked for, and parts that hold cells. A data set is a view of the two.

    results.zarr/
        bnjax/log/00000001          what was asked for: the grid, its variables, the identities of its networks
        bnjax/parts/IDENTITY-DIGEST    cells that are done: their hyperparameters and values
        bnjax/states/IDENTITY-DIGEST   a group of cells half way
        bnjax/lock                  who is writing
        zarr.json, test_loss/, ...  the export: the finished grid for `xarray.open_zarr`. Nothing here relies on it

Every file but the export and the lock is put once, only if there is none of its name, and never changed. A part is
named by the digest of its content, and by its identity: what its network computes, on what data and with what, and
the width and segment that it ran at. So a part can be missing, damaged or of no use, but it cannot be read as
something else, whoever wrote it and when; a larger grid, or another order, is another view of the parts. Of two
parts with the same cell, the one whose name sorts first counts.

To overwrite is to ask for something else in a record that says so. Until it is complete, the record before it stands.
"""

import dataclasses
import io
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from bnjax import export
from bnjax.export import Damaged, first_line
from bnjax.sweeps import grid
from bnjax.sweeps.files import Files, PathLike, files_at, in_words
from bnjax.sweeps.layout import IDENTITY, Layout, View, compared, digest
from bnjax.sweeps.program import in_groups
from bnjax.sweeps.provenance import differences
from bnjax.types import Hyperparams

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
    save(text, identity=np.array(identity), **{f"cell {n}": v for n, v in cells._asdict().items()}, **arrays)
    return text.getvalue()


def unpack(name: str, data: bytes) -> tuple[str, Hyperparams, dict[str, np.ndarray]]:
    """(identity, cells, arrays) of the file of that name.

    Raises:
      Damaged: if it is not what `pack` wrote under that name.
    """
    identity, _, expected = name.rpartition("-")
    if digest(data) != expected:
        raise Damaged("is not what was stored")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            arrays = dict(found)
        cells = Hyperparams(*(arrays.pop(f"cell {field}") for field in Hyperparams._fields))
        for field, dtype in grid.DTYPES.items():
            value = getattr(cells, field)
            if value.dtype != dtype or value.shape != (len(cells.seed),):
                raise ValueError(f"the cells' {field}")
        if str(arrays.pop("identity")) != identity:
            raise ValueError("of another sweep")
        return identity, cells, arrays
    except Exception as error:  # whatever odd bytes raise
        raise Damaged(f"cannot be read ({first_line(error)})") from None


def read_parts(files: Files, view: View, seen: set[str]) -> list[str]:
    """Places the cells of all parts but those `seen`, which grow by them. Returns the keys of the damaged ones."""
    damaged, wanted = [], view.layout.identities
    for name in sorted({*files.list(PARTS)} - seen, reverse=True):
        if name.rpartition("-")[0] not in wanted or (data := files.get(f"{PARTS}/{name}")) is None:
            continue
        try:
            identity, cells, values = unpack(name, data)
            for variable, v in view.layout.variables.items():
                if (values[variable].dtype, values[variable].shape) != (
                    np.dtype(v.dtype),
                    (len(cells.seed), *view.layout.extent(variable)),
                ):
                    raise Damaged(f"holds another {variable}")
        except (Damaged, KeyError):
            damaged.append(f"{PARTS}/{name}")
            continue
        view.place(identity, cells, values)
        seen.add(name)
    return damaged


# The log


def records(files: Files) -> dict[str, Layout | Damaged]:
    """{key: what was asked for}, the newest last; parts alone tell that there was one."""
    lost, found = _identities(files), {}
    keys = _history(files)
    if lost and not keys:
        found[f"{LOG}/{0:08d}"] = Damaged(f"{files.name} is damaged: the record in {LOG} is missing")
    for key in keys:
        try:
            if (data := files.get(key)) is not None:
                found[key] = Layout.from_bytes(data)
        except Damaged as error:
            found[key] = Damaged(f"{files.name} is damaged: {key} {error}")
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
        damaged = read_parts(files, view, set())
        if not layout.overwrites or view.done.all():
            return key, view, damaged
    return None


class Store:
    """What one run writes to, under `files.writing`. Made by `begin`, or from its `key` in other processes."""

    def __init__(self, files: Files, key: str):
        self.files, self.key, self._record, self._seen = files, key, files.get(key), set()
        self.layout = Layout.from_bytes(self._record)
        self.done = View(self.layout).done  # [models, cells]
        self.refresh()

    def missing(self, name: str, size: int) -> list[np.ndarray]:
        """The places of a network's cells that are not done, in groups of at most `size`: those half way first."""
        missing, groups = np.flatnonzero(~self.done[self.index(name)]), []
        for _, at, _ in self.states(name):
            if np.isin(at, missing).all():
                missing = np.setdiff1d(missing, at)
                groups += in_groups(np.sort(at), size)
        return groups + in_groups(missing, size)

    def index(self, name: str) -> int:
        """A network's place among them."""
        return list(self.layout.models).index(name)

    def refresh(self) -> None:
        """Looks what is done, by others too; damaged parts are reported and removed: their cells are trained again."""
        view = View(self.layout)
        view.done = self.done
        for key in read_parts(self.files, view, self._seen):
            self.discard(key, "is damaged")

    def discard(self, key: str, why: str | Exception) -> None:
        """Reports a part or a state, and removes it."""
        log.warning("%s: %s %s; its cells are trained again", self.files.name, key, why)
        self.files.delete(key)

    def dataset(self) -> xr.Dataset:
        """The results, as far as they are there."""
        view = View(self.layout)
        read_parts(self.files, view, set())
        if not view.done.all():
            self._check()
        return view.dataset()

    def commit(
        self, name: str, places: np.ndarray, cells: Hyperparams, values: Mapping[str, np.ndarray]
    ) -> None:
        """Stores a part."""
        self._put(PARTS, name, cells, values, compress=True)
        self.done[self.index(name), places] = True

    def save_state(self, name: str, cells: Hyperparams, arrays: Mapping[str, np.ndarray]) -> str:
        """Stores a group half way; returns its key."""
        return self._put(STATES, name, cells, arrays, compress=False)

    def states(self, name: str) -> list[list]:
        """[key, places, arrays] of each of a network's groups half way, those furthest first; no damaged ones."""
        found = []
        for file in self.files.list(STATES):
            key, identity = f"{STATES}/{file}", file.rpartition("-")[0]
            if identity == self.layout.models[name][0] and (data := self.files.get(key)) is not None:
                try:
                    _, cells, arrays = unpack(file, data)
                    found.append((int(arrays["leaf 0"]), key, self.layout.positions(cells), arrays))
                except (KeyError, TypeError, ValueError) as error:
                    self.discard(key, error)
        return [state for _, *state in sorted(found, key=lambda one: -one[0])]

    def change(self, layout: Layout) -> None:
        """Puts another record in the place of its own."""
        self._check()
        history = _history(self.files)
        self.key = _append(self.files, layout, history, {*history} - {self.key})
        self.layout, self._record = layout, self.files.get(self.key)

    def replan(self, name: str, asked: Layout) -> None:
        """Another plan of one network, of which no cell is done; all else stays as it is on record."""
        old = self.layout
        models = {**old.models, name: (*asked.models[name], *old.models[name][1:])}
        attributes = {**old.attributes, "plan": asked.attributes["plan"]}
        self.change(dataclasses.replace(old, models=models, attributes=attributes))

    def finished(self) -> bool:
        """Whether all is done. Then what it has overwritten, or needs no more, is removed."""
        self._check()
        self.refresh()
        history = _history(self.files)
        if not self.done.all() or history[-1:] != [self.key] or self.files.get(self.key) != self._record:
            return False
        if self.layout.overwrites:
            self.change(dataclasses.replace(self.layout, overwrites=False))
        for key in history[:-1]:  # before its parts, so that a reader looks again
            self.files.delete(key)
        for name in self.files.list(PARTS):
            if name.rpartition("-")[0] not in self.layout.identities:
                self.files.delete(f"{PARTS}/{name}")
        for name in self.files.list(STATES):
            self.files.delete(f"{STATES}/{name}")
        return True

    def write_export(self, results: xr.Dataset | None) -> None:
        """Writes the results as plain Zarr, unless they stand there; None: removes what stands there."""
        if results is None:
            export.remove(self.files)
        else:
            export.write(results, self.files)

    def _put(self, folder, name, cells, arrays, *, compress):
        self._check()
        identity = self.layout.models[name][0]
        data = pack(identity, cells, arrays, compress=compress)
        key = f"{folder}/{identity}-{digest(data)}"
        self.files.create(key, data)
        return key

    def _check(self):
        """Raises OSError if nobody asks for these cells there any more."""
        own = {ids[0] for ids in self.layout.models.values()}
        if self.files.get(self.key) != self._record and not any(
            isinstance(layout, Layout) and own <= layout.identities for layout in records(self.files).values()
        ):
            raise OSError(f"{self.files.name} was removed, or replaced by another run: this one stops")


def begin(
    files: Files,
    ask: Callable[[Iterable[str]], Layout],
    *,
    overwrite: bool = False,
    allow_changed: Sequence[str] = (),
    tries: int = READINGS,
) -> Store:
    """Opens what stands there if the sweep that is asked for continues it, or begins it.

    Args:
      files: where, under `files.writing`.
      ask: (identities that are there) -> what is asked for, at their widths and segments.
      overwrite: begin beside what stands there, if that is something else.
      allow_changed: of `CHANGES`.
      tries: how often, if other runs begin there at the same moment.

    Raises:
      ValueError: if something else stands there, and is not to be overwritten.
      Damaged: if a record there is, no part tells that it was of this sweep, and it is not to be overwritten.
    """
    files.make(LOG, PARTS, STATES)
    there, history = _identities(files), records(files)
    damaged = [layout for layout in history.values() if isinstance(layout, Damaged)]
    whole = [key for key, layout in history.items() if isinstance(layout, Layout)]
    if damaged:
        bases = [{one.partition(".")[0] for one in several} for several in (ask(()).identities, there)]
        if not overwrite and not bases[0] >= bases[1]:  # a part of another network would be removed
            raise damaged[-1]
        for one in damaged:
            log.warning("%s; it is written again", one)
        kept = whole[-1:]
        layout = dataclasses.replace(ask(there), overwrites=bool(kept))
    else:
        stands = [found[0]] if (found := standing(files, history)) else []
        why = "it was saved at once, or by an earlier version" if export.stands(files) else ""
        for key in dict.fromkeys(whole[-1:] + stands):
            layout, why = _continued(history[key], ask, allow_changed)
            if layout is history[key]:
                return Store(files, key)
            if layout is not None:
                layout = dataclasses.replace(layout, overwrites=key not in stands)
                break
        else:
            if why and not overwrite:
                raise ValueError(f"{files.name} holds other results: {why}")
            layout = dataclasses.replace(ask(there), overwrites=bool(why))
        kept = stands if layout.overwrites else []
    try:
        return Store(files, _append(files, layout, history, kept))
    except RuntimeError:
        if tries == 0:
            raise
        return begin(files, ask, overwrite=overwrite, allow_changed=allow_changed, tries=tries - 1)


def _identities(files):
    """Of the parts that are there."""
    found = {name.rpartition("-")[0] for name in files.list(PARTS)}
    return sorted(filter(IDENTITY.fullmatch, found))


def _history(files):
    """The keys of the records, the newest last."""
    return [f"{LOG}/{name}" for name in files.list(LOG) if NUMBER.fullmatch(name)]


def _append(files, layout, history, kept):
    """Adds a record to these, and removes them but those that are kept. Returns its key."""
    key = f"{LOG}/{int([*history][-1].rpartition('/')[2]) + 1 if history else 1:08d}"
    if not files.create(key, layout.to_bytes()):
        raise RuntimeError(f"{files.name}: another run began there at this moment: give the command again")
    for old in {*history} - {*kept}:
        files.delete(old)
    return key


def _continued(stored, ask, allow_changed) -> tuple[Layout | None, str]:
    """What goes on from the stored record, the record itself if it says all; or None, and why nothing does."""
    asked = ask([identity for ids in stored.models.values() for identity in ids])
    own = {ids[0]: name for name, ids in stored.models.items()}
    names = {  # as they are called there
        name: name if stored.models.get(name, ("",))[0] == ids[0] else own.get(ids[0], name)
        for name, ids in asked.models.items()
    }
    old, new, changed = stored.attributes, asked.attributes, {}
    if any(ids[0] != stored.models.get(names[name], ids)[0] for name, ids in asked.models.items()):
        changed = {name: differences(compared(old, name), compared(new, name), name) for name in CHANGES}
        changed = {name: lines for name, lines in changed.items() if lines}
        both = [{name: ids[0] for name, ids in layout.models.items()} for layout in (stored, asked)]
        changed = changed or {"models": differences(*both, "computes")}
    lines = [line for name in changed if name not in allow_changed for line in changed[name]]
    frame = differences(*(_frame(layout) for layout in (stored, asked)), "layout")
    cells, kept = grid.cells(stored.axes, stored.hyper), {*names.values()} & {*stored.models}
    lost = (len(stored.models) - len(kept)) * len(cells.seed) + len(kept) * int(
        (asked.positions(cells) < 0).sum()
    )
    if lost:
        frame = [*frame, f"{lost} of the cells there are not among those asked for"]
    if lines or frame:
        advice = ", or overwrite" if frame else f", overwrite, or allow_changed={','.join(changed)}"
        return None, f"{'; '.join(lines + frame)}. Choose another place{advice}"
    models = {
        n: tuple(dict.fromkeys(ids + stored.models.get(names[n], ()))) for n, ids in asked.models.items()
    }
    asked = dataclasses.replace(asked, models=models, overwrites=stored.overwrites)
    if (
        dataclasses.replace(asked, attributes=old).to_bytes() == stored.to_bytes()
        and old["hyper"] == new["hyper"]
    ):
        return stored, ""
    changes = [
        *old.get("changes", []),
        *[[line for name in changed for line in changed[name]]] * bool(changed),
    ]
    return dataclasses.replace(asked, attributes=new | ({"changes": changes} if changes else {})), ""


def _frame(layout):
    """What no change can be allowed in."""
    further = {name: np.asarray(values).tolist() for name, values in layout.further.items()}
    return {
        "further": further,
        "variables": {n: [list(v.dims), v.dtype] for n, v in layout.variables.items()},
    }


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
        raise Damaged(
            f"{files.name} is damaged: {', '.join(found[2][:5])} (the same sweep trains these cells again)"
        )
    return found[1].dataset()


def _snapshot(files):
    """Something else when what stands there has changed."""
    contents = [files.get(key) for key in _history(files)]
    return files.stamp(), contents, files.list(PARTS), files.get("zarr.json")


class Status(NamedTuple):
    """What of a sweep's results is done; prints as lines."""

    path: str
    cells: Mapping[str, tuple[int, int]]  # model: (done, all)
    damaged: Sequence[str]  # keys of parts
    halfway: int  # groups of cells with a checkpoint
    writer: str  # who writes, in words

    def __str__(self) -> str:
        """One line a model."""
        rows = [
            f"{name or 'network'}: {done:,} of {n:,} cells done" for name, (done, n) in self.cells.items()
        ]
        rows += [f"damaged: {key}" for key in self.damaged]
        rows += [f"{self.halfway} groups of cells half way"] * bool(self.halfway)
        return "\n  ".join([self.path, *rows, self.writer])


def status(path: PathLike) -> Status:
    """What of a sweep's results is done, without training or loading any data; of the newest, where one overwrites.

    Raises:
      ValueError: if there are none, or the record is damaged.
    """
    files = files_at(path)
    layout = [ValueError(f"{files.name} holds no results of a sweep"), *records(files).values()][-1]
    if isinstance(layout, ValueError):
        raise layout
    view = View(layout)
    damaged = read_parts(files, view, set())
    cells = {name: (int(view.done[i].sum()), view.done.shape[1]) for i, name in enumerate(layout.models)}
    note, there = files.writer()
    last = f"; last written by {in_words(note)}" if note else ""
    writer = f"{in_words(note)} is writing there" if there else f"nobody on this host is writing there{last}"
    return Status(files.name, cells, damaged, len(files.list(STATES)), writer)
