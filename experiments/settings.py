"""Settings of claims as flags: the fields of frozen dataclasses become absl flags.

A field that is the same in all claims of a script that have it is `--field`; one that differs is `--CLAIM.field`. Only
this module and the mains touch absl's flags.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from absl import flags

from bnjax.sweeps import grid
from bnjax.types import Hyperparams
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


def at_least(settings: Any, **least: float | int) -> None:
    """Raises `Refused` for a field that is below this."""
    for field, value in least.items():
        require(getattr(settings, field) >= value, field, f"must be at least {value}, got {getattr(settings, field)}")


def positive(settings: Any, *fields: str) -> None:
    """Raises `Refused` for a field that is not above 0 and finite."""
    for field in fields:
        value = getattr(settings, field)
        require(0 < value < math.inf, field, f"must be above 0 and finite, got {value}")


def check_axis(settings: Any, field: str, axis: str) -> None:
    """Raises `Refused` for values that no network can be trained with: of a sweep's axis such as "learning_rate"."""
    try:
        grid.check({axis: list(getattr(settings, field))}, Hyperparams())
    except ValueError as error:
        raise Refused(field, f"cannot be swept: {error}") from None


def define(claims: Sequence[HasSettings]) -> None:
    """Defines the flags of all their settings, with quick and full defaults side by side in the help."""
    for flag, (claim, field) in _flags(claims).items():
        quick, full = (_text(getattr(values, field.name)) for values in (claim.quick, claim.full))
        both = quick if quick == full else f"{quick}; with --full, {full}"
        kind = _type(claim, field)
        one = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
        define_one = one.get(kind, flags.DEFINE_string) if not field.metadata["parse"] else flags.DEFINE_string
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


def stored(settings: Any) -> dict[str, Any]:
    """Settings as a report holds them; long ranges of seeds as text."""
    values = dataclasses.asdict(settings)
    return {name: _text(value) if _is_long_range(value) else value for name, value in values.items()}


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
    """The parts that have to be equal for two claims to share a flag."""
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


def parse_counts(flag: str, text: str, least: int = 1) -> list[int]:
    """`1,2,5`: different numbers of at least `least`, ascending.

    Raises:
      ValueError: naming the flag, for any other text.
    """
    try:
        found = sorted(int(part) for part in text.split(","))
    except ValueError:
        found = [least - 1]
    if found[0] < least or found[-1] >= 2**31 or len({*found}) < len(found):
        raise ValueError(f"--{flag} takes different numbers '1,2,5' of at least {least}, got {text!r}")
    return found


def _text(value):
    if _is_long_range(value):
        return f"{value[0]}:{value[-1] + 1}"
    if isinstance(value, tuple):
        if len(value) > 4 and isinstance(value[0], float):
            short = f"{value[0]:g}:{value[-1]:g}:{len(value)}"
            if 0 < value[0] < value[-1] and common.parse_floats("", short) == [*value]:
                return short
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _is_long_range(value):
    long = isinstance(value, tuple) and len(value) > 20 and isinstance(value[0], int)
    return long and value == tuple(range(value[0], value[0] + len(value)))
