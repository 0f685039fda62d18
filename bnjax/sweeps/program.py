"""The compiled programs of a sweep: a group of cells at a time, `width` of them vmapped on each device.

`start` draws the networks and `advance` takes a piece of their runs, so that the host can store the state in between.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bnjax.sweeps.grid import DTYPES
from bnjax.sweeps.plan import Plan, fitting
from bnjax.training import Recorded, RunState, TrainConfig, history_of, make_run, pieces
from bnjax.types import ApplyFn, Dataset, Hyperparams, InitFn, Model, Probe

# LLVM's levels above 1 took 1.5 to 1.8 times the compile time, and gave programs of the same speed
# (0.96 to 1.05 times, five networks; products and sums are library calls).
CPU_COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}
AXIS = "group"  # of the vmap


class Halfway(NamedTuple):
    """A group of cells between two pieces of its runs: arrays [cells, ...] on the host, or on the devices."""

    at: int  # the number of pieces that are done
    state: RunState
    at_start: dict[str, jax.Array]  # what the probe measured before the first step
    recorded: list[Recorded]  # [cells, evaluations, ...], of the pieces with evaluations

    def cut(self, rows: np.ndarray) -> "Halfway":
        """Some of the cells, by their numbers."""
        return Halfway(self.at, *jax.tree.map(lambda a: a[rows], self[1:]))


class Programs(NamedTuple):
    """What `compiled` returns."""

    start: Callable[[Hyperparams, Dataset], RunState]
    measure: Callable[[RunState, Hyperparams, Dataset], dict[str, jax.Array]] | None  # before the first step
    advance: Callable[..., tuple[RunState, Recorded | None]]
    replicated: NamedSharding  # where the data belongs
    split: NamedSharding  # where the cells belong


@functools.lru_cache(maxsize=16)
def compiled(
    init: InitFn, apply: ApplyFn, config: TrainConfig, devices: tuple[jax.Device, ...], probe: Probe | None
) -> Programs:
    """The programs for groups on these devices. Kept, so that a second sweep compiles nothing."""
    mesh = Mesh(np.asarray(devices), ("cells",))
    split, same = PartitionSpec("cells"), PartitionSpec()
    options = CPU_COMPILER_OPTIONS if devices[0].platform == "cpu" else None

    def compile_(part, *specs, static=(), donate=()):
        """That part of `Run` for [cells]: those of each device vmapped there. Specs: split, or same."""
        axes = [0 if spec == split else None for spec in specs]

        def program(*args):
            def on_one_device(*cells):
                several = jax.tree.leaves(cells[0])[0].shape[0] > 1
                run = make_run(Model(init, apply), config, probe, AXIS if several else None)

                def call(*one):
                    return getattr(run, part)(*one, *args[len(specs) :])

                if several:
                    return jax.vmap(call, in_axes=axes, axis_name=AXIS)(*cells)
                # XLA's CPU reductions are some 30 times slower beside an axis of size 1.
                one = (
                    jax.tree.map(lambda v: v[0], a) if axis == 0 else a
                    for a, axis in zip(cells, axes, strict=True)
                )
                return jax.tree.map(lambda v: v[None], call(*one))

            # Cells never communicate between devices: there is nothing to check.
            spread = jax.shard_map(on_one_device, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
            return spread(*args[: len(specs)])

        return jax.jit(program, compiler_options=options, static_argnums=static, donate_argnums=donate)

    # The data is an argument: closed over, it would become part of the program's text. What is measured at the start
    # is a program of its own: as a part of `start` it would change the last bits of some weights.
    return Programs(
        compile_("start", split, same),
        None if probe is None else compile_("measure", split, split, same),
        compile_("advance", split, split, same, same, static=(4, 5), donate=0),
        NamedSharding(mesh, same),
        NamedSharding(mesh, split),
    )


class Trainer(NamedTuple):
    """Trains the cells of one network, a group at a time."""

    programs: Programs
    ds: Dataset  # on the devices
    config: TrainConfig
    plan: Plan

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """Those of each run."""
        return pieces(self.config, self.plan.segment)

    def fitted(self, *, may_change: bool) -> "Trainer":
        """The same at a width whose program fits into memory; see `plan.fitting`."""
        return self._replace(
            plan=fitting(
                self.plan, lambda plan: memory_needed(self._replace(plan=plan)), may_change=may_change
            )
        )


def trainers(
    models: Mapping[str, Model],
    ds: Dataset,
    config: TrainConfig,
    probes: Mapping[str, Probe | None],
    plans: Mapping[str, Plan],
) -> dict[str, Trainer]:
    """One for each network, on the same devices, which share the data. Nothing is compiled yet."""
    found = {
        name: compiled(one.init, one.apply, config, plans[name].devices, probes[name])
        for name, one in models.items()
    }
    ds = jax.device_put(ds, next(iter(found.values())).replicated)
    return {name: Trainer(programs, ds, config, plans[name]) for name, programs in found.items()}


def memory_needed(trainer: Trainer) -> int:
    """Bytes on all devices together that the plan's largest program takes, by the compiler's count; it is kept."""
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=trainer.programs.replicated) for a in trainer.ds
    ]
    return _memory_needed(trainer._replace(ds=Dataset(*shapes), plan=trainer.plan._replace(narrowed=None)))


@functools.lru_cache(maxsize=16)  # the compiler takes some 50 ms to answer
def _memory_needed(trainer):
    cells, state, _ = _shapes(trainer)
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=trainer.programs.split), state
    )
    _, steps, evaluations = max(trainer.pieces, key=lambda piece: piece[1:])
    lowered = trainer.programs.advance.lower(state, cells, trainer.ds, np.int32(0), steps, evaluations)
    found = lowered.compile().memory_analysis()
    if found is None:
        return 0
    sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return len(trainer.plan.devices) * (sum(sizes) - found.alias_size_in_bytes)


def run_group(trainer: Trainer, cells: Hyperparams, halfway: Halfway | None = None) -> Iterator[Halfway]:
    """Trains at most `plan.group` cells (fewer are padded to it), from their start or from half way.

    Yields:
      The group after each piece. The devices may still be working at it; once the next is asked for, its state is gone.
    """

    def padded(a):
        """[cells, ...] to [group, ...], by repeating the last cell."""
        return a[np.minimum(np.arange(trainer.plan.group), len(a) - 1)] if np.ndim(a) else a

    programs, ds, hyper = trainer.programs, trainer.ds, jax.tree.map(padded, cells)
    if halfway is None:
        state = programs.start(hyper, ds)
        halfway = Halfway(0, state, programs.measure(state, hyper, ds) if programs.measure else {}, [])
    else:
        halfway = jax.tree.map(padded, halfway)
    for first, steps, evaluations in trainer.pieces[int(halfway.at) :]:
        state, recorded = programs.advance(halfway.state, hyper, ds, np.int32(first), steps, evaluations)
        so_far = [*halfway.recorded, *([recorded] if evaluations else [])]
        halfway = Halfway(int(halfway.at) + 1, state, halfway.at_start, so_far)
        yield halfway


def outcome(halfway: Halfway, count: int) -> dict[str, np.ndarray]:
    """{variable: [count, ...]} of a group that is at its end; waits for the devices."""
    recorded = jax.tree.map(lambda *values: np.concatenate(values, 1), *halfway.recorded)
    measured = {
        name: np.concatenate([np.asarray(values)[:, None], recorded.measured[name]], 1)
        for name, values in halfway.at_start.items()
    }
    history = history_of(np.asarray(halfway.state.diverged_step), recorded)
    return {name: value[:count] for name, value in (history._asdict() | measured).items()}


def packed(halfway: Halfway, count: int) -> dict[str, np.ndarray]:
    """A group half way as arrays by name, cut to its cells."""
    leaves = map(np.asarray, jax.tree.leaves(halfway))
    return {f"leaf {i}": leaf[:count] if leaf.ndim else leaf for i, leaf in enumerate(leaves)}


def unpacked(trainer: Trainer, arrays: Mapping[str, np.ndarray]) -> Halfway:
    """The inverse. Raises an error if it is none."""
    at, todo = int(arrays["leaf 0"]), trainer.pieces
    cells, state, at_start = _shapes(trainer)
    recorded = [
        trainer.programs.advance.eval_shape(state, cells, trainer.ds, np.int32(first), steps, evaluations)[1]
        for first, steps, evaluations in todo[:at]
        if evaluations
    ]
    shapes, structure = jax.tree.flatten(Halfway(at, state, at_start, recorded))
    leaves = [at, *(arrays[f"leaf {i}"] for i in range(1, len(shapes)))]
    forms = ([(a.dtype, a.shape[1:]) for a in several[1:]] for several in (leaves, shapes))
    if len(arrays) != len(leaves) or not 0 < at < len(todo) or next(forms) != next(forms):
        raise ValueError("of another program")
    return jax.tree.unflatten(structure, leaves)


def _shapes(trainer):
    """(cells, state, what the probe measured at the start) of a group."""
    cells = Hyperparams(*(np.zeros(trainer.plan.group, dtype) for dtype in DTYPES.values()))
    state, measure = trainer.programs.start.eval_shape(cells, trainer.ds), trainer.programs.measure
    return cells, state, measure.eval_shape(state, cells, trainer.ds) if measure else {}


def in_groups(places: np.ndarray, size: int) -> list[np.ndarray]:
    """The places, `size` at a time; the last may be fewer."""
    return [places[start : start + size] for start in range(0, len(places), size)]
