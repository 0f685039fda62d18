"""The claims of all scripts at tiny settings, and the mechanism: settings as flags, reports, failures."""

import dataclasses
import json

import numpy as np
import pytest
import xarray as xr
from absl import flags
from scripts import forget, load

import bnjax
import experiments.claim
from bnjax.findings import Check, Finding
from experiments import (
    common,
    gradient_flow,
    jacobian_check,
    mean_field,
    norms,
    papers,
    scale_laws,
    settings,
    table,
    why_robust,
)
from experiments.claim import Claim
from experiments.settings import require, setting

# The first claim of each script is run by default, the others are slow.
SCRIPTS = {
    "gradient_flow": gradient_flow.CLAIMS,
    "jacobian_check": jacobian_check.CLAIMS,
    "why_robust": why_robust.CLAIMS,
    "mean_field": mean_field.CLAIMS,
    "norms": norms.CLAIMS,
    "papers": papers.CLAIMS,
    "scale_laws": scale_laws.CLAIMS,
}
CASES = [
    pytest.param(script, one, id=f"{script}.{one.name}", marks=[pytest.mark.slow] if i else [])
    for script, claims in SCRIPTS.items()
    for i, one in enumerate(claims)
]


@pytest.fixture(scope="module")
def ds():
    """10 classes of 16 features, as images of 4 x 4 pixels."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 4, 4, 1))

    def draw(count):
        y = rng.integers(10, size=count).astype(np.int32)
        return (centres[y] + rng.normal(size=(count, 4, 4, 1))).astype(np.float32), y

    return bnjax.Dataset(*draw(300), *draw(100))


@pytest.mark.parametrize(("script", "one"), CASES)
def test_at_tiny_settings(script, one, ds, tmp_path, capsys):
    """It is measured, stored, judged, drawn and reported."""
    load(f"{script}.__main__")
    flags.FLAGS(["test", f"--out={tmp_path}"])
    assert experiments.claim.run(script, [(one, one.tiny)], ds, tmp_path) == ""
    out = capsys.readouterr().out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= table.COLUMNS
    assert bnjax.load_results(tmp_path / f"{one.name}.zarr").attrs["claim"] == one.name
    if one.figure(bnjax.load_results(tmp_path / f"{one.name}.zarr"), one.tiny) is not None:
        assert (tmp_path / f"{one.name}.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / f"{script}.json").read_text())
    findings = report["claims"][one.name]["findings"]
    assert report["command"].startswith(f"python -m experiments.{script}")
    for found in findings:
        assert found["verdict"] in out.replace("\n    ", " ")
        assert found["claim"]
        for check in found["checks"]:
            assert {"statement", "value", "spread", "bound", "holds"} <= {*check}


@dataclasses.dataclass(frozen=True)
class Own:
    steps: int = setting(10, "Steps.")
    rates: tuple[float, ...] = setting((0.1, 1.0), "Rates.")
    seeds: tuple[int, ...] = setting((0, 1), "Seeds.", common.parse_seeds)

    def __post_init__(self):
        require(self.steps > 0, "steps", f"must be above 0, got {self.steps}")


def claim(name, *, steps=10, measured=1.0, must_hold=False):
    def measure(values, ds):
        if measured is None:
            raise RuntimeError("no luck")
        return xr.Dataset({"value": ("seed", np.full(len(values.seeds), measured))}, {"seed": list(values.seeds)})

    def judge(results, values):
        return [Finding(f"{name} is small", checks=[Check("below 2", results.value.values, below=2)])]

    quick = Own(steps=steps)
    return Claim(
        name, "Is it?", "", Own, quick, dataclasses.replace(quick, steps=1000), quick, measure, judge,
        lambda results, values: None, must_hold=must_hold,
    )  # fmt: skip


@pytest.fixture
def script(tmp_path):
    """A function that makes a script of these claims, runs it with these flags, and returns its report by claim."""
    out = tmp_path / "out"

    def call(*claims, **options):
        forget(__name__)
        main = experiments.claim.script("papers", claims)
        words = [f"--{name}={value}" for name, value in ({"out": out} | options).items()]
        main(flags.FLAGS(["papers", *words]))
        return report()

    def report():
        return json.loads((out / "papers.json").read_text())["claims"]

    call.report, call.out = report, out
    yield call
    forget(__name__)


def test_what_is_the_same_in_all_claims_is_one_flag(script):
    found = script(claim("a"), claim("b"), seeds="0:3", steps=5)
    assert {name: one["settings"]["steps"] for name, one in found.items()} == {"a": 5, "b": 5}
    assert found["a"]["settings"]["seeds"] == [0, 1, 2]
    assert script(claim("a"), seeds="10:100")["a"]["settings"]["seeds"] == "10:100"
    assert found["a"]["findings"][0]["verdict"] == "supported"


def test_what_differs_is_a_flag_for_each(script):
    found = script(claim("a"), claim("b", steps=20), **{"b.steps": 7}, claims="b")
    assert list(found) == ["b"]
    assert found["b"]["settings"]["steps"] == 7
    assert "steps" not in flags.FLAGS
    assert "Default: 20; with --full, 1000." in flags.FLAGS["b.steps"].help
    assert script(claim("a"), full=True)["a"]["settings"]["steps"] == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"claims": "c"}, "unknown claim in --claims 'c'.*allowed: a, b"),
        ({"claims": "a,a"}, "--claims names one twice: a,a"),
        ({"claims": ""}, "--claims is empty; allowed: a, b"),
        ({"a.steps": 0}, "--a.steps must be above 0, got 0"),
        ({"rates": "1,x"}, "--rates takes numbers"),
        ({"seeds": "-1"}, "--seeds takes a count"),
    ],
)
def test_refused(script, options, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        script(claim("a"), claim("b", steps=20), **options)
    assert not script.out.exists()


def test_one_that_ends_in_an_error_leaves_the_others_stored(script, capsys):
    with pytest.raises(SystemExit, match="error: b ended in an error"):
        script(claim("a"), claim("b", measured=None), claim("c"))
    assert list(script.report()) == ["a", "c"]
    assert bnjax.load_results(script.out / "c.zarr").attrs["claim"] == "c"
    assert "RuntimeError: no luck" in capsys.readouterr().err


def test_one_that_must_hold(script):
    with pytest.raises(SystemExit, match="error: a must hold, but: a is small"):
        script(claim("a", measured=3.0, must_hold=True))
    assert script.report()["a"]["findings"][0]["verdict"] == "not supported"
    assert script(claim("a", measured=3.0))["a"]["findings"][0]["verdict"] == "not supported"


def test_the_report_keeps_the_other_claims(script):
    """With the command and the versions of their own run."""
    script(claim("a"), claim("b"), seeds="0:3")
    found = script(claim("a", measured=3.0), claim("b"), claims="a")
    assert found["a"]["findings"][0]["verdict"] == "not supported"
    assert "made" not in found["a"]
    assert "--seeds=0:3" in found["b"]["made"]["command"]
    assert "jax" in found["b"]["made"]["versions"]
    assert len(found["b"]["settings"]["seeds"]) == 3
    with pytest.raises(SystemExit, match="error: a ended in an error: no luck"):
        script(claim("a", measured=None), claim("b"), claims="a")
    assert script.report() == found  # what was measured before stands


def test_results_that_cannot_be_judged_are_stored_without_a_verdict(script):
    script(claim("a"), claim("b"))

    def judge(results, values):
        raise ArithmeticError("no verdict")

    with pytest.raises(SystemExit, match="error: a ended in an error: no verdict"):
        script(dataclasses.replace(claim("a", measured=3.0), judge=judge), claim("b"), claims="a")
    assert bnjax.load_results(script.out / "a.zarr").value.values.tolist() == [3.0, 3.0]
    assert list(script.report()) == ["b"]


@pytest.mark.parametrize("rest", ["", ', "claims": {"a"', "}", ', "versions": {}, "claims": [1]}'])
def test_a_damaged_report_is_replaced(script, rest):
    script.out.mkdir()
    (script.out / "papers.json").write_text('{"command": "python -m experiments.papers"' + rest)
    assert list(script(claim("a"))) == ["a"]


def test_results_of_others_stay(script):
    script.out.mkdir()
    (script.out / "papers.json").write_text('{"command": "python -m experiments.other"}')
    with pytest.raises(SystemExit, match=r"holds papers.json, made by experiments\.other"):
        script(claim("a"))
    assert [path.name for path in script.out.iterdir()] == ["papers.json"]


def test_counts():
    assert settings.parse_counts("n", "5,1") == [1, 5]
    for text in ("", "0,1", "1,1", "1.5", "a"):
        with pytest.raises(ValueError, match="--n takes different numbers"):
            settings.parse_counts("n", text)
