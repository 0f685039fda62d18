"""The claims of `experiments.mean_field`: limits, verdicts and flags."""

import jax
import numpy as np
import pytest
import scripts
import xarray as xr

from bnjax import plots
from bnjax.findings import verdict
from experiments.mean_field import chaos, common, epsilon, growth


def growth_of(infinite, theory, z):
    """Made-up results at batch sizes 5, 6 and 8."""
    both = ("activation", "batch_size")
    return xr.Dataset(
        {"theory_infinite_batch": ("activation", infinite), "theory": (both, theory), "z": (both, z)},
        {"activation": np.array(["linear", "relu"][-len(infinite) :], object), "batch_size": [5, 6, 8]},
    )


def test_growth_is_judged():
    """NaN counts where a variance exists, and below batch size 6 none does."""
    theory, several = [[1.5, 4 / 3, 1.2], [2.3, 2.0, 1.8]], [[np.nan, 1.0, -3.9], [np.nan, 0.5, 0.5]]
    in_theory, networks = growth.judge(growth_of([1.0, 1.4669], theory, several), growth.Settings())
    assert verdict(in_theory) == verdict(networks) == "supported"
    checks = {check.statement: check.values[0] for check in [*in_theory.checks, *networks.checks]}
    assert checks["relu, infinite batch"] == 1.4669
    assert checks["relu, 6 examples"] == 2.0
    assert checks["relu, infinite batch: a factor of a million takes"] == pytest.approx(36.06, abs=0.01)
    assert checks["points with a standard error"] == 4
    assert checks["largest deviation, in standard errors"] == 3.9
    for far in (4.1, np.nan):
        _, networks = growth.judge(growth_of([1.4669], [theory[1]], [[np.nan, far, 0.5]]), growth.Settings())
        assert verdict(networks) == "not supported"
    few = growth_of([1.4669], [theory[1]], [several[0]]).isel(batch_size=[0])
    assert [verdict(one) for one in growth.judge(few, growth.Settings())] == ["supported"]


def test_growth_below_that_of_an_infinite_batch_is_not_supported():
    in_theory, _ = growth.judge(growth_of([1.4669], [[1.4] * 3], [[1.0] * 3]), growth.Settings())
    assert verdict(in_theory) == "partly supported; not so: relu, 6 examples"


@pytest.mark.parametrize("far", [4.1, np.inf, np.nan])
def test_chaos_is_judged(far):
    for z, expected in ((-3.9, "supported"), (far, "not supported")):
        (found,) = chaos.judge(xr.Dataset({"z": ("case", [z, 1.0])}), common.Wide())
        assert verdict(found) == expected


@pytest.mark.parametrize(("measured", "expected"), [(0.00409, "not supported"), (0.00407, "supported")])
def test_epsilon_is_judged(measured, expected):
    columns = {"threshold_theory": 0.004, "threshold": measured, "threshold_error": 2e-5}
    coords = {"activation": np.array(["relu"], object)}
    results = xr.Dataset({name: ("activation", [value]) for name, value in columns.items()}, coords)
    (found,) = epsilon.judge(results, epsilon.Settings())
    assert verdict(found) == expected
    assert [check.values[0] for check in found.checks[:3]] == [0.004, measured, 2e-5]


def test_each_seed_is_a_network():
    """The seeds that are given, in their order; of one width alone the median."""

    def run(width, factor):
        return {
            "draw": common.over_seeds(lambda seed: factor * jax.random.uniform(jax.random.key(seed), (1,)), [7, 3, 5])
        }

    each = [jax.random.uniform(jax.random.key(seed)) for seed in (7, 3, 5)]
    np.testing.assert_allclose(run(64, 2.0)["draw"][:, 0], 2 * np.array(each))
    one, two = common.limits(run, [([64], 2.0), ([64, 128], 3.0)], "test")
    np.testing.assert_allclose(one["draw"][0], 2 * np.median(each), rtol=1e-6)
    np.testing.assert_allclose(two["draw"][0], 3 * np.mean(each), rtol=1e-6)


def test_theory_has_the_colour_of_its_activation():
    """And no entry in the legend."""
    lines = xr.Dataset(
        {name: (("activation", "x"), np.ones((2, 3))) for name in ("value", "error", "theory")},
        {"activation": np.array(["relu", "tanh"], object), "x": [1, 2, 3]},
    )
    (axes,) = plots.panels([common.panel(lines, "", ("value", "error", "theory"))]).axes
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    assert colours["relu"] == colours["_relu"] != colours["tanh"] == colours["_tanh"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["relu", "tanh"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "--depth must be at least 2, got 0"),
        ({"batch_sizes": "3,8"}, r"--batch_sizes takes integers from 4 .* got '3,8': .*Theorem 8"),
        ({"batch_sizes": "a"}, "--batch_sizes takes different numbers"),
        ({"activations": "relu,rleu"}, r"unknown activation in --activations 'rleu' .*; allowed: relu, "),
        ({"activations": "relu,relu"}, "--activations takes at least one name, each of them once"),
        ({"epsilon_activations": ""}, "--epsilon_activations takes at least one name"),
        ({"epsilon_activations": "x"}, "unknown activation in --epsilon_activations 'x'"),
        ({"parts": "grwoth"}, r"unknown part in --parts 'grwoth' \(did you mean 'growth'\?\)"),
        ({"epsilon": -1e-5}, r"--epsilon must be in \[1e-12, 1\], got -1e-05"),
        ({"seeds": 1}, "--seeds must be at least 16, got 1"),
        ({"epsilon_seeds": "3:9"}, "--epsilon_seeds must be at least 16, got 6"),
        ({"epsilon_seeds": "536870900:536870920"}, r"--epsilon_seeds must be below 2\^29"),
        ({"epsilon_width": 8}, "--epsilon_width must be at least 64, got 8"),
        ({"out": "file"}, "--out=file cannot be written"),
    ],
)
def test_bad_flags(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        scripts.run("mean_field.__main__", **({"out": "out"} | options))
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").iterdir()]
