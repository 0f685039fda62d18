"""The grid of a sweep: labelled axes -> cells, in row-major order."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bnjax import choices
from bnjax.types import Hyperparams, check_value, check_values, range_of


def check(axes: Mapping[str, Any], hyper: Hyperparams) -> dict[str, np.ndarray]:
    """The axes as arrays, after checking them and the values of what is not swept.

    Raises:
      ValueError: for an unknown axis, an axis that is empty or has equal values (in the precision of the
        compiled program), or a value out of range.
    """
    check_values(hyper)
    result = {}
    for name, values in axes.items():
        try:
            choices.check("axis", name, hyper.named())
        except ValueError as error:
            raise ValueError(
                f"{error}; others are names in Hyperparams.extra, or keywords of a function (or class) that makes the "
                "network, given in its place"
            ) from None
        if not isinstance(values, Iterable) or isinstance(values, str):
            raise ValueError(f"axis {name} takes a list of values, got {values!r}")
        values = list(values)
        if not values:
            raise ValueError(f"axis {name} is empty")
        for value in values:
            check_value(name, value)
        used, counts = np.unique(np.asarray(values).astype(range_of(name).dtype), return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"axis {name} has duplicate values: {', '.join(f'{v:g}' for v in used[counts > 1])}")
        result[name] = np.asarray(values, np.int64 if name == "seed" else np.float64)
    return result


def cells(axes: Mapping[str, np.ndarray], hyper: Hyperparams) -> Hyperparams:
    """One entry per cell, [cells] in each field, the last axis fastest; what is no axis keeps its value in `hyper`."""
    shape = tuple(len(values) for values in axes.values())
    mesh = dict(zip(axes, np.meshgrid(*axes.values(), indexing="ij"), strict=True))
    return Hyperparams.from_named(
        {
            name: np.broadcast_to(mesh.get(name, value), shape).reshape(-1).astype(range_of(name).dtype)
            for name, value in hyper.named().items()
        }
    )


def positions(axes: Mapping[str, np.ndarray], hyper: Hyperparams, wanted: Hyperparams) -> np.ndarray:
    """Where cells (in the precision of the compiled program) are in the order of `cells`; -1: nowhere. [wanted]."""
    place, inside = np.zeros(len(wanted.seed), np.int64), np.ones(len(wanted.seed), bool)
    values, wanted = hyper.named(), wanted.named()
    if {*values} != {*wanted}:  # other names in `extra`
        return np.full(len(place), -1)
    for name in [*axes, *(set(values) - {*axes})]:
        used = np.atleast_1d(axes.get(name, values[name])).astype(range_of(name).dtype)
        order = np.argsort(used)
        at = order[np.minimum(np.searchsorted(used[order], wanted[name]), len(used) - 1)]
        inside &= used[at] == wanted[name]
        place = place * len(used) + at
    return np.where(inside, place, -1)
