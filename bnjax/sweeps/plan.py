"""The number of cells that run together on the devices at hand, and for how long: chosen by size.

A cell's result may differ in its last bits between widths, so that the width is part of what stored results are known
by. It depends on the network and the kind of device alone.
"""

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from bnjax.training import TrainConfig
from bnjax.types import Dataset, Model, some_of, with_extra

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


def width_of(model: Model, ds: Dataset, device: jax.Device, extra: tuple[str, ...] = ()) -> int:
    """Cells that are vmapped together on such a device, by the size of the network's parameters.

    `extra`: the names in `Hyperparams.extra`.
    """
    _, num_bytes, convolves = _size(model, ds, extra)
    cpu = device.platform == "cpu"
    if cpu and convolves:
        # Most convolutions are trained as products (`bnjax.convolution`), which gain nothing from a width: a network of
        # two took 65, 70 and 76 ms a step and cell at widths 1, 2 and 4. Others become grouped ones: slow.
        return 1
    memory, most = (CPU_CACHE_BYTES, CPU_MAX_WIDTH) if cpu else (ACCELERATOR_BYTES, ACCELERATOR_MAX_WIDTH)
    return 2 ** int(math.log2(min(most, max(1, memory // max(3 * num_bytes, 1)))))


def segment_of(
    model: Model, ds: Dataset, config: TrainConfig, width: int, device: jax.Device, extra: tuple[str, ...] = ()
) -> int:
    """Most steps in one call of the compiled program, for it to take about a minute."""
    flops = CPU_FLOPS if device.platform == "cpu" else ACCELERATOR_FLOPS
    step_seconds = width * 6 * max(_size(model, ds, extra)[0], 1) * config.batch_size / flops
    return max(1, int(SEGMENT_SECONDS / step_seconds))


def _size(model, ds, extra):
    """The number of parameters, their bytes, and whether there are convolutions."""
    x = jax.ShapeDtypeStruct((2, *ds.train_x.shape[1:]), ds.train_x.dtype)
    return _size_at(model.init, model.apply, extra, x)


@functools.lru_cache(maxsize=64)
def _size_at(init, apply, extra, x):
    init, apply = (with_extra(function, some_of(extra)) for function in (init, apply))
    state = jax.eval_shape(lambda: init(jax.random.key(0), x.shape[1:], 1.0))
    program = jax.make_jaxpr(functools.partial(apply, train=False))(*state, x)
    leaves = [(math.prod(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(state[0])]
    size, num_bytes = sum(n for n, _ in leaves), sum(n * itemsize for n, itemsize in leaves)
    return size, num_bytes, "conv_general_dilated" in str(program)


def memory(devices: Sequence[jax.Device]) -> float | int:
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
