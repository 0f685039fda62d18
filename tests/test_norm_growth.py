"""Growth of the squared gradient for each norm: closed forms, sampled layers by automatic differentiation, networks."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import activations
from bnjax.theory import lp_norms, mean_field, norm_growth
from bnjax.theory.order_chaos import order_chaos


def growth(activation, norm, num_features=None, **options):
    return mean_field.gradient_growth(activation, norm=norm, num_features=num_features, **options)


def ratio(numerator, denominator):
    """The ratio of two means over samples, and its standard error."""
    found = numerator.mean() / denominator.mean()
    residual = (numerator - found * denominator) / denominator.mean()
    return found, residual.std() / math.sqrt(len(residual))


class TestClosedForms:
    @pytest.mark.parametrize("num_features", [4, 5, 8, np.int64(33), 1024])
    @pytest.mark.parametrize("activation", ["relu", "linear"])
    def test_groups(self, activation, num_features):
        """(d - 1) / (d - 2)."""
        m = int(num_features)
        assert growth(activation, "group", num_features) == pytest.approx((m - 2) / (m - 3), rel=1e-12)
        centred = norm_growth.group(activation, m, centered=False).growth
        assert centred == pytest.approx((m - 1) / (m - 2), rel=1e-12)
        assert growth(activation, "group") == pytest.approx(1, rel=1e-12)

    def test_four_features_by_hand(self):
        """On a sphere in three dimensions a coordinate is uniform, on [-sqrt(3), sqrt(3)] here (Archimedes)."""
        inside = 1 / math.sqrt(3)  # P(|y| < 1)
        expected = inside * (3 - 1 / 3) / (inside / 3 + 1 - inside)
        assert growth(jax.nn.hard_tanh, "group", 4) == pytest.approx(expected, rel=1e-9)
        assert growth(jax.nn.relu6, "group", 4, scale=3, bias=3) == pytest.approx(
            inside * (3 - 1 / 3) * 9 / (9 * (1 + inside / 3 + 1 - inside)), rel=1e-9
        )
        assert growth(jnp.square, "group", 4) == pytest.approx(4 * (3 - 9 / 5) / (9 / 5), rel=1e-9)

    @pytest.mark.parametrize("num_features", [16, 100])
    def test_one_group(self, num_features):
        n = num_features
        assert growth("linear", "layer", n) == pytest.approx((n - 2) / (n - 3), rel=1e-12)
        assert growth("linear", "rms", n) == pytest.approx((n - 1) / (n - 2), rel=1e-12)
        relu = (n - 2) / (n - 3) * (1 + (1 - 2 / math.pi) / n)
        assert growth("relu", "layer", n) == pytest.approx(relu, rel=1e-9)
        assert growth("relu", "rms", n) == pytest.approx((n - 1) / (n - 2) * (1 + 1 / n), rel=1e-9)

    def test_one_group_of_relu_without_a_mean(self):
        """E[(k - 1) / (k - 2)] for k active of n, where k > 2: `rms` is right to the order 1 / n."""
        for n in (64, 256, 1024):
            k = np.arange(3, n + 1)
            logs = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])
            chance = np.exp(logs - logs.max())
            chance /= chance.sum()
            exact = chance @ ((k - 1) / (k - 2))
            assert 0 < exact - growth("relu", "rms", n) < 10 / n**2

    @pytest.mark.parametrize(("norm", "largest"), [("group", 10**6), ("layer", 10**6), ("rms", 10**6), ("l1", 4096)])
    @pytest.mark.parametrize("activation", ["sigmoid", pytest.param("gelu", marks=pytest.mark.slow)])
    def test_limit(self, norm, largest, activation):
        """Off by a few times 1 / size."""
        option = "batch_size" if norm == "l1" else "num_features"
        assert growth(activation, norm, **{option: largest}) == pytest.approx(growth(activation, norm), rel=8 / largest)

    @pytest.mark.parametrize("activation", ["tanh", "relu", "softplus"])
    def test_infinite_norms_are_two(self, activation):
        """What divides by the second moment, and what removes the mean over the batch."""
        assert growth(activation, "layer") == growth(activation, "rms") == growth(activation, "group")
        batch = mean_field.gradient_growth(activation)
        assert growth(activation, "l1") == pytest.approx(batch, rel=1e-12)
        assert growth(activation, "weight_standardized") == pytest.approx(batch, rel=1e-12)
        assert norm_growth.detached_batch(activation) == pytest.approx(batch, rel=1e-12)
        assert growth(activation, "layer") <= batch

    def test_batch_is_as_before(self):
        for activation, batch_size in (("relu", 5), ("tanh", None), ("gelu", 8)):
            default = mean_field.gradient_growth(activation, batch_size)
            assert growth(activation, "batch", batch_size=batch_size) == default
            assert growth(activation, "l2", batch_size=batch_size) == default
            assert lp_norms.lp(activation, 2, batch_size).growth == pytest.approx(default, rel=1e-12)

    def test_kernels(self):
        assert growth("relu", "weight") == pytest.approx(0.5, rel=1e-12)
        assert growth("relu", "none", weight_std=math.sqrt(2)) == pytest.approx(1, rel=1e-12)
        assert growth("tanh", "none", weight_std=0.8) == order_chaos("tanh", 0.8).chi_1
        assert growth("sigmoid", "weight", weight_std=3.0) == order_chaos("sigmoid", 1.0).chi_1
        assert growth("relu", "weight_standardized") == pytest.approx(math.pi / (math.pi - 1), rel=1e-9)
        assert norm_growth.weight_standardized("relu", 1.3) == pytest.approx(1.3**2 / 2, rel=1e-9)

    def test_gain_of_standardized_kernels(self):
        """The fixed point of q -> gain^2 Var phi(sqrt(q) z), iterated with the trapezoidal rule."""
        u = np.linspace(-10, 10, 201)
        density = np.exp(-(u**2) / 2) / np.exp(-(u**2) / 2).sum()
        q = 1.0
        for _ in range(200):
            value = 1 / (1 + np.exp(-math.sqrt(q) * u))
            q = 36 * density @ (value - density @ value) ** 2
        expected = 36 * density @ (value * (1 - value)) ** 2
        assert norm_growth.weight_standardized("sigmoid", 6) == pytest.approx(expected, rel=1e-7)

    def test_constants_of_spreads(self):
        """E max(|z_1|, |z_2|) = 2 / sqrt(pi), by hand."""
        assert lp_norms.gaussian_spread(math.inf, 1) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-10)
        assert lp_norms.gaussian_spread(math.inf, 2) == pytest.approx(2 / math.sqrt(math.pi), rel=1e-10)
        assert lp_norms.gaussian_spread(1) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-15)


# Norms of one sample or batch x [m], for the samplers below.


def centred(x):
    return x - x.mean()


def root_mean_square(x):
    return x / jnp.sqrt((x**2).mean())


def standardized(x):
    return root_mean_square(centred(x))


def by_mean(x):
    return centred(x) / (jnp.abs(centred(x)).mean() / math.sqrt(2 / math.pi))


def by_maximum(x):
    return centred(x) / (jnp.abs(centred(x)).max() / lp_norms.gaussian_spread(math.inf, len(x)))


def detached(x):
    mean = jax.lax.stop_gradient(x.mean())
    return (x - mean) / jax.lax.stop_gradient(x.std())


def sampled_layer(norm, activation, size, scale, bias, over_batch, detached=False, samples=100_000):
    """Growth of a layer, its standard error, from `samples` Gaussian groups or batches, by automatic differentiation.

    The gradient to psi(y) is Gaussian, orthogonal to 1 if it comes through a norm of the batch.
    """
    rng = np.random.default_rng(1)  # theory samples with seed 0
    phi = activations.get(activation)
    h, gradient = rng.normal(size=(2, samples, size))
    if over_batch and not detached:
        gradient -= gradient.mean(1, keepdims=True)

    def backward(h, gradient):
        value, pull = jax.vjp(lambda h: phi(scale * norm(h) + bias), h)
        return value, pull(gradient)[0]

    value, gradient = (np.asarray(part) for part in jax.jit(jax.vmap(backward))(h, gradient))
    degrees = size - 1 if over_batch and not detached else size
    signal = value.var(1, ddof=1) if over_batch else (value**2).mean(1)
    return ratio((gradient**2).sum(1) / degrees, signal)


class TestSampledLayers:
    """|z| < 4 in each of 16 comparisons with 100,000 samples: a false alarm by chance alone, 1e-3."""

    @pytest.mark.parametrize(
        ("activation", "num_features", "scale", "bias"),
        [
            ("relu", 9, 1.0, 0.0),
            pytest.param("tanh", 9, 2.0, 0.5, marks=pytest.mark.slow),
            pytest.param("sigmoid", 16, 1.0, 0.0, marks=pytest.mark.slow),
            ("gelu", 16, -1.5, 0.3),
        ],
    )
    @pytest.mark.parametrize("is_centred", [True, False])
    def test_groups(self, activation, num_features, scale, bias, is_centred, x64):
        norm = standardized if is_centred else root_mean_square
        found, error = sampled_layer(norm, activation, num_features, scale, bias, over_batch=False)
        theory = norm_growth.group(activation, num_features, centered=is_centred, scale=scale, bias=bias)
        assert error < 0.005 * found
        assert abs(found - theory.growth) < 4 * error

    @pytest.mark.parametrize(
        ("activation", "batch_size", "scale", "bias"),
        [
            ("relu", 9, 1.0, 0.0),
            pytest.param("tanh", 16, 2.0, 0.5, marks=pytest.mark.slow),
            pytest.param("sigmoid", 32, 1.0, 0.0, marks=pytest.mark.slow),
        ],
    )
    @pytest.mark.parametrize("p", [1, math.inf])
    def test_batches(self, p, activation, batch_size, scale, bias, x64):
        """Theory is sampled, too, with control variates: its error is a fifth of the layer's or less."""
        norm = by_mean if p == 1 else by_maximum
        found, error = sampled_layer(norm, activation, batch_size, scale, bias, over_batch=True)
        theory = lp_norms.lp(activation, p, batch_size, scale=scale, bias=bias)
        assert theory.error < 0.001 * theory.growth
        assert error < 0.005 * found
        assert abs(found - theory.growth) < 4 * math.hypot(error, theory.error)

    @pytest.mark.parametrize(("activation", "batch_size"), [("relu", 9), ("tanh", 16)])
    def test_detached(self, activation, batch_size, x64):
        found, error = sampled_layer(detached, activation, batch_size, 1.0, 0.0, over_batch=True, detached=True)
        assert error < 0.005 * found
        assert abs(found - norm_growth.detached_batch(activation, batch_size)) < 4 * error


def test_own_growth():
    """The value's function decides, with the arguments that it was given."""
    norm = SimpleNamespace(growth=lambda activation, num_features, batch_size: (num_features or 0) + batch_size / 2)
    assert mean_field.gradient_growth("relu", 8, norm=norm, num_features=3) == 7.0


NO_THEORY = SimpleNamespace(growth=None)
GIVES_NONE = SimpleNamespace(growth=lambda activation, num_features, batch_size: None)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"norm": "lajer"},
                r"unknown norm .lajer. \(did you mean .layer.\?\); allowed: batch, l1, l2, linf, layer, .*none",
            ),
            ({"norm": 3}, "norm must be one of batch, .*, or have an attribute growth; got 3"),
            ({"norm": None}, "norm must be one of batch, .*; got None"),
            ({"norm": NO_THEORY}, "has no theory"),
            ({"norm": GIVES_NONE}, "has no theory"),
            ({"norm": GIVES_NONE, "scale": 2.0}, "scale is no argument of a norm's own growth"),
            ({"norm": GIVES_NONE, "weight_std": 2.0}, "weight_std is no argument of a norm's own growth"),
            ({"num_features": 8}, "num_features is not an argument of norm 'batch': it normalizes over the batch_size"),
            ({"norm": "l2", "num_features": 8}, "num_features is not an argument of norm 'l2'"),
            ({"norm": "layer", "batch_size": 8}, "batch_size is not an argument of norm 'layer', which takes num_feat"),
            ({"norm": "l1", "num_features": 8}, "num_features is not an argument of norm 'l1', which takes batch_size"),
            ({"norm": "none", "num_features": 8}, "'none', which takes no arguments besides activation and weight_std"),
            ({"norm": "group", "epsilon": 1e-5}, "epsilon is not an argument of norm 'group'"),
            ({"norm": "weight", "start": 1.0}, "start is not an argument of norm 'weight'"),
            (
                {"norm": "group", "num_features": 3},
                "at least 4, got 3: below, the expected squared gradient is infinite",
            ),
            ({"norm": "layer", "num_features": 15}, "at least 16, got 15: below, this is an expansion in 1 / num_feat"),
            ({"norm": "rms", "num_features": 8.5}, "num_features must be a positive integer, got 8.5"),
            ({"norm": "group", "num_features": 0}, "num_features must be a positive integer, got 0"),
            ({"norm": "linf"}, "norm 'linf' needs a batch_size"),
            ({"norm": "l1", "batch_size": 3}, "batch_size must be from 4 to 4096, got 3"),
            ({"norm": "layer", "weight_std": 0}, "weight_std must be above 0 and finite, got 0"),
            ({"norm": "layer", "scale": 0.0}, "scale must be finite and not 0, got 0.0"),
            ({"norm": "layer", "activation": "rleu"}, "unknown activation 'rleu'"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            mean_field.gradient_growth(**({"activation": "relu"} | options))

    def test_others(self):
        with pytest.raises(ValueError, match="at least 3, got 2"):
            norm_growth.group("relu", 2, centered=False)
        with pytest.raises(ValueError, match="p must be 1, 2 or inf, got 3"):
            lp_norms.lp("relu", 3, 8)
        with pytest.raises(ValueError, match="unknown norm 'weight'"):
            norm_growth.layer("weight", "relu")
        with pytest.raises(ValueError, match="gain must be above 0 and finite, got 0"):
            norm_growth.weight_standardized("relu", 0)
