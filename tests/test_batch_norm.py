"""Batch normalization against the textbook formula, autodiff of it, and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bnjax import batch_norm
from bnjax.types import BatchNormParams, BatchStats

EPSILONS = [0.0, 1e-5, 0.3]


def textbook(x, epsilon=1e-5, mask=None):
    """The formula as it is written, for plain autodiff: features last, statistics over axis 0."""
    if mask is None:
        mask = jnp.ones((len(x), 1), bool)
    n = mask.sum()
    mean = jnp.where(mask, x, 0).sum(0) / n
    var = jnp.where(mask, (x - mean) ** 2, 0).sum(0) / n
    return jnp.where(mask, (x - mean) / jnp.sqrt(var + epsilon), 0)


def draw(shape, seed=0, mean=0.7, std=1.6):
    return mean + std * jax.random.normal(jax.random.key(seed), shape)


def error(actual, expected, x, epsilon):
    """The largest error of a first derivative, relative to 1 / sigma of its feature."""
    sigma = jnp.sqrt(x.var(0) + epsilon)  # [C]
    return float((jnp.abs(actual - expected) * sigma).max())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("shape", [(3, 1), (7, 3), (16, 2)])
class TestDerivativesInFloat64:
    """1e-12 relative to scale / sigma: 1e4 roundings of float64."""

    def test_jacobians(self, shape, epsilon):
        x = draw(shape)
        expected = jax.jit(jax.jacrev(textbook))(x, epsilon)
        for jacobian in (jax.jacfwd, jax.jacrev):
            actual = jax.jit(jacobian(lambda x: batch_norm.normalize(x, epsilon)))(x)
            assert error(actual, expected, x, epsilon) < 1e-12

    def test_jacobian_of_apply_has_the_scale(self, shape, epsilon):
        x = draw(shape)
        scale = jnp.linspace(-3, 2, shape[1])
        params = BatchNormParams(scale, jnp.ones(shape[1]))
        _, stats = batch_norm.init(shape[1], x.dtype)

        def ours(x):
            return batch_norm.apply(params, stats, x, train=True, epsilon=epsilon)[0]

        expected = jax.jit(jax.jacrev(lambda x: scale * textbook(x, epsilon) + 1))(x)
        assert error(jax.jit(jax.jacrev(ours))(x), expected, x, epsilon) < 1e-12 * 3

    def test_hessian(self, shape, epsilon):
        x = draw(shape)
        weights = draw(shape, seed=1)

        def loss(normalize, x):
            return jnp.sum(weights * jnp.sin(normalize(x, epsilon)))

        actual = jax.jit(jax.hessian(lambda x: loss(batch_norm.normalize, x)))(x)
        expected = jax.jit(jax.hessian(lambda x: loss(textbook, x)))(x)
        sigma = jnp.sqrt(x.var(0) + epsilon)
        assert (jnp.abs(actual - expected) * sigma * sigma[:, None, None]).max() < 1e-12

    def test_vmap_of_grad(self, shape, epsilon):
        xs = draw((5, *shape))

        def loss(normalize, x):
            return jnp.sum(normalize(x, epsilon) ** 3)

        actual = jax.jit(jax.vmap(jax.grad(lambda x: loss(batch_norm.normalize, x))))(xs)
        expected = jax.jit(jax.vmap(jax.grad(lambda x: loss(textbook, x))))(xs)
        for a, e, x in zip(actual, expected, xs, strict=True):
            assert error(a, e, x, epsilon) < 1e-12

    def test_with_respect_to_epsilon(self, shape, epsilon):
        x = draw(shape)
        actual = jax.jit(jax.jacfwd(lambda e: batch_norm.normalize(x, e)))(epsilon)
        np.testing.assert_allclose(
            actual, jax.jit(jax.jacfwd(lambda e: textbook(x, e)))(epsilon), rtol=0, atol=1e-12
        )


@pytest.mark.usefixtures("x64")
def test_check_grads_to_second_order():
    x = draw((6, 3))
    check_grads(jax.jit(lambda x: batch_norm.normalize(x, 1e-3)), (x,), order=2, modes=("fwd", "rev"))


@pytest.mark.usefixtures("x64")
def test_moments_are_differentiable_where_they_are_outputs():
    """The rule's tangents of mean, var and 1 / sigma, which second derivatives rely on."""
    x, dx = draw((9, 2)), draw((9, 2), seed=1)

    def moments(x):
        sigma2 = x.var(0, keepdims=True) + 0.1
        return x.mean(0, keepdims=True), x.var(0, keepdims=True), sigma2**-0.5

    def ours(x):
        _, mean, var, _, inv_sigma = batch_norm._standardize(x, jnp.asarray(0.1), None, (0,), None)
        return mean, var, inv_sigma

    for a, e in zip(jax.jvp(ours, (x,), (dx,))[1], jax.jvp(moments, (x,), (dx,))[1], strict=True):
        np.testing.assert_allclose(a, e, atol=1e-13)


@pytest.mark.parametrize("axis", [-1, 1, (1, 3), (2,)])
def test_any_feature_axis(axis):
    """Against numpy in float64; float32 rounds 6e-8, and some tens of roundings make 1e-5 ample."""
    x = np.asarray(draw((4, 5, 6, 3), mean=3.0))
    features = {a % 4 for a in ((axis,) if isinstance(axis, int) else axis)}
    reduced = tuple(a for a in range(4) if a not in features)
    exact = x.astype(np.float64)
    mean, var = exact.mean(reduced, keepdims=True), exact.var(reduced, keepdims=True)
    actual = batch_norm.normalize(x, axis=axis)
    np.testing.assert_allclose(actual, (exact - mean) / np.sqrt(var + 1e-5), atol=1e-5)


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_inputs_far_from_zero(ratio):
    """Norm-wise against float64, the float32 input taken as exact. E[x^2] - E[x]^2 fails at 1e4."""
    x = np.asarray(draw((512, 8), mean=ratio, std=1.0), np.float32)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    actual = batch_norm.normalize(x)
    assert np.linalg.norm(actual - expected) < 1e-5 * np.linalg.norm(expected)
    _, stats = batch_norm.apply(*batch_norm.init(8), x, train=True, momentum=0.0)
    np.testing.assert_allclose(stats.var, exact.var(0), rtol=1e-5)
    np.testing.assert_allclose(stats.mean, exact.mean(0), rtol=1e-6)


def test_forward_is_the_same_under_powers_of_two_bitwise():
    x = draw((64, 8))
    for k in (-30, -1, 1, 30):
        assert (batch_norm.normalize(x * 2.0**k, 0.0) == batch_norm.normalize(x, 0.0)).all()


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
@pytest.mark.parametrize("value", [0.0, 0.1, 3e7])
def test_a_constant_feature_gives_the_bias_and_no_gradient(value, epsilon):
    x = jnp.full((6, 1), value)
    params = BatchNormParams(jnp.array([2.0]), jnp.array([-0.5]))
    _, stats = batch_norm.init(1)

    def apply(x):
        return batch_norm.apply(params, stats, x, train=True, epsilon=epsilon)[0]

    assert (apply(x) == -0.5).all()
    gradient = jax.jit(jax.jacrev(apply))(x)
    if epsilon == 0:
        assert (gradient == 0).all()
    else:  # x_hat = 0, so J = scale / sqrt(epsilon) (I - 1 1^T / N)
        expected = 2.0 / np.sqrt(1e-5) * (np.eye(6) - 1 / 6)
        np.testing.assert_allclose(gradient[:, 0, :, 0], expected, rtol=1e-5)


class TestRunningStatistics:
    batches = tuple(np.asarray(draw((8, 3), seed=s, mean=s, std=1 + s)) for s in range(5))

    def run(self, **options):
        params, stats = batch_norm.init(3)
        for x in self.batches:
            _, stats = batch_norm.apply(params, stats, x, train=True, **options)
        return stats

    def test_plain_moving_average_of_biased_variances(self):
        stats = self.run(momentum=0.9)
        mean, var = np.zeros(3), np.ones(3)
        for x in self.batches:
            mean = 0.9 * mean + 0.1 * x.mean(0)
            var = 0.9 * var + 0.1 * x.var(0)
        np.testing.assert_allclose(stats.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(stats.var, var, rtol=1e-5)
        assert stats.count == 5

    def test_debiased_average_forgets_the_initial_values(self):
        stats = self.run(momentum=0.9, debias=True)
        weights = 0.9 ** np.arange(4, -1, -1)
        weights /= weights.sum()
        np.testing.assert_allclose(stats.mean, weights @ [x.mean(0) for x in self.batches], rtol=1e-5)
        np.testing.assert_allclose(stats.var, weights @ [x.var(0) for x in self.batches], rtol=1e-5)

    @pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 1.0, "debias": True}])
    def test_cumulative_average(self, options):
        stats = self.run(**options)
        np.testing.assert_allclose(stats.mean, np.mean([x.mean(0) for x in self.batches], 0), rtol=1e-5)
        np.testing.assert_allclose(stats.var, np.mean([x.var(0) for x in self.batches], 0), rtol=1e-5)

    def test_momentum_zero_keeps_the_last_batch_and_one_the_first_values(self):
        for debias in (False, True):
            last = self.run(momentum=0.0, debias=debias)
            np.testing.assert_allclose(last.var, self.batches[-1].var(0), rtol=1e-5)
        assert (self.run(momentum=1.0).var == 1).all()

    def test_evaluation_uses_them_and_leaves_them(self):
        params = BatchNormParams(jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, 2.0]))
        stats = self.run()
        x = self.batches[0]
        y, after = batch_norm.apply(params, stats, x, train=False, epsilon=0.1)
        expected = params.scale * (x - stats.mean) / np.sqrt(stats.var + 0.1) + params.bias
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        assert after is stats

    def test_evaluation_before_training_is_the_identity_up_to_epsilon(self):
        x = self.batches[1]
        y, _ = batch_norm.apply(*batch_norm.init(3), x, train=False)
        np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)

    def test_no_gradient_flows_into_them(self):
        params, stats = batch_norm.init(3)

        def total(x, stats):
            _, new = batch_norm.apply(params, stats, x, train=True)
            return new.mean.sum() + new.var.sum()

        gradients = jax.grad(total, argnums=(0, 1), allow_int=True)(self.batches[2], stats)
        assert all((g == 0).all() for g in (gradients[0], gradients[1].mean, gradients[1].var))

    def test_structure_and_dtypes_stay_the_same_in_a_scan(self):
        params, stats = batch_norm.init(3)

        def step(stats, x):
            return batch_norm.apply(params, stats, x, train=True)[::-1]

        final, _ = jax.lax.scan(step, stats, np.stack(self.batches))
        assert jax.tree.map(lambda s: s.dtype, final) == jax.tree.map(lambda s: s.dtype, stats)


class TestMask:
    x = np.asarray(draw((8, 3)))
    valid = np.array([1, 1, 0, 1, 0, 1, 1, 0], bool)

    def test_equals_the_batch_of_valid_entries_alone(self):
        filled = np.where(self.valid[:, None], self.x, np.nan)
        y, stats = batch_norm.apply(*batch_norm.init(3), filled, train=True, mask=self.valid[:, None])
        y_alone, stats_alone = batch_norm.apply(*batch_norm.init(3), self.x[self.valid], train=True)
        np.testing.assert_allclose(y[self.valid], y_alone, atol=1e-6)
        assert (y[~self.valid] == 0).all()
        np.testing.assert_allclose(stats.var, stats_alone.var, rtol=1e-6)

    def test_gradients_ignore_masked_entries(self):
        filled = np.where(self.valid[:, None], self.x, np.nan)
        weights = np.asarray(draw((8, 3), seed=1))

        def loss(x, weights, mask):
            return (batch_norm.normalize(x, mask=mask) * weights).sum()

        gradient = jax.grad(loss)(filled, weights, self.valid[:, None])
        alone = jax.grad(loss)(self.x[self.valid], weights[self.valid], None)
        np.testing.assert_allclose(gradient[self.valid], alone, atol=1e-6)
        assert (gradient[~self.valid] == 0).all()

    def test_nothing_valid_leaves_the_statistics(self):
        params, stats = batch_norm.init(3)
        y, after = batch_norm.apply(params, stats, self.x, train=True, mask=np.zeros((8, 1), bool))
        assert (y == 0).all()
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after, stats))


def test_statistics_shared_over_a_mapped_axis_equal_those_of_the_whole_batch():
    x = draw((4, 6, 3), mean=5.0)
    weights = draw((4, 6, 3), seed=1)
    whole = x.reshape(24, 3)

    def loss(x):
        y = jax.vmap(lambda x: batch_norm.normalize(x, axis_name="devices"), axis_name="devices")(x)
        return (y * weights).sum(), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x)
    np.testing.assert_allclose(y.reshape(24, 3), batch_norm.normalize(whole), atol=1e-6)
    expected = jax.grad(lambda x: (batch_norm.normalize(x) * weights.reshape(24, 3)).sum())(whole)
    np.testing.assert_allclose(gradient.reshape(24, 3), expected, atol=1e-6)


def test_low_precision_inputs_keep_their_dtype_and_float32_statistics():
    x = draw((64, 3), mean=100.0).astype(jnp.bfloat16)
    y, stats = batch_norm.apply(*batch_norm.init(3), x, train=True)
    assert y.dtype == jnp.bfloat16
    assert stats.mean.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=2**-8 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_gradients_of_low_precision_inputs_count_in_float32(dtype):
    """70,000 is beyond float16, and no number of bfloat16: a count in the input's type would be wrong."""
    x = draw((70_000, 1)).astype(dtype)
    weights = (5 + draw((70_000, 1), seed=1)).astype(dtype)

    def gradient(x, mask):
        return jax.grad(lambda x: (batch_norm.normalize(x, mask=mask) * weights.astype(x.dtype)).sum())(x)

    expected = gradient(x.astype(jnp.float32), None)
    for mask in (None, jnp.ones((70_000, 1), bool)):
        error = jnp.linalg.norm(gradient(x, mask).astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        assert error < 2 * jnp.finfo(dtype).eps


@pytest.mark.parametrize("epsilon", [0, 1, np.float64(1e-3), np.float32(1e-3), jnp.int32(1)])
def test_epsilon_of_any_type(x64, epsilon):
    x = draw((8, 3)).astype(jnp.float32)
    found = jax.grad(lambda x: (batch_norm.normalize(x, epsilon) ** 3).sum())(x)
    expected = jax.grad(lambda x: (textbook(x, float(epsilon)) ** 3).sum())(x)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(found, expected, atol=1e-5)


PARAMS, STATS = batch_norm.init(3)


@pytest.mark.parametrize(
    ("call", "error_type", "words"),
    [
        (lambda: batch_norm.init(0), ValueError, "num_features must be at least 1, got 0"),
        (lambda: batch_norm.normalize(jnp.ones((4, 3), int)), TypeError, "floating point, got int32"),
        (
            lambda: batch_norm.normalize(jnp.ones((4, 3)), -1.0),
            ValueError,
            "epsilon must be >= 0 and finite, got -1.0",
        ),
        (lambda: batch_norm.normalize(jnp.ones((4, 3)), axis=2), ValueError, r"axis .* \(4, 3\), got 2"),
        (
            lambda: batch_norm.normalize(jnp.ones((4, 3)), mask=np.ones((5, 1), bool)),
            ValueError,
            r"mask \(5, 1\) must broadcast to \(4, 1\)",
        ),
        (
            lambda: batch_norm.apply(PARAMS, STATS, jnp.ones((4, 2)), train=True),
            ValueError,
            r"scale has shape \(3,\), but x \(4, 2\)",
        ),
        (
            lambda: batch_norm.apply(
                PARAMS, BatchStats(jnp.ones(1), jnp.ones(3), 0), jnp.ones((4, 3)), train=True
            ),
            ValueError,
            r"mean has shape \(1,\)",
        ),
        (
            lambda: batch_norm.apply(PARAMS, STATS, jnp.ones((4, 3)), train=True, momentum=1.5),
            ValueError,
            "momentum must be None or in",
        ),
    ],
)
def test_bad_input(call, error_type, words):
    with pytest.raises(error_type, match=words):
        call()
