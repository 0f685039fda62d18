"""To and from Flax: variables, outputs, statistics and gradients are Flax's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import NETWORKS, Net, close, collections, course, flaxs, identical, moved, normal, ours
from flax import linen as nn
from flax.core import freeze

import bnjax
from bnjax import batch_norm
from bnjax.interop import flax as to_from_flax


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_flax_layer(x64, use_scale, use_bias):
    """Variables as Flax has them; a round trip changes nothing; equal outputs, statistics and gradients."""
    params, stats = moved(batch_norm.init(4, use_scale=use_scale, use_bias=use_bias), dtype=jnp.float64)
    variables = to_from_flax.to_flax(params, stats)
    layer = nn.BatchNorm(momentum=0.7, epsilon=1e-3, use_scale=use_scale, use_bias=use_bias)
    x = normal(3, 6, 3, 4, dtype=jnp.float64)
    init = jax.eval_shape(partial(layer.init, use_running_average=True), jax.random.key(0), x[0])
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, init)
    identical((params, stats), to_from_flax.from_flax(freeze(variables), stats.count))
    found, (*outputs, to_params, to_x) = course(ours(momentum=0.7, epsilon=1e-3), params, stats, x)
    expected = course(flaxs(layer), *collections(variables), x)
    found, to_params = (collections(to_from_flax.to_flax(*pair)) for pair in [(params, found), (to_params, stats)])
    close((found[1], (*outputs, to_params[0], to_x)), expected)


def test_flax_layer_continues_a_cumulative_average_only_with_its_count():
    params, stats = moved(batch_norm.init(4))
    variables = to_from_flax.to_flax(params, stats)
    x = normal(6, 4)
    update = jax.jit(lambda params, stats: batch_norm.apply(params, stats, x, train=True, momentum=None)[1].mean)
    expected = np.asarray(update(params, stats))
    for count, same in [(3, True), (0, False)]:
        assert (update(*to_from_flax.from_flax(variables, count)) == expected).all() == same


@pytest.mark.parametrize(
    ("options", "freeze_hidden"),
    [(NETWORKS[0], True)] + [pytest.param(NETWORKS[i], False, marks=pytest.mark.slow) for i in (0, 1, 2, 3, 4)],
    ids=str,
)
def test_flax_mlp(x64, options, freeze_hidden):
    """The tree of Flax's own network, a round trip, outputs in both modes, statistics, gradients."""
    model = bnjax.mlp((5, 4), 3, freeze_hidden=freeze_hidden, **options)
    params, stats = moved(model.init(jax.random.key(0), (6,), 1.0), dtype=jnp.float64)
    variables = to_from_flax.mlp_to_flax(model, params, stats)
    net = Net((5, 4), 3, options)
    x = normal(3, 7, 6, dtype=jnp.float64)
    init = jax.eval_shape(partial(net.init, train=True), jax.random.key(0), x[0])
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, init)
    identical((params, stats), to_from_flax.mlp_from_flax(model, freeze(variables), count=3))

    found, (*outputs, to_params, to_x) = course(ours(model), params, stats, x)
    expected, (*expected_outputs, expected_to_params, expected_to_x) = course(flaxs(net), *collections(variables), x)
    close((*outputs, to_x), (*expected_outputs, expected_to_x))
    close(collections(to_from_flax.mlp_to_flax(model, params, found))[1], expected)
    # One gradient, not a stack of them, has the shapes of params.
    to_params, expected_to_params = jax.tree.map(lambda g: g[-1], (to_params, expected_to_params))
    to_params = to_from_flax.mlp_to_flax(model, to_params, stats)["params"]
    for i in range(2 if freeze_hidden else 0):  # kernels that ours has no gradient for
        del to_params[f"Dense_{i}"]["kernel"], expected_to_params[f"Dense_{i}"]["kernel"]
    close(to_params, expected_to_params)


def test_flax_mlp_in_float32_and_under_jit():
    model = bnjax.mlp((5, 4), 3)
    params, stats = moved(model.init(jax.random.key(0), (6,), 1.0))
    x = normal(3, 7, 6)
    variables = jax.jit(partial(to_from_flax.mlp_to_flax, model))(params, stats)
    identical(jax.jit(partial(to_from_flax.mlp_from_flax, model))(variables, 3), (params, stats))
    found, (*outputs, _, _) = course(ours(model), params, stats, x)
    expected, (*expected_outputs, _, _) = course(flaxs(Net((5, 4), 3, NETWORKS[0])), *collections(variables), x)
    close(outputs, expected_outputs)
    close(to_from_flax.mlp_to_flax(model, params, found)["batch_stats"], expected)
