"""Singular values of products of N independent n x n Gaussian matrices, entries of mean 0 and variance 1 / n.

For n -> infinity their squares follow the Fuss-Catalan law (Penson & Zyczkowski 2011; Alexeev, Goetze & Tikhomirov
2010); for N -> infinity their logarithms grow as N times the Lyapunov exponents (Newman 1986).
"""

import math

import numpy as np
import scipy.special

from bnjax import choices


def largest_singular_value(num_factors: int) -> float:
    """The largest singular value for n -> infinity, sqrt((N + 1)^(N + 1) / N^N): 2 for one factor.

    Args:
      num_factors: N, at least 1.

    Raises:
      ValueError: for another number.

    Example:
      >>> largest_singular_value(2) ** 2
      6.75
    """
    choices.check_count("num_factors", num_factors)
    n = int(num_factors)
    return math.sqrt((n + 1) * (1 + 1 / n) ** n)


def moment(num_factors: int, order: int) -> float:
    """The mean of singular values to the power 2k for n -> infinity: the Fuss-Catalan number.

    binomial((N + 1) k, k) / (N k + 1): 1 for k = 1, and N + 1 for k = 2.

    Args:
      num_factors: N, at least 1.
      order: k, at least 1.

    Raises:
      ValueError: for other numbers.
    """
    for name, value in {"num_factors": num_factors, "order": order}.items():
        choices.check_count(name, value)
    return math.comb((num_factors + 1) * order, order) / (num_factors * order + 1)


def lyapunov_exponents(width: int) -> np.ndarray:
    """Growth of the logarithms of the singular values per factor for N -> infinity, descending, [n].

    (log(2 / n) + psi((n - i + 1) / 2)) / 2 for i = 1, ..., n, with the digamma function psi (Newman 1986).

    Args:
      width: n, at least 1.

    Raises:
      ValueError: for another number.
    """
    choices.check_count("width", width)
    return (math.log(2 / width) + scipy.special.digamma(np.arange(width, 0, -1) / 2)) / 2
