"""MANY training runs: every cell of a grid, a group at a time, on all local devices.

cells -> plan -> store -> parts -> data set. The store is in memory, or a folder or bucket that outlasts the process:
then the same sweep, called again, trains what is missing. Processes of one `jax.distributed` job take shares.
"""

import collections
import contextlib
import functools
import itertools
import json
import logging
import math
import numbers
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import xarray as xr
from jax._src import distributed  # for its key-value store, as other libraries do; nothing public has it

from bnjax import choices, compilation, probes
from bnjax import export as plain
from bnjax.networks import as_model, describe, drawn_anew, is_network
from bnjax.sweeps import grid, program, provenance, store
from bnjax.sweeps import static as static_axes
from bnjax.sweeps.files import HOST, Memory, PathLike, files_at
from bnjax.sweeps.layout import Layout, Variable, parsed
from bnjax.sweeps.progress import Progress
from bnjax.training import TrainConfig
from bnjax.types import Dataset, Hyperparams, Model, Probe

Value = TypeVar("Value")

log = logging.getLogger("bnjax")

VARIABLES = {
    "train_loss": Variable(("step",), "float32", {"long_name": "training loss"}),
    "train_accuracy": Variable(("step",), "float32", {"long_name": "training accuracy (fraction)"}),
    "test_loss": Variable(("step",), "float32", {"long_name": "test loss"}),
    "test_accuracy": Variable(("step",), "float32", {"long_name": "test accuracy (fraction)"}),
    "diverged": Variable((), "bool", {"long_name": "whether a loss was not finite"}),
    "diverged_step": Variable((), "int32", {"long_name": "first step with a loss that is not finite; -1: none"}),
}
RESERVED = ("model", "step", "probe_step", "layer", "done", "bnjax", "zarr.json")
GROUPS = 64  # calls of the compiled program that are committed together, at most
A_YEAR = 365 * 24 * 3600 * 1000  # in milliseconds
_calls = itertools.count()  # of `_together`: the same in all processes of a job


def sweep(
    model: Any,
    ds: Dataset,
    config: TrainConfig,
    axes: Mapping[str, Iterable],
    *,
    hyper: Hyperparams = Hyperparams(),  # noqa: B008 (immutable)
    probe: Probe | Mapping[str, Probe] | Callable[[Model], Probe] | None = None,
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
      model: a network, or {name: network}; the latter adds the labelled dimension "model". A network is whatever
        `bnjax.as_model` takes. One that stands for its own single draw is drawn anew for each seed if its class needs
        no more than the seed. Or a function that makes a network: axes that are its keywords, whose values are numbers
        or strings, become dimensions like the others (before these). Each combination is compiled by itself.
      ds: the data, standardized as the networks shall see it.
      config: what is the same for all cells.
      axes: {field of `Hyperparams`, name in its `extra` or keyword of the function that makes the network: values}, in
        the order of the result's dimensions. A keyword with the name of a hyperparameter is "model.momentum".
      hyper: the values of the hyperparameters that are not swept.
      probe: measures each run before its first step and at each evaluation (`bnjax.Probe`); several models may have
        one each, {name: probe} or a function of the model, of the same quantities and layers. The compiled program
        is kept for the probe itself: pass the same one again to compile nothing.
      path: where the results are kept: a local folder, a URL or a store of obstore. None: in memory.
      overwrite: if other results stand at `path`, begin beside them: they count until the new ones are complete, and
        are removed then. What was begun so is continued by the same call.
      allow_changed: what may differ from the results at `path` that are continued, of "models", "config", "data",
        "versions" (of packages and of bnjax's code), "device" and "plan". The change is recorded with the results.
      export: also write the finished grid at `path` as plain Zarr, which `xarray.open_zarr` reads.
      checkpoint_minutes: most minutes of work that are lost when the process dies, but for what one call of the
        compiled program takes; at least 0, and may be infinite.
      about: further attributes to keep with the results, such as the command that made them; what is under "data"
        there joins the data's fingerprint.
      plan: no longer taken; use `width`.
      width: cells vmapped together on one device; default: by the size of the network.
      segment: most steps in one call of the compiled program; changes no result (on CPU). Default: about a minute's.
      devices: default: all local devices.
      progress: show cells done, cells diverged and the time left.

    Returns:
      A labelled data set of dimensions (model,) *axes, and step (the numbers of steps at the evaluations):
      train_loss, train_accuracy, test_loss, test_accuracy [..., step] and diverged, diverged_step [...]. Where
      targets are floats there are no accuracies.
      What a probe measures has dimension probe_step (0, and the numbers of steps at the evaluations), and layer if
      it is one figure a layer; it is not finite where the run's state makes it so.
      Its attributes hold the configuration and the versions of what made it.

    Raises:
      ValueError: for axes, hyperparameters, data, names of models, probes (their layers and quantities), devices,
        numbers or changes that are not allowed, or if what stands at `path` was made by another sweep (it says in
        what they differ), before any cell is trained; or without a `path` for several processes.
      Damaged: (a ValueError) if what stands there is damaged beyond repair.
      Busy: if another run on this host is writing there.
      OSError: if the results cannot be written, or were removed. What was stored stays.
      MemoryError: if the program does not fit into the devices' memory at the width that was asked for, at that of the
        results that are continued, or at any.
    """
    for argument, value in {"width": width, "segment": segment}.items():
        if value is not None:
            choices.check_count(argument, value)
    width, segment = (value and int(value) for value in (width, segment))  # JSON holds no integers of numpy
    number = isinstance(checkpoint_minutes, numbers.Real) and not isinstance(checkpoint_minutes, bool)
    if not (number and checkpoint_minutes >= 0):
        raise ValueError(f"checkpoint_minutes must be a number of at least 0, got {checkpoint_minutes!r}")
    static = {}
    if static_axes.is_maker(model):
        static, axes = static_axes.split(model, axes, hyper)
        model = static_axes.networks(model, static) if static else model()
    models = _models(model, "seed" in axes)
    if not models:
        raise ValueError("model is an empty mapping")
    if plan is not None:
        raise ValueError(f"plan={plan!r} is no longer taken: the width is chosen by size; width= sets another")
    if path is None and jax.process_count() > 1:
        raise ValueError("a sweep by several processes needs a path, where they leave their shares")
    coords = grid.check(axes, hyper)
    for change in allow_changed:
        choices.check("allowed change", change, store.CHANGES)
    probe_of = _probes(probe, models)
    seconds = 60.0 * checkpoint_minutes if path is not None else math.inf
    index, count = jax.process_index(), jax.process_count()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Progress(enabled=progress))
        trainers = program.trainers(
            models, ds, config, probe_of, width=width, segment=segment, devices=devices, extra=hyper.extra
        )
        variables, further = _variables(probe_of, models, ds, config, [*static, *coords], hyper.extra)
        kernels = _kernels(models, ds, config, coords, hyper)
        device, fingerprint = next(iter(trainers.values())).devices[0], provenance.fingerprint(ds)
        attributes = provenance.describe(
            models, config, coords, hyper, device, fingerprint, about or {}, kernels=kernels
        )
        bases = {name: str(i) for i, name in enumerate(models)}
        if path is not None:
            compilation.use_cache()
            bases = {n: provenance.identity(one.text(), fingerprint, device) for n, one in trainers.items()}

        def asked(there, fit):
            """The layout, at the width that is given, or those of the identities there; if `fit`, that fit."""
            # Of several at which a network is there the first is its own.
            stored, found = dict(map(parsed, reversed(list(there)))), {}
            for name, one in trainers.items():
                base = bases[name]
                one = one._replace(width=width or stored.get(base, one.width))
                if fit and stored.get(base) != one.width:
                    bar.compiling(name)
                    one = one.fitted(may_change=width is None and base not in stored)
                found[name] = one
            ids = {name: (f"{bases[name]}.{one.width}",) for name, one in found.items()}
            planned = attributes | {"plan": {name: one.plan for name, one in found.items()}}
            return Layout(ids, isinstance(model, Mapping), coords, further, variables, planned, static)

        def opened():
            if index > 0:
                return None, ""
            results = _opened(stack, path, asked, overwrite, allow_changed)
            return results, f"{results.key} {np.packbits(results.done).tobytes().hex()}"

        results, shown = _together(opened)
        results, _ = _together(lambda: (results or _joined(path, bases, *shown.split(" ")), ""))
        for name, (identity, *_) in results.layout.models.items():
            trainers[name] = trainers[name]._replace(width=parsed(identity)[1])

        def share(name, trainer):
            """In groups: of the missing cells every n-th block of a width, which is the same in all processes."""
            places, read = np.flatnonzero(~results.done[results.index(name)]), program.unpacked
            places = places[np.arange(len(places)) // trainer.width % count == index]
            return results.groups(name, places, trainer.group, functools.partial(read, trainer))

        def train():
            todo = {name: share(name, trainer) for name, trainer in trainers.items()}
            left = sum(len(places) for groups in todo.values() for places, *_ in groups)
            total = results.done.size if count == 1 else left  # of several processes each shows its share
            bar.begin(total, total - left)
            for name in [name for name, groups in todo.items() if groups]:
                bar.compiling(name)
                trainer = trainers[name].fitted(may_change=False)
                _train(results, name, trainer, todo[name], seconds, bar.count)
            return None, ""

        _together(train)
        found, until = results.dataset(), time.monotonic() + 60 * (count > 1)
        while "done" in found and time.monotonic() < until:
            time.sleep(0.5)  # network file systems may show others' files late
            found = results.dataset()
        if index == 0 and results.finished() and path is not None:
            if export:
                plain.write(found, results.files)
            else:
                plain.remove(results.files)
        return found


def _opened(stack, path, asked, overwrite, allow_changed) -> store.Store:
    """Opens the results, and is known as their writer as long as the stack lasts."""
    if path is None:
        return store.begin(Memory(), asked)
    files = files_at(path)
    plain.check_place(files, store.LOG)
    before = stack.enter_context(files.writing())
    results = store.begin(files, asked, overwrite=overwrite, allow_changed=allow_changed)
    if before and f" on {HOST} " not in before and not results.done.all():
        log.warning("%s was last written by %s; what is missing is trained here", path, before)
    return results


def _joined(path, bases, key, done) -> store.Store:
    """The results that process 0 has opened, with what was done then: all share that."""
    results = store.Store(files_at(path), key)
    if bases != results.layout.bases:
        raise ValueError(
            "the processes of a job must have the same networks, data, configuration, code and kind of processor; "
            f"process {jax.process_index()} has others than process 0"
        )
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(done), np.uint8), count=results.done.size)
    results.done = bits.astype(bool).reshape(results.done.shape)
    return results


def _together(function: Callable[[], tuple[Value, str]]) -> tuple[Value, str]:
    """Calls it in each process of the job. Returns its value here, and process 0's text, when all have called it.

    An error in one is an error in all, then. Not by a collective operation, which gives up on a process that is half
    an hour behind.
    """
    if jax.process_count() == 1:
        return function()
    value, text, failed, error, index, call = None, "", "", None, jax.process_index(), next(_calls)
    try:
        value, text = function()
    except Exception as raised:
        failed, error = f"process {index} failed: {plain.first_line(raised)}; what is stored stays", raised
        log.error("%s (the others are waited for)", failed)
    client = distributed.global_state.client
    client.key_value_set(f"bnjax/{call}/{index}", json.dumps([text, failed]))
    keys = [f"bnjax/{call}/{i}" for i in range(jax.process_count())]
    told = [json.loads(client.blocking_key_value_get(key, A_YEAR)) for key in keys]
    if failures := [failed for _, failed in told if failed]:
        raise error or RuntimeError(failures[0])
    return value, told[0][0]


def _train(results, name, trainer, groups, seconds, tick) -> None:
    """Trains these groups of cells, from where they are half way, and commits them every so many seconds.

    `tick` is told the network's name, and the numbers of cells that are done and of those that diverged.
    """
    pending, begun, last = [], collections.deque(), time.monotonic()

    def commit():
        nonlocal last
        if pending:
            places = np.concatenate([places for places, _, _ in pending])
            values = {n: np.concatenate([found[n] for _, found, _ in pending]) for n in pending[0][1]}
            results.commit(name, places, values, [key for _, _, key in pending])
            pending.clear()
        last = time.monotonic()

    def finish(places, state, key):
        found = program.outcome(state, len(places))
        values = {variable: found[variable] for variable in results.layout.variables}
        pending.append((places, values, key))
        tick(name, len(places), int(values["diverged"].sum()))
        if len(pending) >= GROUPS or time.monotonic() - last >= seconds:
            commit()

    for places, halfway, key in groups:
        for step, state in program.run_group(trainer, results.cells(places), halfway):
            if seconds == math.inf or step == trainer.config.steps:
                continue
            jax.block_until_ready(state.diverged_step)  # else the clock would be ahead of the devices
            if time.monotonic() - last >= seconds:
                while begun:
                    finish(*begun.popleft())
                key = results.save_state(name, places, program.packed(state, len(places)), key)
                commit()
        begun.append((places, state, key))
        if len(begun) > 1:  # the next group is begun before one is waited for
            finish(*begun.popleft())
    for one in begun:
        finish(*one)
    commit()


def _models(model, redraw):
    """{name: network as a model}, "" for one without a name; a single draw of its own is drawn anew if `redraw`."""
    several = isinstance(model, Mapping) and not is_network(model)
    given = dict(model) if several else {"": model}
    for name in given if several else ():
        choices.check_name("a model's name", name)
    return {name: as_model(drawn_anew(one) if redraw else one) for name, one in given.items()}


def _kernels(models, ds, config, coords, hyper):
    """{network: what of it is scaled, decayed and not seen}, after checking that seeds and scales change something."""
    found = {name: describe(one, ds.train_x.shape[1:], extra=hyper.extra) for name, one in models.items()}
    for name, one in found.items():
        network = f"the network {name!r}" if name else "the network"
        if len(coords.get("seed", ())) > 1 and not one.names("drawn"):
            raise ValueError(
                f"seed is swept, but {network} does not draw from it: give a function that draws the network, "
                "bnjax.interop.nnx.as_model(lambda rngs: Net(..., rngs=rngs)) or "
                "bnjax.interop.equinox.as_model(lambda key: Net(..., key=key))"
            )
        if ("init_scale" in coords or hyper.init_scale != 1) and not one.names("scaled"):
            raise ValueError(f"init_scale has nothing to multiply in {network}:\n{one}")

    def names(one):
        # An optimizer of one's own decays what it says.
        decayed = [] if callable(config.optimizer) else one.names("decayed")
        return {"scaled": one.names("scaled"), "decayed": decayed, "not_seen": one.not_seen}

    return {name: names(one) for name, one in found.items()}


def _probes(probe, models):
    """{model: its probe or None}."""
    if callable(probe):
        probe = {name: probe(model) for name, model in models.items()}
    found = dict(probe) if isinstance(probe, Mapping) else dict.fromkeys(models, probe)
    if {*found} != {*models}:
        names = f"each of the models {list(models)}" if list(models) != [""] else "the one model, and no mapping"
        raise ValueError(f"probe must be one for {names}, got {list(found)}")
    if odd := [one for one in found.values() if not isinstance(one, Probe | None)]:
        raise ValueError(f"probe must be a bnjax.Probe, got {type(odd[0]).__name__}")
    return {name: one and one._replace(layers=_layers(one.layers)) for name, one in found.items()}


def _layers(names):
    """As a tuple, since a list is no key of the kept programs."""
    found = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else (None,)
    if not all(isinstance(name, str) for name in found) or len({*found}) < len(found):
        raise ValueError(f"a probe's layers must be a list of different strings, got {names!r}")
    return found


def _variables(probe_of, models, ds, config, names, extra):
    """(the results' variables, the coordinates beside the model and the axes of those names), checked."""
    variables, further = dict(VARIABLES), {"step": config.eval_steps}
    if clash := {*names} & {*variables, *RESERVED}:
        raise ValueError(f"axes must not have the names {sorted(clash)}, which results have anyway")
    kind = {"cross_entropy": " (cross-entropy, nats)", "squared": " (squared, mean over outputs)"}.get(config.loss, "")
    for name in ("train_loss", "test_loss"):
        variables[name] = variables[name]._replace(attrs={"long_name": variables[name].attrs["long_name"] + kind})
    if not np.issubdtype(ds.train_y.dtype, np.integer):
        del variables["train_accuracy"], variables["test_accuracy"]
    taken = {*variables, *names, *RESERVED}
    measured = [one and (one.layers, _measured(one, models[name], ds, extra)) for name, one in probe_of.items()]
    if any(other != measured[0] for other in measured):
        raise ValueError(f"all models' probes must measure the same quantities in the same layers, got {measured}")
    if measured[0]:
        layers, quantities = measured[0]
        further |= {"probe_step": (0, *config.eval_steps)} | ({"layer": layers} if layers else {})
        for quantity, (shape, dtype) in quantities.items():
            if quantity in taken:
                raise ValueError(f"a probe must not call a quantity {quantity!r}, a name that results have anyway")
            variables[quantity] = Variable(("probe_step", "layer")[: 1 + len(shape)], dtype, {})
    return variables, further


def _measured(probe, model, ds, extra):
    """{quantity: (shape, type)}."""

    def measure(snapshot):
        found = probe.measure(snapshot)
        for quantity in found:  # here, since JAX sorts them
            choices.check_name("a probe's quantity", quantity)
        return found

    found = probes.shapes(probe._replace(measure=measure), model, ds, extra)
    return {q: (v.shape, v.dtype.name) for q, v in found.items()}
