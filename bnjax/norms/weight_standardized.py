"""Weight standardization (Qiao et al. 2019) with the gain of Brock, De & Smith 2021.

    w = scale gain (v - mean v) / sqrt(max(fan_in var v, epsilon)), mean and variance over the fan_in weights of a unit

so that a unit's weights have mean 0 and, above the floor of epsilon, length gain. Qiao et al. leave out fan_in and the
gain, and have a norm of activations behind it; Brock et al. divide by sqrt(fan_in) and choose the gain
1 / sqrt(Var phi(z)), z ~ N(0, 1), which keeps variance from layer to layer; their learnable scale is one per unit, as
here.
"""

import functools
import math
from numbers import Real

import jax.numpy as jnp

from bnjax import batch_norm
from bnjax.norms import common
from bnjax.theory import norm_growth
from bnjax.types import Norm


def weight_standardized(*, gain: Real | str = "relu", epsilon: Real = 1e-4) -> Norm:
    """Weight standardization.

    Args:
      gain: a number above 0, or the name of an activation, for the gain that keeps its variance.
      epsilon: a floor of fan_in times the variance of the weights, >= 0, as in the code of Brock et al. He's weights
        are above it from an init_scale of sqrt(epsilon / 2) on.

    Raises:
      ValueError: for an unknown name or a value out of range.
    """
    batch_norm.check_epsilon(epsilon)
    factor = gain_of(gain) if isinstance(gain, str) else float(gain)
    if not 0 < factor < math.inf:
        raise ValueError(f"gain must be above 0 and finite, or the name of an activation; got {gain}")

    def init(shape):
        return {"scale": jnp.ones(shape[-1], jnp.float32)}, {}

    def kernel(params, kernel):
        fan_in = math.prod(kernel.shape[:-1])
        standard, inverse = batch_norm.standardize(common.as_float32(kernel).reshape(fan_in, -1), 0.0)
        if epsilon > 0:
            positive = inverse > 0
            deviation = jnp.where(positive, 1 / jnp.where(positive, inverse, 1), 0)
            standard = standard * jnp.minimum(1, deviation * math.sqrt(fan_in / epsilon))
        standard = standard * params["scale"] * (factor / math.sqrt(fan_in))
        return standard.reshape(kernel.shape).astype(kernel.dtype)

    def growth(activation, num_features=None, batch_size=None):
        return norm_growth.weight_standardized(activation, factor)

    config = {"norm": "weight_standardized", "gain": gain, "epsilon": common.number(epsilon)}
    return Norm(init, kernel=kernel, growth=growth, config=config)


@functools.cache
def gain_of(activation: str) -> float:
    """1 / sqrt(Var phi(z)), z ~ N(0, 1): sqrt(2 / (1 - 1 / pi)) for ReLU.

    Raises:
      ValueError: for an unknown name.
    """
    return 1 / math.sqrt(norm_growth.layer("batch", activation).variance)
