"""Gradients to intermediates and weight matrices, a step along them, and Jacobians."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.sparse import linalg

from bnjax import choices, tracing
from bnjax.losses import cross_entropy
from bnjax.networks import as_model
from bnjax.probes.arrays import norm, stable_rank, svdvals, unit_of
from bnjax.probes.reading import kernels, layers_of, offsets_of, shapes_of, with_kernels
from bnjax.tables import ByLayer
from bnjax.types import Array, PyTree, bound

# Of a Jacobian that `singular_values` forms: 32 MB in float32, and some seconds for its singular values.
LARGEST_JACOBIAN = 2**23


class Gradients(NamedTuple):
    """Norms of gradients by name; scalars."""

    intermediates: ByLayer
    weights: ByLayer

    def __repr__(self) -> str:
        """Two tables."""
        return f"gradients to intermediates\n{self.intermediates}\n\ngradients to weights\n{self.weights}"


def gradients(
    model: Any,
    params: PyTree,
    batch_stats: PyTree,
    x: Array,
    loss: Callable[[jax.Array], jax.Array],
    *,
    train: bool = True,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> Gradients:
    """The Frobenius norms of the gradient to every named intermediate, and to every weight matrix.

    The norms lose nothing to squares that over- or underflow. The gradients themselves have float32's range: a norm
    of exactly 0 says that all entries are too small for it (or that there is no path), infinity that one is too large.

    Args:
      model: the network.
      params: of the network.
      batch_stats: of the network; frozen weight matrices stand there.
      x: the batch, [N, ...].
      loss: a scalar function of the outputs. `lambda outputs: (outputs * c).sum()` gives the gradients for a
        fixed cotangent c, whatever the outputs.
      train: with the batch's own statistics, or else the running ones.
      extra: what the network takes as `Hyperparams.extra`.

    Returns:
      `Gradients`.

    Raises:
      ValueError: for an x that the network does not take.
    """
    model = bound(as_model(model), extra)
    offsets = offsets_of(model, params, batch_stats, x, train)
    matrices = kernels(params, batch_stats, tracing.read(model.apply, params, batch_stats, x, train=train).kernels)

    def loss_of(offsets, matrices):
        state = with_kernels(params, batch_stats, matrices)
        return loss(layers_of(model)(*state, x, offsets, train=train)[0])

    to_offsets, to_matrices = jax.grad(loss_of, (0, 1))(offsets, matrices)
    return Gradients(
        ByLayer((name, norm(to_offsets[name])) for name in offsets),
        ByLayer((name, norm(to_matrices[name])) for name in matrices),
    )


class Derivatives(NamedTuple):
    """Outputs, intermediates by name, and the gradients of a loss to all of a network, as arrays."""

    outputs: jax.Array
    intermediates: dict[str, jax.Array]
    to_intermediates: dict[str, jax.Array]
    to_params: PyTree
    to_input: jax.Array  # of tokens, it has no numbers


def derivatives(
    model: Any,
    params: PyTree,
    batch_stats: PyTree,
    x: Array,
    loss: Callable[[jax.Array], jax.Array],
    *,
    train: bool = True,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> Derivatives:
    """The gradients of which `gradients` takes norms, to all parameters and to the input as well.

    Args:
      model: the network.
      params: of the network.
      batch_stats: of the network.
      x: the batch, [N, ...].
      loss: a scalar function of the outputs.
      train: with the batch's own statistics, or else the running ones.
      extra: what the network takes as `Hyperparams.extra`.

    Returns:
      `Derivatives`.

    Raises:
      ValueError: for an x that the network does not take.
    """
    model = bound(as_model(model), extra)
    offsets = dict(offsets_of(model, params, batch_stats, x, train))

    def loss_of(params, offsets, x):
        outputs, shown = layers_of(model)(params, batch_stats, x, offsets, train=train)
        return loss(outputs), (outputs, dict(shown))

    found, (outputs, shown) = jax.grad(loss_of, (0, 1, 2), has_aux=True, allow_int=True)(params, offsets, x)
    to_params, to_intermediates, to_input = found
    return Derivatives(outputs, shown, to_intermediates, to_params, to_input)


class FirstStep(NamedTuple):
    """The effect of one step W_1 = W_0 - learning_rate g on a weight matrix."""

    norm_before: jax.Array  # |W_0|
    gradient_norm: jax.Array  # |g|
    norm_after: jax.Array  # |W_1|
    radial_cosine: jax.Array  # of the angle between W_0 and g: 0 behind a norm, whose outputs do not depend on |W|
    rank_before: jax.Array  # the stable rank of W_0
    rank_after: jax.Array  # and of W_1


def first_step(
    model: Any,
    params: PyTree,
    batch_stats: PyTree,
    x: Array,
    y: Array,
    learning_rate: float | int | Array,
    *,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
) -> ByLayer:
    """The effect of a step of SGD without momentum on each weight matrix.

    Args:
      model: the network.
      params: of the network.
      batch_stats: of the network.
      x: the batch, [N, ...].
      y: its labels or targets.
      learning_rate: of the step.
      loss: of outputs [N, K] and y, a scalar.

    Returns:
      {weight matrix: `FirstStep`}.
    """
    model = as_model(model)
    paths = tracing.read(model.apply, params, batch_stats, x, train=True).kernels
    slopes = jax.grad(lambda params: loss(model.apply(params, batch_stats, x, train=True)[0], y))(params)
    to = kernels(slopes, among=paths)

    def one(before, gradient):
        after = before - learning_rate * gradient
        sizes = [jnp.linalg.norm(matrix) for matrix in (before, gradient, after)]
        cosine = (before / sizes[0] * gradient / sizes[1]).sum()
        return FirstStep(*sizes, cosine, stable_rank(before), stable_rank(after))

    return ByLayer((name, one(matrix, to[name])) for name, matrix in kernels(params, among=paths).items())


def singular_values(
    model: Any,
    params: PyTree,
    batch_stats: PyTree,
    x: Array,
    source: str | None,
    target: str,
    *,
    num: int | None = None,
    train: bool = True,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> jax.Array:
    """The singular values of the Jacobian d target / d source over the whole batch, descending.

    Both are taken as vectors of all N U entries, because batch normalization couples the examples. They are the factors
    by which a perturbation of the batch grows forward, and its gradient backward.

    Args:
      model: the network.
      params: of the network.
      batch_stats: of the network.
      x: the batch, [N, ...].
      source: the name of an intermediate, or None for x itself.
      target: the name of an intermediate after it.
      num: only the so many largest, by LOBPCG (Knyazev 2001) from products with the Jacobian and its transpose,
        which is not formed. 5 * num must be less than the number of entries of the smaller of the two. Less exact
        than the dense ones: a relative error of 1.4e-5 was seen in float32 where the largest are nearly equal.
      train: with the batch's own statistics, or else the running ones.
      extra: what the network takes as `Hyperparams.extra`.

    Returns:
      [min(entries of source, entries of target)], or [num].

    Raises:
      ValueError: for an x that the network does not take; names that it does not have; a target before the source;
        without `num`, a Jacobian of more than 2^23 entries; a `num` out of range.
    """
    model = bound(as_model(model), extra)
    shapes = shapes_of(model, params, batch_stats, x, train)
    names = list(shapes)
    choices.check("target", target, names)
    if source is not None:
        choices.check("source", source, names)
        if names.index(target) < names.index(source):
            raise ValueError(f"target {target!r} comes before source {source!r}; the order is {', '.join(names)}")
    at = jnp.asarray(x) if source is None else jnp.zeros(shapes[source].shape, shapes[source].dtype)
    columns, rows = at.size, shapes[target].size

    def function(vector):
        moved = vector.reshape(at.shape)
        batch, offsets = (moved, {}) if source is None else (jnp.asarray(x), {source: moved})
        return layers_of(model)(params, batch_stats, batch, offsets, train=train)[1][target].ravel()

    if num is None:
        if rows * columns > LARGEST_JACOBIAN:
            raise ValueError(
                f"the Jacobian from {source or 'x'} to {target} is {rows} x {columns}, more than "
                f"{LARGEST_JACOBIAN} entries; use fewer examples, or num for the largest singular values alone"
            )
        jacobian = (jax.jacfwd if columns <= rows else jax.jacrev)(function)(at.ravel())
        return svdvals(jacobian)
    if not 0 < 5 * num < min(rows, columns):
        raise ValueError(f"num must be at least 1 and 5 num less than {min(rows, columns)}, got {num}")
    _, push = jax.linearize(function, at.ravel())
    pull = jax.linear_transpose(push, at.ravel())
    start = jax.random.normal(jax.random.key(0), (min(rows, columns), num), at.dtype)
    forward, backward = (push, lambda v: pull(v)[0]) if columns <= rows else (lambda v: pull(v)[0], push)
    # J^T J would square what is near the ends of the range: in units of what J makes of a vector.
    unit = unit_of(forward(start[:, 0] / norm(start[:, 0])))

    @jax.vmap
    def squared(vector):
        return backward(forward(vector) / unit) / unit

    values, _, _ = linalg.lobpcg_standard(lambda block: squared(block.T).T, start)
    return unit * jnp.sqrt(jnp.maximum(values, 0))
