"""Integrals of activations: against closed forms and the trapezoidal rule; functions that cannot be integrated."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import activations
from bnjax.theory import mean_field, quadrature

# The trapezoidal rule, which is exact to rounding for what is analytic and vanishes at both ends.
U = np.linspace(-10, 10, 201)
DENSITY = np.exp(-(U**2) / 2) / np.exp(-(U**2) / 2).sum()
SMOOTH = {
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: 1 / (2 * np.cosh(z / 2)) ** 2),
    "softplus": (lambda z: np.log1p(np.exp(z)), lambda z: 1 / (1 + np.exp(-z))),
}


@pytest.mark.parametrize("batch_size", [None, 4, 5, 6, 9, 64, np.int64(1000), 10**6])
@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_quadrature_is_the_closed_form(activation, batch_size):
    phi = activations.get(activation)
    assert mean_field.gradient_growth(lambda z: 3 * phi(z) - 1, batch_size) == pytest.approx(
        mean_field.gradient_growth(activation, batch_size), rel=1e-9
    )


@pytest.mark.parametrize(("scale", "bias"), [(1, 0), (-0.7, 0.4), (2, -1)])
@pytest.mark.parametrize("activation", SMOOTH)
def test_infinite_batch_by_the_trapezoidal_rule(activation, scale, bias):
    phi, dphi = SMOOTH[activation]
    values, slopes = phi(scale * U + bias), scale * dphi(scale * U + bias)
    expected = DENSITY @ slopes**2 / (DENSITY @ (values - DENSITY @ values) ** 2)
    found = mean_field.gradient_growth(activation, scale=scale, bias=bias)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found > 1


def test_kinks_away_from_zero():
    """hard_tanh: E[phi'^2] = P(|u| < 1) = p, and its variance p - 2 density(1) + (1 - p)."""
    p, density = math.erf(math.sqrt(0.5)), math.exp(-0.5) / math.sqrt(2 * math.pi)
    expected = p / (p - 2 * density + (1 - p))
    assert mean_field.gradient_growth(jax.nn.hard_tanh) == pytest.approx(expected, rel=1e-9)
    shifted = mean_field.gradient_growth(jax.nn.relu6, 9, bias=3, scale=3)
    assert shifted == pytest.approx(mean_field.gradient_growth(jax.nn.hard_tanh, 9), rel=1e-9)


def test_square():
    """By hand: Var z^2 = 2, E[(2 z)^2] = 4."""
    assert mean_field.gradient_growth(jnp.square) == pytest.approx(2, rel=1e-12)


def test_a_callable_that_cannot_be_hashed():
    class Prelu:
        __hash__ = None

        def __call__(self, z):
            return jnp.where(z > 0, z, 0.01 * z)

    assert mean_field.gradient_growth(Prelu(), 7) == pytest.approx(
        mean_field.gradient_growth("leaky_relu", 7), rel=1e-12
    )


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        (jax.nn.softmax, "not elementwise"),
        (jnp.cumsum, "not elementwise"),
        (jnp.sort, "not elementwise"),
        (lambda z: z * jnp.arange(z.size), "not elementwise"),
        (jnp.sum, "another shape"),
        (lambda z: z[None], "another shape"),
        (lambda z: z > 0, "another shape or type"),
        (np.tanh, "must be an elementwise JAX function"),
        (lambda z, w: z, "must be an elementwise JAX function"),
        (jnp.log, r"not finite at -.*within the quadrature's range \["),
        (lambda z: jnp.exp(jnp.exp(z)), "not finite at"),
        (lambda z: jnp.exp(z * z / 3), "grows too fast"),
        (jnp.sign, "derivative does not fit it"),
        (jnp.round, "derivative does not fit it"),
        (lambda z: jnp.where(z > 0.3, z + 1, 0.0), "jumps at 0.3"),
        (lambda z: z + jax.lax.stop_gradient(jnp.round(z) - z), "derivative does not fit it"),
        (lambda z: 0 * z + 2, "constant on the quadrature's range"),
        (lambda z: jnp.sqrt(jnp.abs(z)), "do not converge"),
        (lambda z: jnp.abs(jnp.sin(100 * z)), "cannot be integrated"),
    ],
)
def test_functions(phi, message):
    with pytest.raises(ValueError, match=message):
        mean_field.gradient_growth(phi)


def test_range_of_a_finite_batch():
    """At B = 5 BN's outputs lie within 2 of 0, where log(z + 2.5) is finite."""
    assert mean_field.gradient_growth(lambda z: jnp.log(z + 2.5), 5) > 1
    with pytest.raises(ValueError, match=r"not finite at .* range \[-2\.999, 3\]"):
        mean_field.gradient_growth(lambda z: jnp.log(z + 2.5), 10)


def test_normal_distribution_with_kinks():
    """E |u - 0.3|^3 = 1.7257..., by the trapezoidal rule of a thousand times as many nodes."""
    u, weights = quadrature.gaussian(np.array([0.3]), 24)
    fine = np.linspace(-10, 10, 200_001)
    expected = (np.abs(fine - 0.3) ** 3 * np.exp(-(fine**2) / 2)).sum() * (fine[1] - fine[0])
    assert weights @ np.abs(u - 0.3) ** 3 == pytest.approx(expected, rel=1e-10)


def test_interpolant():
    """One that goes on with (rho - 0.4)^1.5 from an edge."""

    def function(rho):
        return np.stack([np.exp(rho), 1 + np.maximum(rho - 0.4, 0) ** 1.5])

    rho = np.linspace(0, 1, 77)
    found = quadrature.interpolant(function, np.array([0, 0.4, 1]))(rho)
    np.testing.assert_allclose(found, function(rho), rtol=1e-7)
    with pytest.raises(ValueError, match="do not converge as functions of the signal's size"):
        quadrature.interpolant(lambda rho: np.stack([rho > 0.3, rho]), np.array([0, 1]))


def test_kept():
    """One call for equal arguments; each call for what cannot be hashed."""
    calls = []
    function = quadrature.kept(lambda *arguments: calls.append(arguments))
    for arguments in [("relu", 4), ("relu", 4), ([1],), ([1],)]:
        function(*arguments)
    assert calls == [("relu", 4), ([1],), ([1],)]
