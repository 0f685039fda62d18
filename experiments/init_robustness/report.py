"""The table, the figures and the closing lines of the main experiment."""

import itertools
import math
import textwrap
from pathlib import Path

import xarray as xr

import bnjax
from bnjax import plots
from bnjax.analysis import robustness
from experiments import common

SCRIPT = "init_robustness"
LEARNS = 0.05  # of test accuracy above guessing: less says nothing of a learning rate


def report(results: xr.Dataset, path: Path, baselines: dict[str, str], threshold: float, title: str) -> None:
    """Prints the table and writes the figures beside the results.

    Args:
      results: of the sweep.
      path: where they are stored.
      baselines: {network: its frozen baseline}.
      threshold: the fraction of the best median accuracy that counts as "trains" in the figures.
      title: of the figures.
    """
    thresholds = sorted({*robustness.THRESHOLDS, threshold})
    print(bnjax.robustness(results, thresholds, baselines=baselines))

    accuracy, chance = robustness.final_accuracy(results), robustness.guessing(results)
    figure = plots.robustness(
        accuracy, threshold=threshold, chance=chance, baselines={*baselines.values()}, title=title
    )
    figures = {"accuracy.png": figure}
    if accuracy.sizes["learning_rate"] > 1:
        rates = best_rates(accuracy, chance)
        print("", *rate_lines(rates), sep="\n")
        figures["rates.png"] = rate_maps(accuracy, rates, threshold, title)
    print()
    for name, figure in figures.items():
        print(f"figure:   {common.save(figure, path.with_name(name), SCRIPT)}")
    print(f"results:  {path}   (bnjax.load_results opens it)")
    plans = {}
    for name, plan in results.attrs["plan"].items():
        plans.setdefault(_in_words(plan), []).append(name)
    for words, names in plans.items():
        print(f"plan:     {'; '.join(names)}: {words}")
    more = 4 * accuracy.sizes["seed"]
    larger = common.command(SCRIPT, seeds=more, out=path.parent, overwrite=None)
    print(f"continue: {larger}   (only new cells are trained)")


def _in_words(plan):
    devices = plan["devices"]
    narrowed = f"; {plan['narrowed']}" if "narrowed" in plan else ""
    return f"width {plan['width']} on {devices} device{'s' * (devices > 1)}{narrowed}"


def best_rates(accuracy: xr.DataArray, chance: float) -> xr.DataArray:
    """The learning rate of the best median, [model, init_scale]; NaN where no median is above guessing by `LEARNS`.

    There all rates are much the same, and the best of them would say nothing.
    """
    medians = robustness.at_best(accuracy).median("seed")
    return medians.learning_rate.where(medians > chance + LEARNS)


def rate_lines(rates: xr.DataArray) -> list[str]:
    """The `best_rates` of each network, a paragraph each: rates, and the scales at which they are the best."""
    scales = [robustness.scale_text(scale) for scale in rates.init_scale.values]
    lines = [f"Learning rate of the best median (none: at most {100 * LEARNS:.0f} points above guessing)"]
    for name in rates.model.values:
        words = ["none" if math.isnan(rate) else f"{rate:.3g}" for rate in rates.sel(model=name).values]
        parts = []
        for word, group in itertools.groupby(range(len(scales)), key=words.__getitem__):
            first, *_, last = [*group] * 2
            parts.append(f"{word} (scale {scales[first]}{f' to {scales[last]}' * (last > first)})")
        lines += textwrap.wrap(f"{name}: {', '.join(parts)}", robustness.COLUMNS, subsequent_indent="    ")
    return lines


def rate_maps(accuracy: xr.DataArray, rates: xr.DataArray, threshold: float, title: str):
    """The figure of accuracy over scale and learning rate, a map for each network, with its `best_rates`."""
    medians, seeds = accuracy.median("seed"), accuracy.sizes["seed"]
    level = threshold * float(medians.max())
    return plots.maps(
        100 * medians,
        f"final test accuracy (%),\n{f'median of {seeds} seeds' if seeds > 1 else 'one seed'}",
        level=100 * level,
        best=rates,
        labels=(f"trains: {threshold:.4g} of the best, {level:.1%}, or more", "best rate at this scale"),
        title=title,
    )
