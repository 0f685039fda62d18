"""Root mean square normalization (Zhang & Sennrich 2019): each example by its own root mean square; no mean is removed.

    y = scale x / sqrt(mean x^2 + epsilon)          d y / d x = scale (I - x_hat x_hat^T / M) / rms

over the M entries of one example, positions included (Flax and Transformers: of one position; here `per_position`).
As in the paper there is no bias by default. Training and evaluation are the same.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike

from bnjax import batch_norm
from bnjax.norms import common
from bnjax.theory import norm_growth
from bnjax.types import Norm


def rms(*, epsilon: ArrayLike = 1e-5, use_bias: bool = False, per_position: bool = False) -> Norm:
    """Root mean square normalization.

    Args:
      epsilon: added to the mean square, >= 0.
      use_bias: also learn a bias.
      per_position: over the channels of one position only.

    Raises:
      ValueError: for an epsilon out of range.
    """
    batch_norm.check_epsilon(epsilon)

    def init(shape):
        return common.affine_init(shape[-1], use_bias=use_bias), {}

    def apply(params, stats, x, *, train, mask=None):
        axes = (x.ndim - 1,) if per_position else tuple(range(1, x.ndim))
        wide = common.as_float32(x)
        valid = common.valid_entries(mask, x)
        if valid is not None:
            wide = jnp.where(valid, wide, 0)
        magnitude = jnp.abs(wide).max(axes, keepdims=True, initial=0)
        per_unit = 1 / common.unit_of(jnp.maximum(magnitude, epsilon**0.5))
        scaled = wide * per_unit  # no square of it overflows or vanishes
        square = common.mean_over(jnp.square(scaled), axes, valid)
        inverse = batch_norm.reciprocal_sqrt(square + epsilon * per_unit * per_unit)
        return common.affine(params, scaled * inverse, x.dtype), stats

    def growth(activation, num_features=None, batch_size=None):
        return norm_growth.growth("rms", activation, num_features=num_features)

    config = {"norm": "rms", "epsilon": common.number(epsilon)}
    options = {"use_bias": use_bias, "per_position": per_position}
    return Norm(init, apply, growth=growth, config=config | {name: True for name, one in options.items() if one})
