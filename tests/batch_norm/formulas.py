"""Batch normalization as it is written, in extended precision, and compiled; and batches to compare it on."""

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import batch_norm


def compiled(function, *static):
    """With NumPy's arrays as results. Op by op, each primitive would be compiled for each shape, comparisons too."""
    run = jax.jit(function, static_argnames=static)
    return lambda *args, **options: jax.device_get(run(*args, **options))


apply = compiled(batch_norm.apply, "train", "momentum", "axis", "axis_name", "debias", "unbiased", "detach")
normalize = compiled(batch_norm.normalize, "axis", "axis_name")


def textbook(x, epsilon=1e-5, mask=None):
    """The formula as it is written, for plain autodiff: features last, statistics over axis 0."""
    if mask is None:
        mask = jnp.ones((len(x), 1), bool)
    n = mask.sum()
    mean = jnp.where(mask, x, 0).sum(0) / n
    var = jnp.where(mask, (x - mean) ** 2, 0).sum(0) / n
    return jnp.where(mask, (x - mean) / jnp.sqrt(var + epsilon), 0)


def draw(shape, seed=0, mean=0.7, std=1.6):
    """Normal, of JAX's default type."""
    return (mean + std * np.random.default_rng(seed).normal(size=shape)).astype(jnp.result_type(float))


def batch(n, c=8, mean=0.0, std=1.0, seed=0):
    return (mean + std * np.random.default_rng(seed).normal(size=(n, c))).astype(np.float32)


def exact(x, epsilon=1e-5, valid=slice(None)):
    """x_hat and sigma in extended precision, the given x and float32 epsilon taken as exact."""
    x = np.asarray(x, np.longdouble)[valid]
    mean = x.mean(0)
    sigma = np.sqrt(((x - mean) ** 2).mean(0) + np.longdouble(np.float32(epsilon)))
    return (x - mean) / sigma, sigma


def exact_gradient(x, cotangent, epsilon=1e-5, valid=slice(None)):
    x_hat, sigma = exact(x, epsilon, valid)
    g = np.asarray(cotangent, np.longdouble)[valid]
    return (g - g.mean(0) - x_hat * (x_hat * g).mean(0)) / sigma


def distance(actual, expected, unit=None):
    """Norm-wise, relative to `expected`, or to `unit` where the expected cancels to almost nothing."""
    assert np.isfinite(np.asarray(actual, np.float64)).all()
    unit = expected if unit is None else unit
    return float(np.linalg.norm(np.asarray(actual, np.longdouble) - expected) / np.linalg.norm(unit))
