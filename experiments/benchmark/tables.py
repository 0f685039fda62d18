"""From measurements to tables: ratios taken round by round, their medians and quartiles."""

import math

import numpy as np
import xarray as xr

from bnjax.findings import number, spread
from experiments.benchmark import processes, workloads
from experiments.table import Table

PEER_AIM = 1.4  # times as fast as each peer
PROFILE = (
    "Products: alone at their best width, then at the sweep's width; network: activations, loss, plain SGD, "
    "initialization; BN: batch normalization; shuffle: shuffled batches; the rest: checks for divergence, history, "
    "last evaluation, host; µs: per cell-step, all cores together."
)
SCALED_STEPS, SCALED_CORES = 300, 1000  # of the arithmetic for large grids


def three_digits(value: float) -> str:
    """1234.5 -> 1,230; `findings.number` would have an exponent."""
    if not np.isfinite(value) or value <= 0:
        return "-"
    digits = 2 - int(np.floor(np.log10(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def quartiles(ratio: xr.DataArray, over: str = "round") -> xr.DataArray:
    """[..., quantile]: the first quartile, the median and the third; as `spread` takes them."""
    return ratio.quantile([0.25, 0.5, 0.75], over).transpose(..., "quantile")


def ratios(speed: xr.DataArray, name: str, over: str) -> xr.DataArray:
    """[..., quantile]: of speeds [..., implementation, round] one implementation's over another's, round by round."""
    return quartiles(speed.sel(implementation=name, drop=True) / speed.sel(implementation=over, drop=True))


def title(name: str) -> str:
    """An implementation's, for a reader."""
    return processes.ALL[name].title


def heading(workload: str) -> str:
    """A column's, which can be broken into lines."""
    return workload.replace("-sigmoid", " sigmoid")


def others(results: xr.Dataset) -> list[str]:
    """The implementations measured beside bnjax, the parts of a sweep left out."""
    return [str(name) for name in results.implementation.values if name in processes.PEERS]


def layers(results: xr.Dataset) -> Table:
    """Time over the fastest implementation's, and residuals over the input's size; results of `layers.measure`."""
    # Paired: each round's ratio to the implementation that is the fastest by its median.
    fastest = results.seconds.median("round").argmin("implementation")
    ratio = quartiles(results.seconds / results.seconds.isel(implementation=fastest, drop=True))
    rows = []
    for shape in results["shape"].values:
        size = 4 * math.prod(map(int, shape.split("x"))) * results.attrs["cells"]
        for i, name in enumerate(results.implementation.values):
            at = {"shape": shape, "implementation": name}
            micro = three_digits(1e6 * float(results.seconds.sel(at).median()))
            kept = number(float(results.residual_bytes.sel(at)) / size)
            rows.append(["" if i else shape, name, spread(ratio.sel(at).values), micro, kept])
    return Table(
        "Forward + backward, and what is kept for the backward pass",
        ["shape", "", "times the fastest", "µs", "kept, times x"],
        rows,
        "Times the fastest: median [quartiles] over rounds.",
    )


def beside(results: xr.Dataset, workload: str, missing: list[str]) -> Table:
    """bnjax.sweep beside the others (`missing` ones are not installed), and which aims it reaches by the medians."""
    w, at, rows = workloads.ALL[workload], results.sel(workload=workload), []
    for name in (*processes.OURS, *others(results)):
        one, compared = at.sel(implementation=name), ["", ""]
        if name in processes.PEERS:
            ratio = ratios(at.speed, "bnjax", name).values
            aim = w.aim if name == "products" else PEER_AIM
            compared = [spread(ratio), f"{number(aim)}: {'reached' if ratio[1] >= aim else 'missed'}"]
        width = str(int(one.width)) if one.width else ""
        rows.append([title(name), width, three_digits(float(one.speed.median())), *compared])
    rows += [[title(name), "", "not installed", "", ""] for name in missing]
    evaluated = spread(ratios(at.speed, "bnjax_evaluated", "bnjax").values)
    return Table(
        f"{workload}, batch {w.batch_size}",
        ["", "width", "cell-steps per second", "bnjax.sweep over it", "aim"],
        rows,
        f"{title('bnjax_evaluated').capitalize()}: {evaluated} of the speed of {title('bnjax')}.",
    )


def profile(results: xr.Dataset) -> Table | None:
    """The share of each part in a sweep's time for a cell-step; None if no parts were measured."""
    parts = [name for name in processes.PARTS if name in results.implementation]
    if not parts:
        return None
    ladder = [*(["products"] if "products" in results.implementation else []), *parts, "bnjax"]
    seconds = 1 / results.speed.sel(implementation=ladder)  # of a cell-step, on all cores together
    total = seconds.sel(implementation="bnjax")
    added = seconds.diff("implementation")
    shares = xr.concat([seconds.isel(implementation=[0]), added], "implementation") / total
    middle = (100 * shares).median("round").transpose("implementation", "workload")
    words = {"products": "products", **{name: title(name) for name in parts}, "bnjax": "+ the rest"}
    rows = [[words[name], *(f"{share:.0f}%" for share in middle.sel(implementation=name).values)] for name in ladder]
    rows.append(["= µs", *map(three_digits, 1e6 * total.median("round").values)])
    header = ["", *map(heading, results.workload.values)]
    return Table("Where a sweep's time goes: what each part adds, medians", header, rows, PROFILE)


def widths(results: xr.Dataset) -> Table | None:
    """Speed at each width, and at the one chosen by size over the fastest; None if they were not measured.

    All by the processes that run them all: two processes that do the same may differ by more than two widths.
    """
    names = [name for name in processes.WIDTHS if name in results.implementation]
    if not names:
        return None
    columns = [["", *map(title, names), "chosen", "over the fastest"]]
    for workload in results.workload.values:
        speeds = results.speed.sel(workload=workload)
        middle = speeds.sel(implementation=names).median("round")
        best = names[int(middle.argmax("implementation"))]
        chosen = int(results.width.sel(workload=workload, implementation="bnjax"))
        there = f"width_{chosen}" if f"width_{chosen}" in names else "bnjax"
        ratio = spread(ratios(speeds, there, best).values)
        columns.append([heading(workload), *map(three_digits, middle.values), str(chosen), ratio])
    header, *rows = zip(*columns, strict=True)
    words = "Chosen: the width that bnjax.sweep takes by itself, by size; its speed over the fastest width's."
    return Table("Cell-steps per second of bnjax.sweep at each width, medians", header, rows, words)


def first_result(results: xr.Dataset) -> Table | None:
    """Seconds to the first result."""
    if "first_result" not in results:
        return None
    found = results.first_result
    rows = [[str(c), *map(number, [*v, sum(v[:2])])] for c, v in zip(found.caches.values, found.values, strict=True)]
    header = ["", *map(str, found.stage.values), "to the first result"]
    return Table(f"Time to the first result in seconds, {found.attrs['workload']}", header, rows)


def growth(results: xr.Dataset) -> Table | None:
    """Cost of a cell and peak memory, by the size of the grid."""
    if "cell_seconds" not in results:
        return None
    cost = results.cell_seconds
    fixed, per_cell = line(results)
    ratio = quartiles(cost * cost.grid / (fixed + per_cell * cost.grid), "grid_round")
    rows = []
    for grid in results.grid.values:
        micro = three_digits(1e6 * float(cost.sel(grid=grid).median()))
        memory = f"{float(results.peak_memory.sel(grid=grid)) / 2**20:.0f}"
        rows.append([f"{grid:,}", micro, spread(ratio.sel(grid=grid).values), memory])
    return Table(
        f"As the grid grows, {cost.attrs['workload']}, {cost.attrs['steps']} steps",
        ["cells", "µs per cell", "the whole sweep's time over the law", "peak memory (MiB)"],
        rows,
        f"The law: {number(fixed)} s + {three_digits(1e6 * per_cell)} µs x cells.",
    )


def line(results: xr.Dataset) -> tuple[float, float]:
    """Seconds that any sweep takes, and seconds per cell: the straight line with the least relative errors."""
    whole = (results.cell_seconds * results.grid).median("grid_round")
    if len(whole) < 2:
        return 0.0, float(results.cell_seconds.median())
    per_cell, fixed = np.polyfit(whole.grid, whole, 1, w=1 / whole)
    return float(fixed), float(per_cell)


def scaled(results: xr.Dataset, cores: int) -> Table:
    """Core-hours of large grids, by the speed measured: arithmetic, no measurement."""
    speeds = results.speed.sel(implementation="bnjax").median("round")
    rows = []
    for workload in results.workload.values:
        seconds = SCALED_STEPS * cores / float(speeds.sel(workload=workload))  # of a core, a cell
        hours = [three_digits(n * seconds / 3600) for n in (1e6, 1e9)]
        days = three_digits(1e9 * seconds / SCALED_CORES / 86400)
        rows.append([str(workload), f"{three_digits(1e3 * seconds)} ms", *hours, f"{days} days"])
    header = ["", "a cell", "a million", "a billion", f"a billion on {SCALED_CORES:,} such cores"]
    return Table(f"Core-hours of a grid, {SCALED_STEPS} steps a cell, by these speeds", header, rows)


def sweeps(results: xr.Dataset, missing: list[str], cores: int) -> list[Table]:
    """All that was measured of sweeps."""
    compared = [beside(results, str(workload), missing) for workload in results.workload.values]
    further = [one for one in (profile(results), widths(results), first_result(results), growth(results)) if one]
    return [*compared, *further, scaled(results, cores)]
