"""Losses of a batch: of outputs and labels or targets, a scalar."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean cross-entropy of outputs [N, K] as logits for labels [N], in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def squared(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of (output - target)^2 over all entries of [N, K]; labels [N] are targets of 0 and 1."""
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
    return jnp.mean((outputs - targets) ** 2)


LOSSES = MappingProxyType({"cross_entropy": cross_entropy, "squared": squared})
