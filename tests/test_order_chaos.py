"""Networks without normalization: closed forms, the definitions in a plain loop, wide networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax.theory.order_chaos import order_chaos


@pytest.mark.parametrize(
    ("weight_std", "bias_std", "variance", "phase"),
    [
        (1.0, 0.0, 0.0, "ordered"),
        (1.0, 0.5, 0.5, "ordered"),
        (math.sqrt(2), 0.0, 2.0, "critical"),
        (2.0, 0.0, math.inf, "chaotic"),
    ],
)
def test_relu(weight_std, bias_std, variance, phase):
    """q* = bias_std^2 / (1 - weight_std^2 / 2), chi_1 = weight_std^2 / 2, by hand."""
    found = order_chaos("relu", weight_std, bias_std)
    assert found.variance == pytest.approx(variance, rel=1e-9)
    assert found.chi_1 == pytest.approx(weight_std**2 / 2, rel=1e-6)
    assert found.phase == phase
    assert found.correlation == 1


@pytest.mark.parametrize(
    ("weight_std", "bias_std"), [(0.8, 0.3), (2.0, 0.0), pytest.param(2.5, 0.4, marks=pytest.mark.slow)]
)
def test_tanh_by_the_trapezoidal_rule(weight_std, bias_std):
    """The definitions, iterated 2000 times in a plain loop."""
    u = np.linspace(-10, 10, 101)
    weights = np.exp(-(u**2) / 2) / np.exp(-(u**2) / 2).sum()
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
    found = order_chaos("tanh", weight_std, bias_std)
    assert found.variance == pytest.approx(q, rel=1e-5)
    assert found.correlation == pytest.approx(c, abs=1e-3)
    assert found.chi_c == pytest.approx(slope, rel=1e-3)
    assert found.xi_c == pytest.approx(-1 / math.log(slope), rel=0.05)
    assert found.xi_grad == pytest.approx(1 / abs(math.log(found.chi_1)))
    step = 1e-4
    near = weight_std**2 * weights @ np.tanh(math.sqrt(q + step) * u) ** 2 + bias_std**2
    assert found.xi_q == pytest.approx(-1 / math.log((near - q) / step), rel=1e-2)


def test_tanh_is_critical_at_1():
    """And near it chi_1 crosses 1 (Schoenholz et al. 2017)."""
    found = [order_chaos("tanh", w) for w in (0.9, 1.0, 1.1)]
    assert [one.phase for one in found] == ["ordered", "critical", "chaotic"]
    assert math.isinf(found[1].xi_grad)
    assert math.isnan(order_chaos("linear", 1.0).correlation)


@pytest.mark.parametrize(
    ("activation", "weight_std"),
    [("tanh", 1.6), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("sigmoid", 3.0), ("relu", 1.8)])],
)
def test_wide_networks(activation, weight_std):
    """chi_1 against the gradients of 32 networks of width 256.

    Within 4 standard errors over seeds plus 2 / width = 0.8% of chi_1, since finite width adds an error of some
    1 / width: beyond the 4 errors alone it is 6e-5 each if chance alone decides.
    """
    width, depth, seeds = 256, 5, 32
    model = bnjax.mlp((width,) * depth, 10, activation, "none", initializer="lecun_normal")
    theory = order_chaos(activation, weight_std)
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


def test_bad_input():
    with pytest.raises(ValueError, match=r"bias_std must be >= 0 and finite, got -0\.1"):
        order_chaos("tanh", 1.0, -0.1)
    with pytest.raises(ValueError, match="weight_std must be above 0 and finite, got 0"):
        order_chaos("tanh", 0.0)
    with pytest.raises(ValueError, match="faster than exponentially"):
        order_chaos(jnp.square, 1.0)
