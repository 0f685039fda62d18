"""Settings of claims as flags: the fields of frozen dataclasses become absl flags.

A field that is the same in all claims of a script that have it is `--field`; one that differs is `--CLAIM.field`. Only
this module and the mains touch absl's flags.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from absl import flags

from experiments import common

flags.disclaim_key_flags()  # they belong to the script that asks for them


class HasSettings(Protocol):
    """A claim, as far as it matters here."""

    name: str
    settings: type
    quick: Any
    full: Any


class Refused(ValueError):
    """A value that a field of the settings must not have."""

    def __init__(self, field: str, words: str):
        super().__init__(f"{field} {words}")
        self.field, self.words = field, words


def setting(default: Any, words: str, parse: Callable[[str, str], Any] | None = None) -> Any:
    """A field of settings.

    Args:
      default: its value.
      words: what it is, for the flag's help.
      parse: (flag, text) -> value; default: by the field's type.
    """
    return dataclasses.field(default=default, metadata={"words": words, "parse": parse})


def require(holds: bool, field: str, words: str) -> None:
    """Raises `Refused` unless it holds; of use in `__post_init__`. `words`: "must be ..., got ..."."""
    if not holds:
        raise Refused(field, words)


def define(claims: Sequence[HasSettings]) -> None:
    """Defines the flags of all their settings, with quick and full defaults side by side in the help."""
    for flag, (claim, field) in _flags(claims).items():
        quick, full = (_text(getattr(values, field.name)) for values in (claim.quick, claim.full))
        both = quick if quick == full else f"{quick}; with --full, {full}"
        kind = _type(claim, field)
        one = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
        define_one = (
            one.get(kind, flags.DEFINE_string) if not field.metadata["parse"] else flags.DEFINE_string
        )
        define_one(flag, None, f"{field.metadata['words']} Default: {both}.")


def parse(claim: HasSettings, claims: Sequence[HasSettings], *, full: bool) -> Any:
    """The claim's settings: quick or full ones, but for the flags that are given.

    Raises:
      ValueError: naming the flag, for a value that its field must not have.
    """
    base, given, flag_of = claim.full if full else claim.quick, {}, _flags_of(claim, claims)
    for field in dataclasses.fields(claim.settings):
        flag = flag_of[field.name]
        value = flags.FLAGS[flag].value
        if value is not None:
            given[field.name] = _parsed(claim, field, flag, value)
    try:
        return dataclasses.replace(base, **given)
    except Refused as error:
        raise ValueError(f"--{flag_of[error.field]} {error.words}") from None


def _flags(claims) -> Mapping[str, tuple[HasSettings, dataclasses.Field]]:
    """{flag: (a claim that has it, its field)}."""
    found = {}
    for claim in claims:
        names = _flags_of(claim, claims)
        for field in dataclasses.fields(claim.settings):
            found.setdefault(names[field.name], (claim, field))
    return found


def _flags_of(claim, claims) -> dict[str, str]:
    """{field: flag} of one claim."""
    found = {}
    for field in dataclasses.fields(claim.settings):
        same = {_declared(other, mine) for other, mine in _having(claims, field.name)}
        found[field.name] = field.name if len(same) == 1 else f"{claim.name}.{field.name}"
    return found


def _having(claims, name) -> Iterator[tuple[HasSettings, dataclasses.Field]]:
    for claim in claims:
        for field in dataclasses.fields(claim.settings):
            if field.name == name:
                yield claim, field


def _declared(claim, field):
    """What has to be equal for two claims to share a flag."""
    values = (getattr(claim.quick, field.name), getattr(claim.full, field.name))
    return str(_type(claim, field)), field.metadata["words"], *values


def _type(claim, field):
    return typing.get_type_hints(claim.settings)[field.name]


def _parsed(claim, field, flag, value):
    kind = _type(claim, field)
    if field.metadata["parse"]:
        value = field.metadata["parse"](flag, value)
    elif kind == tuple[float, ...]:
        value = common.parse_floats(flag, value)
    elif kind == tuple[int, ...]:
        value = parse_counts(flag, value)
    elif kind == tuple[str, ...]:
        value = value.split(",")
    else:
        common.check_size(flag, value)
    return tuple(value) if isinstance(value, list) else value


def parse_counts(flag: str, text: str) -> list[int]:
    """`1,2,5`: different numbers of at least 1, ascending.

    Raises:
      ValueError: naming the flag, for any other text.
    """
    try:
        found = sorted(int(part) for part in text.split(","))
    except ValueError:
        found = [0]
    if found[0] < 1 or found[-1] >= 2**31 or len({*found}) < len(found):
        raise ValueError(f"--{flag} takes different numbers '1,2,5' of at least 1, got {text!r}")
    return found


def _text(value):
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
