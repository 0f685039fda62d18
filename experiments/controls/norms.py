"""How do weights' lengths change, what does that do to their learning rate, and what does weight decay do?"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import plots, probes
from experiments.controls.common import (
    BN,
    Control,
    Finding,
    Setup,
    first_step,
    gradients,
    hidden,
    networks,
    number,
    rates_and_scales,
    run,
    spread,
    threshold,
)


def measure(setup: Setup) -> xr.Dataset:
    """The first step in float64, and SGD without momentum: dimensions (weight_decay, init_scale, seed)."""
    models, _ = networks(setup, {BN: {}})
    model, inputs = models[BN], setup.images.train_x.shape[1:]
    weights = probes.weights(model, inputs)

    size = setup.config.batch_size
    batches = min(4, len(setup.images.train_x) // size)

    def measure(snapshot):
        def squares(batch):
            slopes = probes.kernels(gradients(model, snapshot.params, snapshot.batch_stats, *batch))
            return jnp.stack([(slopes[name] ** 2).sum() for name in weights.layers])

        first = [a[: batches * size].reshape(batches, size, *a.shape[1:]) for a in snapshot.ds[:2]]
        norms = jnp.sqrt(jax.lax.map(squares, tuple(first)).mean(0))
        return {**weights.measure(snapshot), "gradient_norm": norms}

    # Gradients vary from step to step: the mean at equilibrium needs many evaluations.
    config = dataclasses.replace(setup.config, eval_every=max(1, setup.config.steps // 60))
    axes = {"weight_decay": [0.0, setup.weight_decay]} | rates_and_scales(setup)
    hyper = bnjax.Hyperparams(learning_rate=setup.norms_rate, momentum=0.0)
    probe = bnjax.Probe(measure, weights.layers)
    results = run(setup, model, setup.images, config, axes, hyper=hyper, probe=probe)
    fine = np.geomspace(min(setup.init_scales), max(setup.init_scales), 4 * len(setup.init_scales) - 3)
    rate = setup.hyper.learning_rate
    first = first_step(
        models, setup.images, setup.config.batch_size, rate, setup.seeds, [float(s) for s in fine]
    )
    first = first.isel(model=0, drop=True).rename(init_scale="first_scale", layer="hidden_layer")
    return results.merge(first, combine_attrs="override").assign_attrs(
        results.attrs | {"first_rate": rate, "epsilon": setup.network["epsilon"]}
    )


def judge(results: xr.Dataset) -> list[Finding]:
    """The law of the first step, its peak, the effective learning rate, the equilibrium."""
    rate = results.attrs["first_rate"]
    limit = float(threshold(results.attrs["epsilon"]))
    predicted = np.sqrt(results.norm_before**2 + (rate * results.first_gradient_norm) ** 2)
    error = np.abs(results.norm_after / predicted - 1).max("hidden_layer")
    above = error.first_scale.values >= 10 * limit
    growth = (results.norm_after / results.norm_before).max("hidden_layer")
    peak = growth.idxmax("first_scale")
    rank = (
        results[["rank_before", "rank_after"]].mean("hidden_layer").sel(first_scale=limit, method="nearest")
    )
    return [
        Finding(
            "The first step makes W longer by the law |W1|^2 = |W0|^2 + lr^2 |g|^2: g is orthogonal to W.",
            f"largest relative error of |W1| at scales above ten thresholds: "
            f"{spread(error.isel(first_scale=above).max('first_scale'), number)}; at any scale: "
            f"{spread(error.max('first_scale'), number)} (epsilon lets a part along W through)",
            {
                "within 1% above ten thresholds": bool(error.isel(first_scale=above).max() < 0.01),
                "within 1% at every scale": bool(error.max() < 0.01),
            },
        ),
        Finding(
            "The first step overshoots at small scales, most near the threshold where signals die, and "
            "leaves little of W "
            "but its first gradient, which has a low rank.",
            f"|W1| / |W0| is largest, {spread(growth.max('first_scale'), number)}, at init scale "
            f"{spread(peak, number)}; threshold {number(limit)}; at scale 1 it is "
            f"{spread(growth.sel(first_scale=1, method='nearest'), number)}. Stable rank |W|^2 / |W|_2^2 "
            f"there, mean of "
            f"hidden layers: {spread(rank.rank_before, number)} before, {spread(rank.rank_after, number)} "
            f"after the step",
            {
                "the peak is within a factor of 3 of the threshold": bool(
                    (np.abs(np.log(peak / limit)) < math.log(3)).all()
                ),
                "there |W| grows more than tenfold": bool((growth.max("first_scale") > 10).all()),
                "there the stable rank falls below a third": bool(
                    (rank.rank_after < rank.rank_before / 3).all()
                ),
            },
        ),
        *judge_rates_of_weights(results),
        judge_equilibrium(results),
    ]


def judge_rates_of_weights(results: xr.Dataset) -> list[Finding]:
    """How far the effective learning rate forgets the init scale, without weight decay."""
    effective = np.log10(hidden(results.effective_learning_rate).sel(weight_decay=0)).median("layer")
    scales = results.init_scale.values
    small, large = scales <= 1, scales >= 1

    def decades(values, chosen):
        values = values.isel(init_scale=chosen)
        return values.max("init_scale") - values.min("init_scale")

    start, end = effective.isel(probe_step=0), effective.isel(probe_step=-1)
    return [
        Finding(
            "Without weight decay too-small weights grow until their effective learning rate lr/|W|^2 fits "
            "(learning rates tune themselves); too-large ones cannot shrink and stay frozen.",
            f"decades that lr/|W|^2 spans over init scales up to 1: at the start "
            f"{spread(decades(start, small), number)}, "
            f"at the end {spread(decades(end, small), number)}; from 1 up: "
            f"{spread(decades(start, large), number)} and "
            f"{spread(decades(end, large), number)}",
            {
                "below 1 at most half of the decades is left": bool(
                    decades(end, small).median() <= decades(start, small).median() / 2
                ),
                "above 1 at least three quarters are left": bool(
                    decades(end, large).median() >= 0.75 * decades(start, large).median()
                ),
            },
        )
    ]


def equilibrium(learning_rate, weight_decay, invariant_gradient):
    """|W| at which a step's growth and decay cancel, and the angle of a step, in radians.

    With g orthogonal to W, |W'|^2 = (1 - lr wd)^2 |W|^2 + lr^2 |g|^2 and |g| = |g~| / |W|, so that |W'| = |W| at
    |W|^4 = lr |g~|^2 / (2 wd - lr wd^2) (van Laarhoven 2017, with the term of second order), where a step turns W
    by lr |g| / |W| = sqrt(2 lr wd - lr^2 wd^2), whatever the task.
    """
    product = learning_rate * weight_decay
    norm = (learning_rate**2 * invariant_gradient**2 / (product * (2 - product))) ** 0.25
    return norm, math.sqrt(product * (2 - product))


def judge_equilibrium(results: xr.Dataset) -> Finding:
    """The last third of the run with weight decay, against the formula."""
    rate = results.attrs["hyper"]["learning_rate"]
    decay = float(results.weight_decay.max())
    late = results.sel(weight_decay=decay).isel(
        probe_step=slice(-max(1, results.sizes["probe_step"] // 3), None)
    )
    norm, slopes = hidden(late.weight_norm), hidden(late.gradient_norm)
    invariant = np.sqrt(((norm * slopes) ** 2).mean("probe_step"))
    expected, turn = equilibrium(rate, decay, invariant)
    ratio = (norm**4).mean("probe_step") ** 0.25 / expected
    turned = np.sqrt(((rate * slopes / norm) ** 2).mean("probe_step"))
    forgotten = np.log10(norm.isel(probe_step=-1).median("layer"))
    left = forgotten.max("init_scale") - forgotten.min("init_scale")
    started = np.log10(results.init_scale.max() / results.init_scale.min())
    medians, by_seed = ratio.median(("layer", "seed")), ratio.median(("layer", "init_scale"))
    return Finding(
        "With weight decay |W| forgets its initialization, from both sides, and settles where |W|^4 = lr "
        "|g~|^2 / (2 wd).",
        f"lr {number(rate)}, wd {number(decay)}: |W| over init scales spans {spread(left, number)} decades "
        f"at the end, "
        f"{float(started):.3g} at the start; measured / predicted |W|: {spread(by_seed, number)}, "
        f"by scale from {number(float(medians.min()))} to {number(float(medians.max()))}; a step turns W by "
        f"{spread(turned.median(('layer', 'init_scale')), number)} rad, predicted {turn:.3g}",
        {
            "a tenth of the decades is left": bool((left <= started / 10).all()),
            "within 10% of the formula in the median": abs(float(by_seed.median()) - 1) < 0.1,
            "within 30% at every scale": bool((np.abs(medians - 1) < 0.3).all()),
        },
    )


def draw(results: xr.Dataset):
    """Growth in the first step; effective rates before and after; approach to equilibrium."""
    rate = results.attrs["first_rate"]
    first = results.rename(first_scale="x").median("seed")
    first = first.isel(hidden_layer=first.sizes["hidden_layer"] // 2)
    law = np.sqrt(first.norm_before**2 + (rate * first.first_gradient_norm) ** 2)
    ratio = {"measured": first.norm_after / first.norm_before, "law": law / first.norm_before}
    ratio = {name: value.rename(x="init_scale") for name, value in ratio.items()}
    marks = {"threshold": float(threshold(results.attrs["epsilon"]))}
    effective = hidden(results.effective_learning_rate).sel(weight_decay=0).median("layer")
    series = {
        f"step {int(step)}": effective.sel(probe_step=step, drop=True)
        for step in results.probe_step.values[[0, min(5, len(results.probe_step) - 1), -1]]
    }
    shown = [
        plots.Panel(
            "First step, a middle layer",
            "|W1| / |W0|",
            ratio,
            yscale="log",
            marks=marks,
            theory=["law"],
            unconnected=["measured"],
        ),
        plots.Panel(
            "No weight decay", "effective learning rate lr / |W|^2", series, yscale="log", marks=marks
        ),
    ]
    decayed = hidden(results.weight_norm).isel(weight_decay=-1).median("layer")
    scales = results.init_scale.values[:: -(-len(results.init_scale) // 6)]
    series = {f"init scale {number(s)}": decayed.sel(init_scale=s, drop=True) for s in scales}
    shown.append(
        plots.Panel(
            f"Weight decay {number(float(results.weight_decay.max()))}",
            "|W|",
            series,
            xlabel="step",
            xscale="linear",
            yscale="log",
        )
    )
    return plots.panels(shown, title="Norms of the weights and their learning rates")


CONTROL = Control(
    "How do weights' lengths change, and what does it do?",
    "Behind BN only the direction of W counts, so a step's effect depends on lr/|W|^2, the effective "
    "learning rate. As the "
    "gradient is orthogonal to W, each step of SGD makes W longer; only weight decay makes it shorter.",
    measure,
    judge,
    draw,
)
