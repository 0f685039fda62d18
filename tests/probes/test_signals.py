"""Signals by layer, against NumPy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import PHI, D, N, forward_numpy, network, signals

import bnjax
from bnjax import probes

MORE = (("relu", "batch"), ("sigmoid", "batch"), ("tanh", "batch"), ("tanh", "none"), ("sigmoid", "none"))


class TestSignals:
    @pytest.mark.parametrize(
        ("activation", "norm"), [("relu", "none"), *(pytest.param(*p, marks=pytest.mark.slow) for p in MORE)]
    )
    def test_against_numpy(self, x64, norm, activation):
        model, params, stats, x = network(norm, activation, init_scale=4.0)
        phi, slope = PHI[activation]
        expected = forward_numpy(params, x, phi)
        found = signals(model, params, stats, x)
        for name, values in expected.items():
            centred = values - values.mean(0)
            singular = np.linalg.svd(centred, compute_uv=False)
            signal = found[name]
            np.testing.assert_allclose(signal.mean, values.mean(), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(signal.spread, np.sqrt(values.var(0).mean()), rtol=1e-12)
            np.testing.assert_allclose(signal.stable_rank, (singular**2).sum() / singular[0] ** 2, rtol=1e-10)
            assert signal.dead == (values == values[0]).all(0).mean()
            if name.endswith("/activation"):
                z = expected[name.replace("activation", "norm" if norm == "batch" else "preactivation")]
                np.testing.assert_allclose(signal.saturated, (slope(z) < 0.01).mean(), rtol=1e-6)
                if activation == "relu" or norm == "none":
                    assert signal.saturated > 0
            else:
                assert np.isnan(signal.saturated)

    @pytest.mark.slow
    def test_saturation_is_an_option(self, x64):
        model, params, stats, x = network("none", "sigmoid", init_scale=4.0)
        values = forward_numpy(params, x, PHI["sigmoid"][0])["hidden_1/preactivation"]
        expected = (PHI["sigmoid"][1](values) < 0.2).mean()
        found = signals(model, params, stats, x, saturation=0.2)["hidden_1/activation"]
        np.testing.assert_allclose(found.saturated, expected, rtol=1e-6)
        assert 0 < expected < 1

    @pytest.mark.slow
    def test_dead_units_and_lost_rank(self):
        """Of a ReLU layer with two units that are off, behind equal inputs of all examples but one."""
        model, params, stats, x = network("none", "relu")
        params["hidden_0"]["bias"] = jnp.zeros(5).at[:2].set(-1e3)
        measure = jax.jit(partial(probes.signals, model))
        found = measure(params, stats, x)["hidden_0/activation"]
        assert found.dead == pytest.approx(2 / 5)
        assert found.saturated >= 2 / 5
        x = jnp.broadcast_to(x[:1], x.shape).at[0].add(1.0)
        found = measure(params, stats, x)
        np.testing.assert_allclose(found["hidden_1/preactivation"].stable_rank, 1, rtol=1e-5)
        same = measure(params, stats, jnp.broadcast_to(x[:1], x.shape))
        for name in ("hidden_1/preactivation", "output"):
            assert (same[name].spread, same[name].dead, same[name].stable_rank) == (0, 1, 0)

    @pytest.mark.parametrize("exponent", [-118, 118])
    def test_at_the_ends_of_float32(self, exponent):
        """A power of two scales mean and spread exactly, whatever becomes of squares; ranks stay."""
        model = bnjax.Model(lambda *_: ({}, {}), lambda *_, **__: None, shifted_layers)
        x = 3.0 + jax.random.normal(jax.random.key(0), (N, D))
        small, big = (signals(model, {}, {}, x * 2.0**e)["x"] for e in (0, exponent))
        factor = 2.0**exponent
        assert (big.mean / factor, big.spread / factor) == (small.mean, small.spread)
        assert (big.dead, big.stable_rank) == (small.dead, small.stable_rank)

    def test_spread_of_values_far_from_zero(self):
        x = 1e6 + np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
        np.testing.assert_allclose(probes.spread(x), np.sqrt(np.var(x, 0, dtype=float).mean()), rtol=1e-6)
        assert probes.spread(np.full((7, 3), np.float32(0.1))) == 0

    def test_evaluation_mode_uses_the_running_statistics(self, x64):
        model, params, stats, x = network()
        found = signals(model, params, stats, x, train=False)
        z = np.asarray(x) @ np.asarray(params["hidden_0"]["kernel"]) / np.sqrt(1 + 1e-5)  # of mean 0 and var 1
        np.testing.assert_allclose(found["hidden_0/norm"].spread, np.sqrt(z.var(0).mean()), rtol=1e-12)


def shifted_layers(params, batch_stats, x, offsets, *, train):
    x = x + offsets["x"] if "x" in offsets else x
    return x, {"x": x}
