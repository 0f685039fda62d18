"""The compiled programs of a sweep: a group of cells at a time, `width` of them vmapped on each device.

`start` draws the networks and `advance` takes a segment of their runs, so that the host can store the state in between.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bnjax import compilation
from bnjax.sweeps.plan import memory, segment_of, width_of
from bnjax.training import RunState, TrainConfig, check, make_run, make_train
from bnjax.types import RANGES, Dataset, Hyperparams, Model, Probe, range_of

AXIS = "group"  # of the vmap


class Functions(NamedTuple):
    """A network as far as it is compiled: what programs are kept by."""

    init: Callable
    apply: Callable
    prepare: Callable | None

    @classmethod
    def of(cls, model: Model) -> "Functions":
        """Of that network."""
        return cls(model.init, model.apply, model.prepare)

    @property
    def model(self) -> Model:
        """With nothing else."""
        return Model(self.init, self.apply, prepare=self.prepare)


@functools.lru_cache(maxsize=32)  # each holds 300 memory maps and more, of 65,530 that Linux allows
def compiled(
    functions: Functions, config: TrainConfig, devices: tuple[jax.Device, ...], probe: Probe | None
) -> tuple[Callable, Callable]:
    """The programs of a `Trainer`. Kept, so that a second sweep compiles nothing."""
    mesh = Mesh(np.asarray(devices), ("cells",))
    split, same = PartitionSpec("cells"), PartitionSpec()
    options = compilation.options(devices[0].platform)

    def compile_(part, *specs, donate=()):
        """That part of `make_run` for [cells]: those of each device vmapped there. Specs: split, or same."""
        axes = [0 if spec == split else None for spec in specs]

        def on_one_device(*args):
            several = jax.tree.leaves(args[0])[0].shape[0] > 1
            call = make_run(functions.model, config, probe, AXIS if several else None)[part]
            if several:
                return jax.vmap(call, in_axes=axes, axis_name=AXIS)(*args)
            # XLA's CPU reductions are some 30 times slower beside an axis of size 1.
            one = (jax.tree.map(lambda v: v[0], a) if axis == 0 else a for a, axis in zip(args, axes, strict=True))
            return jax.tree.map(lambda v: v[None], call(*one))

        # Cells never communicate between devices: there is nothing to check.
        spread = jax.shard_map(on_one_device, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
        return jax.jit(spread, compiler_options=options, donate_argnums=donate)

    # The data is an argument: closed over, it would become part of the program's text.
    return compile_(0, split, same), compile_(1, split, split, same, same, same, donate=0)


class Trainer(NamedTuple):
    """Trains the cells of one network, a group at a time."""

    model: Model
    ds: Dataset  # on all the devices
    config: TrainConfig
    probe: Probe | None
    devices: tuple[jax.Device, ...]  # each runs `width` cells at a time
    width: int  # cells vmapped together on one device
    extra: tuple[str, ...] = ()  # the names in `Hyperparams.extra`
    asked: int | None = None  # for the segment
    narrowed: str | None = None  # why the width is less than it was meant to be

    @property
    def group(self) -> int:
        """Cells in one call of the compiled program."""
        return self.width * len(self.devices)

    @property
    def segment(self) -> int:
        """Most steps in one call of the compiled program."""
        size = (self.model, self.ds, self.config, self.width, self.devices[0], self.extra)
        return self.asked or segment_of(*size)

    @property
    def programs(self) -> tuple[Callable[..., RunState], Callable[..., RunState]]:
        """start(hyper, ds), and advance(state, hyper, ds, first, until), after which that state is gone."""
        return compiled(Functions.of(self.model), self.config, self.devices, self.probe)

    @property
    def plan(self) -> dict[str, Any]:
        """The plan of the cells' runs, as results keep it."""
        narrowed = {"narrowed": self.narrowed} if self.narrowed else {}
        return {"width": self.width, "devices": len(self.devices)} | narrowed

    def text(self) -> str:
        """A digest of the program of ONE cell as the compiler is given it; not of places in the source."""
        shapes = Dataset(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.ds))
        return _text(Functions.of(self.model), self.config, self.probe, self.extra, shapes)

    def fitted(self, *, may_change: bool) -> "Trainer":
        """The same at its width, or the widest narrower one whose program fits into the devices' memory.

        Raises:
          MemoryError: if none fits, or a narrower one would and the width must not change.
        """
        found, available = self, memory(self.devices)
        while True:
            try:
                takes = memory_needed(found)
                if takes <= available:
                    return found
                needs = f"needs {takes / 2**30:.2f} GiB of memory, and there are {available / 2**30:.2f} GiB"
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                needs = "needs more memory than the compiler found"
            needs = f"width {found.width} on {len(self.devices)} devices {needs}"
            if found.width == 1 or not may_change:
                raise MemoryError(needs + ": use a smaller width" * (found.width > 1))
            found = self._replace(width=found.width // 2, narrowed=needs)


def trainers(
    models: Mapping[str, Model],
    ds: Dataset,
    config: TrainConfig,
    probes: Mapping[str, Probe | None],
    *,
    width: int | None = None,
    segment: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Trainer]:
    """One for each network, on the same devices, which share the data. Nothing is compiled yet.

    Raises:
      ValueError: if the data does not fit the networks, or there are no devices.
    """
    devices = tuple(jax.local_devices() if devices is None else devices)
    if not devices:
        raise ValueError("devices must be at least one (None: all local ones), got an empty list")
    read = [check(one, ds, config, extra) for one in models.values()]
    if unread := sorted({*extra}.difference(*read)):
        raise ValueError(f"nothing reads {unread} in extra: neither a network, nor the loss or the optimizer")
    ds = jax.device_put(ds, NamedSharding(Mesh(np.asarray(devices), ("cells",)), PartitionSpec()))
    return {
        name: Trainer(
            one,
            ds,
            config,
            probes[name],
            devices,
            width or width_of(one, ds, devices[0], (*extra,)),
            (*extra,),
            segment,
        )
        for name, one in models.items()
    }


def memory_needed(trainer: Trainer) -> int:
    """Bytes on all devices together that the largest program takes at that width, by the compiler's count."""
    shapes = Dataset(*(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in trainer.ds))
    return len(trainer.devices) * _memory_needed(*trainer.programs, trainer.group, trainer.extra, shapes)


@functools.lru_cache(maxsize=32)  # the compiler takes some 50 ms to answer
def _memory_needed(start, advance, group, extra, ds):
    cells, state = _shapes(start, group, extra, ds)
    split = NamedSharding(ds.train_x.sharding.mesh, PartitionSpec("cells"))
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split), state)
    found = advance.lower(state, cells, ds, np.int32(0), np.int32(1)).compile().memory_analysis()
    if found is None:
        return 0
    sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return sum(sizes) - found.alias_size_in_bytes


def run_group(trainer: Trainer, cells: Hyperparams, state: RunState | None = None) -> Iterator[tuple[int, RunState]]:
    """Trains at most `group` cells (fewer are padded to it), from their start or from a state [cells, ...].

    Yields:
      (number of steps done, state) after each segment. The devices may still be working at it; once the next is asked
      for, it is gone.
    """

    def padded(a):
        """[cells, ...] to [group, ...], by repeating the last cell."""
        return a[np.minimum(np.arange(trainer.group), len(a) - 1)]

    ds, hyper = trainer.ds, jax.tree.map(padded, cells)
    (start, advance), segment = trainer.programs, trainer.segment
    first = 0 if state is None else int(state.step[0])
    state = start(hyper, ds) if state is None else jax.tree.map(padded, state)
    while first < trainer.config.steps:
        until = min(first + segment, trainer.config.steps)
        state = advance(state, hyper, ds, np.int32(first), np.int32(until))
        yield (first := until), state


def outcome(state: RunState, count: int) -> dict[str, np.ndarray]:
    """{variable: [count, ...]} of a group that is at its end; waits for the devices."""
    found = jax.device_get(state._replace(params=(), batch_stats=(), opt_state=(), initial=None))
    return {name: value[:count] for name, value in (found.history._asdict() | found.measured).items()}


def packed(state: RunState, count: int) -> dict[str, np.ndarray]:
    """The state of a group as arrays by name, cut to its cells."""
    return {f"leaf {i}": np.asarray(leaf)[:count] for i, leaf in enumerate(jax.tree.leaves(state))}


def unpacked(trainer: Trainer, arrays: Mapping[str, np.ndarray]) -> RunState:
    """The inverse. Raises an error if it is none."""
    shapes, structure = jax.tree.flatten(_shapes(trainer.programs[0], trainer.group, trainer.extra, trainer.ds)[1])
    leaves = [arrays[f"leaf {i}"] for i in range(len(arrays))]
    forms = ([(a.dtype, a.shape[1:]) for a in several] for several in (leaves, shapes))
    state = jax.tree.unflatten(structure, leaves)
    if next(forms) != next(forms) or not 0 < state.step.min() == state.step.max() < trainer.config.steps:
        raise ValueError("of another program")
    return state


def _shapes(start, group, extra, ds):
    """(cells, state) of a group."""
    cells = Hyperparams.from_named({n: np.zeros(group, range_of(n).dtype) for n in (*RANGES, *extra)})
    return cells, start.eval_shape(cells, ds)


@functools.lru_cache(maxsize=64)
def _text(functions, config, probe, extra, shapes):
    hyper = Hyperparams.from_named({name: jax.ShapeDtypeStruct((), range_of(name).dtype) for name in (*RANGES, *extra)})
    lowered = jax.jit(make_train(functions.model, config, probe)).lower(hyper, shapes)
    text = lowered.as_text() + " ".join(sorted(extra))  # one that is not used is not in the program
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def in_groups(places: np.ndarray, size: int) -> list[np.ndarray]:
    """The places, `size` at a time; the last may be fewer."""
    return [places[start : start + size] for start in range(0, len(places), size)]
