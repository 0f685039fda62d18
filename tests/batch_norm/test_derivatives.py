"""Derivatives of batch normalization against autodiff of the textbook formula, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import draw, textbook
from jax.test_util import check_grads

from bnjax import batch_norm
from bnjax.types import BatchNormParams

EPSILONS = [0.0, 1e-5, 0.3]
pytestmark = pytest.mark.usefixtures("x64")


def error(actual, expected, x, epsilon):
    """The largest error of a first derivative, relative to 1 / sigma of its feature."""
    sigma = np.sqrt(x.var(0) + epsilon)  # [C]
    return float((np.abs(np.asarray(actual) - expected) * sigma).max())


@pytest.mark.parametrize("shape", [(3, 1), (7, 3)])
class TestAgainstTheTextbook:
    """1e-12 relative to scale / sigma: 1e4 roundings of float64. Each is compiled once for all of EPSILONS."""

    def test_jacobians(self, shape):
        """In forward and reverse mode; the derivative to epsilon too."""
        x = draw(shape)

        @jax.jit
        def derivatives(x, epsilon):
            jacobians = jax.jacfwd(batch_norm.normalize), jax.jacrev(batch_norm.normalize), jax.jacrev(textbook)
            to_epsilon = (jax.jacfwd(f, 1) for f in (batch_norm.normalize, textbook))
            return [f(x, epsilon) for f in (*jacobians, *to_epsilon)]

        for epsilon in EPSILONS:
            *ours, expected, to_epsilon, expected_to_epsilon = derivatives(x, epsilon)
            for jacobian in ours:
                assert error(jacobian, expected, x, epsilon) < 1e-12
            np.testing.assert_allclose(to_epsilon, expected_to_epsilon, rtol=0, atol=1e-12)

    def test_jacobian_of_apply(self, shape):
        """With the scale; and to scale and bias, in forward and reverse mode."""
        x = draw(shape)
        params = BatchNormParams(np.linspace(-3, 2, shape[1]), np.ones(shape[1]))
        _, stats = batch_norm.init(shape[1], x.dtype)

        def ours(x, params, epsilon):
            return batch_norm.apply(params, stats, x, train=True, epsilon=epsilon)[0]

        def formula(x, params, epsilon):
            return params.scale * textbook(x, epsilon) + params.bias

        @jax.jit
        def derivatives(*args):
            return [f(*args) for f in (jax.jacfwd(ours, (0, 1)), jax.jacrev(ours, (0, 1)), jax.jacrev(formula, (0, 1)))]

        for epsilon in EPSILONS:
            *found, (ex, eparams) = derivatives(x, params, epsilon)
            for dx, dparams in found:
                assert error(dx, ex, x, epsilon) < 1e-12 * 3
                for value, expected in zip(dparams, eparams, strict=True):
                    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-13)

    def test_hessian(self, shape):
        x = draw(shape)
        weights = draw(shape, seed=1)

        @jax.jit
        def hessians(x, epsilon):
            def loss(normalize):
                return lambda x: (weights * jnp.sin(normalize(x, epsilon))).sum()

            return [jax.hessian(loss(f))(x) for f in (batch_norm.normalize, textbook)]

        for epsilon in EPSILONS:
            sigma = np.sqrt(x.var(0) + epsilon)
            ours, autodiff = map(np.asarray, hessians(x, epsilon))
            assert (np.abs(ours - autodiff) * sigma * sigma[:, None, None]).max() < 1e-12

    def test_vmap_of_grad(self, shape):
        xs = draw((5, *shape))

        @jax.jit
        def gradients(xs, epsilon):
            def loss(normalize):
                return lambda x: jnp.sum(normalize(x, epsilon) ** 3)

            return [jax.vmap(jax.grad(loss(f)))(xs) for f in (batch_norm.normalize, textbook)]

        for epsilon in EPSILONS:
            for a, e, x in zip(*gradients(xs, epsilon), xs, strict=True):
                assert error(a, e, x, epsilon) < 1e-12


@pytest.mark.slow
def test_check_grads_of_the_whole_layer():
    """To x, scale, bias and epsilon together, to second order, with a mask and without."""
    masks = (np.arange(6)[:, None] != 2, None)
    _, stats = batch_norm.init(3)

    def apply(x, scale, bias, epsilon):
        params = BatchNormParams(scale, bias)
        return [batch_norm.apply(params, stats, x, train=True, epsilon=epsilon, mask=mask)[0] for mask in masks]

    arguments = (draw((6, 3)), jnp.array([2.0, -1.0, 0.3]), jnp.ones(3), jnp.asarray(0.1))
    check_grads(jax.jit(apply), arguments, order=2, modes=("fwd", "rev"))


def test_moments_are_differentiable_where_they_are_outputs():
    """The rule's tangents of mean, var and 1 / sigma, which second derivatives rely on."""
    x, dx = draw((9, 2)), draw((9, 2), seed=1)

    def moments(x):
        sigma2 = x.var(0, keepdims=True) + 0.1
        return x.mean(0, keepdims=True), x.var(0, keepdims=True), sigma2**-0.5

    def ours(x):
        _, batch = batch_norm._transform(x, None, None, jnp.asarray(0.1), None, (0,), None)
        return batch.mean, batch.var, batch.inv_sigma

    @jax.jit
    def tangents(x, dx):
        return [jax.jvp(f, (x,), (dx,))[1] for f in (ours, moments)]

    for a, e in zip(*tangents(x, dx), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-13)


def holds(detach):
    """For each statistic, what it goes through."""
    return {name: jax.lax.stop_gradient if name in detach else lambda s: s for name in ("mean", "var")}


@pytest.mark.parametrize("detach", [("mean",), ("var",), ("mean", "var")])
def test_detached_statistics(detach):
    """Against autodiff of the formula with stop_gradient at the statistics; the value is the whole layer's."""
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=(2, 9, 4)) + 0.5
    params = BatchNormParams(*rng.normal(size=(2, 4)))
    stats = batch_norm.init(4, jnp.float64)[1]
    hold = holds(detach)

    def formula(x, scale, bias, mask):
        mean = jnp.where(mask, x, 0).sum(0) / mask.sum()
        var = hold["var"](jnp.where(mask, (x - mean) ** 2, 0).sum(0) / mask.sum())
        return jnp.where(mask, scale * (x - hold["mean"](mean)) / jnp.sqrt(var + 0.1), 0) + bias

    def layer(x, scale, bias, mask, **options):
        params = BatchNormParams(scale, bias)
        return batch_norm.apply(params, stats, x, train=True, epsilon=0.1, mask=mask, **options)

    @jax.jit
    def compare(*args):
        def gradients(f):
            return jax.grad(lambda *args: (a * f(*args)).sum(), (0, 1, 2))(*args)

        both = gradients(lambda *args: layer(*args, detach=detach)[0]), gradients(formula)
        return layer(*args, detach=detach), layer(*args), *both

    for mask in (np.full((9, 1), True), (np.arange(9) > 2)[:, None]):
        found, expected, grads, reference = compare(x, *params, mask)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        for value, wanted in zip(grads, reference, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("detach", [("mean", "var"), ("mean",), ("var",)])
def test_second_derivatives_with_detached_statistics(detach):
    """The rule is differentiated again: a detached statistic is a constant in every order."""
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=(2, 6, 2)) + 0.5
    params, stats = batch_norm.init(2, jnp.float64)
    hold = holds(detach)

    def formula(x):
        mean = hold["mean"](x.mean(0))
        return (a * (x - mean) / jnp.sqrt(hold["var"](((x - mean) ** 2).mean(0)) + 0.1)).sum()

    def layer(x):
        return (a * batch_norm.apply(params, stats, x, train=True, epsilon=0.1, detach=detach)[0]).sum()

    found, expected = jax.jit(lambda x: [jax.hessian(f)(x) for f in (layer, formula)])(x)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("detach", ["mean", ("variance",)])
def test_bad_detach(detach):
    params, stats = batch_norm.init(4)
    with pytest.raises(ValueError, match="detach must be a sequence of 'mean' and 'var', got"):
        batch_norm.apply(params, stats, np.ones((3, 4)), train=True, detach=detach)
