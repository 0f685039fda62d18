"""NNX networks as models, and `flax.nnx.BatchNorm` computed by `bnjax.batch_norm.apply`."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from bnjax.interop import functions
from bnjax.interop.flax import apply, check_options, feature_axes
from bnjax.types import BatchNormParams, Model, takes_extra, taking_extra


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`, computed by `bnjax.batch_norm.apply`: right for inputs far from zero, too.

    To use it, change one line: `from bnjax.interop.nnx import BatchNorm`. Arguments, initialization and state are
    Flax's. The differences are those of `bnjax.interop.flax.BatchNorm`.
    """

    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Normalizes x [N, ..., C], by its own statistics or the running ones.

        Args:
          x: with the features on `self.axis`.
          use_running_average: in the place of the attribute: True in evaluation, False in training, which updates
            `self.mean` and `self.var`.
          mask: true for valid entries; broadcasts against `x`, with size 1 on the feature axis.

        Returns:
          y, of the shape of x; its dtype is `self.dtype`, or that of x, parameters and statistics together.

        Raises:
          ValueError: if shapes do not fit, for `axis_index_groups`, and for `momentum=None`.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError("use_running_average is given neither to BatchNorm nor to the call")
        check_options(self)
        mean, var = self.mean[...], self.var[...]
        params = (p if p is None else p[...] for p in (self.scale, self.bias))
        # The statistics go through it, too, for their say in the dtype; those used stay as they are stored.
        x, _, _, scale, bias = self.promote_dtype((jnp.asarray(x), mean, var, *params), dtype=self.dtype)
        y, stats = apply(
            BatchNormParams(scale, bias),
            mean,
            var,
            x,
            dtype=nnx.nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype),
            train=not use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis=feature_axes(x, self.axis),
            mask=mask,
            axis_name=self.axis_name,
        )
        if not use_running_average:
            self.mean[...], self.var[...] = stats.mean, stats.var
        return y


def as_model(
    network: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    *,
    scaled: Collection[str] | None = None,
    arguments: Callable[[bool], Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Model:
    """An NNX network as a `bnjax.Model`, to be swept and probed like any other.

    Args:
      network: a function that draws one, such as `lambda rngs: Net(rngs=rngs)`; or a network, which stands for its own
        single draw, as it is now. Called with a batch x [N, ...], it gives outputs [N, K]. Its `nnx.Param`s are the
        parameters; all else (batch statistics, the keys of dropout) is carried along.
      scaled: as in `bnjax.interop.flax.as_model`.
      arguments: the keyword arguments of its `__call__`, likewise; it is switched by `train()` and `eval()` anyway.
      config: identifies the network in stored results. None: its class.

    Returns:
      `Model`. Its `init` raises a ValueError for what `bnjax.interop.functions.as_model` says.
    """
    single = isinstance(network, nnx.Module)

    def split(net):
        graph, *states = nnx.split(net, nnx.Param, ...)
        return graph, *(jax.tree.map(_stored, nnx.to_pure_dict(state)) for state in states)

    drawn = split(network) if single else None

    @functools.cache
    def form():
        """The network without its arrays."""
        return network if single else nnx.eval_shape(lambda: network(nnx.Rngs(0)))

    given = arguments or functions.arguments(type(form()).__call__)
    takes = takes_extra(type(form()).__call__) and "extra" not in given(False)

    def init(key, input_shape):
        return drawn[1:] if single else split(network(nnx.Rngs(key)))[1:]

    def run(params, batch_stats, x, *, train, extra):
        graph, *states = nnx.split(form(), nnx.Param, ...)
        for state, values in zip(states, (params, batch_stats), strict=True):
            values = jax.tree.map(_used, nnx.to_pure_dict(state), values)
            nnx.replace_by_pure_dict(state, values)
        net = nnx.merge(graph, *states, copy=True)
        (net.train if train else net.eval)()
        outputs = net(x, **given(train), **({"extra": extra} if takes else {}))
        return outputs, split(net)[2] if train else batch_stats

    if config is None:
        config = functions.in_words(scaled, model="nnx", **{"class": type(form()).__qualname__})
    run = taking_extra(run, takes)
    return functions.as_model(init, run, scaled=scaled, config=config)


def drawn_anew(network: nnx.Module) -> Callable[[nnx.Rngs], nnx.Module] | None:
    """The function that draws networks like this one, if its class takes `rngs` and nothing else; otherwise None."""
    if [*inspect.signature(type(network).__init__).parameters] != ["self", "rngs"]:
        return None
    return lambda rngs: type(network)(rngs=rngs)


def _stored(value):
    """Keys of random numbers as plain arrays."""
    return jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value


def _used(like, value):
    """The inverse."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return value
    impl = None if isinstance(like, jax.ShapeDtypeStruct) else jax.random.key_impl(like)
    return jax.random.wrap_key_data(value, impl=impl)
