"""Normalization of a channel over the batch by another spread than the deviation (Hoffer et al. 2018).

    y = scale (x - mean) / (spread + epsilon) + bias

    p = 1: spread = mean |x - mean|         p = infinity: spread = max |x - mean|       p = 2: the deviation

over the N examples and the positions. (Santurkar et al. 2018 divide by the norm before the mean is removed.) Of a
Gaussian channel the output's deviation is therefore not 1: it is sqrt(pi / 2) for p = 1 and about 1 / sqrt(2 ln N) for
p = infinity. Hoffer et al. multiply by the inverse of those factors (`gain`); behind ReLU the next norm cancels them,
behind other activations they count. Epsilon is added to the spread, outside of any root. Running averages of mean and
spread serve in evaluation, as in batch normalization.
"""

import math
from numbers import Real

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from bnjax import batch_norm
from bnjax.norms import common
from bnjax.theory import lp_norms
from bnjax.types import Norm

NAMES = {1: "l1", 2: "l2", math.inf: "linf"}


def lp(p: Real, *, gain: Real = 1.0, momentum: Real = 0.9, epsilon: ArrayLike = 1e-5) -> Norm:
    """Mean removed, divided by the spread of order p.

    Args:
      p: 1, 2 or infinity.
      gain: multiplies the normalized values, above 0.
      momentum: the weight of the OLD running value, in [0, 1].
      epsilon: added to the spread, >= 0; in units of x.

    Raises:
      ValueError: for a value out of range.
    """
    if p not in NAMES:
        raise ValueError(f"p must be 1, 2 or infinity, got {p}")
    batch_norm.check_epsilon(epsilon)
    common.check_momentum(momentum, optional=False)
    if not 0 < gain < math.inf:
        raise ValueError(f"gain must be above 0 and finite, got {gain}")

    def init(shape):
        stats = {"mean": jnp.zeros(shape[-1], jnp.float32), "spread": jnp.ones(shape[-1], jnp.float32)}
        return common.affine_init(shape[-1]), stats

    def apply(params, stats, x, *, train, mask=None):
        wide = common.as_float32(x)
        if train:
            unit, mean, centred, spread = _in_units(wide, p, mask, epsilon)
            count = math.prod(x.shape[:-1]) if mask is None else jnp.broadcast_to(mask, (*x.shape[:-1], 1)).sum()
            # One sample has a mean, and no spread.
            new = {"mean": (mean * unit, count > 0), "spread": (spread.reshape(-1) * unit, count > 1)}
            stats = {name: _averaged(stats[name], momentum, *one) for name, one in new.items()}
        else:
            unit, centred, spread = 1.0, wide - stats["mean"], stats["spread"].astype(wide.dtype)
        below = spread + epsilon * (1 / unit)
        y = centred * jnp.where(below > 0, gain / jnp.where(below > 0, below, 1), 0)
        if mask is not None:
            y = jnp.where(mask, y, 0)
        return common.affine(params, y, x.dtype), stats

    def growth(activation, num_features=None, batch_size=None):
        scale = gain / lp_norms.gaussian_spread(p, batch_size)
        return lp_norms.lp(activation, p, batch_size, scale=scale).growth

    config = {"norm": NAMES[p], "gain": gain, "epsilon": common.number(epsilon), "momentum": momentum}
    return Norm(init, apply, growth=growth, config=config)


def _averaged(old, momentum, new, enough):
    """A running value, moved towards the new one where there is one; a constant to the derivative."""
    moved = (momentum * old + (1 - momentum) * new).astype(old.dtype)
    return lax.stop_gradient(jnp.where(enough, moved, old))


def _in_units(x, p, mask, epsilon):
    """A unit [C] in which x is at most 2, and in it mean [C], centred values and spread, over all axes but the last.

    The mean is taken twice: what rounding left in the first one is removed by the second.
    """
    axes, valid = tuple(range(x.ndim - 1)), common.valid_entries(mask, x)
    if valid is not None:
        x = jnp.where(valid, x, 0)
    unit = common.unit_of(jnp.maximum(jnp.abs(x).max(axes, initial=0), epsilon))
    scaled = x * (1 / unit)
    first = common.mean_over(scaled, axes, valid)
    rest = common.mean_over(scaled - first, axes, valid)
    centred = scaled - first - rest
    if p == 1:
        spread = common.mean_over(jnp.abs(centred), axes, valid)
    elif p == 2:
        square = common.mean_over(jnp.square(centred), axes, valid)
        spread = square * batch_norm.reciprocal_sqrt(square)
    else:
        apart = jnp.abs(centred) if valid is None else jnp.where(valid, jnp.abs(centred), 0)
        spread = apart.max(axes, keepdims=True, initial=0)
    return unit, (first + rest).reshape(-1), centred, spread
