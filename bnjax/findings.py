"""Claims that numbers bear out, or not: of papers, of experiments, of a user's own network.

A `Check` holds a number, one or one per seed, to a bound. A `Finding` is a claim with the checks that it stands or
falls with. Tables, JSON and verdicts are made of the numbers that were judged, so that none is written twice.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000  # of the bootstrap
HOLDS = ("median", "all", "interval")
# {unit: (factor, format, what follows each number, what follows all)}; other units follow plain numbers.
UNITS = {"%": (100, ".1f", "%", ""), "points": (100, "+.1f", "", " points"), "": (1, "", "", "")}


def number(value: float | int, unit: str = "") -> str:
    """Three digits and the unit: 0.0123, 1.5e-4, 10174 and 12 degrees; of fractions 81.4% and +3.2 points."""
    return spread([value], unit)


def spread(values: Sequence[float | int] | np.ndarray, unit: str = "") -> str:
    """`median [lowest, highest]` and the unit; of one value the value."""
    factor, form, each, after = UNITS.get(unit, (1, "", "", f" {unit}"))
    values = factor * np.asarray(values, float).ravel()
    middle, low, high = (_digits(one, form) + each for one in (np.median(values), values.min(), values.max()))
    return middle + f" [{low}, {high}]" * (len(values) > 1) + after


def _digits(value, form):
    if form and math.isfinite(value):
        return f"{value:{form}}"
    if value == 0 or not math.isfinite(value) or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    if value == int(value) != float(f"{value:.1e}") and abs(value) < 1e6:
        return f"{value:.0f}"  # a count
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


@dataclasses.dataclass(frozen=True)
class Check:
    """A statement about a number, and the bound that decides it.

    Attributes:
      statement: in words; of what is bounded such that it is read as a claim: "more than 10 points above frozen".
      value: the number, or one per seed; NaN counts as out of bounds.
      unit: "", "%" (of a fraction), "points" (a difference of fractions), or a word such as "degrees".
      below, above, within: the bound, one of the three; `within` is (lowest, highest). What is equal to it is inside.
        Without a bound the number is reported beside the others, and decides nothing.
      holds: what has to be inside: the "median" over seeds, "all" seeds, or the 95% "interval" of the mean.
      step: of the grid that the value was read from: it could be as much lower or higher.
    """

    statement: str
    value: float | int | Sequence[float | int] | np.ndarray
    _: dataclasses.KW_ONLY
    unit: str = ""
    below: float | int | None = None
    above: float | int | None = None
    within: tuple[float | int, float | int] | None = None
    holds: str = "median"
    step: float | int = 0.0

    def __post_init__(self):
        given = [name for name in ("below", "above", "within") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{self.statement!r} takes one of below, above and within, got {given}")
        if self.holds not in HOLDS:
            raise ValueError(f"holds must be one of {', '.join(HOLDS)}, got {self.holds!r}")
        if not self.values.size:
            raise ValueError(f"{self.statement!r} has no value")

    @property
    def values(self) -> np.ndarray:
        """[seeds]."""
        return np.atleast_1d(np.asarray(self.value, float)).ravel()

    @property
    def bounds(self) -> tuple[float, float]:
        """(lowest, highest) that is allowed."""
        if self.within is not None:
            return float(self.within[0]), float(self.within[1])
        return (
            -math.inf if self.above is None else float(self.above),
            math.inf if self.below is None else float(self.below),
        )

    @property
    def bounded(self) -> bool:
        """True if it decides anything."""
        return any(bound is not None for bound in (self.below, self.above, self.within))

    @property
    def interval(self) -> tuple[float, float]:
        """Where the number that decides is: over seeds, and by a step of its grid to either side.

        Of a median the two seeds in order between which it is with 95% probability, whatever the distribution; of fewer
        than 6 seeds the lowest and highest (David & Nagaraja 2003, section 7.1). A bootstrap of so few would be too
        narrow. Of a mean the 2.5th and 97.5th percentile of the bootstrap (Efron 1979); of "all" lowest and highest.
        """
        outside = math.inf if self.bounds[1] < math.inf else -math.inf
        values = np.sort(np.where(np.isnan(self.values), outside, self.values))
        count = len(values)
        if self.holds == "median":
            below = np.cumsum([math.comb(count, i) / 2**count for i in range(count)])  # the median is that far down
            left_out = max(int((below <= 0.025).sum()) - 1, 0)  # at each end
            values = values[left_out : count - left_out]
        elif self.holds == "interval" and count > 1:
            draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
            values = np.quantile(values[draws].mean(1), (0.025, 0.975), method="nearest")
        return float(values.min() - self.step), float(values.max() + self.step)

    @property
    def status(self) -> str:
        """Either "holds", "fails", or "undecided" where the interval contains a bound; "" without one."""
        if not self.bounded:
            return ""
        (low, high), (start, end) = self.bounds, self.interval
        if low <= start and end <= high:
            return "holds"
        return "fails" if end < low or start > high else "undecided"

    @property
    def measured(self) -> str:
        """`median [lowest, highest]` of the seeds."""
        return spread(self.values, self.unit)

    @property
    def bound(self) -> str:
        """In words; empty without one."""
        if not self.bounded:
            return ""
        if self.within is not None:
            low, high = (number(value, self.unit if self.unit in UNITS else "") for value in self.within)
            return f"{low} to {high}"
        side, value = ("below", self.below) if self.above is None else ("above", self.above)
        return f"{side} {number(value, self.unit)}"

    def as_json(self) -> dict[str, Any]:
        """Its stored form."""
        values = self.values
        return {
            "statement": self.statement,
            "value": _plain(np.median(values)),
            "spread": [_plain(values.min()), _plain(values.max())],
            "unit": self.unit,
            "bound": [_plain(value) for value in self.bounds] if self.bounded else None,
            "holds": {"holds": True, "fails": False, "undecided": None, "": None}[self.status],
        }


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim and what was measured of it.

    Attributes:
      claim: one sentence.
      source: who made it.
      checks: what it stands or falls with.
      note: what was measured beside, in words.
      code, layer, action: of a finding about a user's network: its kind, where, and what to do.
    """

    claim: str
    source: str = ""
    checks: Sequence[Check] = ()
    note: str = ""
    code: str = ""
    layer: str = ""
    action: str = ""

    def as_json(self) -> dict[str, Any]:
        """Its stored form."""
        words = {name: getattr(self, name) for name in ("claim", "source", "note", "code", "layer", "action")}
        return {
            **{name: text for name, text in words.items() if text},
            "verdict": verdict(self),
            "checks": [check.as_json() for check in self.checks],
        }


def verdict(finding: Finding) -> str:
    """The verdict of the checks on the claim.

    "supported" if all hold, "not supported" if some fail and none holds, "partly supported; not so: ..." if some fail;
    "undecided: ..." if none fails and the numbers do not decide some. Without bounds: "not judged".
    """
    by_status: Mapping[str, list[str]] = {"holds": [], "fails": [], "undecided": []}
    bounded = [check for check in finding.checks if check.bounded]
    for check in bounded:
        by_status[check.status].append(check.statement)
    if not bounded:
        return "not judged"
    if by_status["fails"]:
        if not by_status["holds"]:
            return "not supported"
        return f"partly supported; not so: {'; '.join(by_status['fails'])}"
    return f"undecided: {'; '.join(by_status['undecided'])}" if by_status["undecided"] else "supported"


def _plain(value):
    """A number that JSON holds; infinite ones and NaN as text."""
    value = float(value)
    return value if math.isfinite(value) else json.dumps(value)
