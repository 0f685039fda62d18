"""Why is there a dip in accuracy near the threshold, and where does training end below it?"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

import bnjax
from bnjax import plots
from bnjax.findings import Check, Finding, number
from experiments.claim import Claim
from experiments.common import parse_floats
from experiments.settings import check_axis, require, setting
from experiments.table import Table
from experiments.why_robust import common
from experiments.why_robust.common import (
    CHANCE,
    FULL,
    MOMENTUM,
    TINY,
    check_scales,
    final,
    grid_step,
    hidden,
    networks,
    rank_correlation,
    run,
    slope,
    threshold,
)
from experiments.why_robust.depth import MOST_LAYERS

ADAM_RATE = 0.003


@dataclasses.dataclass(frozen=True)
class Settings(common.Settings):
    """A wide and fine grid of scales, by epsilon, learning rate and depth."""

    dip_scales: tuple[float, ...] = setting(
        tuple(parse_floats("", "1e-12:10:27")), "init_scales in the control of the dip."
    )
    dip_epsilons: tuple[float, ...] = setting((1e-7, 1e-5, 1e-3), "Values of BN's epsilon in the control of the dip.")
    dip_rates: tuple[float, ...] = setting((0.01, 0.1), "Learning rates in the control of the dip.")
    dip_depths: tuple[int, ...] = setting((6,), "Further numbers of hidden layers in the control of the dip.")

    def __post_init__(self):
        super().__post_init__()
        check_scales(self, "dip_scales")
        check_axis(self, "dip_epsilons", "learning_rate")  # the range is the same
        check_axis(self, "dip_rates", "learning_rate")
        inside = bool(self.dip_depths) and min(self.dip_depths) >= 1 and max(self.dip_depths) <= MOST_LAYERS
        require(inside, "dip_depths", f"must be from 1 to {MOST_LAYERS}, got {self.dip_depths}")

    @property
    def rate(self) -> float:
        """Of the learning rates that nearest to the one of the other controls."""
        return min(self.dip_rates, key=lambda rate: abs(math.log(rate / self.learning_rate)))


def measure(settings: Settings, ds: bnjax.Dataset) -> xr.Dataset:
    """Dimensions (epsilon, learning_rate, init_scale, seed); further depths at the settings' epsilon; Adam."""
    scales, epsilons = sorted(settings.dip_scales), sorted(settings.dip_epsilons)
    models, probe = networks(settings, ds, {number(e): {"epsilon": e} for e in epsilons})
    axes = {"learning_rate": sorted(settings.dip_rates), "init_scale": scales}
    results = run(settings, models, ds, axes, probe=probe)
    results = results.rename(model="epsilon").assign_coords(epsilon=epsilons)

    depths = [d for d in sorted(settings.dip_depths) if d != settings.layers]
    if depths:
        width = settings.hidden_width
        models = {str(d): bnjax.mlp(**(settings.network | {"features": (width,) * d})) for d in depths}
        deeper = final(run(settings, models, ds, {"init_scale": scales})).train_accuracy
        results = results.assign(depth_accuracy=deeper.rename(model="depth").assign_coords(depth=depths))

    # Adam where the dip is deepest, at the smallest epsilon.
    smallest = min(epsilons)
    near = [s for s in scales if s >= threshold(smallest) / 100]
    models, _ = networks(settings, ds, {number(smallest): {"epsilon": smallest}})
    hyper = bnjax.Hyperparams(learning_rate=ADAM_RATE, momentum=MOMENTUM)
    config = dataclasses.replace(settings.config, optimizer="adam")
    other = final(run(settings, models, ds, {"init_scale": near or scales}, config=config, hyper=hyper)).train_accuracy
    return results.assign(adam_accuracy=other.isel(model=0, drop=True).reindex(init_scale=scales))


def dip(values: xr.DataArray, epsilon: float) -> xr.Dataset:
    """The lowest value within a decade of the threshold.

    Returns:
      lowest: the value; scale: its init_scale; depth: by how much the highest values below and above that scale both
        exceed it.
    """
    limit, scales = threshold(epsilon), values.init_scale
    near = values.where((scales > limit / 10) & (scales < limit * 10))
    place, lowest = near.idxmin("init_scale"), near.min("init_scale")
    sides = [values.where(side).max("init_scale") - lowest for side in (scales < place, scales > place)]
    return xr.Dataset({"lowest": lowest, "scale": place, "depth": np.minimum(*sides)})


def end_of_training(accuracy: xr.DataArray) -> xr.DataArray:
    """The lowest init_scale from which every one up to 0.1 trains at all: to twice the accuracy of guessing.

    Infinite where none does; the grid's lowest where all do.
    """
    accuracy = accuracy.sel(init_scale=accuracy.init_scale[accuracy.init_scale <= 0.1])
    accuracy = accuracy.sortby("init_scale", ascending=False)
    works = (accuracy >= 2 * CHANCE["images"]).cumprod("init_scale").astype(bool)
    return accuracy.init_scale.where(works, math.inf).min("init_scale")


def predicted_end(depth: int, epsilon: float, learning_rate: float, steps: int, factor: float | int = 1.0) -> float:
    """Where the time to escape from zero weights is the length of the run.

    Far below the threshold each of L layers multiplies signals, and gradients, by a / sqrt(epsilon) at weights of
    size a, so that the gradient to one is g = c (a / sqrt(epsilon))^(L-1) / sqrt(epsilon), with a factor c of the task
    that the theory leaves open. a' = a + lr g grows from a_0 to anything in
    T = epsilon^(L/2) / (c lr (L-2) a_0^(L-2)) steps (Saxe et al. 2014 have it for deep linear networks), so that

        a_0 = (epsilon^(L/2) / (c lr (L-2) T))^(1/(L-2)),    lr: 1 / (1 - momentum) times the learning rate

    for L >= 3. For L = 2 growth is exponential, at the rate c lr / epsilon; for L = 1 g does not depend on a. Then 0.
    """
    if depth < 3:
        return 0.0
    rate = factor * learning_rate / (1 - MOMENTUM)
    return (epsilon ** (depth / 2) / (rate * (depth - 2) * steps)) ** (1 / (depth - 2))


class End(NamedTuple):
    """Where training ends, in one network."""

    name: str
    depth: int
    measured: float  # the lowest scale that trains
    predicted: float
    known: bool  # inside the grid, and of a network for which the theory has an end


def ends(results: xr.Dataset, settings: Settings) -> tuple[list[End], float]:
    """Measured and predicted ends of training, and the one factor c that was fitted to all of them: the median."""
    lowest, layers = float(results.init_scale.min()), settings.layers
    measured = end_of_training(final(results).train_accuracy.median("seed"))
    cells = {
        f"epsilon {number(e)}, learning rate {number(r)}": (
            float(measured.sel(epsilon=e, learning_rate=r)),
            layers,
            e,
            r,
        )
        for e in map(float, results.epsilon.values)
        for r in map(float, results.learning_rate.values)
    }
    if "depth_accuracy" in results:
        deeper = end_of_training(results.depth_accuracy.median("seed"))
        for d in map(int, deeper.depth.values):
            cells[f"{d} layers"] = (float(deeper.sel(depth=d)), d, settings.epsilon, settings.learning_rate)
    inside = {name: cell[1] > 2 and lowest < cell[0] < math.inf for name, cell in cells.items()}
    factors = [
        (predicted_end(d, e, r, settings.steps) / end) ** (d - 2)
        for name, (end, d, e, r) in cells.items()
        if inside[name]
    ]
    factor = float(np.median(factors)) if factors else math.nan
    return [
        End(name, d, end, predicted_end(d, e, r, settings.steps, factor), inside[name])
        for name, (end, d, e, r) in cells.items()
    ], factor


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """Where the dip is and what makes it; where training ends."""
    epsilons = [float(e) for e in results.epsilon.values]
    slow, fast, rate = min(settings.dip_rates), max(settings.dip_rates), settings.rate
    effective = np.log10(hidden(results.effective_learning_rate).isel(probe_step=-1).mean("layer"))
    both = xr.Dataset({"accuracy": final(results).train_accuracy, "effective": effective})
    middle = both.median("seed")

    def dips(values, rate=rate):
        return {e: dip(values.sel(learning_rate=rate, epsilon=e), e) for e in epsilons}

    by_seed, slowest = dips(both.accuracy), dips(middle.effective)
    places = [by_seed[e].scale.median("seed") for e in epsilons], [slowest[e].scale for e in epsilons]
    exponents = [slope(epsilons, [float(scale) for scale in several]) for several in places]
    # One end of the line could be read from the next scale of the grid.
    span = math.log10(epsilons[-1] / epsilons[0]) if len(epsilons) > 1 else math.inf
    near_half = {"within": (0.35, 0.65), "step": grid_step(results.init_scale) / span}
    where = []
    for e in epsilons:
        where += [
            Check(f"epsilon {number(e)}: deeper than 3 points", by_seed[e].depth.values, unit="points", above=0.03),
            Check(f"epsilon {number(e)}: threshold", threshold(e)),
            Check(f"epsilon {number(e)}: scale of the lowest accuracy", by_seed[e].scale.values),
            Check(f"epsilon {number(e)}: scale of the lowest lr/|W|^2", float(slowest[e].scale)),
            Check(f"epsilon {number(e)}: lowest lr/|W|^2", 10 ** float(slowest[e].lowest)),
        ]
    scales, cells = results.init_scale.values, middle.sel(learning_rate=rate)
    pooled = [cells.sel(epsilon=e).isel(init_scale=(scales >= threshold(e) / 2) & (scales <= 0.5)) for e in epsilons]
    correlation = rank_correlation(*(np.concatenate([one[name].values for one in pooled]) for name in both))
    adam, sgd = dip(results.adam_accuracy, epsilons[0]).depth.values, by_seed[epsilons[0]].depth.values
    depths = {(r, e): one.depth.values for r in sorted(settings.dip_rates) for e, one in dips(both.accuracy, r).items()}
    ordered = [r / e for r, e in depths], [float(np.median(values)) for values in depths.values()]
    shallower = []
    for e in epsilons:
        excess = depths[slow, e] - np.median(depths[fast, e]) * 2 / 3
        shallower.append(Check(f"at epsilon {number(e)}, beyond two thirds", excess, unit="points", below=0))
        shallower += [
            Check(f"at epsilon {number(e)}, learning rate {number(r)}", depths[r, e], unit="points")
            for r in (slow, fast)
        ]
    return [
        Finding(
            "Training accuracy dips near the threshold where signals die at initialization, with the effective "
            "learning rate lr/|W|^2: both places move with sqrt(epsilon).",
            checks=[
                Check("the accuracy's exponent is within 0.15 of 0.5", exponents[0], **near_half),
                Check("that of lr/|W|^2 is within 0.15 of 0.5", exponents[1], **near_half),
                *where,
            ],
            note="Depth: how far the lowest accuracy is below the highest on both sides.",
        ),
        Finding(
            "The dip is an overshoot: the first gradients, ~ 1/sigma, make W so long that its lr/|W|^2 is too small "
            "to learn.",
            checks=[
                Check("rank correlation above 0.8", correlation, above=0.8),
                Check("with Adam, beyond half of SGD's depth", adam - np.median(sgd) / 2, unit="points", below=0),
                Check(f"depth with Adam, epsilon {number(epsilons[0])}", adam, unit="points"),
                Check(f"depth with SGD, epsilon {number(epsilons[0])}", sgd, unit="points"),
            ],
            note="Rank correlation: of accuracy and final lr/|W|^2 from half the threshold to scale 0.5, all values "
            "of epsilon. Adam's first step is as long whatever the gradient.",
        ),
        Finding(
            f"The dip gets shallower, by a third or more, with a learning rate of {number(slow)} instead of "
            f"{number(fast)}.",
            checks=[*shallower, Check("rank correlation of depth and lr/epsilon", rank_correlation(*ordered))],
            note="At the threshold the first step is ~ lr/epsilon times as long as W, an overshoot for any usual "
            "rate unless epsilon is large. Rank correlation: over all learning rates and values of epsilon.",
        ),
        judge_end(results, settings),
    ]


def judge_end(results: xr.Dataset, settings: Settings) -> Finding:
    """The lowest scale that trains, by epsilon, learning rate and depth, against `predicted_end`."""
    cells, factor = ends(results, settings)
    known = [one for one in cells if one.known]
    ratios = [abs(math.log10(one.measured / one.predicted)) for one in known]
    below = final(results).train_accuracy.sel(learning_rate=settings.rate).median("seed")
    limits = xr.DataArray([threshold(float(e)) for e in below.epsilon.values], {"epsilon": below.epsilon}, ["epsilon"])
    below = below.where((below.init_scale < limits / 10) & (below >= 2 * CHANCE["images"]))
    shallow = [one.measured / float(results.init_scale.min()) for one in cells if one.depth < 3]
    fits = {"below": math.log10(5), "step": grid_step(results.init_scale)}
    return Finding(
        "Training ends far below the threshold, where the time to escape from zero is longer than the run.",
        checks=[
            Check("the theory fits all within a factor of 5", max(ratios, default=math.nan), unit="decades", **fits),
            *([Check("no end in the grid for fewer than 3 layers", max(shallow), below=1)] if shallow else []),
            *(Check(f"lowest scale that trains, {one.name}", one.measured) for one in cells),
            Check("the fitted factor of the theory", factor),
            Check("decades that the ends span", np.ptp(np.log10([one.measured for one in known])) if known else 0.0),
            Check("accuracy a decade and more below the threshold: lowest", float(below.min()), unit="%"),
            Check("accuracy a decade and more below the threshold: highest", float(below.max()), unit="%"),
        ],
        note=f"{settings.layers} hidden layers unless stated; epsilon {number(settings.epsilon)} with other depths. "
        "In between, accuracy goes up and down: how far the steps that escape overshoot depends on where they start.",
    )


def tables(results: xr.Dataset, settings: Settings) -> Sequence[Table]:
    """Where training ends, against the theory."""
    lowest = float(results.init_scale.min())
    rows = [
        (
            one.name,
            f"below the grid's {number(one.measured)}" if one.measured <= lowest else number(one.measured),
            number(one.predicted) if one.depth > 2 else "no end",
        )
        for one in ends(results, settings)[0]
    ]
    return [Table("The lowest init_scale that trains", ("network", "measured", "theory"), rows)]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Accuracy and effective rates over scales, by epsilon, learning rate, depth, optimizer; ends against theory."""
    last = final(results)
    rate, accuracy, ylabel = settings.rate, 100 * last.train_accuracy, "final training accuracy (%)"
    effective = hidden(results.effective_learning_rate).isel(probe_step=-1).median("layer")
    effective = effective.where(last.train_accuracy.median("seed") >= 2 * CHANCE["images"])
    epsilons = [float(e) for e in results.epsilon.values]
    limits = {f"threshold, {number(e)}": threshold(e) for e in epsilons}
    nearest = min(epsilons, key=lambda e: abs(math.log(e / settings.epsilon)))
    one, smallest = {"threshold": threshold(nearest)}, epsilons[0]

    def by_epsilon(values):
        return {f"epsilon {number(e)}": values.sel(epsilon=e, learning_rate=rate) for e in epsilons}

    rates = map(float, accuracy.learning_rate.values)
    by_rate = {f"learning rate {number(r)}": accuracy.sel(epsilon=nearest, learning_rate=r) for r in rates}
    depths = {f"{settings.layers} hidden layers": accuracy.sel(epsilon=nearest, learning_rate=rate)}
    if "depth_accuracy" in results:
        for d in map(int, results.depth.values):
            depths[f"{d} hidden layers"] = 100 * results.depth_accuracy.sel(depth=d)
    optimizers = {
        f"SGD, learning rate {number(rate)}": accuracy.sel(epsilon=smallest, learning_rate=rate),
        f"Adam, learning rate {ADAM_RATE:g}": 100 * results.adam_accuracy,
    }
    held = sorted((end.predicted, end.measured) for end in ends(results, settings)[0] if end.known)
    theory, measured = ([pair[i] for pair in held] for i in range(2))
    against = {
        name: xr.DataArray(values, {"theory": theory}, ["theory"])
        for name, values in {"measured": measured, "equal": theory}.items()
    }
    paired, logs = {"marks": limits, "paired": True}, {"yscale": "log"}
    lr, drawn = "effective learning rate lr / |W|^2", {"theory": ["equal"], "unconnected": ["measured"]}
    escape = {"xlabel": "theory: time to escape = steps", **logs, **drawn}
    near = f"epsilon {number(nearest)}"
    shown = [
        plots.Panel(f"SGD, learning rate {number(rate)}", ylabel, by_epsilon(accuracy), **paired),
        plots.Panel("At the end", lr, by_epsilon(effective), **logs, **paired),
        plots.Panel(f"Learning rates, {near}", ylabel, by_rate, marks=one),
        plots.Panel(f"Depths, {near}", ylabel, depths, marks=one),
        plots.Panel(
            f"Optimizers, epsilon {number(smallest)}", ylabel, optimizers, marks={"threshold": threshold(smallest)}
        ),
        plots.Panel("Where training ends", "lowest init_scale that trains", against, **escape),
    ]
    return plots.panels(shown, title="The dip near the threshold (dotted), and the end of training", columns=3)


CLAIM = Claim(
    name="dip",
    question="Why is there a dip, and where does training end?",
    source="",
    explanation="Below the threshold init_scale* = sqrt(epsilon pi/(pi-1)) epsilon outweighs the variance of the "
    "signals, which die out layer by layer at initialization. Training works far below it, though, with a dip in "
    "accuracy near it: in each seed the lowest accuracy within a decade of the threshold, and how far it is below "
    "both the highest of all smaller scales and the highest of all larger ones.",
    settings=Settings,
    quick=Settings(),
    full=Settings(
        **FULL,
        dip_scales=tuple(parse_floats("", "1e-16:1e4:81")),
        dip_epsilons=(1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
        dip_rates=(0.003, 0.01, 0.03, 0.1, 0.3),
        dip_depths=(1, 2, 4, 6, 10),
    ),
    tiny=Settings(
        **TINY, dip_scales=(1e-6, 1e-3, 1.0, 10.0), dip_epsilons=(1e-5, 1e-3), dip_rates=(0.1,), dip_depths=(3,)
    ),
    measure=measure,
    judge=judge,
    figure=figure,
    tables=tables,
    share=25,
)
