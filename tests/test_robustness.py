"""The robust range on accuracies whose answer is known."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import xarray as xr

import bnjax
from bnjax import plots
from bnjax.analysis import robustness

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


def results(accuracy, diverged=None, *, loss=None, outputs=None, **further):
    """[model, seed, scale, *further] accuracies as a sweep would return them, scales descending."""
    accuracy = np.asarray(accuracy, float)
    dims = ("model", "seed", "init_scale", *further)
    coords = {"model": ["a", "b"], "init_scale": [10.0, 1.0, 0.1], **further}
    diverged = np.zeros(accuracy.shape, bool) if diverged is None else diverged
    variables = {"test_accuracy": ((*dims, "step"), accuracy[..., None]), "diverged": (dims, diverged)}
    if loss is not None:
        variables["test_loss"] = ((*dims, "step"), np.full((*accuracy.shape, 1), loss))
    configs = {name: {} if outputs is None else {"num_outputs": outputs} for name in "ab"}
    return xr.Dataset(variables, coords | {"step": [100]}, {"models": configs})


def one_diverged():
    """The first network's run of seed 1 at scale 10."""
    diverged = np.zeros((2, 3, 3), bool)
    diverged[0, 1, 0] = True
    return diverged


GOOD, FAIR, BAD = 0.9, 0.7, 0.1
TWO = [
    [[FAIR, GOOD, FAIR], [FAIR, GOOD, FAIR], [BAD, GOOD, BAD]],
    [[BAD, FAIR, BAD], [BAD, FAIR, FAIR], [BAD, FAIR, FAIR]],
]


def test_final_accuracy_sorts_scales_and_counts_a_diverged_run_as_chance():
    accuracy = robustness.final_accuracy(results(TWO, one_diverged()), chance=0.25)
    assert accuracy.dims == ("model", "init_scale", "seed")
    assert accuracy.init_scale.values.tolist() == [0.1, 1.0, 10.0]
    assert accuracy.sel(model="a", init_scale=10.0, seed=1).item() == 0.25
    assert accuracy.sel(model="a", init_scale=10.0, seed=0).item() == FAIR


def test_without_a_chance_a_diverged_run_counts_as_the_results_say():
    """Today's have the accuracy of guessing there, and an infinite loss; earlier ones that of the last finite state."""
    for loss, outputs, counted in ((np.inf, None, FAIR), (np.inf, 4, FAIR), (2.0, 4, 1 / 4)):
        accuracy = robustness.final_accuracy(results(TWO, one_diverged(), loss=loss, outputs=outputs))
        assert accuracy.sel(model="a", init_scale=10.0, seed=1).item() == counted
        assert accuracy.sel(model="a", init_scale=10.0, seed=0).item() == FAIR
    with pytest.raises(ValueError, match="do not say what guessing would have; pass it as chance="):
        robustness.final_accuracy(results(TWO, one_diverged(), loss=2.0))


def test_guessing_is_what_all_networks_say():
    found = results(TWO, outputs=4)
    assert robustness.guessing(found) == 1 / 4
    found.attrs["models"]["b"] = {"num_outputs": 5}
    assert robustness.guessing(found) is None
    assert robustness.guessing(found.drop_attrs()) is None


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
    accuracy = robustness.final_accuracy(results(accuracy, learning_rate=[0.1, 1.0]), chance=0.1)
    best = robustness.at_best(accuracy)
    assert best.dims == ("model", "init_scale", "seed")
    assert best.learning_rate.sel(model="b").values.tolist() == [0.1, 0.1, 1.0]  # medians 0.7, 0.7, 0.1; 0.5
    assert best.median("seed").sel(model="b").values.tolist() == [FAIR, FAIR, 0.5]
    assert robustness.summarize(accuracy, [0.5])["b"][0.5].range.decades == pytest.approx(2)


def test_of_further_axes_the_best_setting_per_scale_counts():
    """Each of the two networks' scales is at its best at another pair of momentum and weight decay."""
    accuracy = np.full((2, 3, 3, 2, 2), BAD)  # scales 10, 1, 0.1
    accuracy[0, :, 0, 0, 1] = FAIR
    accuracy[0, :, 1, 1, 0] = GOOD
    accuracy[0, :2, 2, 1, 1] = FAIR  # of 2 of 3 seeds: its median counts, not each seed's own best
    accuracy[0, 2, 2, 0, 0] = GOOD
    swept = results(accuracy, momentum=[0.0, 0.9], weight_decay=[0.0, 1e-3])
    best = robustness.at_best(robustness.final_accuracy(swept)).sel(model="a")
    assert best.momentum.values.tolist() == [0.9, 0.9, 0.0]
    assert best.weight_decay.values.tolist() == [1e-3, 0.0, 1e-3]
    assert best.sel(init_scale=0.1).values.tolist() == [FAIR, FAIR, BAD]
    found = bnjax.robustness(swept, [0.7])
    assert found.chosen == ("momentum", "weight_decay")
    assert found.summaries["a"][0.7].range.decades == pytest.approx(2)
    assert "Each scale has its best momentum and weight_decay, chosen on the test split." in str(found)


def test_a_sweep_of_one_unnamed_network_without_seeds(blobs):
    """As `bnjax.sweep` returns it: no dimensions "model", "seed" and "learning_rate"."""
    model = bnjax.mlp(features=(4,), num_outputs=4)
    config = bnjax.TrainConfig(steps=2, batch_size=32)
    swept = bnjax.sweep(model, blobs, config, {"init_scale": [1.0, 0.1]}, progress=False)
    assert swept.test_accuracy.dims == ("init_scale", "step")
    found = bnjax.robustness(swept)
    assert {*found.summaries["network"]} == {0.7, 0.8, 0.9, 0.95}
    assert found.summaries["network"][0.7].interval is None
    best = found.best["network"]
    last = swept.test_accuracy.isel(step=-1)
    assert (best.accuracy, best.runs) == (float(last.max()), 2)
    assert best.scale == float(last.idxmax())
    assert "interval" not in str(found).lower()


def test_what_is_selected_of_results_is_taken():
    found = bnjax.robustness(results(TWO).sel(model="a", seed=0), [0.7])
    assert [*found.summaries] == ["a"]
    assert found.seeds == 1
    assert found.summaries["a"][0.7].range.decades == pytest.approx(2)
    rates = results(np.stack([TWO, TWO], -1), learning_rate=[0.1, 1.0])
    assert bnjax.robustness(rates.isel(learning_rate=[1])).chosen == ()  # of one there is no choice
    assert str(bnjax.robustness(rates.isel(learning_rate=1, step=-1))) == str(bnjax.robustness(results(TWO)))


def test_robustness_is_the_summary_and_what_stands_beside_it():
    swept = results(TWO, one_diverged())
    found = bnjax.robustness(swept, (0.7, 0.95), baselines={"a": "b"}, chance=0.1)
    accuracy = robustness.final_accuracy(swept, 0.1)
    assert str(found.summaries) == str(robustness.summarize(accuracy, (0.7, 0.95), baselines={"a": "b"}))
    assert found.best == {"a": (GOOD, 1.0, 1, 9), "b": (FAIR, 0.1, 0, 9)}
    assert (found.baselines, found.seeds, found.chosen) == ({"a": "b"}, 3, ())


def test_the_table_is_in_words():
    lines = str(bnjax.robustness(results(TWO), (0.7, 0.95), baselines={"a": "b"})).splitlines()
    cells = [re.split(r"  +", line.strip()) for line in lines]
    assert ["of best", "decades", "scales", "95% interval", "above baseline"] in cells
    assert ["a: best median 90.0% at scale 1; 0 of 9 runs diverged"] in cells
    assert ["70%", "at least 2.0", "0.1 to 10", "0.0 to 2.0 or more", "+0.0, +60.0"] in cells
    assert ["95%", "0.0", "only at 1", "0.0", "+20.0"] in cells
    assert ["70%", "at least 1.0", "0.1 to 1", "0.0 to 1.0 or more"] in cells
    assert ["95%", "none", "at no scale", "none"] in cells
    assert "Of best: the share of 90.0% that the median test accuracy over 3 seeds reaches." in lines
    assert "Baseline of a: b." in lines
    assert "Runs that diverged" not in lines[-4]


def test_the_table_says_where_it_fails_between():
    accuracy = [[[GOOD, BAD, GOOD]], [[BAD, BAD, BAD]]]
    swept = results(accuracy)
    assert "fails at 1, between scales that pass" in str(bnjax.robustness(swept))
    assert "colspan" in bnjax.robustness(swept)._repr_html_().split("fails at 1")[0].splitlines()[-1]


def range_of(decades, ends=(False, False)):
    return robustness.RobustRange(decades, 1.0, 10.0**decades, *ends, ())


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (range_of(1.5), range_of(1.5), "1.5"),
        (range_of(1.5), range_of(2.0), "1.5 to 2.0"),
        (range_of(5.5, (True, False)), range_of(8.0, (True, True)), "5.5 to 8.0 or more"),
        (range_of(8.0, (True, True)), range_of(8.0, (True, True)), "8.0 or more"),
        (range_of(np.nan), range_of(0.0, (False, True)), "none to 0.0 or more"),
        (range_of(np.nan), range_of(np.nan), "none"),
    ],
)
def test_an_interval_in_words(low, high, text):
    assert robustness._interval_text(low, high) == text


@pytest.mark.parametrize(("scale", "text"), [(1, "1"), (0.0316, "0.0316"), (1e-4, "1e-4"), (3.16e4, "3.16e4")])
def test_scale_text(scale, text):
    assert robustness.scale_text(scale) == text


def test_the_table_fits_into_80_columns():
    """Long names, long scales, many holes, every column."""
    scales = 10.0 ** np.arange(-16, 17) * 1.23
    name = ", ".join(["BN, hidden frozen, truncated_normal"] * 4)
    accuracy = np.full((2, 33, 4), BAD)
    accuracy[0, ::2], accuracy[:, 4:], accuracy[1, :, 0] = GOOD, GOOD, BAD
    accuracy[0, 5:30:3] = BAD
    swept = xr.Dataset(
        {"test_accuracy": (("model", "init_scale", "seed"), accuracy)}, {"model": [name, "b"], "init_scale": scales}
    )
    found = bnjax.robustness(swept.assign(diverged=swept.test_accuracy < 0), baselines={name: "b", "b": name})
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("fails at" in line for line in lines)
    assert repr(found) == str(found)


def test_the_html_says_what_the_text_says():
    swept = results(TWO).assign_coords(model=["a", "<b>"])
    found = bnjax.robustness(swept, (0.7, 0.95), baselines={"a": "<b>"})
    tree = ElementTree.fromstring(f"<div>{found._repr_html_().replace('<br>', '<br/>')}</div>")
    words = " ".join(" ".join(tree.itertext()).split())
    for line in str(found).splitlines():
        for cell in re.split(r"  +", line.strip()):
            assert cell in words
    assert {len(row) for row in tree.iter("tr")} == {1, 5}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"thresholds": [0.0]}, r"threshold must be in \(0, 1\], got 0.0"),
        ({"thresholds": []}, "thresholds is empty"),
        ({"baselines": {"a": "c"}}, r"baselines must name networks, of \['a', 'b'\], got 'c'"),
        ({"baselines": {"c": "a"}}, "baselines must name networks, .* got 'c'"),
        ({"chance": 10.0}, r"chance is a fraction in \[0, 1\], got 10.0"),
        ({"results": results(TWO).isel(init_scale=0)}, r"needs an axis init_scale; .* have \['model', 'seed'\]"),
        ({"results": results(TWO).drop_vars("diverged")}, "results of bnjax.sweep, these lack diverged"),
        ({"results": results(np.where(np.eye(3), TWO, np.nan))}, "not finite in 12 of 18 cells"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        bnjax.robustness(**({"results": results(TWO)} | call))


def test_an_unfinished_sweep_is_refused_but_for_a_part_that_is_done():
    swept = results(TWO)
    swept["done"] = swept.diverged | (swept.init_scale < 5)
    with pytest.raises(ValueError, match="needs a finished sweep: 12 of 18 cells are done"):
        bnjax.robustness(swept)
    part = swept.sel(init_scale=[1.0, 0.1])
    assert str(bnjax.robustness(part)) == str(bnjax.robustness(part.drop_vars("done")))


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


def test_figure_takes_the_best_of_further_axes_and_breaks_its_title():
    accuracy = np.stack([np.full((2, 3, 3), 0.2), np.asarray(TWO)], axis=-1)
    accuracy = robustness.final_accuracy(results(accuracy, momentum=[0.0, 0.9]), chance=0.1)
    title = ", ".join(["some words"] * 20)
    (axes,) = plots.robustness(accuracy, threshold=0.8, chance=0.1, title=title).axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["a"].get_ydata(), 100 * np.array([FAIR, GOOD, FAIR]))
    np.testing.assert_allclose(lines["b"].get_ydata(), 100 * np.array([FAIR, FAIR, 0.2]))
    assert axes.get_title().replace("\n", " ") == title
    assert max(map(len, axes.get_title().split("\n"))) <= 88


def test_maps_mark_what_trains_and_the_best_rate():
    dims = {"model": list("abcd"), "learning_rate": [0.1, 1.0], "init_scale": [0.1, 1.0, 10.0]}
    values = xr.DataArray(np.arange(24.0).reshape(4, 2, 3), dims)
    best = values.idxmax("learning_rate").where(values.init_scale < 5)
    figure = plots.maps(values, "accuracy (%)", level=2, best=best, labels=("trains", "best rate"), title="A title")
    grid = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in grid] == [*"abcd", ""]  # the last is the bar's
    assert grid[-1].get_ylabel() == "accuracy (%)"
    assert [axes.get_ylabel() for axes in grid[:4]] == ["learning rate", "", "", "learning rate"]
    stars, dots = ({*zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True)} for line in grid[0].lines)
    assert stars == {(0.1, 1.0), (1.0, 1.0)}  # not at 10, where `best` is NaN
    assert dots == {(10.0, 0.1), (0.1, 1.0), (1.0, 1.0), (10.0, 1.0)}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["best rate", "trains"]
    assert [line.get_marker() for line in legend.get_lines()] == ["*", "o"]
    assert "init_scale" in grid[0].get_xlabel()
    assert not plots.maps(values, "", level=2).legends
