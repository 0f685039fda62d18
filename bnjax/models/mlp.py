"""Multilayer perceptrons, with batch normalization or without.

Layer i of L hidden ones, as `norm_position="before_activation"` has it:

    preactivation_i = x_i W_i (+ b_i)       norm_i = BN(preactivation_i)       x_{i+1} = phi(norm_i)

With `"after_activation"` it is x_{i+1} = BN(phi(preactivation_i)). The output layer is x W + b, without a
norm. `params` is `{"hidden_0": {"kernel", "bias"?, "norm"?}, ..., "output": {"kernel", "bias"}}`, and
`batch_stats` is `{"hidden_0": {"norm"}, ...}`. The kernels are the same draw for the same key, whatever
the norm. Frozen kernels stand in `batch_stats`, among what no optimizer touches.
"""

import math

import jax
import jax.numpy as jnp

from bnjax import activations, batch_norm, initializers
from bnjax.choices import check
from bnjax.types import Array, Model

NORMS = ("batch", "none")
NORM_POSITIONS = ("before_activation", "after_activation")
SCALED_LAYERS = ("hidden", "all")


def mlp(
    features: tuple[int, ...] = (128, 128, 128),
    num_outputs: int = 10,
    activation: str = "relu",
    norm: str = "batch",
    norm_position: str = "before_activation",
    initializer: str = "he_normal",
    *,
    epsilon: float | Array = 1e-5,
    momentum: float | None = 0.9,
    scaled_layers: str = "hidden",
    freeze_hidden: bool = False,
    use_bias: bool | None = None,
    detach: tuple[str, ...] = (),
) -> Model:
    """A multilayer perceptron.

    Args:
      features: widths of the hidden layers; () gives a linear classifier.
      num_outputs: K, the number of classes.
      activation: of the hidden layers, by name (`bnjax.activations`); functions are not taken.
      norm: of the hidden layers: "batch" or "none".
      norm_position: "before_activation" or "after_activation".
      initializer: of all kernels, by name (`bnjax.initializers`).
      epsilon: batch normalization's, inside the square root; or an array, one for each hidden layer. It may be traced.
      momentum: batch normalization's weight of the old running statistics.
      scaled_layers: which kernels `init_scale` multiplies: "hidden", or "all" for the output layer's too.
      freeze_hidden: keep the hidden kernels at their initial draw. Biases, batch normalization's scale
        and bias, and the output layer still learn.
      use_bias: of the hidden layers. None: only where no norm follows directly, which would cancel it.
      detach: which batch statistics, "mean" and "var", are constants to the derivative (`batch_norm.apply`).

    Returns:
      `Model`; its `init` takes any input shape, its `apply` flattens each example. The names that its
      `layers` shows are `hidden_i/preactivation`, `hidden_i/norm`, `hidden_i/activation` and `output`.

    Raises:
      ValueError: for an unknown name or a value out of range.
    """
    features = tuple(features)
    if any(width < 1 for width in features):
        raise ValueError(f"features must be positive widths, got {features}")
    if num_outputs < 1:
        raise ValueError(f"num_outputs must be at least 1, got {num_outputs}")
    shape = jnp.shape(epsilon)
    if shape not in ((), (len(features),)):
        words = f"one number or one for each of {len(features)} hidden layers"
        raise ValueError(f"epsilon must be {words}, got shape {shape}")
    epsilons = list(epsilon) if shape else [epsilon] * len(features)
    for one in epsilons:
        batch_norm.check_epsilon(one)
    batch_norm.check_detach(detach)
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum (of the running statistics) must be None or in [0, 1], got {momentum}")
    phi = activations.get(activation)
    draw = initializers.get(initializer)
    check("norm", norm, NORMS)
    check("norm_position", norm_position, NORM_POSITIONS)
    check("scaled_layers", scaled_layers, SCALED_LAYERS)
    if use_bias is None:
        use_bias = norm == "none" or norm_position == "after_activation"
    hidden = tuple(f"hidden_{i}" for i in range(len(features)))
    epsilon_of = dict(zip(hidden, epsilons, strict=True))

    def init(key, input_shape, init_scale=1.0):
        params, batch_stats = {}, {}
        fan_in = math.prod(input_shape)
        for i, (name, width) in enumerate(zip(hidden, features, strict=True)):
            kernel = draw(jax.random.fold_in(key, i), (fan_in, width), init_scale)
            params[name], batch_stats[name] = {}, {}
            (batch_stats if freeze_hidden else params)[name]["kernel"] = kernel
            if use_bias:
                params[name]["bias"] = jnp.zeros(width, kernel.dtype)
            if norm == "batch":
                params[name]["norm"], batch_stats[name]["norm"] = batch_norm.init(width)
            fan_in = width
        output_scale = init_scale if scaled_layers == "all" else 1.0
        kernel = draw(jax.random.fold_in(key, len(features)), (fan_in, num_outputs), output_scale)
        params["output"] = {"kernel": kernel, "bias": jnp.zeros(num_outputs, kernel.dtype)}
        return params, batch_stats

    def forward(params, batch_stats, x, offsets, train):
        shown, new_stats = {}, {}

        def show(name, value):
            shown[name] = value + offsets[name] if name in offsets else value
            return shown[name]

        def normalize(name, x):
            y, new_stats[name]["norm"] = batch_norm.apply(
                params[name]["norm"],
                batch_stats[name]["norm"],
                x,
                train=train,
                momentum=momentum,
                epsilon=epsilon_of[name],
                detach=detach,
            )
            return show(f"{name}/norm", y)

        x = x.reshape(len(x), -1)
        for name in hidden:
            new_stats[name] = dict(batch_stats[name])
            x = x @ (batch_stats if freeze_hidden else params)[name]["kernel"]
            if use_bias:
                x = x + params[name]["bias"]
            x = show(f"{name}/preactivation", x)
            if norm == "batch" and norm_position == "before_activation":
                x = normalize(name, x)
            x = show(f"{name}/activation", phi(x))
            if norm == "batch" and norm_position == "after_activation":
                x = normalize(name, x)
        outputs = show("output", x @ params["output"]["kernel"] + params["output"]["bias"])
        return outputs, new_stats, shown

    def apply(params, batch_stats, x, *, train):
        outputs, new_stats, _ = forward(params, batch_stats, x, {}, train)
        return outputs, new_stats

    def layers(params, batch_stats, x, offsets, *, train):
        outputs, _, shown = forward(params, batch_stats, x, offsets, train)
        unknown = set(offsets) - set(shown)
        if unknown:
            raise ValueError(f"unknown offsets {sorted(unknown)}; allowed: {', '.join(shown)}")
        return outputs, shown

    config = {
        "model": "mlp",
        "features": list(features),
        "num_outputs": num_outputs,
        "activation": activation,
        "norm": norm,
        "norm_position": norm_position,
        "initializer": initializer,
        "epsilon": [e if isinstance(e, jax.core.Tracer) else float(e) for e in epsilons] if shape else epsilon,
        "momentum": momentum,
        "scaled_layers": scaled_layers,
        "freeze_hidden": freeze_hidden,
        "use_bias": use_bias,
        **({"detach": list(detach)} if detach else {}),
    }
    return Model(init, apply, layers, config)
