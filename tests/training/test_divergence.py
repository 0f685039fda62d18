"""Runs that diverge: they count as guessing from there on, and take no further step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_runs import run

import bnjax
from bnjax import training
from bnjax.types import History


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

    def test_medians_need_no_special_case(self, blobs):
        """Over an odd and an even number of runs; that of scales where most diverge is that of guessing."""
        config = bnjax.TrainConfig(steps=12, batch_size=32)
        axes = {"seed": range(4), "init_scale": [0.1, 1.0, 1e20]}
        results = bnjax.sweep(self.LINEAR, blobs, config, axes, progress=False)
        np.testing.assert_array_equal(results.diverged, [[False, False, True]] * 4)
        for seeds in (3, 4):
            medians = results.isel(seed=slice(seeds)).median("seed").isel(step=-1)
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

    @classmethod
    @functools.cache  # compiled once for several tests
    def program(cls, **options):
        train = parts_of_the_doomed(cls.config, axis_name="cells", **options)
        return jax.jit(jax.vmap(train, (0, None), axis_name="cells"))

    def steps(self, dooms, **options):
        return self.program(**options)(np.float32(dooms), zeros(5))[1].tolist()

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
