"""Scalars of one's own, `Hyperparams.extra`: traced axes of a sweep, in networks, losses and optimizers."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax import probes, training
from bnjax.sweeps import program

CONFIG = bnjax.TrainConfig(steps=3, batch_size=32, eval_every=3)


def init(key, input_shape):
    keys = jax.random.split(key)
    return {"a": jax.random.normal(keys[0], (12, 8)) / 3, "b": jax.random.normal(keys[1], (8, 4)) / 3}


def apply(params, x, extra):
    return jnp.tanh(extra["gain"] * x @ params["a"]) @ params["b"]


NETWORK = bnjax.as_model((init, apply))


def hyper(**extra):
    return bnjax.Hyperparams(extra=extra)


def sweep(network, blobs, axes, config=CONFIG, **options):
    return bnjax.sweep(network, blobs, config, axes, progress=False, **options)


def test_an_axis_of_a_network(blobs, monkeypatch):
    """Each value gives what the network with that constant does, by one compiled program; names are dimensions."""
    calls, compiled = [], program.compiled
    monkeypatch.setattr(program, "compiled", lambda *args: calls.append(args) or compiled(*args))
    compiled.cache_clear()
    found = sweep(NETWORK, blobs, {"gain": [0.5, 2.0], "seed": [0, 1]}, hyper=hyper(gain=1.0))
    assert compiled.cache_info().currsize == 1
    assert found.test_loss.dims == ("gain", "seed", "step")
    assert (found.test_loss.sel(gain=0.5) != found.test_loss.sel(gain=2.0)).all()
    constant = (init, lambda params, x: apply(params, x, {"gain": 2.0}))
    expected = sweep(constant, blobs, {"seed": [0, 1]})
    np.testing.assert_allclose(found.test_loss.sel(gain=2.0), expected.test_loss, rtol=1e-5)


def test_a_value_that_is_not_swept_is_kept_with_the_results(blobs, tmp_path):
    """A larger grid continues, another value is another grid."""
    path = tmp_path / "results"
    first = sweep(NETWORK, blobs, {"gain": [0.5]}, hyper=hyper(gain=1.0), path=path)
    more = sweep(NETWORK, blobs, {"gain": [0.5, 2.0]}, hyper=hyper(gain=1.0), path=path)
    np.testing.assert_array_equal(more.test_loss.sel(gain=[0.5]), first.test_loss)
    assert bnjax.load_results(path).identical(more)
    fixed = sweep(NETWORK, blobs, {"seed": [0]}, hyper=hyper(gain=2.0))
    assert fixed.attrs["hyper"]["gain"] == 2.0
    np.testing.assert_allclose(fixed.test_loss[0], more.test_loss.sel(gain=2.0), rtol=1e-6)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train, extra):
        x = nn.relu(nn.Dense(8)(x))
        if train:
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - extra["dropout"], x.shape)
            x = x * kept / (1 - extra["dropout"])
        return nn.Dense(4)(x)


class Gained(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.output = nnx.Linear(12, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x, extra):
        return self.output(nnx.relu(extra["gain"] * self.hidden(x)))


class Scaled(eqx.Module):
    hidden: eqx.nn.Linear
    output: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.hidden, self.output = eqx.nn.Linear(12, 8, key=one), eqx.nn.Linear(8, 4, key=two)

    def __call__(self, x, extra):
        return self.output(jnp.tanh(extra["gain"] * self.hidden(x)))


@pytest.mark.slow
def test_a_network_of_equinox(blobs):
    found = sweep(Scaled(jax.random.key(0)), blobs, {"gain": [0.5, 2.0], "seed": [0, 1]}, hyper=hyper(gain=1.0))
    assert len({*found.test_loss.values.ravel().tolist()}) == 4


def test_a_network_of_equinox_that_is_compiled_already():
    net = Scaled(jax.random.key(0))
    with pytest.raises(ValueError, match="without filter_jit"):
        bnjax.as_model(eqx.filter_jit(net))


@pytest.mark.slow
def test_networks_of_flax(blobs):
    found = sweep(Noisy(), blobs, {"dropout": [0.0, 0.5], "seed": [0, 1]}, hyper=hyper(dropout=0.1))
    assert (found.train_loss.sel(dropout=0.0) < found.train_loss.sel(dropout=0.5)).all()
    assert found.attrs["kernels"][""]["scaled"] == ["Dense_0/kernel"]
    found = sweep(Gained(nnx.Rngs(0)), blobs, {"gain": [0.5, 2.0], "seed": [0, 1]}, hyper=hyper(gain=1.0))
    assert len({*found.test_loss.values.ravel().tolist()}) == 4


def smoothed(outputs, targets, extra):
    """With label smoothing."""
    labels = optax.smooth_labels(jax.nn.one_hot(targets, outputs.shape[-1]), extra["smoothing"])
    return optax.softmax_cross_entropy(outputs, labels).mean()


def decayed(hyper):
    return optax.sgd(lambda step: hyper.learning_rate * hyper.extra["rate"] ** step)


def test_in_a_loss_and_an_optimizer(blobs):
    config = dataclasses.replace(CONFIG, loss=smoothed, optimizer=decayed)
    axes = {"smoothing": [0.0, 0.2], "rate": [0.5, 1.0]}
    found = sweep(bnjax.mlp((8,), 4), blobs, axes, config, hyper=hyper(smoothing=0.1, rate=0.9))
    assert len({*found.test_loss.values.ravel().tolist()}) == 4
    plain = dataclasses.replace(CONFIG, optimizer=lambda h: optax.sgd(h.learning_rate))
    expected = sweep(bnjax.mlp((8,), 4), blobs, {"seed": [0]}, plain)
    np.testing.assert_allclose(found.test_loss.sel(smoothing=0.0, rate=1.0), expected.test_loss[0], rtol=1e-5)


def test_make_train(blobs):
    train = jax.jit(bnjax.make_train(NETWORK, CONFIG))
    one, two = (train(hyper(gain=gain), blobs).train_loss for gain in (1.0, 2.0))
    assert one != two
    gradient = jax.grad(lambda gain: bnjax.make_train(NETWORK, CONFIG)(hyper(gain=gain), blobs).test_loss[-1])
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        gradient(1.0)


@pytest.mark.slow
def test_probes(blobs):
    """Those of a run see its own values."""
    model = NETWORK
    probe = probes.flow(model, (12,), batch_size=32, extra={"gain": 1.0})
    found = sweep(model, blobs, {"gain": [0.5, 2.0]}, hyper=hyper(gain=1.0), probe=probe)
    spread = found.spread.isel(probe_step=0).sel(layer="a")
    np.testing.assert_allclose(spread.sel(gain=2.0), 4 * spread.sel(gain=0.5), rtol=1e-5)

    def loss(outputs, targets, extra):
        return extra["gain"] * optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()

    weights = probes.weights(model, (12,), batch_size=32, extra={"gain": 1.0}, loss=loss)
    assert (sweep(model, blobs, {"gain": [0.5]}, hyper=hyper(gain=1.0), probe=weights).gradient_norm > 0).all()


def test_other_names_are_other_results(blobs, tmp_path):
    """Also where the programs are the same text."""

    def gained(name):
        return init, lambda params, x, extra: apply(params, x, {"gain": extra[name]})

    path = tmp_path / "results"
    sweep(gained("gain"), blobs, {"gain": [0.5]}, hyper=hyper(gain=1.0), path=path)
    other = {"axes": {"slope": [1.0, 2.0]}, "hyper": hyper(slope=1.0), "path": path}
    with pytest.raises(ValueError, match="holds other results"):
        sweep(gained("slope"), blobs, **other)
    found = sweep(gained("slope"), blobs, **other, overwrite=True)
    expected = sweep(gained("slope"), blobs, {"slope": [1.0, 2.0]}, hyper=hyper(slope=1.0))
    np.testing.assert_array_equal(found.test_loss, expected.test_loss)


def test_what_a_probe_measures_has_the_type_of_a_run(blobs):
    """And may be called like a hyperparameter in a part."""
    probe = bnjax.Probe(lambda s: {"cell size": s.hyper.extra["gain"], "half": jnp.float16(2) * s.hyper.extra["gain"]})
    found = sweep(NETWORK, blobs, {"gain": [0.5]}, hyper=hyper(gain=1), probe=probe)
    np.testing.assert_array_equal(found["cell size"].values.ravel(), [0.5, 0.5])
    assert "done" not in found


def test_a_default_of_ones_own_stays(blobs):
    def own(params, x, extra={"gain": 2.0}):  # noqa: B006 (not changed)
        return apply(params, x, extra)

    found = sweep((init, own), blobs, {"seed": [0]})
    expected = sweep(NETWORK, blobs, {"seed": [0]}, hyper=hyper(gain=2.0))
    np.testing.assert_allclose(found.test_loss, expected.test_loss, rtol=1e-5)
    net = Gained(nnx.Rngs(0))
    given = bnjax.as_model(net, arguments=lambda train: {"extra": {"gain": 2.0}})
    state = given.init(jax.random.key(0), (12,), 1.0)
    x = jnp.ones((2, 12))
    np.testing.assert_array_equal(given.apply(*state, x, train=False)[0], net(x, {"gain": 2.0}))


def test_a_baseline_that_does_not_take_it(blobs):
    models = {"gained": (init, apply), "plain": (init, lambda params, x: apply(params, x, {"gain": 1.0}))}
    found = sweep(models, blobs, {"gain": [1.0]}, hyper=hyper(gain=1.0))
    np.testing.assert_allclose(*found.test_loss, rtol=1e-5)


def test_probes_by_hand():
    model = NETWORK
    state = model.init(jax.random.key(0), (12,), extra={"gain": 1.0})
    x = jax.random.normal(jax.random.key(1), (32, 12))
    one, two = (probes.signals(model, *state, x, extra={"gain": gain})["a"].spread for gain in (1.0, 2.0))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)

    @jax.jit
    def norm(gain):
        return probes.gradients(model, *state, x, lambda out: out.mean(), extra={"gain": gain}).weights["b"]

    norms = [norm(gain) for gain in (1e-3, 2e-3)]
    np.testing.assert_allclose(norms[1], 2 * norms[0], rtol=1e-4)  # tanh is linear there
    of = functools.partial(probes.singular_values, model, *state, source=None, target="a")
    assert jax.eval_shape(lambda gain: of(x=x[:4], extra={"gain": gain}), 1.0).shape == (32,)


def test_make_train_checks_names(blobs):
    train = bnjax.make_train(bnjax.mlp((8,), 4), CONFIG)
    with pytest.raises(ValueError, match="names that no hyperparameter has"):
        train(hyper(learning_rate=1e-9), blobs)


def test_describe():
    found = bnjax.describe((init, apply), (12,), extra={"gain": 1.0})
    assert found.parts == ("a", "a/activation", "b")
    assert found.names("scaled") == ["a"]


@pytest.mark.parametrize(
    ("network", "axes", "extra", "message"),
    [
        ("mlp", {}, {"gain": 1.0}, r"nothing reads \['gain'\] in extra: neither a network, nor the loss"),
        ("own", {}, {"gain": 1.0, "gian": 2.0}, r"nothing reads \['gian'\] in extra"),
        ("own", {}, {"gian": 2.0}, r"extra\['gain'\] is asked for; Hyperparams.extra has \['gian'\]"),
        ("own", {}, {}, r"extra\['gain'\] is asked for; Hyperparams.extra has \[\]"),
        ("own", {"gian": [1.0]}, {"gain": 1.0}, r"unknown axis 'gian' \(did you mean 'gain'\?\)"),
        ("own", {"gain": [1.0, np.inf]}, {"gain": 1.0}, "gain must be a finite number in float32, got inf"),
        ("own", {}, {"gain": "1"}, "gain must be a finite number"),
        ("own", {}, {"momentum": 1.0}, "extra takes names that no hyperparameter has.*got 'momentum'"),
        ("own", {}, {"a gain": 1.0}, "extra takes names .*got 'a gain'"),
    ],
)
def test_refused(blobs, network, axes, extra, message, tmp_path):
    model = bnjax.mlp((8,), 4) if network == "mlp" else (init, apply)
    with pytest.raises(ValueError, match=message):
        sweep(model, blobs, axes or {"seed": [0]}, hyper=bnjax.Hyperparams(extra=extra), path=tmp_path / "results")
    assert not any(tmp_path.iterdir())


def test_names_and_back():
    values = {**training.Hyperparams()._asdict(), "gain": 2.0}
    del values["extra"]
    assert bnjax.Hyperparams.from_named(values) == hyper(gain=2.0)
    assert hyper(gain=2.0).named() == values
