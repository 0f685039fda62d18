"""Weight normalization (Salimans & Kingma 2016): a kernel's direction and length apart.

    w = g v / |v|, for the weights v of each unit; g starts at 1

so that `init_scale`, which multiplies v, changes no output. With `data_dependent`, as in section 3 of the paper, the
first batch sets g and the layer's bias such that each unit has mean 0 and deviation 1 over it.

Where conventions differ: PyTorch starts g at |v|, which keeps the drawn kernel, and with it the scale; Flax starts g
at 1, as here.
"""

import jax.numpy as jnp

from bnjax import batch_norm
from bnjax.norms import common
from bnjax.theory import norm_growth
from bnjax.types import Norm


def weight(*, data_dependent: bool = False) -> Norm:
    """Weight normalization.

    Args:
      data_dependent: let the first batch set g and the bias.
    """

    def init(shape):
        return {"scale": jnp.ones(shape[-1], jnp.float32)}, {}

    def kernel(params, kernel):
        axes = tuple(range(kernel.ndim - 1))
        wide = common.as_float32(kernel)
        scaled = wide / common.unit_of(jnp.abs(wide).max(axes))
        length = batch_norm.reciprocal_sqrt(jnp.square(scaled).sum(axes))
        return (scaled * (length * params["scale"])).astype(kernel.dtype)

    def prepare(params, stats, x):
        wide = common.as_float32(x)
        _, inverse = batch_norm.standardize(wide, 0.0)
        inverse = inverse.reshape(-1)
        return {"scale": jnp.where(inverse > 0, params["scale"] * inverse, params["scale"])}, stats

    def growth(activation, num_features=None, batch_size=None):
        if data_dependent:
            return norm_growth.detached_batch(activation, batch_size)
        return norm_growth.growth("weight", activation)

    config = {"norm": "weight"} | ({"data_dependent": True} if data_dependent else {})
    return Norm(init, None, kernel, prepare if data_dependent else None, growth, config)
