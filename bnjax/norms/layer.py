"""Layer normalization (Ba, Kiros & Hinton 2016): each example by its own mean and variance.

    y = scale (x - mean) / sqrt(var + epsilon) + bias, mean and variance over the features of one example

Where conventions differ: of an image the statistics are over positions and channels, as in Wu & He 2018 (group
normalization with one group) and PyTorch's `LayerNorm([C, H, W])`; with `per_position` over the channels of one
position, as in Flax, in Transformers and in ConvNeXt. Scale and bias are one per channel. Flax's and Keras's epsilon
are 1e-6 and 1e-3; 1e-5 here is PyTorch's. Training and evaluation are the same.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike

from bnjax import batch_norm
from bnjax.norms import common
from bnjax.theory import norm_growth
from bnjax.types import Norm


def layer(*, epsilon: ArrayLike = 1e-5, per_position: bool = False) -> Norm:
    """Layer normalization.

    Args:
      epsilon: added to the variance, >= 0.
      per_position: statistics over the channels of one position only, where x is [N, ..., C] with positions.

    Raises:
      ValueError: for an epsilon out of range.
    """
    batch_norm.check_epsilon(epsilon)

    def init(shape):
        return common.affine_init(shape[-1]), {}

    def apply(params, stats, x, *, train, mask=None):
        if per_position:
            valid = common.valid_entries(mask, x)
            flat = (x if valid is None else jnp.where(valid, x, 0)).reshape(-1, x.shape[-1])
            standard = common.standardize_examples(flat, epsilon, None, None).reshape(x.shape)
            standard = standard if valid is None else jnp.where(valid, standard, 0)
        else:
            standard = common.standardize_examples(x, epsilon, None, mask)
        return common.affine(params, standard, x.dtype), stats

    def growth(activation, num_features=None, batch_size=None):
        return norm_growth.growth("layer", activation, num_features=num_features)

    config = {"norm": "layer", "epsilon": common.number(epsilon)} | ({"per_position": True} if per_position else {})
    return Norm(init, apply, growth=growth, config=config)
