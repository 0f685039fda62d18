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
    accuracy: xr.DataArray,
    *,
    threshold: float,
    chance: float,
    baselines: Collection[str] = (),
    title: str = "",
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


def scale_laws(training: xr.Dataset, epsilon: xr.Dataset, *, exact: str = "", title: str = "") -> Figure:
    """How far `W -> a W` is from the scale laws: by rounding, which training amplifies, and by a fixed epsilon.

    Args:
      training: `trajectory` [trained, decay, factor, step], the relative deviation of W(t) / a from W(t) at
        a = 1 in float32, by the network's activation, weight decay, a and step; `trajectory_float64` [trained,
        decay, step], the same for one a in float64.
      epsilon: `measured` and `first_order`, relative changes [fixed_epsilon, factor_at_epsilon].
      exact: what is 0, and has no place on a logarithmic axis: written at its foot.
      title: above the figure.

    Returns:
      A matplotlib figure: a panel of deviation over steps for each activation, and one of change over a.
    """
    names = training.trained.values
    figure = Figure(figsize=(4.4 * (len(names) + 1), 4.8), layout="constrained", dpi=150)
    *panels, right = figure.subplots(1, len(names) + 1)
    factors = training.factor.values
    for axes, name in zip(panels, names, strict=True):
        for decay, style, words in zip(
            training.decay.values, ("-", "--"), ("no weight decay", "with weight decay / a²"), strict=True
        ):
            at = training.sel(trained=name, decay=decay)
            for i, factor in enumerate(factors):
                curve = at.trajectory.sel(factor=factor)
                # Wide below narrow: where the curves of several a coincide, each is still seen.
                width = 1.2 + 0.9 * (len(factors) - 1 - i)
                color = COLORS[i % 6]
                axes.plot(curve.step, curve.where(curve > 0), style, color=color, linewidth=width, alpha=0.8)
            double = at.trajectory_float64
            axes.plot(double.step, double.where(double > 0), style, color=COLORS[6], linewidth=1)
            axes.plot([], [], style, color="0.4", label=words)
        for i, factor in enumerate(factors):
            axes.plot([], [], color=COLORS[i % 6], linewidth=2.5, label=f"a = {factor:.4g}")
        axes.plot([], [], color=COLORS[6], linewidth=1, label="a = 3 in float64")
        axes.set(
            xscale="log",
            yscale="log",
            ylim=(1e-19, 1e5),
            yticks=10.0 ** np.arange(-16, 1, 2),
            xlabel="training step t",
            title=name,
        )
        if exact:
            axes.axhline(1e-18, color=COLORS[6], linewidth=3)
            axes.annotate(exact, (0.03, 2e-18), xycoords=("axes fraction", "data"), fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7.5, loc="upper left", ncols=2)
    panels[0].set_ylabel("deviation of W(t) / a from W(t) at a = 1, relative")
    for i, value in enumerate(epsilon.fixed_epsilon.values):
        at = epsilon.sel(fixed_epsilon=value)
        color = COLORS[i % len(COLORS)]
        label = f"epsilon {value:g}"
        a = at.factor_at_epsilon
        marker = MARKERS[i % len(MARKERS)]
        right.plot(a, at.measured, marker, color=color, markersize=4.5, label=f"{label}, measured")
        for j, side in enumerate((a < 1, a > 1)):  # at 1 nothing changes
            line = at.first_order.where(side)
            right.plot(a, line, color=color, linewidth=1.2, label=None if j else f"{label}, first order")
    right.axvline(1, color="0.4", linewidth=1, linestyle=":")
    right.set(
        xscale="log",
        yscale="log",
        ylim=(float(epsilon.measured.min()) / 3, 10),
        xlabel="a, of all hidden layers",
        ylabel="relative change of the outputs",
        title="at a fixed epsilon",
    )
    right.grid(alpha=0.25)
    right.legend(fontsize=7.5)
    figure.suptitle(title)
    return figure


class Panel(NamedTuple):
    """One set of axes with lines over one quantity."""

    title: str
    ylabel: str
    series: Mapping[
        str, xr.DataArray
    ]  # over one dimension, and maybe "seed": then median and range are drawn
    xlabel: str = "init_scale"
    xscale: str = "log"
    yscale: str = "linear"
    marks: Mapping[str, float] = MappingProxyType({})  # vertical lines at these x
    levels: Mapping[str, float] = MappingProxyType({})  # horizontal lines at these y
    theory: Collection[str] = ()  # the series drawn as dashed lines, beneath the others
    unconnected: Collection[str] = ()  # the series drawn as points only
    paired: bool = False  # marks have the colours of the series, in their order


def panels(shown: Sequence[Panel], *, title: str = "", columns: int | None = None) -> Figure:
    """Lines over a quantity such as init_scale, in panels side by side.

    Args:
      shown: the panels, in the order of reading.
      title: above the figure.
      columns: in how many columns; default: one row.

    Returns:
      A matplotlib figure.
    """
    columns = columns or len(shown)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.9 * columns, 3.9 * rows), layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, shown, strict=False):
        drawn = {"x": False, "y": False}  # whether there is anything that a logarithmic axis can show
        for i, (name, values) in enumerate(panel.series.items()):
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
        axes.set(
            xscale=panel.xscale if drawn["x"] else "linear", yscale=panel.yscale if drawn["y"] else "linear"
        )
        for i, (name, x) in enumerate(panel.marks.items()):
            color = COLORS[i % len(COLORS)] if panel.paired else "0.3"
            axes.axvline(x, color=color, linewidth=1, linestyle=":", zorder=1)
            if not panel.paired:
                place = (x, 0.02 + 0.05 * (i + bool(panel.levels)))  # a level may be at the foot
                axes.annotate(f" {name}", place, xycoords=("data", "axes fraction"), fontsize=8, color=color)
        for name, y in panel.levels.items():
            axes.axhline(y, color="0.4", linewidth=1, linestyle=":", zorder=1)
            place = (1, y)  # at the right of the axes, where no line passes
            axes.annotate(
                f" {name}", place, xycoords=("axes fraction", "data"), fontsize=8, color="0.3", va="center"
            )
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
        mesh = axes.pcolormesh(
            *corners, one, cmap="cividis", vmin=float(values.min()), vmax=float(values.max())
        )
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
        axes.set(
            xscale="log", yscale="log", xlabel="init_scale (factor of the initial weights)", title=str(name)
        )
    for axes in grid[:, 0]:
        axes.set_ylabel("learning rate")
    figure.colorbar(mesh, ax=grid.ravel().tolist(), label=label)
    if any(labels):
        figure.legend(
            handles=grid[0, 0].lines,
            loc="outside lower center",
            ncols=2,
            facecolor="0.8",
            fontsize=9,
        )
    figure.suptitle(_wrapped(title, figure), fontsize=TITLE_SIZE)
    return figure


def _wrapped(title, figure):
    """In lines that are no wider than the figure, but for longer words."""
    return textwrap.fill(title, int(11 * figure.get_figwidth()), break_long_words=False)


def mean_field_growth(results: xr.Dataset) -> Figure:
    """Growth per layer of the squared gradient norm against batch size, in theory and measured.

    Args:
      results: from `experiments.mean_field`: measured, error, theory and z (activation, batch_size), theory_curve
        (activation, theory_batch_size), theory_infinite_batch (activation).

    Returns:
      A matplotlib figure: the growth, a factor, over the batch size; and the deviation in standard errors.
    """
    figure = Figure(figsize=(10.5, 4.8), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    spread = np.linspace(-0.07, 0.07, max(results.sizes["activation"], 2))
    for i, name in enumerate(results.activation.values):
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        runs = results.sel(activation=name)
        left.plot(runs.theory_batch_size, runs.theory_curve - 1, color=style["color"], linewidth=1.2)
        for part, fill, label in ((runs.z.notnull(), "full", str(name)), (runs.z.isnull(), "none", None)):
            some = runs.isel(batch_size=part.values)
            left.errorbar(
                some.batch_size,
                some.measured - 1,
                some.error,
                linestyle="",
                label=label,
                fillstyle=fill,
                **style,
            )
        left.plot(
            1.9 * runs.theory_batch_size[-1], runs.theory_infinite_batch - 1, "_", color=style["color"], ms=16
        )
        right.plot(runs.batch_size * np.exp(spread[i]), runs.z, linestyle="", **style)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="batch size",
        ylabel="growth per layer of the squared gradient norm, minus 1",
        title="lines: theory; points: networks (filled: mean, width → ∞; open: median)",
    )
    for axes in (left, right):
        sizes = [*results.batch_size.values]
        ticks = [B for i, B in enumerate(sizes) if i == 0 or B / sizes[i - 1] > 1.19]
        axes.set_xscale("log")
        labels = [f"{B}" for B in ticks]
        if axes is left:
            ticks, labels = [*ticks, 1.9 * float(results.theory_batch_size[-1])], [*labels, "∞"]
        axes.set_xticks(ticks, labels)
        axes.set_xticks([], minor=True)
        axes.set_xlim(sizes[0] / 1.2, None if axes is left else sizes[-1] * 1.2)
        axes.grid(alpha=0.25)
    left.legend(fontsize=9)
    for level in (-4, 4):
        right.axhline(level, color="0.4", linewidth=1, linestyle=":")
    right.axhspan(-2, 2, color="0.92", zorder=0)
    right.set(
        xlabel="batch size",
        ylabel="(measured - theory) / standard error",
        ylim=(-4.6, 4.6),
        title="deviation of the means (points side by side)",
    )
    return figure


def epsilon_threshold(results: xr.Dataset, *, title: str = "") -> Figure:
    """Signal and gradient around the threshold of init_scale that epsilon makes.

    Args:
      results: from `experiments.mean_field`: variance and growth with their *_theory and *_error (activation,
        factor), threshold_theory (activation).
      title: above the figure.

    Returns:
      A matplotlib figure: variance of batch normalization's output in the last layer, and growth per layer, over
      init_scale in units of the threshold.
    """
    figure = Figure(figsize=(10.5, 4.6), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(results.activation.values):
        runs = results.sel(activation=name)
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        label = f"{name}, threshold {float(runs.threshold_theory):.2g}"  # in units of init_scale
        for axes, what in ((left, "variance"), (right, "growth")):
            axes.plot(runs.factor, runs[f"{what}_theory"], color=style["color"], linewidth=1.2)
            axes.errorbar(runs.factor, runs[what], runs[f"{what}_error"], linestyle="", label=label, **style)
    for axes in (left, right):
        axes.axvline(1, color="0.4", linewidth=1, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlabel("init_scale / predicted threshold")
        axes.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
    left.set(
        yscale="log",
        ylabel="variance of BN's output in the last layer (1 at epsilon 0)",
        title="signal (lines: theory, points: networks)",
    )
    figure.suptitle(title)
    right.axhline(1, color="0.4", linewidth=1, linestyle=":")
    right.set(ylabel="growth per layer of the squared gradient norm", ylim=(0, None), title="gradient")
    left.legend(fontsize=9, loc="lower right")
    return figure


def flow_by_layer(rows: Mapping[str, xr.DataArray], *, names: Mapping[str, str], title: str = "") -> Figure:
    """Signals forward and gradients backward, layer by layer, at a few scales: a column of panels per norm.

    Args:
      rows: {label: values}, a row of panels each; dimensions norm, init_scale, seed and layer. What is not above 0
        and finite is not drawn.
      names: of the norms, for the panels.
      title: above the figure.

    Returns:
      A matplotlib figure: medians and ranges over seeds on logarithmic axes, which the panels of a row share.
    """
    some = next(iter(rows.values()))
    norms = list(some.norm.values)
    layers = np.arange(1, some.sizes["layer"] + 1)
    figure = Figure(figsize=(1 + 3.6 * len(norms), 0.7 + 2.6 * len(rows)), layout="constrained", dpi=150)
    panels = figure.subplots(len(rows), len(norms), sharex=True, sharey="row", squeeze=False)
    for row, (label, values) in zip(panels, rows.items(), strict=True):
        values = values.where((values > 0) & np.isfinite(values))
        for axes, norm in zip(row, norms, strict=True):
            for i, scale in enumerate(values.init_scale.values):
                runs = values.sel(norm=norm, init_scale=scale)
                color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
                axes.fill_between(
                    layers, runs.min("seed"), runs.max("seed"), color=color, alpha=0.2, linewidth=0
                )
                axes.plot(
                    layers, runs.median("seed"), color=color, marker=marker, markersize=5, label=f"{scale:g}"
                )
            axes.set_yscale("log")
            axes.grid(alpha=0.25)
        row[0].set_ylabel(label)
    for top, bottom, norm in zip(panels[0], panels[-1], norms, strict=True):
        top.set_title(names.get(norm, norm))
        bottom.set_xlabel("hidden layer")
        bottom.set_xticks(layers)
    panels[0, 0].legend(title="init_scale", fontsize=9, title_fontsize=9)
    figure.suptitle(title)
    return figure


def gradient_by_scale(
    gradient: xr.DataArray,
    *,
    names: Mapping[str, str],
    powers: Mapping[str, tuple[float, Collection[str]]],
    starts: Mapping[str, float],
    title: str = "",
) -> Figure:
    """The norm of the gradient to each layer's weights against init_scale: a panel per activation.

    Args:
      gradient: dimensions activation, norm, init_scale, seed and layer; crosses at the
        lower edge are where the first layer's is exactly 0 for all seeds.
      names: of the norms, for the legend.
      powers: {norm: (the theory's slope, the activations for which it holds)}, drawn beside the first layer.
      starts: {activation: the init_scale from which the theory with BN is to hold}.
      title: above the figure.

    Returns:
      A matplotlib figure: medians over seeds, one line a layer (the first is dark), logarithmic axes.
    """
    activations = list(gradient.activation.values)
    figure = Figure(figsize=(1.2 + 3.4 * len(activations), 4.8), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(activations), sharey=True, squeeze=False)[0]
    scales, count = gradient.init_scale.values, gradient.sizes["layer"]
    median = gradient.median("seed", skipna=False)
    seen = median.where(np.isfinite(median) & (median > 0))
    middle = seen.where((seen.init_scale >= 1e-4) & (seen.init_scale <= 1e4))
    low, high = (10 ** np.round(np.log10(float(f))) for f in (middle.min() / 1e2, middle.max() * 1e2))
    low, high = max(low, 1e-14), min(high, 1e14)
    for axes, activation in zip(panels, activations, strict=True):
        for i, norm in enumerate(gradient.norm.values):
            color = COLORS[i % len(COLORS)]
            for layer in reversed(range(count)):
                line = median.sel(activation=activation, norm=norm).isel(layer=layer)
                first = layer == 0
                label = names.get(norm, norm) if first else None
                alpha = 1 - 0.75 * layer / max(count - 1, 1)
                axes.plot(scales, line.where(line > 0), color=color, alpha=alpha, linewidth=1.8, label=label)
            zero = gradient.sel(activation=activation, norm=norm).isel(layer=0) == 0
            zeros = scales[zero.all("seed").values]
            axes.plot(
                zeros,
                np.full(len(zeros), low * 3),
                linestyle="none",
                marker="x",
                markersize=5,
                color=color,
                label="first layer exactly 0, all seeds" if len(zeros) else None,
            )
            slope, holds = powers.get(norm, (0, ()))
            first = median.sel(activation=activation, norm=norm).isel(layer=0)
            anchor = scales[np.argmin(np.abs(np.log(scales)))]
            if (
                activation in holds
                and np.isfinite(first.sel(init_scale=anchor))
                and first.sel(init_scale=anchor) > 0
            ):
                axes.plot(
                    scales,
                    4 * float(first.sel(init_scale=anchor)) * (scales / anchor) ** float(slope),
                    color="0.25",
                    linestyle=(0, (4, 2)),
                    linewidth=1.1,
                    label=f"slope {slope:g}",
                )
        if activation in starts:
            axes.axvline(
                starts[activation], color="0.4", linewidth=1, linestyle=":", label="BN's law from here"
            )
        axes.set(xscale="log", yscale="log", ylim=(low, high), xlabel="init_scale", title=activation)
        axes.set_xlim(scales[0], scales[-1])
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="best")
    panels[0].set_ylabel("norm of the gradient to the weights\n(one line a layer, the first dark)")
    figure.suptitle(title)
    return figure


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


def shares(ratios: xr.DataArray, *, title: str = "") -> Figure:
    """How near to a limit each of several implementations comes, workload by workload.

    Args:
      ratios: speeds over the limit's [workload, implementation, quantile], the middle one of three quantiles
        being the point and the others its bar.
      title: above the figure.

    Returns:
      A matplotlib figure: per cent of the limit on a logarithmic axis, over the workloads.
    """
    figure = Figure(figsize=(9, 4.8), layout="constrained", dpi=150)
    axes = figure.add_subplot(yscale="log")
    names = ratios.implementation.values
    places = np.arange(ratios.sizes["workload"])
    for i, name in enumerate(names):
        low, middle, high = 100 * ratios.sel(implementation=name).transpose("quantile", "workload").values
        x = places + 0.11 * (i - (len(names) - 1) / 2)
        axes.errorbar(
            x,
            middle,
            [middle - low, high - middle],
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle="none",
            markersize=8,
            label=str(name),
        )
        if i == 0:  # the others are read off the axis
            for place, value in zip(x, middle, strict=True):
                axes.annotate(
                    f"{value:.0f}%",
                    (place, value),
                    (-7, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                )
    axes.axhline(100, color="0.4", linewidth=1, linestyle=":", zorder=1)
    axes.set_xticks(places, ratios.workload.values)
    axes.set_xlim(-0.6, places[-1] + 0.6)
    axes.set_ylabel("cell-steps per second,\n% of the matrix products alone")
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if t >= axes.get_ylim()[0]]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(top=130)
    axes.set_title(title)
    axes.grid(alpha=0.25, axis="y")
    figure.legend(
        loc="outside lower center", ncols=len(names), fontsize=9, title="median and quartiles over rounds"
    )
    return figure
