"""Deep multilayer perceptrons: `mlp` of equal layers, which are scanned, so that compiling does not take longer.

`params` is `{"hidden_0": ..., "hidden": arrays stacked over layers 1 to L - 1, "output": ...}`. The initialization is
that of `mlp` with the same key, bit for bit.
"""

from typing import Any

from bnjax import choices
from bnjax.models.build import Net, Parts, build, check_sizes
from bnjax.types import Model


def deep(depth: int = 50, width: int = 128, num_outputs: int = 10, **parts: Any) -> Model:
    """A multilayer perceptron of `depth` hidden layers of `width` units.

    Args:
      depth: L, at least 2.
      width: units of each hidden layer.
      num_outputs: K.
      **parts: activation, norm, norm_position, initializer, scaled_layers, freeze_hidden, use_bias and the options of
        the norm, as of `bnjax.mlp`.

    Returns:
      `Model`. Its `layers` shows the names of `mlp`, layer by layer, and is compiled in a time that grows with L.

    Raises:
      ValueError: for an unknown name or a value out of range.
    """
    choices.check_count("depth", depth)
    if depth < 2:
        raise ValueError(f"depth must be at least 2, got {depth}")
    check_sizes((width,), num_outputs)
    made = Parts.make(**parts)

    def block(net: Net, name, x):
        return net.activated(name, net.dense(name, x, width))

    def forward(net: Net, x):
        x = block(net, "hidden_0", x.reshape(len(x), -1))
        return net.readout(net.repeat("hidden", 1, depth - 1, block, x), num_outputs)

    return build(forward, made, {"model": "deep", "features": [width] * depth, "num_outputs": num_outputs})
