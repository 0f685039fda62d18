"""MANY training runs: every cell of a grid, in chunks, on all local devices, into a store.

The store is in memory, or a folder or URL that outlasts the process: then the same sweep, asked for again, goes on
where it stopped. Processes of one `jax.distributed` job each take a share of the chunks.
"""

import bisect
import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.experimental import multihost_utils

from bnjax import choices
from bnjax.sweeps import exchange, grid, measure, program, store
from bnjax.sweeps.leases import Busy, lease, writers
from bnjax.sweeps.plan import Plan, make_plan
from bnjax.sweeps.progress import Progress
from bnjax.sweeps.record import circumstances, computes, describe, differences, fingerprint
from bnjax.sweeps.storage import Files, StoreLike
from bnjax.training import Recorded, TrainConfig, check, pieces
from bnjax.types import Dataset, History, Hyperparams, Model, Probe, Snapshot

LONG_NAMES = {
    "train_loss": "training loss (cross-entropy, nats)",
    "train_accuracy": "training accuracy (fraction)",
    "test_loss": "test loss (cross-entropy, nats)",
    "test_accuracy": "test accuracy (fraction)",
    "diverged": "whether the run became non-finite",
    "diverged_step": "first step with a non-finite loss or state; -1: none",
}
DTYPES = {"diverged": "bool", "diverged_step": "int32"}  # of the History; others: float32
CHANGES = ("models", "config", "data", "versions", "device", "plan")  # what may be allowed to change


def sweep(
    model: Model | Mapping[str, Model],
    ds: Dataset,
    config: TrainConfig,
    axes: Mapping[str, Iterable],
    *,
    hyper: Hyperparams = Hyperparams(),  # noqa: B008 (immutable)
    probe: Probe | Mapping[str, Probe] | None = None,
    path: StoreLike | None = None,
    allow_changed: Sequence[str] = (),
    checkpoint_minutes: float | int = 5.0,
    about: Mapping[str, Any] | None = None,
    plan: str = "auto",
    width: int | None = None,
    segment: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Trains one network per cell of the grid: one compiled program per model, all local devices.

    A cell's result depends on its own hyperparameters, the data and the configuration; on CPU, for one
    `width`, bitwise so, whatever the grid, the order, the neighbours or the number of devices. Memory
    does not grow with the number of cells, but for the results themselves; each device holds the data.

    With a `path`, finished cells are committed there chunk by chunk. The same call again trains what is missing, and
    ends as if it had never been interrupted; with a larger grid, which has all the cells of the old one, it keeps
    these. What is found damaged is said, and trained again.

    Args:
      model: a network, or {name: network}; the latter adds the labelled dimension "model".
      ds: the data, standardized as the networks shall see it.
      config: what is the same for all cells.
      axes: {field of `Hyperparams`: values}, in the order of the result's dimensions.
      hyper: the values of the hyperparameters that are not swept.
      probe: measures each run before its first step and at each evaluation (`bnjax.Probe`); several models may have
        one each, {name: probe}, of the same quantities and layers. The compiled program is kept for the probe
        itself: pass the same one again to compile nothing. The last bits of a run may differ from those without.
      path: where the results are kept: a local folder, a URL or a zarr store. None: in memory.
      allow_changed: what may differ from the results at `path` that are continued, of "models", "config", "data",
        "versions" (of packages and of bnjax's code), "device" and "plan". The change is recorded with the results.
      checkpoint_minutes: most minutes of work that are lost when the process dies, but for what one call of the
        compiled program takes.
      about: further attributes to keep with the results, such as the command that made them; what is under "data"
        there joins the data's fingerprint, and must agree when results are continued.
      plan: how the width and the segment are chosen, where there are no results at `path` that have theirs: "size": by
        the size of the network; "measure": by a measurement of some 30 seconds, which is kept in the user's cache
        folder, and for few cells at a narrower width, if that is faster; "auto": as was measured before (one process
        alone), or measured now if the sweep is a long one, or else by size.
      width: cells vmapped together on one device; default: as planned.
      segment: most steps in one call of the compiled program; default: likewise.
      devices: default: all local devices.
      progress: show cells done, cells diverged and the time left.

    Returns:
      A labelled data set of dimensions (model,) *axes, and step (the numbers of steps at the evaluations):
      train_loss, train_accuracy, test_loss, test_accuracy [..., step] and diverged, diverged_step [...].
      What a probe measures has dimension probe_step (0, and the numbers of steps at the evaluations), and layer if
      it is one figure a layer; it is not finite where the run's state makes it so.
      Its attributes hold the configuration and the versions of what made it.

    Raises:
      ValueError: for axes, hyperparameters, data, probes or a width that are not allowed, or if what stands at
        `path` was made by another sweep (it says in what they differ), before any cell is trained; or without a
        `path` for several processes.
      Damaged: (a ValueError) if what stands there is damaged beyond repair.
      Busy: if another run is writing there.
      OSError: if the results cannot be written. What was committed stays.
      MemoryError: if the program does not fit into the devices' memory at the width that was asked for, at that of the
        results that are continued, or at any.
    """
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    if not models:
        raise ValueError("model is an empty mapping")
    coords = grid.check(axes, hyper)
    for change in allow_changed:
        choices.check("allowed change", change, CHANGES)
    choices.check("plan", plan, measure.HOW)
    for one in models.values():
        check(one, ds, config)
    probes = _probes(probe, models, ds, coords)
    stored = None if path is None else _stored_at(exchange.recovered(path))

    cells = grid.cells(coords, hyper)

    def planned(stored, how):
        given = {"width": width, "segment": segment, "devices": devices}
        known = {} if stored is None else stored.attributes["plan"]
        plans = {n: make_plan(m, ds, config, **given, stored=known.get(n)) for n, m in models.items()}
        if known or width is not None:
            return plans
        plans = {n: measure.chosen(models[n], ds, config, p, len(cells.seed), how) for n, p in plans.items()}
        return (
            plans
            if segment is None
            else {n: p._replace(segment=min(segment, config.steps)) for n, p in plans.items()}
        )

    plans = planned(stored, plan)
    variables, further = _variables(models, ds, config, probes)
    shape = tuple(len(values) for values in coords.values())
    about = dict(about or {})
    data = {"fingerprint": fingerprint(ds)} | about.pop("data", {})
    attributes = describe(models, config, hyper, coords) | {"data": data} | circumstances(plans) | about
    attributes["computes"] = {name: computes(one, ds, config) for name, one in models.items()}
    layout = store.Layout(
        tuple(models),
        isinstance(model, Mapping),
        coords,
        further,
        variables,
        store.tile_of(shape, max(plan.chunk for plan in plans.values())),
        attributes,
    )
    with _shared(path, layout, stored, cells, allow_changed) as results:
        plans = planned(results.layout, "size")  # of the first process, in all of them
        todo = results.remaining()[jax.process_index() :: jax.process_count()]
        left = sum(len(chunk.cells) for chunk in todo)
        every = len(models) * len(cells.seed)
        total = every if jax.process_count() == 1 else left  # of several processes each shows its share
        with Progress(total, done=total - left, enabled=progress and bool(todo)) as bar:
            on_devices = {}
            for chunk in todo:
                name = results.layout.models[chunk.model]
                programs = program.programs_of(models[name], config, plans[name], probes[name])
                if name not in on_devices:
                    on_devices = {name: jax.device_put(ds, programs.replicated)}
                    plans[name] = _fitting(
                        results, name, programs, on_devices[name], config, plans[name], width
                    )
                train_chunk(
                    results,
                    chunk,
                    programs,
                    on_devices[name],
                    config,
                    cells,
                    plans[name],
                    seconds=60.0 * checkpoint_minutes if path is not None else None,
                    tick=functools.partial(bar.advance, name),
                )
        _wait_for_others(results)
        return store.load(results.files.store)


def _fitting(results, name, programs, ds, config, plan, width) -> Plan:
    """The plan if it fits into memory, or a narrower one, which is recorded; as long as no cell is trained."""
    model = results.layout.models.index(name)
    begun = results.files.list(store.LEDGER) + results.files.list(store.CHECKPOINT)
    begun = any(key.startswith(f"{model}.") for key in begun)
    may_change = width is None and not begun and jax.process_count() == 1
    found = measure.check_memory(programs, ds, config, plan, may_change=may_change)
    if found != plan:
        attributes = results.layout.attributes
        plans = attributes["plan"] | {name: found.as_dict()}
        results.describe(attributes | {"plan": plans})
    return found


def train_chunk(
    results: store.Store,
    chunk: store.Chunk,
    programs: program.Programs,
    ds: Dataset,
    config: TrainConfig,
    cells: Hyperparams,
    plan: Plan,
    *,
    seconds: float | None,
    tick: Callable[[int, int], None],
) -> None:
    """Trains a chunk's cells, from its checkpoint if there is one, and commits it.

    Args:
      results: where to.
      chunk: which.
      programs: of its model.
      ds: the data, on the devices.
      config: what is the same for all cells.
      cells: all cells of the grid, [cells] in each field.
      plan: devices, width, segment.
      seconds: between checkpoints; None: there are none.
      tick: called with the numbers of cells that are done, and of those that diverged.
    """
    layout = results.layout
    count = len(chunk.cells)
    done = np.zeros(count, bool)
    values = _empty(layout, chunk)
    values["done"][:] = True
    ours = jax.tree.map(lambda a: a[chunk.cells.start : chunk.cells.stop], cells)
    saved = results.load_checkpoint(chunk) if seconds is not None else {}
    if "done" in saved:
        done = saved["done"]
        values |= {name: saved[f"value {name}"] for name in values}
        if done.any():
            tick(int(done.sum()), int(values["diverged"][done].sum()))
    halfway = _unpacked(saved, programs, ds, config, plan, layout)
    last = time.monotonic()

    def keep(group=None, state=None):
        nonlocal last
        if seconds is None or time.monotonic() - last < seconds:
            return
        state = {} if state is None else _packed(group, state, plan)
        results.save_checkpoint(chunk, _cells_done(done, values) | state)
        last = time.monotonic()

    def groups():
        """(indices in the chunk, where they are half way or None)."""
        started = np.zeros(0, int)
        if halfway is not None:
            started, state = halfway
            for where in program.in_groups(np.arange(len(started)), plan.group):
                part = jax.tree.map(lambda a, w=where: a[w], tuple(state[1:]))
                yield started[where], program.Halfway(state.at, *part)
        rest = np.setdiff1d(np.flatnonzero(~done), started)
        for group in program.in_groups(rest, plan.group):
            yield group, None

    def finish(group, outcome):
        history, measured = outcome()
        for name, value in (history._asdict() | measured).items():
            values[name][group] = value
        done[group] = True
        tick(len(group), int(history.diverged.sum()))
        keep()

    ahead = int(program.at_once(config, plan))  # groups that are begun before one is waited for
    begun = collections.deque()
    for group, state in groups():
        outcome = program.run_group(
            programs,
            ds,
            config,
            jax.tree.map(lambda a, g=group: a[g], ours),
            plan,
            halfway=state,
            between=functools.partial(keep, group),
        )
        begun.append((group, outcome))
        if len(begun) > ahead:
            finish(*begun.popleft())
    for group, outcome in begun:
        finish(group, outcome)
    results.commit(chunk, values)


def _empty(layout: store.Layout, chunk: store.Chunk) -> dict[str, np.ndarray]:
    count = len(chunk.cells)
    return {name: np.zeros((count, *layout.extent(name)), v.dtype) for name, v in layout.variables.items()}


def _cells_done(done: np.ndarray, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a checkpoint holds of the cells of a chunk."""
    return {"done": done} | {f"value {name}": value for name, value in values.items()}


def _packed(group: np.ndarray, state: program.Halfway, plan: Plan) -> dict[str, np.ndarray]:
    """A group half way as arrays."""
    leaves = {f"leaf {i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tuple(state[1:])))}
    return {"group": group, "at": np.asarray(state.at), "segment": np.asarray(plan.segment)} | leaves


def _unpacked(saved, programs, ds, config, plan, layout) -> tuple[np.ndarray, program.Halfway] | None:
    """(its indices in the chunk, the group half way), or None. The inverse of `_packed`."""
    if "group" not in saved or int(saved["segment"]) != plan.segment:
        return None
    at = int(saved["at"])
    quantities = {name: 0 for name, v in layout.variables.items() if "probe_step" in v.dims}
    one = Recorded((0, 0, 0, 0), quantities)
    recorded = [one for *_, evaluations in pieces(config, plan.segment)[:at] if evaluations]
    structure = jax.tree.structure((programs.state(ds), quantities, recorded))
    leaves = [saved[f"leaf {i}"] for i in range(structure.num_leaves)]
    return saved["group"], program.Halfway(at, *jax.tree.unflatten(structure, leaves))


def _variables(models, ds, config, probes) -> tuple[dict[str, store.Variable], dict[str, np.ndarray]]:
    """The results' variables, and the coordinates beside the model and the axes."""
    found = {
        name: store.Variable(
            ("step",) if name not in DTYPES else (),
            DTYPES.get(name, "float32"),
            {"long_name": LONG_NAMES[name]},
        )
        for name in History._fields
    }
    further = {"step": np.asarray(config.eval_steps)}
    name, one = next(iter(probes.items()))
    if one is not None:
        further["probe_step"] = np.asarray((0, *config.eval_steps))
        if one.layers:
            further["layer"] = np.asarray(one.layers, object)
        for quantity, value in _measured(models[name], one, ds).items():
            dims = ("probe_step", "layer") if value.shape else ("probe_step",)
            found[quantity] = store.Variable(dims, value.dtype.name, {})
    return found | {"done": store.Variable((), "bool", {"long_name": "whether the cell is done"})}, further


def _measured(model, probe, ds) -> dict[str, jax.ShapeDtypeStruct]:
    """{quantity: the shape and type of what the probe measures}."""

    def measured(ds, hyper):
        state = model.init(jax.random.key(0), ds.train_x.shape[1:], hyper.init_scale)
        return {
            name: jnp.asarray(v) for name, v in probe.measure(Snapshot(*state, *state, ds, hyper)).items()
        }

    return jax.eval_shape(measured, ds, Hyperparams())


def _probes(probe, models, ds, coords):
    """{model: its probe or None}, after checking that what they measure fits one data set."""
    probes = dict(probe) if isinstance(probe, Mapping) else dict.fromkeys(models, probe)
    if set(probes) != set(models):
        names = (
            f"each of the models {list(models)}" if list(models) != [""] else "the one model, and no mapping"
        )
        raise ValueError(f"probe must be one for {names}, got {list(probes)}")
    taken = {*History._fields, *coords, "model", "step", "probe_step", "layer", "done"}
    seen = {}
    for name, one in probes.items():
        if one is None:
            seen[name] = None
            continue

        shapes = {quantity: value.shape for quantity, value in _measured(models[name], one, ds).items()}
        for quantity, shape in shapes.items():
            if quantity in taken:
                raise ValueError(
                    f"a probe must not call a quantity {quantity!r}, a name that results have anyway"
                )
            if shape not in ((), (len(one.layers),)):
                raise ValueError(
                    f"the probe's {quantity!r} must be a scalar or one figure for each of its layers "
                    f"{one.layers}, got shape {shape}"
                )
        seen[name] = (tuple(one.layers), shapes)
        probes[name] = one._replace(layers=tuple(one.layers))  # a list cannot be a key of the kept programs
    if any(other != next(iter(seen.values())) for other in seen.values()):
        raise ValueError(
            f"all models' probes must measure the same quantities in the same layers, got {seen}"
        )
    return probes


@contextlib.contextmanager
def _shared(path, *given) -> Iterator[store.Store]:
    """The store of `_opened`, for each process of a distributed job: process 0 opens it and says what is done."""
    index, count = jax.process_index(), jax.process_count()
    if count > 1 and path is None:
        raise ValueError(
            "a sweep by several processes needs a path, where they leave their shares of the results"
        )
    with contextlib.ExitStack() as stack:
        results, problem = None, None
        if index == 0:
            try:
                results = stack.enter_context(_opened(path, *given))
            except Exception as error:
                if count == 1:
                    raise
                problem = error
        if count > 1:
            results = _joined(path, results, problem, stack)
        yield results


def _joined(path, results, problem, stack) -> store.Store:
    """What process 0 found, in all processes; the only time that they wait for one another."""
    size = -1 if results is None else len(results.layout.chunks())
    size = int(multihost_utils.broadcast_one_to_all(np.int32(size)))
    if size < 0:
        raise problem or RuntimeError(f"process 0 could not open {path}; it says why")
    there = np.zeros(size, bool)
    if results is not None:
        there[:] = [chunk.key in results.committed for chunk in results.layout.chunks()]
    there = multihost_utils.broadcast_one_to_all(there)
    if results is None:
        files = Files(path)
        stack.enter_context(lease(files, jax.process_index(), jax.process_count()))
        results = store.Store(files, store.read_layout(files))
        results.committed |= {
            chunk.key for chunk, yes in zip(results.layout.chunks(), there, strict=True) if yes
        }
    return results


def _wait_for_others(results: store.Store) -> None:
    """Until all chunks are committed, or nobody is left who would."""
    chunks = len(results.layout.chunks())
    while jax.process_count() > 1 and len(results.files.list(store.LEDGER)) < chunks:
        if len(writers(results.files)) < 2:
            break
        time.sleep(0.2)


@contextlib.contextmanager
def _opened(
    path: StoreLike | None,
    asked: store.Layout,
    stored: store.Layout | None,
    cells: Hyperparams,
    allow_changed: Sequence[str],
) -> Iterator[store.Store]:
    """The store to write to, for this run alone: a new one, or that at `path`, extended if need be."""
    if path is None:
        yield store.create(Files(None), asked)
        return
    if stored is not None:
        asked = _continued(path, stored, asked, cells, allow_changed)
    files = Files(path)
    if stored is not None and not _same_grid(stored, asked):
        with lease(files, 0, jax.process_count()) as rest:
            _check_unchanged(files, stored)
            if len(writers(files)) > 1:
                raise Busy(f"{path}: another process of a job that is not done is writing there")
            exchange.remove_left_over(files, beside=True)
            extended = _extended(store.open_store(files, stored), asked, cells)
            rest()  # nothing may be written while the folder is replaced
            exchange.replace(extended, files.local)
        stored = asked
    with lease(files, 0, jax.process_count()):
        _check_unchanged(files, stored)
        exchange.remove_left_over(files, beside=stored is not None)
        yield store.create(files, asked) if stored is None else store.open_store(files, asked)


def _stored_at(files: Files) -> store.Layout | None:
    """What the results that stand there are; None: nothing stands there."""
    found = store.read_layout(files)
    if found is None and not exchange.empty(files):
        found = store.read_layout(files)  # another run may have begun
        if found is None:
            raise ValueError(
                f"{files.name} is not empty, and holds no results of a sweep: choose another place"
            )
    return found


def _check_unchanged(files: Files, stored: store.Layout | None) -> None:
    """Raises Busy if what stands there is not what was read before the lease was taken."""
    now, before = (one and one.as_attributes()["checksum"] for one in (_stored_at(files), stored))
    if now != before or exchange.cut_off(files):
        raise Busy(f"{files.name}: another run is writing there, or was a moment ago")


def _same_grid(one: store.Layout, other: store.Layout) -> bool:
    return one.as_attributes()["layout"]["axes"] == other.as_attributes()["layout"]["axes"] and (
        one.attributes["hyper"] == other.attributes["hyper"]
    )


def _continued(path, stored, asked, cells, allow_changed) -> store.Layout:
    """The layout with which the stored results go on, after refusing what would mix or lose cells."""
    old, new = stored.attributes, asked.attributes
    found = {name: differences(_compared(old, name), _compared(new, name), name) for name in CHANGES}
    changed = {name: lines for name, lines in found.items() if lines}
    if (
        not {*changed} - {"plan"} and old.get("computes") != new["computes"]
    ):  # else it may be due to the change
        changed["models"] = differences(old.get("computes"), new["computes"], "computes")
    frame = differences(_frame(stored), _frame(asked), "layout")
    lost = {*_tuples(_stored_cells(stored))} - {*_tuples(cells)}
    if lost:
        frame += [f"{len(lost)} of the cells there are not among those asked for"]
        frame += differences({k: old[k] for k in ("axes", "hyper")}, {k: new[k] for k in ("axes", "hyper")})
    refused = [name for name in changed if name not in allow_changed]
    if frame or refused:
        lines = [line for name in refused for line in changed[name]] + frame
        advice = f", or allow_changed={','.join(changed)}" if not frame else ""
        raise ValueError(f"{path} holds other results: {'; '.join(lines)}. Choose another place{advice}")
    if changed:
        lines = [line for several in changed.values() for line in several]
        new = new | {"changes": [*old.get("changes", []), lines]}
    same = _same_grid(stored, asked)
    return asked._replace(
        attributes=new if changed or not same else old, tile=stored.tile if same else asked.tile
    )


def _compared(attributes, name):
    """What must agree: of a plan the width and the segment."""
    value = attributes.get(name)
    if name != "plan" or value is None:
        return value
    return {model: {k: plan[k] for k in ("width", "segment")} for model, plan in value.items()}


def _frame(layout: store.Layout) -> dict[str, Any]:
    """What no change can be allowed in: the names of models, the variables and their coordinates."""
    found = layout.as_attributes()["layout"]
    return {name: found[name] for name in ("models", "labelled", "further", "variables")}


def _stored_cells(stored: store.Layout) -> Hyperparams:
    return grid.cells(stored.axes, Hyperparams(**stored.attributes["hyper"]))


def _tuples(cells: Hyperparams) -> list[tuple]:
    return list(zip(*(field.tolist() for field in cells), strict=True))


def _extended(old: store.Store, asked: store.Layout, cells: Hyperparams) -> Path:
    """A folder beside the store with the larger grid, in which the old one's cells are done."""
    if old.files.local is None:
        raise ValueError(f"{old.files.name}: only the grid of results in a local folder can be extended")
    folder = exchange.extended(old.files.local)
    new = store.create(Files(folder), asked)
    places = {cell: i for i, cell in enumerate(_tuples(_stored_cells(old.layout)))}
    sources = np.array([places.get(cell, -1) for cell in _tuples(cells)])
    for i in range(len(asked.models)):
        there = [chunk for chunk in old.layout.chunks() if chunk.model == i and chunk.key in old.committed]
        starts = [chunk.cells.start for chunk in there]
        read = functools.lru_cache(maxsize=64)(lambda k, there=there: old.read(there[k]))
        for chunk in (c for c in asked.chunks() if c.model == i):
            values = _empty(asked, chunk)
            done = np.zeros(len(chunk.cells), bool)
            for j, source in enumerate(sources[chunk.cells.start : chunk.cells.stop]):
                k = bisect.bisect_right(starts, source) - 1
                if source >= 0 and k >= 0 and source in there[k].cells:
                    found = read(k)
                    done[j] = True
                    for name in values:
                        values[name][j] = found[name][source - there[k].cells.start]
            if done.all():
                new.commit(chunk, values)
            elif done.any():
                values["done"][:] = True
                new.save_checkpoint(chunk, _cells_done(done, values))
    return folder
