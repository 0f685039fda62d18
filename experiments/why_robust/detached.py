"""Is it enough to normalize forward? Batch statistics detached from the gradient."""

import dataclasses

import numpy as np
import xarray as xr

import bnjax
from bnjax import plots
from bnjax.analysis import robustness
from bnjax.findings import Check, Finding, number
from experiments.claim import Claim
from experiments.settings import check_axis, setting
from experiments.why_robust import common
from experiments.why_robust.common import (
    BN,
    CHANCE,
    FULL,
    TINY,
    TRAINS,
    at,
    by_model,
    first_steps,
    hidden,
    networks,
    run,
)

DETACHED = {BN: (), "mean detached": ("mean",), "var detached": ("var",), "both detached": ("mean", "var")}


@dataclasses.dataclass(frozen=True)
class Settings(common.Settings):
    """Each network has the best of several rates."""

    detached_rates: tuple[float, ...] = setting(
        (0.01, 0.1), "Learning rates to choose from in the control of detached statistics."
    )

    def __post_init__(self):
        super().__post_init__()
        check_axis(self, "detached_rates", "learning_rate")


def measure(settings: Settings, ds: bnjax.Dataset) -> xr.Dataset:
    """Dimensions (model, learning_rate, init_scale, seed), and the first gradient's radial part at scale 1."""
    models, probe = networks(settings, ds, {n: {"detach": names} if names else {} for n, names in DETACHED.items()})
    results = run(settings, models, ds, {"learning_rate": sorted(settings.detached_rates)}, probe=probe)
    start = first_steps(models, ds, settings.batch_size, 0.1, settings.seeds, [1.0], ("radial_cosine",))
    return results.assign(first_radial_cosine=start.radial_cosine.isel(init_scale=0, drop=True))


def at_best_rates(accuracy: xr.DataArray) -> xr.DataArray:
    """At the learning rate of the best median, for each network and scale."""
    return accuracy.isel(learning_rate=accuracy.median("seed").argmax("learning_rate"))


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """Ranges of scales at the best learning rate; orthogonality; growth of the weights."""
    accuracy = robustness.final_accuracy(results, CHANCE["images"])
    summaries = robustness.summarize(accuracy, [TRAINS])
    ranges = {name: one[TRAINS].range.decades for name, one in summaries.items()}
    others = [name for name in DETACHED if name != BN]

    def best(name):
        """[seeds] where the median is best."""
        cells = accuracy.sel(model=name).stack(cell=("learning_rate", "init_scale"))
        return cells.isel(cell=int(cells.median("seed").values.argmax())).values

    at_one, bn = at(at_best_rates(accuracy), 1), float(np.median(best(BN)))
    trains = []
    for name in others:
        trains += [
            Check(f"{name}: as many decades (less 0.5)", ranges[name] - ranges[BN], unit="decades", above=-0.51),
            Check(f"{name}: best within 3 points of BN's", best(name) - bn, unit="points", above=-0.03),
        ]
    for name in DETACHED:
        trains += [
            Check(f"{name}: range of scales", ranges[name], unit="decades"),
            Check(f"{name}: best accuracy", best(name), unit="%"),
            Check(f"{name}: accuracy at scale 1", at_one.sel(model=name).values, unit="%"),
        ]
    cosine = np.abs(results.first_radial_cosine).max("layer")
    norms, rate = hidden(results.weight_norm), float(results.learning_rate.max())
    growth = (norms.isel(probe_step=-1) / norms.isel(probe_step=0)).sel(learning_rate=rate)
    growth = at(growth, 1).median("layer")
    return [
        Finding(
            "Normalizing forward is enough: without the gradient through the statistics it trains as well (at least "
            f"{TRAINS:.0%} of the best accuracy, at the best learning rate for each scale).",
            checks=trains,
        ),
        Finding(
            "The gradient through the variance takes away the part along W, so that a step can only make W longer "
            "and the output does not depend on its length.",
            checks=[
                Check(
                    "orthogonal in BN: |cosine| of W and dL/dW", cosine.sel(model=BN).values, below=1e-3, holds="all"
                ),
                *(
                    Check(f"not so with {name}", cosine.sel(model=name).values, above=1e-2)
                    for name in others
                    if "var" in DETACHED[name]
                ),
                Check("mean detached: |cosine|", cosine.sel(model="mean detached").values),
                *(
                    Check(f"{name}: |W| over its start, learning rate {number(rate)}", growth.sel(model=name).values)
                    for name in DETACHED
                ),
            ],
            note="At scale 1; the cosine is the largest of the hidden layers.",
        ),
    ]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Accuracy at the best rate, accuracy at the largest rate, growth of the weights there."""
    accuracy = 100 * robustness.final_accuracy(results, CHANCE["images"])
    rate, ylabel = float(results.learning_rate.max()), "final test accuracy (%)"
    norms = hidden(results.weight_norm).sel(learning_rate=rate)
    growth = (norms.isel(probe_step=-1) / norms.isel(probe_step=0)).median("layer")
    title, growing = f"Growth of |W|, learning rate {number(rate)}", "|W| at the end / at the start"
    shown = [
        plots.Panel("Best learning rate for each scale", ylabel, by_model(at_best_rates(accuracy))),
        plots.Panel(f"Learning rate {number(rate)}", ylabel, by_model(accuracy.sel(learning_rate=rate))),
        plots.Panel(title, growing, by_model(growth), yscale="log"),
    ]
    return plots.panels(shown, title="Batch statistics detached from the gradient")


CLAIM = Claim(
    name="detached",
    question="Is it enough to normalize forward?",
    source="",
    explanation="The batch's mean and variance depend on the weights, and the gradient goes through them, too. Here "
    "it is cut: the forward pass is the same, but the statistics are constants to the gradient (detached). BN's "
    "output does not change when W is multiplied by a factor, so the true gradient has no part along W. With the "
    "variance detached it has one: it follows a change of length that the next forward pass undoes, again and again.",
    settings=Settings,
    quick=Settings(),
    full=Settings(**FULL, detached_rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3)),
    tiny=Settings(**TINY, detached_rates=(0.1,)),
    measure=measure,
    judge=judge,
    figure=figure,
    share=20,
)
