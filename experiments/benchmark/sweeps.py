"""Measuring sweeps side by side: alternating, in rounds, so that all share whatever the machine is doing."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xarray as xr

from bnjax import compilation
from experiments.benchmark import processes, workloads

STAGES = ("import", "first sweep", "second sweep")
CACHES = ("empty caches", "a later process")


def size(name: str, cells: int | None, steps: int | None) -> tuple[int, int]:
    """(cells, steps) of a measurement of that workload."""
    workload = workloads.ALL[name]
    return cells or workload.cells_per_core * len(processes.cores()), steps or workload.steps


@contextlib.contextmanager
def crews(names: Sequence[str]) -> Iterator[dict[str, list]]:
    """{implementation: its processes}: each has its own, but for the parts of a sweep, and its widths, which share."""
    found = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            crew = processes.ALL[name].crew or name
            if crew not in found:
                found[crew] = stack.enter_context(processes.started(processes.ALL[name].kind))
            found[name] = found[crew]
        yield found


def speed(answers: Sequence[dict]) -> float:
    """Cell-steps per second of all processes together, each by its own clock."""
    return sum(answer["cell_steps"] / answer["seconds"] for answer in answers)


def measure(
    names: Sequence[str],
    implementations: Sequence[str],
    *,
    cells: int | None,
    steps: int | None,
    rounds: int,
    seconds: float,
    tick: Callable[[], None],
) -> xr.Dataset:
    """Trains the networks of each workload by each implementation, round by round.

    Args:
      names: of workloads.
      implementations: names in `processes.ALL`, "bnjax" among them and before the parts.
      cells: networks in a sweep; None: the workload's own number.
      steps: of each network; None: the workload's own number.
      rounds: measurements of each.
      seconds: about how long one is to take at least, where it can be chosen.
      tick: called after each measurement, and each time one has been made ready.

    Returns:
      `speed` [workload, implementation, round], cell-steps per second; `width` and `steps_taken`
      [workload, implementation], 0 where they say nothing; `cells`, `steps` [workload].
    """
    sizes = [size(name, cells, steps) for name in names]
    speeds = np.full((len(names), len(implementations), rounds), np.nan)
    known = {key: np.zeros((len(names), len(implementations)), int) for key in ("width", "steps")}
    for i, workload in enumerate(names):
        with crews(implementations) as found:  # fresh ones, as users have
            for j, name in enumerate(implementations):
                asked = {"workload": workload, "cells": sizes[i][0], "steps": sizes[i][1], "seconds": seconds}
                if name in processes.PARTS:
                    asked["width"] = int(known["width"][i, implementations.index("bnjax")])
                answer, *_ = processes.ask(found[name], "prepare", name=name, implementation=name, **asked)
                for key, value in answer.items():
                    known[key][i, j] = value
                tick()
            for k in range(rounds):
                for j in np.roll(np.arange(len(implementations)), -k):  # nobody is always the first
                    speeds[i, j, k] = speed(processes.ask(found[implementations[j]], "run", name=implementations[j]))
                    tick()
    both = ("workload", "implementation")
    return xr.Dataset(
        {
            "speed": ((*both, "round"), speeds, {"units": "cell-steps / s"}),
            "width": (both, known["width"]),
            "steps_taken": (both, known["steps"]),
            "cells": ("workload", [n for n, _ in sizes]),
            "steps": ("workload", [t for _, t in sizes]),
        },
        {"workload": np.array(names, object), "implementation": np.array(implementations, object)},
    )


def first_result(name: str, cells: int | None, steps: int | None) -> xr.Dataset:
    """`first_result` [caches, stage] in seconds: of a process that finds empty caches, and of one that comes after."""
    n, t = size(name, cells, steps)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in CACHES:
            with processes.started("devices", XDG_CACHE_HOME=folder) as crew:
                (answer,) = processes.ask(crew, "first_sweep", workload=name, cells=n, steps=t)
            found.append([answer[stage] for stage in STAGES])
    return xr.Dataset(
        {"first_result": (("caches", "stage"), found, {"units": "s", "workload": name})},
        {"caches": np.array(CACHES, object), "stage": np.array(STAGES, object)},
    )


def growth(grids: Sequence[int], steps: int, rounds: int, seconds: float, tick: Callable[[], None]) -> xr.Dataset:
    """The cost of a cell of the smallest workload as the grid grows, and the memory that the whole takes.

    Of grids of so many cells, by turns, with the other arguments of `measure`.

    Returns:
      `cell_seconds` [grid, grid_round]; `peak_memory` [grid] in bytes, each in a process of its own.
    """
    found, peaks = np.full((len(grids), rounds), np.nan), []
    asked = {"implementation": "bnjax", "workload": workloads.SMALLEST}
    about = {"units": "s", "workload": workloads.SMALLEST, "steps": steps}
    for cells in grids:
        with processes.started("devices") as crew:
            processes.ask(crew, "prepare", name="", cells=cells, steps=2, seconds=0, **asked)
            peaks.append(processes.ask(crew, "peak_memory")[0]["bytes"])
        tick()
    with processes.started("devices") as crew:
        for cells in grids:
            processes.ask(crew, "prepare", name=str(cells), cells=cells, steps=steps, seconds=seconds, **asked)
            tick()
        for k in range(rounds):
            for i in np.roll(np.arange(len(grids)), -k):
                found[i, k] = steps / speed(processes.ask(crew, "run", name=str(grids[i])))
                tick()
    return xr.Dataset(
        {
            "cell_seconds": (("grid", "grid_round"), found, about),
            "peak_memory": ("grid", peaks, about | {"units": "B"}),
        },
        {"grid": list(grids)},
    )


def machine() -> str:
    """The kind of processor, how many cores of it, and the memory."""
    count, memory = len(processes.cores()), ""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    name = compilation.processor().get("model name", "processor")
    return f"{name} ({compilation.isa()}), {count} core{'s' if count > 1 else ''}{memory}"
