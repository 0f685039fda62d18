"""The claim about init scales by norm, judged by made-up accuracies; and its settings."""

import dataclasses

import numpy as np
import pytest
import xarray as xr

import bnjax
from bnjax.findings import verdict
from experiments.norms import common, robust
from experiments.settings import Refused

SETTINGS = dataclasses.replace(
    robust.QUICK, norms=("batch", "layer", "weight", "none"), init_scales=(1e-4, 1e-2, 1.0, 1e2, 1e4)
)
SCALES, RATES = [*SETTINGS.init_scales], [0.01, 0.1, 1.0]


def results(trains, rates=()):
    """Networks train (80%, else 10%) at these numbers of scales from the middle; at 1 with these highest rates."""
    names = [f"{family}: {name}" for family in SETTINGS.families for name in SETTINGS.networks(family)]
    accuracy = np.full((len(names), 5, 3, 3), 0.1)
    for i, name in enumerate(names):
        reach = trains.get(name, trains.get(name.partition(": ")[2], 0))
        accuracy[i, 2 - reach : 3 + reach, 1] = 0.8
        accuracy[i, [0, 4], 0] = accuracy[i, [0, 4], 2] = np.nan
        if dict(rates).get(name.partition(": ")[2], 0.1) == 1.0:
            accuracy[i, 2, 2] = 0.8
    dims = ("network", "init_scale", "learning_rate", "seed")
    coords = {"network": np.asarray(names, object), "init_scale": SCALES, "learning_rate": RATES, "seed": [0, 1, 2]}
    return xr.Dataset({"accuracy": (dims, accuracy)}, coords)


def verdicts(*args):
    return [verdict(one).partition(":")[0] for one in robust.judge(results(*args), SETTINGS)]


def test_all_alike():
    everything = dict.fromkeys([*common.NAMES.values(), *common.INSTEAD], 2)
    assert verdicts(everything) == ["supported"] * 5
    assert verdicts(everything, {"no norm": 1.0}) == ["supported"] * 5
    assert verdicts(everything, {"weight norm": 1.0})[2] == "undecided"  # by a step of the grid of rates


def test_only_bn():
    partly = "partly supported; not so"  # rates are no higher than without a norm
    assert verdicts({"BN": 2}) == ["not supported", "not supported", partly, partly, "not supported"]


def test_one_step_less_decides_nothing():
    everything = dict.fromkeys([*common.NAMES.values(), *common.INSTEAD], 2)
    assert verdicts(everything | {"mlp: LayerNorm": 1})[1] == "undecided"


def test_table_and_figure():
    found = results({"BN": 2, "LayerNorm": 1})
    (table,) = robust.tables(found, SETTINGS)
    assert table.rows[0][:4] == ["mlp", "BN", "8+", "8+"]
    assert table.rows[1][3] == "4"
    assert table.rows[1][-1] == "0.1, 0.1, 0.1"
    assert max(map(len, table.text().splitlines())) <= 80
    assert len(robust.figure(found, SETTINGS).axes) == 3


def test_full_settings_are_the_main_experiments():
    """For the fully connected networks, so that its rows are those of the README."""
    full = robust.CLAIM.full
    model, main = full.networks("mlp")["BN"], bnjax.mlp((128,) * 3, 10)
    assert model.config == main.config
    assert (len(full.seeds), len(full.init_scales), full.steps, full.batch_size) == (5, 17, 300, 128)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norms": ("batch", "layr")}, "norms must be of batch, none, .*got batch,layr"),
        ({"norms": ("layer",)}, "norms must have batch"),
        ({"families": ("deep",)}, "families must be of mlp, conv, residual, got deep"),
        ({"families": ()}, "families must be different names"),
        ({"rate_scales": (0.5,)}, "rate_scales must be of the init_scales"),
        ({"channels": 4, "norms": ("batch", "group")}, "channels must be a multiple of 8 with GroupNorm, got 4"),
        ({"image_batch_size": 1}, "image_batch_size must be at least 2, got 1"),
    ],
)
def test_refused(change, words):
    with pytest.raises(Refused, match=words):
        dataclasses.replace(SETTINGS, **change)
