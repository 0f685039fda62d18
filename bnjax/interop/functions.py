"""A pair of functions as a model: what the roads from Flax, Equinox and plain JAX share.

What `init_scale` multiplies is read off the trace (`bnjax.tracing`): the kernels of all products but the readouts.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnjax import tracing
from bnjax.types import ApplyFn, Model, PyTree, some_of, takes_extra, taking_extra, with_extra

DROPOUT = 0x64726F70  # folded into the key of the initialization: no number that a split of it has


def dropout_key(key: jax.Array) -> jax.Array:
    """The key of dropout as the state holds it, a plain array, from that of the initialization."""
    return jax.random.key_data(jax.random.fold_in(key, DROPOUT))


def next_keys(stored: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what the state holds after this step, the key of this step)."""
    after, now = jax.random.split(jax.random.wrap_key_data(stored))
    return jax.random.key_data(after), now


def in_words(scaled: Collection[str] | None, **network: Any) -> dict[str, Any]:
    """The `config` of a model for which none is given."""
    return {**network, "scaled": None if scaled is None else sorted(scaled)}


def as_model(
    init: Callable[[jax.Array, tuple[int, ...]], tuple[PyTree, PyTree]],
    apply: ApplyFn,
    *,
    scaled: Collection[str] | None,
    config: Mapping[str, Any],
) -> Model:
    """A model whose initialization is scaled, and whose `layers` are read off its trace.

    Args:
      init: (key, shape of an example) -> (params, batch_stats).
      apply: as of a `Model`.
      scaled: the kernels that `init_scale` multiplies, by path, or what has them in it (`Dense_0`); another parameter
        by its whole path. None: all kernels but those of the readouts.
      config: as of a `Model`.

    Returns:
      `Model`. Its `init` raises a ValueError for a name in `scaled` that there is not, for examples that the
      network does not take, and for an `init_scale` other than 1 where it has nothing to multiply.
    """

    @functools.cache
    def chosen(input_shape, names):
        """The names of what is scaled, and what to say where nothing is; `names` are those in `extra`."""
        draw, run = (with_extra(function, some_of(names)) for function in (init, apply))
        try:
            params, batch_stats = jax.eval_shape(lambda: draw(jax.random.key(0), input_shape))
        except TypeError as error:
            raise ValueError(f"the network cannot be drawn for examples of shape {input_shape}: {error}") from error
        reading, _ = tracing.read_examples(run, params, batch_stats, input_shape)
        return _chosen(reading, tracing.names(params), scaled), nothing_scaled(reading)

    def scaled_init(key, input_shape, init_scale=1.0, *, extra):
        names, nothing = chosen(tuple(input_shape), tuple(extra))
        if not names and not isinstance(init_scale, jax.core.Tracer) and init_scale != 1:
            raise ValueError(f"init_scale={init_scale} has nothing to multiply: {nothing}")
        params, batch_stats = with_extra(init, extra)(key, input_shape)

        def leaf(path, value):
            return value * jnp.asarray(init_scale, value.dtype) if tracing.name_of(path) in names else value

        return jax.tree_util.tree_map_with_path(leaf, params), batch_stats

    scaled_init = taking_extra(scaled_init, takes_extra(init) or takes_extra(apply))
    return Model(scaled_init, apply, tracing.layers(apply), config)


def arguments(call: Callable) -> Callable[[bool], dict[str, bool]]:
    """The arguments of a network's `__call__` that tell it about training, by their usual names."""
    names = inspect.signature(call).parameters
    usual = {"train": True, "training": True, "is_training": True, "deterministic": False, "use_running_average": False}
    return lambda train: {name: train == value for name, value in usual.items() if name in names}


def nothing_scaled(reading: tracing.Reading) -> str:
    """Why a network has no kernels that could be scaled."""
    kernels = [f"{name} (readout)" if name in reading.readouts else name for name in reading.kernels]
    unseen = [f"{name} ({why})" for name, why in reading.not_seen.items()]
    return f"the network's kernels are {', '.join(kernels) or 'none'}; not seen: {', '.join(unseen) or 'none'}"


def _chosen(reading, params, scaled) -> set[str]:
    kernels = [name for name in reading.kernels if name in params]
    if isinstance(scaled, str):
        raise ValueError(f"scaled takes a list of names, got {scaled!r}")
    if scaled is None:
        return {name for name in kernels if name not in reading.readouts}
    inside = {one: {k for k in kernels if f"{k}/".startswith(f"{one}/")} or {one} & {*params} for one in scaled}
    if useless := [name for name, found in inside.items() if not found]:
        raise ValueError(f"scaled has {useless}, in which there are no kernels; kernels are {', '.join(kernels)}")
    return set().union(*inside.values())
