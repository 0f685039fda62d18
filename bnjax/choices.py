"""Looking a name up in a table of allowed ones, with an error that helps."""

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

Value = TypeVar("Value")
NO_ALIASES: Mapping[str, str] = MappingProxyType({})


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


def choose(
    argument: str, name: str, table: Mapping[str, Value], aliases: Mapping[str, str] = NO_ALIASES
) -> Value:
    """`table[name]`, or the error of `check`."""
    check(argument, name, table, aliases)
    return table[name]
