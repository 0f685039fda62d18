"""One run: it learns, agrees with a plain loop, counts as guessing once it diverged, and recompiles for nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import training
from bnjax.types import History

MODEL = bnjax.mlp((16, 16), 4)
SMALL = bnjax.mlp((16,), 4)  # compiles in two thirds of the time


def run(ds, hyper=None, model=SMALL, **options):
    config = bnjax.TrainConfig(**{"steps": 40, "batch_size": 32} | options)
    return jax.jit(bnjax.make_train(model, config))(hyper or bnjax.Hyperparams(), ds)


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

    n = len(ds.train_x)
    for step in range(config.steps):
        epoch, position = divmod(step, n // config.batch_size)
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(config.data_seed), epoch), n)
        batch = order[position * config.batch_size :][: config.batch_size]
        (loss, (stats, accuracy)), grads = gradient(params, stats, ds.train_x[batch], ds.train_y[batch])
        params, state = optimizer(hyper, step + 1, params, grads, state)
        losses.append((loss, accuracy))
        if step + 1 in config.eval_steps:
            logits, _ = MODEL.apply(params, stats, ds.test_x, train=False)
            accuracy = (logits.argmax(-1) == ds.test_y).mean()
            curves.append((*np.mean(losses, axis=0), cross_entropy(logits, ds.test_y), accuracy))
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


@pytest.mark.parametrize("norm", ["batch", pytest.param("none", marks=pytest.mark.slow)])
def test_learns(blobs, norm):
    history = run(blobs, model=bnjax.mlp((16,), 4, norm=norm), steps=80, eval_every=20)
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
    history = jax.eval_shape(bnjax.make_train(MODEL, config), bnjax.Hyperparams(), blobs)
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
    expected = run(blobs)
    monkeypatch.setattr(training, "TEST_BATCH", 50)
    found = run(blobs)
    np.testing.assert_allclose(found.test_loss, expected.test_loss, rtol=1e-5)
    np.testing.assert_allclose(found.test_accuracy, expected.test_accuracy, rtol=1e-6)


@pytest.mark.parametrize("every", [None, 4, 11, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 12))])
def test_a_run_in_pieces_is_the_run(blobs, every):
    """Bit for bit, with one program, wherever it is cut; steps 3, 6 and 9 end an epoch."""
    config = bnjax.TrainConfig(steps=11, batch_size=len(blobs.train_x) // 3, eval_every=every)
    start, advance = training.make_run(bnjax.mlp((16,), 10), config)
    hyper, advance = bnjax.Hyperparams(seed=3), jax.jit(advance)
    begin = jax.jit(start)(hyper, blobs)
    whole = advance(begin, hyper, blobs, 0, 11)
    assert np.isfinite(whole.history.test_loss).all()
    for segment in (1, 2, 3, 4, 5, 9):
        state = begin
        for first in range(0, 11, segment):
            state = advance(state, hyper, blobs, first, min(first + segment, 11))
        jax.tree.map(np.testing.assert_array_equal, state, whole)
    assert advance._cache_size() == 1


class TestDivergence:
    LINEAR = bnjax.mlp((16, 16), 10, norm="none", activation="linear")

    def test_from_there_on_it_counts_as_guessing(self, blobs):
        history = run(blobs, bnjax.Hyperparams(learning_rate=1e3), self.LINEAR, eval_every=1)
        assert history.diverged
        step = int(history.diverged_step)
        assert 1 < step < 39
        # Step number `step` is in the interval of that index; the test loss there is of the state after it.
        np.testing.assert_array_equal(np.isinf(history.train_loss), np.arange(40) >= step)
        assert np.isfinite(history.train_loss[:step]).all()
        assert np.isfinite(history.test_loss[: step - 1]).all()
        assert np.isinf(history.test_loss[step:]).all()
        for accuracy in (history.train_accuracy, history.test_accuracy):
            assert accuracy.dtype == np.float32
            np.testing.assert_array_equal(accuracy[step:], np.float32(1) / np.float32(10))
        assert np.unique(history.train_accuracy[:step]).size > 1

    @pytest.mark.slow
    def test_shown_by_the_test_loss_alone(self, blobs):
        """One step whose update is finite, to a network whose loss is not."""
        hyper = bnjax.Hyperparams(learning_rate=1e25, momentum=0.0)
        history = run(blobs, hyper, self.LINEAR, steps=1)
        assert history.diverged_step == 1
        assert history.train_loss < 100
        assert history.test_loss == np.inf
        assert history.test_accuracy == np.float32(0.1)

    @pytest.mark.slow
    def test_not_by_large_finite_numbers(self, blobs):
        assert not run(blobs, bnjax.Hyperparams(init_scale=1e4)).diverged

    def test_the_mean_of_large_finite_losses_does_not_overflow(self):
        """9 losses of 1e38, whose sum float32 cannot hold; a running mean of equal numbers rounds nothing."""
        x, y = np.zeros((9, 1), np.float32), np.zeros(9, np.int32)
        model = bnjax.Model(
            lambda key, shape, scale: ({"logits": jnp.float32([0, 1e38])}, {}),
            lambda params, stats, x, *, train: (jnp.tile(params["logits"], (len(x), 1)), stats),
        )
        history = run(bnjax.Dataset(x, y, x[:1], y[:1]), model=model, steps=9, batch_size=1)
        assert not history.diverged
        assert history.train_loss == history.test_loss == np.float32(1e38)

    @pytest.mark.parametrize("seeds", [3, 4])
    def test_medians_need_no_special_case(self, blobs, seeds):
        """Over an odd and an even number of runs; that of scales where most diverge is that of guessing."""
        config = bnjax.TrainConfig(steps=12, batch_size=32)
        axes = {"seed": range(seeds), "init_scale": [0.1, 1.0, 1e20]}
        results = bnjax.sweep(self.LINEAR, blobs, config, axes, progress=False)
        np.testing.assert_array_equal(results.diverged, [[False, False, True]] * seeds)
        medians = results.median("seed").isel(step=-1)
        for loss in (medians.train_loss, medians.test_loss):
            np.testing.assert_array_equal(np.isinf(loss), [False, False, True])
        for accuracy in (medians.train_accuracy, medians.test_accuracy):
            assert (accuracy[:2] > 0.2).all()
            assert accuracy[2] == np.float32(0.1)


LOSS, GRADIENT, TEST_LOSS = 1000 * np.arange(3)
COUNTED = 8  # by this much smaller logits are than the number of steps


def doomed():
    """A network that counts its steps, and goes wrong in step number n: by its loss, by its gradient, or by its test
    loss from the n-th step on, where init_scale is LOSS + n, GRADIENT + n or TEST_LOSS + n.
    """

    @jax.custom_vjp
    def counted(n, gradient):
        return n

    counted.defvjp(lambda n, gradient: (n, gradient), lambda gradient, _: (gradient, jnp.zeros(())))

    def init(key, shape, scale):
        return {"n": jnp.zeros(()), "doom": jnp.float32(scale)}, {"steps": jnp.int32(0)}

    def apply(params, stats, x, *, train):
        kind, limit = jnp.divmod(params["doom"], 1000)
        now = jax.lax.stop_gradient((params["n"] >= limit) * (1 + 1000 * kind)) - 1
        n = counted(params["n"], jnp.where(now == GRADIENT, -jnp.inf, -1.0))
        n = jnp.where(now == (LOSS if train else TEST_LOSS), jnp.nan, n)
        logits = jnp.stack([jnp.zeros(len(x)), jnp.full(len(x), n)], 1) / COUNTED
        return logits, {"steps": stats["steps"] + train}

    return bnjax.Model(init, apply)


def expected_of_the_doomed(doom, config):
    """Step by step: ({field of History: its values}, how many steps are taken)."""
    kind, limit = doom // 1000 * 1000, doom % 1000
    losses = np.log1p(np.exp(np.arange(config.steps + 1) / COUNTED))  # of label 0
    right = np.arange(config.steps + 1) == 0  # of two equal logits the first
    diverged, steps, since, curves = -1, 0, [], []
    for step in range(config.steps):
        if diverged < 0:
            steps += 1
            wrong = (kind == LOSS and step == limit) or (kind == GRADIENT and step == limit + 1)
            diverged = step if wrong else -1
            since.append((losses[step], right[step]))
        if step + 1 in config.eval_steps:
            train = np.mean(since, 0) if diverged < 0 else (np.inf, 0.5)
            wrong = (kind == TEST_LOSS and steps >= limit) or (kind == GRADIENT and steps == limit + 1)
            diverged = step + 1 if diverged < 0 and wrong else diverged
            test = (losses[steps], right[steps]) if diverged < 0 else (np.inf, 0.5)
            curves.append((*train, *test))
            since = []
    values = (*np.array(curves).T, diverged >= 0, diverged)
    return dict(zip(History._fields, values, strict=True)), steps


def parts_of_the_doomed(config, segment=None, **options):
    """train(doom, ds) -> (History, number of steps that were taken), in segments."""
    start, advance = training.make_run(doomed(), config, **options)

    def train(doom, ds):
        hyper = bnjax.Hyperparams(init_scale=doom, learning_rate=1.0, momentum=0.0)
        state = start(hyper, ds)
        length = segment or config.steps
        for first in range(0, config.steps, length):
            state = advance(state, hyper, ds, first, min(first + length, config.steps))
        return state.history, state.batch_stats["steps"]

    return train


def zeros(examples):
    x, y = np.zeros((examples, 1), np.float32), np.zeros(examples, np.int32)
    return bnjax.Dataset(x, y, x[:2], y[:2])


@pytest.mark.parametrize(
    ("examples", "eval_every", "segment"),
    [
        (33, 37, None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(500, None, None), (500, 1, 34), (7, 8, 20), (65, None, 34), (1, 3, None)]
        ),
    ],
)
def test_any_step_may_be_the_last(examples, eval_every, segment):
    """Of a run by itself, and of one beside others that go on, are gone, or go a step later."""
    config = bnjax.TrainConfig(steps=100, batch_size=1, eval_every=eval_every)
    ds = zeros(examples)
    dooms = np.add.outer([LOSS, GRADIENT, TEST_LOSS], np.arange(102)).ravel().astype(np.float32)
    train = parts_of_the_doomed(config, segment)
    stopping = parts_of_the_doomed(config, segment, axis_name="cells")
    one = jax.jit(train)
    alone = [one(doom, ds) for doom in dooms]
    alone = jax.tree.map(lambda *values: np.stack(values), *alone)
    beside = jax.jit(jax.vmap(train, (0, None)))(dooms, ds)
    together, _ = jax.jit(jax.vmap(stopping, (0, None), axis_name="cells"))(dooms, ds)
    expected = [expected_of_the_doomed(int(doom), config) for doom in dooms]
    steps = [steps for _, steps in expected]
    np.testing.assert_array_equal(alone[1], steps)
    np.testing.assert_array_equal(beside[1], steps)
    for history in (alone[0], beside[0], together):
        for name, values in history._asdict().items():
            wanted = np.stack([one[name] for one, _ in expected])
            # the running mean of up to 100 float32 numbers rounds each time
            np.testing.assert_allclose(values, wanted, rtol=1e-5, err_msg=name)


class TestNoFurtherStepIsTaken:
    config = bnjax.TrainConfig(steps=20, batch_size=1, eval_every=6)

    def steps(self, dooms, **options):
        train = parts_of_the_doomed(self.config, axis_name="cells", **options)
        return jax.jit(jax.vmap(train, (0, None), axis_name="cells"))(np.float32(dooms), zeros(5))[1].tolist()

    def test_once_all_have_diverged(self):
        assert self.steps([LOSS + 3, LOSS + 9, GRADIENT + 1]) == [10] * 3
        assert self.steps([LOSS + 3, TEST_LOSS + 7, LOSS + 1]) == [12] * 3  # at the evaluation after step 12

    def test_but_as_long_as_one_goes_on(self):
        assert self.steps([LOSS + 3, LOSS + 99, LOSS]) == [20] * 3

    @pytest.mark.parametrize("axis_name", [None, "cells"])
    def test_nor_is_the_data_shuffled(self, monkeypatch, axis_name):
        """5 steps an epoch; a run by itself, and several."""
        shuffles, whole = [], jax.random.permutation

        def counted(key, n):
            jax.debug.callback(lambda: shuffles.append(n))
            return whole(key, n)

        monkeypatch.setattr(jax.random, "permutation", counted)
        train = parts_of_the_doomed(self.config, axis_name=axis_name)
        if axis_name:
            train = jax.vmap(train, (0, None), axis_name=axis_name)
        dooms = np.float32(LOSS + 3 if axis_name is None else [LOSS + 3, LOSS + 7])
        jax.block_until_ready(jax.jit(train)(dooms, zeros(5)))
        jax.effects_barrier()
        assert len(shuffles) == (1 if axis_name is None else 2)

    def test_but_in_probed_runs(self):
        probe = bnjax.Probe(lambda s: {"n": s.params["n"]})
        assert self.steps([LOSS + 3, LOSS + 9], probe=probe) == [20] * 2


def test_is_in_32_bit_where_64_are_on(blobs):
    """Over an interval that is cut, and a last one that is shorter."""
    config = bnjax.TrainConfig(steps=11, batch_size=32, eval_every=4)
    expected = jax.jit(bnjax.make_train(bnjax.mlp((16,), 10), config))(bnjax.Hyperparams(seed=3), blobs)
    with jax.enable_x64(True):
        start, advance = training.make_run(bnjax.mlp((16,), 10), config)
        state = jax.jit(start)(bnjax.Hyperparams(seed=3), blobs)
        for first, until in ((0, 6), (6, 11)):
            state = jax.jit(advance)(state, bnjax.Hyperparams(seed=3), blobs, first, until)
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
    train = jax.jit(bnjax.make_train(SMALL, bnjax.TrainConfig(steps=2, batch_size=32)))
    for seed, scale in [(0, 1.0), (1, 2.0), (2, 0.1)]:
        train(bnjax.Hyperparams(np.uint32(seed), np.float32(scale)), blobs)
    assert train._cache_size() == 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_runs_with_x64_on(blobs, optimizer):
    """Hyperparameters that are float64 and int64 arrays widen nothing."""
    hyper = jax.tree.map(jnp.asarray, bnjax.Hyperparams(learning_rate=0.01))
    assert hyper.learning_rate.dtype == jnp.float64
    assert run(blobs, hyper, steps=4, eval_every=3, optimizer=optimizer).test_accuracy.shape == (2,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"batch_size": -3}, "batch_size must be a positive integer, got -3"),
        ({"eval_every": 0}, "eval_every must be a positive integer, got 0"),
        ({"optimizer": "sdg"}, r"unknown optimizer 'sdg' \(did you mean 'sgd'\?\); allowed: sgd, adam"),
        ({"steps": 2**31}, r"steps must be below 2\^31, got 2147483648"),
        ({"eval_every": True}, "eval_every must be a positive integer, got True"),
        ({"data_seed": -1}, r"data_seed must be an integer in \[0, 2\^31\), got -1"),
    ],
)
def test_bad_config(options, words):
    with pytest.raises(ValueError, match=words):
        bnjax.TrainConfig(**options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_y": np.zeros(3, np.int32)}, "the train split has 256 examples and 3 labels"),
        ({"test_x": np.zeros((128, 5), np.float32)}, r"\(12,\) and test examples \(5,\) differ"),
        ({"test_y": np.full(128, 4, np.int32)}, r"test labels must be in \[0, 4\), .* got 4 to 4"),
        ({"test_y": np.zeros(128)}, "test labels must be integers, got float64"),
        (
            {"train_x": np.zeros((256, 12), np.uint8)},
            r"train_x must be floating point \(or int32, of tokens\), got uint8",
        ),
    ],
)
def test_bad_data(blobs, change, words):
    with pytest.raises(ValueError, match=words):
        training.check(MODEL, blobs._replace(**change), bnjax.TrainConfig(batch_size=32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"momentum": 1}, r"momentum must be in \[0, 1\) \(the optimizer's\), got 1"),
        ({"momentum": jnp.float32(1)}, r"momentum must be in \[0, 1\)"),
        ({"momentum": jnp.bfloat16(-0.5)}, r"momentum must be in \[0, 1\) .* got Array\(-0.5, dtype=bfloat16\)"),
        ({"seed": 0.5}, r"seed must be a whole number in \[0, 2\^31\), got 0.5"),
        ({"seed": 2**31}, "seed must be a whole number"),
        ({"seed": np.arange(2)}, r"seed must be a whole number .* got array\(\[0, 1\]\)"),
        ({"init_scale": 0.0}, "init_scale must be positive and finite in float32, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive .*, got nan"),
        ({"learning_rate": True}, "learning_rate must be positive .*, got True"),
        ({"weight_decay": "0"}, "weight_decay must be zero or positive, .*, got '0'"),
    ],
)
def test_bad_hyperparameters(blobs, change, words):
    """By itself, and where only the data is traced; nothing is drawn."""
    model = SMALL._replace(init=lambda *_: pytest.fail("work was started"))
    train = bnjax.make_train(model, bnjax.TrainConfig(batch_size=32))
    hyper = bnjax.Hyperparams(**change)
    with pytest.raises(ValueError, match=words):
        train(hyper, blobs)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda ds: train(hyper, ds), blobs)


def test_hyperparameters_that_are_taken(blobs):
    """What is traced is not checked; numbers may be of numpy and JAX."""
    train = bnjax.make_train(SMALL, bnjax.TrainConfig(steps=2, batch_size=32))
    jax.eval_shape(train, bnjax.Hyperparams(momentum=1), blobs)
    allowed = bnjax.Hyperparams(np.uint8(3), jnp.bfloat16(0.5), np.float16(0.1), np.zeros(()), jnp.float32(0))
    jax.eval_shape(lambda ds: train(allowed, ds), blobs)


def test_batch_larger_than_the_data(blobs):
    with pytest.raises(ValueError, match="batch_size must be at most the 256 training examples, got 257"):
        run(blobs, batch_size=257)
