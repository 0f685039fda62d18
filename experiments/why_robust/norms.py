"""The change of weights' lengths, its effect on their learning rate, and the effect of weight decay."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import plots, probes
from bnjax.findings import Check, Finding, number
from experiments.claim import Claim
from experiments.settings import positive, require, setting
from experiments.why_robust import common
from experiments.why_robust.common import BN, FULL, TINY, first_steps, gradients, hidden, networks, run, threshold


@dataclasses.dataclass(frozen=True)
class Settings(common.Settings):
    """SGD without momentum, with weight decay and without."""

    norms_rate: float = setting(0.5, "Learning rate of the control of norms, which has no momentum.")
    weight_decay: float = setting(0.2, "Of the control of norms.")

    def __post_init__(self):
        super().__post_init__()
        positive(self, "norms_rate", "weight_decay")
        rate, decay = self.norms_rate, self.weight_decay
        words = f"times --weight_decay must be below 1: such a step would turn weights around; got {rate} and {decay}"
        require(rate * decay < 1, "norms_rate", words)


def measure(settings: Settings, ds: bnjax.Dataset) -> xr.Dataset:
    """The first step in float64, and SGD without momentum: dimensions (weight_decay, init_scale, seed)."""
    models, _ = networks(settings, ds, {BN: {}})
    model = models[BN]
    weights = probes.weights(model, ds.train_x.shape[1:])
    size = settings.batch_size
    batches = min(4, len(ds.train_x) // size)

    def measure(snapshot):
        def squares(batch):
            slopes = probes.kernels(gradients(model, snapshot.params, snapshot.batch_stats, *batch))
            return jnp.stack([(slopes[name] ** 2).sum() for name in weights.layers])

        first = [a[: batches * size].reshape(batches, size, *a.shape[1:]) for a in snapshot.ds[:2]]
        norms = jnp.sqrt(jax.lax.map(squares, tuple(first)).mean(0))
        return {**weights.measure(snapshot), "gradient_norm": norms}

    # Gradients vary from step to step: the mean at equilibrium needs many evaluations.
    config = dataclasses.replace(settings.config, eval_every=max(1, settings.steps // 60))
    hyper = bnjax.Hyperparams(learning_rate=settings.norms_rate, momentum=0.0)
    axes = {"weight_decay": [0.0, settings.weight_decay]}
    probe = bnjax.Probe(measure, weights.layers)
    results = run(settings, model, ds, axes, config=config, hyper=hyper, probe=probe)
    scales = settings.init_scales
    fine = [float(s) for s in np.geomspace(min(scales), max(scales), 4 * len(scales) - 3)]
    first = first_steps(models, ds, size, settings.learning_rate, settings.seeds, fine)
    names = {"init_scale": "first_scale", "layer": "hidden_layer", "gradient_norm": "first_gradient_norm"}
    return results.merge(first.isel(model=0, drop=True).rename(names), combine_attrs="override")


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """The law of the first step, its peak, the effective learning rate, the equilibrium."""
    limit = threshold(settings.epsilon)
    predicted = np.sqrt(results.norm_before**2 + (settings.learning_rate * results.first_gradient_norm) ** 2)
    error = np.abs(results.norm_after / predicted - 1).max("hidden_layer")
    above = error.isel(first_scale=error.first_scale.values >= 10 * limit)
    growth = (results.norm_after / results.norm_before).max("hidden_layer")
    peak = growth.idxmax("first_scale")
    ranks = results[["rank_before", "rank_after"]].mean("hidden_layer").sel(first_scale=limit, method="nearest")
    largest, everywhere = growth.max("first_scale").values, {"below": 0.01, "holds": "all"}
    return [
        Finding(
            "The first step makes W longer by the law |W1|^2 = |W0|^2 + lr^2 |g|^2: g is orthogonal to W.",
            checks=[
                *(
                    [Check("relative error of |W1|, 1% above ten thresholds", above.max("first_scale"), **everywhere)]
                    if above.size
                    else []
                ),
                Check("relative error of |W1|, 1% at every scale", error.max("first_scale").values, **everywhere),
            ],
            note="The largest of the scales; epsilon lets a part along W through.",
        ),
        Finding(
            "The first step overshoots at small scales, most near the threshold where signals die, and leaves little "
            "of W but its first gradient, which has a low rank.",
            checks=[
                Check(
                    "the peak is within a factor of 3 of the threshold",
                    (peak / limit).values,
                    within=(1 / 3, 3),
                    holds="all",
                ),
                Check("there |W| grows more than tenfold", largest, above=10, holds="all"),
                Check(
                    "there the stable rank falls below a third",
                    (ranks.rank_after / ranks.rank_before).values,
                    below=1 / 3,
                    holds="all",
                ),
                Check("init scale of the peak", peak.values),
                Check("threshold", limit),
                Check("growth of |W| at scale 1", growth.sel(first_scale=1, method="nearest").values),
                Check("stable rank before the step", ranks.rank_before.values),
                Check("stable rank after the step", ranks.rank_after.values),
            ],
            note="Stable rank: |W|^2 / |W|_2^2, mean of the hidden layers.",
        ),
        judge_rates_of_weights(results),
        judge_equilibrium(results, settings),
    ]


def judge_rates_of_weights(results: xr.Dataset) -> Finding:
    """The extent to which the effective learning rate forgets the init scale, without weight decay."""
    effective = np.log10(hidden(results.effective_learning_rate).sel(weight_decay=0)).median("layer")
    scales = results.init_scale.values

    def decades(probe_step, chosen):
        values = effective.isel(init_scale=chosen, probe_step=probe_step)
        return (values.max("init_scale") - values.min("init_scale")).values

    sides = {"up to 1": scales <= 1, "from 1 up": scales >= 1}
    spans = {side: [decades(step, chosen) for step in (0, -1)] for side, chosen in sides.items()}
    left = {side: end / np.median(start) for side, (start, end) in spans.items()}
    return Finding(
        "Without weight decay too-small weights grow until their effective learning rate lr/|W|^2 fits (learning "
        "rates tune themselves); too-large ones cannot shrink and stay frozen.",
        checks=[
            Check("below 1 at most half of the decades is left", left["up to 1"], below=0.5),
            Check("above 1 at least three quarters are left", left["from 1 up"], above=0.75),
            *(
                Check(f"span of lr/|W|^2 over scales {side}, at the {when}", values, unit="decades")
                for side, both in spans.items()
                for when, values in zip(("start", "end"), both, strict=True)
            ),
        ],
    )


def equilibrium(
    learning_rate: float, weight_decay: float, invariant_gradient: float | xr.DataArray
) -> tuple[float | xr.DataArray, float]:
    """|W| at which a step's growth and decay cancel, and the angle of a step, in radians.

    With g orthogonal to W, |W'|^2 = (1 - lr wd)^2 |W|^2 + lr^2 |g|^2 and |g| = |g~| / |W|, so that |W'| = |W| at
    |W|^4 = lr |g~|^2 / (2 wd - lr wd^2) (van Laarhoven 2017, with the term of second order), where a step turns W
    by lr |g| / |W| = sqrt(2 lr wd - lr^2 wd^2), whatever the task.
    """
    product = learning_rate * weight_decay
    norm = (learning_rate**2 * invariant_gradient**2 / (product * (2 - product))) ** 0.25
    return norm, math.sqrt(product * (2 - product))


def judge_equilibrium(results: xr.Dataset, settings: Settings) -> Finding:
    """The last third of the run with weight decay, against the formula."""
    rate, decay = settings.norms_rate, float(results.weight_decay.max())
    late = results.sel(weight_decay=decay).isel(probe_step=slice(-max(1, results.sizes["probe_step"] // 3), None))
    norm, slopes = hidden(late.weight_norm), hidden(late.gradient_norm)
    invariant = np.sqrt(((norm * slopes) ** 2).mean("probe_step"))
    expected, turn = equilibrium(rate, decay, invariant)
    ratio = (norm**4).mean("probe_step") ** 0.25 / expected
    turned = np.sqrt(((rate * slopes / norm) ** 2).mean("probe_step"))
    forgotten = np.log10(norm.isel(probe_step=-1).median("layer"))
    left = (forgotten.max("init_scale") - forgotten.min("init_scale")).values
    started = float(np.log10(results.init_scale.max() / results.init_scale.min()))
    medians = ratio.median(("layer", "seed"))
    farthest = float(medians[int(np.abs(medians - 1).values.argmax())])
    return Finding(
        "With weight decay |W| forgets its initialization, from both sides, and settles where |W|^4 = lr |g~|^2 / (2 "
        "wd).",
        checks=[
            Check("a tenth of the decades is left", left / started, below=0.1, holds="all"),
            Check(
                "|W| within 10% of the formula in the median",
                ratio.median(("layer", "init_scale")).values,
                within=(0.9, 1.1),
            ),
            Check("within 30% at every scale; the farthest", farthest, within=(0.7, 1.3)),
            Check("decades that |W| spans at the start", started),
            Check("decades that |W| spans at the end", left),
            Check("a step turns W by", turned.median(("layer", "init_scale")).values, unit="rad"),
            Check("predicted", turn, unit="rad"),
        ],
        note=f"Learning rate {number(rate)}, weight decay {number(decay)}.",
    )


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Growth in the first step; effective rates before and after; approach to equilibrium."""
    first = results.rename(first_scale="x").median("seed")
    first = first.isel(hidden_layer=first.sizes["hidden_layer"] // 2)
    law = np.sqrt(first.norm_before**2 + (settings.learning_rate * first.first_gradient_norm) ** 2)
    ratio = {"measured": first.norm_after / first.norm_before, "law": law / first.norm_before}
    ratio = {name: value.rename(x="init_scale") for name, value in ratio.items()}
    marks = {"threshold": threshold(settings.epsilon)}
    effective = hidden(results.effective_learning_rate).sel(weight_decay=0).median("layer")
    shown_steps = results.probe_step.values[[0, min(5, len(results.probe_step) - 1), -1]]
    rates = {f"step {int(step)}": effective.sel(probe_step=step, drop=True) for step in shown_steps}
    decayed = hidden(results.weight_norm).isel(weight_decay=-1).median("layer")
    scales = results.init_scale.values[:: -(-len(results.init_scale) // 6)]
    lengths = {f"init scale {number(s)}": decayed.sel(init_scale=s, drop=True) for s in scales}
    both = {"yscale": "log", "marks": marks}
    drawn = {"theory": ["law"], "unconnected": ["measured"]}
    shown = [
        plots.Panel("First step, a middle layer", "|W1| / |W0|", ratio, **both, **drawn),
        plots.Panel("No weight decay", "effective learning rate lr / |W|^2", rates, **both),
        plots.Panel(
            f"Weight decay {number(settings.weight_decay)}",
            "|W|",
            lengths,
            xlabel="step",
            xscale="linear",
            yscale="log",
        ),
    ]
    return plots.panels(shown, title="Norms of the weights and their learning rates")


CLAIM = Claim(
    name="norms",
    question="How do weights' lengths change, and what does it do?",
    source="",
    explanation="Behind BN only the direction of W counts, so a step's effect depends on lr/|W|^2, the effective "
    "learning rate. As the gradient is orthogonal to W, each step of SGD makes W longer; only weight decay makes it "
    "shorter.",
    settings=Settings,
    quick=Settings(),
    full=Settings(**FULL),
    tiny=Settings(**TINY),
    measure=measure,
    judge=judge,
    figure=figure,
    share=11,
)
