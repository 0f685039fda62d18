"""Signals, gradients and Jacobians by layer: against numpy, jax.grad and closed forms; of any model with `layers`.

References are in float64, written out for each network, without `bnjax.probes`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import bnjax
from bnjax import jacobian, probes
from bnjax.interop import flax as to_from_flax

N, D, K = 12, 6, 3
HIDDEN = (5, 7)


def network(norm="batch", activation="tanh", init_scale=1.0, **options):
    """A small mlp, its state and a batch, in the precision that is on."""
    model = bnjax.mlp(HIDDEN, K, activation, norm, **options)
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    state = model.init(jax.random.key(1), (D,), init_scale)
    floats = partial(jax.tree.map, lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a)
    x = jax.random.normal(jax.random.key(2), (N, D), dtype)
    return model, *floats(state), x


def signals(model, *state_and_x, **options):
    return jax.jit(partial(probes.signals, model, **options))(*state_and_x)


def gradients(model, params, stats, x, loss, **options):
    return jax.jit(lambda *a: probes.gradients(model, *a, loss, **options))(params, stats, x)


def singular_values(model, params, stats, x, *names, **options):
    return jax.jit(lambda *a: probes.singular_values(model, *a, *names, **options))(params, stats, x)


def cotangent(seed=3):
    c = np.random.default_rng(seed).normal(size=(N, K))
    return lambda outputs: (outputs * c).sum(), c


def forward_numpy(params, x, phi, epsilon=1e-5):
    """Every intermediate of the batch-normalized mlp, in numpy; without norm where params have none."""
    found, h = {}, np.asarray(x, np.float64)
    for name in [n for n in params if n.startswith("hidden")]:
        h = found[f"{name}/preactivation"] = h @ np.asarray(params[name]["kernel"], np.float64)
        if "norm" in params[name]:
            h = found[f"{name}/norm"] = (h - h.mean(0)) / np.sqrt(h.var(0) + epsilon)
        h = found[f"{name}/activation"] = phi(h)
    found["output"] = h @ np.asarray(params["output"]["kernel"], np.float64)
    return found


PHI = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
}


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
        to_matrices, to_shifts = jax.grad(textbook, (0, 1))(matrices, shifts)
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
    jax.tree.map(close, (found.to_params, found.to_input), jax.grad(loss_of, (0, 1))(params, x))
    jax.tree.map(close, (found.outputs, found.intermediates), model.layers(params, stats, x, {}, train=train))
    norms = gradients(model, params, stats, x, loss, train=train)
    for name, norm in norms.intermediates.items():
        close(np.linalg.norm(found.to_intermediates[name]), norm)
    for name, norm in norms.weights.items():
        close(np.linalg.norm(found.to_params[name]["kernel"]), norm)


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


class TestAUsersModel:
    """A convolution with two branches, by hand: intermediates of rank 4, one that no gradient reaches."""

    @staticmethod
    def init(key, input_shape, init_scale):
        keys = jax.random.split(key, 2)
        kernel = init_scale * jax.random.normal(keys[0], (3, 3, input_shape[-1], 4))
        return {"conv": {"kernel": kernel}, "readout": jax.random.normal(keys[1], (4, 2))}, {}

    @staticmethod
    def layers(params, batch_stats, x, offsets, *, train):
        shown = {}

        def show(name, value):
            shown[name] = value + offsets.get(name, 0)
            return shown[name]

        dims = ("NHWC", "HWIO", "NHWC")
        z = show(
            "map", jax.lax.conv_general_dilated(x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=dims)
        )
        h = show("relu", jax.nn.relu(z))
        show("aside", jnp.tanh(h))
        return show("logits", h.mean((1, 2)) @ params["readout"]), shown

    @classmethod
    def model(cls):
        def apply(params, batch_stats, x, *, train):
            return cls.layers(params, batch_stats, x, {}, train=train)[0], batch_stats

        return bnjax.Model(cls.init, apply, cls.layers)

    @pytest.mark.slow
    def test_probes(self):
        model = self.model()
        params, stats = model.init(jax.random.key(0), (5, 5, 2), 1.0)
        x = jax.random.normal(jax.random.key(1), (6, 5, 5, 2))
        found = signals(model, params, stats, x)
        values = model.layers(params, stats, x, {}, train=True)[1]
        np.testing.assert_allclose(found["relu"].saturated, (values["relu"] == 0).mean(), rtol=1e-6)
        np.testing.assert_allclose(found["map"].spread, np.sqrt(np.var(values["map"], 0).mean()), rtol=1e-5)
        assert np.isnan(found["map"].saturated)
        assert np.isnan(found["logits"].saturated)
        norms = gradients(model, params, stats, x, lambda outputs: outputs.sum())
        assert norms.intermediates["aside"] == 0
        assert list(norms.weights) == ["conv", "readout"]
        expected = jax.grad(lambda p: model.apply(p, stats, x, train=True)[0].sum())(params)
        np.testing.assert_allclose(
            norms.weights["conv"], jnp.linalg.norm(expected["conv"]["kernel"].ravel()), rtol=1e-5
        )
        values = singular_values(model, params, stats, x, "relu", "logits", num=1)
        expected = jnp.linalg.norm(params["readout"], 2) / 5  # of the mean of 25 positions
        np.testing.assert_allclose(values, expected, rtol=1e-4)

    @pytest.mark.slow
    def test_in_a_sweep(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(40, 5, 5, 2)).astype(np.float32)
        y = rng.integers(2, size=40).astype(np.int32)
        model, config = self.model(), bnjax.TrainConfig(steps=2, batch_size=16)
        probe = probes.flow(model, (5, 5, 2), batch_size=16)
        ds = bnjax.Dataset(x, y, x, y)
        found = bnjax.sweep(model, ds, config, {"seed": [0]}, probe=probe, progress=False)
        assert found.layer.values.tolist() == ["map", "relu", "aside", "logits"]
        assert (found.gradient_norm.sel(layer=["map", "logits"]) > 0).all()


class Net(nn.Module):
    """As an mlp of tanh, with Flax's names."""

    features: tuple[int, ...] = (8, 6)
    norm: type[nn.Module] = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        for width in self.features:
            x = nn.Dense(width, use_bias=False)(x)
            x = self.norm(use_running_average=not train, momentum=0.9)(x)
            x = nn.tanh(x)
        return nn.Dense(4)(x)


NAMES = {
    "hidden_0/preactivation": "Dense_0/kernel",
    "hidden_0/norm": "Dense_0/norm",
    "hidden_0/activation": "Dense_0/activation",
    "hidden_1/preactivation": "Dense_1/kernel",
    "hidden_1/norm": "Dense_1/norm",
    "hidden_1/activation": "Dense_1/activation",
    "output": "Dense_2/kernel",
}


class TestFlax:
    MLP = bnjax.mlp((8, 6), 4, "tanh")

    def pair(self, norm, init_scale=1.0):
        """An mlp's state, and the same as a Flax network's."""
        state = self.MLP.init(jax.random.key(0), (12,), init_scale)
        variables = to_from_flax.mlp_to_flax(self.MLP, *state)
        return (state, bnjax.as_model(Net(norm=norm)), (variables["params"], variables["batch_stats"]))

    @pytest.mark.parametrize(
        ("norm", "train"),
        [
            pytest.param(nn.BatchNorm, True, marks=pytest.mark.slow),
            pytest.param(nn.BatchNorm, False, marks=pytest.mark.slow),
            pytest.param(to_from_flax.BatchNorm, True, marks=pytest.mark.slow),
        ],
    )
    def test_is_the_mlp_of_the_same_weights(self, blobs, norm, train):
        state, model, theirs = self.pair(norm)
        x, c = blobs.train_x[:32], np.random.default_rng(0).normal(size=(32, 4))
        outputs, stats = self.MLP.apply(*state, x, train=train)
        found, new_stats = model.apply(*theirs, x, train=train)
        np.testing.assert_allclose(found, outputs, rtol=1e-4, atol=1e-5)
        for i in range(2):
            for name in ("mean", "var"):
                expected = getattr(stats[f"hidden_{i}"]["norm"], name)
                np.testing.assert_allclose(new_stats[f"BatchNorm_{i}"][name], expected, rtol=1e-4, atol=1e-6)
        if norm is not nn.BatchNorm or not train:  # two more programs
            self.same_signals(state, model, theirs, x, train)
        arguments = (x, lambda outputs: (outputs * c).sum())
        ours = gradients(self.MLP, *state, *arguments, train=train)
        flaxs = gradients(model, *theirs, *arguments, train=train)
        for name, value in ours.intermediates.items():
            np.testing.assert_allclose(flaxs.intermediates[NAMES[name]], value, rtol=1e-4)
        np.testing.assert_allclose([*flaxs.weights.values()], [*ours.weights.values()], rtol=1e-4)

    def same_signals(self, state, model, theirs, x, train):
        ours, flaxs = (signals(self.MLP, *state, x, train=train), signals(model, *theirs, x, train=train))
        assert set(flaxs) == {NAMES[name] for name in ours}
        for name, signal in ours.items():
            np.testing.assert_allclose(flaxs[NAMES[name]], signal, rtol=1e-4, atol=1e-5)

    def test_singular_values(self):
        state, model, theirs = self.pair(nn.BatchNorm)
        x = jax.random.normal(jax.random.key(3), (6, 12))
        ours = singular_values(self.MLP, *state, x, "hidden_0/activation", "hidden_1/activation")
        found = singular_values(model, *theirs, x, "Dense_0/activation", "Dense_1/activation")
        np.testing.assert_allclose(found, ours, rtol=1e-3, atol=1e-5)

    @pytest.mark.slow
    def test_in_a_sweep(self, blobs):
        """The default scale is that of all kernels but the last: as an mlp's."""
        model = bnjax.as_model(Net())
        small, big = (model.init(jax.random.key(0), (12,), scale) for scale in (1.0, 8.0))
        for name in ("Dense_0", "Dense_1"):
            np.testing.assert_array_equal(big[0][name]["kernel"], 8 * small[0][name]["kernel"])
        np.testing.assert_array_equal(big[0]["Dense_2"]["kernel"], small[0]["Dense_2"]["kernel"])
        config = bnjax.TrainConfig(steps=40, batch_size=32)
        axes = {"seed": [0, 1], "init_scale": [1.0, 8.0]}
        found = bnjax.sweep(model, blobs, config, axes, progress=False)
        assert (found.test_accuracy > 0.7).all()  # of 4 classes; an mlp reaches as much in 40 steps
        probe = probes.flow(model, (12,))
        assert probe.layers == (*NAMES.values(),)
        norms = [
            gradients(model, *state, blobs.train_x[:32], lambda o: o[::2, 0].sum()).intermediates
            for state in (small, big)
        ]
        for name in NAMES.values():
            falls = name in ("Dense_0/kernel", "Dense_1/kernel")
            np.testing.assert_allclose(norms[1][name] / norms[0][name], 1 / 8 if falls else 1, rtol=1e-3)

    def test_of_a_model_without_layers(self):
        """They are read off its trace: here, of an mlp whose own are taken away, by other names."""
        model, params, stats, x = network()
        loss, _ = cotangent()
        bare = model._replace(layers=None)
        ours, found = (gradients(m, params, stats, x, loss) for m in (model, bare))
        assert len(found.intermediates) == len(ours.intermediates)
        for name, value in ours.intermediates.items():
            name = "output/kernel" if name == "output" else name.replace("preactivation", "kernel")
            np.testing.assert_allclose(found.intermediates[name], value, rtol=1e-5)


def test_a_loss_must_be_a_scalar():
    model, params, stats, x = network()
    with pytest.raises(TypeError, match="scalar"):
        gradients(model, params, stats, x, optax.l2_loss)
