"""From measured speeds to what is printed: ratios taken round by round, their medians and quartiles."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import rich.table
import xarray as xr

from experiments.workloads import processes, workloads

PEER_AIM = 1.4  # times as fast as each peer
SCALED_STEPS, SCALED_CORES = 300, 1000  # of the arithmetic for large grids


class Figures(NamedTuple):
    """A table: the first column is text."""

    title: str
    header: list[str]
    rows: list[list[str]]


def ratios(speed: xr.DataArray, name: str, over: str) -> xr.DataArray:
    """[workload, quartile]: the quartiles of the ratios of two speeds, each of the same round.

    Args:
      speed: [workload, implementation, round].
      name: the implementation above the line.
      over: the one below.
    """
    paired = speed.sel(implementation=name, drop=True) / speed.sel(implementation=over, drop=True)
    return paired.quantile([0.25, 0.5, 0.75], "round").transpose("workload", ...)


def title(name: str) -> str:
    """An implementation's, for a reader."""
    return processes.ALL[name].title


def others(results: xr.Dataset) -> list[str]:
    """The implementations measured beside bnjax, the parts of a sweep left out."""
    return [str(name) for name in results.implementation.values if name in processes.PEERS]


def speeds(results: xr.Dataset, missing: list[str]) -> Figures:
    """Cell-steps per second, and what is known of how they were reached."""
    apart = {*processes.PARTS, *processes.WIDTHS}
    names = [str(name) for name in results.implementation.values if name not in apart]
    rows = []
    for workload in results.workload.values:
        at = results.sel(workload=workload)
        row = [f"{workload}, batch {workloads.ALL[workload].batch_size}"]
        for name in names:
            one = at.sel(implementation=name)
            width = f"\n(width {int(one.width)})" if one.width else ""
            row.append(f"{three_digits(float(one.speed.median()))}{width}")
        rows.append([*row, *("not installed" for _ in missing)])
    return Figures(
        "Cell-steps per second (one cell-step is one SGD step of one network), medians",
        ["", *map(title, (*names, *missing))],
        rows,
    )


def comparison(results: xr.Dataset) -> Figures:
    """bnjax.sweep beside each of the others."""
    names = others(results)
    evaluated = ["bnjax_evaluated"] if "bnjax_evaluated" in results.implementation else []
    columns = [ratios(results.speed, "bnjax", name) for name in names]
    columns += [ratios(results.speed, name, "bnjax") for name in evaluated]
    rows = []
    for workload in results.workload.values:
        row = [f"{workload}, batch {workloads.ALL[workload].batch_size}"]
        for name, column in zip((*names, *evaluated), columns, strict=True):
            low, middle, high = column.sel(workload=workload).values
            if name in ("products", *evaluated):
                row.append(f"{100 * middle:.0f}%\n[{100 * low:.0f}, {100 * high:.0f}]")
            else:
                row.append(f"{middle:.2f}x\n[{low:.2f}, {high:.2f}]")
        rows.append(row)
    header = ["", *(f"over {title(name)}" for name in names), *(f"when {title(name)}" for name in evaluated)]
    return Figures("Speed of bnjax.sweep: medians of ratios round by round [quartiles]", header, rows)


def verdicts(results: xr.Dataset) -> Iterator[str]:
    """For each workload, which aims are reached and which are not, by the medians."""
    for workload in results.workload.values:
        aim = workloads.ALL[workload].aim
        reached, missed = [], []
        for name in others(results):
            middle = float(ratios(results.speed, "bnjax", name).sel(workload=workload, quantile=0.5))
            if name == "products":
                text = f"{100 * middle:.0f}% of the products alone (aim: {100 * aim:.0f}%)"
                (reached if middle >= aim else missed).append(text)
            else:
                (reached if middle >= PEER_AIM else missed).append(f"{middle:.2f}x {title(name)}")
        parts = [f"{words}: {', '.join(found)}" for words, found in (("reached", reached), ("not", missed)) if found]
        yield f"{workload}: {'; '.join(parts)}"


def profile(results: xr.Dataset) -> Figures | None:
    """What each part adds to the time of a cell-step, as a share of the sweep's; None if no parts were measured."""
    parts = [name for name in processes.PARTS if name in results.implementation]
    if not parts:
        return None
    ladder = [*(["products"] if "products" in results.implementation else []), *parts, "bnjax"]
    seconds = 1 / results.speed.sel(implementation=ladder)  # of a cell-step, on all cores together
    total = seconds.sel(implementation="bnjax")
    added = seconds.diff("implementation")
    shares = xr.concat([seconds.isel(implementation=[0]), added], "implementation") / total
    middle = (100 * shares).median("round")
    words = {
        "products": "the products, at their best width",
        "bnjax": "+ checks for divergence, history, last evaluation, host",
    } | {name: title(name) for name in parts}
    rows = [
        [words[name], *(f"{middle.sel(implementation=name, workload=w):.0f}%" for w in results.workload.values)]
        for name in ladder
    ]
    micro = 1e6 * total.median("round")
    rows.append(["= µs per cell-step, all cores", *(f"{micro.sel(workload=w):.4g}" for w in results.workload.values)])
    header = ["", *(str(w) for w in results.workload.values)]
    return Figures("Where a sweep's time goes: what each part adds, medians", header, rows)


def widths(results: xr.Dataset) -> Figures | None:
    """Speed at each width, and at the one chosen by size over the fastest; None if they were not measured.

    All by the processes that run them all: two processes that do the same may differ by more than two widths.
    """
    names = [name for name in processes.WIDTHS if name in results.implementation]
    if not names:
        return None
    rows = []
    for workload in results.workload.values:
        speeds = results.speed.sel(workload=workload)
        middle = speeds.sel(implementation=names).median("round")
        best = str(middle.implementation.values[int(middle.argmax("implementation"))])
        chosen = int(results.width.sel(workload=workload, implementation="bnjax"))
        there = f"width_{chosen}" if f"width_{chosen}" in names else "bnjax"
        ratio = speeds.sel(implementation=there) / speeds.sel(implementation=best)
        low, half, high = ratio.quantile([0.25, 0.5, 0.75], "round").values
        found = [three_digits(float(value)) for value in middle]
        rows.append([str(workload), *found, f"{chosen}", f"{half:.2f} [{low:.2f}, {high:.2f}]"])
    header = ["", *map(title, names), "chosen by size", "chosen over the fastest"]
    return Figures("Cell-steps per second of bnjax.sweep at each width, medians", header, rows)


def first_result(results: xr.Dataset) -> Figures | None:
    """Seconds to the first result."""
    if "first_result" not in results:
        return None
    found = results.first_result
    rows = [
        [str(c), *(f"{v:.2f}" for v in found.sel(caches=c).values), f"{float(found.sel(caches=c)[:2].sum()):.2f}"]
        for c in found.caches.values
    ]
    header = ["", *map(str, found.stage.values), "to the first result"]
    return Figures(f"Time to the first result in seconds, {found.attrs['workload']}", header, rows)


def growth(results: xr.Dataset) -> Figures | None:
    """Cost of a cell and peak memory, by the size of the grid."""
    if "cell_seconds" not in results:
        return None
    cost = results.cell_seconds
    fixed, per_cell = line(results)
    ratio = (cost * cost.grid / (fixed + per_cell * cost.grid)).quantile([0.25, 0.5, 0.75], "grid_round")
    rows = []
    for grid in results.grid.values:
        low, middle, high = ratio.sel(grid=grid).values
        rows.append(
            [
                f"{grid:,}",
                f"{1e6 * float(cost.sel(grid=grid).median()):.4g}",
                f"{middle:.3f} [{low:.3f}, {high:.3f}]",
                f"{float(results.peak_memory.sel(grid=grid)) / 2**20:.0f}",
            ]
        )
    law = f"{fixed:.2g} s + {1e6 * per_cell:.4g} µs x cells"
    header = ["cells", "µs per cell", f"the whole sweep's time over {law}", "peak memory (MiB)"]
    return Figures(f"As the grid grows, {cost.attrs['workload']}, {cost.attrs['steps']} steps", header, rows)


def line(results: xr.Dataset) -> tuple[float, float]:
    """Seconds that any sweep takes, and seconds per cell: the straight line with the least relative errors."""
    whole = (results.cell_seconds * results.grid).median("grid_round")
    if len(whole) < 2:
        return 0.0, float(results.cell_seconds.median())
    per_cell, fixed = np.polyfit(whole.grid, whole, 1, w=1 / whole)
    return float(fixed), float(per_cell)


def scaled(results: xr.Dataset, cores: int) -> Figures:
    """Core-hours of large grids, by the speed measured: arithmetic, no measurement."""
    speeds = results.speed.sel(implementation="bnjax").median("round")
    rows = []
    for workload in results.workload.values:
        seconds = SCALED_STEPS * cores / float(speeds.sel(workload=workload))  # of a core, a cell
        hours = [three_digits(n * seconds / 3600) for n in (1e6, 1e9)]
        days = three_digits(1e9 * seconds / SCALED_CORES / 86400)
        rows.append([str(workload), f"{three_digits(1e3 * seconds)} ms", *hours, f"{days} days"])
    header = ["", "a cell", "a million", "a billion", f"a billion on {SCALED_CORES:,} such cores"]
    return Figures(f"Core-hours of a grid, {SCALED_STEPS} steps a cell, by these speeds", header, rows)


def all_figures(results: xr.Dataset, missing: list[str], cores: int) -> list[Figures]:
    """What was measured, as tables."""
    found = [speeds(results, missing)]
    found += [comparison(results)] if len(results.implementation) > 1 else []
    further = (profile(results), widths(results), first_result(results), growth(results))
    return [*found, *filter(None, further), scaled(results, cores)]


def for_terminal(figures: Figures) -> rich.table.Table:
    """As a rich table."""
    table = rich.table.Table(title=figures.title, show_lines=any("\n" in cell for cell in figures.rows[0]))
    for i, heading in enumerate(figures.header):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for row in figures.rows:
        table.add_row(*row)
    return table


def markdown(figures: Figures) -> str:
    """As a Markdown table under its title."""
    lines = [figures.header, ["---", *["---:"] * (len(figures.header) - 1)], *figures.rows]
    rows = (" | ".join(line).replace("\n", " ") for line in lines)
    return f"**{figures.title}**\n\n" + "\n".join(f"| {row} |" for row in rows) + "\n"


def three_digits(value: float) -> str:
    """1234.5 -> 1,230."""
    if not np.isfinite(value) or value <= 0:
        return "-"
    digits = 2 - int(np.floor(np.log10(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"
