"""Products of Gaussian matrices: closed forms against one another, quadrature and samples."""

import math

import numpy as np
import pytest

from bnjax.theory import random_matrices


@pytest.mark.parametrize("num_factors", [1, 2, 3, 5])
def test_the_edge_is_the_growth_of_the_moments(num_factors):
    """Moments grow as the largest value to the power 2k, times k^(-3/2)."""
    k = 2000
    growth = math.exp(
        math.lgamma((num_factors + 1) * k + 1)
        - math.lgamma(k + 1)
        - math.lgamma(num_factors * k + 2)
        - (math.lgamma((num_factors + 1) * (k - 1) + 1) - math.lgamma(k) - math.lgamma(num_factors * (k - 1) + 2))
    )
    edge = random_matrices.largest_singular_value(num_factors) ** 2
    assert growth * (1 + 1.5 / k) == pytest.approx(edge, rel=1e-5)


def test_one_factor_is_the_quarter_circle():
    """Of density sqrt(4 - s^2) / pi on [0, 2], whose moments are the Catalan numbers."""
    assert random_matrices.largest_singular_value(1) == 2
    s, weights = np.polynomial.legendre.leggauss(200)
    s, weights = s + 1, weights * np.sqrt(4 - (s + 1) ** 2) / np.pi
    for order, catalan in enumerate((1, 2, 5, 14), start=1):
        assert random_matrices.moment(1, order) == catalan
        assert (weights * s ** (2 * order)).sum() == pytest.approx(catalan, rel=1e-5)


def test_moments_against_samples():
    """The mean of s^4 of 400 products of 3 matrices 40 x 40, within 4 standard errors (1e-4) of the exact one."""

    def exact(width):
        """E tr(M^2) / n and E (tr M)^2 / n^2 of M = P P^T, factor by factor, by Wick's theorem."""
        square, trace = 1.0, 1.0
        for _ in range(3):
            square, trace = square * (1 + 1 / width) + trace, trace + 2 * square / width**2
        return square

    draws = np.random.default_rng(0).normal(size=(3, 400, 40, 40)) / math.sqrt(40)
    found = (np.linalg.svd(draws[0] @ draws[1] @ draws[2], compute_uv=False) ** 4).mean(1)
    assert abs(found.mean() - exact(40)) < 4 * found.std() / math.sqrt(400)
    assert exact(1e9) == pytest.approx(random_matrices.moment(3, 2), rel=1e-8)


def test_exponents_sum_to_the_mean_logarithm_of_the_determinant():
    """E log |det G| of 20,000 matrices 4 x 4: its standard error is 0.008; within 4 of them (1e-4)."""
    draws = np.random.default_rng(0).normal(size=(20_000, 4, 4)) / 2
    logs = np.linalg.slogdet(draws)[1]
    error = logs.std() / math.sqrt(len(logs))
    assert abs(logs.mean() - random_matrices.lyapunov_exponents(4).sum()) < 4 * error
    assert (np.diff(random_matrices.lyapunov_exponents(10)) < 0).all()


@pytest.mark.parametrize("value", [0, -1, True])
def test_refused(value):
    for function in (random_matrices.largest_singular_value, random_matrices.lyapunov_exponents):
        with pytest.raises(ValueError, match="must be a positive integer"):
            function(value)
    with pytest.raises(ValueError, match="order must be a positive integer"):
        random_matrices.moment(1, value)
