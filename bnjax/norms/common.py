"""Shared by the norms: scale and bias, statistics of each example, units in which no square overflows."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Num

from bnjax import batch_norm
from bnjax.types import Array


def check_momentum(momentum: Real | None, *, optional: bool = True) -> None:
    """Raises ValueError unless it is in [0, 1], or None where that is taken."""
    if (momentum is None and not optional) or (momentum is not None and not 0 <= momentum <= 1):
        allowed = "None or in [0, 1]" if optional else "in [0, 1]"
        raise ValueError(f"momentum (of the running statistics) must be {allowed}, got {momentum}")


def number(epsilon: ArrayLike) -> Any:
    """As JSON holds it; a traced one as it is."""
    return epsilon if isinstance(epsilon, jax.core.Tracer | float | int) else float(epsilon)


def affine_init(num_features: int, *, use_bias: bool = True) -> dict[str, jax.Array]:
    """Scale 1 and bias 0, [C]."""
    params = {"scale": jnp.ones(num_features, jnp.float32)}
    return params | {"bias": jnp.zeros(num_features, jnp.float32)} if use_bias else params


def affine(params: Mapping[str, jax.Array], x: Num[Array, "..."], dtype) -> Num[jax.Array, "..."]:
    """Scales and shifts x by scale and bias; in that dtype."""
    x = x * params["scale"].astype(x.dtype)
    return (x + params["bias"].astype(x.dtype) if "bias" in params else x).astype(dtype)


def standardize_examples(
    x: Num[Array, "N ..."], epsilon: ArrayLike, groups: int | None, mask: Bool[Array, "..."] | None
) -> Float[jax.Array, "N ..."]:
    """(x - mean) / sqrt(var + epsilon) of each example over all its entries, by `batch_norm.normalize`.

    The derivative is the closed form there, and so are precision and range.

    Args:
      x: [N, ..., C].
      epsilon: added to the variance.
      groups: G, which divides C; each of C / G neighbouring channels is standardized by itself. None: all channels
        together.
      mask: of valid positions, [N, ..., 1] or what broadcasts to it.

    Raises:
      ValueError: if an example has a single entry to standardize.
    """
    x = as_float32(x)
    *rest, channels = x.shape
    apart = x.reshape(*rest, groups or 1, channels // (groups or 1))
    if math.prod(apart.shape[1:]) == (groups or 1):
        raise ValueError(f"x {x.shape} has a single entry to standardize per example and group: its output would be 0")
    if mask is None:
        return batch_norm.normalize(apart, epsilon, (0, x.ndim - 1)).reshape(x.shape)

    def one(x, mask):
        return batch_norm.normalize(x, epsilon, x.ndim - 2, mask)

    mask = jnp.broadcast_to(mask, (*rest, 1))[..., None]
    return jax.vmap(one)(apart, mask).reshape(x.shape)


def unit_of(magnitude: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """A power of two near it, which divides exactly; a constant to the derivative."""
    return batch_norm.power_of_two(lax.stop_gradient(magnitude))


def as_float32(x: Num[Array, "..."]) -> Float[jax.Array, "..."]:
    """In float32 at least: the precision in which statistics are taken."""
    return jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def mean_over(x: Float[jax.Array, "..."], axes: tuple[int, ...], valid: Bool[Array, "..."] | None):
    """The mean over the valid entries on these axes, which stay with size 1; 0 if there is none."""
    if valid is None:
        return x.mean(axes, keepdims=True)
    total = jnp.where(valid, x, 0).sum(axes, keepdims=True)
    return total / jnp.maximum(valid.sum(axes, keepdims=True), 1).astype(x.dtype)


def valid_entries(mask: Bool[Array, "..."] | None, x: Num[Array, "..."]) -> Bool[jax.Array, "..."] | None:
    """A mask of positions, for each entry of x."""
    return None if mask is None else jnp.broadcast_to(mask, x.shape)
