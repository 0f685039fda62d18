"""Running statistics taken anew at fixed weights (precise BN: Wu & Johnson 2021, section 3).

While weights move, the running averages of batch normalization describe weights that are gone. With the weights held,
the plain average over batches is what evaluation should use:

    statistics = mean over batches of (the batch's statistics)

No norm has to be known for it. A training pass moves each running value s by s <- s + w (batch - s), with a weight w
that depends on nothing else: w is what a pass leaves of the distance to a far value, and the batch's own statistic is
s + (moved - s) / w.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import choices, tracing
from bnjax.networks import as_model
from bnjax.types import Array, PyTree

FAR = 2.0**60  # beside which the statistics of one batch are nothing, so that w has all its digits


def recompute_statistics(
    model: Any, params: PyTree, batch_stats: PyTree, x: Array, batch_size: int | None = None
) -> PyTree:
    """The running statistics as the plain average over batches of x, at these weights; not to be traced.

    Args:
      model: whatever `bnjax.as_model` takes, whose state is moved by training passes as at the top of this module, by
        the statistics of the batch alone.
      params: its parameters.
      batch_stats: its state. Only the structure counts, and what is no running value: counters and frozen kernels stay.
      x: examples [N, ...], in the order in which they are put into batches.
      batch_size: examples in a batch; those left at the end are dropped. None: all N, in one batch.

    Returns:
      `batch_stats` with new running values: at `batch_size` None the batch statistics of x. In float32
      they are good to some 1e-7 / w (1e-6 at a momentum of 0.9).

    Raises:
      ValueError: for a batch size above N or out of range, or a running value that does not move so: of a norm whose
        momentum is 1, or that moves by more than its batch.
    """
    model, count = as_model(model), len(x)
    size = count if batch_size is None else batch_size
    choices.check_count("batch_size", size)
    if size < 2:
        raise ValueError(f"batch_size must be at least 2, got {size}: one example has no variance")
    if size > count:
        raise ValueError(f"batch_size must be at most the {count} examples of x, got {size}")
    moving = _moving(model.apply, params, batch_stats, x[:size])
    if not any(moving):
        return batch_stats
    leaves, structure = jax.tree.flatten(batch_stats)

    def batches(x):
        return jnp.asarray(x)[: count // size * size].reshape(count // size, size, *x.shape[1:])

    values, weights = _averages(model.apply, structure, moving)(params, leaves, batches(x))
    for weight in weights:
        if not ((weight > 0) & (weight <= 1)).all():
            raise ValueError(f"a running value moves by the weight {np.ravel(weight)[0]} of a batch, not in (0, 1]")
    return jax.tree.unflatten(structure, _placed(leaves, moving, values))


def _moving(apply: Callable, params: PyTree, batch_stats: PyTree, x: Array) -> tuple[bool, ...]:
    """For each leaf of the state: True for a float that after a training pass depends on the batch."""
    _, origins = tracing.dependent(lambda *args: apply(*args, train=True)[1], params, batch_stats, x)
    floats = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in jax.tree.leaves(batch_stats)]
    depends = jax.tree.leaves(origins, is_leaf=lambda one: isinstance(one, frozenset))
    return tuple(2 in on and real for on, real in zip(depends, floats, strict=True))


def _placed(leaves, moving, values):
    values = iter(values)
    return [next(values) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)]


@functools.lru_cache(maxsize=32)
def _averages(apply, structure, moving):
    """(params, leaves of the state, batches [B, n, ...]) -> (averages, weights) of the leaves that move."""

    def run(params, leaves, batches):
        # Counters at 0: averages that go by them take the first batch whole.
        start = [jnp.zeros_like(v) if jnp.issubdtype(v.dtype, jnp.integer) else v for v in map(jnp.asarray, leaves)]

        def moved(values, x):
            state = jax.tree.unflatten(structure, _placed(start, moving, values))
            after = jax.tree.leaves(apply(params, state, x, train=True)[1])
            return [leaf for leaf, moves in zip(after, moving, strict=True) if moves]

        own = [leaf for leaf, moves in zip(start, moving, strict=True) if moves]
        near, far = (moved([jnp.full_like(v, value) for v in own], batches[0]) for value in (0.0, FAR))
        weights = [1 - (b - a) / FAR for a, b in zip(near, far, strict=True)]
        guess = [a / w for a, w in zip(near, weights, strict=True)]

        def batch_of(values, x):
            return [v + (m - v) / w for v, m, w in zip(values, moved(values, x), weights, strict=True)]

        first = batch_of(guess, batches[0])  # to all digits: the guess has lost those of w

        def step(carry, x):
            number, average = carry
            batch = batch_of(average, x)
            return (number + 1, [a + (b - a) / number for a, b in zip(average, batch, strict=True)]), None

        (_, average), _ = jax.lax.scan(step, (jnp.float32(2), first), batches[1:])
        return average, weights

    return jax.jit(run)
