"""Singular values of Jacobians between layers, against closed forms; and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import D, N, forward_numpy, network, singular_values

import bnjax
from bnjax import jacobian, probes


class TestSingularValues:
    def test_is_the_closed_form_of_a_block(self, x64):
        model, params, stats, x = network()
        h = forward_numpy(params, x, np.tanh)["hidden_0/activation"]
        block = jax.jit(partial(jacobian.block, activation=jnp.tanh))(h, params["hidden_1"]["kernel"]).x
        expected = np.linalg.svd(block.reshape(N * 7, N * 5), compute_uv=False)
        names = ("hidden_0/activation", "hidden_1/activation")
        found = singular_values(model, params, stats, x, *names)
        np.testing.assert_allclose(found, expected, atol=1e-12 * expected[0])
        top = singular_values(model, params, stats, x, *names, num=4)
        np.testing.assert_allclose(top, expected[:4], rtol=1e-8)

    def test_is_the_closed_form_of_the_norm(self, x64):
        """A symmetric Jacobian: the magnitudes of its eigenvalues."""
        model, params, stats, x = network()
        scale = jnp.linspace(-2, 1, 5)
        params["hidden_0"]["norm"] = params["hidden_0"]["norm"]._replace(scale=scale)
        z = forward_numpy(params, x, np.tanh)["hidden_0/preactivation"]
        expected = np.sort(np.abs(jax.jit(jacobian.spectrum)(z, scale)).ravel())[::-1]
        found = singular_values(model, params, stats, x, "hidden_0/preactivation", "hidden_0/norm")
        np.testing.assert_allclose(found, expected, atol=1e-12 * expected[0])

    def test_from_the_input_to_the_output_in_evaluation_mode(self, x64):
        """Where examples are apart, each has a Jacobian of its own."""
        model, params, stats, x = network()
        alone = jax.jit(jax.vmap(jax.jacrev(lambda x: model.apply(params, stats, x[None], train=False)[0][0])))(x)
        expected = np.sort(np.linalg.svd(alone, compute_uv=False).ravel())[::-1]
        found = singular_values(model, params, stats, x, None, "output", train=False)
        np.testing.assert_allclose(found, expected, rtol=1e-10)

    @pytest.mark.slow
    @pytest.mark.parametrize("factor", [1e-30, 1e30])
    def test_in_float32_of_any_magnitude(self, factor):
        model, params, stats, x = network("none", "linear")
        expected = singular_values(model, params, stats, x, "hidden_0/activation", "output", num=2)
        params["hidden_1"]["kernel"] *= factor
        for num in (2, None):
            found = singular_values(model, params, stats, x, "hidden_0/activation", "output", num=num)
            np.testing.assert_allclose(found[:2] / factor, expected, rtol=1e-5)

    @pytest.mark.slow
    def test_more_rows_than_columns_by_products_alone(self):
        model, params, stats, x = network()
        names = ("hidden_0/activation", "hidden_1/activation")  # 60 to 84 entries
        expected = singular_values(model, params, stats, x, *names)
        found = singular_values(model, params, stats, x, *names, num=3)
        np.testing.assert_allclose(found, expected[:3], rtol=1e-4)


class TestErrors:
    @pytest.mark.parametrize(
        ("source", "target", "options", "words"),
        [
            ("hidden_0/activation", "hidden_9/norm", {}, r"unknown target 'hidden_9/norm' \(did you mean"),
            ("hidden", "output", {}, "unknown source 'hidden'.*allowed: hidden_0/preactivation, hidden_0/norm"),
            ("output", "hidden_0/norm", {}, "'hidden_0/norm' comes before source 'output'; the order is hidden_0"),
            (None, "output", {"num": 8}, "5 num less than 36, got 8"),
            (None, "output", {"num": 0}, "num must be at least 1"),
        ],
    )
    def test_names_and_numbers(self, source, target, options, words):
        model, params, stats, x = network()
        with pytest.raises(ValueError, match=words):
            probes.singular_values(model, params, stats, x, source, target, **options)

    def test_a_jacobian_that_is_too_large(self):
        model, params, stats, _ = network()
        x = jnp.zeros((1000, D))
        with pytest.raises(ValueError, match=r"from x to output is 3000 x 6000.*8388608 entries.*or num"):
            probes.singular_values(model, params, stats, x, None, "output")

    @pytest.mark.parametrize(
        ("shape", "words"),
        [
            ((), r"batch \[N, \.\.\.\].*shape \(\)"),
            ((0, D), "at least one example"),
            ((N, 5), r"take x of shape \(12, 5\)"),
        ],
    )
    def test_x(self, shape, words):
        model, params, stats, _ = network()
        with pytest.raises(ValueError, match=words):
            probes.signals(model, params, stats, jnp.zeros(shape))

    def test_without_weights(self):
        model = bnjax.Model(lambda *_: ({}, {}), lambda params, stats, x, train: (x, stats))
        with pytest.raises(ValueError, match="no weight matrices"):
            probes.weights(model, (12,))

    def test_batch_sizes(self, blobs):
        model, *_ = network()
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            probes.weights(model, (12,), batch_size=0)
        state = model.init(jax.random.key(0), (12,), 1.0)
        snapshot = bnjax.Snapshot(*state, *state, blobs, bnjax.Hyperparams())
        for make in (probes.flow, probes.weights):
            with pytest.raises(ValueError, match="at most the 256 training examples, got 257"):
                make(model, (12,), batch_size=257).measure(snapshot)
