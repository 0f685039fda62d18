"""Mean-field theory of batch normalization against closed forms, sampled batches and its own recursion."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import activations
from bnjax.theory import mean_field


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
            return np.asarray(jax.vmap(jax.grad(lambda z: phi(scale * z + bias)))(z.reshape(-1))).reshape(z.shape)

        for batch_size in (8, 10):
            theory = mean_field.signal_fixed_point(phi, batch_size, epsilon, weight_std, scale=scale, bias=bias)
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
        at = [mean_field.signal_fixed_point(activation, batch_size, 1e-5 * a**2, 0.01 * a) for a in (1, 1e-3, 300)]
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

    @pytest.mark.parametrize("batch_size", [None, 16])
    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    def test_threshold_of_init_scale(self, activation, batch_size):
        """Of He's weights, sqrt(2) init_scale."""
        found = mean_field.init_scale_threshold(activation, 1e-5, batch_size)
        exact = mean_field.epsilon_threshold(activation, 1e-5, batch_size).dead_unstable
        assert found == exact / math.sqrt(2)
        if batch_size is None:
            variance_gained = 1 - 1 / math.pi if activation == "relu" else 2
            assert found == pytest.approx(math.sqrt(1e-5 / variance_gained), rel=1e-6)
        assert mean_field.init_scale_threshold(activation, 0, batch_size) == 0

    def test_threshold_with_a_scale(self):
        """psi'(0) = scale."""
        found = mean_field.epsilon_threshold("tanh", 1e-5, scale=2.0)
        assert found.dead_unstable**2 == pytest.approx(1e-5 / 4, rel=1e-6)

    @pytest.mark.parametrize("batch_size", [*(pytest.param(B, marks=pytest.mark.slow) for B in (4, 64)), 5, None])
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
        ("activation", "bias", "weight_std"), [("relu", 0.5, 2.5), ("relu", -1.0, 20.0), ("hard_tanh", 0.0, 2.5)]
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
        ("activation", "batch_size"), [("relu", None), ("tanh", 4), pytest.param("gelu", 16, marks=pytest.mark.slow)]
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
        with pytest.raises(ValueError, match=rf"at least 4, got {batch_size}: .*Theorem 8 of .* needs B >= 4"):
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
            ({"activation": "rleu"}, r"unknown activation 'rleu' \(did you mean 'relu'\?\); allowed: relu, .*tanh"),
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

    def test_others(self):
        with pytest.raises(ValueError, match="epsilon must be above 0: at epsilon 0 there is no threshold"):
            mean_field.epsilon_threshold("relu", 0.0)
        for depth in (0, 1.5, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"depth must be an integer >= 1, got {depth}"):
                mean_field.signal_by_layer("relu", depth)
