"""The multilayer perceptron against the same network written out by hand."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import activations, choices
from bnjax.models import build

SHAPE = (2, 3, 1)
X = jax.random.normal(jax.random.key(9), (7, *SHAPE))
KEY = jax.random.key(0)


def by_hand(params, x, phi, norm, position):
    """Two hidden layers in training mode, from the definition."""

    def bn(x, p):
        return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) * p.scale + p.bias

    x = x.reshape(len(x), -1)
    for name in ("hidden_0", "hidden_1"):
        p = params[name]
        x = x @ p["kernel"] + p.get("bias", 0)
        if norm == "batch" and position == "before_activation":
            x = bn(x, p["norm"])
        x = phi(x)
        if norm == "batch" and position == "after_activation":
            x = bn(x, p["norm"])
    return x @ params["output"]["kernel"] + params["output"]["bias"]


@pytest.mark.parametrize("position", build.NORM_POSITIONS)
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(
    ("activation", "phi"),
    [
        ("relu", lambda x: np.maximum(x, 0)),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("tanh", np.tanh),
        ("gelu", lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2),
        ("leaky_relu", lambda x: np.where(x > 0, x, 0.01 * x)),
        ("elu", lambda x: np.where(x > 0, x, np.exp(x) - 1)),
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("softplus", lambda x: np.log(1 + np.exp(x))),
        ("linear", lambda x: x),
    ],
)
def test_forward(activation, phi, norm, position):
    model = bnjax.mlp((5, 4), 3, activation, norm, position)
    params, stats = model.init(KEY, SHAPE, 0.7)
    params = jax.tree.map(lambda p: p + 0.1, params)  # so that biases and scales show
    outputs, _ = model.apply(params, stats, X, train=True)
    np.testing.assert_allclose(outputs, by_hand(params, X, phi, norm, position), rtol=2e-5, atol=2e-5)


def test_running_statistics_are_used_in_evaluation_and_updated_in_training():
    model = bnjax.mlp((5,), 3, momentum=0.0)
    params, stats = model.init(KEY, SHAPE, 1.0)
    trained, stats = model.apply(params, stats, X, train=True)
    evaluated, after = model.apply(params, stats, X, train=False)
    np.testing.assert_allclose(trained, evaluated, atol=1e-5)  # momentum 0: the batch's own statistics
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after, stats))
    assert stats["hidden_0"]["norm"].count == 1


def kernels(model, init_scale=1.0):
    params, stats = model.init(KEY, SHAPE, init_scale)
    return {name: (params[name] | stats.get(name, {}))["kernel"] for name in params}


def test_same_draw_whatever_the_norm_its_position_and_freezing():
    expected = kernels(bnjax.mlp((5, 4), 3, norm="none"))
    for options in ({}, {"norm_position": "after_activation"}, {"freeze_hidden": True}, {"activation": "tanh"}):
        found = kernels(bnjax.mlp((5, 4), 3, **options))
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, expected))


@pytest.mark.parametrize(("layers", "output_factor"), [("hidden", 1), ("all", 8)])
def test_init_scale_multiplies_the_chosen_layers(layers, output_factor):
    model = bnjax.mlp((5, 4), 3, scaled_layers=layers)
    one, eight = kernels(model), kernels(model, 8.0)
    assert (eight["hidden_0"] == 8 * one["hidden_0"]).all()
    assert (eight["hidden_1"] == 8 * one["hidden_1"]).all()
    assert (eight["output"] == output_factor * one["output"]).all()


def test_bias_only_where_no_norm_cancels_it():
    def has_bias(**options):
        return "bias" in bnjax.mlp((5,), 3, **options).init(KEY, SHAPE, 1.0)[0]["hidden_0"]

    assert not has_bias()
    assert has_bias(norm="none")
    assert has_bias(norm_position="after_activation")
    assert has_bias(use_bias=True)
    assert not has_bias(norm="none", use_bias=False)


def test_a_bias_under_batch_norm_has_no_effect_and_no_gradient():
    model = bnjax.mlp((5,), 3, "tanh", use_bias=True)
    params, stats = model.init(KEY, SHAPE, 1.0)

    def loss(bias):
        p = params | {"hidden_0": params["hidden_0"] | {"bias": bias}}
        return jnp.sum(model.apply(p, stats, X, train=True)[0] ** 2)

    gradient = jax.grad(loss)(jnp.arange(5.0))
    np.testing.assert_allclose(loss(jnp.arange(5.0)), loss(jnp.zeros(5)), rtol=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


class TestLayers:
    model = bnjax.mlp((5, 4), 3, "tanh")
    params, stats = model.init(KEY, SHAPE, 1.0)

    def test_shows_every_intermediate(self):
        outputs, shown = self.model.layers(self.params, self.stats, X, {}, train=True)
        stages = ("preactivation", "norm", "activation")
        assert list(shown) == [f"hidden_{i}/{stage}" for i in range(2) for stage in stages] + ["output"]
        assert (outputs == self.model.apply(self.params, self.stats, X, train=True)[0]).all()
        np.testing.assert_allclose(shown["hidden_1/activation"], jnp.tanh(shown["hidden_1/norm"]), atol=1e-6)
        np.testing.assert_allclose(shown["hidden_0/norm"].std(0), 1, atol=1e-3)

    def test_the_gradient_at_a_zero_offset_is_the_gradient_to_the_activation(self):
        def loss(offsets):
            return jnp.sum(self.model.layers(self.params, self.stats, X, offsets, train=True)[0] ** 2)

        _, shown = self.model.layers(self.params, self.stats, X, {}, train=True)
        gradients = jax.grad(loss)(jax.tree.map(jnp.zeros_like, shown))
        # The rest of the network from the last hidden activation on, by hand:
        kernel = self.params["output"]["kernel"]
        np.testing.assert_allclose(
            gradients["hidden_1/activation"], 2 * shown["output"] @ kernel.T, rtol=1e-5, atol=1e-5
        )
        # and a layer's gradient is what its input's weights see: dL/dW = x^T dL/d(xW)
        weight_gradient = jax.grad(lambda p: jnp.sum(self.model.apply(p, self.stats, X, train=True)[0] ** 2))(
            self.params
        )
        expected = shown["hidden_0/activation"].T @ gradients["hidden_1/preactivation"]
        np.testing.assert_allclose(weight_gradient["hidden_1"]["kernel"], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("position", ["before_activation", "after_activation"])
    def test_every_offset_is_added_where_its_name_says(self, position):
        """Finite differences of the outputs along a random offset, in float64, against the derivative; and an
        offset shows in its own intermediate and in no earlier one."""
        with jax.enable_x64(True):
            model = bnjax.mlp((5, 4), 3, "tanh", norm_position=position)
            params, stats, x = jax.tree.map(lambda a: a.astype(jnp.float64), (*model.init(KEY, SHAPE, 1.0), X))
            layers = jax.jit(lambda offsets: model.layers(params, stats, x, offsets, train=True))
            _, base = layers({})
            names = list(model.layers(params, stats, x, {}, train=True)[1])  # jit has sorted those of `base`
            for i, name in enumerate(names):
                value = base[name]
                direction = jax.random.normal(jax.random.fold_in(KEY, i), value.shape)
                outputs, shown = layers({name: 1e-6 * direction})
                np.testing.assert_allclose(shown[name] - value, 1e-6 * direction, atol=1e-14)
                assert all((shown[earlier] == base[earlier]).all() for earlier in names[:i])
                _, derivative = jax.jvp(lambda d, n=name: layers({n: d})[0], (0 * direction,), (direction,))
                np.testing.assert_allclose((outputs - base["output"]) / 1e-6, derivative, rtol=1e-4, atol=1e-4)
                assert jnp.abs(derivative).max() > 1e-3

    def test_unknown_offset(self):
        with pytest.raises(ValueError, match=r"unknown offsets \['hidden_9'\]; allowed: hidden_0/pre"):
            self.model.layers(self.params, self.stats, X, {"hidden_9": 0.0}, train=True)


def test_frozen_kernels_are_no_parameters():
    params, stats = bnjax.mlp((5, 4), 3, freeze_hidden=True).init(KEY, SHAPE, 1.0)
    assert all("kernel" not in params[name] for name in ("hidden_0", "hidden_1"))
    assert all("kernel" in stats[name] for name in ("hidden_0", "hidden_1"))


def test_config_tells_networks_apart():
    assert bnjax.mlp().config == bnjax.mlp().config
    assert bnjax.mlp().config != bnjax.mlp(epsilon=1e-3).config


def test_an_epsilon_for_each_layer():
    """Each has its own; the derivative in it is that of differences; `config` is what JSON holds."""
    x = jax.random.normal(KEY, (9, *SHAPE))
    params, stats = bnjax.mlp((5, 4), 3).init(KEY, SHAPE, 1.0)

    def outputs(epsilon):
        return bnjax.mlp((5, 4), 3, epsilon=epsilon).apply(params, stats, x, train=True)[0]

    np.testing.assert_allclose(outputs(np.array([0.1, 0.1])), outputs(0.1), rtol=1e-6)
    assert np.abs(outputs(np.array([0.1, 0.3])) - outputs(0.1)).max() > 1e-3
    slopes = jax.grad(lambda epsilon: outputs(epsilon)[:, 0].sum())(jnp.array([0.1, 0.3]))
    for i, slope in enumerate(slopes):
        step = 1e-2 * np.eye(2, dtype=np.float32)[i]
        low, high = (outputs(np.float32([0.1, 0.3]) + sign * step)[:, 0].sum() for sign in (-1, 1))
        np.testing.assert_allclose(slope, (high - low) / 2e-2, rtol=0.05, atol=1e-3)
    assert json.loads(json.dumps(bnjax.mlp((5, 4), epsilon=np.float32([0.5, 0.25])).config))["epsilon"] == [0.5, 0.25]


def test_no_hidden_layer_is_a_linear_classifier():
    params, stats = bnjax.mlp((), 3).init(KEY, SHAPE, 1.0)
    assert list(params) == ["output"]
    assert stats == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "rlu"}, r"unknown activation 'rlu' \(did you mean 'relu'\?\); allowed: relu, leaky_relu"),
        ({"activation": "swish"}, r"unknown activation 'swish' \(did you mean 'silu'\?\); allowed: relu, "),
        ({"norm": "layr"}, "unknown norm 'layr'.*did you mean 'layer'"),
        ({"norm": "layer", "momentum": 0.9}, r"norm 'layer' takes epsilon, per_position; got \['momentum'\]"),
        ({"norm": bnjax.norms.layer(), "epsilon": 0.1}, "epsilon must be given to the norm itself"),
        ({"scaled_layer": "all"}, r"norm 'batch' takes epsilon, momentum, detach; got \['scaled_layer'\]"),
        ({"norm_position": "before"}, "unknown norm_position 'before'"),
        ({"initializer": "xavier"}, "unknown initializer 'xavier'; allowed"),
        ({"scaled_layers": "output"}, "unknown scaled_layers 'output'"),
        ({"features": (8, 0)}, r"features must be positive widths, got \(8, 0\)"),
        ({"num_outputs": 0}, "num_outputs must be at least 1, got 0"),
        ({"epsilon": -1.0}, "epsilon must be >= 0 and finite, got -1.0"),
        ({"epsilon": float("inf")}, "epsilon must be >= 0 and finite, got inf"),
        ({"epsilon": np.array([0.1, -1.0, 0.1])}, "epsilon must be >= 0 and finite, got -1.0"),
        ({"epsilon": np.array([0.1, 0.1])}, r"one number or one for each of 3 hidden layers, got shape \(2,\)"),
        ({"momentum": 2.0}, "momentum .* got 2.0"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        bnjax.mlp(**options)


def test_a_function_for_a_name():
    """Behind the run-time check of annotations, which users do not have."""
    with pytest.raises(ValueError, match=r"activation must be one of these names: relu, .*linear; got <.*>$"):
        inspect.unwrap(choices.check)("activation", jax.nn.relu, activations.ACTIVATIONS)
