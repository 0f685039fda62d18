"""Running statistics taken anew, against batch statistics by a norm of momentum 0."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import bnjax

X = np.random.default_rng(0).normal(5, 3, (70, 12)).astype(np.float32)

SLOW = {"momentum": 0.999}


def network(**options):
    return bnjax.mlp((8, 7), 3, "tanh", **options)


def floats(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree) if np.asarray(leaf).dtype.kind == "f"]


@pytest.mark.parametrize("options", [{}, {"momentum": None}, SLOW, {"freeze_hidden": True}, {"norm": "l1"}], ids=str)
def test_the_average_over_batches(options):
    """One batch of all; and batches of 16, whose last 6 examples are left out, averaged in float64.

    A running value moves by 1 - momentum of a batch's; of that, float32 keeps 1e-7 / (1 - momentum).
    """
    rtol = 1e-6 if options != SLOW else 1e-7 / 1e-3
    model, latest = network(**options), network(**options | {"momentum": 0.0})
    params, stats = model.init(jax.random.key(0), (12,), 3.0)
    stats_of = jax.jit(lambda x: latest.apply(params, stats, x, train=True)[1])
    found = bnjax.recompute_statistics(model, params, stats, X)
    for one, right in zip(floats(found), floats(stats_of(X)), strict=True):
        np.testing.assert_allclose(one, right, rtol=rtol, atol=rtol * np.abs(right).max())
    found = bnjax.recompute_statistics(model, params, stats, X, 16)
    batches = [floats(stats_of(X[i : i + 16])) for i in range(0, 64, 16)]
    for one, *right in zip(floats(found), *batches, strict=True):
        right = np.mean(right, 0)
        np.testing.assert_allclose(one, right, rtol=rtol, atol=rtol * np.abs(right).max())
    for one, old in zip(jax.tree.leaves(found), jax.tree.leaves(stats), strict=True):
        if old.ndim != 1:  # counters and frozen kernels
            np.testing.assert_array_equal(one, old)


def test_a_flax_network():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(5)(x)
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))

    model = bnjax.as_model(Network())
    params, stats = model.init(jax.random.key(0), (12,), 1.0)
    found = bnjax.recompute_statistics(Network(), params, stats, X)
    kernel, bias = params["Dense_0"]["kernel"], params["Dense_0"]["bias"]
    z = X @ kernel + bias
    np.testing.assert_allclose(found["BatchNorm_0"]["mean"], z.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], z.var(0), rtol=1e-4)


def test_a_compiled_network():
    """Frozen kernels are none of the running values, though `jit` returns them as outputs."""
    model = network(freeze_hidden=True)
    params, stats = model.init(jax.random.key(0), (12,), 1.0)
    compiled = model._replace(apply=jax.jit(model.apply, static_argnames="train"))
    found, right = (bnjax.recompute_statistics(one, params, stats, X) for one in (compiled, model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, right)


def test_a_network_without_any():
    params, stats = network(norm="layer").init(jax.random.key(0), (12,), 1.0)
    assert bnjax.recompute_statistics(network(norm="layer"), params, stats, X) is stats


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        ({}, 71, "batch_size must be at most the 70 examples of x, got 71"),
        ({}, 1, "batch_size must be at least 2, got 1"),
        ({}, 0, "batch_size must be a positive integer, got 0"),
        ({"momentum": 1.0}, 70, r"moves by the weight 0.0 of a batch, not in \(0, 1\]"),
    ],
)
def test_bad_input(options, size, words):
    model = network(**options)
    with pytest.raises(ValueError, match=words):
        bnjax.recompute_statistics(model, *model.init(jax.random.key(0), (12,), 1.0), X, size)
