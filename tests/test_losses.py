"""Losses, targets and optimizers of one's own: against steps by hand, and told apart in stored results."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnjax
from bnjax import losses

MODEL = bnjax.mlp((8,), 4)
CONFIG = bnjax.TrainConfig(steps=3, batch_size=32, eval_every=1)


def regression(blobs):
    """Targets [N, 4]: a linear map of the inputs."""
    w = np.random.default_rng(1).normal(size=(12, 4)).astype(np.float32) / 4
    return blobs._replace(train_y=blobs.train_x @ w, test_y=blobs.test_x @ w)


def huber(outputs, targets):
    return optax.huber_loss(outputs, targets).mean()


def clipped(hyper):
    return optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(hyper.learning_rate, hyper.momentum))


def scheduled(hyper):
    return optax.sgd(optax.linear_schedule(hyper.learning_rate, 0.0, 3))


def by_hand(ds, loss, optimizer, seed=0):
    """(losses, last test loss) of 3 steps in Python, on the batches in the order of `make_train`."""

    @jax.jit
    def begin():
        params, stats = MODEL.init(jax.random.key(seed), (12,), 1.0)
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), 0), len(ds.train_x))
        return params, stats, optimizer.init(params), order

    @jax.jit
    def step(params, stats, state, x, y):
        def of(params):
            outputs, new = MODEL.apply(params, stats, x, train=True)
            return loss(outputs, y), new

        (value, stats), gradient = jax.value_and_grad(of, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), stats, state, value

    params, stats, state, order = begin()
    losses = []
    for i in range(3):
        chosen = np.asarray(order)[32 * i : 32 * (i + 1)]
        params, stats, state, value = step(params, stats, state, ds.train_x[chosen], ds.train_y[chosen])
        losses.append(value)
    return losses, jax.jit(lambda: loss(MODEL.apply(params, stats, ds.test_x, train=False)[0], ds.test_y))()


@pytest.mark.parametrize(
    ("loss", "function", "optimizer", "floats"),
    [
        ("squared", lambda o, t: ((o - jnp.eye(4)[t]) ** 2).sum() / o.size, "sgd", False),
        ("squared", lambda o, t: ((o - t) ** 2).sum() / o.size, clipped, True),
        pytest.param(huber, huber, scheduled, True, marks=pytest.mark.slow),
    ],
)
def test_against_steps_by_hand(blobs, loss, function, optimizer, floats):
    ds = regression(blobs) if floats else blobs
    config = bnjax.TrainConfig(3, 32, optimizer, eval_every=1, loss=loss)
    history = jax.jit(bnjax.make_train(MODEL, config))(bnjax.Hyperparams(), ds)
    reference = optax.sgd(0.1, 0.9) if optimizer == "sgd" else optimizer(bnjax.Hyperparams())
    losses, test_loss = by_hand(ds, function, reference)
    np.testing.assert_allclose(history.train_loss, losses, rtol=1e-5)
    np.testing.assert_allclose(history.test_loss[-1], test_loss, rtol=1e-5)
    assert np.isnan(history.test_accuracy).all() == floats
    assert not history.diverged


def test_targets_of_floats_in_a_sweep(blobs, tmp_path):
    """No accuracies, in stored results neither; a run that diverges does so as any other."""
    config = bnjax.TrainConfig(steps=20, batch_size=32, loss="squared", eval_every=10)
    axes = {"learning_rate": [0.01, 1e30]}
    found = bnjax.sweep(MODEL, regression(blobs), config, axes, path=tmp_path / "results", progress=False)
    assert {*found.data_vars} == {"train_loss", "test_loss", "diverged", "diverged_step"}
    assert found.diverged.values.tolist() == [False, True]
    assert found.test_loss.isel(learning_rate=0)[-1] < found.test_loss.isel(learning_rate=0)[0]
    assert found.train_loss.long_name == "training loss (squared, mean over outputs)"
    loaded = bnjax.load_results(tmp_path / "results")
    assert loaded.identical(found)


def doubled(scale):
    """Losses that differ in what they close over alone: their names are the same."""
    return lambda outputs, targets: scale * losses.cross_entropy(outputs, targets)


def with_momentum(value):
    return lambda hyper: optax.sgd(hyper.learning_rate, value)


@pytest.mark.slow
def test_stored_results_tell_functions_apart_by_what_they_compute(blobs, tmp_path):
    """Not by their address: the same function made again continues, another one is refused."""

    def sweep(**options):
        config = bnjax.TrainConfig(steps=2, batch_size=32, **options)
        return bnjax.sweep(MODEL, blobs, config, {"seed": [0]}, path=tmp_path / "results", progress=False)

    first = sweep(loss=doubled(2.0), optimizer=with_momentum(0.5))
    assert sweep(loss=doubled(2.0), optimizer=with_momentum(0.5)).identical(first)
    assert first.attrs["config"]["loss"] == "doubled.<locals>.<lambda>"
    for options in (
        {"loss": doubled(3.0), "optimizer": with_momentum(0.5)},
        {"loss": doubled(2.0), "optimizer": with_momentum(0.6)},
    ):
        with pytest.raises(ValueError, match="holds other results: computes"):
            sweep(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, r"unknown loss 'hinge'.*cross_entropy, squared"),
        ({"optimizer": "sdg"}, r"unknown optimizer 'sdg' \(did you mean 'sgd'\?\)"),
        ({"loss": lambda outputs, targets: outputs}, r"loss must return a scalar.*got ShapeDtypeStruct"),
        ({"loss": lambda outputs, targets: (outputs.sum(), 1)}, "loss must return a scalar"),
        ({"loss": lambda outputs, targets: targets.sum()}, "loss must return a scalar"),
        ({"optimizer": lambda hyper: hyper.learning_rate}, "optimizer must return an optax transformation, got float"),
    ],
)
def test_refused(blobs, options, message, tmp_path):
    def sweep():
        config = bnjax.TrainConfig(steps=2, batch_size=32, **options)
        bnjax.sweep(MODEL, blobs, config, {"seed": [0]}, path=tmp_path / "results", progress=False)

    with pytest.raises(ValueError, match=message):
        sweep()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "loss", "message"),
    [
        (lambda y: y.astype(np.float32), "squared", r"train targets must be \[N, 4\], as the outputs; got \[256\]"),
        (lambda y: np.eye(3, dtype=np.float32)[y % 3], "squared", r"must be \[N, 4\].*got \[256, 3\]"),
        (lambda y: np.eye(4, dtype=np.float32)[y], "cross_entropy", "train labels must be integers, got float32"),
        (lambda y: np.eye(4, dtype=np.int32)[y], "squared", r"train labels must be \[N\], got \[256, 4\]"),
    ],
)
def test_targets_that_do_not_fit(blobs, change, loss, message):
    config = bnjax.TrainConfig(steps=2, batch_size=32, loss=loss)
    ds = blobs._replace(train_y=change(blobs.train_y), test_y=change(blobs.test_y))
    with pytest.raises(ValueError, match=message):
        bnjax.sweep(MODEL, ds, config, {"seed": [0]}, progress=False)


def test_labels_as_targets_are_one_hot():
    outputs, labels = jnp.array([[0.2, 0.8], [0.5, 0.5]]), jnp.array([1, 0])
    assert losses.squared(outputs, labels) == pytest.approx((0.04 + 0.04 + 0.25 + 0.25) / 4)
