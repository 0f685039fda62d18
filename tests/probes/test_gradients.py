"""Gradients by layer: against numbers by hand and `jax.grad`, and how they go with the scale."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_networks import HIDDEN, PHI, D, N, cotangent, forward_numpy, gradients, network

from bnjax import probes


class TestGradients:
    @pytest.mark.parametrize("activation", PHI)
    def test_by_hand(self, x64, activation):
        """Back-propagation without norms, written out in numpy."""
        model, params, stats, x = network("none", activation)
        phi, slope = PHI[activation]
        loss, c = cotangent()
        found = gradients(model, params, stats, x, loss)
        values = forward_numpy(params, x, phi)
        delta = c  # the gradient to the output of what is below
        norms, weights = {"output": np.linalg.norm(c)}, {}
        for i in reversed(range(len(HIDDEN) + 1)):
            name = f"hidden_{i}" if i < len(HIDDEN) else "output"
            if i < len(HIDDEN):
                norms[f"{name}/activation"] = np.linalg.norm(delta)
                delta = delta * slope(values[f"{name}/preactivation"])
                norms[f"{name}/preactivation"] = np.linalg.norm(delta)
            below = values[f"hidden_{i - 1}/activation"] if i else np.asarray(x)
            weights[name] = np.linalg.norm(below.T @ delta)
            delta = delta @ np.asarray(params[name]["kernel"]).T
        assert set(found.intermediates) == set(norms)
        assert set(found.weights) == set(weights)
        for name, norm in norms.items():
            np.testing.assert_allclose(found.intermediates[name], norm, rtol=1e-12)
        for name, norm in weights.items():
            np.testing.assert_allclose(found.weights[name], norm, rtol=1e-12)

    @pytest.mark.parametrize(
        ("position", "frozen"),
        [
            ("before_activation", True),
            *(
                pytest.param(*p, marks=pytest.mark.slow)
                for p in (("before_activation", False), ("after_activation", False), ("after_activation", True))
            ),
        ],
    )
    def test_with_batch_norm_against_jax_grad_of_the_textbook_formula(self, x64, frozen, position):
        model, params, stats, x = network(norm_position=position, freeze_hidden=frozen)
        loss, _ = cotangent()
        matrices = probes.kernels(params, stats)

        def normalized(z):
            return (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5)

        def textbook(matrices, shifts):
            h = x
            for i, shift in enumerate(shifts):
                z = h @ matrices[f"hidden_{i}"] + shift
                h = jnp.tanh(normalized(z)) if position == "before_activation" else normalized(jnp.tanh(z))
            return loss(h @ matrices["output"])

        shifts = [jnp.zeros((N, width)) for width in HIDDEN]
        to_matrices, to_shifts = jax.jit(jax.grad(textbook, (0, 1)))(matrices, shifts)
        found = gradients(model, params, stats, x, loss)
        assert set(found.weights) == set(matrices)
        for name, gradient in to_matrices.items():
            np.testing.assert_allclose(found.weights[name], jnp.linalg.norm(gradient), rtol=1e-10)
        for i, gradient in enumerate(to_shifts):
            norm = found.intermediates[f"hidden_{i}/preactivation"]
            np.testing.assert_allclose(norm, jnp.linalg.norm(gradient), rtol=1e-10)

    @pytest.mark.slow
    def test_vmapped_over_seeds(self):
        model, _, _, x = network()
        loss, _ = cotangent()

        def norms(seed):
            return probes.gradients(model, *model.init(jax.random.key(seed), (D,), 1.0), x, loss)

        together, norms = jax.jit(jax.vmap(norms))(jnp.arange(3)), jax.jit(norms)
        for seed in range(3):
            for name, norm in norms(seed).weights.items():
                np.testing.assert_allclose(together.weights[name][seed], norm, rtol=1e-5)

    def test_near_the_ends_of_float32_and_of_an_underflow(self):
        """Gradients of 1e-30 and 1e30 have norms, although their squares have not; below the range they are 0."""
        model, params, stats, x = network("none", "tanh")
        loss, _ = cotangent()
        norm = gradients(model, params, stats, x, loss).weights["hidden_0"]
        for factor in (1e-30, 1e30):
            scaled = gradients(model, params, stats, x, lambda o, f=factor: f * loss(o))
            np.testing.assert_allclose(scaled.weights["hidden_0"] / factor, norm, rtol=1e-5)
            assert norm * factor * (norm * factor) in (0, np.inf)
        model, params, stats, x = network("none", "sigmoid", init_scale=1e6)
        assert gradients(model, params, stats, x, loss).weights["hidden_0"] == 0

    @pytest.mark.parametrize(
        ("activation", "threshold"),
        [pytest.param("tanh", np.sqrt(5e-6), marks=pytest.mark.slow), ("relu", np.sqrt(1e-5 / (1 - 1 / np.pi)))],
    )
    def test_eight_decades_of_scale(self, activation, threshold):
        """With BN the weights' gradient falls with the scale, the norm's stays.

        float32, from 30 times the scale at which epsilon matters: 2 a^2 = epsilon, for ReLU a^2 (1 - 1/pi) = epsilon.
        """
        model, _, _, x = network("batch", activation)
        found = slopes(model, x, cotangent()[0], 30 * threshold * np.logspace(0, 8, 9))
        for i in range(len(HIDDEN)):
            assert found.weights[f"hidden_{i}"] == pytest.approx(-1, abs=0.02)
            assert found.intermediates[f"hidden_{i}/preactivation"] == pytest.approx(-1, abs=0.02)
            assert found.intermediates[f"hidden_{i}/norm"] == pytest.approx(0, abs=0.02)
            assert found.intermediates[f"hidden_{i}/activation"] == pytest.approx(0, abs=0.02)

    def test_powers_of_the_scale_without_norms(self):
        """Of a ReLU network: the number of other scaled layers, and of those that follow."""
        model, _, _, x = network("none", "relu")
        found = slopes(model, x, cotangent()[0], np.logspace(-4, 4, 9))
        for i in range(len(HIDDEN)):
            assert found.weights[f"hidden_{i}"] == pytest.approx(1, abs=1e-4)
            assert found.intermediates[f"hidden_{i}/preactivation"] == pytest.approx(1 - i, abs=1e-4)


def slopes(model, x, loss, scales):
    """The log-log slope of each norm against the scale."""

    def norms(scale):
        return probes.gradients(model, *model.init(jax.random.key(1), (D,), scale), x, loss)

    found = jax.jit(jax.vmap(norms))(jnp.asarray(scales, jnp.float32))
    return jax.tree.map(lambda v: np.polyfit(np.log10(scales), np.log10(np.asarray(v)), 1)[0], found)


@pytest.mark.parametrize("train", [True, False])
def test_derivatives(train):
    """Those of `jax.grad`, whose norms are those of `gradients`; and the outputs and intermediates themselves."""
    model, params, stats, x = network()
    loss, _ = cotangent()

    def loss_of(params, x):
        return loss(model.apply(params, stats, x, train=train)[0])

    found = jax.jit(lambda *a: probes.derivatives(model, *a, loss, train=train))(params, stats, x)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (found.to_params, found.to_input), jax.jit(jax.grad(loss_of, (0, 1)))(params, x))
    shown = jax.jit(partial(model.layers, train=train))(params, stats, x, {})
    jax.tree.map(close, (found.outputs, found.intermediates), shown)
    norms = gradients(model, params, stats, x, loss, train=train)
    for name, norm in norms.intermediates.items():
        close(np.linalg.norm(found.to_intermediates[name]), norm)
    for name, norm in norms.weights.items():
        close(np.linalg.norm(found.to_params[name]["kernel"]), norm)


def test_a_loss_must_be_a_scalar():
    model, params, stats, x = network()
    with pytest.raises(TypeError, match="scalar"):
        gradients(model, params, stats, x, optax.l2_loss)
