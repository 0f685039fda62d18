"""Equinox networks as models."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

try:
    import equinox as eqx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; bnjax.interop.equinox needs the extra bnjax[equinox]") from error

from bnjax.interop import functions
from bnjax.types import Model, PyTree, takes_extra, taking_extra


def as_model(
    network: PyTree, *, scaled: Collection[str] | None = None, config: Mapping[str, Any] | None = None
) -> Model:
    """An Equinox network as a `bnjax.Model`, to be swept and probed like any other.

    Args:
      network: a function that draws one, such as `lambda key: Net(key=key)`; or a network, which stands for its own
        single draw. As is usual for Equinox it is called with one example and gives outputs [K]. With state
        (`eqx.nn.make_with_state`) it is a pair (network, state), called with the state too; the axis of the batch is
        called "batch" (`eqx.nn.BatchNorm(axis_name="batch")`). Where its `__call__` has a `key`, each example gets one
        in training. Its floating-point arrays are the parameters.
      scaled: as in `bnjax.interop.flax.as_model`.
      config: identifies the network in stored results. None: its class.

    Returns:
      `Model`. Its `init` raises a ValueError for what `bnjax.interop.functions.as_model` says.
    """
    single = is_network(network)

    def drawn(key):
        found = network if single else network(key)
        net, state = found if isinstance(found, tuple) else (found, None)
        params, others = eqx.partition(net, eqx.is_inexact_array)
        arrays, static = eqx.partition(others, eqx.is_array)
        return params, {"state": state, "arrays": arrays}, static

    form, static = eqx.filter_eval_shape(lambda: drawn(jax.random.key(0))[1:])
    if hasattr(static, "__wrapped__"):  # evaluation mode would not reach it
        raise ValueError("an Equinox network is given as it is, without filter_jit and the like around it")
    stateful = form["state"] is not None
    takes_key = "key" in inspect.signature(type(static).__call__).parameters
    takes = takes_extra(type(static).__call__)

    def init(key, input_shape):
        params, others, _ = drawn(key)
        return params, {**others, **({"key": functions.dropout_key(key)} if takes_key else {})}

    def apply(params, batch_stats, x, *, train, extra):
        net = eqx.combine(params, batch_stats["arrays"], static)
        net = eqx.nn.inference_mode(net, value=not train)
        # Equinox compares an entry's type before and after, the mesh of devices included: all be of this trace.
        state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype) + a, batch_stats["state"])
        kept, keys = {}, None
        if takes_key and train:
            kept["key"], now = functions.next_keys(batch_stats["key"])
            keys = jax.random.split(now, len(x))

        def one(x, key):
            options = ({"key": key} if takes_key else {}) | ({"extra": extra} if takes else {})
            return net(x, state, **options) if stateful else (net(x, **options), state)

        outputs, state = jax.vmap(one, axis_name="batch", out_axes=(0, None))(x, keys)
        return outputs, {**batch_stats, "state": state, **kept} if train else batch_stats

    if config is None:
        config = functions.in_words(scaled, model="equinox", **{"class": type(static).__qualname__})
    apply = taking_extra(apply, takes)
    return functions.as_model(init, apply, scaled=scaled, config=config)


def is_network(value: Any) -> bool:
    """True for an Equinox network, or one with its state."""
    if isinstance(value, tuple) and len(value) == 2:
        return isinstance(value[0], eqx.Module) and isinstance(value[1], eqx.nn.State)
    return isinstance(value, eqx.Module)


def drawn_anew(network: PyTree) -> Callable[[jax.Array], PyTree] | None:
    """The function that draws networks like this one, if its class takes a `key` and nothing else; otherwise None."""
    stateful = isinstance(network, tuple)
    cls = type(network[0] if stateful else network)
    if [*inspect.signature(cls.__init__).parameters] != ["self", "key"]:
        return None
    return lambda key: (eqx.nn.make_with_state(cls) if stateful else cls)(key=key)
