"""Figures from labelled results. The only module that imports matplotlib; it needs no display."""

from collections.abc import Collection

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

# Okabe & Ito's colours, told apart with any kind of colour vision; each line has a marker of its own too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def robustness(
    accuracy: xr.DataArray,
    *,
    threshold: float,
    chance: float,
    baselines: Collection[str] = (),
    title: str = "",
) -> Figure:
    """Final test accuracy against init_scale: per network the median and the spread over seeds.

    Args:
      accuracy: from `bnjax.sweeps.robustness.final_accuracy`; of several learning rates the best per scale.
      threshold: fraction of the best median, drawn as a line.
      chance: the accuracy of guessing, drawn as a line.
      baselines: the networks drawn dashed.
      title: above the figure.

    Returns:
      A matplotlib figure: accuracy in per cent over init_scale, a factor, on a logarithmic axis.
    """
    best = accuracy.median("seed").fillna(0).argmax("learning_rate")
    accuracy = 100 * accuracy.isel(learning_rate=best)
    figure = Figure(figsize=(8, 4.8), layout="constrained", dpi=150)
    axes = figure.add_subplot(xscale="log")
    scales = accuracy.init_scale.values
    for i, name in enumerate(accuracy.model.values):
        color = COLORS[i % len(COLORS)]
        runs = accuracy.sel(model=name)
        axes.fill_between(scales, runs.min("seed"), runs.max("seed"), color=color, alpha=0.18, linewidth=0)
        axes.plot(
            scales,
            runs.median("seed"),
            color=color,
            marker=MARKERS[i % len(MARKERS)],
            markersize=4.5,
            linestyle="--" if name in baselines else "-",
            label=str(name),
            zorder=2 if name in baselines else 3,
        )
    level = threshold * float(accuracy.median("seed").max())
    for y, text in ((level, f" {threshold:.4g} of\n the best"), (100 * chance, " chance")):
        axes.axhline(y, color="0.4", linewidth=1, linestyle=":", zorder=1)
        axes.annotate(text, (1, y), xycoords=("axes fraction", "data"), fontsize=8, va="center", color="0.3")
    axes.set(
        xlabel="init_scale (factor of the standard deviation of the initial weights)",
        ylabel="final test accuracy (%)",
        ylim=(0, 100),
        title=title,
    )
    if len(scales) > 1:
        axes.set_xlim(scales[0] / 1.3, scales[-1] * 1.3)  # so that no marker is cut
        decades = np.arange(np.ceil(np.log10(scales[0])), np.floor(np.log10(scales[-1])) + 1)
        if 2 <= len(decades) <= 17:
            axes.set_xticks(10.0**decades)
    axes.grid(alpha=0.25)
    seeds = accuracy.sizes["seed"]
    axes.legend(
        title=f"median and range over {seeds} seeds" if seeds > 1 else "one seed",
        fontsize=9,
        title_fontsize=9,
    )
    return figure


def jacobian(J: np.ndarray, spectrum: np.ndarray, numeric: np.ndarray, *, title: str = "") -> Figure:
    """One feature's Jacobian as a map, and its eigenvalues in closed form beside a numerical solver's.

    Args:
      J: [N, N], from `bnjax.jacobian.dense`; y-units per x-unit.
      spectrum: [N], from `bnjax.jacobian.spectrum`.
      numeric: [N], the eigenvalues by other means, ascending.
      title: above the figure.

    Returns:
      A matplotlib figure of two panels.
    """
    figure = Figure(figsize=(9.5, 4.2), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    largest = max(float(np.abs(J).max()), np.finfo(float).tiny)
    image = left.imshow(J, cmap="PuOr", vmin=-largest, vmax=largest)
    left.set(
        xlabel="input sample j, x ascending", ylabel="output sample i", title="J = dy / dx of one feature"
    )
    figure.colorbar(image, ax=left, label="dy_i / dx_j", location="left", pad=0.16)
    index = np.arange(1, len(spectrum) + 1)
    right.plot(
        index, numeric, "o", color=COLORS[0], markersize=9, fillstyle="none", label="autodiff, eigvalsh"
    )
    right.plot(index, spectrum, "x", color=COLORS[1], label="closed form")
    right.axhline(0, color="0.4", linewidth=1, linestyle=":", zorder=1)
    right.set(xlabel="eigenvalue, in ascending order", ylabel="value (y-units per x-unit)", title="Spectrum")
    right.grid(alpha=0.25)
    right.legend(fontsize=9)
    figure.suptitle(title)
    return figure
