"""How a sweep is run on the devices at hand.

A cell's result may differ in its last bits between widths, and between segments of a run, so that both are stored with
the results. By size, which is `make_plan`, they depend on the network, the configuration and the kind of device only;
`bnjax.sweeps.measure` finds better ones by measuring, for the number of cells.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from bnjax.training import TrainConfig
from bnjax.types import Dataset, Model, PyTree

# On a CPU a group of cells is fastest while its parameters, gradients and optimizer state stay in cache.
CPU_CACHE_BYTES = 8 * 2**20
CPU_MAX_WIDTH = 16
# On an accelerator many cells are needed to fill it; the group's state takes a small part of memory.
ACCELERATOR_BYTES = 2 * 2**30
ACCELERATOR_MAX_WIDTH = 256
# A long run is cut into segments of about a minute, by a cautious guess of a device's speed, so that it can be stored.
SEGMENT_SECONDS = 60
CPU_FLOPS, ACCELERATOR_FLOPS = 5e10, 5e12
GROUPS = 64  # calls of the compiled program between two commits, where the grid has as many cells


class Plan(NamedTuple):
    """How cells are run."""

    width: int  # cells vmapped together on one device
    devices: tuple[jax.Device, ...]  # each runs `width` cells at a time
    segment: int  # most steps in one call of the compiled program
    measured: Mapping[int, float] | None = None  # {width: cell-steps per second}, where they were measured
    narrowed: str | None = None  # why the width is less than it was meant to be

    @property
    def group(self) -> int:
        """Cells in one call of the compiled program."""
        return self.width * len(self.devices)

    @property
    def chunk(self) -> int:
        """Most cells that are committed to the store together."""
        return GROUPS * self.group

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        found = self._asdict() | {"devices": len(self.devices)}
        if self.measured is not None:
            found["measured"] = {str(width): speed for width, speed in self.measured.items()}
        return {name: value for name, value in found.items() if value is not None}


def in_words(plan: Mapping[str, Any]) -> str:
    """What `Plan.as_dict` holds, in one line."""
    devices = plan["devices"]
    speeds = ", ".join(f"{width}: {speed:,.0f}" for width, speed in plan.get("measured", {}).items())
    return (
        f"width {plan['width']} on {devices} device{'s' * (devices > 1)}, at most {plan['segment']} steps at once"
        + (f"; measured cell-steps per second by width: {speeds}" if speeds else "")
        + (f"; {plan['narrowed']}" if "narrowed" in plan else "")
    )


def make_plan(
    model: Model,
    ds: Dataset,
    config: TrainConfig,
    *,
    width: int | None = None,
    segment: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Plan:
    """Chooses the width and the segment by the size of the network's parameters.

    Args:
      model: the network.
      ds: the data, for its input shape.
      config: what is the same for all cells.
      width: to be used instead of the chosen one.
      segment: likewise.
      devices: default: all local devices.
      stored: the plan of the results that are continued, from `Plan.as_dict`: its width and segment are kept.

    Raises:
      ValueError: if `width` or `segment` is below 1.
    """
    devices = tuple(devices or jax.local_devices())
    for name, value in {"width": width, "segment": segment}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if stored is not None:
        found = Plan(width or stored["width"], devices, min(segment or stored["segment"], config.steps))
        if found.width == stored["width"]:
            found = found._replace(measured=stored.get("measured"), narrowed=stored.get("narrowed"))
        return found
    if width is None:
        state = 3 * sum(math.prod(p.shape) * p.dtype.itemsize for p in jax.tree.leaves(parameters(model, ds)))
        cpu = devices[0].platform == "cpu"
        memory, most = (CPU_CACHE_BYTES, CPU_MAX_WIDTH) if cpu else (ACCELERATOR_BYTES, ACCELERATOR_MAX_WIDTH)
        width = 2 ** int(math.log2(min(most, max(1, memory // max(state, 1)))))
    steps = SEGMENT_SECONDS / (width * cell_step_seconds(model, ds, config, devices[0]))
    return Plan(width, devices, min(segment or max(1, int(steps)), config.steps))


def parameters(model: Model, ds: Dataset) -> PyTree:
    """Shapes and types of the network's parameters."""
    return _parameters(model.init, ds.train_x.shape[1:])


@functools.lru_cache(maxsize=16)
def _parameters(init, input_shape):
    return jax.eval_shape(lambda: init(jax.random.key(0), input_shape, 1.0))[0]


def cell_step_seconds(model: Model, ds: Dataset, config: TrainConfig, device: jax.Device) -> float:
    """A cautious guess of how long a step of one cell takes on the device."""
    size = sum(math.prod(p.shape) for p in jax.tree.leaves(parameters(model, ds)))
    flops = 6 * max(size, 1) * config.batch_size
    return flops / (CPU_FLOPS if device.platform == "cpu" else ACCELERATOR_FLOPS)
