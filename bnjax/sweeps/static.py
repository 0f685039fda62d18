"""Axes that are keywords of a function that makes networks: each combination of their values is a network."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from bnjax import choices
from bnjax.types import Hyperparams

PREFIX = "model."  # before a keyword that has the name of a hyperparameter, too


def is_maker(value: Any) -> bool:
    """A function, method or class; not whatever can be called."""
    return inspect.isroutine(value) or isinstance(value, type | functools.partial)


def split(
    make_model: Callable, axes: Mapping[str, Iterable], hyper: Hyperparams
) -> tuple[dict[str, list], dict[str, Iterable]]:
    """(the axes that are keywords of the function, the others).

    Raises:
      ValueError: for an axis that is a hyperparameter as well, or neither; values that are no list of different numbers
        or of different strings; or if the function has an argument that is no axis and has no default.
    """
    arguments = _arguments(make_model)
    keywords = {one.name for one in arguments if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    if {"parent", "name"} <= keywords:  # of a linen module, which sets them itself
        keywords -= {"parent", "name"}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in arguments)
    static, others = {}, {}
    for axis, values in axes.items():
        if axis in hyper.named():
            if axis in keywords and PREFIX + axis not in axes:
                raise ValueError(
                    f"axis {axis} is a hyperparameter and an argument of the function that makes the network: "
                    f"name the axis {PREFIX + axis!r}, or give a function without the argument"
                )
            others[axis] = values
        else:
            keyword = _keyword(axis)
            if keyword not in keywords and not (takes_any and str(keyword).isidentifier()):
                choices.check("axis", axis, [*hyper.named(), *keywords])
            static[axis] = _checked(axis, values)
    given = {_keyword(axis) for axis in static}
    if len(given) < len(static):
        raise ValueError(f"axes name an argument of the function that makes the network twice: {[*static]}")
    needed = {one.name for one in arguments if one.name in keywords and one.default is one.empty}
    if missing := sorted(needed - given):
        raise ValueError(
            f"the function that makes the network has the arguments {missing}, which are no axes and have no default; "
            "one that takes `rngs` or `key` is given by bnjax.interop.nnx.as_model or bnjax.interop.equinox.as_model"
        )
    return static, others


def networks(make_model: Callable, static: Mapping[str, list]) -> dict[str, Any]:
    """{its name, such as "width=8, depth=2": the network}, the last axis fastest."""
    found = {}
    for values in itertools.product(*static.values()):
        chosen = dict(zip(static, values, strict=True))
        name = ", ".join(f"{axis}={value}" for axis, value in chosen.items())
        found[name] = make_model(**{_keyword(axis): value for axis, value in chosen.items()})
    return found


def _arguments(make_model):
    """Of a class those of its `__init__`: metaclasses hide them."""
    if getattr(make_model, "__init__", None) is object.__init__:
        return []
    if isinstance(make_model, type):
        return [*inspect.signature(make_model.__init__).parameters.values()][1:]
    return [*inspect.signature(make_model).parameters.values()]


def _keyword(axis):
    return axis.removeprefix(PREFIX) if isinstance(axis, str) else axis


def _checked(axis, values):
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"axis {axis} takes a list of values, got {values!r}")
    values = list(values)
    words = all(isinstance(value, str) for value in values)
    for value in values if words else ():
        choices.check_name(f"a value of the axis {axis}", value)
    array = np.asarray(values, object if words else None)
    if array.ndim != 1 or not (words or array.dtype.kind in "biuf"):
        raise ValueError(f"axis {axis} takes numbers, or strings, got {values!r}")
    if not len(array) or len(np.unique(array)) < len(array):
        raise ValueError(f"axis {axis} takes different values, at least one, got {values!r}")
    return [value.item() if isinstance(value, np.generic) else value for value in values]  # for JSON
