"""Looking a name up in a table of allowed ones, with an error that helps."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def check(argument: str, name: str, allowed: Iterable[str]) -> None:
    """Raises a ValueError that lists what is allowed, and the nearest to `name`, unless it is one of them."""
    allowed = list(allowed)
    if name in allowed:
        return
    nearest = difflib.get_close_matches(str(name).lower(), allowed, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise ValueError(f"unknown {argument} {name!r}{hint}; allowed: {', '.join(allowed)}")


def choose(argument: str, name: str, table: Mapping[str, Value]) -> Value:
    """`table[name]`, or the error of `check`."""
    check(argument, name, table)
    return table[name]
