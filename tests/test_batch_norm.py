"""Batch normalization against the textbook formula, autodiff of it, and float64."""

from functools import partial

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
@pytest.mark.parametrize("shape", [(3, 1), (7, 3), (16, 2)])
class TestDerivativesInFloat64:
    """1e-12 relative to scale / sigma: 1e4 roundings of float64. Each is compiled once for all of EPSILONS."""

    def test_jacobians(self, shape):
        x = draw(shape)
        autodiff = jax.jit(jax.jacrev(textbook))
        for jacobian in (jax.jacfwd, jax.jacrev):
            ours = jax.jit(jacobian(batch_norm.normalize))
            for epsilon in EPSILONS:
                assert error(ours(x, epsilon), autodiff(x, epsilon), x, epsilon) < 1e-12

    def test_jacobian_of_apply(self, shape):
        """With the scale; and to scale and bias, in forward and reverse mode."""
        x = draw(shape)
        params = BatchNormParams(jnp.linspace(-3, 2, shape[1]), jnp.ones(shape[1]))
        _, stats = batch_norm.init(shape[1], x.dtype)

        def ours(x, params, epsilon):
            return batch_norm.apply(params, stats, x, train=True, epsilon=epsilon)[0]

        def formula(x, params, epsilon):
            return params.scale * textbook(x, epsilon) + params.bias

        autodiff = jax.jit(jax.jacrev(formula, (0, 1)))
        for jacobian in (jax.jacfwd, jax.jacrev):
            closed = jax.jit(jacobian(ours, (0, 1)))
            for epsilon in EPSILONS:
                (dx, dparams), (ex, eparams) = closed(x, params, epsilon), autodiff(x, params, epsilon)
                assert error(dx, ex, x, epsilon) < 1e-12 * 3
                for found, expected in zip(dparams, eparams, strict=True):
                    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)

    def test_hessian(self, shape):
        x = draw(shape)
        weights = draw(shape, seed=1)

        def hessian(normalize):
            return jax.jit(jax.hessian(lambda x, epsilon: (weights * jnp.sin(normalize(x, epsilon))).sum()))

        ours, autodiff = hessian(batch_norm.normalize), hessian(textbook)
        for epsilon in EPSILONS:
            sigma = jnp.sqrt(x.var(0) + epsilon)
            difference = jnp.abs(ours(x, epsilon) - autodiff(x, epsilon))
            assert (difference * sigma * sigma[:, None, None]).max() < 1e-12

    def test_vmap_of_grad(self, shape):
        xs = draw((5, *shape))

        def gradient(normalize):
            def loss(x, epsilon):
                return jnp.sum(normalize(x, epsilon) ** 3)

            return jax.jit(jax.vmap(jax.grad(loss), (0, None)))

        ours, autodiff = gradient(batch_norm.normalize), gradient(textbook)
        for epsilon in EPSILONS:
            for a, e, x in zip(ours(xs, epsilon), autodiff(xs, epsilon), xs, strict=True):
                assert error(a, e, x, epsilon) < 1e-12

    def test_with_respect_to_epsilon(self, shape):
        x = draw(shape)
        ours, autodiff = (jax.jit(jax.jacfwd(f, 1)) for f in (batch_norm.normalize, textbook))
        for epsilon in EPSILONS:
            np.testing.assert_allclose(ours(x, epsilon), autodiff(x, epsilon), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_check_grads_to_second_order():
    x = draw((6, 3))
    check_grads(jax.jit(lambda x: batch_norm.normalize(x, 1e-3)), (x,), order=2, modes=("fwd", "rev"))


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_check_grads_of_the_whole_layer(masked):
    """To x, scale, bias and epsilon together, to second order."""
    mask = np.arange(6)[:, None] != 2 if masked else None
    _, stats = batch_norm.init(3)

    def apply(x, scale, bias, epsilon):
        params = BatchNormParams(scale, bias)
        return batch_norm.apply(params, stats, x, train=True, epsilon=epsilon, mask=mask)[0]

    arguments = (draw((6, 3)), jnp.array([2.0, -1.0, 0.3]), jnp.ones(3), jnp.asarray(0.1))
    check_grads(jax.jit(apply), arguments, order=2, modes=("fwd", "rev"))


@pytest.mark.usefixtures("x64")
def test_moments_are_differentiable_where_they_are_outputs():
    """The rule's tangents of mean, var and 1 / sigma, which second derivatives rely on."""
    x, dx = draw((9, 2)), draw((9, 2), seed=1)

    def moments(x):
        sigma2 = x.var(0, keepdims=True) + 0.1
        return x.mean(0, keepdims=True), x.var(0, keepdims=True), sigma2**-0.5

    def ours(x):
        _, batch = batch_norm._transform(x, None, None, jnp.asarray(0.1), None, (0,), None)
        return batch.mean, batch.var, batch.inv_sigma

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


def exact(x, epsilon=1e-5, valid=slice(None)):
    """x_hat and sigma in extended precision, the given x and float32 epsilon taken as exact."""
    x = np.asarray(x, np.longdouble)[valid]
    mean = x.mean(0)
    sigma = np.sqrt(((x - mean) ** 2).mean(0) + np.longdouble(np.float32(epsilon)))
    return (x - mean) / sigma, sigma


def exact_gradient(x, cotangent, epsilon=1e-5, valid=slice(None)):
    x_hat, sigma = exact(x, epsilon, valid)
    g = np.asarray(cotangent, np.longdouble)[valid]
    return (g - g.mean(0) - x_hat * (x_hat * g).mean(0)) / sigma


def distance(actual, expected, unit=None):
    """Norm-wise, relative to `expected`, or to `unit` where the expected cancels to almost nothing."""
    assert np.isfinite(np.asarray(actual, np.float64)).all()
    unit = expected if unit is None else unit
    return float(np.linalg.norm(np.asarray(actual, np.longdouble) - expected) / np.linalg.norm(unit))


@jax.jit
def value_and_gradient(x, cotangent, epsilon, mask=None):
    y, pullback = jax.vjp(lambda x: batch_norm.normalize(x, epsilon, mask=mask), x)
    _, tangent = jax.jvp(lambda x: batch_norm.normalize(x, epsilon, mask=mask), (x,), (cotangent,))
    return y, pullback(cotangent)[0], tangent


def batch(n, c=8, mean=0.0, std=1.0, seed=0):
    return (mean + std * np.random.default_rng(seed).normal(size=(n, c))).astype(np.float32)


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
    _, stats = batch_norm.apply(*batch_norm.init(8), x, train=True, momentum=0.0)
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
    gradient = jax.grad(lambda x: (weights * batch_norm.normalize(x, 0.0)).sum())
    found, expected = jax.jvp(gradient, (x,), (x,))[1], -gradient(x)
    assert distance(found, np.asarray(expected, np.float64)) < 1e-5


@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_few_large_samples_that_cancel(magnitude):
    x = np.zeros((1000, 1), np.float32)
    x[[500, 700]] = [[magnitude], [-magnitude]]
    y, _, _ = value_and_gradient(x, x, 0.0)
    assert distance(y, exact(x, 0.0)[0]) < 1e-6


@pytest.mark.parametrize(("magnitude", "stored"), [(1e30, np.finfo(np.float32).max), (1e-30, 0.0)])
def test_the_stored_variance_saturates(magnitude, stored):
    x = batch(64, std=magnitude)
    y, stats = batch_norm.apply(*batch_norm.init(8), x, train=True, momentum=0.0, epsilon=0.0)
    assert distance(y, exact(x, 0.0)[0]) < 1e-6
    assert (stats.var == stored).all()
    np.testing.assert_allclose(stats.mean, x.astype(np.float64).mean(0), rtol=1e-5)


def test_forward_is_the_same_under_powers_of_two_bitwise():
    """For every k: BN(2^k W x) = BN(W x) at epsilon 0, and the gradient is divided by 2^k."""
    x, kernel, g = batch(64, 5), batch(5, 8, seed=1), batch(64, seed=2)
    values = jax.jit(lambda kernel: jax.vjp(lambda kernel: batch_norm.normalize(x @ kernel, 0.0), kernel))
    y, pullback = values(kernel)
    (gradient,) = pullback(g)
    for k in range(-60, 61):
        scaled, pullback = values(kernel * np.float32(2.0**k))
        assert (scaled == y).all(), k
        assert (pullback(g)[0] * np.float32(2.0**k) == gradient).all(), k


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 25_088])
@pytest.mark.parametrize("value", [0.1, 3e7, -7e3, 1e30, 1e-30, np.pi, -3.4e38])
def test_a_constant_feature_is_exactly_zero(value, n):
    for epsilon in (0.0, 1e-5):
        x = np.full((n, 1), value, np.float32)
        y, gradient, _ = value_and_gradient(x, batch(n, 1), epsilon)
        assert (y == 0).all()
        assert np.isfinite(gradient).all()
        if epsilon == 0 or n == 1:
            assert (gradient == 0).all()


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

    def test_unbiased_variances(self):
        for options, weights in (
            ({"momentum": None}, np.full(5, 0.2)),
            ({"momentum": 0.9, "debias": True}, 0.9 ** np.arange(4, -1, -1.0)),
        ):
            stats = self.run(unbiased=True, **options)
            expected = weights / weights.sum() @ [x.var(0, ddof=1) for x in self.batches]
            np.testing.assert_allclose(stats.var, expected, rtol=1e-5)

    def test_very_long_averages(self):
        """300,000 batches of four, and the count can't overflow.

        A float32 average of t terms rounds t times: sqrt(t / 3) roundings of 6e-8, some 2e-5, at random.
        """
        params, stats = batch_norm.init(3)
        x = np.random.default_rng(0).normal(5.0, 1.0, size=(3000, 4, 3)).astype(np.float32)
        means, variances = x.astype(np.float64).mean(1), x.astype(np.float64).var(1)

        @partial(jax.jit, static_argnames=("momentum", "debias"))
        def run(stats, momentum, debias):
            def step(stats, i):
                return batch_norm.apply(
                    params, stats, jnp.asarray(x)[i % 3000], train=True, momentum=momentum, debias=debias
                )[::-1]

            return jax.lax.scan(lambda s, i: (step(s, i)[0], None), stats, jnp.arange(300_000))[0]

        found = run(stats, None, False)
        np.testing.assert_allclose(found.mean, means.mean(0), rtol=1e-4)
        np.testing.assert_allclose(found.var, variances.mean(0), rtol=1e-4)
        assert found.count == 300_000
        weights = 0.999 ** np.arange(2999, -1, -1.0)
        found = run(stats, 0.999, True)  # 0.999^300,000 = 0: the last 3,000 batches, over and over
        np.testing.assert_allclose(found.var, weights @ variances / weights.sum(), rtol=1e-4)
        last = found._replace(count=jnp.int32(np.iinfo(np.int32).max))
        assert batch_norm.apply(params, last, x[0], train=True)[1].count == last.count

    @pytest.mark.parametrize("std", [1e-2, 1e-4, 1e-8, 1e-15])
    @pytest.mark.parametrize(
        "options",
        [{"momentum": 0.0}, {"momentum": None}, *({"momentum": m, "debias": True} for m in (0.5, 0.9, 0.999))],
    )
    def test_nothing_is_left_of_what_has_no_weight(self, options, std):
        """The first batch's variance, however small beside the initial 1."""
        params, stats = batch_norm.init(3)
        x = (std * self.batches[0]).astype(np.float32)
        _, after = batch_norm.apply(params, stats, x, train=True, **options)
        np.testing.assert_allclose(after.var, x.astype(np.float64).var(0), rtol=1e-5)
        y, _ = batch_norm.apply(params, after, x, train=False, epsilon=0.0)
        np.testing.assert_allclose(np.asarray(y, np.float64).std(0), 1, rtol=1e-5)

    def test_momentum_zero_forgets_and_one_keeps_whatever_there_was(self):
        params, stats = batch_norm.init(3)
        x = self.batches[0]
        for before in (1e8, np.nan):
            _, spoilt = batch_norm.apply(params, stats, x + np.float32(before), train=True, momentum=0.0)
            _, after = batch_norm.apply(params, spoilt, x, train=True, momentum=0.0)
            np.testing.assert_allclose(after.mean, x.mean(0), rtol=1e-5)
            np.testing.assert_allclose(after.var, x.var(0), rtol=1e-5)
            _, kept = batch_norm.apply(params, stats, x + np.float32(before), train=True, momentum=1.0)
            assert (kept.mean == 0).all()
            assert (kept.var == 1).all()

    @pytest.mark.parametrize("with_x64", [False, True])
    def test_a_huge_variance_passes(self, with_x64):
        """It is the largest number for once, also unbiased, also of float64 inputs, and decays as any other."""
        with jax.enable_x64(with_x64):
            params, stats = batch_norm.init(3, "float32")
            huge = jnp.asarray(1e25 * self.batches[0], float)
            for x in (huge, *self.batches):
                _, stats = batch_norm.apply(params, stats, x, train=True, momentum=0.0, unbiased=True)
                assert np.isfinite(stats.var).all()
            np.testing.assert_allclose(stats.var, self.batches[-1].var(0, ddof=1), rtol=1e-5)

    @pytest.mark.parametrize("options", [{}, {"momentum": None}, {"unbiased": True}])
    def test_a_batch_of_one_has_a_mean_and_no_variance(self, options):
        params = BatchNormParams(jnp.full(3, 2.0), jnp.full(3, -0.5))
        stats = self.run()
        x = np.array([[1.0, -7.0, 1e6]], np.float32)
        apply = partial(batch_norm.apply, params, stats, train=True, **options)
        y, after = apply(x)
        assert (y == -0.5).all()
        assert (jax.jacrev(lambda x: apply(x)[0])(x) == 0).all()
        weight = 1 / 6 if "momentum" in options else 0.01
        np.testing.assert_allclose(after.mean, stats.mean + weight * (x[0] - stats.mean), rtol=1e-5)
        assert (after.var == stats.var).all()
        mask = np.array([[False], [True]])
        masked = apply(np.concatenate([x * np.nan, x]), mask=mask)
        assert (masked[0] == -0.5).all()
        assert all((a == b).all() for a, b in zip(masked[1], after, strict=True))

    def test_an_empty_batch_leaves_them(self):
        params, stats = batch_norm.init(3)[0], self.run()
        for train in (True, False):
            y, after = batch_norm.apply(params, stats, np.zeros((0, 3), np.float32), train=train)
            assert y.shape == (0, 3)
            assert all((a == b).all() for a, b in zip(after, stats, strict=True))
        gradient = jax.grad(lambda x: batch_norm.normalize(x).sum())(jnp.zeros((0, 3)))
        assert gradient.shape == (0, 3)

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

    @pytest.mark.parametrize(
        ("data", "param", "with_x64"),
        [(d, p, False) for d in ("float16", "float32") for p in ("bfloat16", "float32")]
        + [(d, p, True) for d in ("float16", "float32", "float64") for p in ("bfloat16", "float32", "float64")],
    )
    def test_structure_and_dtypes_stay_the_same_in_a_scan(self, data, param, with_x64):
        with jax.enable_x64(with_x64):
            params, stats = batch_norm.init(3, param)
            assert params.scale.dtype == param
            assert stats.mean.dtype == stats.var.dtype == ("float64" if param == "float64" else "float32")

            def step(stats, x):
                y, stats = batch_norm.apply(params, stats, x, train=True, momentum=None)
                return stats, (y, batch_norm.apply(params, stats, x, train=False)[0])

            final, ys = jax.lax.scan(step, stats, jnp.asarray(np.stack(self.batches), data))
            assert [s.dtype for s in final] == [s.dtype for s in stats]
            assert all(y.dtype == data for y in ys)

    def test_gradient_in_evaluation_mode(self):
        params = BatchNormParams(jnp.array([2.0, -1.0, 0.0]), jnp.ones(3))
        stats = self.run()
        x = self.batches[0]
        gradient = jax.grad(lambda x: batch_norm.apply(params, stats, x, train=False, epsilon=0.1)[0].sum())(x)
        expected = params.scale / np.sqrt(stats.var + 0.1)
        np.testing.assert_allclose(gradient, np.broadcast_to(expected, (8, 3)), rtol=1e-6)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_stays_in_its_feature(self, value):
        params, stats = batch_norm.init(3)
        x = self.batches[0].copy()
        x[4, 1] = value
        loss = jax.value_and_grad(
            lambda x: (batch_norm.apply(params, stats, x, train=True)[0] ** 3).sum(0)[jnp.array([0, 2])].sum()
        )
        (clean, clean_gradient), (found, gradient) = loss(self.batches[0]), loss(x)
        assert found == clean
        assert (gradient[:, [0, 2]] == clean_gradient[:, [0, 2]]).all()
        y, after = batch_norm.apply(params, stats, x, train=True)
        assert np.isnan(y[:, 1]).all()
        for statistic in after[:2]:
            assert (np.isfinite(statistic) == [True, False, True]).all()

    @pytest.mark.parametrize(("use_scale", "use_bias"), [(False, True), (True, False), (False, False)])
    def test_without_scale_or_bias(self, use_scale, use_bias):
        params, stats = batch_norm.init(3, use_scale=use_scale, use_bias=use_bias)
        full = BatchNormParams(jnp.full(3, 2.0), jnp.full(3, 0.5))
        params = BatchNormParams(full.scale if use_scale else None, full.bias if use_bias else None)
        ones_and_zeros = BatchNormParams(
            full.scale if use_scale else jnp.ones(3), full.bias if use_bias else jnp.zeros(3)
        )
        assert len(jax.tree.leaves(batch_norm.init(3, use_scale=use_scale, use_bias=use_bias)[0])) == (
            use_scale + use_bias
        )
        for train in (True, False):
            y, after = batch_norm.apply(params, stats, self.batches[0], train=train)
            expected, _ = batch_norm.apply(ones_and_zeros, stats, self.batches[0], train=train)
            assert (y == expected).all()
            assert jax.tree.structure(after) == jax.tree.structure(stats)


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

    def test_evaluation_keeps_what_is_masked_out_of_everything(self):
        filled = np.where(self.valid[:, None], self.x, np.nan)
        params = BatchNormParams(jnp.array([2.0, -1.0, 1.0]), jnp.array([0.5, 0.0, 1.0]))
        _, stats = batch_norm.apply(params, batch_norm.init(3)[1], self.x, train=True)

        def total(x, params, mean, var, mask):
            y, _ = batch_norm.apply(params, BatchStats(mean, var, stats.count), x, train=False, mask=mask)
            return (y**2).sum(), y

        gradient = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)
        (dx, dparams, *dstats), y = gradient(filled, params, stats.mean, stats.var, self.valid[:, None])
        (ex, eparams, *estats), alone = gradient(self.x[self.valid], params, stats.mean, stats.var, None)
        np.testing.assert_allclose(y[self.valid], alone, rtol=1e-6)
        assert (y[~self.valid] == params.bias).all()
        assert (dx[~self.valid] == 0).all()
        np.testing.assert_allclose(dx[self.valid], ex, rtol=1e-5)
        np.testing.assert_allclose(dparams.scale, eparams.scale, rtol=1e-5)
        np.testing.assert_allclose(dparams.bias, eparams.bias + 3 * 2 * params.bias, rtol=1e-5)
        np.testing.assert_allclose(np.stack(dstats), np.stack(estats), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("axis", [-1, 1])
    @pytest.mark.parametrize("mask_shape", [(6, 1, 1, 1), (1, 4, 5, 1), (6, 4, 5, 1), (5, 1)])
    def test_broadcasts_over_everything_but_features(self, mask_shape, axis):
        """Images as NHWC, and as NCHW with the mask's axes moved alike."""
        x = np.asarray(draw((6, 4, 5, 3), mean=2.0))
        mask = np.random.default_rng(0).random(mask_shape) < 0.6
        valid = np.broadcast_to(mask, (6, 4, 5, 1))[..., 0]
        expected = exact(x[valid])[0]
        if axis == 1:
            x = np.moveaxis(x, -1, 1)
            mask = np.moveaxis(mask.reshape((1,) * (4 - mask.ndim) + mask.shape), -1, 1)
        y = batch_norm.normalize(x, axis=axis, mask=mask)
        y = np.moveaxis(y, 1, -1) if axis == 1 else np.asarray(y)
        np.testing.assert_allclose(y[valid], expected.astype(np.float64), atol=1e-5)
        assert (y[~valid] == 0).all()

    def test_nothing_valid_leaves_the_statistics(self):
        params, stats = batch_norm.init(3)
        none = np.zeros((8, 1), bool)
        y, after = batch_norm.apply(params, stats, self.x * np.nan, train=True, mask=none)
        assert (y == 0).all()
        assert (jax.grad(lambda x: batch_norm.normalize(x, mask=none).sum())(self.x) == 0).all()
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after, stats))


class TestAxisName:
    """Parts of one batch, with their own numbers of valid entries, none in one: value, gradient and
    statistics as of the whole. Three roundings of float32 make 1e-6, at a mean of 100 standard deviations too.
    """

    parts = np.asarray(draw((4, 6, 3), mean=100.0), np.float32)
    weights = np.asarray(draw((4, 6, 3), seed=1), np.float32)
    masks = np.array([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)[..., None]

    def layer(self, x, mask, weights, axis_name=None):
        """The output, the updated statistics, and the gradient to x, scale and bias of sum(weights * y)."""
        params, stats = BatchNormParams(jnp.array([2.0, -1.0, 0.5]), jnp.ones(3)), batch_norm.init(3)[1]

        def apply(x, params):
            return batch_norm.apply(params, stats, x, train=True, mask=mask, axis_name=axis_name, unbiased=True)

        y, pullback, stats = jax.vjp(apply, x, params, has_aux=True)
        return y, stats, *pullback(weights)

    def check(self, parts_found, masked):
        mask = self.masks.reshape(24, 1) if masked else None
        filled = np.where(self.masks, self.parts, np.nan) if masked else self.parts
        whole = self.layer(filled.reshape(24, 3), mask, self.weights.reshape(24, 3))
        y, stats, gradient, params_gradient = parts_found
        np.testing.assert_allclose(np.reshape(y, (24, 3)), whole[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.reshape(gradient, (24, 3)), whole[2], rtol=1e-5, atol=1e-6)
        for found, expected in zip(stats, whole[1], strict=True):  # the same on every device
            np.testing.assert_allclose(found, np.broadcast_to(expected, np.shape(found)), rtol=1e-6)
        for found, expected in zip(params_gradient, whole[3], strict=True):  # each device's share
            np.testing.assert_allclose(np.sum(found, 0), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("masked", [False, True])
    def test_vmap(self, masked):
        filled = np.where(self.masks, self.parts, np.nan) if masked else self.parts
        mapped = jax.vmap(
            partial(self.layer, axis_name="parts"), in_axes=(0, 0 if masked else None, 0), axis_name="parts"
        )
        self.check(jax.jit(mapped)(filled, self.masks if masked else None, self.weights), masked)

    def test_one_example_each(self):
        """`jax.vmap` over examples [C], as a per-example network has it."""
        y = jax.vmap(lambda x: batch_norm.normalize(x, axis_name="batch"), axis_name="batch")(self.parts[0])
        np.testing.assert_allclose(y, batch_norm.normalize(self.parts[0]), atol=1e-5)

    def test_a_constant_feature_is_exactly_zero(self):
        constant = np.full((4, 6, 3), 0.1, np.float32)
        mapped = jax.vmap(lambda x, m: batch_norm.normalize(x, 0.0, mask=m, axis_name="p"), axis_name="p")
        assert (mapped(constant, self.masks) == 0).all()

    def test_means_that_differ_by_far(self):
        """Combined from centred sums: each part's spread counts, however far apart the parts are."""
        x = self.parts + np.array([0.0, 1e4, -1e4, 0.0], np.float32)[:, None, None]
        y = jax.vmap(lambda x: batch_norm.normalize(x, axis_name="p"), axis_name="p")(x)
        assert distance(np.reshape(y, (24, 3)), exact(x.reshape(24, 3))[0]) < 1e-6

    @pytest.mark.parametrize("magnitude", [1e30, 1e-30])
    def test_any_magnitude(self, magnitude):
        x = (self.parts - 100) * np.float32(magnitude) * np.array([1, 1e-3, 1, 1e-6], np.float32)[:, None, None]
        y = jax.vmap(lambda x: batch_norm.normalize(x, 0.0, axis_name="p"), axis_name="p")(x)
        assert distance(np.reshape(y, (24, 3)), exact(x.reshape(24, 3), 0.0)[0]) < 1e-6


@pytest.mark.parametrize(("dtype", "mean", "std"), [("float16", 0.0, 300.0), ("bfloat16", 100.0, 1.0)])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("param", ["float32", "low"])
def test_low_precision_inputs(dtype, mean, std, train, param):
    """Right to the format, whose unit roundoff is half of `eps`: a variance of 300^2 is beyond float16."""
    x = (mean + std * draw((256, 3), mean=0.0, std=1.0)).astype(dtype)
    params, stats = batch_norm.init(3, dtype if param == "low" else "float32")
    _, stats = batch_norm.apply(params, stats, x, train=True, momentum=0.0)
    assert stats.mean.dtype == jnp.float32
    y, _ = batch_norm.apply(params, stats, x, train=train)
    assert y.dtype == dtype
    expected = exact(np.asarray(x, np.float64))[0].astype(np.float64)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0.51 * eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.bfloat16])
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
        (lambda: batch_norm.normalize(jnp.ones((4, 3)), -1.0), ValueError, "epsilon must be >= 0 and finite, got -1.0"),
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
            lambda: batch_norm.apply(PARAMS, BatchStats(jnp.ones(1), jnp.ones(3), 0), jnp.ones((4, 3)), train=True),
            ValueError,
            r"mean has shape \(1,\)",
        ),
        (lambda: batch_norm.normalize(jnp.ones((4, 3)), np.nan), ValueError, "epsilon must be >= 0"),
        (lambda: batch_norm.normalize(jnp.ones((4, 3)), axis=(0, 0)), ValueError, "axis must name distinct"),
        (lambda: batch_norm.normalize(jnp.ones((4, 3)), axis=(1, 0)), ValueError, "ascending"),
        (lambda: batch_norm.normalize(jnp.ones(3)), ValueError, r"x \(3,\) must have an axis besides"),
        (lambda: batch_norm.apply(PARAMS, STATS, jnp.ones(3), train=True), ValueError, "an axis besides"),
        (lambda: batch_norm.apply(PARAMS, STATS, jnp.float32(3), train=False), ValueError, "axis must name"),
        (
            lambda: batch_norm.normalize(jnp.ones((4, 3)), mask=np.ones((4, 3), bool)),
            ValueError,
            r"mask \(4, 3\) must broadcast to \(4, 1\)",
        ),
        (
            lambda: batch_norm.normalize(jnp.ones((4, 3)), mask=np.ones(4, bool)),
            ValueError,
            r"mask \(4,\) must broadcast to \(4, 1\)",
        ),
        (lambda: batch_norm.init(3, "int32"), TypeError, "dtype must be floating point, got int32"),
        (lambda: batch_norm.normalize(jnp.ones((4, 3)), jnp.ones(3)), ValueError, r"epsilon must be a scalar"),
        (
            lambda: jax.jit(batch_norm.normalize)(jnp.ones((4, 3)), jnp.ones((4, 1))),
            ValueError,
            r"epsilon must be a scalar, got shape \(4, 1\)",
        ),
        (
            lambda: batch_norm.apply(PARAMS, STATS._replace(count=np.ones(3, int)), jnp.ones((4, 3)), train=True),
            ValueError,
            "count must be a scalar",
        ),
        (
            lambda: batch_norm.apply(PARAMS, STATS._replace(var=jnp.ones(3, int)), jnp.ones((4, 3)), train=True),
            TypeError,
            "the running var must be floating point, got int32",
        ),
        (
            lambda: batch_norm.apply(PARAMS, STATS, jnp.ones((4, 3)), train=True, momentum=np.nan),
            ValueError,
            "momentum must be None or in",
        ),
        (
            lambda: batch_norm.apply(PARAMS, STATS, jnp.ones((4, 3)), train=True, momentum=1.5),
            ValueError,
            "momentum must be None or in",
        ),
    ],
)
def test_bad_input(call, error_type, words):
    """At trace time: under jit too, before anything is computed."""
    for run in (call, lambda: jax.eval_shape(call)):
        with pytest.raises(error_type, match=words):
            run()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("detach", [("mean",), ("var",), ("mean", "var")])
def test_detached_statistics(x64, detach, masked):
    """Against autodiff of the formula with stop_gradient at the statistics; the value is the whole layer's."""
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=(2, 9, 4)) + 0.5
    params = BatchNormParams(*rng.normal(size=(2, 4)))
    stats = batch_norm.init(4, jnp.float64)[1]
    mask = (np.arange(9) > 2)[:, None] if masked else np.full((9, 1), True)
    hold = {name: jax.lax.stop_gradient if name in detach else lambda s: s for name in ("mean", "var")}

    def textbook(x, scale, bias):
        mean = jnp.where(mask, x, 0).sum(0) / mask.sum()
        var = hold["var"](jnp.where(mask, (x - mean) ** 2, 0).sum(0) / mask.sum())
        return jnp.where(mask, scale * (x - hold["mean"](mean)) / jnp.sqrt(var + 0.1), 0) + bias

    def layer(x, scale, bias, **options):
        params = BatchNormParams(scale, bias)
        return batch_norm.apply(params, stats, x, train=True, epsilon=0.1, mask=mask, **options)

    y, updated = layer(x, *params, detach=detach)
    expected, expected_stats = layer(x, *params)
    np.testing.assert_array_equal(y, expected)
    for value, other in zip(updated, expected_stats, strict=True):
        np.testing.assert_array_equal(value, other)
    grads = jax.grad(lambda *args: (a * layer(*args, detach=detach)[0]).sum(), (0, 1, 2))(x, *params)
    reference = jax.grad(lambda *args: (a * textbook(*args)).sum(), (0, 1, 2))(x, *params)
    for found, wanted in zip(grads, reference, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("detach", [("mean", "var"), ("mean",), ("var",)])
def test_second_derivatives_with_detached_statistics(x64, detach):
    """The rule is differentiated again: a detached statistic is a constant in every order."""
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=(2, 6, 2)) + 0.5
    params, stats = batch_norm.init(2, jnp.float64)
    hold = {name: jax.lax.stop_gradient if name in detach else lambda s: s for name in ("mean", "var")}

    def textbook(x):
        mean = hold["mean"](x.mean(0))
        return (a * (x - mean) / jnp.sqrt(hold["var"](((x - mean) ** 2).mean(0)) + 0.1)).sum()

    def layer(x):
        return (a * batch_norm.apply(params, stats, x, train=True, epsilon=0.1, detach=detach)[0]).sum()

    np.testing.assert_allclose(jax.hessian(layer)(x), jax.hessian(textbook)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("detach", ["mean", ("variance",)])
def test_bad_detach(detach):
    params, stats = batch_norm.init(4)
    with pytest.raises(ValueError, match="detach must be a sequence of 'mean' and 'var', got"):
        batch_norm.apply(params, stats, jnp.ones((3, 4)), train=True, detach=detach)


def test_train_is_true_or_false():
    with pytest.raises(TypeError, match="train must be True or False, got 'eval'"):
        batch_norm.apply.__wrapped__(PARAMS, STATS, jnp.ones((4, 3)), train="eval")


def test_a_traced_momentum_is_refused():
    def layer(momentum):
        return batch_norm.apply.__wrapped__(PARAMS, STATS, jnp.ones((4, 3)), train=True, momentum=momentum)

    with pytest.raises(TypeError, match="momentum must be a Python number or None, got a traced value"):
        jax.jit(layer)(0.9)


def test_a_mask_must_be_boolean():
    with pytest.raises(Exception, match=r"bool|Bool"):  # the annotations are checked first in the tests
        batch_norm.normalize(jnp.ones((4, 3)), mask=np.ones((4, 1), np.float32))
    with pytest.raises(TypeError, match="mask must be boolean, got float32"):
        batch_norm._check(jnp.ones((4, 3)), 0.0, -1, np.ones((4, 1), np.float32), False)


def test_a_single_example_in_evaluation():
    y, _ = batch_norm.apply(PARAMS, STATS, jnp.array([1.0, 2.0, 3.0]), train=False)
    np.testing.assert_allclose(y, np.array([1, 2, 3]) / np.sqrt(1 + 1e-5), rtol=1e-6)
