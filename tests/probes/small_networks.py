"""What the tests of probes share: a small mlp, its intermediates in NumPy, and measurements that are compiled whole."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import bnjax
from bnjax import probes

N, D, K = 12, 6, 3
HIDDEN = (5, 7)


def network(norm="batch", activation="tanh", init_scale=1.0, **options):
    """A small mlp, its state and a batch, in the precision that is on."""
    model, state_and_x = _made(jax.config.jax_enable_x64, norm, activation, init_scale, **options)
    return model, *jax.tree.map(lambda leaf: leaf, state_and_x)  # in dictionaries of its own


@functools.cache
def _made(x64, norm, activation, init_scale, **options):
    model = bnjax.mlp(HIDDEN, K, activation, norm, **options)
    dtype = np.float64 if x64 else np.float32

    @jax.jit
    def draw():
        state = model.init(jax.random.key(1), (D,), init_scale)
        return *state, jax.random.normal(jax.random.key(2), (N, D), dtype)

    floats = partial(jax.tree.map, lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a)
    return model, jax.tree.map(jnp.asarray, floats(jax.device_get(draw())))


def signals(model, *state_and_x, **options):
    return jax.jit(partial(probes.signals, model, **options))(*state_and_x)


def gradients(model, params, stats, x, loss, **options):
    return jax.jit(lambda *a: probes.gradients(model, *a, loss, **options))(params, stats, x)


def singular_values(model, params, stats, x, *names, **options):
    return jax.jit(lambda *a: probes.singular_values(model, *a, *names, **options))(params, stats, x)


def cotangent(seed=3):
    c = np.random.default_rng(seed).normal(size=(N, K))
    return lambda outputs: (outputs * c).sum(), c


def forward_numpy(params, x, phi, epsilon=1e-5):
    """Every intermediate of the batch-normalized mlp, in numpy; without norm where params have none."""
    found, h = {}, np.asarray(x, np.float64)
    for name in [n for n in params if n.startswith("hidden")]:
        h = found[f"{name}/preactivation"] = h @ np.asarray(params[name]["kernel"], np.float64)
        if "norm" in params[name]:
            h = found[f"{name}/norm"] = (h - h.mean(0)) / np.sqrt(h.var(0) + epsilon)
        h = found[f"{name}/activation"] = phi(h)
    found["output"] = h @ np.asarray(params["output"]["kernel"], np.float64)
    return found


PHI = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
}
