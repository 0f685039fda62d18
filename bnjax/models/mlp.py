"""Multilayer perceptrons with any norm, or without.

Layer i of L hidden ones, as `norm_position="before_activation"` has it:

    preactivation_i = x_i W_i (+ b_i)       norm_i = norm(preactivation_i)       x_{i+1} = phi(norm_i)

With `"after_activation"` it is x_{i+1} = norm(phi(preactivation_i)). The output layer is x W + b, without a
norm. `params` is `{"hidden_0": {"kernel", "bias"?, "norm"?}, ..., "output": {"kernel", "bias"}}`, and
`batch_stats` is `{"hidden_0": {"norm"}, ...}`. The kernels are the same draw for the same key, whatever
the norm. Frozen kernels stand in `batch_stats`, among what no optimizer touches.
"""

from typing import Any

from bnjax.models.build import Net, Parts, build, check_sizes
from bnjax.types import Model, Norm


def mlp(
    features: tuple[int, ...] = (128, 128, 128),
    num_outputs: int = 10,
    activation: str = "relu",
    norm: str | Norm = "batch",
    norm_position: str = "before_activation",
    initializer: str = "he_normal",
    *,
    scaled_layers: str = "hidden",
    freeze_hidden: bool = False,
    use_bias: bool | None = None,
    **norm_options: Any,
) -> Model:
    """A multilayer perceptron.

    Args:
      features: widths of the hidden layers; () gives a linear classifier.
      num_outputs: K, the number of classes.
      activation: of the hidden layers, by name (`bnjax.activations`); functions are not taken.
      norm: of the hidden layers, by name or as a value (`bnjax.norms`).
      norm_position: "before_activation" or "after_activation". Norms of kernels act where the kernel does.
      initializer: of all kernels, by name (`bnjax.initializers`).
      scaled_layers: which kernels `init_scale` multiplies: "hidden", or "all" for the output layer's too.
      freeze_hidden: keep the hidden kernels at their initial draw. Biases, the norm's scale and bias, and the output
        layer still learn.
      use_bias: of the hidden layers. None: only where no norm of activations follows directly.
      **norm_options: of a norm by name: batch normalization's `epsilon=1e-5` (inside the square root; or an array, one
        for each hidden layer; it may be traced), `momentum=0.9` (the weight of the old running statistics) and
        `detach=()` (`batch_norm.apply`). A value has been given its own.

    Returns:
      `Model`; its `init` takes any input shape, its `apply` flattens each example. The names that its
      `layers` shows are `hidden_i/preactivation`, `hidden_i/norm`, `hidden_i/activation` and `output`.

    Raises:
      ValueError: for an unknown name, a value out of range, or options beside a norm that is a value.
    """
    features = check_sizes(features, num_outputs)
    parts = Parts.make(
        activation,
        norm,
        norm_position,
        initializer,
        scaled_layers=scaled_layers,
        freeze_hidden=freeze_hidden,
        use_bias=use_bias,
        num_layers=len(features),
        **norm_options,
    )

    def forward(net: Net, x):
        x = x.reshape(len(x), -1)
        for i, width in enumerate(features):
            name = f"hidden_{i}"
            x = net.activated(name, net.dense(name, x, width))
        return net.readout(x, num_outputs)

    return build(forward, parts, {"model": "mlp", "features": list(features), "num_outputs": num_outputs})
