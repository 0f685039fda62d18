"""Networks of every family with every norm, and the images that they get."""

from typing import Any

import bnjax
from bnjax import models
from bnjax.types import Model
from experiments import common
from experiments.settings import require

GROUP_SIZE = 8
NAMES = common.NORM_NAMES | {"group": f"GroupNorm of {GROUP_SIZE}"}
# Networks without a norm that have something in its place: {name: (the arguments of the family, families)}.
FAMILIES = ("mlp", "conv", "residual")
INSTEAD = {
    "LSUV": ({"initializer": "lsuv"}, FAMILIES),
    "SkipInit": ({"branch": "skipinit"}, ("residual",)),
    "Fixup": ({"branch": "fixup"}, ("residual",)),
}
FROZEN = "BN, hidden frozen"


def network(family: str, norm: str, width: int, layers: int, **options: object) -> Model:
    """A network of that family: `width` units in `layers` layers; of images the channels double with each stride."""
    if norm == "group":
        options["norm"] = bnjax.norms.group(group_size=GROUP_SIZE)
    else:
        options["norm"] = norm
    if family == "mlp":
        return models.mlp((width,) * layers, **options)
    features = tuple(width * 2**i for i in range(layers))
    if family == "conv":
        return models.conv(features, **options)
    return models.residual(features, kind="conv", stem_stride=2, **options)


def pooled(ds: bnjax.Dataset, side: int) -> bnjax.Dataset:
    """Images [N, H, W, C] as the means over squares of `side` pixels a side, standardized."""
    splits = {name: common.pooled(getattr(ds, name), side) for name in ("train_x", "test_x")}
    return bnjax.data.standardize(ds._replace(**splits))


def check_groups(settings: Any, *fields: str) -> None:
    """Raises `Refused` for a number of channels that GroupNorm, if it is among the norms, cannot split."""
    for field in fields if "group" in settings.norms else ():
        words = f"must be a multiple of {GROUP_SIZE} with GroupNorm, got {getattr(settings, field)}"
        require(getattr(settings, field) % GROUP_SIZE == 0, field, words)
