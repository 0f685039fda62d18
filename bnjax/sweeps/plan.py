"""How many cells run together on the devices at hand, and how long: chosen by size.

A cell's result may differ in its last bits between widths, and between segments of a run, so that both are part of
what stored results are known by. They depend on the network, the configuration and the kind of device alone.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bnjax.training import TrainConfig
from bnjax.types import Dataset, Model

# On a CPU a group of cells is fastest while its parameters, gradients and optimizer state stay in cache.
CPU_CACHE_BYTES = 5 * 2**20
CPU_MAX_WIDTH = 16
# On an accelerator many cells are needed to fill it; the group's state takes a small part of memory.
ACCELERATOR_BYTES = 2 * 2**30
ACCELERATOR_MAX_WIDTH = 256
# A long run is cut into segments of about a minute, by a cautious guess of a device's speed, so that it can be stored.
SEGMENT_SECONDS = 60
CPU_FLOPS, ACCELERATOR_FLOPS = 5e10, 5e12
# Of the main memory that a Linux container may use, in bytes: control groups, version 2 and 1.
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Plan(NamedTuple):
    """How cells are run."""

    width: int  # cells vmapped together on one device
    devices: tuple[jax.Device, ...]  # each runs `width` cells at a time
    segment: int  # most steps in one call of the compiled program
    narrowed: str | None = None  # why the width is less than it was meant to be

    @property
    def group(self) -> int:
        """Cells in one call of the compiled program."""
        return self.width * len(self.devices)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        found = self._asdict() | {"devices": len(self.devices)}
        return {name: value for name, value in found.items() if value is not None}


def make_plan(
    model: Model,
    ds: Dataset,
    config: TrainConfig,
    *,
    width: int | None = None,
    segment: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Plan:
    """Chooses the width and the segment, unless they are given, by the size of the network's parameters.

    Raises:
      ValueError: if one that is given is below 1.
    """
    devices = tuple(devices or jax.local_devices())
    for name, value in {"width": width, "segment": segment}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    x = jax.ShapeDtypeStruct((2, *ds.train_x.shape[1:]), ds.train_x.dtype)
    size, num_bytes, convolves = _size(model.init, model.apply, x)
    cpu = devices[0].platform == "cpu"
    if width is None:
        memory, most = (CPU_CACHE_BYTES, CPU_MAX_WIDTH) if cpu else (ACCELERATOR_BYTES, ACCELERATOR_MAX_WIDTH)
        width = 2 ** int(math.log2(min(most, max(1, memory // max(3 * num_bytes, 1)))))
        # Under vmap a convolution becomes a grouped one, at which XLA's CPU backend is slow: a network of two had 0.9,
        # 0.8 and 0.4 times the speed at widths 2, 4 and 16.
        width = 1 if cpu and convolves else width
    step_seconds = width * 6 * max(size, 1) * config.batch_size / (CPU_FLOPS if cpu else ACCELERATOR_FLOPS)
    steps = segment or max(1, int(SEGMENT_SECONDS / step_seconds))
    return Plan(width, devices, min(steps, config.steps))


@functools.lru_cache(maxsize=16)
def _size(init, apply, x):
    """The number of parameters, their bytes, and whether there are convolutions."""
    state = jax.eval_shape(lambda: init(jax.random.key(0), x.shape[1:], 1.0))
    program = jax.make_jaxpr(functools.partial(apply, train=False))(*state, x)
    leaves = [(math.prod(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(state[0])]
    size, num_bytes = sum(n for n, _ in leaves), sum(n * itemsize for n, itemsize in leaves)
    return size, num_bytes, "conv_general_dilated" in str(program)


def fitting(plan: Plan, needed: Callable[[Plan], int], *, may_change: bool) -> Plan:
    """The plan, or the widest narrower one whose program fits into the devices' memory.

    `needed` gives the bytes on all devices together, by the compiler's own count.

    Raises:
      MemoryError: if none fits, or a narrower one would and the width must not change.
    """
    available = _memory(plan.devices)
    while True:
        try:
            takes = needed(plan)
            if takes <= available:
                return plan
            needs = f"needs {takes / 2**30:.2f} GiB of memory, and there are {available / 2**30:.2f} GiB"
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needs = "needs more memory than the compiler found"
        if plan.width == 1 or not may_change:
            advice = ": use a smaller width" if plan.width > 1 else ""
            raise MemoryError(f"width {plan.width} on {len(plan.devices)} devices {needs}{advice}")
        plan = plan._replace(width=plan.width // 2, narrowed=f"width {plan.width} {needs}")


def _memory(devices) -> float | int:
    """Bytes of all the devices together; infinite if it is not known."""
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats or devices[0].platform != "cpu":
        return len(devices) * stats.get("bytes_limit", math.inf)
    found = [math.inf]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in CONTAINER_LIMITS:
        with contextlib.suppress(ValueError, OSError):  # none, or "max"
            found.append(int(Path(limit).read_text()))
    return min(found)
