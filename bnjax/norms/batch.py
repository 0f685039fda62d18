"""Batch normalization (Ioffe & Szegedy 2015) as a `Norm`: y = scale (x - mean) / sqrt(var + epsilon) + bias.

Mean and variance are a channel's over the batch, and over the positions of an image; in evaluation the running ones.
Equation, derivative and rival conventions: `bnjax.batch_norm`.
"""

from collections.abc import Sequence
from numbers import Real

from jax.typing import ArrayLike

from bnjax import batch_norm
from bnjax.norms import common
from bnjax.theory import mean_field, norm_growth
from bnjax.types import Norm


def batch(*, epsilon: ArrayLike = 1e-5, momentum: Real | None = 0.9, detach: Sequence[str] = ()) -> Norm:
    """Batch normalization.

    Args:
      epsilon: added to the variance, >= 0. It may be traced.
      momentum: the weight of the OLD running value, in [0, 1]; None: the plain average over all batches.
      detach: the batch statistics, "mean" and "var", that are constants to the derivative.

    Raises:
      ValueError: for a value out of range.
    """
    batch_norm.check_epsilon(epsilon)
    batch_norm.check_detach(detach)
    common.check_momentum(momentum)

    def init(shape):
        return batch_norm.init(shape[-1])

    def apply(params, stats, x, *, train, mask=None):
        return batch_norm.apply(
            params, stats, x, train=train, momentum=momentum, epsilon=epsilon, mask=mask, detach=detach
        )

    def growth(activation, num_features=None, batch_size=None):
        if detach:
            return norm_growth.detached_batch(activation, batch_size) if len({*detach}) == 2 else None
        return mean_field.gradient_growth(activation, batch_size)

    config = {"norm": "batch", "epsilon": common.number(epsilon), "momentum": momentum}
    return Norm(init, apply, growth=growth, config=config | ({"detach": list(detach)} if detach else {}))
