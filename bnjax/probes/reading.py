"""Parts of a network by name: weight matrices and intermediates."""

import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from bnjax import tracing
from bnjax.tables import ByLayer
from bnjax.types import PyTree


def kernels(params: PyTree, batch_stats: PyTree = (), among: Collection[str] | None = None) -> dict[str, Any]:
    """The weight matrices by name, in natural order (`hidden_2` before `hidden_10`).

    Args:
      params: of a network.
      batch_stats: of the network; frozen matrices stand there.
      among: the paths of the network's kernels. None: all arrays of rank 2 and above, as is right for an mlp.
    """
    found = {}
    for tree in (params, batch_stats):
        for path, value in jax.tree_util.tree_leaves_with_path(tree):
            name = tracing.name_of(path)
            if jnp.ndim(value) >= 2 if among is None else name in among:
                found[name.removesuffix("/kernel")] = value
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def form(model, input_shape):
    """((params, batch_stats), `Reading`, a batch), arrays as shapes."""
    state = jax.eval_shape(lambda: model.init(jax.random.key(0), tuple(input_shape), 1.0))
    return state, *tracing.read_examples(model.apply, *state, input_shape)


def with_kernels(params, batch_stats, values):
    """Both trees with other weight matrices: `values` by name."""

    def replaced(path, value):
        return values.get(tracing.name_of(path).removesuffix("/kernel"), value)

    return (jax.tree_util.tree_map_with_path(replaced, tree) for tree in (params, batch_stats))


def layers_of(model):
    """The model's own, or that of its trace."""
    return model.layers or tracing.layers(model.apply)


def offsets_of(model, params, batch_stats, x, train):
    """A zero offset for every named intermediate, in the model's order."""
    shapes = shapes_of(model, params, batch_stats, x, train)
    return ByLayer((name, jnp.zeros(shape.shape, shape.dtype)) for name, shape in shapes.items())


def shapes_of(model, params, batch_stats, x, train):
    """{name of an intermediate: its shape and dtype}, in the model's order."""
    order = []

    def shown(params, batch_stats, x):
        _, values = layers_of(model)(params, batch_stats, x, {}, train=train)
        order.extend(values)  # JAX sorts the keys of a dictionary
        return values

    if not x.shape or x.shape[0] < 1:
        raise ValueError(f"x must be a batch [N, ...] of at least one example, got shape {x.shape}")
    try:
        found = jax.eval_shape(shown, params, batch_stats, x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the model does not take x of shape {tuple(x.shape)}: {error}") from error
    return {name: found[name] for name in order}
