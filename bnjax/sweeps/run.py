"""MANY training runs: every cell of a grid, a group at a time, on all local devices.

cells -> plan -> store -> parts -> data set. The store is in memory, or a folder or bucket that outlasts the process:
then the same sweep, called again, trains what is missing. Processes of one `jax.distributed` job take shares.
"""

import collections
import contextlib
import functools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.experimental import multihost_utils

from bnjax import choices, compilation
from bnjax import export as plain
from bnjax.sweeps import grid, program, provenance, store
from bnjax.sweeps.files import HOST, Memory, PathLike, files_at, in_words
from bnjax.sweeps.layout import Layout, Variable
from bnjax.sweeps.plan import fitting, make_plan
from bnjax.sweeps.progress import Progress
from bnjax.training import TrainConfig, check, pieces
from bnjax.types import Dataset, Hyperparams, Model, Probe, Snapshot

log = logging.getLogger("bnjax")

LONG_NAMES = {
    "train_loss": "training loss (cross-entropy, nats)",
    "train_accuracy": "training accuracy (fraction)",
    "test_loss": "test loss (cross-entropy, nats)",
    "test_accuracy": "test accuracy (fraction)",
    "diverged": "whether a loss was not finite",
    "diverged_step": "first step with a loss that is not finite; -1: none",
}
DTYPES = {"diverged": "bool", "diverged_step": "int32"}  # of the History; others: float32
GROUPS = 64  # calls of the compiled program that are committed together, at most


def sweep(
    model: Model | Mapping[str, Model],
    ds: Dataset,
    config: TrainConfig,
    axes: Mapping[str, Iterable],
    *,
    hyper: Hyperparams = Hyperparams(),  # noqa: B008 (immutable)
    probe: Probe | Mapping[str, Probe] | None = None,
    path: PathLike | None = None,
    overwrite: bool = False,
    allow_changed: Sequence[str] = (),
    export: bool = True,
    checkpoint_minutes: float | int = 5.0,
    about: Mapping[str, Any] | None = None,
    plan: Any = None,
    width: int | None = None,
    segment: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Trains one network per cell of the grid: one compiled program per model, all local devices.

    A cell's result depends on its own hyperparameters, the data and the configuration; on CPU, for one
    `width`, bitwise so, whatever the grid, the order, the neighbours or the number of devices. Apart from the
    results, memory does not depend on the size of the grid; each device holds the data.

    With a `path`, cells that are done are stored there. The same call again trains what is missing, and ends as if it
    had never been interrupted; a larger grid, which has all the cells of the one before, keeps these. Damaged cells
    are reported and retrained.

    Args:
      model: a network, or {name: network}; the latter adds the labelled dimension "model".
      ds: the data, standardized as the networks shall see it.
      config: what is the same for all cells.
      axes: {field of `Hyperparams`: values}, in the order of the result's dimensions.
      hyper: the values of the hyperparameters that are not swept.
      probe: measures each run before its first step and at each evaluation (`bnjax.Probe`); several models may have
        one each, {name: probe}, of the same quantities and layers. The compiled program is kept for the probe
        itself: pass the same one again to compile nothing.
      path: where the results are kept: a local folder, a URL or a store of obstore. None: in memory.
      overwrite: if other results stand at `path`, begin beside them: they count until the new ones are complete, and
        are removed then. What was begun so is continued by the same call.
      allow_changed: what may differ from the results at `path` that are continued, of "models", "config", "data",
        "versions" (of packages and of bnjax's code), "device" and "plan". The change is recorded with the results.
      export: also write the finished grid at `path` as plain Zarr, which `xarray.open_zarr` reads.
      checkpoint_minutes: most minutes of work that are lost when the process dies, but for what one call of the
        compiled program takes.
      about: further attributes to keep with the results, such as the command that made them; what is under "data"
        there joins the data's fingerprint.
      plan: no longer taken; use `width`.
      width: cells vmapped together on one device; default: by the size of the network.
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
      Busy: if another run on this host is writing there.
      OSError: if the results cannot be written, or were removed. What was stored stays.
      MemoryError: if the program does not fit into the devices' memory at the width that was asked for, at that of the
        results that are continued, or at any.
    """
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    if not models:
        raise ValueError("model is an empty mapping")
    if plan is not None:
        raise ValueError(
            f"plan={plan!r} is no longer taken: the width is chosen by size; width= sets another"
        )
    coords = grid.check(axes, hyper)
    for change in allow_changed:
        choices.check("allowed change", change, store.CHANGES)
    for one in models.values():
        check(one, ds, config)
    probes, variables, further = _variables(probe, models, ds, config, coords)
    plans = {
        name: make_plan(one, ds, config, width=width, segment=segment, devices=devices)
        for name, one in models.items()
    }
    about, fingerprint = dict(about or {}), provenance.fingerprint(ds)
    device = next(iter(plans.values())).devices[0]
    attributes = provenance.describe(models, config, coords, hyper, device)
    attributes |= {"data": {"fingerprint": fingerprint} | about.pop("data", {})} | about

    @functools.cache
    def identities():
        if path is None:
            return {name: str(i) for i, name in enumerate(models)}
        return {
            name: provenance.identity(one, ds, config, device, probes[name], fingerprint)
            for name, one in models.items()
        }

    def layout(plans):
        """What is asked for."""
        ids = {name: (f"{identities()[name]}.{one.width}.{one.segment}",) for name, one in plans.items()}
        planned = attributes | {"plan": {name: one.as_dict() for name, one in plans.items()}}
        return Layout(ids, isinstance(model, Mapping), coords, further, variables, planned)

    def ask(there):
        """The same at the widths and segments of these identities, unless others are given."""
        # Of several at which a network is there the first is its own.
        stored = {base: (int(w), int(s)) for base, w, s in (one.split(".") for one in reversed(list(there)))}
        found = dict(plans)
        for name in models.keys() & {name for name, base in identities().items() if base in stored}:
            w, s = stored[identities()[name]]
            found[name] = plans[name]._replace(width=width or w, segment=min(segment or s, config.steps))
        return layout(found)

    if path is not None:
        compilation.use_cache()
    seconds = 60.0 * checkpoint_minutes if path is not None else math.inf
    with _opened(path, ask, overwrite, allow_changed) as results:
        for name, (identity, *_) in results.layout.models.items():
            _, w, s = identity.split(".")
            plans[name] = plans[name]._replace(width=int(w), segment=int(s))
        cells = grid.cells(coords, hyper)
        todo = _shared(
            {name: results.missing(name, plans[name].group) for name in models}, results.done.shape
        )
        left = sum(len(group) for groups in todo.values() for group in groups)
        total = (
            results.done.size if jax.process_count() == 1 else left
        )  # of several processes each shows its share
        with Progress(total, done=total - left, enabled=progress and left > 0) as bar:
            for name in [name for name, groups in todo.items() if groups]:
                programs = program.programs_of(models[name], config, plans[name], probes[name])
                on_devices = jax.device_put(ds, programs.replicated)
                begun = results.done[results.index(name)].any() or any(results.states(name))
                may_change = width is None and jax.process_count() == 1 and not begun
                needed = functools.partial(program.memory_needed, programs, on_devices, config)
                plan = fitting(plans[name], needed, may_change=may_change)
                if plan != plans[name]:
                    plans[name] = plan
                    results.replan(name, layout(plans))
                    todo[name] = program.in_groups(np.concatenate(todo[name]), plan.group)
                _train(
                    results, name, programs, on_devices, config, cells, plan, todo[name], seconds, bar.count
                )
        _wait_for_others(results)
        whole = jax.process_index() == 0 and results.finished()
        found = results.dataset()
        if whole and path is not None:
            results.write_export(found if export else None)
        return found


def _train(results, name, programs, ds, config, cells, plan, groups, seconds, tick) -> None:
    """Trains groups of cells of one network, from where they are half way, and commits them.

    Args:
      results: where to.
      name: of the network.
      programs: its.
      ds: the data, on the devices.
      config: what is the same for all cells.
      cells: all cells of the grid, [cells] in each field.
      plan: devices, width, segment.
      groups: the places of the cells to train, group by group.
      seconds: between two commits, at most.
      tick: called with the name and the numbers of cells that are done, and of those that diverged.
    """
    pending, last = [], time.monotonic()
    kept = {}  # {key of a state: the places of its cells}
    halfway = {}  # {place of a group's first cell: the group half way}
    for key, at, arrays in results.states(name):
        order = np.argsort(at)
        try:
            for group in groups:
                if np.isin(group, at).all():
                    rows = order[np.searchsorted(at[order], group)]
                    found = program.unpacked(arrays, rows, programs, ds, config, plan)
                    halfway.setdefault(group[0], found)
            kept[key] = at
        except Exception as error:  # whatever odd arrays raise
            results.discard(key, f"cannot be read ({plain.first_line(error)})")

    def drop(condition):
        for key in [key for key, at in kept.items() if condition(at)]:
            results.files.delete(key)
            del kept[key]

    def commit():
        nonlocal last
        if pending:
            places = np.concatenate([group for group, _ in pending])
            values = {n: np.concatenate([found[n] for _, found in pending]) for n in pending[0][1]}
            results.commit(name, places, _of(cells, places), values)
            pending.clear()
            drop(lambda at: results.done[results.index(name), at].all())
        last = time.monotonic()

    def finish(group, found):
        values = program.outcome(found, len(group))
        pending.append((group, values))
        tick(name, len(group), int(values["diverged"].sum()))
        if len(pending) >= GROUPS or time.monotonic() - last >= seconds:
            commit()

    begun = collections.deque()
    for group in groups:
        run = program.run_group(programs, ds, config, _of(cells, group), plan, halfway.pop(group[0], None))
        for found in run:
            at_its_end = found.at == len(pieces(config, plan.segment))
            if at_its_end or seconds == math.inf:
                continue
            jax.block_until_ready(found.state.diverged_step)  # else the clock would be ahead of the devices
            if time.monotonic() - last >= seconds:
                while begun:
                    finish(*begun.popleft())
                arrays = program.packed(found, len(group))
                key = results.save_state(name, _of(cells, group), arrays)
                kept.pop(key, None)  # it may have been there
                drop(lambda at, group=group: np.isin(at, group).all())
                kept[key] = group
                commit()
        begun.append((group, found))
        if len(begun) > 1:  # the next group is begun before one is waited for
            finish(*begun.popleft())
    for group, found in begun:
        finish(group, found)
    commit()


def _of(cells, places):
    return jax.tree.map(lambda a: a[places], cells)


@contextlib.contextmanager
def _opened(path, ask, overwrite, allow_changed) -> Iterator[store.Store]:
    """Where this process writes to. Process 0 of a job opens the results, and the others join it then."""
    index, count = jax.process_index(), jax.process_count()
    if path is None:
        if count > 1:
            raise ValueError("a sweep by several processes needs a path, where they leave their shares")
        yield store.begin(Memory(), ask)
        return
    files, results, problem = files_at(path), None, None
    with contextlib.ExitStack() as stack:
        if index == 0:
            try:
                plain.check_place(files, store.LOG)
                before = stack.enter_context(files.writing())
                results = store.begin(files, ask, overwrite=overwrite, allow_changed=allow_changed)
                if before.get("host", HOST) != HOST and not results.done.all():
                    log.warning(
                        "%s was last written by %s; what is missing is trained here", path, in_words(before)
                    )
            except Exception as error:
                if count == 1:
                    raise
                problem = error
        if count > 1:
            number = -1 if results is None else int(results.key.rpartition("/")[2])
            number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
            if number < 0:
                raise problem or RuntimeError(f"process 0 could not open {path}; it says why")
            if results is None:
                stack.enter_context(files.writing(index))
                results = store.Store(files, f"{store.LOG}/{number:08d}")
            multihost_utils.sync_global_devices("bnjax.sweep: each is known as a writer")
        yield results


def _shared(todo, shape):
    """Of the groups that process 0 has found missing, this process's."""
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return todo
    numbers = np.full(shape, -1, np.int32)
    for i, groups in enumerate(todo.values()):
        for k, group in enumerate(groups):
            numbers[i, group] = k
    numbers = multihost_utils.broadcast_one_to_all(numbers)
    return {
        name: [np.flatnonzero(row == k) for k in range(index, row.max() + 1, count)]
        for name, row in zip(todo, numbers, strict=True)
    }


def _wait_for_others(results):
    """Until all cells are done, or nobody is left who would."""
    others = {*range(jax.process_count())} - {jax.process_index()}
    while others and not results.done.all():
        nobody = all(results.files.writer(i)[1] is False for i in others)
        results.refresh()
        if nobody:
            break
        time.sleep(0.5)


def _variables(probe, models, ds, config, coords):
    """({model: its probe or None}, the results' variables, the coordinates beside the model and the axes), checked."""
    probes = dict(probe) if isinstance(probe, Mapping) else dict.fromkeys(models, probe)
    if set(probes) != set(models):
        names = (
            f"each of the models {list(models)}" if list(models) != [""] else "the one model, and no mapping"
        )
        raise ValueError(f"probe must be one for {names}, got {list(probes)}")
    variables = {
        name: Variable(() if name in DTYPES else ("step",), DTYPES.get(name, "float32"), {"long_name": words})
        for name, words in LONG_NAMES.items()
    }
    further = {"step": np.asarray(config.eval_steps)}
    taken, seen = {*variables, *coords, "model", "step", "probe_step", "layer", "done"}, []
    for name, one in probes.items():
        shapes = {}
        if one is not None:
            probes[name] = one = one._replace(
                layers=tuple(one.layers)
            )  # a list is no key of the kept programs
            shapes = _measured(models[name], one, ds)
        seen.append((one and one.layers, {quantity: value.shape for quantity, value in shapes.items()}))
        for quantity, value in shapes.items():
            if quantity in taken:
                raise ValueError(
                    f"a probe must not call a quantity {quantity!r}, a name that results have anyway"
                )
            if value.shape not in ((), (len(one.layers),)):
                raise ValueError(
                    f"the probe's {quantity!r} must be a scalar or one figure for each of its layers "
                    f"{one.layers}, got shape {value.shape}"
                )
    if any(other != seen[0] for other in seen):
        raise ValueError(
            f"all models' probes must measure the same quantities in the same layers, got {seen}"
        )
    if one is not None:
        further["probe_step"] = np.asarray((0, *config.eval_steps))
        further |= {"layer": np.asarray(one.layers, object)} if one.layers else {}
        for quantity, value in shapes.items():
            dims = ("probe_step", "layer")[: 1 + len(value.shape)]
            variables[quantity] = Variable(dims, value.dtype.name, {})
    return probes, variables, further


def _measured(model, probe, ds) -> dict[str, jax.ShapeDtypeStruct]:
    """{quantity: the shape and type of what the probe measures}."""

    def measured(ds, hyper):
        state = model.init(jax.random.key(0), ds.train_x.shape[1:], hyper.init_scale)
        found = probe.measure(Snapshot(*state, *state, ds, hyper))
        return {name: jnp.asarray(value) for name, value in found.items()}

    return jax.eval_shape(measured, ds, Hyperparams())
