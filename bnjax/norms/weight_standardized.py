"""Weight standardization (Qiao et al. 2019) with the gain of Brock, De & Smith 2021.

    w = scale gain (v - mean v) / (sqrt(fan_in var v + epsilon)), mean and variance over the fan_in weights of a unit

so that a unit's weights have mean 0 and length gain. Qiao et al. leave out fan_in and the gain, and have a norm of
activations behind it; Brock et al. divide by sqrt(fan_in) and choose the gain 1 / sqrt(Var phi(z)), z ~ N(0, 1), which
keeps variance from layer to layer; their learnable scale is one per unit, as here.
"""

import functools
import math
from numbers import Real

import jax.numpy as jnp
import numpy as np

from bnjax import batch_norm
from bnjax.norms import common
from bnjax.theory import norm_growth, quadrature
from bnjax.types import Norm


def weight_standardized(*, gain: Real | str = "relu", epsilon: Real = 1e-4) -> Norm:
    """Weight standardization.

    Args:
      gain: a number above 0, or the name of an activation, for the gain that keeps its variance.
      epsilon: added to fan_in times the variance of the weights, >= 0; as Brock et al. have it.

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
        standard = batch_norm.normalize(common.as_float32(kernel).reshape(fan_in, -1), epsilon / fan_in)
        standard = standard * params["scale"] * (factor / math.sqrt(fan_in))
        return standard.reshape(kernel.shape).astype(kernel.dtype)

    def growth(activation, num_features=None, batch_size=None):
        return norm_growth.weight_standardized(activation, factor)

    return Norm(
        init, kernel=kernel, growth=growth, config={"norm": "weight_standardized", "gain": gain, "epsilon": epsilon}
    )


@functools.cache
def gain_of(activation: str) -> float:
    """1 / sqrt(Var phi(z)), z ~ N(0, 1): sqrt(2 / (1 - 1 / pi)) for ReLU.

    Raises:
      ValueError: for an unknown name.
    """
    psi = quadrature.on_batch(activation, None, 1.0, 0.0)
    variance = quadrature.moments(psi, None, np.ones(1))[0, 0]
    return float(1 / math.sqrt(variance))
