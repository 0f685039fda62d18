"""The closed-form Jacobian against autodiff of the textbook formula and numpy's eigenvalues, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bnjax import batch_norm, jacobian
from bnjax.types import BatchNormParams, BatchStats
from experiments.jacobian_check import jacobian as check
from experiments.jacobian_check.jacobian import textbook


def autodiff_hvp(x, a, dx, epsilon, mask):
    """The Hessian of <a, textbook(x)>, formed by jax.hessian, times dx."""
    hessian = jax.hessian(lambda x: (jnp.where(mask, a, 0) * textbook(x, 1.0, epsilon, mask)).sum())(x)
    return jnp.einsum("icjd,jd->ic", hessian, dx)


def autodiff(x, scale, epsilon, mask):
    """[C, N, N]: jax.jacrev of the textbook formula, feature by feature."""
    full = jax.jacrev(textbook)(x, scale, epsilon, mask)  # [N, C, N, C]
    return jnp.einsum("icjc->cij", full)


@st.composite
def batches(draw):
    """A batch of which at least one sample is valid, with constant features, and scales of either sign and 0.

    Few shapes, since each is compiled.
    """
    n, c = draw(st.sampled_from([(1, 1), (2, 2), (3, 1), (7, 2), (12, 3)]))
    x = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(draw(st.floats(-9, 9)), 1.5, size=(n, c))
    constant = draw(st.booleans())
    if constant:
        x[:, 0] = draw(st.sampled_from([0.0, 0.1, -7e3]))
    scale = np.array(draw(st.lists(st.sampled_from([-2.0, -0.3, 0.0, 1.0, 5.0]), min_size=c, max_size=c)))
    valid = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    valid[draw(st.integers(0, n - 1))] = True
    varies = valid.sum() > 1 and not constant  # where not, the textbook formula is 0 / 0 at epsilon 0
    return x, scale, draw(st.sampled_from([1e-5, 0.3, 2.0, *([0.0] if varies else [])])), valid[:, None]


def tolerance(x, epsilon, mask):
    """1e-12 relative to 1 / sigma, [C]."""
    mean = (x * mask).sum(0) / mask.sum()
    var = (mask * (x - mean) ** 2).sum(0) / mask.sum()
    return 1e-12 / np.sqrt(var + epsilon)


@jax.jit
def compare(x, scale, epsilon, mask, dx):
    def ours(x):
        return scale * batch_norm.normalize(x, epsilon, mask=mask)

    by_rule = (jnp.einsum("icjc->cij", jacobian_of(ours)(x)) for jacobian_of in (jax.jacfwd, jax.jacrev))
    return (
        autodiff(x, scale, epsilon, mask),
        *by_rule,
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
        bound = (tolerance(x, epsilon, mask) * np.abs(scale))[:, None]
        dx = np.random.default_rng(0).normal(size=x.shape)
        expected, *matrices, found, product = map(np.asarray, compare(x, scale, epsilon, mask, dx))
        for matrix in matrices:  # by jacfwd, by jacrev, dense
            assert (np.abs(matrix - expected) <= bound[:, None]).all()
        assert found.shape == (c, n)
        assert (np.diff(found) >= 0).all()
        assert (np.abs(found - np.linalg.eigvalsh(expected)) <= bound).all()
        assert (np.abs(product - np.einsum("cij,jc->ic", expected, dx)) <= bound.T * np.abs(dx).sum()).all()


@jax.jit
def compare_second(x, epsilon, mask, a, dx):
    return autodiff_hvp(x, a, dx, epsilon, mask), jacobian.hvp(x, a, dx, epsilon, mask)


@settings(max_examples=60, deadline=None)
@given(batches())
@example((np.array([[3.0]]), np.array([2.0]), 0.3, np.array([[True]])))
@example((np.array([[1.0], [2.0]]), np.array([1.0]), 1e-5, np.array([[True], [True]])))
def test_hessian_vector_product(batch):
    """Relative to 1 / sigma^2, which its terms are made of; they cancel down to less."""
    x, _, epsilon, mask = batch
    with jax.enable_x64(True):
        a, dx = np.random.default_rng(1).normal(size=(2, *x.shape))
        expected, found = map(np.asarray, compare_second(x, epsilon, mask, a, dx))
        bound = 1e12 * tolerance(x, epsilon, mask) ** 2 * np.abs(a).sum() * np.abs(dx).sum()
        assert (np.abs(found - expected) <= bound).all()
        assert (found[~mask[:, 0]] == 0).all()


@pytest.mark.usefixtures("x64")
def test_hessian_vector_product_is_the_derivative_of_the_operator():
    """Against our own rule differentiated again, and with NaN where it is masked."""
    rng = np.random.default_rng(0)
    x, a, dx = rng.normal(size=(3, 9, 2))
    mask = np.arange(9)[:, None] % 4 > 0

    def pullback(x):
        return jacobian.matvec(x, 1.0, a, 0.1, mask)

    @jax.jit
    def both(x, filled):
        return jax.jvp(pullback, (x,), (dx,))[1], jacobian.hvp(filled, a, dx, 0.1, mask)

    expected, found = both(x, np.where(mask, x, np.nan))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_hvp_of_a_whole_loss():
    """H dx of L(normalize(x)) is hvp at dL, plus J L'' J dx, as the docstring has it. float32: 1e-5."""
    rng = np.random.default_rng(0)
    x, dx = rng.normal(size=(2, 8, 3)).astype(np.float32)

    @jax.jit
    def both(x, dx):
        x_hat = batch_norm.normalize(x)
        inner = -jnp.sin(x_hat) * jacobian.matvec(x, 1.0, dx)
        found = jacobian.hvp(x, jnp.cos(x_hat), dx) + jacobian.matvec(x, 1.0, inner)
        return jax.jvp(jax.grad(lambda x: jnp.sin(batch_norm.normalize(x)).sum()), (x,), (dx,))[1], found

    expected, found = both(x, dx)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("masked", [0, 1])
def test_float32_of_the_script(masked):
    """Each of the forms that it compares: rounding of float32 is 6e-8, and the largest error some 1e-6."""
    found = check.errors(check.Settings(samples=5, masked=masked), "float32")
    assert len(found) == len(check.FORMS)
    assert 0 < max(found) < 1e-5


@pytest.mark.usefixtures("x64")
def test_parameters():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(7, 3)), np.arange(7)[:, None] != 2
    params, (_, stats) = BatchNormParams(rng.normal(size=3), rng.normal(size=3)), batch_norm.init(3, x.dtype)

    @jax.jit
    def both(params):
        autodiff = jax.jacrev(lambda p: batch_norm.apply(p, stats, x, train=True, epsilon=0.1, mask=mask)[0])
        return autodiff(params), jacobian.parameters(x, 0.1, mask)

    for a, f in zip(*jax.device_get(both(params)), strict=True):
        np.testing.assert_allclose(np.einsum("icc->ic", a), f, atol=1e-14)
        assert abs(np.abs(a).sum() - np.abs(f).sum()) < 1e-12  # nothing off the diagonal


@pytest.mark.usefixtures("x64")
def test_evaluation_mode():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3))
    params = BatchNormParams(np.array([2.0, -0.5, 1.0]), rng.normal(size=3))
    stats = BatchStats(rng.normal(size=3), np.array([0.2, 3.0, 0.0]), jnp.int32(1))
    found = np.asarray(jacobian.evaluation(params.scale, stats.var, 1e-3))
    np.testing.assert_allclose(found, params.scale / np.sqrt(stats.var + 1e-3), rtol=1e-14)
    autodiff = jax.jit(jax.jacrev(lambda x: batch_norm.apply(params, stats, x, train=False, epsilon=1e-3)[0]))(x)
    expected = np.einsum("ij,cd,c->icjd", np.eye(5), np.eye(3), found)
    np.testing.assert_allclose(autodiff, expected, atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("activation", "masked"),
    [
        (jnp.tanh, True),
        pytest.param(jax.nn.relu, False, marks=pytest.mark.slow),
        pytest.param(jax.nn.sigmoid, True, marks=pytest.mark.slow),
    ],
)
def test_block(activation, masked):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(6, 4)), rng.normal(size=(4, 3))
    scale, bias = np.array([1.5, -0.7, 0.0]), np.array([0.1, -0.2, 0.3])
    mask = np.arange(6)[:, None] != 1 if masked else np.ones((6, 1), bool)

    def layer(x, kernel):
        return activation(textbook(x @ kernel, scale, 0.01, mask) + bias)

    @jax.jit
    def both(x, filled, kernel):
        found = jacobian.block(filled, kernel, scale, bias, activation, 0.01, mask if masked else None)
        return jax.jacrev(layer, argnums=(0, 1))(x, kernel), found

    expected, found = jax.device_get(both(x, np.where(mask, x, np.nan), kernel))
    bound = 1e-12 * 1.5 / np.sqrt(0.01)
    assert np.abs(found.x - expected[0]).max() < bound
    assert np.abs(found.kernel - np.einsum("ifdf->ifd", expected[1])).max() < bound
    off = expected[1] * (1 - np.eye(3))[None, :, None]
    assert (off == 0).all()


@pytest.mark.slow
def test_block_far_from_zero():
    """Against float64 by its own centring: 1e4 standard deviations from zero, to float32's rounding."""
    x = (1e4 + np.random.default_rng(0).normal(size=(32, 4))).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    block = jax.jit(functools.partial(jacobian.block, activation=jnp.tanh))
    found = block(x, kernel)
    with jax.enable_x64(True):
        expected = block(x.astype(np.float64) - 1e4, kernel.astype(np.float64))
    for f, e in zip(found, expected, strict=True):
        assert np.abs(np.asarray(f) - np.asarray(e)).max() < 1e-6 * np.abs(np.asarray(e)).max()


@pytest.mark.slow
def test_block_under_scaled_weights():
    """At epsilon 0 and a = 4, exactly: the derivative to x stays, that to W is divided by a."""
    x, kernel = (np.random.default_rng(s).normal(size=(5, 5)).astype(np.float32) for s in (0, 1))
    small, large = (jacobian.block(x, k, epsilon=0.0) for k in (kernel, 4 * kernel))
    assert (small.x == large.x).all()
    assert (small.kernel == 4 * large.kernel).all()


# The checks of annotations take no tracer for a number.
spectrum = jax.jit(jacobian.spectrum, static_argnums=1)
matvec = jax.jit(jacobian.matvec, static_argnums=1)


def test_multiplicities():
    x = np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)
    sigma = np.sqrt(x.var() + 0.5)
    zero, shrunk, *others = np.asarray(spectrum(x, 2.0, 0.5))[0]
    assert zero == 0
    np.testing.assert_allclose(shrunk, 2 / sigma * 0.5 / sigma**2, rtol=1e-5)
    np.testing.assert_allclose(others, 4 * [2 / sigma], rtol=1e-5)
    np.testing.assert_allclose(spectrum(x, -2.0, 0.5)[0], -np.asarray(spectrum(x, 2.0, 0.5))[0, ::-1])


@pytest.mark.parametrize("magnitude", [1e30, 1e-21, 1e-30])
def test_any_magnitude(magnitude):
    x = np.random.default_rng(0).normal(size=(6, 1))
    small = (magnitude * x).astype(np.float32)
    expected = np.array([0, 0, 1, 1, 1, 1]) / (magnitude * x.std())
    np.testing.assert_allclose(np.asarray(spectrum(small, 1.0, 0.0), float)[0], expected, rtol=1e-5)


def test_eigenvectors():
    x = np.random.default_rng(1).normal(size=(9, 3)).astype(np.float32)
    x_hat = np.asarray(jax.jit(batch_norm.normalize)(x, 0.2))
    assert np.abs(matvec(x, 1.5, np.ones((9, 3), np.float32), 0.2)).max() < 1e-6
    factor = np.asarray(spectrum(x, 1.5, 0.2))[:, 1]
    np.testing.assert_allclose(matvec(x, 1.5, x_hat, 0.2), factor * x_hat, atol=1e-5)


def test_nothing_is_left_of_a_constant_feature_at_epsilon_0():
    x = np.full((4, 1), 3.0, np.float32)
    assert (jacobian.dense(x, 1.0, 0.0) == 0).all()
    assert (jacobian.spectrum(x, 1.0, 0.0) == 0).all()


def test_the_operator_forms_no_matrix():
    """N = 65,536: J would have 16 GiB; the program's memory is a few copies of x."""
    x = jnp.zeros((65_536, 1))
    for function in (
        lambda x, dx: jacobian.matvec(x, 1.0, dx),
        lambda x, dx: jacobian.hvp(x, x, dx),
        lambda x, dx: jax.vjp(batch_norm.normalize, x)[1](dx),
    ):
        program = jax.jit(function).lower(x, x).compile()
        assert program.memory_analysis().temp_size_in_bytes < 8 * x.nbytes


@pytest.mark.parametrize("function", [jacobian.dense, jacobian.spectrum, jacobian.parameters])
def test_bad_input(function):
    with pytest.raises((ValueError, TypeError), match=r"\[N, C\]|n c"):
        function(jnp.ones(3))
    with pytest.raises(ValueError, match="epsilon must be >= 0"):
        function(jnp.ones((3, 2)), epsilon=-1.0)


X = np.ones((4, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: jacobian._check(X, dx=X[:1]), r"dx has shape \(1, 2\), but x \(4, 2\)"),
        (lambda: jacobian._check(X, scale=X), r"scale must be a scalar or \[2\], got shape \(4, 2\)"),
        (lambda: jacobian._check(X, np.ones((3, 1), bool)), r"mask \(3, 1\) must be \[N, 1\]"),
        (lambda: jacobian._check(X, cotangent=X.astype(int)), "cotangent must be floating point"),
        (lambda: jacobian.block(X, np.ones((3, 2), np.float32)), r"kernel must be \[D, F\]|d f"),
        (lambda: jacobian.block(X, np.ones((2, 3), np.float32), bias=X), r"bias must be|bias"),
        (lambda: jacobian.evaluation(np.ones(2), np.ones((3, 1))), r"scale and var must be|var"),
        (lambda: jacobian.evaluation(np.ones(2), np.ones(2), -1.0), "epsilon must be >= 0"),
    ],
)
def test_shapes_that_do_not_fit(call, words):
    """`_check` itself where the annotations, which the tests check, would come first."""
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_a_mask_of_one_entry_is_for_all():
    x = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    assert (jacobian._check(x, np.ones((1, 1), bool)) == np.ones((4, 1), bool)).all()
