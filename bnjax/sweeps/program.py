"""The compiled programs of a sweep: a group of cells at a time, `width` of them vmapped on each device.

A run that one call can hold is one program. A longer one is three, so that the host can store the state of the
group in between: `start`, `advance` for each piece of the run, `finish`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bnjax.sweeps.plan import Plan
from bnjax.training import Recorded, Run, RunState, TrainConfig, make_run, make_train, pieces
from bnjax.types import ApplyFn, Dataset, History, Hyperparams, InitFn, Model, Probe

# LLVM's levels above 1 took 1.5 to 1.8 times the compile time, and gave programs of the same speed
# (0.96 to 1.05 times, five networks; products and sums are library calls).
CPU_COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}

Outcome = tuple[History, dict[str, np.ndarray]]  # [cells, ...] each, the probe's figures beside


class Halfway(NamedTuple):
    """A group of cells between two pieces of its runs: arrays [cells, ...] on the host, or on the devices."""

    at: int  # the number of pieces that are done
    state: RunState
    at_start: dict[str, jax.Array]  # what the probe measured before the first step
    recorded: list[Recorded]  # [cells, evaluations, ...], of the pieces with evaluations


class Programs(NamedTuple):
    """What `compiled` returns, for `run_group`."""

    train: Callable[[Hyperparams, Dataset], Outcome]
    start: Callable[[Hyperparams, Dataset], tuple[RunState, dict[str, jax.Array]]]
    advance: Callable[..., tuple[RunState, Recorded | None]]
    finish: Callable[[RunState, Recorded], History]
    state: Callable[[], RunState]  # of one cell, its shapes
    replicated: NamedSharding  # where the data belongs
    split: NamedSharding  # where the cells belong


@functools.lru_cache(maxsize=16)
def compiled(
    init: InitFn,
    apply: ApplyFn,
    config: TrainConfig,
    devices: tuple[jax.Device, ...],
    probe: Probe | None,
) -> Programs:
    """The programs for groups on these devices. Kept, so that a second sweep compiles nothing."""
    mesh = Mesh(np.asarray(devices), ("cells",))
    split, same = PartitionSpec("cells"), PartitionSpec()
    model = Model(init, apply)
    train = make_train(model, config, probe or Probe(lambda _: {}))
    run: Run = make_run(model, config, probe)

    def spread(function, *specs):
        """The function of one cell, for [cells]: those of each device vmapped there. Specs: split, or same for all."""

        def group(*args):
            axes = [0 if spec == split else None for spec in specs]
            widths = {
                leaf.shape[0]
                for a, ax in zip(args, axes, strict=True)
                if ax == 0
                for leaf in jax.tree.leaves(a)
            }
            if widths == {1}:  # XLA's CPU reductions are some 30 times slower beside an axis of size 1
                one = [
                    a if ax is None else jax.tree.map(lambda v: v[0], a)
                    for a, ax in zip(args, axes, strict=True)
                ]
                return jax.tree.map(lambda v: v[None], function(*one))
            return jax.vmap(function, in_axes=axes)(*args)

        return jax.shard_map(
            group,
            mesh=mesh,
            in_specs=specs,
            out_specs=split,
            check_vma=False,  # cells never communicate
        )

    compile_ = functools.partial(
        jax.jit, compiler_options=CPU_COMPILER_OPTIONS if devices[0].platform == "cpu" else None
    )

    @functools.partial(compile_, static_argnums=(4, 5), donate_argnums=(0,))
    def advance(state, hyper, ds, first, steps, evaluations):
        def piece(state, hyper, ds, first):
            return run.advance(state, hyper, ds, first, steps, evaluations)

        return spread(piece, split, split, same, same)(state, hyper, ds, first)

    # The data is an argument: closed over, it would become part of the program's text.
    return Programs(
        compile_(spread(train, split, same)),
        compile_(spread(run.start, split, same)),
        advance,
        compile_(spread(run.finish, split, split)),
        functools.partial(_state, run),
        NamedSharding(mesh, same),
        NamedSharding(mesh, split),
    )


def _state(run: Run, ds: Dataset) -> RunState:
    return jax.eval_shape(run.start, Hyperparams(), ds)[0]


def programs_of(model: Model, config: TrainConfig, plan: Plan, probe: Probe | None) -> Programs:
    """The programs for this plan."""
    return compiled(model.init, model.apply, config, plan.devices, probe)


def memory_needed(programs: Programs, ds: Dataset, config: TrainConfig, plan: Plan) -> int:
    """Bytes on all devices together that the largest program of the plan takes, by the compiler's count.

    Compiles the program, which is kept for `run_group`.
    """
    shapes = (jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=programs.replicated) for a in ds)
    return _memory_needed(programs, Dataset(*shapes), config, Plan(*plan[:3]))


@functools.lru_cache(maxsize=16)  # the compiler takes some 50 ms to answer
def _memory_needed(programs, ds, config, plan):
    cells = Hyperparams(
        *(np.zeros(plan.group, np.uint32 if name == "seed" else np.float32) for name in Hyperparams._fields)
    )
    if at_once(config, plan):
        lowered = programs.train.lower(cells, ds)
    else:
        todo = pieces(config, plan.segment)
        state = jax.eval_shape(programs.start, cells, ds)[0]
        state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=programs.split), state)
        _, steps, evaluations = max(todo, key=lambda piece: piece[1:])
        lowered = programs.advance.lower(state, cells, ds, np.int32(0), steps, evaluations)
    found = lowered.compile().memory_analysis()
    if found is None:
        return 0
    sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return len(plan.devices) * (sum(sizes) - found.alias_size_in_bytes)


def run_group(
    programs: Programs,
    ds: Dataset,
    config: TrainConfig,
    cells: Hyperparams,
    plan: Plan,
    *,
    halfway: Halfway | None = None,
    between: Callable[[Halfway], None] = lambda _: None,
) -> Callable[[], Outcome]:
    """Trains at most `plan.group` cells.

    A run that one call of the compiled program holds is only begun here: the caller may begin the next one before it
    asks for the outcome, so that a device that is done first need not wait for the others.

    Args:
      programs: from `programs_of`.
      ds: the data, on the devices (`programs.replicated`).
      config: what is the same for all cells.
      cells: an array [cells] in each field. Fewer than the group are padded to it, and cut again.
      plan: devices, width, segment.
      halfway: of these cells, to go on from.
      between: called between two pieces, with arrays on the devices that are only valid until it returns.

    Returns:
      A function that waits for the outcome, numpy arrays [cells, ...].
    """
    count = len(cells.seed)
    pad = functools.partial(_padded, size=plan.group)
    hyper = pad(cells)
    todo = pieces(config, plan.segment)
    if at_once(config, plan):
        return functools.partial(_cut, programs.train(hyper, ds), count)
    if halfway is None:
        halfway = Halfway(0, *programs.start(hyper, ds), [])
    else:
        halfway = Halfway(
            halfway.at, pad(halfway.state), pad(halfway.at_start), [*map(pad, halfway.recorded)]
        )
    for first, steps, evaluations in todo[halfway.at :]:
        state, recorded = programs.advance(halfway.state, hyper, ds, np.int32(first), steps, evaluations)
        so_far = [*halfway.recorded, *([recorded] if evaluations else [])]
        halfway = Halfway(halfway.at + 1, state, halfway.at_start, so_far)
        if halfway.at < len(todo):
            between(Halfway(halfway.at, *(_cut(part, count) for part in halfway[1:])))
    recorded = jax.tree.map(lambda *values: np.concatenate(values, 1), *halfway.recorded)
    history = programs.finish(halfway.state, recorded)
    measured = {
        name: np.concatenate([np.asarray(values)[:, None], recorded.measured[name]], 1)
        for name, values in halfway.at_start.items()
    }
    outcome = _cut((history, measured), count)
    return lambda: outcome


def at_once(config: TrainConfig, plan: Plan) -> bool:
    """Whether one call of the compiled program holds a whole run."""
    return pieces(config, plan.segment) == pieces(config)


def _padded(tree, size):
    """[cells, ...] to [size, ...], by repeating the last cell."""
    return jax.tree.map(lambda a: np.asarray(a)[np.minimum(np.arange(size), len(a) - 1)], tree)


def _cut(tree, count):
    return jax.tree.map(lambda a: np.asarray(a)[:count], tree)


def in_groups(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """The indices, `size` at a time; the last may be fewer."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]
