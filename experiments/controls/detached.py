"""Is it enough to normalize forward? Batch statistics detached from the gradient."""

import math

import numpy as np
import xarray as xr

from bnjax import plots
from bnjax.analysis import robustness
from experiments.controls.common import (
    BN,
    CHANCE,
    TRAINS,
    Control,
    Finding,
    Setup,
    at,
    by_model,
    first_step,
    hidden,
    networks,
    number,
    percent,
    rates_and_scales,
    run,
    spread,
)

DETACHED = {BN: (), "mean detached": ("mean",), "var detached": ("var",), "both detached": ("mean", "var")}


def measure(setup: Setup) -> xr.Dataset:
    """Dimensions (model, learning_rate, init_scale, seed), and the first gradient's radial part at scale 1."""
    models, probe = networks(
        setup, {name: {"detach": names} if names else {} for name, names in DETACHED.items()}
    )
    axes = rates_and_scales(setup, "detached_rates")
    results = run(setup, models, setup.images, setup.config, axes, probe=probe)
    start = first_step(models, setup.images, setup.config.batch_size, 0.1, setup.seeds, [1.0], ranks=False)
    return results.assign(first_radial_cosine=hidden(start.radial_cosine).isel(init_scale=0, drop=True))


def at_best_rates(accuracy: xr.DataArray) -> xr.DataArray:
    """At the learning rate of the best median, for each network and scale."""
    return accuracy.isel(learning_rate=accuracy.median("seed").argmax("learning_rate"))


def judge(results: xr.Dataset) -> list[Finding]:
    """Ranges of scales at the best learning rate; orthogonality; growth of the weights."""
    accuracy = robustness.final_accuracy(results, CHANCE["images"])
    summaries = robustness.summarize(accuracy, [TRAINS])
    ranges = {name: one[TRAINS].range.decades for name, one in summaries.items()}
    best = {name: accuracy.sel(model=name).median("seed").max() for name in DETACHED}
    best = {name: float(value) for name, value in best.items()}
    at_one = at(at_best_rates(accuracy), 1)

    def text(name):
        return (
            f"{name}: {ranges[name]:.3g} decades, best {percent(best[name])}, at scale 1 "
            f"{spread(at_one.sel(model=name), percent)}"
        )

    cosine = np.abs(results.first_radial_cosine)
    largest = {name: float(cosine.sel(model=name).max()) for name in DETACHED}
    norms = hidden(results.weight_norm)
    grown = np.log10(norms.isel(probe_step=-1) / norms.isel(probe_step=0))
    rate = float(results.learning_rate.max())
    grown = at(grown.sel(learning_rate=rate), 1).median("layer")
    growth = "; ".join(
        f"{name} {spread(grown.sel(model=name), lambda v: f'{10**v:.3g}')}" for name in DETACHED
    )
    others = [name for name in DETACHED if name != BN]
    variance = [name for name in others if "var" in DETACHED[name]]
    return [
        Finding(
            f"Normalizing forward is enough: without the gradient through the statistics it trains as well "
            f"(at least {TRAINS:.0%} of the best accuracy, at the best learning rate for each scale).",
            "; ".join(text(name) for name in DETACHED),
            {
                f"{name}: as many decades (less 0.5), best within 3 points": not (
                    math.isnan(ranges[name])
                    or ranges[name] < ranges[BN] - 0.51
                    or best[name] < best[BN] - 0.03
                )
                for name in others
            },
        ),
        Finding(
            "What the gradient through the variance is good for: it takes away the part along W, so that "
            "a step can only make W longer and the output does not depend on its length.",
            f"largest |cosine| of W and dL/dW at scale 1: "
            f"{'; '.join(f'{name} {number(value)}' for name, value in largest.items())}; growth of |W| in "
            f"the run at "
            f"scale 1, learning rate {number(rate)}: {growth}",
            {
                "orthogonal in BN (below 1e-3)": largest[BN] < 1e-3,
                **{f"not so with {name} (above 1e-2)": largest[name] > 1e-2 for name in variance},
            },
        ),
    ]


def draw(results: xr.Dataset):
    """Accuracy at the best rate, accuracy at the largest rate, growth of the weights there."""
    accuracy = 100 * robustness.final_accuracy(results, CHANCE["images"])
    best = at_best_rates(accuracy)
    rate = float(results.learning_rate.max())
    norms = hidden(results.weight_norm).sel(learning_rate=rate)
    growth = (norms.isel(probe_step=-1) / norms.isel(probe_step=0)).median("layer")
    shown = [
        plots.Panel("Best learning rate for each scale", "final test accuracy (%)", by_model(best)),
        plots.Panel(
            f"Learning rate {number(rate)}",
            "final test accuracy (%)",
            by_model(accuracy.sel(learning_rate=rate)),
        ),
        plots.Panel(
            f"Growth of |W|, learning rate {number(rate)}",
            "|W| at the end / at the start",
            by_model(growth),
            yscale="log",
        ),
    ]
    return plots.panels(shown, title="Batch statistics detached from the gradient")


CONTROL = Control(
    "Is it enough to normalize forward?",
    "The batch's mean and variance depend on the weights, and the gradient goes through them, too. Here "
    "it is "
    "cut: the forward pass is the same, but the statistics are constants to the gradient (detached). "
    "BN's output does not "
    "change when W is multiplied by a factor, so the true gradient has no part along W. With the "
    "variance detached it "
    "has one: it follows a change of length that the next forward pass undoes, again and again.",
    measure,
    judge,
    draw,
)
