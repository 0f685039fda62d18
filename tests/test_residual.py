"""Residual networks' signals and gradients by depth, and gradients of networks of equal layers, against networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import activations
from bnjax.theory import mean_field, norm_growth
from bnjax.theory.residual import residual_signal

HE = math.sqrt(2)


def gamma_ratio(depth, r, growth):
    """The product of 1 + growth / (l + r) for l < depth."""
    logs = math.lgamma(depth + r + growth) + math.lgamma(r) - math.lgamma(depth + r) - math.lgamma(r + growth)
    return math.exp(logs)


class TestClosedForms:
    def test_layer_normalization(self):
        """He's weights and ReLU: every branch has variance 1, and the gradient is as deep as what is ahead of it."""
        found = residual_signal("relu", 20, norm="layer", weight_std=HE)
        np.testing.assert_allclose(found.variance, 1 + np.arange(21), rtol=1e-12)
        np.testing.assert_allclose(found.growth, 1 + 1 / (1 + np.arange(20)), rtol=1e-12)
        np.testing.assert_allclose(found.squared_gradient, 21 / (1 + np.arange(21)), rtol=1e-12)

    @pytest.mark.parametrize(("batch_size", "layers"), [(None, 1), (None, 2), (8, 1)])
    def test_batch_normalization(self, batch_size, layers):
        """Polynomial in the depth; the exponent is the growth per layer of a network without skip connections."""
        found = residual_signal("relu", 500, batch_size=batch_size, weight_std=HE, layers_per_branch=layers, start=2.0)
        signal = mean_field.signal_fixed_point("relu", batch_size, weight_std=HE)
        np.testing.assert_allclose(found.variance, 2 + np.arange(501) * signal.variance, rtol=1e-9)
        np.testing.assert_allclose(found.second_moment, 2 + np.arange(501), rtol=1e-9)
        expected = gamma_ratio(500, 2 / signal.variance, signal.growth**layers)
        assert found.squared_gradient[0] == pytest.approx(expected, rel=1e-9)
        growth = signal.growth**layers
        shift = 2 / signal.variance + (growth - 1) / 2  # Gamma(x + g) / Gamma(x) = (x + (g - 1) / 2)^g to 1 / x^2
        exponent = math.log(found.squared_gradient[100] / found.squared_gradient[400])
        exponent /= math.log((400 + shift) / (100 + shift))
        assert exponent == pytest.approx(growth, rel=1e-4)

    @pytest.mark.parametrize(("alpha", "layers"), [(1.0, 1), (0.5, 1), (0.5, 3)])
    def test_no_norm_is_exponential(self, alpha, layers):
        found = residual_signal(
            "relu", 30, norm="none", branch_scale=alpha, weight_std=HE, layers_per_branch=layers, start=0.1
        )
        np.testing.assert_allclose(found.variance, 0.1 * (1 + alpha**2) ** np.arange(31), rtol=1e-9)
        np.testing.assert_allclose(found.squared_gradient, (1 + alpha**2) ** np.arange(30, -1, -1.0), rtol=1e-9)

    @pytest.mark.parametrize("norm", norm_growth.NAMES)
    def test_no_branch_is_the_identity(self, norm):
        """SkipInit and Fixup at initialization."""
        batch_size = 8 if norm == "linf" else None
        found = residual_signal("tanh", 3, norm=norm, branch_scale=0, batch_size=batch_size, start=3.0)
        assert (found.variance == 3).all()
        assert (found.squared_gradient == 1).all()

    def test_norms_of_the_kernel(self):
        """ReLU: weight normalization halves what a branch adds; standardized kernels add what there is."""
        weight = residual_signal("relu", 5, norm="weight", weight_std=9.0)
        np.testing.assert_allclose(weight.squared_gradient, 1.5 ** np.arange(5, -1, -1.0), rtol=1e-9)
        standardized = residual_signal("relu", 5, norm="weight_standardized")
        np.testing.assert_allclose(standardized.variance, 2.0 ** np.arange(6), rtol=1e-9)
        np.testing.assert_allclose(standardized.growth, 1 + math.pi / (math.pi - 1), rtol=1e-9)

    def test_a_bounded_activation_without_a_norm(self):
        """tanh saturates: each block adds nearly weight_std^2, and 1 + E[tanh'(sqrt(V) z)^2] falls to 1."""
        found = residual_signal("tanh", 30, norm="none")
        assert (np.diff(found.variance, 2) > 0).all()
        assert 0.8 < np.diff(found.variance)[-1] < 1
        assert (np.diff(found.growth) < 0).all()
        assert 1 < found.growth[-1] < 1.12


# Networks.


def normalize(norm, h, group_size):
    """h [B, n] after the norm."""
    if norm == "batch":
        return (h - h.mean(0)) / h.std(0)
    if norm == "layer":
        return (h - h.mean(1, keepdims=True)) / h.std(1, keepdims=True)
    if norm == "rms":
        return h / jnp.sqrt((h**2).mean(1, keepdims=True))
    if norm == "group":
        groups = h.reshape(len(h), -1, group_size)
        return ((groups - groups.mean(2, keepdims=True)) / groups.std(2, keepdims=True)).reshape(h.shape)
    return h


def normalize_kernel(norm, kernel, gain):
    """Kernel [in, out] of standard normal numbers, as used."""
    if norm == "weight":
        return kernel / jnp.linalg.norm(kernel, axis=0)
    if norm == "weight_standardized":
        return gain / math.sqrt(len(kernel)) * (kernel - kernel.mean(0)) / kernel.std(0)
    return kernel * gain / math.sqrt(len(kernel))


def squared_gradients(norm, activation, width, depth, networks, batch, *, skip, group_size=8, layers=1):
    """Squared gradient norms [networks, depth + 1] at the inputs of `depth` layers or blocks and behind them.

    Without skip connections these are the layers' h; the gradient behind the last comes through one norm more.
    """
    phi = activations.get(activation)
    gain = 1.0 if norm == "none" else HE
    if norm == "weight_standardized":
        gain = norm_growth.layer("batch", activation).variance ** -0.5

    def forward(offsets, kernels, x, readout):
        for offset, block in zip(offsets, kernels, strict=False):
            x = x + offset
            branch = x
            for kernel in block:
                used = normalize_kernel(norm, kernel, gain)
                branch = jnp.matmul(phi(normalize(norm, branch, group_size)), used, precision="highest")
            x = x + branch if skip else branch
        x = x + offsets[depth]
        return (readout * phi(normalize(norm, x, group_size))).sum()

    def one(key):
        keys = jax.random.split(key, 3)
        kernels = jax.random.normal(keys[0], (depth, layers, width, width))
        x, readout = jax.random.normal(keys[1], (2, batch, width))
        gradient = jax.grad(forward)(jnp.zeros((depth + 1, batch, width)), kernels, x, readout)
        return (gradient**2).sum((1, 2))

    keys = jax.random.split(jax.random.key(width), networks)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=20))(keys), np.float64)


def extrapolated(before, after, options, widths, networks):
    """E[squared gradient `before`] / E[that `after`] at infinite width, and its standard error, from two widths."""
    found = []
    for width in widths:
        squares = squared_gradients(width=width, networks=networks, **options)
        one, other = squares[:, before], squares[:, after]
        ratio = one.mean() / other.mean()
        found.append((ratio, ((one - ratio * other) / other.mean()).std() / math.sqrt(networks)))
    (narrow, error), (wide, other_error) = found
    return 2 * wide - narrow, math.hypot(2 * other_error, error)


slow = pytest.mark.slow
PLAIN = [
    ("layer", "relu", 2),
    pytest.param("layer", "sigmoid", 2, marks=slow),
    pytest.param("rms", "tanh", 2, marks=slow),
    pytest.param("group", "relu", 2, marks=slow),
    pytest.param("group", "tanh", 2, marks=slow),
    pytest.param("weight", "relu", 2, marks=slow),
    pytest.param("weight_standardized", "relu", 2, marks=slow),
    pytest.param("weight_standardized", "tanh", 2, marks=slow),
]
RESIDUAL = [
    ("batch", "relu", 9, 1),
    ("layer", "relu", 2, 1),
    ("layer", "tanh", 2, 2),
    ("group", "relu", 2, 1),
    ("none", "tanh", 2, 1),
    ("weight_standardized", "relu", 2, 1),
]


class TestNetworks:
    """|z| < 4 in each of 14 comparisons; a false alarm by chance alone: 1e-3. Widths 32 and 64, extrapolated."""

    @pytest.mark.parametrize(("norm", "activation", "batch"), PLAIN)
    def test_equal_layers(self, norm, activation, batch):
        """2 x 1,000 networks of 3 layers, at the middle one."""
        options = {"norm": norm, "activation": activation, "depth": 3, "batch": batch, "skip": False, "group_size": 16}
        found, error = extrapolated(1, 2, options, (32, 64), 1000)
        size = 16 if norm == "group" else None
        theory = mean_field.gradient_growth(activation, norm=norm, num_features=size)
        assert error < 0.03 * theory
        assert abs(found - theory) < 4 * error

    @slow
    @pytest.mark.parametrize(("norm", "activation", "batch", "layers"), RESIDUAL)
    def test_residual(self, norm, activation, batch, layers):
        """2 x 1,000 networks of 6 blocks, over all of them."""
        options = {"norm": norm, "activation": activation, "depth": 6, "batch": batch, "skip": True, "layers": layers}
        found, error = extrapolated(0, 6, options | {"group_size": 16}, (32, 64), 1000)
        size, batch_size = 16 if norm == "group" else None, batch if norm == "batch" else None
        weight_std = 1.0 if norm == "none" else HE
        theory = residual_signal(
            activation,
            6,
            norm=norm,
            weight_std=weight_std,
            layers_per_branch=layers,
            batch_size=batch_size,
            num_features=size,
        ).squared_gradient[0]
        assert error < 0.05 * theory
        assert abs(found - theory) < 4 * error


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"depth": 0}, "depth must be a positive integer, got 0"),
            ({"layers_per_branch": 1.5}, "layers_per_branch must be a positive integer, got 1.5"),
            ({"norm": "bach"}, r"unknown norm 'bach' \(did you mean 'batch'\?\)"),
            ({"branch_scale": math.inf}, "branch_scale must be finite, got inf"),
            ({"start": 0.0}, "start must be above 0 and finite, got 0.0"),
            ({"weight_std": -1.0}, "weight_std must be above 0 and finite, got -1.0"),
            ({"norm": "layer", "num_features": 64}, "num_features is an argument of norm 'group' alone"),
            ({"norm": "layer", "batch_size": 64}, "batch_size is not an argument of norm 'layer'"),
            ({"norm": "none", "weight_std": 1e30}, "the signal's variance is 2.5e.119 in block 2, beyond 1e100"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            residual_signal(**({"activation": "relu", "depth": 4} | options))
