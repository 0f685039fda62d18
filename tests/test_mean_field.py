"""Mean-field theory against closed forms, the trapezoidal rule, sampled batches and wide networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts
import xarray as xr

import bnjax
from bnjax import activations
from bnjax.theory import mean_field

SMOOTH = {
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: 1 / (2 * np.cosh(z / 2)) ** 2),
    "softplus": (lambda z: np.log1p(np.exp(z)), lambda z: 1 / (1 + np.exp(-z))),
}


# The trapezoidal rule, which is exact to rounding for what is analytic and vanishes at both ends.
U = np.linspace(-10, 10, 201)
DENSITY = np.exp(-(U**2) / 2) / np.exp(-(U**2) / 2).sum()


def sampled(phi, dphi, batch_size, epsilon, variance, weight_std, samples=50_000):
    """V of the next layer and the growth, (mean, standard error) each, from batches of Gaussian pre-activations.

    By matrices: J = (I - 1 1^T / B - x_hat x_hat^T / B) / sigma, D = diag phi', G = I - 1 1^T / B.
    """
    rng = np.random.default_rng(0)
    B = batch_size
    z = math.sqrt(variance) * rng.normal(size=(samples, B))
    sigma = np.sqrt(z.var(1) + epsilon)[:, None]
    x_hat = (z - z.mean(1, keepdims=True)) / sigma
    G = np.eye(B) - 1 / B
    J = (G - x_hat[:, :, None] * x_hat[:, None] / B) / sigma[:, :, None]
    DJ = dphi(x_hat)[:, :, None] * J
    growth = weight_std**2 * np.einsum("sab,ac,scb->s", DJ, G, DJ, optimize=True) / (B - 1)
    following = weight_std**2 * phi(x_hat).var(1, ddof=1)
    return [(values.mean(), values.std() / math.sqrt(samples)) for values in (following, growth)]


class TestGradientGrowth:
    @pytest.mark.parametrize(
        ("activation", "batch_size", "expected"),
        [
            ("relu", None, math.pi / (math.pi - 1)),
            ("relu", 5, 2.2737),
            ("relu", 64, 1.49306),
            ("tanh", None, 1.17781),
            ("linear", None, 1.0),
            ("linear", 4, 2.0),
            ("linear", 64, 62 / 61),
        ],
    )
    def test_known_values(self, activation, batch_size, expected):
        assert mean_field.gradient_growth(activation, batch_size) == pytest.approx(expected, rel=2e-5)

    @pytest.mark.parametrize("batch_size", [None, 4, 5, 6, 9, 64, np.int64(1000), 10**6])
    @pytest.mark.parametrize("activation", ["relu", "linear"])
    def test_quadrature_is_the_closed_form(self, activation, batch_size):
        phi = activations.get(activation)
        assert mean_field.gradient_growth(lambda z: 3 * phi(z) - 1, batch_size) == pytest.approx(
            mean_field.gradient_growth(activation, batch_size), rel=1e-9
        )

    @pytest.mark.parametrize(("scale", "bias"), [(1, 0), (-0.7, 0.4), (2, -1)])
    @pytest.mark.parametrize("activation", SMOOTH)
    def test_infinite_batch_by_the_trapezoidal_rule(self, activation, scale, bias):
        phi, dphi = SMOOTH[activation]
        values, slopes = phi(scale * U + bias), scale * dphi(scale * U + bias)
        expected = DENSITY @ slopes**2 / (DENSITY @ (values - DENSITY @ values) ** 2)
        found = mean_field.gradient_growth(activation, scale=scale, bias=bias)
        assert found == pytest.approx(expected, rel=1e-9)
        assert found > 1

    def test_kinks_away_from_zero(self):
        """hard_tanh: E[phi'^2] = P(|u| < 1) = p, and its variance p - 2 density(1) + (1 - p)."""
        p, density = math.erf(math.sqrt(0.5)), math.exp(-0.5) / math.sqrt(2 * math.pi)
        expected = p / (p - 2 * density + (1 - p))
        assert mean_field.gradient_growth(jax.nn.hard_tanh) == pytest.approx(expected, rel=1e-9)
        shifted = mean_field.gradient_growth(jax.nn.relu6, 9, bias=3, scale=3)
        assert shifted == pytest.approx(mean_field.gradient_growth(jax.nn.hard_tanh, 9), rel=1e-9)

    @pytest.mark.parametrize("activation", activations.ACTIVATIONS)
    def test_batch_size(self, activation):
        """It falls with the batch size towards that of an infinite batch, never below 1."""
        sizes = (4, 5, 6, 8, 16, 64, 1024, 10**6)
        growth = [mean_field.gradient_growth(activation, B) for B in sizes]
        assert (np.diff(growth) < 0).all()
        infinite = mean_field.gradient_growth(activation)
        assert infinite >= 1
        assert growth[-1] == pytest.approx(infinite, rel=1e-5)
        assert growth[-2] > infinite

    def test_square(self):
        """By hand: Var z^2 = 2, E[(2 z)^2] = 4."""
        assert mean_field.gradient_growth(jnp.square) == pytest.approx(2, rel=1e-12)

    def test_a_callable_that_cannot_be_hashed(self):
        class Prelu:
            __hash__ = None

            def __call__(self, z):
                return jnp.where(z > 0, z, 0.01 * z)

        assert mean_field.gradient_growth(Prelu(), 7) == pytest.approx(
            mean_field.gradient_growth("leaky_relu", 7), rel=1e-12
        )

    @pytest.mark.parametrize(
        ("activation", "scale", "bias", "epsilon"),
        [
            pytest.param("relu", 1.0, 0.0, 0.0, marks=pytest.mark.slow),
            ("relu", 1.0, 0.0, 0.05),
            pytest.param("gelu", -1.0, 0.2, 0.0, marks=pytest.mark.slow),
            pytest.param("gelu", -1.0, 0.2, 0.05, marks=pytest.mark.slow),
            pytest.param("tanh", 2.0, 0.5, 0.0, marks=pytest.mark.slow),
            pytest.param("tanh", 2.0, 0.5, 0.05, marks=pytest.mark.slow),
            pytest.param("hard_tanh", 1.0, 0.3, 0.0, marks=pytest.mark.slow),
            pytest.param("hard_tanh", 1.0, 0.3, 0.05, marks=pytest.mark.slow),
        ],
    )
    def test_sampled_batches(self, activation, scale, bias, epsilon, x64):
        """Fixed point and growth at B = 8 and 10: |z| < 5 in 8 x 2 x 2 = 32 comparisons.

        50,000 batches each. A false alarm by chance alone: 2e-5 (1 / s has a finite fourth moment above B = 9
        only, so at 8 it is a bit more).
        """
        phi = getattr(jax.nn, activation, None) or activations.get(activation)
        weight_std = 0.9

        def psi(z):
            return np.asarray(phi(scale * jnp.asarray(z) + bias))

        def dpsi(z):
            return np.asarray(jax.vmap(jax.grad(lambda z: phi(scale * z + bias)))(z.reshape(-1))).reshape(
                z.shape
            )

        for batch_size in (8, 10):
            theory = mean_field.signal_fixed_point(
                phi, batch_size, epsilon, weight_std, scale=scale, bias=bias
            )
            assert theory.variance > 0.01
            results = sampled(psi, dpsi, batch_size, epsilon, theory.variance, weight_std)
            for (mean, error), expected in zip(results, (theory.variance, theory.growth), strict=True):
                assert error < 0.01 * expected
                assert abs(mean - expected) < 5 * error


class TestEpsilon:
    @pytest.mark.parametrize("weight_std", [1e-3, 0.1, 0.3, 0.5, 1.0, 1e3])
    def test_relu(self, weight_std):
        expected = min(weight_std**2 / (2 * 0.04), math.pi / (math.pi - 1))
        assert mean_field.gradient_growth("relu", None, 0.04, weight_std) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(("activation", "batch_size"), [("relu", 6), ("tanh", None), ("softplus", None)])
    def test_scale_law_and_limit(self, activation, batch_size):
        """(W, epsilon) -> (a W, a^2 epsilon) changes nothing; epsilon -> 0 is epsilon 0."""
        at = [
            mean_field.signal_fixed_point(activation, batch_size, 1e-5 * a**2, 0.01 * a)
            for a in (1, 1e-3, 300)
        ]
        for a, other in zip((1e-3, 300), at[1:], strict=True):
            assert other.variance == pytest.approx(at[0].variance * a**2, rel=1e-6)
            assert other.growth == pytest.approx(at[0].growth, rel=1e-6)
        small = mean_field.gradient_growth(activation, batch_size, 1e-12)
        assert small == pytest.approx(mean_field.gradient_growth(activation, batch_size), rel=1e-4)
        assert 0 < at[0].normalized_variance < 1

    @pytest.mark.parametrize(
        ("activation", "factor"),
        [
            ("relu", 2 * math.pi / (math.pi - 1)),
            ("tanh", 1.0),
            ("elu", 1.0),
            ("linear", 1.0),
            ("sigmoid", 16.0),
            ("softplus", 4.0),
            ("silu", 4.0),
        ],
    )
    def test_thresholds(self, activation, factor):
        """epsilon / phi'(0)^2, for one fixed point that dies where it loses its stability."""
        found = mean_field.epsilon_threshold(activation, 1e-5)
        assert found.dead_unstable**2 == pytest.approx(1e-5 * factor, rel=1e-6)
        assert found.alive == pytest.approx(found.dead_unstable, rel=1e-6)

    def test_threshold_with_a_scale(self):
        """psi'(0) = scale."""
        found = mean_field.epsilon_threshold("tanh", 1e-5, scale=2.0)
        assert found.dead_unstable**2 == pytest.approx(1e-5 / 4, rel=1e-6)

    @pytest.mark.parametrize(
        "batch_size", [*(pytest.param(B, marks=pytest.mark.slow) for B in (4, 64)), 5, None]
    )
    @pytest.mark.parametrize(("activation", "bias"), [("relu", 0.5), ("relu", -1.0), ("hard_tanh", 0.0)])
    def test_kinks_away_from_zero(self, activation, bias, batch_size):
        """epsilon -> 0 is epsilon 0; a small signal sees the slope at `bias` alone, psi'(0) of 1 or 0.

        The difference goes like epsilon E[1 / s^2] / E[1 / s], where E[1 / s^2] exists, like sqrt(epsilon) at B = 4.
        """
        phi = getattr(jax.nn, activation)
        small = mean_field.gradient_growth(phi, batch_size, 1e-11, bias=bias)
        without = mean_field.gradient_growth(phi, batch_size, bias=bias)
        assert small == pytest.approx(without, rel=2e-4 if batch_size == 4 else 1e-6)
        threshold = mean_field.epsilon_threshold(phi, 1e-5, batch_size, bias=bias)
        if bias < 0:
            assert math.isinf(threshold.dead_unstable)
            assert math.sqrt(1e-5) < threshold.alive < 0.1
        else:
            assert threshold.dead_unstable**2 == pytest.approx(1e-5, rel=1e-6)
            assert threshold.alive == pytest.approx(threshold.dead_unstable, rel=1e-6)

    @pytest.mark.parametrize("batch_size", [4, 5])
    @pytest.mark.parametrize(
        ("activation", "bias", "weight_std"),
        [("relu", 0.5, 2.5), ("relu", -1.0, 20.0), ("hard_tanh", 0.0, 2.5)],
    )
    def test_kinks_away_from_zero_by_sampled_batches(self, activation, bias, weight_std, batch_size):
        """At epsilon 0.3, where 1 / (V s/B + epsilon) is bounded: |z| < 5 in 3 x 2 x 2 = 12 comparisons.

        50,000 batches each; a false alarm by chance alone: 7e-6.
        """
        phi, epsilon = getattr(jax.nn, activation), 0.3
        upper = 1.0 if activation == "hard_tanh" else math.inf
        lower = -upper if activation == "hard_tanh" else 0.0

        def dpsi(z):
            return ((z + bias > lower) & (z + bias < upper)).astype(float)

        theory = mean_field.signal_fixed_point(phi, batch_size, epsilon, weight_std, bias=bias)
        assert theory.variance > 0.1
        results = sampled(
            lambda z: np.clip(z + bias, lower, upper), dpsi, batch_size, epsilon, theory.variance, weight_std
        )
        for (mean, error), expected in zip(results, (theory.variance, theory.growth), strict=True):
            assert error < 0.01 * expected
            assert abs(mean - expected) < 5 * error

    @pytest.mark.parametrize(
        ("activation", "batch_size"),
        [("relu", None), ("tanh", 4), pytest.param("gelu", 16, marks=pytest.mark.slow)],
    )
    def test_the_recursion_dies_below(self, activation, batch_size):
        threshold = mean_field.epsilon_threshold(activation, 0.1, batch_size).alive
        for factor in (0.9, 1.1):
            signal = mean_field.signal_by_layer(activation, 250, batch_size, 0.1, factor * threshold)
            assert (signal.variance[-1] > 1e-6) == (factor > 1)
            fixed = mean_field.signal_fixed_point(activation, batch_size, 0.1, factor * threshold)
            assert (fixed.variance > 0) == (factor > 1)
            np.testing.assert_allclose(fixed.growth, signal.growth[-1], rtol=1e-5)
            np.testing.assert_allclose(fixed.variance, signal.variance[-1], rtol=1e-5, atol=1e-6)
        assert fixed.growth > 1
        assert mean_field.gradient_growth(activation, batch_size, 0.1, 0.5 * threshold) < 0.5

    @pytest.mark.slow
    def test_two_stable_points(self):
        """gelu is steeper away from 0: between the thresholds it depends on the start which one is reached."""
        activation = "gelu"
        alive, dead = mean_field.epsilon_threshold(activation, 0.1)
        assert dead**2 == pytest.approx(0.1 * 4, rel=1e-6)
        assert 0.99 * dead < alive < 0.999 * dead
        between = (alive + dead) / 2
        for start, survives in ((1e-6, False), (1.0, True)):
            signal = mean_field.signal_fixed_point(activation, None, 0.1, between, start=start)
            assert (signal.variance > 0) == survives
            last = mean_field.signal_by_layer(activation, 20_000, None, 0.1, between, start=start)
            assert last.variance[-1] == pytest.approx(signal.variance, rel=1e-4, abs=1e-9)
        assert mean_field.signal_fixed_point(activation, None, 0.1, 0.999 * alive).variance == 0

    def test_layers_without_epsilon(self):
        """Only the first layer's growth knows of its V."""
        signal = mean_field.signal_by_layer("tanh", 4, 8, 0.0, 2.0, start=1.0)
        fixed = mean_field.signal_fixed_point("tanh", 8, 0.0, 2.0)
        near = mean_field.signal_by_layer("tanh", 4, 8, 1e-13, 2.0, start=1.0)
        np.testing.assert_allclose(signal.variance, [1.0, *[fixed.variance] * 3], rtol=1e-12)
        for found, expected in zip(near, signal, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4)

    def test_an_activation_that_swings(self):
        """E[sin^2] falls with the signal: the recursion swings over its fixed point and settles there."""
        fixed = mean_field.signal_fixed_point(jnp.sin, None, 0.5, 2.0, scale=3.0)
        last = mean_field.signal_by_layer(jnp.sin, 300, None, 0.5, 2.0, scale=3.0)
        assert fixed.variance == pytest.approx(last.variance[-1], rel=1e-8)


class TestOrderChaos:
    @pytest.mark.parametrize(
        ("weight_std", "bias_std", "variance", "phase"),
        [
            (1.0, 0.0, 0.0, "ordered"),
            (1.0, 0.5, 0.5, "ordered"),
            (math.sqrt(2), 0.0, 2.0, "critical"),
            (2.0, 0.0, math.inf, "chaotic"),
        ],
    )
    def test_relu(self, weight_std, bias_std, variance, phase):
        """q* = bias_std^2 / (1 - weight_std^2 / 2), chi_1 = weight_std^2 / 2, by hand."""
        found = mean_field.order_chaos("relu", weight_std, bias_std)
        assert found.variance == pytest.approx(variance, rel=1e-9)
        assert found.chi_1 == pytest.approx(weight_std**2 / 2, rel=1e-6)
        assert found.phase == phase
        assert found.correlation == 1

    @pytest.mark.parametrize(
        ("weight_std", "bias_std"), [(0.8, 0.3), (2.0, 0.0), pytest.param(2.5, 0.4, marks=pytest.mark.slow)]
    )
    def test_tanh_by_the_trapezoidal_rule(self, weight_std, bias_std):
        """The definitions, iterated 2000 times in a plain loop."""
        u, weights = U[::2], DENSITY[::2] * 2
        q = 1.0
        for _ in range(2000):
            q = weight_std**2 * weights @ np.tanh(math.sqrt(q) * u) ** 2 + bias_std**2

        def pair(f, c):
            second = c * u[:, None] + math.sqrt(1 - c * c) * u
            return weights @ (f(math.sqrt(q) * u)[:, None] * f(math.sqrt(q) * second)) @ weights

        c = 0.1
        for _ in range(1000):
            c = min(1.0, (weight_std**2 * pair(np.tanh, c) + bias_std**2) / q)
        slope = weight_std**2 * pair(lambda z: 1 / np.cosh(z) ** 2, c)
        found = mean_field.order_chaos("tanh", weight_std, bias_std)
        assert found.variance == pytest.approx(q, rel=1e-5)
        assert found.correlation == pytest.approx(c, abs=1e-3)
        assert found.chi_c == pytest.approx(slope, rel=1e-3)
        assert found.xi_c == pytest.approx(-1 / math.log(slope), rel=0.05)
        assert found.xi_grad == pytest.approx(1 / abs(math.log(found.chi_1)))
        step = 1e-4
        near = weight_std**2 * weights @ np.tanh(math.sqrt(q + step) * u) ** 2 + bias_std**2
        assert found.xi_q == pytest.approx(-1 / math.log((near - q) / step), rel=1e-2)

    def test_tanh_is_critical_at_1(self):
        """And near it chi_1 crosses 1 (Schoenholz et al. 2017)."""
        phases = [mean_field.order_chaos("tanh", w).phase for w in (0.9, 1.0, 1.1)]
        assert phases == ["ordered", "critical", "chaotic"]
        assert math.isinf(mean_field.order_chaos("tanh", 1.0).xi_grad)
        assert math.isnan(mean_field.order_chaos("linear", 1.0).correlation)

    @pytest.mark.parametrize(
        ("activation", "weight_std"),
        [
            ("tanh", 1.6),
            *(pytest.param(*case, marks=pytest.mark.slow) for case in [("sigmoid", 3.0), ("relu", 1.8)]),
        ],
    )
    def test_wide_networks(self, activation, weight_std):
        """chi_1 against the gradients of 32 networks of width 400.

        Within 4 standard errors over seeds plus 2 / width = 0.5% of chi_1, since finite width adds an error of some
        1 / width: beyond the 4 errors alone it is 6e-5 each if chance alone decides.
        """
        width, depth, seeds = 400, 5, 32
        model = bnjax.mlp((width,) * depth, 10, activation, "none", initializer="lecun_normal")
        theory = mean_field.order_chaos(activation, weight_std)
        size = 1.0 if math.isinf(theory.variance) else theory.variance
        rng = np.random.default_rng(1)
        x = np.linalg.qr(rng.normal(size=(width, 4)))[0].T * math.sqrt(width * size) / weight_std
        cotangent = rng.normal(size=(4, 10))
        names = [f"hidden_{i}/preactivation" for i in range(depth)]

        @jax.jit
        def squares(seed):
            params, stats = model.init(jax.random.key(seed), (width,), weight_std)
            offsets = {name: jnp.zeros((4, width)) for name in names}

            def objective(offsets):
                return (model.layers(params, stats, x, offsets, train=True)[0] * cotangent).sum()

            gradients = jax.grad(objective)(offsets)
            return jnp.stack([(gradients[name] ** 2).sum() for name in names])

        found = np.stack([squares(seed) for seed in range(seeds)])
        ratios = (found[:, 0] / found[:, -1]) ** (1 / (depth - 1))
        error = ratios.std(ddof=1) / math.sqrt(seeds)
        assert error < 0.02 * theory.chi_1
        assert abs(ratios.mean() - theory.chi_1) < 4 * error + 2 / width * theory.chi_1


class TestDepth:
    def test_scales(self):
        assert mean_field.depth_scale(math.e) == pytest.approx(1)
        assert mean_field.depth_scale(1 / math.e) == pytest.approx(1)
        assert mean_field.depth_scale(1.0) == math.inf
        growth = mean_field.gradient_growth("relu", 64)
        depth = mean_field.depth_at_ratio(growth, 1e6)
        assert growth**depth == pytest.approx(1e6)
        assert mean_field.depth_at_ratio(1 / growth, 1e6) == pytest.approx(depth)
        assert mean_field.depth_at_ratio(1.0, 10.0) == math.inf

    @pytest.mark.parametrize("growth", [0, -1.0, math.inf, math.nan])
    def test_bad_growth(self, growth):
        with pytest.raises(ValueError, match="growth must be above 0 and finite, got"):
            mean_field.depth_scale(growth)

    @pytest.mark.parametrize("ratio", [1, 0.5, math.inf, math.nan])
    def test_bad_ratio(self, ratio):
        with pytest.raises(ValueError, match="ratio must be above 1 and finite, got"):
            mean_field.depth_at_ratio(1.5, ratio)


class TestBadInput:
    @pytest.mark.parametrize("batch_size", [3, 2, 0, -4])
    def test_batch_size_too_small(self, batch_size):
        with pytest.raises(
            ValueError, match=rf"at least 4, got {batch_size}: .*Theorem 8 of .* needs B >= 4"
        ):
            mean_field.gradient_growth("relu", batch_size)
        with pytest.raises(
            ValueError, match=rf"at least 4, got {batch_size}: at epsilon above 0 .* finite for 2 and 3"
        ):
            mean_field.gradient_growth("relu", batch_size, epsilon=1e-5)

    @pytest.mark.parametrize("batch_size", [4.5, math.nan, math.inf, True, 1e12])
    def test_batch_size_of_another_kind(self, batch_size):
        with pytest.raises(ValueError, match=r"batch_size must be (an integer|at most)"):
            mean_field.gradient_growth("relu", batch_size)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"activation": "rleu"},
                r"unknown activation 'rleu' \(did you mean 'relu'\?\); allowed: relu, .*tanh",
            ),
            ({"epsilon": -1e-5}, "epsilon must be >= 0 and finite, got -1e-05"),
            ({"epsilon": math.inf}, "epsilon must be >= 0 and finite, got inf"),
            ({"weight_std": 0}, "weight_std must be above 0 and finite, got 0"),
            ({"weight_std": math.nan}, "weight_std must be above 0 and finite, got nan"),
            ({"scale": 0.0}, "scale must be finite and not 0, got 0.0"),
            ({"bias": math.inf}, "bias must be finite, got inf"),
            ({"start": 0.0, "epsilon": 0.1}, "start must be above 0 and finite, got 0.0"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            mean_field.gradient_growth(**({"activation": "relu"} | options))

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
    def test_functions(self, phi, message):
        with pytest.raises(ValueError, match=message):
            mean_field.gradient_growth(phi)

    def test_range_of_a_finite_batch(self):
        """At B = 5 BN's outputs lie within 2 of 0, where log(z + 2.5) is finite."""
        assert mean_field.gradient_growth(lambda z: jnp.log(z + 2.5), 5) > 1
        with pytest.raises(ValueError, match=r"not finite at .* range \[-2\.999, 3\]"):
            mean_field.gradient_growth(lambda z: jnp.log(z + 2.5), 10)

    def test_others(self):
        with pytest.raises(ValueError, match="epsilon must be above 0: at epsilon 0 there is no threshold"):
            mean_field.epsilon_threshold("relu", 0.0)
        for depth in (0, 1.5, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"depth must be an integer >= 1, got {depth}"):
                mean_field.signal_by_layer("relu", depth)
        with pytest.raises(ValueError, match=r"bias_std must be >= 0 and finite, got -0\.1"):
            mean_field.order_chaos("tanh", 1.0, -0.1)
        with pytest.raises(ValueError, match="weight_std must be above 0"):
            mean_field.order_chaos("tanh", 0.0)
        with pytest.raises(ValueError, match="faster than exponentially"):
            mean_field.order_chaos(jnp.square, 1.0)


class TestExperiment:
    @pytest.fixture
    def main(self, tmp_path):
        """Runs the experiment with its defaults but for the flags given; --out is tmp_path/out."""

        def call(**options):
            scripts.run("mean_field", **({"out": str(tmp_path / "out")} | options))
            return tmp_path / "out"

        return call

    @pytest.mark.slow
    def test_growth(self, main, capsys):
        """One point with a z, from 90 networks and more: it fails at |z| >= 4, 1e-4 by chance alone (Student)."""
        folder = main(parts="growth", activations="relu", batch_sizes="5,8", width=32, seeds=90)
        results = bnjax.load_results(folder / "results.zarr")
        assert results.growth_z.sizes == {"growth_activation": 1, "growth_batch_size": 2}
        z = results.growth_z.sel(growth_batch_size=8)
        assert (np.abs(z) < 4).all()
        assert np.isnan(results.growth_z.sel(growth_batch_size=5)).all()
        assert (results.growth_error < 0.1 * results.growth_theory).all()
        assert float(
            results.growth_theory.sel(growth_activation="relu", growth_batch_size=5)
        ) == pytest.approx(mean_field.gradient_growth("relu", 5))
        assert (folder / "growth.png").stat().st_size > 10_000
        printed = capsys.readouterr().out
        assert "1.7882" in printed  # ReLU at batch size 8
        assert "1 points with a z" in printed
        assert str(folder) in printed

    @pytest.mark.slow
    def test_epsilon_and_chaos(self, main, capsys):
        """chi_1 at 9 points: it fails at |z| >= 4, 6e-5 each by chance alone; the threshold within 5 errors."""
        small = {
            "epsilon_activations": "relu,sigmoid",
            "epsilon_depth": 4,
            "epsilon_width": 64,
            "epsilon_seeds": 16,
        }
        folder = main(parts="epsilon,chaos", **small)
        results = bnjax.load_results(folder / "results.zarr")
        assert (np.abs(results.chaos_z) < 4).all()
        off = np.abs(results.epsilon_threshold - results.epsilon_threshold_theory)
        assert (off < 5 * results.epsilon_threshold_error + 0.02 * results.epsilon_threshold_theory).all()
        assert (results.epsilon_threshold_error < 0.05 * results.epsilon_threshold_theory).all()
        assert (np.diff(results.epsilon_variance) > 0).all()
        assert (folder / "epsilon.png").stat().st_size > 10_000
        assert "init_scale below which the signal dies" in capsys.readouterr().out

    def test_nan_fails(self):
        """Where a variance exists, a point that is not a number counts, and below batch size 6 none does."""
        module = scripts.load("mean_field")
        z = xr.DataArray([[np.nan, -1.0, np.nan]], dims=("activation", "batch_size"))
        growth = xr.Dataset({"z": z}, {"batch_size": [5, 6, 8]})
        found = module.z_values(growth)
        np.testing.assert_array_equal(found, [1.0, np.nan])
        assert not (found < module.MOST_Z).all()
        chaos = xr.Dataset({"z": ("case", [-3.0, np.inf, 1.0])})
        np.testing.assert_array_equal(module.z_values(chaos), [3.0, np.inf, 1.0])

    def test_answer(self):
        """Linear networks keep the gradient in an infinite batch: nothing grows there."""
        module = scripts.load("mean_field")

        def answer(names):
            infinite = [mean_field.gradient_growth(name) for name in names]
            finite = [[mean_field.gradient_growth(name, B) for B in (4, 8)] for name in names]
            return module.growth_answer(
                xr.Dataset(
                    {
                        "theory": (("activation", "batch_size"), finite),
                        "theory_infinite_batch": ("activation", infinite),
                    },
                    {"activation": np.array(names, object), "batch_size": [4, 8]},
                )
            )

        assert "gradients keep their size with linear; at batch size 4 with linear" in answer(["linear"])
        assert "grows 2.000 times" in answer(["linear"])
        assert "most with relu, in an infinite batch 1.467 times" in answer(["linear", "relu"])
        assert "whatever the weights' size; with relu, in" in answer(["relu"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"depth": 0}, "--depth must be at least 2, got 0"),
            ({"batch_sizes": "3,8"}, r"--batch_sizes takes integers from 4 .* got '3,8': .*Theorem 8"),
            ({"batch_sizes": "a"}, "--batch_sizes takes integers"),
            ({"activations": "relu,rleu"}, r"unknown activation in --activations 'rleu' .*; allowed: relu, "),
            ({"activations": "relu,relu"}, "--activations takes at least one name, each of them once"),
            ({"epsilon_activations": ""}, "--epsilon_activations takes at least one name"),
            ({"epsilon_activations": "x"}, "unknown activation in --epsilon_activations 'x'"),
            ({"parts": "grwoth"}, r"unknown part in --parts 'grwoth' \(did you mean 'growth'\?\)"),
            ({"epsilon": -1e-5}, r"--epsilon must be in \[1e-12, 1\], got -1e-05"),
            ({"seeds": 1}, "--seeds must be at least 16, got 1"),
            ({"epsilon_width": 8}, "--epsilon_width must be at least 64, got 8"),
        ],
    )
    def test_bad_flags(self, main, options, message):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main(**options)

    def test_out_that_cannot_be_written(self, main, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit, match=r"--out=.*cannot be written"):
            main(out=str(tmp_path / "file"))
