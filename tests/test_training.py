"""One run: it learns, agrees with a plain loop, is frozen when it diverges, and recompiles for nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import training

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
    direction = jax.tree.map(
        lambda m, v: m / (1 - h.momentum**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8), m, v
    )
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
    """The states of shorter runs; bitwise equality is not promised between two programs: 7 steps amplify 1e-7 less
    than 1e-4.
    """
    config = bnjax.TrainConfig(steps=7, batch_size=32, eval_every=eval_every)

    def measure(s):
        kernel = s.params["hidden_0"]["kernel"]
        return {
            "norm": jnp.linalg.norm(kernel),
            "moved": jnp.linalg.norm(kernel - s.initial_params["hidden_0"]["kernel"]),
            "batches": s.batch_stats["hidden_0"]["norm"].count
            - s.initial_batch_stats["hidden_0"]["norm"].count,
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


class TestDivergence:
    model = bnjax.mlp((16, 16), 4, norm="none", activation="linear")

    def test_is_a_result_frozen_at_the_last_finite_state(self, blobs):
        history = run(blobs, bnjax.Hyperparams(learning_rate=1e3), self.model, eval_every=1)
        assert history.diverged
        step = int(history.diverged_step)
        assert 0 < step < 40
        assert all(np.isfinite(curve).all() for curve in history[:4])
        # evaluation e is taken after step e: those from the diverging step on show the state before it
        for curve in history[:4]:
            assert (curve[step:] == curve[-1]).all()
        assert history.test_loss[-1] < training.LARGEST
        assert history.test_loss[0] != history.test_loss[-1]
        # The loss of `step` is infinite, so the state it was computed in is not the one that is kept:
        # that is the state of one evaluation earlier.
        assert history.test_loss[step - 1] == training.LARGEST
        assert history.test_loss[step - 2] == history.test_loss[-1]

    @pytest.mark.slow
    def test_shown_by_the_loss_after_the_last_step_alone(self, blobs):
        """One step whose update is finite, to a network whose loss is not."""
        hyper = bnjax.Hyperparams(learning_rate=1e25, momentum=0.0)
        history = run(blobs, hyper, self.model, steps=1)
        assert history.diverged
        assert history.diverged_step == 1
        assert history.train_loss < 100
        assert history.test_loss == training.LARGEST

    def test_of_the_batch_statistics_alone(self, blobs):
        """A running statistic that overflows at step 3, though loss and parameters stay finite."""
        model = bnjax.mlp((4,), 4)

        def apply(params, batch_stats, x, *, train):
            outputs, stats = model.apply(params, batch_stats["net"], x, train=train)
            return outputs, {"net": stats, "power": batch_stats["power"] * (1e10 if train else 1)}

        def init(*args):
            params, stats = model.init(*args)
            return params, {"net": stats, "power": jnp.float32(1)}

        history = run(blobs, model=bnjax.Model(init, apply))
        assert history.diverged
        assert history.diverged_step == 3  # 1e40 is the fourth power

    @pytest.mark.slow
    def test_at_the_first_step(self, blobs):
        history = run(blobs, bnjax.Hyperparams(init_scale=1e30), self.model)
        assert history.diverged
        assert history.diverged_step == 0
        assert history.test_loss == history.train_loss == training.LARGEST
        assert 0 <= history.test_accuracy <= 1

    @pytest.mark.slow
    def test_the_first_step_may_be_the_last_finite_loss(self, blobs):
        """A finite loss whose update overflows: the loss counts, the update does not."""
        history = run(blobs, bnjax.Hyperparams(learning_rate=3e38, momentum=0.0), self.model)
        untrained = run(blobs, bnjax.Hyperparams(learning_rate=1e-30), self.model)
        assert history.diverged_step == 0
        assert history.test_loss == untrained.test_loss
        assert history.train_loss < 100

    @pytest.mark.slow
    def test_a_run_that_does_not_diverge_is_not_touched(self, blobs):
        assert not run(blobs, bnjax.Hyperparams(init_scale=1e4)).diverged


def doomed(of):
    """A network that counts its steps, and goes wrong in step number `init_scale`, by its loss or by its gradient."""

    @jax.custom_vjp
    def counted(n, limit):
        return jnp.where((of == "loss") & (n >= limit), jnp.nan, n)

    def forward(n, limit):
        return counted(n, limit), (n, limit)

    def backward(kept, g):
        n, limit = kept
        g = jnp.where(jnp.isfinite(g), -1.0, jnp.nan)
        return jnp.where((of == "gradient") & (n >= limit), jnp.inf, g), jnp.zeros(())

    counted.defvjp(forward, backward)

    def init(key, shape, scale):
        return {"n": jnp.zeros(()), "limit": jnp.float32(scale)}, {}

    def apply(params, stats, x, *, train):
        n = counted(params["n"], params["limit"]) if train else params["n"]
        return jnp.stack([jnp.zeros(len(x)), jnp.full(len(x), n)], 1) / 8, stats

    return bnjax.Model(init, apply)


def expected_of_the_doomed(of, limit, config):
    """Step by step: (training and test loss at each evaluation, the step in which it diverged)."""
    loss = np.log1p(np.exp(np.arange(config.steps + 2) / 8))  # of label 0
    n, diverged, since, curves = 0, -1, [], []
    for step in range(config.steps):
        if diverged < 0:
            if n < limit:
                since.append(loss[n])
                n += 1
            else:
                diverged = step
                if of == "loss":
                    n = max(n - 1, 0)
                else:
                    since.append(loss[n])
        if step + 1 in config.eval_steps:
            before = curves[-1][0] if curves else training.LARGEST
            curves.append((np.mean(since) if since else before, loss[n]))
            since = []
    return np.array(curves).T, diverged


@pytest.mark.parametrize("of", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("examples", "eval_every", "segment"),
    [
        (33, 37, None),  # an epoch of one block and a step
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (500, None, None),
                (500, 1, 9),
                (500, None, 33),
                (7, 8, 20),
                (65, None, 20),
                (1, 3, None),
            ]
        ),
    ],
)
def test_any_step_may_be_the_last(of, examples, eval_every, segment):
    # Each by itself; and all at once, beside others that go on, are gone, or go a step later.
    config = bnjax.TrainConfig(steps=100, batch_size=1, eval_every=eval_every)
    limits = np.arange(102)
    x, y = np.zeros((examples, 1), np.float32), np.zeros(examples, np.int32)
    ds = bnjax.Dataset(x, y, x[:2], y[:2])
    hyper = bnjax.Hyperparams(init_scale=limits.astype(np.float32), learning_rate=1.0, momentum=0.0)
    axes = (bnjax.Hyperparams(None, 0, None, None, None), None)
    run = training.make_run(doomed(of), config)

    def train(hyper, ds):
        state, _ = run.start(hyper, ds)
        parts = []
        for first, steps, evaluations in training.pieces(config, segment):
            state, recorded = run.advance(state, hyper, ds, first, steps, evaluations)
            parts += [recorded] * bool(evaluations)
        return run.finish(state, jax.tree.map(lambda *v: jnp.concatenate(v), *parts))

    together = jax.jit(jax.vmap(train, axes))(hyper, ds)
    alone = jax.jit(train)
    for i, limit in enumerate(limits):
        (train_loss, test_loss), diverged = expected_of_the_doomed(of, limit, config)
        one = alone(hyper._replace(init_scale=np.float32(limit)), ds)
        for history in (one, jax.tree.map(lambda a, i=i: a[i], together)):
            assert history.diverged_step == diverged
            assert history.diverged == (diverged >= 0)
            np.testing.assert_allclose(history.train_loss, train_loss, rtol=1e-5)  # float32 means of 100
            np.testing.assert_allclose(history.test_loss, test_loss, rtol=1e-6)


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
        train_x=np.arange(256, dtype=np.float32)[:, None],
        test_x=np.zeros((1, 1), np.float32),
        test_y=blobs.test_y[:1],
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
        ({"train_x": np.zeros((256, 12), np.uint8)}, "train_x must be floating point, got uint8"),
    ],
)
def test_bad_data(blobs, change, words):
    with pytest.raises(ValueError, match=words):
        training.check(MODEL, blobs._replace(**change), bnjax.TrainConfig(batch_size=32))


def test_batch_larger_than_the_data(blobs):
    with pytest.raises(ValueError, match="batch_size must be at most the 256 training examples, got 257"):
        run(blobs, batch_size=257)
