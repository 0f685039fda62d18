"""One run: it learns, agrees with a plain loop, and is the same in pieces, in 32 bit and with probes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import short_runs
from short_runs import MODEL, SMALL, program, run

import bnjax
from bnjax import training


def by_hand(ds, hyper, config, optimizer):
    """The same run as a Python loop over explicit batches, with the optimizer's formula written out."""
    init = jax.jit(MODEL.init, static_argnums=1)
    params, stats = init(jax.random.key(hyper.seed), ds.train_x.shape[1:], hyper.init_scale)
    state = jax.tree.map(jnp.zeros_like, (params, params))
    losses, curves = [], []
    optimizer = jax.jit(optimizer)

    @jax.jit
    def gradient(params, stats, x, y):
        def loss(params):
            logits, new = MODEL.apply(params, stats, x, train=True)
            return cross_entropy(logits, y), (new, (logits.argmax(-1) == y).mean())

        return jax.value_and_grad(loss, has_aux=True)(params)

    @jax.jit
    def evaluate(params, stats):
        logits, _ = MODEL.apply(params, stats, ds.test_x, train=False)
        return cross_entropy(logits, ds.test_y), (logits.argmax(-1) == ds.test_y).mean()

    n = len(ds.train_x)
    order = jax.jit(
        lambda epoch: jax.random.permutation(jax.random.fold_in(jax.random.key(config.data_seed), epoch), n)
    )
    for step in range(config.steps):
        epoch, position = divmod(step, n // config.batch_size)
        batch = order(epoch)[position * config.batch_size :][: config.batch_size]
        (loss, (stats, accuracy)), grads = gradient(params, stats, ds.train_x[batch], ds.train_y[batch])
        params, state = optimizer(hyper, step + 1, params, grads, state)
        losses.append((loss, accuracy))
        if step + 1 in config.eval_steps:
            curves.append((*np.mean(jax.device_get(losses), axis=0), *evaluate(params, stats)))
            losses = []
    return np.array(curves).T


def cross_entropy(logits, labels):
    return (jax.nn.logsumexp(logits, axis=-1) - logits[np.arange(len(labels)), labels]).mean()


def l2(h, params, grads):
    return jax.tree.map(lambda g, p: g + (h.weight_decay * p if p.ndim > 1 else 0), grads, params)


def sgd(h, t, params, grads, state):
    velocity = jax.tree.map(lambda v, g: h.momentum * v + g, state[0], l2(h, params, grads))
    return jax.tree.map(lambda p, v: p - h.learning_rate * v, params, velocity), (velocity, None)


def adam_step(h, t, grads, state):
    m = jax.tree.map(lambda m, g: h.momentum * m + (1 - h.momentum) * g, state[0], grads)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state[1], grads)
    direction = jax.tree.map(lambda m, v: m / (1 - h.momentum**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8), m, v)
    return direction, (m, v)


def adam(h, t, params, grads, state):
    direction, state = adam_step(h, t, l2(h, params, grads), state)
    return jax.tree.map(lambda p, d: p - h.learning_rate * d, params, direction), state


def adamw(h, t, params, grads, state):
    direction, state = adam_step(h, t, grads, state)
    return jax.tree.map(lambda p, d: p - h.learning_rate * d, params, l2(h, params, direction)), state


def rmsprop(h, t, params, grads, state):
    nu = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g * g, state[1], l2(h, params, grads))
    scaled = jax.tree.map(lambda g, v: h.learning_rate * g / jnp.sqrt(v + 1e-8), l2(h, params, grads), nu)
    velocity = jax.tree.map(lambda m, s: h.momentum * m + s, state[0], scaled)
    return jax.tree.map(lambda p, v: p - v, params, velocity), (velocity, nu)


@pytest.mark.parametrize(
    ("optimizer", "learning_rate"),
    [
        (sgd, 0.1),
        pytest.param(adam, 0.01, marks=pytest.mark.slow),
        pytest.param(adamw, 0.01, marks=pytest.mark.slow),
        pytest.param(rmsprop, 0.003, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_a_plain_loop(blobs, optimizer, learning_rate):
    """20 steps in float32; a loss that is wrong in its formula is off by far more than 1e-3."""
    hyper = bnjax.Hyperparams(3, 2.0, learning_rate, momentum=0.8, weight_decay=0.05)
    config = bnjax.TrainConfig(steps=20, batch_size=48, optimizer=optimizer.__name__, eval_every=8)
    history = jax.jit(bnjax.make_train(MODEL, config))(hyper, blobs)
    train_loss, train_accuracy, test_loss, test_accuracy = by_hand(blobs, hyper, config, optimizer)
    assert config.eval_steps == (8, 16, 20)
    np.testing.assert_allclose(history.train_loss, train_loss, rtol=1e-3)
    np.testing.assert_allclose(history.test_loss, test_loss, rtol=1e-3)
    # an example near a boundary may fall either way: 2 of those that a mean is over
    np.testing.assert_allclose(history.train_accuracy, train_accuracy, atol=2.1 / (4 * 48))
    np.testing.assert_allclose(history.test_accuracy, test_accuracy, atol=2.1 / 128)


LONG = {"steps": 80, "eval_every": 20}


@pytest.mark.parametrize(
    "model", [SMALL, pytest.param(bnjax.mlp((16,), 4, norm="none"), marks=pytest.mark.slow)], ids=["batch", "none"]
)
def test_learns(blobs, model):
    history = run(blobs, model=model, **LONG)
    assert history.test_accuracy[-1] > 0.8  # chance is 0.25; a linear discriminant reaches 0.9
    assert history.test_loss[-1] < history.test_loss[0]
    assert not history.diverged
    assert history.diverged_step == -1


@pytest.mark.parametrize(
    ("eval_every", "steps"), [(None, (7,)), (3, (3, 6, 7)), (7, (7,)), (50, (7,)), (1, range(1, 8))]
)
def test_evaluations(blobs, eval_every, steps):
    config = bnjax.TrainConfig(steps=7, batch_size=32, eval_every=eval_every)
    assert config.eval_steps == tuple(steps)
    history = jax.eval_shape(bnjax.make_train(SMALL, config), bnjax.Hyperparams(), blobs)
    assert all(curve.shape == (len(config.eval_steps),) for curve in history[:4])


@pytest.mark.slow
@pytest.mark.parametrize("eval_every", [3, None])
def test_a_probe_sees_every_state_and_changes_nothing(blobs, eval_every):
    """But for rounding: the probe is part of the one program. 7 steps amplify 1e-7 to less than 1e-4."""
    config = bnjax.TrainConfig(steps=7, batch_size=32, eval_every=eval_every)

    def measure(s):
        kernel = s.params["hidden_0"]["kernel"]
        return {
            "norm": jnp.linalg.norm(kernel),
            "moved": jnp.linalg.norm(kernel - s.initial_params["hidden_0"]["kernel"]),
            "batches": s.batch_stats["hidden_0"]["norm"].count - s.initial_batch_stats["hidden_0"]["norm"].count,
            "rate": s.hyper.learning_rate,
            "examples": jnp.float32(len(s.ds.train_x)),
        }

    hyper = bnjax.Hyperparams(seed=1, learning_rate=0.05)
    history, probed = jax.jit(bnjax.make_train(MODEL, config, bnjax.Probe(measure)))(hyper, blobs)
    plain = jax.jit(bnjax.make_train(MODEL, config))(hyper, blobs)
    for a, b in zip(history, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert probed["batches"].tolist() == [0, *config.eval_steps]
    assert probed["moved"][0] == 0
    assert (probed["moved"][1:] > 1e-3).all()
    np.testing.assert_array_equal(probed["rate"], np.float32(0.05))
    np.testing.assert_array_equal(probed["examples"], 256)
    start, _ = MODEL.init(jax.random.key(1), (12,), 1.0)
    np.testing.assert_allclose(probed["norm"][0], jnp.linalg.norm(start["hidden_0"]["kernel"]), rtol=1e-6)


@pytest.mark.slow
def test_evaluating_more_often_changes_nothing_else(blobs):
    """Up to rounding: XLA may fuse the two programs differently."""
    often, rarely = run(blobs, eval_every=10), run(blobs)
    np.testing.assert_allclose(often.test_loss[-1], rarely.test_loss[-1], rtol=1e-4)
    np.testing.assert_allclose(often.train_loss.mean(), rarely.train_loss[-1], rtol=1e-4)


def test_test_split_is_evaluated_whole(blobs, monkeypatch):
    """In pieces of 50, 50 and 28."""
    expected = run(blobs, **LONG)
    monkeypatch.setattr(training, "TEST_BATCH", 50)
    monkeypatch.setattr(short_runs, "program", short_runs.compiled_anew)
    found = run(blobs, **LONG)
    np.testing.assert_allclose(found.test_loss, expected.test_loss, rtol=1e-5)
    np.testing.assert_allclose(found.test_accuracy, expected.test_accuracy, rtol=1e-6)


SEED_3 = bnjax.Hyperparams(seed=3)


@functools.cache
def in_pieces(every):
    """11 steps, of which 3, 6 and 9 end an epoch: start and advance, and both compiled."""
    pair = training.make_run(bnjax.mlp((16,), 10), bnjax.TrainConfig(steps=11, batch_size=85, eval_every=every))
    return pair, [jax.jit(function) for function in pair]


@pytest.mark.parametrize("every", [None, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 11, 12))])
def test_a_run_in_pieces_is_the_run(blobs, every):
    """Bit for bit, with one program, wherever it is cut."""
    _, (start, advance) = in_pieces(every)
    hyper = SEED_3
    begin = start(hyper, blobs)
    whole = advance(begin, hyper, blobs, 0, 11)
    assert np.isfinite(whole.history.test_loss).all()
    for segment in (1, 2, 3, 4, 5, 9):
        state = begin
        for first in range(0, 11, segment):
            state = advance(state, hyper, blobs, first, min(first + segment, 11))
        jax.tree.map(np.testing.assert_array_equal, state, whole)
    assert advance._cache_size() == 1


def test_is_in_32_bit_where_64_are_on(blobs):
    """Over an interval that is cut, and a last one that is shorter."""
    of, (start, advance) = in_pieces(4)
    expected = advance(start(SEED_3, blobs), SEED_3, blobs, 0, 11).history
    with jax.enable_x64(True):
        start, advance = (jax.jit(lambda *args, function=function: function(*args)) for function in of)
        state = start(SEED_3, blobs)
        for first, until in ((0, 6), (6, 11)):
            state = advance(state, SEED_3, blobs, first, until)
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(state)} <= {1, 4}
    for found, wanted in zip(state.history, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)  # the order of float32 sums


def test_frozen_kernels_stay_even_under_weight_decay(blobs):
    """Weights frozen, momentum and decay on: the network at step 40 still has its first kernels."""
    model = bnjax.mlp((16,), 4, freeze_hidden=True)
    seen = []

    def apply(params, batch_stats, x, *, train):
        outputs, stats = model.apply(params, batch_stats, x, train=train)
        if not train:
            jax.debug.callback(lambda k: seen.append(np.asarray(k)), stats["hidden_0"]["kernel"])
        return outputs, stats

    history = run(blobs, bnjax.Hyperparams(weight_decay=0.1), model._replace(apply=apply))
    jax.effects_barrier()
    _, stats = jax.jit(lambda: model.init(jax.random.key(0), (12,), 1.0))()
    assert (seen[-1] == stats["hidden_0"]["kernel"]).all()
    assert history.test_accuracy[-1] > 0.5  # the output layer and BN's scale and bias do learn


@pytest.mark.slow
def test_order_of_the_data_has_its_own_seed(blobs):
    one, again, other = run(blobs), run(blobs, data_seed=0), run(blobs, data_seed=1)
    assert one.train_loss == again.train_loss
    assert one.train_loss != other.train_loss


def test_every_epoch_shows_each_example_once(blobs):
    """With the batch size dividing the split; the labels stand for the examples."""
    seen = []
    numbered = blobs._replace(
        train_x=np.arange(256, dtype=np.float32)[:, None], test_x=np.zeros((1, 1), np.float32), test_y=blobs.test_y[:1]
    )

    def apply(params, batch_stats, x, *, train):
        if train:
            jax.debug.callback(lambda x: seen.append(np.asarray(x).ravel()), x, ordered=True)
        return x @ params["w"], batch_stats

    model = bnjax.Model(lambda key, shape, init_scale: ({"w": jnp.zeros((1, 4))}, {}), apply)
    run(numbered, model=model, steps=12, batch_size=64)
    jax.effects_barrier()
    epochs = np.concatenate(seen).reshape(3, 256)
    assert (np.sort(epochs) == np.arange(256)).all()
    for a, b in itertools.combinations(epochs, 2):
        assert (a != b).any()


def test_hyperparameters_are_traced_and_recompile_nothing(blobs):
    for seed, scale in [(0, 1.0), (1, 2.0), (2, 0.1)]:
        run(blobs, bnjax.Hyperparams(seed, scale), **LONG)
    assert program(SMALL, **LONG)._cache_size() == 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_runs_with_x64_on(blobs, optimizer):
    """Hyperparameters that are float64 and int64 arrays widen nothing."""
    hyper = jax.tree.map(jnp.asarray, bnjax.Hyperparams(learning_rate=0.01))
    assert hyper.learning_rate.dtype == jnp.float64
    assert run(blobs, hyper, steps=4, eval_every=3, optimizer=optimizer).test_accuracy.shape == (2,)
