"""Residual networks of pre-activation blocks (He et al. 2016b, "Identity mappings"), dense or convolutional.

    x_0 = stem(x)        x_{l+1} = shortcut(x_l) + branch_l(x_l)        outputs = mean of phi(norm(x_L)) W + b
    branch(x) = W_2 phi(norm(W_1 phi(norm(x))))      (with `norm_position="after_activation"`, norm(phi(...)))

The branch is one of

    plain       as above
    skipinit    times a learned scalar that starts at 0 (De & Smith 2020)
    fixup       W_1 times L^(-1/2), W_2 and the readout start at 0; a learned scalar multiplier, and scalar biases
                before the products and activations of stem and blocks (Zhang, Dauphin & Ma 2019, two layers a branch)

Where the number of channels grows, the shortcut has zeros in the new ones (He et al. 2016a, option A); of images it is
then the mean over 2 x 2 positions, and the branch has stride 2.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.choices import check, check_count
from bnjax.models.build import Net, Parts, build, check_sizes
from bnjax.models.conv import check_images
from bnjax.types import Model

KINDS = ("dense", "conv")
BRANCHES = ("plain", "skipinit", "fixup")


def residual(
    features: Sequence[int] = (128, 128, 128),
    num_outputs: int = 10,
    *,
    kind: str = "dense",
    branch: str = "plain",
    stem_stride: int = 1,
    **parts: Any,
) -> Model:
    """A residual network.

    Args:
      features: units or channels of each block; they must not fall.
      num_outputs: K.
      kind: "dense" for examples of any shape, which are flattened, or "conv" for images [N, H, W, C].
      branch: "plain", "skipinit" or "fixup"; the last two are meant to be without a norm.
      stem_stride: of the first convolution, of images.
      **parts: activation, norm, norm_position, initializer, scaled_layers, freeze_hidden, use_bias and the options of
        the norm, as of `bnjax.mlp`.

    Returns:
      `Model`. Its layers are `stem`, `block_i/0` and `block_i/1` (which are shown with `/norm`, `/activation` and
      `/preactivation`), `block_i` (the sum), `last` and `output`.

    Raises:
      ValueError: for an unknown name or a value out of range; when traced, for examples that are no images.
    """
    check("kind", kind, KINDS)
    check("branch", branch, BRANCHES)
    check_count("stem_stride", stem_stride)
    features = check_sizes(features, num_outputs)
    if not features or list(features) != sorted(features):
        raise ValueError(f"features must be of one block or more, and must not fall; got {features}")
    made = Parts.make(**parts)
    fixup = branch == "fixup"
    if fixup and (made.norms[0].kernel is not None or made.freeze_hidden):
        what = "freeze_hidden" if made.freeze_hidden else f"norm {made.config['norm']!r}"
        raise ValueError(f"branch 'fixup' starts kernels at 0, from where {what} does not let them go")
    if kind == "dense" and stem_stride != 1:
        raise ValueError(f"stem_stride is that of a convolution; with kind 'dense' it must be 1, got {stem_stride}")

    def shifted(net, layer, name, x):
        return x + net.parameter(layer, name, ()) if fixup else x

    def product(net, layer, x, width, stride=1, factor=1.0):
        x = shifted(net, layer, "input_bias", x)
        if kind == "dense":
            return net.dense(layer, x, width, factor=factor)
        return net.conv(layer, x, width, stride=stride, factor=factor)

    def activated(net, layer, x):
        return net.nonlinear(layer, shifted(net, layer, "activation_bias", x))

    def block(net, name, x, width):
        stride = 2 if kind == "conv" and width > x.shape[-1] else 1
        first, second = f"{name}/0", f"{name}/1"
        y = product(net, first, activated(net, first, x), width, stride, len(features) ** -0.5 if fixup else 1.0)
        y = net.show(f"{first}/preactivation", y)
        y = product(net, second, activated(net, second, y), width, factor=0.0 if fixup else 1.0)
        if branch != "plain":
            y = y * net.parameter(second, "multiplier", (), 1.0 if fixup else 0.0)
        y = net.show(f"{second}/preactivation", y)
        return net.show(name, _shortcut(x, width, stride) + y)

    def forward(net: Net, x):
        if kind == "conv":
            check_images("residual", x)
        else:
            x = x.reshape(len(x), -1)
        x = net.show("stem/preactivation", product(net, "stem", x, features[0], stem_stride))
        for i, width in enumerate(features):
            x = block(net, f"block_{i}", x, width)
        x = activated(net, "last", x)
        return net.readout(x.mean((1, 2)) if kind == "conv" else x, num_outputs, factor=0.0 if fixup else 1.0)

    config = {"model": "residual", "kind": kind, "branch": branch, "features": list(features)}
    config |= {"stem_stride": stem_stride} if kind == "conv" else {}
    return build(forward, made, {**config, "num_outputs": num_outputs})


def _shortcut(x: jax.Array, width: int, stride: int) -> jax.Array:
    if stride == 2:
        height, across = (size + size % 2 for size in x.shape[1:3])
        x = jnp.pad(x, ((0, 0), (0, height - x.shape[1]), (0, across - x.shape[2]), (0, 0)), mode="edge")
        x = x.reshape(len(x), height // 2, 2, across // 2, 2, -1).mean((2, 4))
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
