"""The width measured, and memory counted: what a plan by size cannot know.

A few steps of the real training program, on all devices at once, at the width chosen by size and at its doubles and
halves, until they are much slower; then all of them once more, by turns, so that they share whatever the machine is
doing. The speeds are kept in the user's cache folder, for this kind of machine, these versions and this configuration,
and later sweeps of the same kind choose by them the width that suits their number of cells.

A wider program must be clearly faster to be preferred: a narrower one takes less memory, and noise should not decide.
"""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import platformdirs

from bnjax.sweeps import program, record
from bnjax.sweeps.plan import SEGMENT_SECONDS, Plan, cell_step_seconds
from bnjax.training import TrainConfig, make_run
from bnjax.types import Dataset, Hyperparams, Model

HOW = ("auto", "measure", "size")  # ways to a plan
LONG_SECONDS = 300.0  # a sweep that takes longer than that, by a guess, is measured
SECONDS = 20.0  # after so many no further width is tried
METHOD = 2  # plans that were kept by another one are not used
RUN_SECONDS = 0.3  # of one measurement, by a cautious guess: shorter ones would be of what any call costs
FIRST_ROUNDS, LAST_ROUNDS = 3, 9  # of measurements by turns
BETTER = 1.02
HOPELESS = 0.85  # times the best: widths beyond it are not tried
WIDEST = 4096
# Of the main memory that a Linux container may use, in bytes: control groups, version 2 and 1.
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def chosen(model: Model, ds: Dataset, config: TrainConfig, plan: Plan, cells: int, how: str) -> Plan:
    """The plan by size, or a measured one.

    Args:
      model: the network.
      ds: the data.
      config: what is the same for all cells.
      plan: by size.
      cells: how many there are to train.
      how: "size": the plan by size; "measure": measured now; "auto": as was measured before (one process alone), or
        measured now if the sweep will take more than about `LONG_SECONDS`, or else by size. A measured width depends
        on the number of cells, too; see `for_cells`.
    """
    if how == "size":
        return plan
    # Several processes all measure, at the same time, so that none waits long for another; the first one's plan counts.
    found = kept(model, ds, config, plan) if how == "auto" and jax.process_count() == 1 else None
    guess = cells * config.steps * cell_step_seconds(model, ds, config, plan.devices[0]) / len(plan.devices)
    if found is None and (how == "measure" or guess > LONG_SECONDS):
        found = measured(model, ds, config, plan)
    return plan if found is None else for_cells(found, cells)


def for_cells(plan: Plan, cells: int) -> Plan:
    """A measured plan at a narrower width, if at one that was measured so many cells take less time.

    A group of fewer cells takes as long as a full one.
    """
    if plan.measured is None:
        return plan

    def seconds(width):
        group = plan._replace(width=width).group
        return math.ceil(cells / group) * group / plan.measured[width]

    widths = [width for width in plan.measured if width <= plan.width]
    width = min(widths, key=lambda width: (seconds(width), width))
    return (
        plan
        if width == plan.width
        else plan._replace(width=width, narrowed=f"which suits {cells} cells best")
    )


def measured(model: Model, ds: Dataset, config: TrainConfig, plan: Plan, *, seconds: float = SECONDS) -> Plan:
    """The plan with the narrowest of the fastest widths, for many cells, and a segment by its speed. It is kept.

    Args:
      model: the network.
      ds: the data.
      config: what is the same for all cells.
      plan: by size: where the search begins, and the devices.
      seconds: after so many no further width is tried; at least two are.

    Returns:
      A plan whose `measured` has the cell-steps per second at each width that was tried; or the one given, if it does
      not fit into memory, or the network has diverged where it starts, so that there is nothing to measure.
    """
    stop = time.monotonic() + seconds
    replicated = program.programs_of(model, config, plan, None).replicated
    on_devices = jax.device_put(ds, replicated)
    start = jax.jit(make_run(model, config).start)
    one = jax.tree.map(np.asarray, start(Hyperparams(learning_rate=0.0), on_devices)[0])
    runs: dict[int, Callable[[], float]] = {}

    def can_run(width):
        run = _steps_at(model, on_devices, config, plan._replace(width=width), one)
        if run is not None:
            runs[width] = run
        return run is not None

    best = plan.width
    if not can_run(best):
        return plan
    todo = [(plan.width * factor, factor) for factor in (2, 1 / 2)]  # by turns wider and narrower
    while todo and (len(runs) == 1 or time.monotonic() < stop):
        width, factor = todo.pop(0)
        if not 1 <= width <= WIDEST or not can_run(int(width)):
            continue
        try:
            known, other = _by_turns([runs[best], runs[int(width)]], FIRST_ROUNDS)
        except jax.errors.JaxRuntimeError:  # out of memory, beside the others
            del runs[int(width)]
            continue
        if other > known:
            best = int(width)
        if other >= HOPELESS * known:
            todo.append((width * factor, factor))
    widths = sorted(runs)
    found = _by_turns([runs[width] for width in widths], LAST_ROUNDS, time.monotonic() + seconds)
    speeds = {width: float(f"{speed:.4g}") for width, speed in zip(widths, found, strict=True)}
    best = min(width for width, speed in speeds.items() if speed * BETTER >= max(found))
    per_step = best * len(plan.devices) / speeds[best]
    segment = 2 ** max(0, int(np.log2(SEGMENT_SECONDS / per_step)))
    plan = Plan(best, plan.devices, min(segment, config.steps), speeds)
    _keep(_place(model, ds, config, plan.devices), plan, segment)
    return plan


def _by_turns(runs: Sequence[Callable[[], float]], rounds: int, stop: float = math.inf) -> list[float]:
    """The median speed of each; with fewer rounds where it takes longer than that."""
    speeds = []
    while len(speeds) < rounds and (len(speeds) < FIRST_ROUNDS or time.monotonic() < stop):
        speeds.append([run() for run in runs])
    return [float(speed) for speed in np.median(speeds, 0)]


def _steps_at(model, ds, config, plan, one) -> Callable[[], float] | None:
    """What takes some steps at the plan's width and returns the cell-steps per second; compiled. None: it cannot."""
    programs = program.programs_of(model, config, plan, None)
    guess = cell_step_seconds(model, ds, config, plan.devices[0])
    steps = int(np.clip(RUN_SECONDS / (plan.width * guess), 16, 4000))
    values = (np.uint32(0), *np.float32((1.0, 0.0, 0.9, 0.0)))  # nothing is learned, so that nothing diverges
    hyper = Hyperparams(*(np.full(plan.group, value) for value in values))
    state = [jax.tree.map(lambda a: np.broadcast_to(a, (plan.group, *a.shape)), one)]

    def run():
        start = time.perf_counter()
        state[0] = jax.block_until_ready(programs.advance(state[0], hyper, ds, np.int32(100), steps, 0)[0])
        return plan.group * steps / (time.perf_counter() - start)

    try:
        run()
        run()
    except jax.errors.JaxRuntimeError:  # out of memory
        return None
    return run if (np.asarray(state[0].cell.diverged_step) < 0).all() else None


def kept(model: Model, ds: Dataset, config: TrainConfig, plan: Plan) -> Plan | None:
    """The plan that was measured before for this kind of machine, versions and configuration, if any."""
    try:
        found = json.loads(_place(model, ds, config, plan.devices).read_text())
        speeds = {int(width): float(speed) for width, speed in found["measured"].items()}
        width, segment = int(found["width"]), int(found["segment"])
    # None, or not what was written.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    if width not in speeds or min(segment, *speeds, *speeds.values()) <= 0:
        return None
    return Plan(width, plan.devices, min(segment, config.steps), speeds)


def _keep(place, plan, segment):
    """Writes it; a folder that cannot be written to is none."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"width": plan.width, "segment": segment, "measured": plan.measured}))
        partial.replace(place)
    except OSError:
        return


def _place(model, ds, config, devices) -> Path:
    """The file of a plan in the cache folder."""
    what: dict[str, Any] = {
        "method": METHOD,
        "machine": [len(devices), devices[0].device_kind, record.machine(), os.cpu_count()],
        "versions": record.versions(),
        "model": dict(model.config),
        "network": record.computes(model, ds, config),
        "config": [config.batch_size, config.optimizer],
        "data": [[str(a.shape), str(a.dtype)] for a in ds[:2]],
    }
    key = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=12).hexdigest()
    return platformdirs.user_cache_path("bnjax") / "plans" / f"{key}.json"


def check_memory(
    programs: program.Programs, ds: Dataset, config: TrainConfig, plan: Plan, *, may_change: bool
) -> Plan:
    """The plan, or the widest narrower one whose program fits into the devices' memory, by the compiler's own count.

    Compiles the program that the sweep will run.

    Args:
      programs: of the model.
      ds: the data, on the devices.
      config: what is the same for all cells.
      plan: what is meant to run.
      may_change: whether a narrower width may be taken.

    Raises:
      MemoryError: if it does not fit.
    """
    available = _memory(plan.devices)
    while True:
        try:
            needed = program.memory_needed(programs, ds, config, plan)
            if available is None or needed <= available:
                return plan
            needs = f"needs {needed / 2**30:.2f} GiB of memory"
        # The compiler itself found too little.
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needs = "needs more memory than the compiler found"
        if plan.width == 1 or not may_change:
            there = "" if available is None else f", and there are {available / 2**30:.2f} GiB"
            raise MemoryError(
                f"width {plan.width} on {len(plan.devices)} devices {needs}{there}"
                + (": use a smaller width" if plan.width > 1 else "")
            )
        plan = plan._replace(width=plan.width // 2, narrowed=f"width {plan.width} {needs}")


def _memory(devices) -> int | None:
    """Bytes of all the devices together; None: not known."""
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return len(devices) * stats["bytes_limit"]
    if devices[0].platform != "cpu":
        return None
    found = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in CONTAINER_LIMITS:
        with contextlib.suppress(ValueError, OSError):  # none, or "max"
            found.append(int(Path(limit).read_text()))
    return min(found, default=None)
