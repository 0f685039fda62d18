"""The depth that a growth per layer of the squared gradient norm leaves room for."""

import math
from numbers import Real

from bnjax import choices


def depth_scale(growth: Real) -> float:
    """Layers in which the squared gradient norm changes by a factor e: 1 / |ln growth|, infinite at growth 1.

    Args:
      growth: per layer, of the squared norm (`gradient_growth`, chi_1).

    Raises:
      ValueError: unless growth is above 0 and finite.
    """
    choices.check_positive("growth", growth)
    rate = abs(math.log(growth))
    return 1 / rate if rate > 1e-7 else math.inf


def depth_at_ratio(growth: Real, ratio: Real) -> float:
    """The depth L over which the squared gradient norm changes by the factor `ratio`: growth^L = ratio or 1 / ratio.

    L = ln(ratio) depth_scale(growth) is exact in the mean-field limit. At which ratio training stops is NOT a
    theorem: it depends on the task, the optimizer and the number of steps. Without batch normalization, the rule of
    thumb of Schoenholz et al. 2017 is some 6 depth scales xi_c; the same number of gradient's depth scales is a
    ratio of e^6 = 403. What float32 can hold ends at a ratio of some 1e76 for squared norms.

    Args:
      growth: per layer, of the squared norm.
      ratio: above 1.

    Returns:
      A number of layers; infinite at growth 1.

    Raises:
      ValueError: for a growth that is not positive and finite or a ratio that is not above 1 and finite.
    """
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio must be above 1 and finite, got {ratio}")
    return math.log(ratio) * depth_scale(growth)
