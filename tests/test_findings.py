"""Checks, findings and verdicts."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from bnjax.findings import Check, Finding, number, verdict


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (0.012345, "", "0.0123"),
        (0.00015, "", "1.5e-4"),
        (10174, "", "10174"),
        (10000, "", "1e4"),
        (10174.5, "", "1e4"),
        (2e6, "", "2e6"),
        (math.inf, "", "inf"),
        (math.nan, "%", "nan%"),
        (0.8136, "%", "81.4%"),
        (0.032, "points", "+3.2 points"),
        (-0.001, "points", "-0.1 points"),
        (12.34, "degrees", "12.3 degrees"),
    ],
)
def test_numbers(value, unit, text):
    assert number(value, unit) == text


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [
        ({"below": 1}, [1, 0.5, -math.inf], [1.001, math.inf, math.nan]),
        ({"above": 1}, [1, 2, math.inf], [0.999, -math.inf, math.nan]),
        ({"within": (1, 2)}, [1, 1.5, 2], [0.9, 2.1, math.nan, math.inf, -math.inf]),
    ],
)
def test_of_one_number(bound, inside, outside):
    assert {Check("it is", value, **bound).status for value in inside} == {"holds"}
    assert {Check("it is", value, **bound).status for value in outside} == {"fails"}


def test_a_step_of_the_grid_that_contains_the_bound_decides_nothing():
    assert Check("long", 2.0, above=1.8, step=0.5).status == "undecided"
    assert Check("long", 2.0, above=1.5, step=0.5).status == "holds"
    assert Check("long", 2.0, above=2.6, step=0.5).status == "fails"


def test_of_seeds():
    spread = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 5.0]
    assert Check("small", spread, below=1).status == "holds"  # the median is
    assert Check("small", spread, below=0.5).status == "undecided"
    assert Check("small", spread, below=0.05).status == "fails"
    assert Check("small", spread, below=1, holds="all").status == "undecided"
    assert Check("small", spread, below=5, holds="all").status == "holds"
    assert Check("small", spread, below=1, holds="interval").status == "undecided"  # the mean may not be
    assert Check("small", spread, below=0.09, holds="all").status == "fails"


def test_a_seed_without_a_number_is_out_of_bounds():
    assert Check("small", [0.1, math.nan], below=1, holds="all").status == "undecided"
    assert Check("small", [math.nan, math.nan], below=1).status == "fails"
    assert Check("small", [0.1] * 9 + [math.nan], below=1).status == "holds"


def test_interval_of_the_mean_covers_it():
    """200 samples of 20 normal numbers; 95% nominal, about 93% at that size; below 87% by chance: 1e-3."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = Check("mean", rng.normal(size=20), above=0, holds="interval").interval
        covered += low <= 0 <= high
    assert 0.87 <= covered / 200 <= 0.99


def test_interval_of_the_median_covers_it():
    """400 samples of 6 and of 25 skewed numbers: 96.9% and 95.7% exactly; below 93% by chance: 1e-4 and 7e-3."""
    rng = np.random.default_rng(0)
    for count, exact in ((6, 0.969), (25, 0.957)):
        covered = 0
        for _ in range(400):
            low, high = Check("median", rng.exponential(size=count), above=0).interval
            covered += low <= math.log(2) <= high
        assert exact - 0.04 <= covered / 400


@pytest.mark.parametrize(
    ("count", "left_out"), [(1, 0), (2, 0), (3, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (25, 7)]
)
def test_interval_of_the_median_is_that_of_the_sign_test(count, left_out):
    """As scipy's binomial test has it: of this many at each end the probability is at most 2.5%."""
    check = Check("median", np.arange(count), above=0)
    assert check.interval == (left_out, count - 1 - left_out)
    assert stats.binom.cdf(left_out, count, 0.5) <= 0.025 or left_out == 0
    assert stats.binom.cdf(left_out + 1, count, 0.5) > 0.025 or left_out == count // 2


def test_text_is_made_of_the_numbers_that_are_judged():
    check = Check("more than half", [0.8, 0.7, 0.9], unit="%", above=0.5)
    assert check.measured == "80.0% [70.0%, 90.0%]"
    assert check.bound == "above 50.0%"
    assert Check("x", 1.0, within=(0.5, 2)).bound == "0.5 to 2"
    assert Check("x", 1.0, below=2).measured == "1"
    assert Check("x", [10, 20, 30], below=25, unit="decades").measured == "20 [10, 30] decades"
    assert Check("x", [0.1, 0.2, 0.3], within=(0, 1), unit="points").measured == "+20.0 [+10.0, +30.0] points"
    found = check.as_json()
    assert found["value"] == 0.8
    assert found["spread"] == [0.7, 0.9]
    assert found["bound"] == [0.5, "Infinity"]
    assert found["holds"] is True
    assert json.loads(json.dumps(found, allow_nan=False)) == found


HOLDS, FAILS = Check("yes", 1, below=2), Check("no", 3, below=2)
UNDECIDED = Check("perhaps", [1, 3], below=2)


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        ([], "not judged"),
        ([HOLDS, HOLDS], "supported"),
        ([FAILS], "not supported"),
        ([HOLDS, FAILS], "partly supported; not so: no"),
        ([HOLDS, UNDECIDED], "undecided: perhaps"),
        ([FAILS, UNDECIDED], "not supported"),
        ([HOLDS, FAILS, UNDECIDED], "partly supported; not so: no"),
    ],
)
def test_verdicts(checks, expected):
    finding = Finding("a claim", source="someone", checks=checks, note="beside")
    assert verdict(finding) == expected
    assert finding.as_json()["verdict"] == expected
    assert "layer" not in finding.as_json()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"below": 1, "above": 0}, "got \\['below', 'above'\\]"),
        ({"below": 1, "holds": "most"}, "holds must be one of median, all, interval, got 'most'"),
        ({"below": 1, "value": []}, "'it is' has no value"),
    ],
)
def test_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Check(**{"statement": "it is", "value": 1.0} | given)


def test_without_a_bound_it_is_reported_and_decides_nothing():
    beside = Check("how many", [3, 4, 5])
    assert (beside.status, beside.bound, beside.measured) == ("", "", "4 [3, 5]")
    assert beside.as_json()["bound"] is beside.as_json()["holds"] is None
    assert verdict(Finding("", checks=[beside])) == "not judged"
    assert verdict(Finding("", checks=[beside, Check("small", 1, below=2)])) == "supported"
    assert verdict(Finding("", checks=[beside, Check("small", 3, below=2)])) == "not supported"
