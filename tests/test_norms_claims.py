"""The claims of `experiments.norms`: growth per layer, and doubled weights. Verdicts on made-up results."""

import dataclasses
import math

import numpy as np
import pytest
import xarray as xr

from bnjax.findings import verdict
from experiments.norms import doubled, growth
from experiments.norms.common import NAMES

KEEP = ("batch", "l1", "linf", "weight_standardized")
POINTS = [("batch", 16), ("group", 8), ("group", 16), ("none", 0)]


def growth_results(z=0.5, group=1.2, decades=None, accuracy=None):
    """Results of ReLU alone in which every claim holds but that of groups below 1.3."""
    theory = np.array([[1.6], [group], [group], [1.0]])
    decades = {name: 1.0 if name in KEEP else -20.0 for name in NAMES} | (decades or {})
    reached = {name: 0.7 if name in KEEP else 0.1 for name in NAMES} | (accuracy or {})
    both, rival = ("point", "activation"), ("batch_size", "activation")
    return xr.Dataset(
        {
            "theory": (both, theory),
            "measured": (both, theory + 0.01 * z),
            "error": (both, np.full((4, 1), 0.01)),
            "z": (both, np.array([[0.1], [z], [-1.0], [1.5]])),
            "batch_theory": (rival, np.full((3, 1), 1.3)),
            "norm": ("point", [name for name, _ in POINTS]),
            "size": ("point", [size for _, size in POINTS]),
            "decades": ("model", [decades[name] for name in NAMES]),
            "accuracy": (("model", "seed"), [[reached[name]] * 3 for name in NAMES]),
            "rate": ("model", [0.01] * len(NAMES)),
        },
        {"activation": ["relu"], "batch_size": [8, 16, growth.RIVAL], "model": [*NAMES], "seed": [0, 1, 2]},
    )


def growth_verdicts(**changes):
    return [verdict(found) for found in growth.judge(growth_results(**changes), growth.Settings())]


def test_growth_is_judged():
    assert growth_verdicts() == ["supported", "not supported", "supported", "supported"]
    assert growth_verdicts(group=1.4)[1] == "supported"


@pytest.mark.parametrize("far", [4.1, -4.1, math.nan])
def test_one_point_beyond_four_errors_is_not_agreement(far):
    assert growth_verdicts(z=far)[0] != "supported"


def test_training_against_prediction():
    """What is predicted decides on which side of the bound the accuracy has to be."""
    *_, predicted, trained = growth_verdicts(accuracy={"layer": 0.6})
    assert predicted == "supported"
    assert trained == "partly supported; not so: LayerNorm: does not train; test accuracy"
    *_, predicted, trained = growth_verdicts(accuracy={"layer": 0.6}, decades={"layer": -1.0})
    assert predicted == "partly supported; not so: LayerNorm: decades over 30 layers"
    assert trained == "supported"


def test_growth_is_shown():
    """A row for each point and each trained network; panels with the names of norms."""
    points, trained = growth.tables(growth_results(), growth.Settings())
    assert points.rows[0] == ["BN", "16", "relu", "1.6000", "1.6050 ± 0.0100", "+0.1"]
    assert points.rows[3][:2] == ["no norm", "-"]
    assert trained.rows[0] == ["BN", "+1.0", "0.01", "70.0%"]
    drawn = growth.figure(growth_results(), growth.Settings())
    assert [text.get_text() for text in drawn.axes[2].get_xticklabels()] == [*NAMES.values()]


def test_theory_is_the_norms_own():
    assert growth.theory("batch", 16, "relu")[0] == pytest.approx(1.58995, rel=1e-5)
    assert growth.theory("layer", 0, "relu") == (pytest.approx(1), 0.0)
    assert growth.theory("group", 8, "linear")[0] == pytest.approx(6 / 5)
    assert growth.theory("none", 0, "relu")[0] == pytest.approx(1)
    value, error = growth.theory("l1", 8, "relu")
    assert 0 < error < 0.002 * value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": ("batch", "batch")}, "norms must be different ones of batch, layer, .*got 'batch,batch'"),
        ({"group_sizes": (4, 8)}, r"group_sizes takes integers from 8 to 4096, got \(4, 8\)"),
        ({"lp_batch_sizes": ()}, "lp_batch_sizes takes integers"),
        ({"wide_depth": 1}, "wide_depth must be at least 2"),
        ({"wide_seeds": (0, 1)}, "wide_seeds must be at least 16, got 2"),
        ({"deep_width": 20}, "deep_width must be a multiple of 8, got 20"),
        ({"activations": ("rleu",)}, "unknown activation"),
    ],
)
def test_bad_settings_of_growth(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(growth.CLAIM.quick, **change)


def doubled_results(**changes):
    """(norm, seed, layer) of BN, weight norm and no norm in which all claims hold; changes: of single values."""
    layers = {"mlp": ["hidden_0", "hidden_1", "hidden_2"], "residual": ["stem", "block_0/0", "block_0/1"]}
    columns, ones = {}, np.ones((2, 3))
    alone = {"mlp": [0.5, 0.5, 0.5], "residual": [0.7, 0.5, 0.8]}
    for family in layers:
        dims = "norm", "seed", f"{family}_layer"
        columns[f"{family}_together"] = dims, np.stack([0.5 * ones, 0.5 * ones, 4 * ones])
        columns[f"{family}_alone"] = dims, np.stack([alone[family] * ones, 0.5 * ones, ones])
        columns[f"{family}_change"] = dims[:2], np.array([[1e-6, 1e-5], [0, 0], [7, 7]])
    coords = {f"{family}_layer": names for family, names in layers.items()}
    results = xr.Dataset(columns, coords | {"norm": ["batch", "weight", "none"], "seed": [0, 1]})
    for name, (place, value) in changes.items():
        results[name][place] = value
    return results


SETTINGS = doubled.Settings(norms=("batch", "weight", "none"), families=("mlp", "residual"))


def doubled_verdicts(**changes):
    return [verdict(found) for found in doubled.judge(doubled_results(**changes), SETTINGS)]


def test_doubled_is_judged():
    assert doubled_verdicts() == ["supported"] * 3


@pytest.mark.parametrize(
    ("change", "index", "statement"),
    [
        ({"mlp_together": ((1, 0, 2), 0.52)}, 0, "mlp: ratio farthest from 1/2"),
        ({"residual_together": ((0, 1, 0), math.nan)}, 0, "residual: ratio farthest from 1/2"),
        ({"residual_change": ((0, 1), 0.02)}, 0, "residual: largest change of the outputs"),
        ({"residual_alone": ((0, 0, 1), 0.6)}, 2, "first product of a branch: ratio farthest from 1/2"),
        ({"residual_alone": ((0, 0, 2), 0.5)}, 2, "second product of a branch: smallest ratio"),
        ({"residual_alone": ((0, 0, 0), 0.36)}, 2, "stem: smallest ratio"),
    ],
)
def test_one_value_out_of_bounds_is_seen(change, index, statement):
    assert doubled_verdicts(**change)[index] == f"partly supported; not so: {statement}"


def test_growth_without_a_norm_is_a_power_of_two():
    found = doubled.judge(doubled_results(), SETTINGS)[1].checks
    assert [check.statement for check in found] == ["mlp, all doubled: ratio over 4", "mlp, each alone: ratio"]
    assert doubled_verdicts(mlp_together=((2, 0, 0), 2.0))[1].startswith("undecided: mlp, all doubled")


def test_findings_are_of_what_was_measured():
    only = dataclasses.replace(SETTINGS, norms=("none",))
    assert len(doubled.judge(doubled_results().sel(norm=["none"]), only)) == 1
    (table,) = doubled.tables(doubled_results(), SETTINGS)
    assert table.rows[2] == ["mlp", "no norm", "4 [4, 4]", "1 [1, 1]", "7"]
    assert len(doubled.figure(doubled_results(), SETTINGS).axes) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": ("batch", "btach")}, "norms must be different ones of .*, got 'batch,btach'"),
        ({"families": ()}, "families must be different ones of mlp, conv, residual"),
        ({"doubled_channels": 4}, "doubled_channels must be a multiple of 8 with GroupNorm, got 4"),
        ({"doubled_layers": 1}, "doubled_layers must be at least 2"),
    ],
)
def test_bad_settings_of_doubled(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(doubled.CLAIM.quick, **change)
