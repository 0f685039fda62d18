"""The width that trains the networks of a job fastest on this machine.

A sweep of few steps is timed, and one of more at the same width: what the second takes longer goes to its further
steps, since whatever else a sweep costs (initialization, evaluation, the host's part) is in both. From the width by
size, doubles and halves are tried until they are clearly slower. Those that are left then run by turns, so that they
share whatever the machine is doing. The best is the narrowest that is about as fast as the fastest, since it takes the
least memory; it is best for so many cells, since a group of fewer takes as long as a full one.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import xarray as xr

import bnjax
from experiments.table import Table

SHORT = 16  # steps
SECONDS = 0.5  # that the longer sweep's further steps are to take, about
ROUNDS = 5
GROUPS = 2  # in a sweep, at the width where the search begins
BETTER = 1.02  # times as fast a wider one must be
HOPELESS = 0.85  # times the best: clearly slower
NOISY = 1.3  # times the slowest round of a width is its fastest: a measurement that is worth little
LEARNING_RATE = 1e-12  # nothing diverges; a much smaller one could make numbers subnormal, which take longer
NO_MEMORY = (MemoryError, jax.errors.JaxRuntimeError)

Timed = Callable[[int, int, int], float]  # (width, cells, steps) -> seconds
Tick = Callable[[str], None]  # takes what has been done


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def timed_sweep(
    model: bnjax.Model,
    ds: bnjax.Dataset,
    config: bnjax.TrainConfig,
    hyper: bnjax.Hyperparams,
    devices: Sequence[jax.Device],
) -> Timed:
    """A function that runs a sweep of the network, evaluated once, and returns its seconds."""
    hyper = hyper._replace(learning_rate=LEARNING_RATE)

    def run(width, cells, steps):
        options = {"hyper": hyper, "width": width, "devices": devices, "progress": False}
        of_that_length = dataclasses.replace(config, steps=steps, eval_every=None)
        start = time.perf_counter()
        results = bnjax.sweep(model, ds, of_that_length, {"seed": range(cells)}, **options)
        seconds = time.perf_counter() - start
        if results.diverged.any():
            raise ValueError("a network diverges at its first steps, so that there is no speed to measure")
        return seconds

    return run


def width_by_size(models: Mapping[str, bnjax.Model], ds, config, hyper, devices) -> int:
    """The width that a sweep of these networks takes by itself; the least of several."""
    config = dataclasses.replace(config, steps=SHORT, eval_every=None)
    options = {"hyper": hyper, "devices": devices, "progress": False}
    plans = bnjax.sweep(models, ds, config, {"seed": [0]}, **options).attrs["plan"]
    return min(plan["width"] for plan in plans.values())


def speed(run: Timed, width: int, cells: int, steps: int) -> float:
    """Cell-steps per second; NaN: the longer sweep did not take longer."""
    short, longer = (run(width, cells, n) for n in (SHORT, steps))
    return cells * (steps - SHORT) / (longer - short) if longer > short else math.nan


def calibrated(run: Timed, width: int, cells: int) -> tuple[int, float]:
    """(steps of the longer sweep, so that the further ones take about `SECONDS`; seconds of a sweep of no steps)."""
    further = 4 * SHORT
    while True:
        lengths = (SHORT, SHORT + further)
        _, *pairs = ([run(width, cells, steps) for steps in lengths] for _ in range(4))  # the first one compiles
        short, longer = np.transpose(pairs)
        seconds = max(float(np.median(longer - short)), SECONDS / 64)
        if seconds > SECONDS / 2:
            fixed = short - (longer - short) * SHORT / further
            return lengths[1], max(0.0, float(np.median(fixed)))
        further = SHORT * math.ceil(further * SECONDS / seconds / SHORT)


def job_seconds(speeds: xr.DataArray, cells: int, devices: int, steps: int) -> xr.DataArray:
    """Seconds of so many cells' steps. A group of fewer cells takes as long as a full one."""
    group = speeds.width * devices
    return np.ceil(cells / group) * group * steps / speeds


def climb(start: int, over: Callable[[int, int], float]) -> list[int]:
    """The widths that are not clearly slower than the best of those tried, from `start` by doubling and halving.

    Args:
      start: the first.
      over: the job's time at one width over that at another, which is the best so far; infinite: it cannot run.
    """
    times = {start: 1.0}
    for factor, most in ((2, 2), (0.5, math.inf)):  # wider ones cost more and more: most that are tried in vain
        width, in_vain = start, 0
        while in_vain < most and (width := int(width * factor)):
            least = min(times, key=times.get)
            ratio = over(width, least)
            times[width] = ratio * times[least]
            if HOPELESS * ratio > 1:
                break
            in_vain = 0 if BETTER * ratio < 1 else in_vain + 1
    return sorted(width for width, time in times.items() if HOPELESS * time <= min(times.values()))


def measured(
    runs: Mapping[str, Timed], start: int, devices: int, cells: int, rounds: int, tick: Tick = say
) -> xr.DataArray:
    """The speeds at the widths that are worth it.

    Args:
      runs: {name of a network: its timed sweep}.
      start: the width where the search begins.
      devices: how many there are.
      cells: of each network in the job.
      rounds: by turns.
      tick: called after each measurement.

    Returns:
      Cell-steps per second [network, width, round]; NaN: there was too much noise to tell.

    Raises:
      MemoryError: or jax.errors.JaxRuntimeError: if it cannot run where the search begins.
    """

    def in_sweep(width):
        return max(GROUPS * start, width) * devices  # the same work at each, but where one group is more

    sizes = {name: calibrated(run, start, in_sweep(start)) for name, run in runs.items()}

    def roughly(name, width):
        """By one whole sweep, its fixed costs taken off as they were at first."""
        steps, fixed = sizes[name]
        seconds = runs[name](width, in_sweep(width), steps)
        return in_sweep(width) * steps / (seconds - min(fixed, seconds / 2))

    def over(*widths):
        pairs = np.zeros((2, 2))  # seconds [round, width]
        for name, run in runs.items():
            try:
                run(widths[0], in_sweep(widths[0]), sizes[name][0])  # compiles
                first, second = ([roughly(name, width) for width in order] for order in (widths, widths[::-1]))
            except NO_MEMORY as error:
                reason, *_ = str(error).split("\n")
                tick(f"{name}, width {widths[0]}: left out: {reason}")
                return math.inf
            speeds = xr.DataArray([first, second[::-1]], {"width": [*widths]}, ("round", "width"))
            pairs += job_seconds(speeds, cells, devices, 1).transpose("round", "width").values
            words = (f"{w} about {speeds.sel(width=w).max():,.0f}" for w in widths)
            tick(f"{name}, cell-steps per second: width {', '.join(words)}")
        ratios = pairs[:, 0] / pairs[:, 1]
        return float(min(ratios, key=lambda ratio: abs(math.log(ratio))))  # in doubt, about as fast

    widths = climb(start, over)
    found = np.full((len(runs), len(widths), rounds), np.nan)
    for i, (name, run) in enumerate(runs.items()):
        for width in widths:
            for n in (SHORT, sizes[name][0]):  # compiled: what was is not kept for any number of networks
                run(width, in_sweep(width), n)
        for k in range(rounds):
            for j in np.roll(np.arange(len(widths)), -k):  # no width is always the first
                found[i, j, k] = speed(run, widths[j], in_sweep(widths[j]), sizes[name][0])
            tick(f"{name}, widths {', '.join(map(str, widths))} by turns: {k + 1} of {rounds}")
    return xr.DataArray(found, {"network": [*runs], "width": widths}, ("network", "width", "round"))


def best(seconds: xr.DataArray) -> int:
    """The narrowest width that the fastest is less than 2% faster than.

    Args:
      seconds: of the whole job, [width, round].
    """
    fastest = seconds.median("round").argmin("width")
    # Paired: two widths of one round share the machine's state.
    ratio = (seconds / seconds.isel(width=fastest)).median("round")
    return int(seconds.width[ratio <= BETTER].min())


def report(
    models: Mapping[str, bnjax.Model],
    ds: bnjax.Dataset,
    config: bnjax.TrainConfig,
    axes: Mapping[str, Sequence[float]],
    hyper: bnjax.Hyperparams,
    devices: Sequence[jax.Device],
) -> int:
    """Measures, prints a table per network, and returns the best width for all of them.

    Raises:
      ValueError: if there are other processes, or a network diverges at once.
    """
    if jax.process_count() > 1:
        raise ValueError("--measure_width is for one process: leave out --distributed")
    job = (ds, config, hyper, devices)
    runs = {name: timed_sweep(model, *job) for name, model in models.items()}
    cells, count = math.prod(map(len, axes.values())), len(devices)
    speeds = measured(runs, width_by_size(models, *job), count, cells, ROUNDS)
    seconds = job_seconds(speeds, cells, count, config.steps)
    for name in models:
        print(table(name, speeds.sel(network=name), seconds.sel(network=name), cells, config.steps).text(), end="\n\n")
    together = seconds.sum("network", skipna=False)
    if len(models) > 1:
        mean = len(models) / (1 / speeds).sum("network", skipna=False)
        print(
            table(f"all {len(models)} networks", mean, together, cells * len(models), config.steps).text(), end="\n\n"
        )
    if (spread := float((speeds.max("round") / speeds.min("round")).max())) > NOISY:
        say(
            f"The rounds differ by up to {spread:.1f} times at one and the same width: something else is running on "
            "this machine. Measure again without it."
        )
    return best(together)


def table(name: str, speeds: xr.DataArray, seconds: xr.DataArray, cells: int, steps: int) -> Table:
    """A row for each width: its speeds, [width, round], and how long the job's cells take."""
    middle, rows = speeds.median("round"), []
    for width in speeds.width.values:
        one, ratio = speeds.sel(width=width), middle.sel(width=width) / middle.max()
        span = f"{middle.sel(width=width):,.0f} [{one.min():,.0f}, {one.max():,.0f}]"
        rows.append((f"{width}", span, f"{ratio:.2f}", f"{seconds.sel(width=width).median():,.1f} s"))
    columns = (
        "width",
        "cell-steps per second [lowest, highest]",
        "over the fastest",
        f"{cells:,} cells, {steps:,} steps",
    )
    return Table(name, columns, rows)
