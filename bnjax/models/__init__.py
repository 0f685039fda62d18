"""Networks as `Model` values: families by name.

model = bnjax.models.get("conv")(features=(16, 32), norm="layer")
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from bnjax.choices import choose
from bnjax.models.conv import conv
from bnjax.models.deep import deep
from bnjax.models.mlp import mlp
from bnjax.models.residual import residual
from bnjax.types import Model

__all__ = ["MODELS", "conv", "deep", "get", "mlp", "residual"]

MODELS: Mapping[str, Callable[..., Model]] = MappingProxyType(
    {"mlp": mlp, "deep": deep, "conv": conv, "residual": residual}
)


def get(name: str) -> Callable[..., Model]:
    """The function that makes networks of that family.

    Raises:
      ValueError: for an unknown name; it lists the known ones.
    """
    return choose("model", name, MODELS)
