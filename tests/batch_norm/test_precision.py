"""Batches of any magnitude and far from zero, against extended precision; constant features; low precision."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import apply, batch, compiled, distance, draw, exact, exact_gradient

from bnjax import batch_norm
from bnjax.types import BatchNormParams


@compiled
def value_and_gradient(x, cotangent, epsilon, mask=None):
    y, pullback = jax.vjp(lambda x: batch_norm.normalize(x, epsilon, mask=mask), x)
    _, tangent = jax.jvp(lambda x: batch_norm.normalize(x, epsilon, mask=mask), (x,), (cotangent,))
    return y, pullback(cotangent)[0], tangent


@compiled
def gradient_along(x, weights):
    """At epsilon 0, and its derivative along x."""
    gradient = jax.grad(lambda x: (weights * batch_norm.normalize(x, 0.0)).sum())
    return jax.jvp(gradient, (x,), (x,))


@pytest.mark.parametrize("n", [64, 65_536])
@pytest.mark.parametrize("case", ["1e2", "1e4", "1e6", "outlier", "outlier far from zero"])
def test_inputs_far_from_zero(case, n):
    """Norm-wise. Some 2e-7, three roundings of float32, is what was seen; 1e-6 leaves room for other backends.

    E[x^2] - E[x]^2 fails at 1e4; differences to the first sample, at an outlier of 1e5.
    """
    x = batch(n, mean=float(case)) if case[0] == "1" else batch(n, mean=1e6 if "far" in case else 0.0)
    if "outlier" in case:
        x[0] += 1e5 if "far" not in case else 2e6
    g = batch(n, seed=1)
    y, gradient, tangent = value_and_gradient(x, g, 1e-5)
    assert distance(y, exact(x)[0]) < 1e-6
    for found in (gradient, tangent):
        assert distance(found, exact_gradient(x, g)) < 1e-6
    _, stats = apply(*batch_norm.init(8), x, train=True, momentum=0.0)
    np.testing.assert_allclose(stats.var, x.astype(np.float64).var(0), rtol=2e-6)
    np.testing.assert_allclose(stats.mean, x.astype(np.float64).mean(0), rtol=1e-6, atol=1e-6 * x.std())


@pytest.mark.parametrize("first", [0.0, 1e6, np.nan])
def test_first_sample_masked(first):
    x, g = batch(512, mean=1e4), batch(512, seed=1)
    x[0] = first
    mask = np.arange(512)[:, None] > 0
    y, gradient, tangent = value_and_gradient(x, g, 1e-5, mask)
    assert distance(y[1:], exact(x, valid=slice(1, None))[0]) < 1e-6
    for found in (gradient, tangent):
        assert distance(found[1:], exact_gradient(x, g, valid=slice(1, None))) < 1e-6
        assert (found[0] == 0).all()


@pytest.mark.parametrize("n", [2, 7, 4096])
@pytest.mark.parametrize("magnitude", [3e37, 1e30, 1e19, 1.0, 1e-19, 1e-30])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1e6])
def test_any_magnitude(magnitude, epsilon, n):
    """Values and first derivatives, the latter relative to cotangent / sigma; 4e-7 was seen."""
    x, g = batch(n, std=magnitude), batch(n, seed=1)
    y, gradient, tangent = value_and_gradient(x, g, epsilon)
    x_hat, sigma = exact(x, epsilon)
    assert distance(y, x_hat) < 1e-6
    for found in (gradient, tangent) if magnitude < 1e37 else ():  # there, derivatives are below 1e-38
        assert distance(found, exact_gradient(x, g, epsilon), g / sigma) < 1e-6


@pytest.mark.parametrize("magnitude", [1e30, 1e19, 1e-20, 1e-30])
def test_second_derivatives_at_any_magnitude(magnitude):
    """At epsilon 0 the gradient is homogeneous in x, of degree -1: its derivative along x is minus itself."""
    x, weights = batch(16, std=magnitude), batch(16, seed=1)
    gradient, found = gradient_along(x, weights)
    assert distance(found, -np.asarray(gradient, np.float64)) < 1e-5


@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_few_large_samples_that_cancel(magnitude):
    x = np.zeros((1000, 1), np.float32)
    x[[500, 700]] = [[magnitude], [-magnitude]]
    y, _, _ = value_and_gradient(x, x, 0.0)
    assert distance(y, exact(x, 0.0)[0]) < 1e-6


@pytest.mark.parametrize(("magnitude", "stored"), [(1e30, np.finfo(np.float32).max), (1e-30, 0.0)])
def test_the_stored_variance_saturates(magnitude, stored):
    x = batch(64, std=magnitude)
    y, stats = apply(*batch_norm.init(8), x, train=True, momentum=0.0, epsilon=0.0)
    assert distance(y, exact(x, 0.0)[0]) < 1e-6
    assert (stats.var == stored).all()
    np.testing.assert_allclose(stats.mean, x.astype(np.float64).mean(0), rtol=1e-5)


def test_forward_is_the_same_under_powers_of_two_bitwise():
    """For every k: BN(2^k W x) = BN(W x) at epsilon 0, and the gradient is divided by 2^k."""
    x, kernel, g = batch(64, 5), batch(5, 8, seed=1), batch(64, seed=2)

    @compiled
    def values(kernel):
        y, pullback = jax.vjp(lambda kernel: batch_norm.normalize(x @ kernel, 0.0), kernel)
        return y, pullback(g)[0]

    y, gradient = values(kernel)
    for k in range(-60, 61):
        scaled, found = values(kernel * np.float32(2.0**k))
        assert (scaled == y).all(), k
        assert (found * np.float32(2.0**k) == gradient).all(), k


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 25_088])
def test_a_constant_feature_is_exactly_zero(n):
    for epsilon in (0.0, 1e-5):
        x = np.tile(np.float32([0.1, 3e7, -7e3, 1e30, 1e-30, np.pi, -3.4e38, 0.0]), (n, 1))
        y, gradient, _ = value_and_gradient(x, batch(n), epsilon)
        assert (y == 0).all()
        assert np.isfinite(gradient).all()
        if epsilon == 0 or n == 1:
            assert (gradient == 0).all()


def test_a_constant_feature_gives_the_bias_and_no_gradient():
    params = BatchNormParams(np.float32([2.0]), np.float32([-0.5]))
    _, stats = batch_norm.init(1)

    @compiled
    def value_and_jacobian(x, epsilon):
        def layer(x):
            return batch_norm.apply(params, stats, x, train=True, epsilon=epsilon)[0]

        return layer(x), jax.jacrev(layer)(x)

    for value, epsilon in itertools.product((0.0, 0.1, 3e7), (0.0, 1e-5)):
        y, jacobian = value_and_jacobian(np.full((6, 1), value, np.float32), epsilon)
        assert (y == -0.5).all()
        if epsilon == 0:
            assert (jacobian == 0).all()
        else:  # x_hat = 0, so J = scale / sqrt(epsilon) (I - 1 1^T / N)
            expected = 2.0 / np.sqrt(1e-5) * (np.eye(6) - 1 / 6)
            np.testing.assert_allclose(jacobian[:, 0, :, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "mean", "std"), [("float16", 0.0, 300.0), ("bfloat16", 100.0, 1.0)])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("param", ["float32", "low"])
def test_low_precision_inputs(dtype, mean, std, train, param):
    """Right to the format, whose unit roundoff is half of `eps`: a variance of 300^2 is beyond float16."""
    x = draw((256, 3), mean=mean, std=std).astype(jnp.dtype(dtype))
    params, stats = batch_norm.init(3, dtype if param == "low" else "float32")
    _, stats = apply(params, stats, x, train=True, momentum=0.0)
    assert stats.mean.dtype == jnp.float32
    y, _ = apply(params, stats, x, train=train)
    assert y.dtype == dtype
    expected = exact(np.asarray(x, np.float64))[0].astype(np.float64)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0.51 * eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.bfloat16])
def test_gradients_of_low_precision_inputs_count_in_float32(dtype):
    """70,000 is beyond float16, and no number of bfloat16: a count in the input's type would be wrong."""
    x = draw((70_000, 1)).astype(dtype)
    weights = (5 + draw((70_000, 1), seed=1)).astype(dtype)

    @compiled
    def gradient(x, mask):
        return jax.grad(lambda x: (batch_norm.normalize(x, mask=mask) * weights.astype(x.dtype)).sum())(x)

    expected = np.asarray(gradient(x.astype(np.float32), None))
    for mask in (None, np.ones((70_000, 1), bool)):
        found = np.asarray(gradient(x, mask), np.float32)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 2 * jnp.finfo(dtype).eps
