"""Settings, data and hyperparameters that are refused, and those that are taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_runs import MODEL, SMALL, run

import bnjax
from bnjax import training


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
