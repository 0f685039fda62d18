"""Networks of users' making, with `layers` of their own and without: by hand, and of Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from small_networks import cotangent, gradients, network, signals, singular_values

import bnjax
from bnjax import probes
from bnjax.interop import flax as to_from_flax


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
