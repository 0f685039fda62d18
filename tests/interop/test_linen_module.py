"""The linen module in the place of Flax's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import (
    NETWORKS,
    OPTIONS,
    PRECISION,
    Net,
    close,
    collections,
    course,
    flaxs,
    identical,
    moved,
    normal,
    slow,
)
from flax import linen as nn
from flax import nnx, serialization
from flax.errors import ModifyScopeVariableError

from bnjax.interop import flax as to_from_flax
from bnjax.interop import nnx as our_nnx


def linen_pair(**options):
    return nn.BatchNorm(**options), to_from_flax.BatchNorm(**options)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("no_scale", "float32"),
        ("two_axes", "float32"),
        ("draws", "float32"),
        ("param_dtype", "bfloat16"),
        *slow((name, "float32") for name in OPTIONS if name not in ("no_scale", "two_axes", "draws")),
        *slow([("default", "int32")]),
        *slow((name, "bfloat16") for name in ("default", "neither", "bfloat16", "float32_result")),
    ],
)
def test_linen_module_is_flaxs(name, dtype):
    """Bitwise the same initial variables; the same outputs, statistics, gradients and dtypes."""
    theirs, ours = linen_pair(**OPTIONS[name])
    x = normal(2, 8, 4, 3, 5, dtype=dtype)
    found, variables = (
        jax.jit(partial(m.init, use_running_average=False))(jax.random.key(0), x[0]) for m in (ours, theirs)
    )
    identical(found, variables)  # statistics are not updated
    variables = moved(variables)
    (found, found_steps), (expected, expected_steps) = (
        course(flaxs(m), *collections(variables), x) for m in (ours, theirs)
    )
    tolerance = PRECISION[str(expected_steps[0].dtype)]
    assert jax.tree.map(jnp.result_type, found_steps) == jax.tree.map(jnp.result_type, expected_steps)
    close(found, expected, rtol=5e-6)
    close(found_steps[:2], expected_steps[:2], rtol=tolerance)
    # The gradient to x is rounded to the dtype of x.
    close(found_steps[2:], expected_steps[2:], rtol=4 * max(tolerance, PRECISION.get(dtype, 0)))


def test_linen_module_in_float64(x64):
    theirs, ours = linen_pair(param_dtype=jnp.float64, momentum=0.5)
    x = normal(3, 8, 4, dtype=jnp.float64)
    init = jax.jit(partial(theirs.init, use_running_average=True))
    variables = moved(init(jax.random.key(0), x[0]), dtype=jnp.float64)
    close(*(course(flaxs(m), *collections(variables), x) for m in (ours, theirs)))


def test_stored_statistics_may_be_narrow():
    """`force_float32_reductions=False` keeps the dtype of what is stored, but reductions are in float32."""
    theirs, ours = linen_pair(force_float32_reductions=False, param_dtype=jnp.bfloat16)
    x = normal(64, 4, dtype=jnp.bfloat16)
    variables, found = (
        jax.jit(partial(m.init, use_running_average=False))(jax.random.key(0), x) for m in (theirs, ours)
    )
    identical(found, variables)
    y, new = jax.jit(partial(ours.apply, use_running_average=False, mutable=["batch_stats"]))(variables, x)
    assert y.dtype == new["batch_stats"]["var"].dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    close(y, (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5), rtol=2**-8)


@pytest.mark.parametrize("use_fast_variance", [True, False])
def test_modules_are_right_far_from_zero(use_fast_variance):
    """At mean / std = 1e4, E[x^2] - E[x]^2 in float32 has no correct digit."""
    x = 1e4 + normal(256, 4)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    theirs, ours = linen_pair(use_running_average=False, use_fast_variance=use_fast_variance)
    variables = theirs.init(jax.random.key(0), x)

    def error(y):
        return np.abs(y - exact).max()

    y, _ = trained(ours)(variables, x)
    assert error(y) < 2e-6
    assert error(our_nnx.BatchNorm(4, use_fast_variance=use_fast_variance, rngs=nnx.Rngs(0))(x)) < 2e-6
    flaxs, _ = trained(theirs)(variables, x)
    assert error(flaxs) > (0.1 if use_fast_variance else 2e-5)


def trained(module):
    """(variables, x, mask) -> (y, statistics), compiled."""
    return jax.jit(lambda variables, x, mask=None: module.apply(variables, x, mask=mask, mutable=["batch_stats"]))


def train(net, variables, x, y, steps):
    """SGD as a user of Flax writes it."""
    optimizer = optax.sgd(0.1)

    @jax.jit
    def step(params, batch_stats, state):
        def loss(params):
            logits, new = net.apply({"params": params, "batch_stats": batch_stats}, x, True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), new["batch_stats"]

        (value, batch_stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), batch_stats, state, value

    params, batch_stats = variables["params"], variables["batch_stats"]
    state, values = optimizer.init(params), []
    for _ in range(steps):
        params, batch_stats, state, value = step(params, batch_stats, state)
        values.append(value)
    return {"params": params, "batch_stats": batch_stats}, np.array(values)


@pytest.mark.slow
def test_training_a_network_with_one_class_replaced(x64, blobs):
    """Same names, same initialization, and the same course of training, in float64 where rounding does not grow."""
    x, y = blobs.train_x.astype(np.float64), blobs.train_y
    nets = [Net((16, 8), 4, NETWORKS[0], norm) for norm in (nn.BatchNorm, to_from_flax.BatchNorm)]
    variables = [jax.jit(net.init, static_argnums=2)(jax.random.key(0), x, False) for net in nets]
    identical(*variables)
    start = jax.tree.map(lambda v: v.astype(jnp.float64), variables[0])
    (theirs, expected), (ours, losses) = (train(net, start, x, y, steps=30) for net in nets)
    assert losses[-1] < 0.5 * losses[0]
    close(losses, expected)
    close(ours, theirs)
    close(*(net.apply(ours, blobs.test_x, False) for net in nets))


@pytest.mark.parametrize("dtype", [bool, *(pytest.param(d, marks=pytest.mark.slow) for d in (np.int32, np.float32))])
def test_linen_masks(dtype):
    theirs, ours = linen_pair(use_running_average=False)
    x = normal(8, 3, 4)
    mask = np.random.default_rng(0).uniform(size=(8, 3, 1)) < 0.6
    variables = moved(theirs.init(jax.random.key(0), x))
    expected, new = trained(theirs)(variables, x, jnp.asarray(mask))
    hidden = np.where(mask, x, np.nan)
    y, mine = trained(ours)(variables, hidden, mask.astype(dtype))
    valid = np.broadcast_to(mask, x.shape)
    close(np.asarray(y)[valid], np.asarray(expected)[valid])
    close(mine, new)
    bias = np.broadcast_to(variables["params"]["bias"], x.shape)
    np.testing.assert_array_equal(np.asarray(y)[~valid], bias[~valid])
    called = partial(ours.apply, use_running_average=None, mutable=["batch_stats"])
    assert np.isfinite(jax.jit(lambda x: called(variables, x, mask=mask)[0])(hidden)).all()
    # Of fewer axes than x, as it broadcasts.
    time = jnp.array([[True], [False], [True]])
    expected, new = trained(theirs)(variables, x, time)
    y, mine = trained(ours)(variables, x, time)
    close(np.asarray(y)[:, ::2], np.asarray(expected)[:, ::2])
    close(mine, new)


def test_a_mask_in_initialization():
    theirs, ours = linen_pair(use_running_average=False)
    x, mask = normal(8, 4), jnp.arange(8)[:, None] < 5
    (expected, variables), (y, found) = (
        jax.jit(partial(m.init_with_output, mask=mask))(jax.random.key(0), x) for m in (theirs, ours)
    )
    identical(found, variables)
    close(y[:5], expected[:5])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 4)])
def test_linen_axis_name(shape):
    """[6, 5, 4]: batches of 5; [6, 4]: single examples. The axis need not exist in initialization."""
    theirs, ours = linen_pair(use_running_average=False, axis_name="batch")
    x = normal(*shape)
    variables = theirs.init(jax.random.key(0), x[0])
    identical(ours.init(jax.random.key(0), x[0]), variables)
    variables = moved(variables)
    (y, mine), (expected, new) = (
        jax.vmap(partial(m.apply, variables, mutable=["batch_stats"]), axis_name="batch")(x) for m in (ours, theirs)
    )
    close(y, expected)
    close(mine, new)


def test_a_checkpoint_of_flaxs_module_loads():
    theirs, ours = linen_pair(use_running_average=True)
    x = normal(8, 4)
    variables = moved(theirs.init(jax.random.key(0), x))
    target = ours.init(jax.random.key(1), x)
    loaded = serialization.from_bytes(target, serialization.to_bytes(variables))
    identical(loaded, variables)
    close(ours.apply(loaded, x), theirs.apply(variables, x))


def test_statistics_must_be_mutable_in_training_as_in_flax():
    ours = to_from_flax.BatchNorm(use_running_average=False)
    variables = ours.init(jax.random.key(0), normal(8, 4))
    with pytest.raises(ModifyScopeVariableError):
        ours.apply(variables, normal(8, 4))


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"axis_name": "batch", "axis_index_groups": [[0]]}, {}, "axis_index_groups"),
        ({"momentum": None}, {}, "momentum=None"),
        ({}, {"mask": np.ones((8, 4), bool)}, r"mask \(8, 4\) must broadcast to \(8, 1\)"),
    ],
)
def test_module_errors(options, call, message):
    x = normal(8, 4)
    ours = to_from_flax.BatchNorm(use_running_average=False, **options)
    variables = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=message):
        ours.apply(variables, x, mutable=["batch_stats"], **call)
    with pytest.raises(ValueError, match=message):
        our_nnx.BatchNorm(4, rngs=nnx.Rngs(0), **options)(x, **call)
