"""MANY training runs: every cell of a grid, in chunks, on all local devices."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bnjax.sweeps import grid
from bnjax.sweeps.plan import Plan, make_plan
from bnjax.sweeps.progress import Progress
from bnjax.sweeps.store import circumstances, describe
from bnjax.training import TrainConfig, check, make_train
from bnjax.types import ApplyFn, Dataset, History, Hyperparams, InitFn, Model, Probe, Snapshot

# LLVM's levels above 1 took 1.5 to 1.8 times the compile time, and gave programs of the same speed
# (0.96 to 1.05 times, five networks; products and sums are library calls).
CPU_COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}

LONG_NAMES = {
    "train_loss": "training loss (cross-entropy, nats)",
    "train_accuracy": "training accuracy (fraction)",
    "test_loss": "test loss (cross-entropy, nats)",
    "test_accuracy": "test accuracy (fraction)",
    "diverged": "whether the run became non-finite",
    "diverged_step": "first step with a non-finite loss or state; -1: none",
}


def sweep(
    model: Model | Mapping[str, Model],
    ds: Dataset,
    config: TrainConfig,
    axes: Mapping[str, Iterable],
    *,
    hyper: Hyperparams = Hyperparams(),  # noqa: B008 (immutable)
    probe: Probe | Mapping[str, Probe] | None = None,
    width: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Trains one network per cell of the grid: one compiled program per model, all local devices.

    A cell's result depends on its own hyperparameters, the data and the configuration; on CPU, for one
    `width`, bitwise so, whatever the grid, the order, the neighbours or the number of devices. Memory
    does not grow with the number of cells, but for the results themselves; each device holds the data.

    Args:
      model: a network, or {name: network}; the latter adds the labelled dimension "model".
      ds: the data, standardized as the networks shall see it.
      config: what is the same for all cells.
      axes: {field of `Hyperparams`: values}, in the order of the result's dimensions.
      hyper: the values of the hyperparameters that are not swept.
      probe: measures each run before its first step and at each evaluation (`bnjax.Probe`); several models may have
        one each, {name: probe}, of the same quantities and layers. The compiled program is kept for the probe
        itself: pass the same one again to compile nothing. The last bits of a run may differ from those without.
      width: cells vmapped together on one device; default: chosen for network and device.
      devices: default: all local devices.
      progress: show cells done, cells diverged and the time left.

    Returns:
      A labelled data set of dimensions (model,) *axes, and step (the numbers of steps at the evaluations):
      train_loss, train_accuracy, test_loss, test_accuracy [..., step] and diverged, diverged_step [...].
      What a probe measures has dimension probe_step (0, and the numbers of steps at the evaluations), and layer if
      it is one figure a layer; it is not finite where the run's state makes it so.
      Its attributes hold the configuration and the versions of what made it.

    Raises:
      ValueError: for axes, hyperparameters, data, probes or a width that are not allowed, before any work.
    """
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    if not models:
        raise ValueError("model is an empty mapping")
    coords = grid.check(axes, hyper)
    cells = grid.cells(coords, hyper)
    for one in models.values():
        check(one, ds, config)
    probes = _probes(probe, models, ds, coords)
    plans = {name: make_plan(m, ds, width=width, devices=devices) for name, m in models.items()}
    shape = tuple(len(values) for values in coords.values())

    attributes = describe(models, config, hyper, coords) | circumstances(plans)

    histories = []
    with Progress(len(models) * len(cells.seed), enabled=progress) as bar:
        for name, one in models.items():
            chunks = []
            for chunk in run_cells(one, ds, config, cells, plans[name], probes[name]):
                chunks.append(chunk)
                bar.advance(name, len(chunk[0].diverged), int(chunk[0].diverged.sum()))
            history = jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)
            histories.append(jax.tree.map(lambda a: a.reshape((*shape, *a.shape[1:])), history))

    dims = tuple(coords)
    coords["step"] = np.asarray(config.eval_steps)
    if probe is not None:
        coords["probe_step"] = np.asarray((0, *config.eval_steps))
        layers = next(iter(probes.values())).layers
        if layers:
            coords["layer"] = np.asarray(layers, object)
    if isinstance(model, Mapping):
        dims, coords = ("model", *dims), {"model": np.asarray(list(models), object), **coords}
        history, measured = jax.tree.map(lambda *values: np.stack(values), *histories)
    else:
        ((history, measured),) = histories

    def variables(values, further):
        for name, value in values.items():
            attrs = {"long_name": LONG_NAMES[name]} if name in LONG_NAMES else {}
            yield name, ((*dims, *further)[: value.ndim], value, attrs)

    data = dict([*variables(history._asdict(), ["step"]), *variables(measured, ["probe_step", "layer"])])
    return xr.Dataset(data, coords, attributes)


def _probes(probe, models, ds, coords):
    """{model: its probe or None}, after checking that what they measure fits one data set."""
    probes = dict(probe) if isinstance(probe, Mapping) else dict.fromkeys(models, probe)
    if set(probes) != set(models):
        names = (
            f"each of the models {list(models)}" if list(models) != [""] else "the one model, and no mapping"
        )
        raise ValueError(f"probe must be one for {names}, got {list(probes)}")
    taken = {*History._fields, *coords, "model", "step", "probe_step", "layer"}
    seen = {}
    for name, one in probes.items():
        if one is None:
            seen[name] = None
            continue

        def measured(ds, hyper, model=models[name], measure=one.measure):
            state = model.init(jax.random.key(0), ds.train_x.shape[1:], hyper.init_scale)
            values = measure(Snapshot(*state, *state, ds, hyper))
            return {quantity: jnp.asarray(value) for quantity, value in values.items()}

        shapes = {
            quantity: value.shape for quantity, value in jax.eval_shape(measured, ds, Hyperparams()).items()
        }
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


def run_cells(
    model: Model,
    ds: Dataset,
    config: TrainConfig,
    cells: Hyperparams,
    plan: Plan,
    probe: Probe | None = None,
) -> Iterator[tuple[History, dict[str, np.ndarray]]]:
    """Trains the cells chunk by chunk.

    Args:
      model: the network.
      ds: the data.
      config: what is the same for all cells.
      cells: an array [cells] in each field.
      plan: devices and width. A last chunk that is short is padded to the width and cut again.
      probe: what to measure along the way.

    Yields:
      (History, what the probe measured) of numpy arrays [cells in the chunk, ...], in the order of the cells.
    """
    program, replicated = _program(model.init, model.apply, config, plan.devices, probe)
    ds = jax.device_put(ds, replicated)
    total = len(cells.seed)
    for start in range(0, total, plan.chunk):
        stop = min(start + plan.chunk, total)
        indices = np.minimum(np.arange(start, start + plan.chunk), total - 1)
        chunk = program(jax.tree.map(lambda a, i=indices: a[i], cells), ds)
        yield jax.tree.map(lambda a, n=stop - start: np.asarray(a)[:n], chunk)


@functools.lru_cache(maxsize=16)
def _program(
    init: InitFn,
    apply: ApplyFn,
    config: TrainConfig,
    devices: tuple[jax.Device, ...],
    probe: Probe | None,
) -> tuple[Callable[[Hyperparams, Dataset], tuple[History, dict[str, jax.Array]]], NamedSharding]:
    """The program that trains a chunk, and where its data belongs. Kept, so that a second sweep compiles nothing."""
    mesh = Mesh(np.asarray(devices), ("cells",))
    split, same = PartitionSpec("cells"), PartitionSpec()
    train = make_train(Model(init, apply), config, probe or Probe(lambda _: {}))

    def train_group(hyper, ds):  # hyper [width], on one device
        if hyper.seed.shape == (1,):  # XLA's CPU reductions are some 30 times slower beside an axis of size 1
            history = train(jax.tree.map(lambda a: a[0], hyper), ds)
            return jax.tree.map(lambda a: a[None], history)
        return jax.vmap(train, in_axes=(0, None))(hyper, ds)

    # The data is an argument: closed over, it would become part of the program's text.
    program = jax.jit(
        jax.shard_map(
            train_group,
            mesh=mesh,
            in_specs=(split, same),
            out_specs=split,
            check_vma=False,  # cells never communicate
        ),
        compiler_options=CPU_COMPILER_OPTIONS if devices[0].platform == "cpu" else None,
    )
    return program, NamedSharding(mesh, same)
