"""Networks from ONE function, which serves to draw them, to run them, to prepare them and to show what is in them.

    def forward(net, x):                                # x [N, ...] -> outputs [N, K]
        for i, width in enumerate(features):
            name = f"hidden_{i}"
            x = net.activated(name, net.dense(name, x, width))
        return net.readout(x, num_outputs)

    model = build(forward, Parts.make(norm="layer"), {"model": "own", "features": [...]})

`params` is {layer: {"kernel", "bias"?, "norm"?}}, and `batch_stats` {layer: {"norm"?}}; frozen kernels stand in
`batch_stats`, among what no optimizer touches. The i-th kernel that `forward` asks for is drawn from the i-th key, so
that it is the same draw whatever the norm, the activation and their order.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import activations, batch_norm, initializers, norms
from bnjax.choices import check
from bnjax.types import Array, Model, Norm

NORM_POSITIONS = ("before_activation", "after_activation")
SCALED_LAYERS = ("hidden", "all")


class Parts(NamedTuple):
    """What the layers of a network are made of."""

    activation: Callable[[jax.Array], jax.Array]
    norms: tuple[Norm, ...]  # one for all layers, or one for each
    norm_position: str
    draw: initializers.Initializer
    scaled_layers: str
    freeze_hidden: bool
    use_bias: bool
    lsuv: bool
    config: Mapping[str, Any]

    @classmethod
    def make(
        cls,
        activation: str = "relu",
        norm: str | Norm = "batch",
        norm_position: str = "before_activation",
        initializer: str = "he_normal",
        *,
        scaled_layers: str = "hidden",
        freeze_hidden: bool = False,
        use_bias: bool | None = None,
        num_layers: int | None = None,
        **norm_options: Any,
    ) -> "Parts":
        """The parts, checked; arguments and errors are those of `bnjax.mlp`. An epsilon [`num_layers`] is taken."""
        check("norm_position", norm_position, NORM_POSITIONS)
        check("scaled_layers", scaled_layers, SCALED_LAYERS)
        phi, draw = activations.get(activation), initializers.get(initializer)
        found = _norms(norm, num_layers, norm_options)
        if use_bias is None:
            use_bias = found[0].apply is None or norm_position == "after_activation"
        words = dict(found[0].config) or {"norm": "own"}
        if len(found) > 1:
            words["epsilon"] = [one.config["epsilon"] for one in found]
        config = {"activation": activation, "norm_position": norm_position, "initializer": initializer}
        config |= {"scaled_layers": scaled_layers, "freeze_hidden": freeze_hidden, "use_bias": use_bias}
        lsuv = initializer in initializers.PREPARED
        if lsuv and found[0].kernel is not None:
            raise ValueError(f"initializer {initializer!r} has no effect beside norm {words['norm']!r}: choose one")
        return cls(phi, found, norm_position, draw, scaled_layers, freeze_hidden, use_bias, lsuv, words | config)


def _norms(norm, num_layers, options):
    """One, or one for each layer where epsilon is an array."""
    shape = jnp.shape(options.get("epsilon", 0.0))
    if shape == ():
        return (norms.get(norm, **options),)
    if shape != (num_layers,):
        words = "one number" + (f" or one for each of {num_layers} hidden layers" if num_layers is not None else "")
        raise ValueError(f"epsilon must be {words}, got shape {shape}")
    return tuple(norms.get(norm, **options | {"epsilon": one}) for one in options["epsilon"])


def build(forward: Callable[["Net", jax.Array], jax.Array], parts: Parts, config: Mapping[str, Any]) -> Model:
    """The network that `forward` is.

    Args:
      forward: (net, x [N, ...]) -> outputs [N, K]; it may call `net`'s functions only, and jax.numpy's.
      parts: of its layers.
      config: says in words what it is, beside the parts.

    Returns:
      `Model`. Its functions raise ValueError when traced: for inputs that the network does not take, for a norm
      whose `apply` returns statistics of another structure, and for offsets that it does not have.
    """

    @functools.cache
    def drawn(input_shape):
        """[(tree, layer, name, make)], of one pass that computes nothing."""
        net = _Drawing(parts)
        jax.eval_shape(functools.partial(forward, net), jax.ShapeDtypeStruct((2, *input_shape), jnp.float32))
        return net.made

    def init(key, input_shape, init_scale=1.0):
        trees: tuple[dict, dict] = ({}, {})
        for tree, layer, name, make in drawn(tuple(input_shape)):
            for one in trees if layer != OUTPUT else trees[:1]:
                one.setdefault(layer, {})
            trees[tree][layer][name] = make(key, init_scale, 0)
        return trees

    def run(params, batch_stats, x, offsets, train, **options):
        net = Net(parts, params, batch_stats, offsets, train, **options)
        return net, forward(net, x)

    def apply(params, batch_stats, x, *, train):
        net, outputs = run(params, batch_stats, x, {}, train)
        return outputs, net.new_stats

    def layers(params, batch_stats, x, offsets, *, train):
        net, outputs = run(params, batch_stats, x, offsets, train, unroll=True)
        if unknown := set(offsets) - set(net.shown):
            raise ValueError(f"unknown offsets {sorted(unknown)}; allowed: {', '.join(net.shown)}")
        return outputs, net.shown

    def prepare(params, batch_stats, x):
        _check_batch(x)
        net, _ = run(params, batch_stats, x, {}, True, preparing=True)
        return net.params, net.batch_stats

    needed = parts.lsuv or any(one.prepare for one in parts.norms)
    words = {**config, **parts.config, **config}  # which the parts' must not replace
    return Model(init, apply, layers, words, prepare if needed else None)


OUTPUT = "output"  # the last layer


class Net:
    """One pass through a network: `forward` computes with its functions, which find parameters by layer and name."""

    def __init__(self, parts, params, batch_stats, offsets, train, *, unroll=False, preparing=False):
        self.parts, self.params, self.batch_stats = parts, dict(params), dict(batch_stats)
        self.train, self.unroll, self.preparing = train, unroll, preparing
        self.offsets, self.shown = offsets, {}
        self.new_stats = {layer: dict(stats) for layer, stats in batch_stats.items()}

    # What `forward` calls.

    def dense(self, layer: str, x: Array, width: int, *, factor: float = 1.0) -> jax.Array:
        """Multiplies by that layer's kernel, whose draw is multiplied by `factor` (+ b): [N, ..., width]."""
        return self._product(layer, (x.shape[-1], width), lambda kernel: x @ kernel, factor)

    def conv(
        self, layer: str, x: Array, channels: int, *, window: int = 3, stride: int = 1, factor: float = 1.0
    ) -> jax.Array:
        """The convolution of images [N, H, W, C] with that layer's kernel (+ b), zeros around the images."""
        convolve = functools.partial(
            lax.conv_general_dilated,
            x,
            window_strides=(stride, stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return self._product(layer, (window, window, x.shape[-1], channels), convolve, factor)

    def readout(self, x: Array, num_outputs: int, *, factor: float = 1.0) -> jax.Array:
        """The outputs [N, K] = x W + b of the last layer, to which no norm belongs."""
        kernel = self._kernel(OUTPUT, (x.shape[-1], num_outputs), factor)
        if self.preparing and self.parts.lsuv:
            kernel = self._unit_variance(OUTPUT, kernel, x @ kernel)
        return self.show(OUTPUT, x @ kernel + self.parameter(OUTPUT, "bias", (num_outputs,)))

    def norm(self, layer: str, x: Array) -> jax.Array:
        """Normalizes x [N, ..., C]; x itself where the norm is none, or acts on kernels."""
        norm = self.norm_of(layer)
        if norm.apply is None:
            return x
        params, stats = self._norm_state(layer, norm, (1, x.shape[-1]))
        y, new = norm.apply(params, stats, x, train=self.train)
        name = norm.config.get("norm", "own")
        if _form(new) != _form(stats):
            raise ValueError(f"norm {name!r}: init makes statistics {_form(stats)}, apply returns {_form(new)}")
        if y.shape != x.shape:
            raise ValueError(f"norm {name!r}: apply must return the shape of x, {x.shape}; got {y.shape}")
        if "norm" in self.batch_stats.get(layer, {}):
            self.new_stats[layer]["norm"] = new
        return self.show(f"{layer}/norm", y)

    def activated(self, layer: str, x: Array) -> jax.Array:
        """phi(norm(x)) or norm(phi(x)), of what that layer's product gives."""
        return self.nonlinear(layer, self.show(f"{layer}/preactivation", x))

    def nonlinear(self, layer: str, x: Array) -> jax.Array:
        """The same, of anything."""
        if self.parts.norm_position == "before_activation":
            x = self.norm(layer, x)
        x = self.show(f"{layer}/activation", self.parts.activation(x))
        return self.norm(layer, x) if self.parts.norm_position == "after_activation" else x

    def parameter(self, layer: str, name: str, shape: tuple[int, ...], value: float = 0.0) -> jax.Array:
        """A parameter of that shape that starts at `value`."""
        return self.params[layer][name]

    def repeat(self, layer: str, first: int, count: int, block: Callable, x: Array) -> jax.Array:
        """Takes x through `count` equal layers, block(net, layer, x), compiled once; arrays are stacked, [count, ...].

        They are shown as `LAYER_i`, i from `first` on.
        """
        state = self.params[layer], self.batch_stats[layer]
        if self.unroll:
            for i in range(count):
                name = f"{layer}_{first + i}"
                net = self._inner(name, jax.tree.map(lambda a, i=i: a[i], state), unroll=True)
                x = block(net, name, x)
                self.shown |= net.shown
            return x

        def step(x, state):
            net = self._inner(layer, state, preparing=self.preparing)
            x = block(net, layer, x)
            return x, (net.params[layer], net.batch_stats[layer], net.new_stats[layer])

        x, (params, batch_stats, new) = lax.scan(step, x, state)
        self.params[layer], self.batch_stats[layer], self.new_stats[layer] = params, batch_stats, new
        return x

    def show(self, name: str, value: Array) -> jax.Array:
        """An intermediate by that name, with its offset."""
        self.shown[name] = value + self.offsets[name] if name in self.offsets else value
        return self.shown[name]

    def norm_of(self, layer: str) -> Norm:
        """Of that layer: `hidden_3` is the fourth."""
        several = self.parts.norms
        return several[int(layer.rpartition("_")[2])] if len(several) > 1 else several[0]

    # Inside.

    def _inner(self, layer, state, **options):
        return Net(self.parts, {layer: state[0]}, {layer: state[1]}, self.offsets, self.train, **options)

    def _product(self, layer, shape, multiply, factor):
        norm = self.norm_of(layer)
        drawn = kernel = self._kernel(layer, shape, factor)
        if norm.kernel is not None:
            params, stats = self._norm_state(layer, norm, shape)
            kernel = norm.kernel(params, kernel)
        x = multiply(kernel)
        if self.preparing and self.parts.lsuv:
            x = multiply(self._unit_variance(layer, drawn, x))
        if self.preparing and norm.prepare is not None:
            for tree, new in zip((self.params, self.batch_stats), norm.prepare(params, stats, x), strict=True):
                if "norm" in tree[layer]:
                    tree[layer] = tree[layer] | {"norm": _as(new, tree[layer]["norm"])}
            x = multiply(norm.kernel(self.params[layer].get("norm", params), drawn))
            if self.parts.use_bias:
                bias = _as(-x.mean(range(x.ndim - 1)), self.params[layer]["bias"])
                self.params[layer] = self.params[layer] | {"bias": bias}
        if self.parts.use_bias:
            x = x + self.parameter(layer, "bias", shape[-1:])
        return x

    def _unit_variance(self, layer, kernel, x):
        """LSUV: the kernel for which x, the product with it, has variance 1 over batch and units; itself at 0."""
        _, inverse = batch_norm.standardize(x.reshape(-1, 1), 0.0)  # whatever the size of x
        kernel = _as(jnp.where(inverse > 0, kernel * inverse.reshape(()), kernel), kernel)
        tree = self.params if "kernel" in self.params[layer] else self.batch_stats
        tree[layer] = tree[layer] | {"kernel": kernel}
        return kernel

    def _kernel(self, layer, shape, factor):
        kernel = (self.params if "kernel" in self.params[layer] else self.batch_stats)[layer]["kernel"]
        if kernel.shape != shape:
            raise ValueError(f"{layer}: x has {shape[-2]} features, which the kernel {kernel.shape} does not take")
        return kernel

    def _norm_state(self, layer, norm, shape):
        """As `init` makes it: trees without arrays are not stored."""
        stored = (tree.get(layer, {}).get("norm") for tree in (self.params, self.batch_stats))
        return tuple(norm.init(shape)[i] if one is None else one for i, one in enumerate(stored))


class _Drawing(Net):
    """A pass that only notes what there is: (tree, layer, name, make), make(key, init_scale, shift of the keys)."""

    def __init__(self, parts):
        super().__init__(parts, {}, {}, {}, True)
        self.made, self.count = [], 0

    def parameter(self, layer, name, shape, value=0.0):
        self.made.append((0, layer, name, lambda key, scale, shift: jnp.full(shape, value, jnp.float32)))
        return jnp.full(shape, value, jnp.float32)

    def _kernel(self, layer, shape, factor):
        number, self.count = self.count, self.count + 1
        scaled = layer != OUTPUT or self.parts.scaled_layers == "all"

        def make(key, init_scale, shift):
            kernel = self.parts.draw(jax.random.fold_in(key, number + shift), shape, init_scale if scaled else 1.0)
            return kernel if factor == 1 else factor * kernel

        frozen = self.parts.freeze_hidden and layer != OUTPUT
        self.made.append((int(frozen), layer, "kernel", make))
        return jnp.zeros(shape, jnp.float32)

    def _norm_state(self, layer, norm, shape):
        state = norm.init(shape)
        for tree, part in enumerate(state):
            if jax.tree.leaves(part):
                self.made.append((tree, layer, "norm", lambda key, scale, shift, tree=tree: norm.init(shape)[tree]))
        return state

    def repeat(self, layer, first, count, block, x):
        inner = _Drawing(self.parts)
        inner.count = self.count
        x = block(inner, layer, x)
        each = inner.count - self.count
        shifts = each * np.arange(count, dtype=np.uint32)
        self.count += each * count
        for tree, _, name, make in inner.made:
            stacked = functools.partial(_stacked, make, shifts)
            self.made.append((tree, layer, name, stacked))
        return x


def _form(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), tree)


def _as(new, old):
    """Arrays of the types of the old ones."""
    return jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), new, old)


def _stacked(make, shifts, key, init_scale, shift):
    return jax.vmap(lambda one: make(key, init_scale, one))(shifts + np.uint32(shift))


def check_sizes(features: Sequence[int], num_outputs: int) -> tuple[int, ...]:
    """The widths of the hidden layers. Raises ValueError for one, or a number of outputs, that is not positive."""
    features = tuple(features)
    if any(width < 1 for width in features):
        raise ValueError(f"features must be positive widths, got {features}")
    if num_outputs < 1:
        raise ValueError(f"num_outputs must be at least 1, got {num_outputs}")
    return features


def _check_batch(x):
    """Raises ValueError for a batch by which no network can be prepared."""
    if x.shape[0] < 2:
        raise ValueError(f"a network is prepared with a batch of at least 2 examples; got x {x.shape}")
    if not isinstance(x, jax.core.Tracer) and bool((x == x[:1]).all()):
        raise ValueError(f"a network is prepared with examples that differ; those of x {x.shape} are all the same")
