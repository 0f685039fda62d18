"""Allowed values of arguments: names of a table, new names, counts. The errors say what is allowed."""

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

Value = TypeVar("Value")
NO_ALIASES: Mapping[str, str] = MappingProxyType({})
LONGEST_NAME = 255  # bytes, of a file's on most systems
NOT_IN_NAMES = re.compile(r"[/\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check(argument: str, name: str, allowed: Iterable[str], aliases: Mapping[str, str] = NO_ALIASES) -> None:
    """Raises a ValueError that lists what is allowed, and the nearest to `name`, unless it is one of them.

    Args:
      argument: what is named, for the message.
      name: the one given.
      allowed: the names that there are.
      aliases: {name that is used elsewhere: the allowed one}, for the message only.
    """
    allowed = list(allowed)
    if name in allowed:
        return
    if not isinstance(name, str):
        raise ValueError(f"{argument} must be one of these names: {', '.join(allowed)}; got {name!r}")
    known = [*aliases, *allowed]
    nearest = [aliases.get(n, n) for n in difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)]
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise ValueError(f"unknown {argument} {name!r}{hint}; allowed: {', '.join(allowed)}")


def choose(argument: str, name: str, table: Mapping[str, Value], aliases: Mapping[str, str] = NO_ALIASES) -> Value:
    """`table[name]`, or the error of `check`."""
    check(argument, name, table, aliases)
    return table[name]


def check_name(argument: str, name: Any) -> None:
    """Raises a ValueError unless results can be stored under this name, which may become a file's."""
    odd = not isinstance(name, str) or name in ("", ".", "..") or NOT_IN_NAMES.search(name)
    if odd or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"{argument} must be a string that can name a file (not empty, '.' or '..'; no '/', control characters or "
            f"surrogates; at most {LONGEST_NAME} bytes), got {name!r}"
        )


def is_integer(value: Any) -> bool:
    """Of Python or numpy; truth values are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_count(argument: str, value: Any) -> None:
    """Raises a ValueError unless it is a whole number in [1, 2^31): compiled programs count in 32 bits."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{argument} must be a positive integer, got {value!r}")
    if value >= 2**31:
        raise ValueError(f"{argument} must be below 2^31, got {value!r}")


def check_positive(argument: str, value: numbers.Real) -> None:
    """Raises a ValueError unless it is above 0 and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{argument} must be above 0 and finite, got {value}")
