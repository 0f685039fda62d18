"""What the controls share: what the flags ask for, networks and runs, what judges and draws."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

import bnjax
from bnjax import probes
from bnjax.findings import number
from bnjax.theory import mean_field

MOMENTUM = 0.9  # the optimizer's
CHANCE = {"images": 0.1, "xor": 0.5}
TRAINS = 0.8  # of the best median accuracy
BN = "BN"


class Setup(NamedTuple):
    """What the flags ask for, checked."""

    images: bnjax.Dataset
    xor: bnjax.Dataset  # of the same shapes, so that one program serves both
    seeds: list[int]
    init_scales: list[float]
    values: dict[str, Any]  # {flag of GRID: its parsed value}
    network: dict[str, Any]  # what `bnjax.mlp` is given
    config: bnjax.TrainConfig
    hyper: bnjax.Hyperparams
    norms_rate: float  # the learning rate of the control of norms
    weight_decay: float  # there
    depth_batch_size: int
    full: bool


class Finding(NamedTuple):
    """A claim, what was measured, and the statements that the claim stands or falls with."""

    claim: str
    measured: str
    tests: Mapping[str, bool]  # {statement: whether the figures bear it out}


class Control(NamedTuple):
    """One question: the runs that it takes, what they say, how they look."""

    question: str
    explanation: str
    measure: Callable[[Setup], xr.Dataset]
    judge: Callable[[xr.Dataset], list[Finding]]
    draw: Callable[[xr.Dataset], Any]


def verdict(finding: Finding) -> str:
    """Supported if every statement holds, not supported if none does, else partly, and which."""
    failed = [text for text, holds in finding.tests.items() if not holds]
    if not failed:
        return "supported"
    if len(failed) == len(finding.tests):
        return "not supported"
    return f"partly supported; not so: {'; '.join(failed)}"


# Networks and runs


@functools.cache  # the same objects for all controls that train the same network, so that it is compiled once
def _network(inputs: int, **given) -> tuple[bnjax.Model, bnjax.Probe]:
    model = bnjax.mlp(**given)
    return model, probes.weights(model, (inputs,))


def networks(
    setup: Setup, changes: Mapping[str, Mapping]
) -> tuple[dict[str, bnjax.Model], dict[str, bnjax.Probe]]:
    """{name: model} and {name: probe of its weights}, by what `bnjax.mlp` is given beside the flags."""
    inputs = setup.images.train_x.shape[-1]
    made = {name: _network(inputs, **(setup.network | change)) for name, change in changes.items()}
    return {name: one[0] for name, one in made.items()}, {name: one[1] for name, one in made.items()}


def run(setup: Setup, models, ds: bnjax.Dataset, config: bnjax.TrainConfig, axes, *, hyper=None, probe=None):
    """`bnjax.sweep`, from what the flags ask for."""
    hyper = setup.hyper if hyper is None else hyper
    return bnjax.sweep(models, ds, config, axes, hyper=hyper, probe=probe)


def rates_and_scales(
    setup: Setup, rates: str | None = None, scales: list[float] | None = None
) -> dict[str, list]:
    """The axes of a sweep: learning rates (of that flag), init scales, seeds."""
    axes = {"init_scale": scales or setup.init_scales, "seed": setup.seeds}
    return axes if rates is None else {"learning_rate": setup.values[rates]} | axes


def gradients(model: bnjax.Model, params, batch_stats, x, y):
    """The gradient of the loss of a batch with respect to `params`."""

    def loss(params):
        logits, _ = model.apply(params, batch_stats, x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return jax.grad(loss)(params)


def first_step(
    models: Mapping[str, bnjax.Model],
    ds: bnjax.Dataset,
    batch_size: int,
    learning_rate: float,
    seeds: list[int],
    scales: list[float],
    ranks: bool = True,
) -> xr.Dataset:
    """What one step of SGD does to each hidden weight matrix, in float64.

    Returns:
      Data set of dimensions (model, init_scale, seed, layer): norm_before |W_0|, first_gradient_norm |g|, norm_after
      |W_1| of W_1 = W_0 - learning_rate g, radial_cosine of the angle between W_0 and g, and with `ranks` the
      stable ranks rank_before of W_0 and rank_after of W_1.
    """
    layers = []

    def one_layer(before, gradient):
        after = before - learning_rate * gradient
        norms = [jnp.linalg.norm(matrix) for matrix in (before, gradient, after)]
        return {
            "norm_before": norms[0],
            "first_gradient_norm": norms[1],
            "norm_after": norms[2],
            "radial_cosine": (before / norms[0] * gradient / norms[1]).sum(),
            **(
                {"rank_before": probes.stable_rank(before), "rank_after": probes.stable_rank(after)}
                if ranks
                else {}
            ),
        }

    def measure(model, seed, scale, ds):
        params, stats = model.init(jax.random.key(seed), ds.train_x.shape[1:], jnp.float32(scale))
        params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
        before = probes.kernels(params)
        slopes = probes.kernels(gradients(model, params, stats, ds.train_x, ds.train_y))
        layers[:] = [name for name in before if name != "output"]
        found = [one_layer(before[name], slopes[name]) for name in layers]
        return jax.tree.map(lambda *a: jnp.stack(a), *found)

    def all_models(seeds, scales, ds):
        found = [
            jax.vmap(lambda a, m=m: jax.vmap(lambda s: measure(m, s, a, ds))(seeds))(scales)
            for m in models.values()
        ]
        return jax.tree.map(lambda *a: jnp.stack(a), *found)

    with jax.enable_x64(True):
        double = jax.tree.map(
            lambda a: a[:batch_size].astype("float64" if a.dtype.kind == "f" else a.dtype), ds
        )
        found = jax.jit(all_models)(np.asarray(seeds, np.uint32), np.asarray(scales), double)
        found = jax.tree.map(np.asarray, found)
    dims = ("model", "init_scale", "seed", "layer")
    coords = {"model": np.asarray(list(models), object), "init_scale": scales, "seed": seeds}
    coords["layer"] = np.asarray(layers, object)
    return xr.Dataset({name: (dims, value) for name, value in found.items()}, coords)


# What the controls have in common when they judge


def threshold(epsilon):
    """The init_scale below which a ReLU network's signals die out at initialization (He's initializer).

    One layer of small signals multiplies their variance by init_scale^2 (1 - 1/pi) / epsilon.
    """
    return np.sqrt(epsilon * mean_field.gradient_growth("relu"))


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


def spread(values: xr.DataArray, text: Callable[[float], str]) -> str:
    """`median [lowest, highest]` over seeds."""
    values = np.asarray(values, float).ravel()
    return f"{text(np.median(values))} [{text(values.min())}, {text(values.max())}]"


def percent(value: float) -> str:
    """A fraction as 81.4%."""
    return number(value, "%")


def points(value: float) -> str:
    """A difference of fractions as +3.2 points."""
    return f"{100 * value:+.1f}"


def slope(x, y) -> float:
    """Of the straight line through log10 y over log10 x, by least squares; NaN for fewer than two points."""
    x, y = np.log10(np.asarray(x, float)), np.log10(np.asarray(y, float))
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 and np.isfinite(y).all() else math.nan


def rank_correlation(x, y) -> float:
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(np.asarray(values).ravel())) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1]) if len(ranks[0]) > 1 else math.nan


def by_model(values: xr.DataArray) -> dict[str, xr.DataArray]:
    """{name: its values}."""
    return {str(name): values.sel(model=name) for name in values.model.values}
