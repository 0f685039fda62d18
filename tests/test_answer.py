"""Each number of docs/answer.md is one that its script judged or reported: docs/results/SCRIPT.json, or theory."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from bnjax.findings import verdict
from bnjax.theory import mean_field
from experiments.scale_laws import contrast

DOCS = Path(__file__).parents[1] / "docs"
PAGE = " ".join((DOCS / "answer.md").read_text().split())
NUMBER = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"


def findings(script, claim):
    return json.loads((DOCS / "results" / f"{script}.json").read_text())["claims"][claim]["findings"]


def checks(script, claim, statement, finding=""):
    """The check of that statement, in a finding that begins so."""
    found = [
        check
        for one in findings(script, claim)
        for check in one["checks"]
        if one["claim"].startswith(finding) and check["statement"] == statement
    ]
    assert len(found) == 1, f"{len(found)} checks of {script}, {claim} say {statement!r}"
    return found[0]


def assert_rounded(text, values):
    """The numbers in the text are these, to the digits that it shows."""
    shown = [number.replace(",", "") for number in re.findall(NUMBER, text)]
    assert len(shown) == len(values), f"{text!r} has {len(shown)} numbers for {values}"
    for one, value in zip(shown, values, strict=True):
        mantissa, _, exponent = one.partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        assert abs(float(one) - float(value)) <= unit * (0.5 + 1e-9), f"{one} in {text!r} is {value}"


def bold():
    """The bold texts of the page that have a number, in their order."""
    return [text for text in re.findall(r"\*\*(.+?)\*\*", PAGE) if re.search(r"\d", text)]


# [bold text: (script, claim, statements, the finding's beginning)]: the values of its checks, or of one check
# the median, lowest and highest, if the text has three numbers.
FIGURES = [
    ("10,174", "scale_laws", "laws", ("deviations measured, of each seed",), ""),
    ("0.000", "gradient_flow", "slopes", ("lowest slope of the gradient to BN's outputs",), "With BN, the gradients"),
    ("0.000", "gradient_flow", "slopes", ("highest slope of the gradient to BN's outputs",), "With BN, the gradients"),
    (
        "5.00",
        "gradient_flow",
        "slopes",
        ("lowest slope of the gradient to W, 6 layers",),
        "Without BN, the gradient to the weights W of relu",
    ),
    (
        "6.2e-3",
        "gradient_flow",
        "slopes",
        ("first W of 6 layers: norm at 1",),
        "Without BN, the gradient to the weights W of sigmoid",
    ),
    (
        "422 [71.9, 3.3e3]",
        "gradient_flow",
        "slopes",
        ("first W of 6 layers: norm at 316, where its median is largest",),
        "Without BN, the gradient to the weights W of sigmoid",
    ),
    (
        "1e4",
        "gradient_flow",
        "slopes",
        ("first W of 6 layers: exactly 0 from init_scale",),
        "Without BN, the gradient to the weights W of sigmoid",
    ),
    ("-1.000", "gradient_flow", "slopes", ("lowest slope of the gradient to W",), "With BN, the gradients"),
    (
        "1.2e-4 [9.5e-5, 1.5e-4]",
        "why_robust",
        "norms",
        ("relative error of |W1|, 1% above ten thresholds",),
        "The first step makes",
    ),
    ("1.4669", "mean_field", "growth", ("relu, infinite batch",), "In theory"),
    ("1.1778", "mean_field", "growth", ("tanh, infinite batch",), "In theory"),
    ("1.0336", "mean_field", "growth", ("sigmoid, infinite batch",), "In theory"),
    ("1.0000", "mean_field", "growth", ("linear, infinite batch",), "In theory"),
    ("2.0038", "mean_field", "growth", ("relu, 6 examples",), "In theory"),
    ("49", "mean_field", "growth", ("points with a standard error",), "Wide networks"),
    ("2.5", "mean_field", "growth", ("largest deviation, in standard errors",), "Wide networks"),
    ("1.48", "why_robust", "depth", ("growth of the squared gradient per layer, mean field",), ""),
    ("75.3% [74.8%, 75.6%]", "why_robust", "depth", ("accuracy, 5 layers, learning rate 0.1",), ""),
    ("71.0% [69.7%, 71.6%]", "why_robust", "depth", ("accuracy, 10 layers, learning rate 0.1",), ""),
    ("57.7% [53.4%, 59.3%]", "why_robust", "depth", ("accuracy, 20 layers, learning rate 0.1",), ""),
    ("28.2% [22.9%, 33.0%]", "why_robust", "depth", ("accuracy, 40 layers, learning rate 0.1",), ""),
    ("381 [332, 457]", "why_robust", "norms", ("there |W| grows more than tenfold",), "The first step overshoots"),
    ("16.3 [16, 16.6]", "why_robust", "norms", ("stable rank before the step",), "The first step overshoots"),
    ("2.37 [2.24, 2.49]", "why_robust", "norms", ("stable rank after the step",), "The first step overshoots"),
    ("6.7e-6", "why_robust", "dip", ("epsilon 1e-5: lowest lr/|W|^2",), "Training accuracy dips"),
    ("8", "why_robust", "norms", ("decades that |W| spans at the start",), "With weight decay"),
    ("0.184 [0.146, 0.26]", "why_robust", "norms", ("decades that |W| spans at the end",), "With weight decay"),
    ("50.9% [49.5%, 51.8%]", "why_robust", "frozen", ("accuracy, xor, frozen",), "At init scale 1 "),
    ("91.6% [91.1%, 93.3%]", "why_robust", "frozen", ("accuracy, xor, trained",), "At init scale 1 "),
    ("50.8% [49.5%, 51.9%]", "why_robust", "frozen", ("accuracy, xor, trained",), "At init scale 1e4"),
    ("77.3% [76.8%, 78.4%]", "why_robust", "frozen", ("accuracy, images, trained",), "At init scale 1e4"),
    ("77.3% [76.9%, 78.4%]", "why_robust", "frozen", ("accuracy, images, frozen",), "At init scale 1e4"),
    ("81.7% [81.1%, 82.3%]", "why_robust", "frozen", ("accuracy, images, trained",), "At init scale 1 "),
    ("85.5 [80.9, 87.4]", "why_robust", "frozen", ("hidden weights turned by (XOR)",), "At init scale 1e-4"),
    ("75.4% [73.3%, 75.9%]", "why_robust", "frozen", ("accuracy, images, trained",), "At init scale 1e-4"),
    ("53.9% [49.9%, 56.1%]", "why_robust", "frozen", ("accuracy, xor, trained",), "At init scale 1e-4"),
    ("0.003864", "mean_field", "epsilon", ("relu: threshold in theory",), ""),
    (
        "0.003879 ± 0.000017",
        "mean_field",
        "epsilon",
        ("relu: mean threshold of networks", "relu: its standard error"),
        "",
    ),
    ("7.4 [+4.7, +9.1]", "why_robust", "dip", ("epsilon 1e-5: deeper than 3 points",), "Training accuracy dips"),
    ("2.0 [+0.0, +3.7]", "why_robust", "dip", ("epsilon 1e-3: deeper than 3 points",), "Training accuracy dips"),
    ("5.4 [+4.0, +7.5]", "why_robust", "dip", ("at epsilon 1e-5, learning rate 0.01",), "The dip gets shallower"),
    ("59.2%", "why_robust", "dip", ("accuracy a decade and more below the threshold: lowest",), "Training ends"),
    ("78.7%", "why_robust", "dip", ("accuracy a decade and more below the threshold: highest",), "Training ends"),
    ("3.2e-9", "why_robust", "dip", ("lowest scale that trains, epsilon 1e-5, learning rate 0.1",), "Training ends"),
    ("1e-4", "why_robust", "dip", ("lowest scale that trains, 6 layers",), "Training ends"),
    ("0.5", "why_robust", "dip", ("the theory fits all within a factor of 5",), "Training ends"),
    (
        "21.0 [+13.1, +27.6]",
        "why_robust",
        "evaluation",
        ("at scale 1",),
        "Running statistics (momentum 0.99) fail in evaluation after 20 ",
    ),
    (
        "1.0 [-0.2, +1.6]",
        "why_robust",
        "evaluation",
        ("at scale 1",),
        "Running statistics (momentum 0.9) fail in evaluation after 200",
    ),
    ("1.1%", "why_robust", "evaluation", ("within 5 points everywhere (the largest median)",), "The failure is"),
    ("1", "why_robust", "rates", ("highest rate that trains at scale 1, BN",), "BN allows"),
    ("0.316 [0.1, 0.316]", "why_robust", "rates", ("highest rate that trains at scale 1, no BN",), "BN allows"),
    ("95.4 [93.7, 103]", "why_robust", "rates", ("steps at init scale 1, BN",), "BN converges"),
    ("131 [130, 136]", "why_robust", "rates", ("steps at init scale 1, no BN",), "BN converges"),
    ("9", "why_robust", "rates", ("scales at which some rate trains, BN",), "BN allows"),
    ("2", "why_robust", "rates", ("scales at which some rate trains, no BN",), "BN allows"),
]

# [bold text: (script, claim, the beginning of a finding)]: in the note of the finding.
NOTES = [
    ("more than 10 points above frozen on XOR at 1e-3, 0.1, 1", "why_robust", "frozen", "At init scale 1 "),
    (
        "more than 5 points at 9 of 9 scales",
        "why_robust",
        "evaluation",
        "Running statistics (momentum 0.99) fail in evaluation after 20 ",
    ),
]


@pytest.mark.parametrize(("text", "script", "claim", "statements", "finding"), FIGURES, ids=lambda text: str(text)[:40])
def test_figures_are_those_of_the_report(text, script, claim, statements, finding):
    assert f"**{text}**" in PAGE
    found = [checks(script, claim, statement, finding) for statement in statements]
    wanted = len(re.findall(NUMBER, text))
    values = []
    for check in found:
        factor = 100 if check["unit"] in ("%", "points") else 1
        three = [check["value"], *check["spread"]]
        values += [factor * float(value) for value in (three if wanted == 3 * len(found) else three[:1])]
    assert_rounded(text, values)


@pytest.mark.parametrize(("text", "script", "claim", "finding"), NOTES, ids=lambda text: str(text)[:40])
def test_words_are_those_of_the_note(text, script, claim, finding):
    (found,) = (one for one in findings(script, claim) if one["claim"].startswith(finding))
    assert text in found["note"][0].lower() + found["note"][1:]


def test_no_bold_number_is_left_out():
    assert sorted(bold()) == sorted(text for text, *_ in [*FIGURES, *NOTES])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("For ReLU in a large batch it is 1.47", lambda: mean_field.gradient_growth("relu")),
        ("in the squared norm, 1.21 in the norm", lambda: math.sqrt(mean_field.gradient_growth("relu"))),
        ("(ReLU: 1.47", lambda: mean_field.gradient_growth("relu")),
        ("in the limit, 1.49", lambda: mean_field.gradient_growth("relu", 64)),
        ("at 64, 2.27", lambda: mean_field.gradient_growth("relu", 5)),
        ("(ε = 10⁻⁵: ReLU 0.0038", lambda: mean_field.init_scale_threshold("relu", 1e-5)),
        ("tanh 0.0022", lambda: mean_field.init_scale_threshold("tanh", 1e-5)),
        ("sigmoid 0.0089", lambda: mean_field.init_scale_threshold("sigmoid", 1e-5)),
    ],
)
def test_numbers_of_theory(text, value):
    assert text in PAGE
    assert_rounded(re.findall(NUMBER, text)[-1], [value()])


def test_tenfold_in_twelve_layers():
    assert "tenfold in 12 layers" in PAGE
    assert mean_field.gradient_growth("relu") ** (12 / 2) == pytest.approx(10, rel=0.01)


def test_the_end_of_training_is_so_far_below_the_threshold():
    threshold = mean_field.init_scale_threshold("relu", 1e-5)
    assert "a million times below the threshold" in PAGE
    assert "40 times below" in PAGE
    three, six = (
        checks("why_robust", "dip", f"lowest scale that trains, {name}")["value"]
        for name in ("epsilon 1e-5, learning rate 0.1", "6 layers")
    )
    assert 0.8e6 < threshold / three < 1.5e6
    assert 35 < threshold / six < 45


def test_large_weights_turn_by_less_than_float32_resolves():
    assert "less than 10⁻⁵ degrees" in PAGE
    assert checks("why_robust", "frozen", "hidden weights turned by (XOR)", "At init scale 1e4")["spread"][1] < 1e-5


def test_verdicts_are_as_the_page_has_them():
    """By the words of the page: what it calls not supported or undecided, and nothing else is."""
    told = {"depth", "frozen", "detached", "evaluation", "dip", "rates"}
    for script in ("scale_laws", "gradient_flow", "mean_field", "why_robust"):
        report = json.loads((DOCS / "results" / f"{script}.json").read_text())
        for name, one in report["claims"].items():
            verdicts = {finding["verdict"] for finding in one["findings"]}
            assert verdicts <= {"supported"} or name in told, name


def test_seeds_6_to_11_reverse_no_check_and_change_four_verdicts():
    assert "17 of its 21 findings have the same verdict" in PAGE
    first, other = (
        [
            one
            for claim in json.loads((DOCS / "results" / name).read_text())["claims"].values()
            for one in claim["findings"]
        ]
        for name in ("why_robust.json", "why_robust_seeds_6_to_11.json")
    )
    assert [one["claim"] for one in first] == [one["claim"] for one in other]
    assert len(first) == 21
    assert sum(a["verdict"] == b["verdict"] for a, b in zip(first, other, strict=True)) == 17
    for a, b in zip(first, other, strict=True):
        for mine, theirs in zip(a["checks"], b["checks"], strict=True):
            assert {mine["holds"], theirs["holds"]} != {True, False}, mine["statement"]


@pytest.mark.slow
def test_other_seeds_give_the_same_verdicts():
    """Of the cheapest claim; the others were tried once."""
    one = contrast.CLAIM
    values = dataclasses.replace(one.quick, seeds=(10, 11, 12))
    found = [verdict(finding) for finding in one.judge(one.measure(values, None), values)]
    assert found == [finding["verdict"] for finding in findings("scale_laws", "contrast")]
