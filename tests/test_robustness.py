"""The robust range on accuracies whose answer is known."""

import numpy as np
import pytest
import xarray as xr

from bnjax import plots
from bnjax.sweeps import robustness

SCALES = 10.0 ** np.arange(-3, 4)


@pytest.mark.parametrize(
    ("passes", "decades", "low", "high", "open_ends", "holes"),
    [
        ("0011100", 2, 0.1, 10, (False, False), []),
        ("1111111", 6, 1e-3, 1e3, (True, True), []),
        ("0000000", np.nan, np.nan, np.nan, (False, False), []),
        ("0001000", 0, 1, 1, (False, False), []),
        ("1001110", 2, 1, 100, (False, False), [1e-2, 1e-1]),
        ("1101101", 1, 1e-3, 1e-2, (True, False), [1e-1, 1e2]),  # of equally long ones the first
        ("0101111", 3, 1, 1e3, (False, True), [1e-1]),
    ],
)
def test_robust_range(passes, decades, low, high, open_ends, holes):
    found = robustness.robust_range(np.array([c == "1" for c in passes]), SCALES)
    np.testing.assert_allclose(found[:3], [decades, low, high])
    assert (found.open_low, found.open_high) == open_ends
    np.testing.assert_allclose(found.holes, holes)


def test_length_is_in_decades_not_in_scales():
    """The run with more scales is not the longer one if they lie close together."""
    scales = np.array([1.0, 1.1, 1.2, 1.3, 2.0, 10.0, 100.0])
    passes = np.array([1, 1, 1, 1, 0, 1, 1], bool)
    assert robustness.robust_range(passes, scales).low == 10


def results(accuracy, diverged=None, rates=None):
    """[model, seed, scale(, rate)] accuracies as a sweep would return them, scales descending."""
    accuracy = np.asarray(accuracy, float)
    dims = ("model", "seed", "init_scale") + (("learning_rate",) if rates else ())
    coords = {"model": ["a", "b"], "init_scale": [10.0, 1.0, 0.1]} | (
        {"learning_rate": rates} if rates else {}
    )
    diverged = np.zeros(accuracy.shape, bool) if diverged is None else diverged
    return xr.Dataset(
        {"test_accuracy": ((*dims, "step"), accuracy[..., None]), "diverged": (dims, diverged)},
        coords | {"step": [100]},
        {"hyper": {"learning_rate": 0.1}},
    )


GOOD, FAIR, BAD = 0.9, 0.7, 0.1
TWO = [
    [[FAIR, GOOD, FAIR], [FAIR, GOOD, FAIR], [BAD, GOOD, BAD]],
    [[BAD, FAIR, BAD], [BAD, FAIR, FAIR], [BAD, FAIR, FAIR]],
]


def test_final_accuracy_sorts_scales_and_counts_a_diverged_run_as_chance():
    diverged = np.zeros((2, 3, 3), bool)
    diverged[0, 1, 0] = True
    accuracy = robustness.final_accuracy(results(TWO, diverged), chance=0.25)
    assert accuracy.dims == ("model", "init_scale", "learning_rate", "seed")
    assert accuracy.init_scale.values.tolist() == [0.1, 1.0, 10.0]
    assert accuracy.sel(model="a", init_scale=10.0, seed=1).item() == 0.25
    assert accuracy.sel(model="a", init_scale=10.0, seed=0).item() == FAIR


def test_summary():
    accuracy = robustness.final_accuracy(results(TWO), chance=0.1)
    found = robustness.summarize(accuracy, [0.7, 0.95], baselines={"a": "b"})
    assert found["a"][0.7].range.decades == pytest.approx(2)  # medians 0.7, 0.9, 0.7 against 0.63
    assert found["a"][0.7].above_low == pytest.approx(0.0)
    assert found["a"][0.7].above_high == pytest.approx(FAIR - BAD)
    assert found["a"][0.95].range == (0, 1, 1, False, False, ())
    assert found["b"][0.7].range.decades == pytest.approx(1)  # 0.1 and 1
    assert np.isnan(found["b"][0.7].above_low)
    assert np.isnan(found["b"][0.95].range.decades)


def test_interval_is_the_bootstrap_over_seeds():
    """Of 3 seeds one fails at both ends. A resample has it twice or thrice, and then a range of one scale,
    with probability 7/27: more than 2.5%, less than 97.5%."""
    accuracy = robustness.final_accuracy(results(TWO), chance=0.1)
    low, high = robustness.summarize(accuracy, [0.7])["a"][0.7].interval
    assert low.decades == 0
    assert high.decades == pytest.approx(2)
    assert (high.open_low, high.open_high) == (True, True)


def test_one_seed_has_no_interval():
    accuracy = robustness.final_accuracy(results(TWO), chance=0.1).isel(seed=[0])
    assert robustness.summarize(accuracy, [0.7])["a"][0.7].interval is None


def test_of_several_learning_rates_the_best_per_scale_counts():
    accuracy = np.stack([np.asarray(TWO), np.full((2, 3, 3), 0.5)], axis=-1)
    accuracy = robustness.final_accuracy(results(accuracy, rates=[0.1, 1.0]), chance=0.1)
    best = robustness.best_learning_rate(accuracy).sel(model="b")
    assert best.values.tolist() == [0.1, 0.1, 1.0]  # medians 0.7, 0.7, 0.1 against 0.5
    assert robustness.summarize(accuracy, [0.5])["b"][0.5].range.decades == pytest.approx(2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: robustness.summarize(a, [0.0]), r"threshold must be in \(0, 1\], got 0.0"),
        (
            lambda a: robustness.summarize(a, [0.8], baselines={"a": "c"}),
            "a baseline must be one of .* got 'c'",
        ),
        (
            lambda a: robustness.final_accuracy(results(TWO).isel(seed=0), 0.1),
            "robustness needs the dimensions",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(robustness.final_accuracy(results(TWO), chance=0.1))


def test_figure_shows_the_medians_and_the_range():
    accuracy = robustness.final_accuracy(results(TWO), chance=0.1)
    (axes,) = plots.robustness(accuracy, threshold=0.8, chance=0.1, baselines={"b"}).axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["a"].get_ydata(), 100 * np.array([FAIR, GOOD, FAIR]))
    assert lines["a"].get_linestyle() == "-"
    assert lines["b"].get_linestyle() == "--"
    assert axes.get_xscale() == "log"
    assert "init_scale" in axes.get_xlabel()
    assert "%" in axes.get_ylabel()
    spread = axes.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose([spread.x0, spread.y0, spread.x1, spread.y1], [0.1, 100 * BAD, 10, 100 * GOOD])
    levels = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    np.testing.assert_allclose(sorted(levels), [100 * 0.1, 100 * 0.8 * GOOD])
