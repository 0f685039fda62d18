"""Why is there a dip in accuracy near the threshold, and where does training end below it?"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import xarray as xr

import bnjax
from bnjax import plots
from experiments.controls.common import (
    CHANCE,
    MOMENTUM,
    Control,
    Finding,
    Setup,
    at,
    final,
    hidden,
    networks,
    number,
    percent,
    points,
    rank_correlation,
    rates_and_scales,
    run,
    slope,
    spread,
    threshold,
)

ADAM_RATE = 0.003


def measure(setup: Setup) -> xr.Dataset:
    """Dimensions (epsilon, learning_rate, init_scale, seed); further depths at the flags' epsilon; Adam."""
    scales, epsilons = setup.values["dip_scales"], setup.values["dip_epsilons"]
    models, probe = networks(setup, {number(e): {"epsilon": e} for e in epsilons})
    axes = rates_and_scales(setup, "dip_rates", scales)
    results = run(setup, models, setup.images, setup.config, axes, probe=probe)
    results = results.rename(model="epsilon").assign_coords(epsilon=epsilons)

    width, *_ = base = setup.network["features"]
    depths = [d for d in setup.values["dip_depths"] if d != len(base)]
    axes = rates_and_scales(setup, None, scales)
    if depths:
        models = {str(d): bnjax.mlp(**(setup.network | {"features": (width,) * d})) for d in depths}
        deeper = final(run(setup, models, setup.images, setup.config, axes)).train_accuracy
        results = results.assign(depth_accuracy=deeper.rename(model="depth").assign_coords(depth=depths))

    # Adam where the dip is deepest, at the smallest epsilon.
    smallest = min(epsilons)
    near = [s for s in scales if s >= threshold(smallest) / 100]
    axes = axes | {"init_scale": near or scales}
    hyper = setup.hyper._replace(learning_rate=ADAM_RATE)
    adam = dataclasses.replace(setup.config, optimizer="adam")
    other = final(
        run(setup, models_of(setup, smallest), setup.images, adam, axes, hyper=hyper)
    ).train_accuracy
    other = other.isel(model=0, drop=True).reindex(init_scale=scales)
    attrs = {"layers": len(base), "epsilon": setup.network["epsilon"], "rate": setup.hyper.learning_rate}
    return results.assign(adam_accuracy=other).assign_attrs(attrs)


def models_of(setup: Setup, epsilon: float) -> dict[str, bnjax.Model]:
    """The network with this epsilon."""
    return networks(setup, {number(epsilon): {"epsilon": epsilon}})[0]


def dip(values: xr.DataArray, epsilon: float) -> xr.Dataset:
    """The lowest value within a decade of the threshold.

    Returns:
      scale: its init_scale; depth: by how much the highest values below and above that scale both exceed it.
    """
    limit = float(threshold(epsilon))
    scales = values.init_scale
    near = values.where((scales > limit / 10) & (scales < limit * 10))
    place, lowest = near.idxmin("init_scale"), near.min("init_scale")
    sides = [values.where(side).max("init_scale") - lowest for side in (scales < place, scales > place)]
    return xr.Dataset({"scale": place, "depth": np.minimum(*sides)})


def end_of_training(accuracy: xr.DataArray) -> xr.DataArray:
    """The lowest init_scale from which every one up to 0.1 trains at all: to twice the accuracy of guessing.

    Infinite where none does; the grid's lowest where all do.
    """
    accuracy = accuracy.sel(init_scale=accuracy.init_scale[accuracy.init_scale <= 0.1])
    accuracy = accuracy.sortby("init_scale", ascending=False)
    works = (accuracy >= 2 * CHANCE["images"]).cumprod("init_scale").astype(bool)
    return accuracy.init_scale.where(works, math.inf).min("init_scale")


def predicted_end(depth: int, epsilon: float, learning_rate: float, steps: int, factor: float = 1.0) -> float:
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


def ends(results: xr.Dataset) -> tuple[list[tuple[str, int, float, float]], float]:
    """Measured and predicted ends of training.

    Returns:
      [(what, depth, measured, predicted)], and the factor c that was fitted, one for all of them: the median.
    """
    steps = results.attrs["config"]["steps"]
    layers, epsilon, rate = (results.attrs[name] for name in ("layers", "epsilon", "rate"))
    lowest = float(results.init_scale.min())
    measured = end_of_training(final(results).train_accuracy.median("seed"))
    cells = [
        (
            f"epsilon {number(e)}, lr {number(r)}",
            layers,
            float(measured.sel(epsilon=e, learning_rate=r)),
            (layers, e, r, steps),
        )
        for e in map(float, results.epsilon.values)
        for r in map(float, results.learning_rate.values)
    ]
    if "depth_accuracy" in results:
        deeper = end_of_training(results.depth_accuracy.median("seed"))
        cells += [
            (f"{d} layers", d, float(deeper.sel(depth=d)), (d, epsilon, rate, steps))
            for d in map(int, deeper.depth.values)
        ]
    factors = [
        (predicted_end(*arguments) / end) ** (depth - 2)
        for _, depth, end, arguments in cells
        if depth > 2 and lowest < end < math.inf
    ]
    factor = float(np.median(factors)) if factors else math.nan
    return [
        (text, depth, end, predicted_end(*arguments, factor)) for text, depth, end, arguments in cells
    ], factor


def near_rate(results: xr.Dataset) -> float:
    """Of the learning rates of the dip that nearest to the one of the other controls."""
    return min(
        map(float, results.learning_rate.values), key=lambda r: abs(math.log(r / results.attrs["rate"]))
    )


def judge(results: xr.Dataset) -> list[Finding]:
    """Where the dip is and what makes it; where training ends."""
    last = final(results)
    epsilons = [float(e) for e in results.epsilon.values]
    rates = [float(r) for r in results.learning_rate.values]
    rate = near_rate(results)
    effective = np.log10(hidden(results.effective_learning_rate).isel(probe_step=-1).mean("layer"))
    both = xr.Dataset({"accuracy": last.train_accuracy, "effective": effective})
    middle = both.median("seed")

    def dips(name, of=both, rate=rate):
        return {e: dip(of[name].sel(learning_rate=rate, epsilon=e), e) for e in epsilons}

    by_seed, slowest = dips("accuracy"), dips("effective", middle)
    places = [by_seed[e].scale.median("seed") for e in epsilons], [slowest[e].scale for e in epsilons]
    exponents = [slope(epsilons, [float(scale) for scale in several]) for several in places]
    each = "; ".join(
        f"epsilon {number(e)} (threshold {number(float(threshold(e)))}): lowest accuracy at "
        f"{spread(by_seed[e].scale, number)}, {spread(by_seed[e].depth, points)} points below both sides; "
        f"lowest lr/|W|^2 at "
        f"{number(float(slowest[e].scale))}, {number(10 ** float(effective_at(middle, e, rate, slowest)))}"
        for e in epsilons
    )

    scales = results.init_scale.values
    pooled = [
        middle.sel(epsilon=e, learning_rate=rate).isel(
            init_scale=(scales >= threshold(e) / 2) & (scales <= 0.5)
        )
        for e in epsilons
    ]
    correlation = rank_correlation(*(np.concatenate([one[name].values for one in pooled]) for name in both))
    smallest = min(epsilons)
    adam, sgd = dip(results.adam_accuracy, smallest).depth, by_seed[smallest].depth
    slow, fast = min(rates), max(rates)
    depths = {(r, e): one.depth for r in rates for e, one in dips("accuracy", rate=r).items()}
    depth = {cell: float(values.median()) for cell, values in depths.items()}
    ordered = [r / e for r, e in depth], list(depth.values())
    return [
        Finding(
            "Training accuracy dips near the threshold where signals die at initialization, with the "
            "effective learning "
            "rate lr/|W|^2: both places move with sqrt(epsilon).",
            f"{each}; place of the lowest accuracy ~ epsilon^{exponents[0]:.2f}, of the lowest lr/|W|^2 ~ "
            f"epsilon^{exponents[1]:.2f}",
            {
                "the accuracy's exponent is within 0.15 of 0.5": abs(exponents[0] - 0.5) < 0.15,
                "that of lr/|W|^2 is within 0.15 of 0.5": abs(exponents[1] - 0.5) < 0.15,
                **{
                    f"deeper than 3 points at epsilon {number(e)}": float(one.depth.median()) > 0.03
                    for e, one in by_seed.items()
                },
            },
        ),
        Finding(
            "The dip is an overshoot: the first gradients, ~ 1/sigma, make W so long that its lr/|W|^2 is "
            "too small to learn.",
            f"rank correlation of accuracy and final lr/|W|^2 from half the threshold to scale 0.5, all "
            f"values of epsilon: "
            f"{correlation:.2f}; with Adam, whose first step is as long whatever the gradient, epsilon "
            f"{number(smallest)}: "
            f"{spread(adam, points)} points deep, with SGD {spread(sgd, points)}",
            {
                "rank correlation above 0.8": correlation > 0.8,
                "less than half as deep with Adam": float(adam.median()) < float(sgd.median()) / 2,
            },
        ),
        Finding(
            f"The dip gets shallower, by a third or more, with a learning rate of {number(slow)} instead of "
            f"{number(fast)}.",
            "; ".join(
                f"epsilon {number(e)}: {spread(depths[slow, e], points)} points below both sides at learning rate "
                f"{number(slow)}, {spread(depths[fast, e], points)} at {number(fast)}"
                for e in epsilons
            )
            + ". At the threshold the first step is ~ lr/epsilon times "
            "as long as W, an overshoot for any usual rate unless epsilon is large; rank correlation of depth and "
            f"lr/epsilon over all learning rates and values of epsilon: {rank_correlation(*ordered):.2f}",
            {f"at epsilon {number(e)}": depth[slow, e] < depth[fast, e] * 2 / 3 for e in epsilons},
        ),
        judge_end(results),
    ]


def effective_at(
    middle: xr.Dataset, epsilon: float, rate: float, places: Mapping[float, xr.Dataset]
) -> xr.DataArray:
    """log10 of the lowest effective learning rate of the dip."""
    return at(middle.effective.sel(epsilon=epsilon, learning_rate=rate), float(places[epsilon].scale))


def judge_end(results: xr.Dataset) -> Finding:
    """The lowest scale that trains, by epsilon, learning rate and depth, against `predicted_end`."""
    cells, factor = ends(results)
    lowest = float(results.init_scale.min())
    held = [(end, predicted) for _, depth, end, predicted in cells if depth > 2 and lowest < end < math.inf]
    ratios = [abs(math.log10(end / predicted)) for end, predicted in held]
    span = math.log10(max(held)[0] / min(held)[0]) if held else 0.0

    def text(name, depth, end, predicted):
        measured = f"below the grid's {number(end)}" if end <= lowest else number(end)
        return f"{name}: {measured} ({f'theory {number(predicted)}' if depth > 2 else 'theory: no end'})"

    below = final(results).train_accuracy.sel(learning_rate=near_rate(results)).median("seed")
    below = below.where((below.init_scale < threshold(below.epsilon) / 10) & (below >= 2 * CHANCE["images"]))
    shallow = [end for _, d, end, _ in cells if d < 3]
    return Finding(
        "Training ends far below the threshold, where the time to escape from zero is longer than the run.",
        f"lowest init scale that trains, {results.attrs['layers']} hidden layers unless stated: "
        f"{'; '.join(text(*cell) for cell in cells)} (epsilon {number(results.attrs['epsilon'])} with other "
        f"depths); one factor "
        f"of the theory was fitted, {number(factor)}; over {span:.1f} decades the largest deviation is a "
        f"factor "
        f"{number(10 ** max(ratios, default=math.nan))}. In between, a decade and more below the threshold, "
        f"accuracy goes up and "
        f"down from {percent(float(below.min()))} to {percent(float(below.max()))}: how far the steps that "
        f"escape overshoot depends "
        "on where they start",
        {
            "the theory fits all within a factor of 5": bool(held) and max(ratios) < math.log10(5),
            **({"no end in the grid for fewer than 3 layers": max(shallow) <= lowest} if shallow else {}),
        },
    )


def draw(results: xr.Dataset):
    """Accuracy and effective rates over scales, by epsilon, learning rate, depth, optimizer; ends against theory."""
    last = final(results)
    rate, accuracy = near_rate(results), 100 * last.train_accuracy
    ylabel = "final training accuracy (%)"
    effective = hidden(results.effective_learning_rate).isel(probe_step=-1).median("layer")
    effective = effective.where(last.train_accuracy.median("seed") >= 2 * CHANCE["images"])
    epsilons = [float(e) for e in results.epsilon.values]
    limits = {f"threshold, {number(e)}": float(threshold(e)) for e in epsilons}
    nearest = min(epsilons, key=lambda e: abs(math.log(e / results.attrs["epsilon"])))
    one, smallest = {"threshold": float(threshold(nearest))}, min(epsilons)

    def by_epsilon(values):
        return {f"epsilon {number(e)}": values.sel(epsilon=e, learning_rate=rate) for e in epsilons}

    by_rate = {
        f"learning rate {number(float(r))}": accuracy.sel(epsilon=nearest, learning_rate=r)
        for r in accuracy.learning_rate.values
    }
    depths = {f"{results.attrs['layers']} hidden layers": accuracy.sel(epsilon=nearest, learning_rate=rate)}
    if "depth_accuracy" in results:
        depths |= {
            f"{int(d)} hidden layers": 100 * results.depth_accuracy.sel(depth=d) for d in results.depth.values
        }
    optimizers = {
        f"SGD, learning rate {number(rate)}": accuracy.sel(epsilon=smallest, learning_rate=rate),
        f"Adam, learning rate {ADAM_RATE:g}": 100 * results.adam_accuracy,
    }
    lowest = float(results.init_scale.min())
    held = sorted(
        (predicted, end)
        for _, depth, end, predicted in ends(results)[0]
        if depth > 2 and lowest < end < math.inf
    )
    theory = [predicted for predicted, _ in held]
    against = {
        "measured": xr.DataArray([end for _, end in held], {"theory": theory}, ["theory"]),
        "equal": xr.DataArray(theory, {"theory": theory}, ["theory"]),
    }
    shown = [
        plots.Panel(
            f"SGD, learning rate {number(rate)}", ylabel, by_epsilon(accuracy), marks=limits, paired=True
        ),
        plots.Panel(
            "At the end",
            "effective learning rate lr / |W|^2",
            by_epsilon(effective),
            yscale="log",
            marks=limits,
            paired=True,
        ),
        plots.Panel(f"Learning rates, epsilon {number(nearest)}", ylabel, by_rate, marks=one),
        plots.Panel(f"Depths, epsilon {number(nearest)}", ylabel, depths, marks=one),
        plots.Panel(
            f"Optimizers, epsilon {number(smallest)}",
            ylabel,
            optimizers,
            marks={"threshold": float(threshold(smallest))},
        ),
        plots.Panel(
            "Where training ends",
            "lowest init_scale that trains",
            against,
            xlabel="theory: time to escape = steps",
            yscale="log",
            theory=["equal"],
            unconnected=["measured"],
        ),
    ]
    return plots.panels(
        shown, title="The dip near the threshold (dotted), and the end of training", columns=3
    )


CONTROL = Control(
    "Why is there a dip, and where does training end?",
    "Below the threshold init_scale* = sqrt(epsilon pi/(pi-1)) epsilon outweighs the variance of the "
    "signals, which die out "
    "layer by layer at initialization. Training works far below it, though, with a dip in accuracy near "
    "it: in each seed the lowest accuracy within a decade of the threshold, and how far it is below both "
    "the highest of all smaller scales and the highest of all larger ones.",
    measure,
    judge,
    draw,
)
