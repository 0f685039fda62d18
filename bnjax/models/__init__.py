"""Networks as `Model` values: families by name.

    model = bnjax.models.conv(features=(16, 32), norm="layer")
    model = bnjax.models.make("conv", depth=2, width=16, norm="layer")

All take the activation, the norm and its position, the initializer and what is scaled or frozen, as `bnjax.mlp` does.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from bnjax.choices import choose
from bnjax.models.conv import conv
from bnjax.models.deep import deep
from bnjax.models.mlp import mlp
from bnjax.models.residual import residual
from bnjax.types import Model

__all__ = ["MODELS", "conv", "deep", "get", "make", "mlp", "residual"]

MODELS: Mapping[str, Callable[..., Model]] = MappingProxyType(
    {"mlp": mlp, "deep": deep, "conv": conv, "residual": residual}
)


def make(name: str, depth: int, width: int, **options: Any) -> Model:
    """A network of that family with `depth` layers (or residual blocks) of `width` units (or channels).

    Args:
      name: of the family.
      depth: number of hidden layers or blocks.
      width: of each.
      **options: as of the family's function.

    Raises:
      ValueError: for an unknown name, or as the family's function.
    """
    family = get(name)
    return family(depth, width, **options) if name == "deep" else family((width,) * depth, **options)


def get(name: str) -> Callable[..., Model]:
    """The function that makes networks of that family.

    Raises:
      ValueError: for an unknown name; it lists the known ones.
    """
    return choose("model", name, MODELS)
