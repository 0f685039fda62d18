"""Figures from labelled results. The only module that imports matplotlib; it needs no display."""

import io
import textwrap
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import matplotlib.figure
import numpy as np
import xarray as xr

from bnjax.analysis.robustness import at_best

# Okabe & Ito's colours, told apart with any kind of colour vision; each line has a marker of its own too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
TITLE_SIZE = 10.5  # of long titles, in points


class Figure(matplotlib.figure.Figure):
    """One that shows itself in notebooks, without pyplot."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The image, and its size on the screen in pixels."""
        image = io.BytesIO()
        self.savefig(image, format="png")
        width, height = (round(96 * inches) for inches in self.get_size_inches())
        return image.getvalue(), {"width": width, "height": height}


def robustness(
    accuracy: xr.DataArray, *, threshold: float, chance: float, baselines: Collection[str] = (), title: str = ""
) -> Figure:
    """Final test accuracy against init_scale: per network the median and the spread over seeds.

    Args:
      accuracy: from `bnjax.analysis.robustness.final_accuracy`; of several learning rates (or settings of other
        axes) the best per scale.
      threshold: fraction of the best median, drawn as a line.
      chance: the accuracy of guessing, drawn as a line.
      baselines: the networks drawn dashed.
      title: above the figure; broken into lines by its width.

    Returns:
      A matplotlib figure: accuracy in per cent over init_scale, a factor, on a logarithmic axis.
    """
    accuracy = 100 * at_best(accuracy)
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
    )
    axes.set_title(_wrapped(title, figure), fontsize=TITLE_SIZE)
    if len(scales) > 1:
        axes.set_xlim(scales[0] / 1.3, scales[-1] * 1.3)  # so that no marker is cut
        decades = np.arange(np.ceil(np.log10(scales[0])), np.floor(np.log10(scales[-1])) + 1)
        if 2 <= len(decades) <= 17:
            axes.set_xticks(10.0**decades)
    axes.grid(alpha=0.25)
    seeds = accuracy.sizes["seed"]
    axes.legend(title=f"median and range over {seeds} seeds" if seeds > 1 else "one seed", fontsize=9, title_fontsize=9)
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
    left.set(xlabel="input sample j, x ascending", ylabel="output sample i", title="J = dy / dx of one feature")
    figure.colorbar(image, ax=left, label="dy_i / dx_j", location="left", pad=0.16)
    index = np.arange(1, len(spectrum) + 1)
    right.plot(index, numeric, "o", color=COLORS[0], markersize=9, fillstyle="none", label="autodiff, eigvalsh")
    right.plot(index, spectrum, "x", color=COLORS[1], label="closed form")
    right.axhline(0, color="0.4", linewidth=1, linestyle=":", zorder=1)
    right.set(xlabel="eigenvalue, in ascending order", ylabel="value (y-units per x-unit)", title="Spectrum")
    right.grid(alpha=0.25)
    right.legend(fontsize=9)
    figure.suptitle(title)
    return figure


class Panel(NamedTuple):
    """One set of axes with lines over one quantity."""

    title: str
    ylabel: str
    # Over one dimension, and maybe "seed": then median and range are drawn. `_NAME` looks like NAME, not in the legend.
    series: Mapping[str, xr.DataArray]
    xlabel: str = "init_scale"
    xscale: str = "log"
    yscale: str = "linear"
    marks: Mapping[str, float] = MappingProxyType({})  # vertical lines at these x
    levels: Mapping[str, float] = MappingProxyType({})  # horizontal lines at these y
    theory: Collection[str] = ()  # the series drawn as dashed lines, beneath the others
    unconnected: Collection[str] = ()  # the series drawn as points only
    paired: bool = False  # marks have the colours of the series, in their order


def panels(shown: Sequence[Panel], *, title: str = "", columns: int | None = None, share_rows: bool = False) -> Figure:
    """Lines over a quantity such as init_scale, in panels side by side.

    Args:
      shown: the panels, in the order of reading.
      title: above the figure.
      columns: in how many columns; default: one row.
      share_rows: whether the panels of a row share the vertical axis.

    Returns:
      A matplotlib figure.
    """
    columns = columns or len(shown)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.9 * columns, 3.9 * rows), layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_rows else False).ravel()
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, shown, strict=False):
        drawn = {"x": False, "y": False}  # whether there is anything that a logarithmic axis can show
        for name, values in panel.series.items():
            i = [*panel.series].index(name.removeprefix("_"))
            color = COLORS[i % len(COLORS)]
            (dim,) = (d for d in values.dims if d != "seed")
            x = values[dim].values
            if "seed" in values.dims:
                low, high = values.min("seed"), values.max("seed")
                axes.fill_between(x, low.values, high.values, color=color, alpha=0.18, linewidth=0)
                values = values.median("seed")
            drawn["x"] |= bool((x > 0).any())
            drawn["y"] |= bool((values > 0).any())
            theory = name in panel.theory
            axes.plot(
                x,
                values.values,
                linestyle="none" if name in panel.unconnected else "--" if theory else "-",
                color=color,
                marker="" if theory else MARKERS[i % len(MARKERS)],
                markersize=4,
                label=name,
                zorder=1.5 if theory else 2,
            )
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
        axes.set(xscale=panel.xscale if drawn["x"] else "linear", yscale=panel.yscale if drawn["y"] else "linear")
        for i, (name, x) in enumerate(panel.marks.items()):
            color = COLORS[i % len(COLORS)] if panel.paired else "0.3"
            axes.axvline(x, color=color, linewidth=1, linestyle=":", zorder=1)
            if not panel.paired:
                place = (x, 0.02 + 0.05 * (i + bool(panel.levels)))  # a level may be at the foot
                axes.annotate(f" {name}", place, xycoords=("data", "axes fraction"), fontsize=8, color=color)
        for name, y in panel.levels.items():
            axes.axhline(y, color="0.4", linewidth=1, linestyle=":", zorder=1)
            place = (1, y)  # at the right of the axes, where no line passes
            axes.annotate(f" {name}", place, xycoords=("axes fraction", "data"), fontsize=8, color="0.3", va="center")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def maps(
    values: xr.DataArray,
    label: str,
    *,
    level: float,
    best: xr.DataArray | None = None,
    labels: tuple[str, str] = ("", ""),
    title: str = "",
    columns: int = 3,
) -> Figure:
    """One map for each model: a value over init_scale and learning_rate, on logarithmic axes.

    Args:
      values: of dimensions (model, learning_rate, init_scale).
      label: of the colours, which any kind of colour vision tells apart.
      level: cells of this value or above have a dot.
      best: the learning rates to mark with a star, [model, init_scale]; NaN: none.
      labels: what a dot and what a star means, for a legend beneath the maps.
      title: above the figure; broken into lines by its width.
      columns: most maps in a row.

    Returns:
      A matplotlib figure.
    """
    names = values.model.values
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.ravel()[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.ravel(), names, strict=False):
        one = values.sel(model=name).transpose("learning_rate", "init_scale")
        corners = [_edges(one[dim].values) for dim in ("init_scale", "learning_rate")]
        mesh = axes.pcolormesh(*corners, one, cmap="cividis", vmin=float(values.min()), vmax=float(values.max()))
        reached, starred = one.values >= level, np.zeros(one.shape, bool)
        if best is not None:
            starred = (one.learning_rate == best.sel(model=name)).transpose(*one.dims).values
        for cells, marker, size, words in zip((starred, reached), "*o", (14, 4.5), labels[::-1], strict=True):
            y, x = np.nonzero(cells)
            axes.plot(
                one.init_scale.values[x],
                one.learning_rate.values[y],
                linestyle="none",
                marker=marker,
                color="white",
                markeredgecolor="black",
                markersize=size,
                label=words,
            )
        axes.set(xscale="log", yscale="log", xlabel="init_scale (factor of the initial weights)", title=str(name))
    for axes in grid[:, 0]:
        axes.set_ylabel("learning rate")
    figure.colorbar(mesh, ax=grid.ravel().tolist(), label=label)
    if any(labels):
        figure.legend(handles=grid[0, 0].lines, loc="outside lower center", ncols=2, facecolor="0.8", fontsize=9)
    figure.suptitle(_wrapped(title, figure), fontsize=TITLE_SIZE)
    return figure


def _wrapped(title, figure):
    """In lines that are no wider than the figure, but for longer words."""
    return textwrap.fill(title, int(11 * figure.get_figwidth()), break_long_words=False)


def _edges(values):
    """Between which each of these positive values, ascending, is the middle on a logarithmic axis."""
    logs = np.log(values)
    middles = (logs[1:] + logs[:-1]) / 2
    first, last = (
        (logs[:1] - 0.5, logs[-1:] + 0.5)
        if len(logs) == 1
        else (2 * logs[:1] - middles[:1], 2 * logs[-1:] - middles[-1:])
    )
    return np.exp(np.concatenate([first, middles, last]))
