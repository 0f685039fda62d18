"""The figure of the sweeps' speeds."""

import numpy as np
import xarray as xr

from bnjax import plots
from experiments.benchmark import tables


def shares(results: xr.Dataset, *, title: str = "") -> plots.Figure:
    """The speed of each implementation in per cent of the matrix products alone, workload by workload.

    Args:
      results: of `sweeps.measure`, with "products" among the implementations.
      title: above the figure.

    Returns:
      A matplotlib figure: medians and quartiles of the rounds' ratios, on a logarithmic axis.
    """
    figure = plots.Figure(figsize=(9, 4.8), layout="constrained", dpi=150)
    axes = figure.add_subplot(yscale="log")
    names = ["bnjax", *(name for name in tables.others(results) if name != "products")]
    places = np.arange(results.sizes["workload"])
    for i, name in enumerate(names):
        low, middle, high = 100 * tables.ratios(results.speed, name, "products").values.T
        x = places + 0.11 * (i - (len(names) - 1) / 2)
        style = {"color": plots.COLORS[i], "marker": plots.MARKERS[i], "markersize": 8, "linestyle": "none"}
        axes.errorbar(x, middle, [middle - low, high - middle], label=tables.title(name), **style)
        if name == "bnjax":  # the others are read off the axis
            for place, value in zip(x, middle, strict=True):
                at = {"xytext": (-7, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
                axes.annotate(f"{value:.0f}%", (place, value), **at)
    axes.axhline(100, color="0.4", linewidth=1, linestyle=":", zorder=1)
    axes.set_xticks(places, results.workload.values)
    axes.set_xlim(-0.6, places[-1] + 0.6)
    axes.set(ylabel="cell-steps per second,\n% of the matrix products alone", title=title)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if t >= axes.get_ylim()[0]]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(top=130)
    axes.grid(alpha=0.25, axis="y")
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=9, title="median and quartiles over rounds")
    return figure
