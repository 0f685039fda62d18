"""Signals of a batch in each intermediate."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnjax import compilation, tracing
from bnjax.networks import as_model
from bnjax.probes.arrays import centred, mean, spread, stable_rank
from bnjax.probes.reading import offsets_of
from bnjax.tables import ByLayer
from bnjax.types import Array, PyTree, bound, with_extra


class Signal(NamedTuple):
    """An intermediate X [N, U] over a batch; scalars."""

    mean: jax.Array  # of all entries
    spread: jax.Array  # the root of the mean over units of their variance over the batch
    dead: jax.Array  # fraction of units with one value for all examples, such as a ReLU that is always 0
    saturated: jax.Array  # fraction of entries whose slope is next to 0; NaN if X is no elementwise function
    stable_rank: jax.Array  # of X less its mean over the batch: the number of directions it spreads in


def signals(
    model: Any,
    params: PyTree,
    batch_stats: PyTree,
    x: Array,
    *,
    train: bool = True,
    saturation: float = 0.01,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> ByLayer:
    """The signals of a batch in every named intermediate.

    An entry is saturated if its derivative by the same entry of the intermediate named just before it is below
    `saturation` in magnitude: for an activation, |phi'(z)|, whose largest value is 1/4 for sigmoid and 1 for tanh
    and ReLU (for which it is the fraction of entries that are 0). Whether an intermediate is an elementwise function
    of the one before is found by comparing its derivatives in two directions; if not, or if it does not depend on it
    at all, it is NaN. The cost of L intermediates: L times two derivatives of the network along a direction.

    The stable rank |X|_F^2 / |X|_2^2 of the centred X (Rudelson & Vershynin 2007) is at most min(N - 1, U), 1 if all
    examples lie on a line, and 0 if they are one point.

    Args:
      model: the network.
      params: of the network.
      batch_stats: of the network.
      x: the batch, [N, ...].
      train: with the batch's own statistics, or else the running ones.
      saturation: see above.
      extra: what the network takes as `Hyperparams.extra`.

    Returns:
      {name of the intermediate: `Signal`}, in the order of the model; it prints as a table.

    Raises:
      ValueError: for an x that the network does not take.
    """
    model, x = as_model(model), jnp.asarray(x)
    extra = {name: jnp.asarray(value, jnp.float32) for name, value in extra.items()}
    offsets = offsets_of(bound(model, extra), params, batch_stats, x, train)
    given, options = (params, batch_stats, x, offsets, extra), (train, float(saturation))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
        return _signals(model.apply, model.layers, *options, *given)
    return _compiled_signals(model.apply, model.layers, *options)(*given)


@functools.lru_cache(maxsize=16)
def _compiled_signals(*options):
    """Compiled whole: eagerly, each operation would be compiled by itself."""
    return jax.jit(functools.partial(_signals, *options), compiler_options=compilation.options())


def _signals(apply, layers, train, saturation, params, batch_stats, x, offsets, extra):
    layers = with_extra(layers or tracing.layers(apply), extra)

    def show(offsets):
        return layers(params, batch_stats, x, offsets, train=train)[1]

    shown, saturated = _saturated(show, offsets, saturation)
    found = {}
    # One loop for all of a shape: a deep network compiles in a fraction of the time.
    for names in _by_shape(shown):
        described = jax.vmap(_describe)(jnp.stack([shown[name] for name in names]))
        for i, name in enumerate(names):
            mean, spread_, dead, rank = (values[i] for values in described)
            found[name] = Signal(mean, spread_, dead, saturated[name], rank)
    return ByLayer((name, found[name]) for name in offsets)


def _describe(x):
    """All that `Signal` says, but for `saturated`."""
    dead = (x == x[:1]).all(0).mean()
    return mean(x), spread(x), dead, stable_rank(centred(x))


def _by_shape(arrays):
    """The names of the arrays that have one shape and dtype, group by group."""
    groups = {}
    for name, array in arrays.items():
        groups.setdefault((array.shape, array.dtype), []).append(name)
    return groups.values()


def _saturated(show, offsets, saturation):
    """The intermediates, and {name: fraction of entries with a slope below `saturation`, or NaN}.

    By derivatives along the offsets.
    """
    names = list(offsets)
    before = dict(zip(names[1:], names, strict=False))
    _, reached = tracing.dependent(lambda *values: show(dict(zip(names, values, strict=True))), *offsets.values())
    like = {
        name: offsets[name]
        for i, name in enumerate(names[1:])
        if offsets[before[name]].shape == offsets[name].shape and i in reached[name]
    }
    shown, push = jax.linearize(show, offsets)
    # One draw for all, which are moved one at a time: that of each took most of the compilation.
    drawn = jax.random.rademacher(jax.random.key(0), (max(o.size for o in offsets.values()),), jnp.int8)
    signs = {name: drawn[: o.size].reshape(o.shape).astype(o.dtype) for name, o in offsets.items()}
    both = {name: jnp.stack([jnp.ones_like(sign), sign]) for name, sign in signs.items()}

    def fractions(k):
        """Along the k-th intermediate, in all that come after another of their shape."""
        along = ByLayer((name, jnp.where(k == i, both[name], 0)) for i, name in enumerate(names))
        pushed = jax.vmap(push)(along)
        found = {}
        for group in _by_shape(like):
            slope, tested, sign = (
                jnp.stack([values(name) for name in group])
                for values in (lambda n: pushed[n][0], lambda n: pushed[n][1], lambda n: signs[before[n]])
            )
            axes = tuple(range(1, slope.ndim))
            error = jnp.abs(tested - sign * slope).max(axes)
            elementwise = error <= 1e-3 * jnp.abs(slope).max(axes)
            small = (jnp.abs(slope) < saturation).mean(axes, dtype=jnp.float32)
            found |= dict(zip(group, jnp.where(elementwise, small, jnp.nan), strict=True))
        return found

    # One at a time: compiled once, in place of once for each.
    table = jax.lax.map(fractions, jnp.arange(len(names)))  # {of: [along]}
    unknown = jnp.float32(jnp.nan)
    return shown, {name: table[name][i - 1] if name in table else unknown for i, name in enumerate(names)}
