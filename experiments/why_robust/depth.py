"""The depth to which a network still trains, in units of the mean-field depth scale."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import batch_norm, initializers, plots
from bnjax.findings import Check, Finding, number
from bnjax.theory import mean_field
from experiments.claim import Claim
from experiments.settings import at_least, check_axis, require, setting
from experiments.why_robust import common
from experiments.why_robust.common import CHANCE, FULL, TINY, TRAINS, final, gradients, run

MOST_LAYERS = 1000


@dataclasses.dataclass(frozen=True)
class Settings(common.Settings):
    """Networks of several depths, each with the best of several learning rates."""

    depths: tuple[int, ...] = setting((5, 10, 20, 40), "Numbers of hidden layers in the control of depth.")
    depth_rates: tuple[float, ...] = setting((0.01, 0.1, 0.3), "Learning rates to choose from in the control of depth.")
    depth_steps: int = setting(150, "Optimizer steps of the control of depth.")
    depth_batch_size: int = setting(128, "Examples per step of the control of depth.")
    contrasts: bool = setting(False, "In the control of depth also batches of 8, and linear networks.")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, depth_steps=2, depth_batch_size=4)
        inside = self.depths and min(self.depths) >= 2 and max(self.depths) <= MOST_LAYERS
        require(bool(inside), "depths", f"must be at least 2 and at most {MOST_LAYERS}, got {self.depths}")
        check_axis(self, "depth_rates", "learning_rate")

    @property
    def variants(self) -> dict[str, tuple[Any, int]]:
        """{name: (activation, batch size)}."""
        size = self.depth_batch_size
        more = {"ReLU, batch 8": (jax.nn.relu, 8), f"linear, batch {size}": (identity, size)}
        return {f"ReLU, batch {size}": (jax.nn.relu, size)} | (more if self.contrasts else {})


def deep_network(depth: int, width: int, outputs: int, epsilon: float, activation: Any = jax.nn.relu) -> bnjax.Model:
    """`bnjax.mlp` with BN for many layers: from the second on they are scanned, so that compiling is quick."""

    def init(key, input_shape, init_scale=1.0):
        first, second, third = jax.random.split(key, 3)

        def draw(key, fan_in):
            norm, stats = batch_norm.init(width)
            return {"kernel": initializers.he_normal(key, (fan_in, width), init_scale), "norm": norm}, stats

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


def identity(x: Any) -> Any:
    """For linear networks."""
    return x


def measure(settings: Settings, ds: bnjax.Dataset) -> xr.Dataset:
    """Dimensions (variant, depth, learning_rate, seed), and the gradient's growth at the start (variant, seed)."""
    depths, variants = sorted(settings.depths), settings.variants
    axes = {"learning_rate": sorted(settings.depth_rates), "init_scale": [1.0]}
    found, growth, theory = [], [], []
    for activation, batch in variants.values():
        models = {str(d): deep_network(d, settings.hidden_width, 10, settings.epsilon, activation) for d in depths}
        config = bnjax.TrainConfig(steps=settings.depth_steps, batch_size=batch)
        results = run(settings, models, ds, axes, config=config).isel(init_scale=0, drop=True)
        found.append(results.rename(model="depth").assign_coords(depth=depths))
        growth.append(gradient_growth(models[str(depths[-1])], ds, batch, settings.seeds))
        theory.append(mean_field.gradient_growth("relu" if activation is jax.nn.relu else "linear", batch))
    variant = xr.Variable("variant", np.asarray(list(variants), object))
    results = xr.concat(found, variant, combine_attrs="override")
    return results.assign(growth=(("variant", "seed"), np.asarray(growth)), theory=("variant", theory))


def gradient_growth(model: bnjax.Model, ds: bnjax.Dataset, batch_size: int, seeds: tuple[int, ...]) -> np.ndarray:
    """By which factor the squared gradient to a layer's weights grows from layer to layer downward, at the start.

    Returns:
      One figure per seed: from the slope of its logarithm over the layers but the first and the last quarter.
    """

    def logs(seed, ds):
        params, stats = model.init(jax.random.key(seed), ds.train_x.shape[1:], 1.0)
        slopes = gradients(model, params, stats, ds.train_x[:batch_size], ds.train_y[:batch_size])["hidden"]["kernel"]
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


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """The depth, in units of the mean-field depth scale; and that scale against the measured growth."""
    accuracy = final(results).train_accuracy
    best = accuracy.isel(learning_rate=accuracy.median("seed").fillna(0).argmax("learning_rate"))
    found = []
    for variant in results.variant.values:
        one, theory = best.sel(variant=variant), float(results.theory.sel(variant=variant))
        scale = mean_field.depth_scale(theory)
        less = float(one.depth[-2]) if one.depth.size > 1 else 0.0  # than the deepest
        well = deepest(one)
        at_all = one.depth.where(one >= 2 * CHANCE["images"], 0).max("depth")
        growth = results.growth.sel(variant=variant).values
        curve = [
            Check(f"accuracy, {int(d)} layers, learning rate {number(float(rate))}", one.sel(depth=d).values, unit="%")
            for d, rate in zip(one.depth.values, one.learning_rate.values, strict=True)
        ]
        found.append(
            Finding(
                f"BN does not cure depth ({variant}): gradients grow by {number(theory)} per layer (squared; mean "
                f"field), and training stops within 20 of the depth scales of that, {number(scale)} layers.",
                checks=[
                    Check("the deepest does not train well; layers that do", well.values, below=less),
                    Check(
                        "the last that trains at all is no deeper; layers", at_all.values, below=min(20 * scale, less)
                    ),
                    Check("measured growth within 10% of mean field", growth / theory, within=(0.9, 1.1)),
                    *curve,
                    Check("growth of the squared gradient per layer, mean field", theory),
                    Check(f"growth at the start, {int(one.depth[-1])} layers", growth),
                    Check("depth scales that train well", well.values / scale),
                    Check("depth scales that train at all", at_all.values / scale),
                ],
                note=f"Training accuracy after {settings.depth_steps} steps, with the best learning rate. Well: to "
                f"{TRAINS:.0%} of the least deep network's accuracy. At all: to twice that of guessing.",
            )
        )
    return found


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Accuracy over depth, by learning rate and at the best."""
    accuracy = 100 * final(results).train_accuracy
    shown = []
    for variant in results.variant.values:
        one = accuracy.sel(variant=variant)
        series = {f"learning rate {number(float(r))}": one.sel(learning_rate=r) for r in one.learning_rate.values}
        scale = mean_field.depth_scale(float(results.theory.sel(variant=variant)))
        marks = {f"{k} depth scales": k * scale for k in (2, 6, 12)} if math.isfinite(scale) else {}
        layout = {"xlabel": "number of hidden layers", "xscale": "linear", "marks": marks, "levels": {"chance": 10}}
        shown.append(plots.Panel(str(variant), "final training accuracy (%)", series, **layout))
    return plots.panels(shown, title="Training by depth, with BN")


CLAIM = Claim(
    name="depth",
    question="How deep?",
    source="",
    explanation="Going back, BN multiplies the squared gradient by a factor above 1 in each layer, pi/(pi-1) for "
    "ReLU and a large batch, whatever the init scale. The depth scale is the number of layers in which it grows by e.",
    settings=Settings,
    quick=Settings(),
    full=Settings(
        **FULL,
        depths=(3, 5, 7, 10, 14, 20, 28, 40, 56, 80),
        depth_rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        depth_steps=1000,
        contrasts=True,
    ),
    tiny=Settings(**TINY, depths=(3,), depth_rates=(0.1,), depth_steps=5, depth_batch_size=50),
    measure=measure,
    judge=judge,
    figure=figure,
    share=17,
)
