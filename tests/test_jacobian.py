"""The closed-form Jacobian against autodiff of the textbook formula and numpy's eigenvalues, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bnjax import batch_norm, jacobian


def textbook(x, scale, epsilon, mask):
    """The formula as it is written; a masked sample's output is 0."""
    n = mask.sum()
    mean = jnp.where(mask, x, 0).sum(0) / n
    var = jnp.where(mask, (x - mean) ** 2, 0).sum(0) / n
    return jnp.where(mask, scale * (x - mean) / jnp.sqrt(var + epsilon), 0)


def autodiff(x, scale, epsilon, mask):
    """[C, N, N]: jax.jacrev of the textbook formula, feature by feature."""
    full = jax.jacrev(textbook)(x, scale, epsilon, mask)  # [N, C, N, C]
    return jnp.einsum("icjc->cij", full)


@st.composite
def batches(draw):
    """A batch of which at least one sample is valid, with constant features, and scales of either sign and 0.

    Few shapes, since each is compiled.
    """
    n, c = draw(st.sampled_from([(1, 1), (2, 2), (3, 1), (7, 2)]))
    x = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(
        draw(st.floats(-9, 9)), 1.5, size=(n, c)
    )
    if draw(st.booleans()):
        x[:, 0] = draw(st.sampled_from([0.0, 0.1, -7e3]))
    scale = np.array(draw(st.lists(st.sampled_from([-2.0, -0.3, 0.0, 1.0, 5.0]), min_size=c, max_size=c)))
    valid = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    valid[draw(st.integers(0, n - 1))] = True
    return x, scale, draw(st.sampled_from([1e-5, 0.3, 2.0])), valid[:, None]


def tolerance(x, epsilon, mask):
    """1e-12 relative to 1 / sigma, [C]; times |scale| where that is above 1."""
    mean = (x * mask).sum(0) / mask.sum()
    var = (mask * (x - mean) ** 2).sum(0) / mask.sum()
    return 1e-12 / np.sqrt(var + epsilon)


@jax.jit
def compare(x, scale, epsilon, mask, dx):
    return (
        autodiff(x, scale, epsilon, mask),
        jacobian.dense(x, scale, epsilon, mask),
        jacobian.spectrum(x, scale, epsilon, mask),
        jacobian.matvec(x, scale, dx, epsilon, mask),
    )


@settings(max_examples=60, deadline=None)
@given(batches())
@example((np.array([[3.0]]), np.array([2.0]), 0.3, np.array([[True]])))
@example((np.array([[1.0], [2.0]]), np.array([-1.0]), 1e-5, np.array([[True], [True]])))
@example((np.array([[1.0], [2.0], [4.0]]), np.array([0.0]), 1e-5, np.array([[True], [False], [False]])))
def test_dense_spectrum_and_operator(batch):
    x, scale, epsilon, mask = batch
    with jax.enable_x64(True):
        n, c = x.shape
        bound = (tolerance(x, epsilon, mask) * np.maximum(np.abs(scale), 1))[:, None]
        dx = np.random.default_rng(0).normal(size=x.shape)
        expected, dense, found, product = map(np.asarray, compare(x, scale, epsilon, mask, dx))
        assert (np.abs(dense - expected) < bound[:, None]).all()
        assert found.shape == (c, n)
        assert (np.diff(found) >= 0).all()
        assert (np.abs(found - np.linalg.eigvalsh(expected)) < 10 * bound).all()

        assert (np.abs(product - np.einsum("cij,jc->ic", expected, dx)) < 10 * bound.T).all()


def test_multiplicities():
    x = np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)
    sigma = np.sqrt(x.var() + 0.5)
    zero, shrunk, *others = jacobian.spectrum(x, 2.0, 0.5)[0]
    assert zero == 0
    np.testing.assert_allclose(shrunk, 2 / sigma * 0.5 / sigma**2, rtol=1e-5)
    np.testing.assert_allclose(others, 4 * [2 / sigma], rtol=1e-5)
    np.testing.assert_allclose(jacobian.spectrum(x, -2.0, 0.5)[0], -jacobian.spectrum(x, 2.0, 0.5)[0, ::-1])


def test_eigenvectors():
    x = np.random.default_rng(1).normal(size=(9, 3)).astype(np.float32)
    x_hat = batch_norm.normalize(x, 0.2)
    assert jnp.abs(jacobian.matvec(x, 1.5, jnp.ones((9, 3)), 0.2)).max() < 1e-6
    factor = jacobian.spectrum(x, 1.5, 0.2)[:, 1]
    np.testing.assert_allclose(jacobian.matvec(x, 1.5, x_hat, 0.2), factor * x_hat, atol=1e-5)


def test_nothing_is_left_of_a_constant_feature_at_epsilon_0():
    x = np.full((4, 1), 3.0, np.float32)
    assert (jacobian.dense(x, 1.0, 0.0) == 0).all()
    assert (jacobian.spectrum(x, 1.0, 0.0) == 0).all()


def test_the_operator_forms_no_matrix():
    """N = 65,536: J would have 16 GiB; the program's memory is a few copies of x."""
    x = jnp.zeros((65_536, 1))
    program = jax.jit(lambda x, dx: jacobian.matvec(x, 1.0, dx)).lower(x, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 8 * x.nbytes


@pytest.mark.parametrize("function", [jacobian.dense, jacobian.spectrum])
def test_bad_input(function):
    with pytest.raises((ValueError, TypeError), match=r"\[N, C\]|n c"):
        function(jnp.ones(3))
    with pytest.raises(ValueError, match="epsilon must be >= 0"):
        function(jnp.ones((3, 2)), 1.0, -1.0)
