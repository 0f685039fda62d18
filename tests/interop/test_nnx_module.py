"""The NNX module in the place of Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import OPTIONS, PRECISION, close, identical, normal, slow
from flax import nnx

from bnjax.interop import nnx as our_nnx


@nnx.jit
def call(layer, x, mask=None):
    """Op by op, each would be compiled for each shape."""
    return layer(x) if mask is None else layer(x, mask=mask)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("no_bias", "float32"),
        ("channels_first", "float32"),
        ("bfloat16", "bfloat16"),
        *slow((name, "float32") for name in OPTIONS if name not in ("no_bias", "channels_first", "two_axes")),
        *slow([("default", "bfloat16"), ("neither", "bfloat16")]),
    ],
)
def test_nnx_module_is_flaxs(name, dtype):
    options = OPTIONS[name]
    x = normal(2, 8, 4, 3, 4, dtype=dtype)
    theirs, ours = (cls(4, rngs=nnx.Rngs(0), **options) for cls in (nnx.BatchNorm, our_nnx.BatchNorm))
    identical(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)))
    for batch in x:
        for mode in ("train", "eval"):
            expected, y = (getattr(layer, mode)() or call(layer, batch) for layer in (theirs, ours))
            assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
            close(y, expected, rtol=4 * PRECISION[str(y.dtype)])  # Flax computes in that dtype, too
    # Flax averages in the dtype of its computation.
    found, expected = (nnx.to_pure_dict(nnx.state(layer)) for layer in (ours, theirs))
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, expected)
    close(found, expected, rtol=5e-6)


def test_nnx_training_a_network_with_one_class_replaced(blobs):
    """Under `nnx.jit`, with an optimizer, and in evaluation; float32, in which 10 steps stay within 2e-5."""

    class Network(nnx.Module):
        def __init__(self, norm):
            rngs = nnx.Rngs(0)
            self.hidden = nnx.Linear(12, 16, rngs=rngs)
            self.norm = norm(16, momentum=0.9, rngs=rngs)
            self.output = nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, x):
            return self.output(nnx.relu(self.norm(self.hidden(x))))

    @nnx.jit
    def step(network, optimizer):
        def loss(network):
            losses = optax.softmax_cross_entropy_with_integer_labels(network(blobs.train_x), blobs.train_y)
            return losses.mean()

        value, gradient = nnx.value_and_grad(loss)(network)
        optimizer.update(network, gradient)
        return value

    results = []
    for norm in (nnx.BatchNorm, our_nnx.BatchNorm):
        network = Network(norm)
        optimizer = nnx.Optimizer(network, optax.sgd(0.1), wrt=nnx.Param)
        losses = np.array([step(network, optimizer) for _ in range(10)])
        network.eval()
        results.append((losses, network(blobs.test_x), nnx.to_pure_dict(nnx.state(network))))
    assert results[0][0][-1] < 0.7 * results[0][0][0]
    close(*results, rtol=2e-5)


def test_nnx_masks_axis_name_and_modes():
    theirs, ours = (cls(4, rngs=nnx.Rngs(0)) for cls in (nnx.BatchNorm, our_nnx.BatchNorm))
    x, mask = normal(8, 4), jnp.arange(8)[:, None] < 5
    expected, y = (np.asarray(call(layer, x, mask)) for layer in (theirs, ours))
    close(y[:5], expected[:5])
    close(ours.mean[...], theirs.mean[...])
    close(ours.var[...], theirs.var[...])
    before = np.array(ours.var[...])
    nnx.jit(lambda layer, x: layer(x, use_running_average=True))(ours, x)
    identical(before, ours.var[...])
    ours.use_running_average = None
    with pytest.raises(ValueError, match="use_running_average"):
        ours(x)

    theirs, ours = (cls(4, axis_name="batch", rngs=nnx.Rngs(0)) for cls in (nnx.BatchNorm, our_nnx.BatchNorm))
    axes = nnx.StateAxes({nnx.Param: None, nnx.BatchStat: None})

    @nnx.jit
    def run(layer):
        return nnx.vmap(lambda m, x: m(x), in_axes=(axes, 0), axis_name="batch")(layer, x)

    close(run(ours), run(theirs))
    close(ours.var[...], theirs.var[...])
