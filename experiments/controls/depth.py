"""How deep does a network still train, in units of the mean-field depth scale?"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import batch_norm, initializers, plots
from bnjax.theory import mean_field
from experiments.controls.common import (
    CHANCE,
    TRAINS,
    Control,
    Finding,
    Setup,
    final,
    gradients,
    number,
    percent,
    run,
    spread,
)


def deep_network(depth: int, width: int, outputs: int, epsilon: float, activation=jax.nn.relu) -> bnjax.Model:
    """`bnjax.mlp` with BN for many layers: from the second on they are scanned, so that compiling is quick."""

    def init(key, input_shape, init_scale=1.0):
        first, second, third = jax.random.split(key, 3)

        def draw(key, fan_in):
            norm, stats = batch_norm.init(width)
            kernel = initializers.he_normal(key, (fan_in, width), init_scale)
            return {"kernel": kernel, "norm": norm}, stats

        bottom, bottom_stats = draw(first, math.prod(input_shape))
        above, above_stats = jax.vmap(lambda key: draw(key, width))(jax.random.split(second, depth - 1))
        output = {"kernel": initializers.he_normal(third, (width, outputs)), "bias": jnp.zeros(outputs)}
        params = {"first": bottom, "hidden": above, "output": output}
        return params, {"first": bottom_stats, "hidden": above_stats}

    def apply(params, batch_stats, x, *, train):
        def layer(x, both):
            one, stats = both
            y, stats = batch_norm.apply(
                one["norm"], stats, x @ one["kernel"], train=train, momentum=0.9, epsilon=epsilon
            )
            return activation(y), stats

        x, first = layer(x.reshape(len(x), -1), (params["first"], batch_stats["first"]))
        x, rest = jax.lax.scan(layer, x, (params["hidden"], batch_stats["hidden"]))
        return x @ params["output"]["kernel"] + params["output"]["bias"], {"first": first, "hidden": rest}

    config = {"model": "deep_network", "depth": depth, "features": [width] * depth, "num_outputs": outputs}
    return bnjax.Model(init, apply, config=config | {"epsilon": epsilon, "activation": activation.__name__})


def identity(x):
    """For linear networks."""
    return x


def measure(setup: Setup) -> xr.Dataset:
    """Dimensions (variant, depth, learning_rate, seed), and the gradient's growth at the start (variant, seed)."""
    depths, width = setup.values["depths"], setup.network["features"][0]
    size = setup.depth_batch_size
    variants = {f"ReLU, batch {size}": (jax.nn.relu, size)}
    if setup.full:
        variants |= {"ReLU, batch 8": (jax.nn.relu, 8), f"linear, batch {size}": (identity, size)}
    axes = {"learning_rate": setup.values["depth_rates"], "seed": setup.seeds}
    found, growth = [], []
    for activation, batch in variants.values():
        models = {
            str(d): deep_network(d, width, setup.network["num_outputs"], setup.network["epsilon"], activation)
            for d in depths
        }
        config = bnjax.TrainConfig(steps=setup.values["depth_steps"], batch_size=batch)
        results = run(setup, models, setup.images, config, axes)
        found.append(results.rename(model="depth").assign_coords(depth=depths))
        growth.append(gradient_growth(models[str(depths[-1])], setup.images, batch, setup.seeds))
    variant = xr.Variable("variant", np.asarray(list(variants), object))
    results = xr.concat(found, variant, combine_attrs="override")
    theory = [
        mean_field.gradient_growth("relu" if activation is jax.nn.relu else "linear", batch)
        for activation, batch in variants.values()
    ]
    return results.assign(growth=(("variant", "seed"), np.asarray(growth)), theory=("variant", theory))


def gradient_growth(model: bnjax.Model, ds: bnjax.Dataset, batch_size: int, seeds: list[int]) -> np.ndarray:
    """By which factor the squared gradient to a layer's weights grows from layer to layer downward, at the start.

    Returns:
      One figure a seed: from the slope of its logarithm over the layers but the first and the last quarter.
    """

    def logs(seed, ds):
        params, stats = model.init(jax.random.key(seed), ds.train_x.shape[1:], 1.0)
        slopes = gradients(model, params, stats, ds.train_x[:batch_size], ds.train_y[:batch_size])["hidden"][
            "kernel"
        ]
        return jnp.log((slopes**2).sum((1, 2)))

    found = np.asarray(jax.jit(jax.vmap(logs, in_axes=(0, None)))(np.asarray(seeds, np.uint32), ds))
    cut = found.shape[1] // 4
    middle = found[:, cut : found.shape[1] - cut]
    if middle.shape[1] < 2:
        return np.full(len(seeds), np.nan)
    return np.exp([-np.polyfit(np.arange(middle.shape[1]), row, 1)[0] for row in middle])


def deepest(accuracy: xr.DataArray) -> xr.DataArray:
    """The depth up to which every one trains: to TRAINS of the accuracy of the least deep one; 0 for none.

    Args:
      accuracy: over depth, ascending, and maybe more.
    """
    works = (accuracy >= TRAINS * accuracy.isel(depth=0)).cumprod("depth").astype(bool)
    return accuracy.depth.where(works, 0).max("depth")


def judge(results: xr.Dataset) -> list[Finding]:
    """How deep, in units of the mean-field depth scale; and that scale against the measured growth."""
    accuracy = final(results).train_accuracy
    rates = accuracy.median("seed").fillna(0).argmax("learning_rate")
    best = accuracy.isel(learning_rate=rates)
    found = []
    for variant in results.variant.values:
        one = best.sel(variant=variant)
        theory = float(results.theory.sel(variant=variant))
        scale = mean_field.depth_scale(theory)
        by_seed = deepest(one)
        reach = float(deepest(one.median("seed")))
        some = float(one.depth.where(one.median("seed") >= 2 * CHANCE["images"]).max())
        curve = "; ".join(
            f"{int(d)}: {spread(one.sel(depth=d), percent)} ({number(float(one.learning_rate.sel(depth=d)))})"
            for d in one.depth.values
        )
        growth = results.growth.sel(variant=variant)
        found.append(
            Finding(
                f"Depth is what BN does not cure ({variant}): gradients grow by {theory:.3f} a layer "
                f"(squared; mean "
                f"field), and training stops within 20 of the depth scales of that, {scale:.3g} layers.",
                f"training accuracy after {results.attrs['config']['steps']} steps, by depth, with "
                f"the best learning rate (in parentheses) {curve}; "
                f"trains well (to {TRAINS:.0%} of the least deep) up to {spread(by_seed, number)} layers = "
                f"{reach / scale:.2g} depth scales, at all (twice guessing) up to {some:.0f} = "
                f"{some / scale:.2g}; growth "
                f"measured at the start, {int(one.depth[-1])} layers: {spread(growth, lambda v: f'{v:.3f}')}",
                {
                    "the deepest does not train well": reach < float(one.depth.max()),
                    "the last that trains at all is no deeper": some
                    < min(20 * scale, float(one.depth.max())),
                    "measured growth within 10% of mean field": bool(
                        abs(float(growth.median()) / theory - 1) < 0.1
                    ),
                },
            )
        )
    return found


def draw(results: xr.Dataset):
    """Accuracy over depth, by learning rate and at the best."""
    accuracy = 100 * final(results).train_accuracy
    shown = []
    for variant in results.variant.values:
        one = accuracy.sel(variant=variant)
        series = {
            f"learning rate {number(float(r))}": one.sel(learning_rate=r) for r in one.learning_rate.values
        }
        scale = mean_field.depth_scale(float(results.theory.sel(variant=variant)))
        marks = {f"{k} depth scales": k * scale for k in (2, 6, 12)} if math.isfinite(scale) else {}
        shown.append(
            plots.Panel(
                str(variant),
                "final training accuracy (%)",
                series,
                xlabel="number of hidden layers",
                xscale="linear",
                marks=marks,
                levels={"chance": 10},
            )
        )
    return plots.panels(shown, title="How deep BN networks still train")


CONTROL = Control(
    "How deep?",
    "Going back, BN multiplies the squared gradient by a factor above 1 in each layer, pi/(pi-1) for "
    "ReLU and a large batch, "
    "whatever the init scale. The depth scale is the number of layers in which it grows by e.",
    measure,
    judge,
    draw,
)
