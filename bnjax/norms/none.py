"""No normalization: the network of the same shape to compare with."""

from collections.abc import Sequence
from numbers import Real

from bnjax import batch_norm
from bnjax.types import Norm


def none(*, epsilon: Real = 1e-5, momentum: Real | None = 0.9, detach: Sequence[str] = ()) -> Norm:
    """The norm that does nothing. It takes the options of `batch`, so that one call can stand for both.

    Raises:
      ValueError: for options that `batch` would not take.
    """
    del momentum
    batch_norm.check_epsilon(epsilon)
    batch_norm.check_detach(detach)
    return Norm(lambda shape: ({}, {}), config={"norm": "none"})
