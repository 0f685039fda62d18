"""Normalizations as values: `bnjax.types.Norm`, by name or made with options.

    norm = bnjax.norms.get("layer")                 # by name, at its defaults
    norm = bnjax.norms.group(group_size=8)          # with options
    model = bnjax.mlp(norm=norm)                    # a value or a name

| name | what it divides by | source |
|---|---|---|
| `batch` | a channel's deviation over the batch | Ioffe & Szegedy 2015 |
| `layer` | an example's deviation over its features | Ba, Kiros & Hinton 2016 |
| `group` | an example's deviation over a group of channels | Wu & He 2018 |
| `rms` | an example's root mean square | Zhang & Sennrich 2019 |
| `l1`, `linf` | a channel's mean or largest distance from its mean over the batch | Hoffer et al. 2018 |
| `weight` | the length of a unit's weights | Salimans & Kingma 2016 |
| `weight_standardized` | the deviation of a unit's weights | Qiao et al. 2019; Brock et al. 2021 |
| `none` | nothing | |

A norm of one's own is a `bnjax.types.Norm` as any of these.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from bnjax.choices import choose
from bnjax.norms.batch import batch
from bnjax.norms.group import group
from bnjax.norms.layer import layer
from bnjax.norms.lp import lp
from bnjax.norms.none import none
from bnjax.norms.rms import rms
from bnjax.norms.weight import weight
from bnjax.norms.weight_standardized import weight_standardized
from bnjax.types import Norm

__all__ = ["NORMS", "batch", "get", "group", "layer", "lp", "none", "rms", "weight", "weight_standardized"]


NORMS: Mapping[str, Callable[..., Norm]] = MappingProxyType(
    {
        "batch": batch,
        "none": none,
        "layer": layer,
        "group": group,
        "rms": rms,
        "l1": functools.partial(lp, 1),
        "linf": functools.partial(lp, math.inf),
        "weight": weight,
        "weight_standardized": weight_standardized,
    }
)


def get(norm: str | Norm, **options: Any) -> Norm:
    """The norm of that name, made with these options; a value is returned as it is.

    Args:
      norm: a name of `NORMS`, or a `bnjax.types.Norm`.
      **options: of the function of that name; beside a value there must be none.

    Raises:
      ValueError: for an unknown name, an option that the norm does not have or that is out of range, options beside a
        value, or a value that acts on kernels and on activations, or is prepared without a kernel.
    """
    if isinstance(norm, Norm):
        if options:
            raise ValueError(f"{', '.join(options)} must be given to the norm itself, {norm.config or norm}")
        if norm.apply is not None and norm.kernel is not None:
            raise ValueError(f"a norm acts on kernels or on activations; {norm.config or norm} has both functions")
        if norm.prepare is not None and norm.kernel is None:
            raise ValueError(f"prepare is for norms of kernels; {norm.config or norm} has no kernel")
        return norm
    make = choose("norm", norm, NORMS)
    taken = inspect.signature(make).parameters
    if unknown := [name for name in options if name not in taken]:
        raise ValueError(f"norm {norm!r} takes {', '.join(taken) or 'no options'}; got {unknown}")
    return make(**options)
