"""No normalization: the network of the same shape to compare with."""

from collections.abc import Sequence
from numbers import Real

from jax.typing import ArrayLike

from bnjax import batch_norm
from bnjax.norms import common
from bnjax.theory import norm_growth
from bnjax.types import Norm


def none(*, epsilon: ArrayLike = 1e-5, momentum: Real | None = 0.9, detach: Sequence[str] = ()) -> Norm:
    """The norm that does nothing. It takes the options of `batch`, so that one call can stand for both.

    Raises:
      ValueError: for options that `batch` would not take.
    """
    common.check_momentum(momentum)
    batch_norm.check_epsilon(epsilon)
    batch_norm.check_detach(detach)

    def growth(activation, num_features=None, batch_size=None):
        return norm_growth.growth("none", activation)

    return Norm(lambda shape: ({}, {}), growth=growth, config={"norm": "none"})
