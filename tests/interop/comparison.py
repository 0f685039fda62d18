"""What the tests of conversions share: comparisons, runs of layers and networks, and Flax's own network.

Tolerances, relative to the largest entry of an array: in float64 1e-11 (seen: 2e-15, and 4e-12 for gradients that
are 0 but for rounding); in float32 5e-6, some dozen roundings of 6e-8 (seen: 7e-7, and twice that for gradients).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bnjax import activations, batch_norm

TOLERANCE = {np.dtype("float64"): 1e-11, np.dtype("float32"): 5e-6}
NETWORKS = [
    {"activation": activation, "norm": norm, "norm_position": position, "use_bias": use_bias}
    for activation, norm, position, use_bias in [
        ("relu", "batch", "before_activation", None),
        ("sigmoid", "batch", "before_activation", True),
        ("gelu", "batch", "after_activation", None),
        ("tanh", "batch", "after_activation", False),
        ("linear", "none", "before_activation", None),
    ]
]


def close(a, b, rtol=None):
    """Two trees of the same structure, each leaf within the tolerance of its dtype relative to its largest entry."""

    def leaf(a, b):
        a, b = np.asarray(a), np.asarray(b)
        tolerance = rtol or TOLERANCE.get(a.dtype, 0)
        np.testing.assert_allclose(
            a.astype(float), b.astype(float), rtol=0, atol=tolerance * max(np.abs(b).max(initial=0), 1e-3)
        )

    jax.tree.map(leaf, a, b)


def identical(a, b):
    """Two trees of the same structure, shapes, dtypes and bits."""

    def leaf(a, b):
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(b), jnp.result_type(b))
        np.testing.assert_array_equal(a, b)

    jax.tree.map(leaf, a, b)


def moved(tree, seed=0, dtype=None):
    """No entry at its initial value; floating ones in `dtype`."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)

    def leaf(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x + 3
        return (x + 0.2 * rng.uniform(-1, 1, x.shape)).astype(dtype or x.dtype)

    return structure.unflatten([leaf(x) for x in leaves])


@partial(jax.jit, static_argnums=(0, 4))
def course(run, params, stats, x, loss=jnp.sin):
    """Each batch of x in turn: evaluation, then training with the gradients of the summed loss.

    Args:
      run: `(params, stats, x, train) -> (y, stats)`.

    Returns:
      The last statistics; of all batches, y in evaluation, y in training, gradients to params and (of floats) to x.
    """

    def step(stats, x):
        def total(params, x):
            y, new = run(params, stats, x, True)
            return loss(y).sum().astype(float), (y, new)

        arguments = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)
        gradients, (y, new) = jax.grad(total, arguments, has_aux=True)(params, x)
        return new, (run(params, stats, x, False)[0], y, *gradients)

    return jax.lax.scan(step, stats, x)


def ours(model=None, **options):
    """`model.apply`, or `batch_norm.apply` with options, as `course` runs it."""
    apply = model.apply if model else partial(batch_norm.apply, **options)
    return lambda params, stats, x, train: apply(params, stats, x, train=train)


def flaxs(module):
    """A module of Flax that takes `train` or `use_running_average`, as `course` runs it."""

    def run(params, stats, x, train):
        mode = {"train": train} if isinstance(module, Net) else {"use_running_average": not train}
        variables = {"params": params, "batch_stats": stats}
        y, new = module.apply(variables, x, mutable=["batch_stats"], **mode)
        return y, new.get("batch_stats", {})

    return run


def collections(variables):
    return variables.get("params", {}), variables.get("batch_stats", {})


def normal(*shape, seed=1, dtype=np.float32):
    return jnp.asarray(1 + 2 * np.random.default_rng(seed).normal(size=shape), dtype)


class Net(nn.Module):
    """An mlp as a user of Flax would write it, for the options of `bnjax.mlp`."""

    features: tuple
    num_outputs: int
    options: dict
    norm: type = nn.BatchNorm
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train):
        has_norm = self.options["norm"] == "batch"
        first = self.options["norm_position"] == "before_activation"
        use_bias = self.options["use_bias"]
        use_bias = not (has_norm and first) if use_bias is None else use_bias
        phi = activations.get(self.options["activation"])
        for width in self.features:
            x = nn.Dense(width, use_bias=use_bias)(x)
            for step in ("norm", "phi") if first else ("phi", "norm"):
                if step == "phi":
                    x = phi(x)
                elif has_norm:
                    x = self.norm(use_running_average=not train, momentum=self.momentum)(x)
        return nn.Dense(self.num_outputs)(x)


OPTIONS = {
    "default": {},
    "no_scale": {"use_scale": False, "momentum": 0.5},
    "no_bias": {"use_bias": False, "epsilon": 0.1},
    "neither": {"use_scale": False, "use_bias": False},
    "channels_first": {"axis": 1},
    "two_axes": {"axis": (-1, 1)},
    "draws": {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.uniform()},
    "bfloat16": {"dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.float16},
    "float32_result": {"dtype": jnp.float32, "use_fast_variance": False},
}
PRECISION = {"float32": 5e-6, "bfloat16": 2**-7, "float16": 2**-10}  # of the short ones: about one rounding


def slow(cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]
