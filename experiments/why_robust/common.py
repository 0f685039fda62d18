"""Shared by the controls: settings, networks and runs, and parts of their judges."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import xarray as xr

import bnjax
from bnjax import losses, probes
from bnjax.theory import mean_field
from experiments import common
from experiments.settings import at_least, check_axis, positive, require, setting

MOMENTUM = 0.9  # the optimizer's
CHANCE = {"images": 0.1, "xor": 0.5}
TRAINS = 0.8  # of the best median accuracy
BN = "BN"
FULL = {"seeds": tuple(range(10)), "init_scales": tuple(common.parse_floats("", "1e-4:1e4:17")), "steps": 1000}
TINY = {"seeds": (0, 1), "init_scales": (1e-4, 1.0, 1e4), "layers": 2, "hidden_width": 8, "batch_size": 50, "steps": 10}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of all controls, but for what they say otherwise."""

    seeds: tuple[int, ...] = setting((0, 1, 2, 3, 4, 5), "A count, a range 0:5 or a list 0,1,2.", common.parse_seeds)
    init_scales: tuple[float, ...] = setting(
        tuple(common.parse_floats("", "1e-4:1e4:9")), "A list, or low:high:count for log spacing."
    )
    layers: int = setting(3, "Number of hidden layers, except where depth is varied.")
    hidden_width: int = setting(64, "Units per hidden layer.")
    epsilon: float = setting(1e-5, "Batch normalization's epsilon, except where it is varied.")
    batch_size: int = setting(128, "Examples per step.")
    learning_rate: float = setting(0.1, "Of SGD with momentum 0.9, except where it is varied.")
    steps: int = setting(200, "Optimizer steps, except in the controls of frozen weights and of depth.")

    def __post_init__(self):
        at_least(self, layers=1, hidden_width=1, batch_size=2, steps=2)
        positive(self, "epsilon", "learning_rate")
        check_axis(self, "seeds", "seed")
        check_scales(self, "init_scales")

    @property
    def network(self) -> dict[str, Any]:
        """The arguments of `bnjax.mlp`."""
        return {"features": (self.hidden_width,) * self.layers, "num_outputs": 10, "epsilon": self.epsilon}

    @property
    def config(self) -> bnjax.TrainConfig:
        """With ten evaluations."""
        return bnjax.TrainConfig(steps=self.steps, batch_size=self.batch_size, eval_every=max(1, self.steps // 10))


def check_scales(settings: Any, field: str) -> None:
    """Raises `Refused` unless the init_scales are on both sides of 1."""
    scales = sorted(getattr(settings, field))
    sides = len(scales) > 2 and scales[0] < 1 < scales[-1]
    require(sides, field, f"needs at least 3 values, on both sides of 1, got {','.join(map('{:g}'.format, scales))}")
    check_axis(settings, field, "init_scale")


# Networks and runs


@functools.cache  # the same objects for all controls that train the same network, so that it is compiled once
def _network(input_shape: tuple[int, ...], **given) -> tuple[bnjax.Model, bnjax.Probe]:
    model = bnjax.mlp(**given)
    return model, probes.weights(model, input_shape)


def networks(
    settings: Settings, ds: bnjax.Dataset, changes: Mapping[str, Mapping]
) -> tuple[dict[str, bnjax.Model], dict[str, bnjax.Probe]]:
    """{name: model} and {name: probe of its weights}, by what `bnjax.mlp` is given beside the settings."""
    made = {name: _network(ds.train_x.shape[1:], **(settings.network | change)) for name, change in changes.items()}
    return {name: one[0] for name, one in made.items()}, {name: one[1] for name, one in made.items()}


def run(
    settings: Settings,
    models: Any,
    ds: bnjax.Dataset,
    axes: Mapping[str, Any] = {},
    *,
    config: bnjax.TrainConfig | None = None,
    hyper: bnjax.Hyperparams | None = None,
    probe: Any = None,
) -> xr.Dataset:
    """`bnjax.sweep` over these axes, and over init scales and seeds unless they are among them."""
    axes = {**axes, "init_scale": axes.get("init_scale", sorted(settings.init_scales)), "seed": list(settings.seeds)}
    hyper = hyper or bnjax.Hyperparams(learning_rate=settings.learning_rate, momentum=MOMENTUM)
    return bnjax.sweep(models, ds, config or settings.config, axes, hyper=hyper, probe=probe)


def gradients(model: bnjax.Model, params: Any, batch_stats: Any, x: Any, y: Any) -> Any:
    """The gradient of the loss of a batch with respect to `params`."""
    return jax.grad(lambda params: losses.cross_entropy(model.apply(params, batch_stats, x, train=True)[0], y))(params)


def first_steps(
    models: Mapping[str, bnjax.Model],
    ds: bnjax.Dataset,
    batch_size: int,
    learning_rate: float,
    seeds: tuple[int, ...],
    scales: list[float],
    fields: tuple[str, ...] = probes.FirstStep._fields,
) -> xr.Dataset:
    """`probes.first_step` of the hidden weights in float64: dimensions (model, init_scale, seed, layer)."""
    layers = []

    def measure(model, seed, scale, ds):
        params, stats = model.init(jax.random.key(seed), ds.train_x.shape[1:], jax.numpy.float32(scale))
        params = jax.tree.map(lambda a: a.astype(jax.numpy.float64), params)
        found = probes.first_step(model, params, stats, ds.train_x, ds.train_y, learning_rate)
        layers[:] = [name for name in found if name != "output"]
        return {field: jax.numpy.stack([getattr(found[name], field) for name in layers]) for field in fields}

    def all_models(seeds, scales, ds):
        found = [
            jax.vmap(lambda a, m=m: jax.vmap(lambda s: measure(m, s, a, ds))(seeds))(scales) for m in models.values()
        ]
        return jax.tree.map(lambda *a: jax.numpy.stack(a), *found)

    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: a[:batch_size].astype("float64" if a.dtype.kind == "f" else a.dtype), ds)
        found = jax.jit(all_models)(np.asarray(seeds, np.uint32), np.asarray(scales), double)
        found = jax.tree.map(np.asarray, found)
    dims = ("model", "init_scale", "seed", "layer")
    coords = {"model": np.asarray(list(models), object), "init_scale": scales, "seed": list(seeds)}
    coords["layer"] = np.asarray(layers, object)
    return xr.Dataset({name: (dims, value) for name, value in found.items()}, coords)


# Shared by the judges


@functools.cache
def threshold(epsilon: float) -> float:
    """The init_scale below which a ReLU network's signals die out at initialization (He's initializer)."""
    return mean_field.init_scale_threshold("relu", epsilon)


def final(results: xr.Dataset) -> xr.Dataset:
    """The last evaluation."""
    return results.drop_dims("probe_step", errors="ignore").isel(step=-1, drop=True)


def hidden(values: xr.DataArray) -> xr.DataArray:
    """Of its layers the hidden ones."""
    return values.sel(layer=[name for name in values.layer.values if name != "output"])


def at(values: xr.DataArray, scale: float) -> xr.DataArray:
    """At the init_scale of the grid that is nearest to this one."""
    nearest = int(np.abs(np.log(values.init_scale.values / scale)).argmin())
    return values.isel(init_scale=nearest)


def grid_step(values: Any) -> float:
    """The largest step of a grid, in decades."""
    values = np.asarray(values, float)
    return float(np.diff(np.log10(values)).max()) if len(values) > 1 else 0.0


def slope(x: Any, y: Any) -> float:
    """Of the straight line through log10 y over log10 x, by least squares; NaN for fewer than two points."""
    x, y = np.log10(np.asarray(x, float)), np.log10(np.asarray(y, float))
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 and np.isfinite(y).all() else math.nan


def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(np.asarray(values).ravel())) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1]) if len(ranks[0]) > 1 else math.nan


def by_model(values: xr.DataArray) -> dict[str, xr.DataArray]:
    """{name: its values}."""
    return {str(name): values.sel(model=name) for name in values.model.values}
