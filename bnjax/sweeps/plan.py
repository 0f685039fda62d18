"""How a sweep is run on the devices at hand: the one place where that is decided.

A cell's result may differ in its last bits between widths, so the width depends on the network, the
configuration and the kind of device only: never on how many cells there are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from bnjax.types import Dataset, Model

# On a CPU a group of cells is fastest while its parameters, gradients and optimizer state stay in cache.
CPU_CACHE_BYTES = 8 * 2**20
CPU_MAX_WIDTH = 16
# On an accelerator many cells are needed to fill it; the group's state takes a small part of memory.
ACCELERATOR_BYTES = 2 * 2**30
ACCELERATOR_MAX_WIDTH = 256


class Plan(NamedTuple):
    """How cells are run."""

    width: int  # cells vmapped together on one device
    devices: tuple[jax.Device, ...]  # each runs `width` cells at a time

    @property
    def chunk(self) -> int:
        """Cells in one call of the compiled program."""
        return self.width * len(self.devices)


def make_plan(
    model: Model, ds: Dataset, *, width: int | None = None, devices: Sequence[jax.Device] | None = None
) -> Plan:
    """Chooses the width by the size of the network's parameters.

    Args:
      model: the network.
      ds: the data, for its input shape.
      width: to be used instead of the chosen one.
      devices: default: all local devices.

    Raises:
      ValueError: if `width` is below 1.
    """
    devices = tuple(devices or jax.local_devices())
    if width is None:
        params, _ = jax.eval_shape(lambda: model.init(jax.random.key(0), ds.train_x.shape[1:], 1.0))
        state = 3 * sum(math.prod(p.shape) * p.dtype.itemsize for p in jax.tree.leaves(params))
        cpu = devices[0].platform == "cpu"
        memory, most = (CPU_CACHE_BYTES, CPU_MAX_WIDTH) if cpu else (ACCELERATOR_BYTES, ACCELERATOR_MAX_WIDTH)
        width = min(most, max(1, memory // max(state, 1)))
        width = 2 ** int(math.log2(width))
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    return Plan(width, devices)
