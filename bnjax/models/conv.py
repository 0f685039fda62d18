"""Convolutional networks for images: 3x3 convolutions, the mean over all positions, a linear readout.

preactivation_i = x_i * W_i (+ b_i)      x_{i+1} = phi(norm(preactivation_i))      outputs = mean over positions W + b
"""

from collections.abc import Sequence
from typing import Any

from bnjax import choices
from bnjax.models.build import Net, Parts, build, check_sizes
from bnjax.types import Array, Model


def conv(
    features: Sequence[int] = (16, 32, 32), num_outputs: int = 10, *, strides: Sequence[int] | None = None, **parts: Any
) -> Model:
    """A convolutional network for images [N, H, W, C].

    Args:
      features: channels of the hidden layers.
      num_outputs: K.
      strides: of each layer. None: 1 for the first, 2 for the others.
      **parts: activation, norm, norm_position, initializer, scaled_layers, freeze_hidden, use_bias and the options of
        the norm, as of `bnjax.mlp`.

    Returns:
      `Model`, whose `layers` shows the names of `mlp`.

    Raises:
      ValueError: for an unknown name or a value out of range; when traced, for examples that are no images.
    """
    features = check_sizes(features, num_outputs)
    strides = (1, *[2] * (len(features) - 1))[: len(features)] if strides is None else tuple(strides)
    if len(strides) != len(features):
        raise ValueError(f"strides must be one for each of {len(features)} layers, got {strides}")
    for stride in strides:
        choices.check_count("strides", stride)
    made = Parts.make(num_layers=len(features), **parts)

    def forward(net: Net, x):
        check_images("conv", x)
        for i, (channels, stride) in enumerate(zip(features, strides, strict=True)):
            name = f"hidden_{i}"
            x = net.activated(name, net.conv(name, x, channels, stride=stride))
        return net.readout(x.mean((1, 2)), num_outputs)

    config = {"model": "conv", "features": list(features), "strides": list(strides), "num_outputs": num_outputs}
    return build(forward, made, config)


def check_images(model: str, x: Array) -> None:
    """Raises ValueError unless x is [N, H, W, C]."""
    if x.ndim != 4:
        raise ValueError(f"model {model!r} takes images [H, W, C]; got examples of shape {x.shape[1:]}")
