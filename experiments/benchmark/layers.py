"""The layer in training mode, forward and backward, by several implementations; `measure` times them by turns."""

import math
import time
from collections.abc import Callable
from importlib import util

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from bnjax import batch_norm
from bnjax.types import BatchNormParams, BatchStats

MOMENTUM, EPSILON = 0.99, 1e-5
Layer = Callable[[jax.Array, BatchNormParams, BatchStats], tuple[jax.Array, BatchStats]]


def bnjax_layer(x, params, stats):
    """Ours."""
    return batch_norm.apply(params, stats, x, train=True, momentum=MOMENTUM, epsilon=EPSILON)


def autodiff_layer(x, params, stats):
    """The textbook formula, for JAX to differentiate."""
    x_hat, _, mean, var = textbook(x)
    return params.scale * x_hat + params.bias, averaged(stats, mean, var)


def textbook(x):
    """x_hat, 1 / sigma, mean and variance as the formula is written."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    var = jnp.square(x - mean).mean(axes)
    inv_sigma = 1 / jnp.sqrt(var + EPSILON)
    return (x - mean) * inv_sigma, inv_sigma, mean, var


def averaged(stats, mean, var):
    """The running statistics, as constants to the derivative."""
    mean, var = (MOMENTUM * old + (1 - MOMENTUM) * new for old, new in ((stats.mean, mean), (stats.var, var)))
    return jax.lax.stop_gradient(BatchStats(mean, var, stats.count + 1))


def custom_vjp_layer(x, params, stats):
    """The closed form as the backward pass of the textbook formula."""
    y, mean, var = closed_form(x, *params)
    return y, averaged(stats, mean, var)


@jax.custom_vjp
def closed_form(x, scale, bias):
    """y, mean, variance; the derivative of the first alone."""
    return _closed_form_forward(x, scale, bias)[0]


def _closed_form_forward(x, scale, bias):
    x_hat, inv_sigma, mean, var = textbook(x)
    return (scale * x_hat + bias, mean, var), (x_hat, scale * inv_sigma)


def _closed_form_backward(residuals, cotangents):
    (x_hat, slope), g = residuals, cotangents[0]
    axes, n = tuple(range(g.ndim - 1)), g.size // g.shape[-1]
    dbias, dscale = g.sum(axes), (g * x_hat).sum(axes)
    return slope * g - slope * dbias / n - x_hat * (slope * dscale / n), dscale, dbias


closed_form.defvjp(_closed_form_forward, _closed_form_backward)


def flax_layer(x, params, stats):
    """flax.linen's, with its defaults."""
    import flax.linen as nn

    layer = nn.BatchNorm(use_running_average=False, momentum=MOMENTUM, epsilon=EPSILON)
    variables = {"params": params._asdict(), "batch_stats": {"mean": stats.mean, "var": stats.var}}
    y, new = layer.apply(variables, x, mutable=["batch_stats"])
    return y, BatchStats(**jax.lax.stop_gradient(new["batch_stats"]), count=stats.count + 1)


def layers() -> dict[str, Layer]:
    """The implementations that can be run here."""
    flax = {"flax": flax_layer} if util.find_spec("flax") else {}
    return {"bnjax": bnjax_layer, "autodiff": autodiff_layer, **flax, "custom_vjp": custom_vjp_layer}


def problem(shape: tuple[int, ...], cells: int):
    """x, parameters, statistics and cotangent: of one layer, or with a leading axis of more `cells`."""
    keys = jax.random.split(jax.random.key(0), 2)
    leading = (cells,) if cells > 1 else ()
    params, stats = batch_norm.init(shape[-1])
    params, stats = jax.tree.map(lambda a: jnp.broadcast_to(a, (*leading, *a.shape)), (params, stats))
    x, g = (jax.random.normal(key, (*leading, *shape)) for key in keys)
    return x + 1, params, stats, g


def over_cells(function: Callable, cells: int) -> Callable:
    """The function for `cells` layers at once; for one, itself."""
    return jax.vmap(function) if cells > 1 else function


def both_passes(layer: Layer) -> Callable:
    """(x, params, stats, cotangent) -> y, new statistics, gradients."""

    def run(x, params, stats, g):
        y, pullback, stats = jax.vjp(lambda x, params: layer(x, params, stats), x, params, has_aux=True)
        return y, stats, pullback(g)

    return run


def residual_bytes(layer: Layer, cells: int, x, params, stats) -> int:
    """The bytes that a forward pass keeps for the backward pass: the program's output beyond y and statistics."""

    def forward(x, params, stats):
        return jax.vjp(lambda x, params: layer(x, params, stats), x, params, has_aux=True)

    programs = (jax.jit(over_cells(function, cells)).lower(x, params, stats) for function in (forward, layer))
    kept, returned = (program.compile().memory_analysis().output_size_in_bytes for program in programs)
    return kept - returned


def measure(shape: tuple[int, ...], cells: int, rounds: int, least_seconds: float, tick) -> xr.Dataset:
    """Seconds per pass, [implementation, round], and residual bytes, [implementation]."""
    arguments = problem(shape, cells)
    programs = {name: jax.jit(over_cells(both_passes(layer), cells)) for name, layer in layers().items()}
    seconds = {name: [] for name in programs}

    def once(program, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            result = program(*arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / repeats

    for program in programs.values():
        once(program, 2)  # compiles
    repeats = max(1, math.ceil(least_seconds / once(programs["bnjax"], 3)))
    for _ in range(rounds):
        for name, program in programs.items():
            seconds[name].append(once(program, repeats))
        tick()
    residuals = [residual_bytes(layer, cells, *arguments[:3]) for layer in layers().values()]
    return xr.Dataset(
        {
            "seconds": (("implementation", "round"), list(seconds.values()), {"units": "s"}),
            "residual_bytes": ("implementation", residuals, {"units": "B"}),
        },
        {"implementation": np.array(list(programs), object)},
    )
