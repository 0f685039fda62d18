"""Probes of runs, by themselves and in sweeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import gradients, signals

import bnjax
from bnjax import probes


class TestProbesOfRuns:
    def loss(self, blobs):
        labels = jax.nn.one_hot(blobs.train_y[:64], 4)
        return lambda outputs: -(jax.nn.log_softmax(outputs) * labels).sum() / 64

    @pytest.mark.slow
    def test_flow(self, blobs):
        model = bnjax.mlp((6,), 4)
        probe = probes.flow(model, (12,), batch_size=64)
        assert probe.layers == ("hidden_0/preactivation", "hidden_0/norm", "hidden_0/activation", "output")
        state = model.init(jax.random.key(1), (12,), 2.0)
        snapshot = bnjax.Snapshot(*state, *state, blobs, bnjax.Hyperparams())
        found = jax.jit(probe.measure)(snapshot)
        x = blobs.train_x[:64]
        expected = gradients(model, *state, x, self.loss(blobs)).intermediates
        np.testing.assert_allclose(found["gradient_norm"], [expected[n] for n in probe.layers], rtol=1e-4)
        expected = signals(model, *state, x)
        for quantity in probes.Signal._fields:
            values = [getattr(expected[name], quantity) for name in probe.layers]
            np.testing.assert_allclose(found[quantity], values, rtol=1e-4, atol=1e-6)

    @pytest.mark.slow
    def test_flow_in_a_sweep(self, blobs):
        model = bnjax.mlp((6,), 4)
        probe = probes.flow(model, (12,), batch_size=64)
        axes = {"init_scale": (0.5, 2.0), "seed": (0, 1)}
        config = bnjax.TrainConfig(steps=2, batch_size=32)
        found = bnjax.sweep(model, blobs, config, axes, probe=probe, progress=False)
        assert found.layer.values.tolist() == [*probe.layers]
        assert found.gradient_norm.dims == ("init_scale", "seed", "probe_step", "layer")
        state = model.init(jax.random.key(1), (12,), 2.0)
        start = found.sel(init_scale=2.0, seed=1, probe_step=0)
        for name, signal in signals(model, *state, blobs.train_x[:64]).items():
            for quantity, value in signal._asdict().items():
                np.testing.assert_allclose(start[quantity].sel(layer=name), value, rtol=1e-4, atol=1e-6)
        assert (found.spread.sel(layer="output").diff("probe_step") != 0).all()

    def test_gradients_of_weights_beside_their_norms(self, blobs):
        """Of frozen ones, too, and for a model without `layers`; without a batch size there are none."""
        full = bnjax.mlp((6,), 4, freeze_hidden=True)
        model = full._replace(layers=None)
        start, now = (full.init(jax.random.key(seed), (12,), 1.0) for seed in (0, 1))
        snapshot = bnjax.Snapshot(*now, *start, blobs, jax.tree.map(jnp.asarray, bnjax.Hyperparams()))
        probe = probes.weights(model, (12,), batch_size=64)
        found = jax.jit(probe.measure)(snapshot)
        assert probe.layers == ("hidden_0", "output")
        expected = gradients(full, *now, blobs.train_x[:64], self.loss(blobs)).weights
        np.testing.assert_allclose(found["gradient_norm"], [expected[name] for name in probe.layers], rtol=1e-5)
        matrices, initial = probes.kernels(*now), probes.kernels(*start)
        for i, name in enumerate(probe.layers):
            a, b = np.asarray(matrices[name], np.float64), np.asarray(initial[name], np.float64)
            np.testing.assert_allclose(found["weight_norm"][i], np.linalg.norm(a), rtol=1e-6)
            np.testing.assert_allclose(found["effective_learning_rate"][i], 0.1 / (a**2).sum(), rtol=1e-6)
            cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
            np.testing.assert_allclose(found["angle"][i], np.degrees(np.arccos(cosine)), rtol=1e-5)
        plain = jax.jit(probes.weights(model, (12,)).measure)(snapshot)
        assert {*plain} == {*found} - {"gradient_norm"}

    @pytest.mark.slow
    def test_another_loss(self, blobs):
        model = bnjax.mlp((6,), 4)
        state = model.init(jax.random.key(0), (12,), 1.0)
        snapshot = bnjax.Snapshot(*state, *state, blobs, bnjax.Hyperparams())
        probe = probes.weights(
            model, (12,), batch_size=64, loss=lambda outputs, labels: (3 * outputs[:, 0] * (labels < 4)).sum()
        )
        h = model.layers(*state, blobs.train_x[:64], {}, train=True)[1]["hidden_0/activation"]
        found = jax.jit(probe.measure)(snapshot)["gradient_norm"][1]
        np.testing.assert_allclose(found, 3 * np.linalg.norm(h.sum(0)), rtol=1e-5)
