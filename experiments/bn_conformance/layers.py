"""One interface to every implementation of batch normalization that the cases measure.

Each is used as its own documentation says; momentum is the weight of the old running value here, and is
translated. What an implementation does not offer raises `NotOffered`, which is not a wrong result.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import bnjax
from bnjax import batch_norm
from bnjax.types import BatchNormParams, BatchStats

DEVICES = "devices"  # the name of the mapped axis


class NotOffered(Exception):
    """The implementation has no such option."""


class Options(NamedTuple):
    """The options that a layer is made for. Hashable."""

    shape: tuple[int, ...]  # of x, on one device
    dtype: str = "float32"  # of x
    axis: int | tuple[int, ...] = -1  # the features
    momentum: float | None = 0.9  # weight of the old running value; None: the average over all batches
    epsilon: float = 1e-5
    unbiased: bool | None = None  # running variance; None: as the implementation has it
    use_scale: bool = True
    use_bias: bool = True
    axis_name: str | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The feature axes, not negative."""
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        return tuple(a % len(self.shape) for a in axes)

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of the parameters."""
        return tuple(self.shape[a] for a in self.axes)

    @property
    def half(self) -> bool:
        """Inputs of low precision."""
        return self.dtype in ("float16", "bfloat16")


class Layer(NamedTuple):
    """A layer as pure functions. `params` is (scale, bias), [C] each or None; `stats` is the layer's own pytree."""

    start: Callable[[], Any]  # statistics before training
    stored: Callable[..., Any]  # (mean, var, count) -> statistics that that many batches might have left
    moments: Callable[[Any], tuple]  # (stats) -> the (mean, var), [C] each, that evaluation uses
    train: Callable[..., tuple]  # (params, stats, x, mask, cotangent) -> (y, stats, dx, (dscale, dbias))
    evaluate: Callable[..., tuple]  # (params, stats, x, cotangent) -> (y, dx)
    steps: Callable[..., Any]  # (params, stats, xs) -> stats after each of xs in turn; in lax.scan where there is JAX
    devices: Callable[..., tuple] | None  # as train, with a leading axis for devices on stats, x, mask and cotangent


class Implementation(NamedTuple):
    """One column of the table."""

    title: str
    package: str  # on the package index
    module: str  # to be imported
    make: Callable[[Options], Layer]
    debias: bool = False  # its running averages keep no trace of where they started
    unbiased: bool = False  # its running variance is unbiased unless asked otherwise


def find(implementation: Implementation) -> tuple[bool, str]:
    """(True, its version) if it can be used here, or else (False, the reason)."""
    if implementation.module == "bnjax":
        return True, bnjax.__version__
    os.environ["KERAS_BACKEND"] = "jax"  # read when it is imported
    try:
        importlib.import_module(implementation.module)
    except ModuleNotFoundError as error:
        missing = implementation.module.partition(".")[0] == error.name
        return False, "not installed" if missing else f"{error.name} is not installed"
    except Exception as error:  # one that does not fit the JAX at hand
        return False, f"import raises {type(error).__name__}"
    return True, importlib.metadata.version(implementation.package)


def refuse(*conditions: Any) -> None:
    """Raises NotOffered if any of them is true."""
    if any(conditions):
        raise NotOffered


def present(params: tuple, *names: str) -> dict[str, Any]:
    """The parameters that are not None, by these names."""
    return {name: value for name, value in zip(names, params, strict=True) if value is not None}


def mean_and_var(mean, var, count=None) -> dict[str, Any]:
    """The statistics of several implementations."""
    return {"mean": mean, "var": var}


def jax_layer(start, call, stored=mean_and_var, moments=lambda stats: (stats["mean"], stats["var"])) -> Layer:
    """A `Layer` from some of its fields and call: (params, stats, x, mask, train) -> (y, stats)."""

    def one(params, stats, x, mask):
        return call(params, stats, x, mask, True)

    def each(params, stats, xs, masks):
        return jax.vmap(functools.partial(one, params, stats), axis_name=DEVICES)(xs, masks)

    def step(forward, params, stats, x, mask, cotangent):
        y, pullback, stats = jax.vjp(lambda x, params: forward(params, stats, x, mask), x, params, has_aux=True)
        return y, stats, *pullback(cotangent.astype(y.dtype))

    def evaluate(params, stats, x, cotangent):
        y, pullback = jax.vjp(lambda x: call(params, stats, x, None, False)[0], x)
        return y, *pullback(cotangent.astype(y.dtype))

    def steps(params, stats, xs):
        return jax.lax.scan(lambda stats, x: (one(params, stats, x, None)[1], None), stats, xs)[0]

    train, devices = (functools.partial(step, forward) for forward in (one, each))
    return Layer(jax.jit(start), stored, moments, *map(jax.jit, (train, evaluate, steps, devices)))


def bnjax_layer(options: Options) -> Layer:
    """`bnjax.batch_norm`."""
    named = {name: getattr(options, name) for name in ("momentum", "epsilon", "axis", "axis_name")}

    def start():
        mean, var, count = batch_norm.init(math.prod(options.features))[1]
        return BatchStats(mean.reshape(options.features), var.reshape(options.features), count)

    def call(params, stats, x, mask, train):
        params = BatchNormParams(*params)
        return batch_norm.apply(params, stats, x, train=train, mask=mask, unbiased=bool(options.unbiased), **named)

    def stored(mean, var, count):
        return BatchStats(mean, var, jnp.int32(count))

    return jax_layer(start, call, stored, lambda stats: (stats.mean, stats.var))


def flax_options(options: Options) -> dict[str, Any]:
    """The arguments of both of Flax's layers."""
    refuse(options.momentum is None, options.unbiased)
    names = ("axis", "momentum", "epsilon", "use_scale", "use_bias", "axis_name")
    dtype = {"dtype": jnp.dtype(options.dtype)} if options.half else {}
    return {name: getattr(options, name) for name in names} | dtype


def flax_linen_layer(options: Options, **more: Any) -> Layer:
    """`flax.linen.BatchNorm`."""
    import flax.linen as nn

    layer = nn.BatchNorm(**flax_options(options), **more)

    def start():
        return layer.init(jax.random.key(0), jnp.zeros(options.shape), use_running_average=False)["batch_stats"]

    def call(params, stats, x, mask, train):
        variables = {"params": present(params, "scale", "bias"), "batch_stats": stats}
        y, new = layer.apply(variables, x, use_running_average=not train, mask=mask, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return jax_layer(start, call)


def flax_nnx_layer(options: Options) -> Layer:
    """`flax.nnx.BatchNorm`."""
    from flax import nnx

    refuse(len(options.axes) > 1)

    def build():
        return nnx.BatchNorm(options.features[0], rngs=nnx.Rngs(0), **flax_options(options))

    def stats_of(layer):
        return {"mean": layer.mean[...], "var": layer.var[...]}

    def call(params, stats, x, mask, train):
        layer = build()
        for name, value in (present(params, "scale", "bias") | stats).items():
            setattr(layer, name, nnx.Variable(value))
        return layer(x, use_running_average=not train, mask=mask), stats_of(layer)

    return jax_layer(lambda: stats_of(build()), call)


def haiku_layer(options: Options) -> Layer:
    """`haiku.BatchNorm`; inputs of low precision under the mixed-precision policy that Haiku's guide gives it."""
    import haiku as hk
    import jmp

    refuse(options.momentum in (None, 1), options.unbiased)  # decay_rate "must be in [0, 1)"
    reduced = tuple(a for a in range(len(options.shape)) if a not in options.axes)
    shape = tuple(n if a in options.axes else 1 for a, n in enumerate(options.shape))
    policy = jmp.get_policy(f"params=float32,compute=float32,output={options.dtype}")
    names = ("batch_norm/~/mean_ema", "batch_norm/~/var_ema")
    affine, numbers = (options.use_scale, options.use_bias), (options.momentum, options.epsilon)

    @hk.transform_with_state
    def module(x, is_training):
        pushed = hk.mixed_precision.push_policy(hk.BatchNorm, policy)
        with pushed if options.half else contextlib.nullcontext():
            return hk.BatchNorm(*affine, *numbers, axis=reduced, cross_replica_axis=options.axis_name)(x, is_training)

    def start():
        return module.init(None, jnp.zeros(options.shape, options.dtype), is_training=True)[1]

    def call(params, stats, x, mask, train):
        refuse(mask is not None)
        named = {name: value.reshape(shape) for name, value in present(params, "scale", "offset").items()}
        return module.apply({"batch_norm": named}, stats, None, x, train)

    def stored(mean, var, count):
        values = (value.reshape(shape) for value in (mean, var))
        return {n: {"hidden": v, "average": v, "counter": jnp.int32(count)} for n, v in zip(names, values, strict=True)}

    def moments(stats):
        return tuple(stats[name]["average"].reshape(options.features) for name in names)

    return jax_layer(start, call, stored, moments)


def equinox_layer(options: Options) -> Layer:
    """`equinox.nn.BatchNorm` with mode="batch", which its documentation recommends, under `vmap` over the batch."""
    import equinox as eqx

    single = options.axis_name is not None and len(options.shape) == 1  # one example a device
    refuse(options.momentum in (None, 0, 1), options.unbiased)  # momentum "between 0 and 1 exclusive"
    refuse(options.use_scale != options.use_bias)  # channelwise_affine is both or none
    refuse(not single and options.axes != (1,))  # an example is [C, ...]
    names = "batch" if options.axis_name is None else (options.axis_name, "batch")

    def build():
        given = options.features[0], options.axis_name if single else names, options.epsilon, options.use_scale
        return eqx.nn.make_with_state(eqx.nn.BatchNorm)(*given, options.momentum, mode="batch")

    def stats_of(layer, state):
        return {"counter": state.get(layer.batch_counter), "hidden": state.get(layer.batch_state_index)}

    def call(params, stats, x, mask, train):
        refuse(mask is not None)
        layer, state = build()
        if options.use_scale:
            layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, params)
        layer = eqx.nn.inference_mode(layer, not train)
        state = state.set(layer.batch_counter, stats["counter"]).set(layer.batch_state_index, stats["hidden"])
        over_batch = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = (layer if single else over_batch)(x, state)
        return y, stats_of(layer, state)

    def stored(mean, var, count):
        dtype = jnp.result_type(float)  # its default, which x64 changes
        return {"counter": jnp.asarray(count), "hidden": (jnp.asarray(mean, dtype), jnp.asarray(var, dtype))}

    def moments(stats):  # as in its evaluation
        scale = jnp.where(stats["counter"] == 0, 1, 1 - options.momentum ** stats["counter"])
        return tuple(hidden / scale for hidden in stats["hidden"])

    return jax_layer(lambda: stats_of(*build()), call, stored, moments)


def keras_layer(options: Options) -> Layer:
    """`keras.layers.BatchNormalization` on Keras's JAX backend; dtype policies as its guide has them."""
    import keras

    refuse(keras.backend.backend() != "jax", options.momentum is None, options.unbiased, len(options.axes) > 1)
    refuse(options.axis_name is not None)  # synchronized is for TensorFlow
    named = {"scale": options.use_scale, "dtype": f"mixed_{options.dtype}" if options.half else options.dtype}
    given = options.axes[0], options.momentum, options.epsilon, options.use_bias
    layer = keras.layers.BatchNormalization(*given, **named)
    layer.build(options.shape)

    def call(params, stats, x, mask, train):
        if mask is not None:
            refuse(options.axes != (len(options.shape) - 1,))
            mask = jnp.squeeze(mask, -1)
        trainable = [p for p in params if p is not None]
        y, stats = layer.stateless_call(trainable, [stats["mean"], stats["var"]], x, training=train, mask=mask)
        return y, mean_and_var(*stats)

    return jax_layer(lambda: mean_and_var(*(jnp.asarray(v.value) for v in layer.non_trainable_variables)), call)


def torch_layer(options: Options) -> Layer:
    """`torch.nn.BatchNorm1d` and `BatchNorm2d`, on the CPU."""
    import torch

    refuse(options.axis_name is not None)  # SyncBatchNorm is for GPUs
    refuse(options.axes != (1,), options.unbiased is False, options.epsilon == 0)  # eps must be positive
    refuse(options.use_bias and not options.use_scale)  # affine is both or none

    kind = torch.nn.BatchNorm1d if len(options.shape) < 4 else torch.nn.BatchNorm2d
    momentum = None if options.momentum is None else 1 - options.momentum
    precision = torch.float64 if options.dtype == "float64" else torch.float32
    more = {"bias": options.use_bias, "dtype": precision}
    module = kind(options.features[0], options.epsilon, momentum, options.use_scale, **more)

    def tensor(array, dtype=None):
        return torch.from_dlpack(jnp.array(array)).to(dtype)

    def loaded(params):
        return {name: tensor(p, precision) for name, p in present(params, "weight", "bias").items()}

    def array(tensor):
        return jnp.from_dlpack(tensor.detach())

    def call(params, stats, x, training):
        stats = {name: buffer.clone() for name, buffer in stats.items()}  # which are changed in place
        return torch.func.functional_call(module.train(training), params | stats, (x,)), stats

    def train(params, stats, x, mask, cotangent, training=True):
        refuse(mask is not None)
        params, x = loaded(params), tensor(x)
        leaves = [leaf.requires_grad_() for leaf in (x, *params.values())]
        y, stats = call(params, stats, x, training)
        dx, *dparams = map(array, torch.autograd.grad(y, leaves, tensor(cotangent, y.dtype)))
        return array(y), stats, dx, (*dparams, None, None)[:2]

    def evaluate(params, stats, x, cotangent):
        y, _, dx, _ = train(params, stats, x, None, cotangent, training=False)
        return y, dx

    def steps(params, stats, xs):
        for x in tensor(xs):
            _, stats = call(loaded(params), stats, x, True)
        return stats

    def stored(mean, var, count):
        mean, var = (tensor(moment, precision) for moment in (mean, var))
        return {"running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(count)}

    def moments(stats):
        return array(stats["running_mean"]), array(stats["running_var"])

    return Layer(lambda: dict(module.named_buffers()), stored, moments, train, evaluate, steps, devices=None)


slow_flax_linen_layer = functools.partial(flax_linen_layer, use_fast_variance=False)
ALL = {
    "bnjax": Implementation("bnjax", "bnjax", "bnjax", bnjax_layer),
    "flax_linen": Implementation("Flax linen", "flax", "flax.linen", flax_linen_layer),
    "flax_linen_slow": Implementation("Flax linen, no fast variance", "flax", "flax.linen", slow_flax_linen_layer),
    "flax_nnx": Implementation("Flax nnx", "flax", "flax.nnx", flax_nnx_layer),
    "haiku": Implementation("Haiku", "dm-haiku", "haiku", haiku_layer, debias=True),
    "equinox": Implementation("Equinox, mode=batch", "equinox", "equinox", equinox_layer, debias=True),
    "keras": Implementation("Keras on JAX", "keras", "keras", keras_layer),
    "torch": Implementation("PyTorch", "torch", "torch", torch_layer, unbiased=True),
}


@functools.cache
def layer(name: str, options: Options, x64: bool) -> Layer:
    """The layer, made once for each set of options, so that what it compiled is used again."""
    del x64  # a layer is made anew, since its defaults may depend on it
    made = ALL[name].make(options)
    return made._replace(start=functools.cache(made.start))
