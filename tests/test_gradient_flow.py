"""Claims about gradients at initialization: what is judged of made-up results, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import scripts
import xarray as xr

from bnjax.findings import verdict
from bnjax.theory import mean_field
from experiments import claim, gradient_flow
from experiments.gradient_flow import common, slopes, training
from experiments.gradient_flow.common import Settings

SCALES = np.logspace(-3, 5, 9)


class TestSlopes:
    def values(self, *laws):
        data = np.stack([law(SCALES) for law in laws], axis=-1)
        return xr.DataArray(data, {"init_scale": SCALES}, ("init_scale", "layer"))

    def test_of_powers(self):
        found = slopes.slopes(self.values(lambda a: 3 / a, lambda a: 0 * a + 2, lambda a: 1e-9 * a**2.5))
        np.testing.assert_allclose(found, [-1, 0, 2.5], atol=1e-12)

    def test_is_numpys_least_squares_of_what_is_finite_and_not_zero(self):
        values = self.values(lambda a: a * (1 + 0.3 * np.sin(np.arange(9))), lambda a: a**3)
        values[0, 0], values[3, 0], values[8, 0] = 0, np.inf, np.nan
        kept = np.isin(np.arange(9), [0, 3, 8], invert=True)
        line = np.polyfit(np.log10(SCALES[kept]), np.log10(values.values[kept, 0]), 1)
        np.testing.assert_allclose(slopes.slopes(values), [line[0], 3], rtol=1e-12)

    def test_one_figure_has_no_slope(self):
        values = self.values(lambda a: np.where(a == 1, a, 0), lambda a: 0 * a)
        assert np.isnan(slopes.slopes(values)[1])

    def test_theory(self):
        """Counted by hand for 3 scaled layers without BN: 2 others; after the first 2, after the last none."""
        assert slopes.theory("none", "weight", 3) == [2, 2, 2]
        assert slopes.theory("none", "preactivation", 3) == [2, 1, 0]
        assert slopes.theory("batch", "weight", 3) == [-1, -1, -1]
        assert slopes.theory("batch", "activation", 3) == [0, 0, 0]


def made_up(weight, passing, *, depth, norm, activation="relu", growth=2.25, **options):
    """The results of one network, and its settings; `growth` is of the squared norm, per layer.

    `weight` and `passing` are the gradients as functions of init_scale.
    """
    coords = {
        "activation": [activation],
        "norm": [norm],
        "depth": [depth],
        "init_scale": SCALES,
        "seed": [0, 1],
        "layer": [f"hidden_{i}" for i in range(depth)] + ["output"],
    }
    a = xr.DataArray(SCALES, dims="init_scale")
    layers = xr.DataArray(growth ** (-0.5 * np.arange(depth + 1)), dims="layer")
    full = xr.DataArray(np.ones([len(v) for v in coords.values()]), coords, list(coords))
    data = {"weight_gradient": full * weight(a) * layers, "activation_spread": full}
    for part in ("preactivation", "norm", "activation"):
        law = weight if norm == "batch" and part == "preactivation" else passing
        data[f"{part}_gradient"] = full * law(a) * layers
    settings = Settings((activation,), (norm,), (depth,), init_scales=tuple(SCALES), seeds=(0, 1), **options)
    return xr.Dataset(data), settings


def judged(*args, **options):
    """[(verdict, {statement: value})] of the findings."""
    found = slopes.judge(*made_up(*args, **options))
    return [(verdict(one), {check.statement: float(np.median(check.values)) for check in one.checks}) for one in found]


class TestJudge:
    """Of data made up from known laws: what is found follows from them, not from what is expected of BN."""

    def test_with_norm(self):
        one, depth = judged(lambda a: 3 / a, lambda a: 0 * a + 1, depth=3, norm="batch", batch_size=32)
        assert one[0] == depth[0] == "supported"
        assert one[1]["fewest decades of a fit"] == pytest.approx(5)
        for word in ("lowest", "highest"):
            assert one[1][f"{word} slope of the gradient to BN's outputs"] == pytest.approx(0, abs=1e-12)
            assert one[1][f"{word} slope of the gradient to W"] == pytest.approx(-1)
        assert one[1]["relu: init_scale where epsilon matters"] == mean_field.init_scale_threshold("relu", 1e-5)
        assert depth[1] == pytest.approx(
            {
                "relu, BN, 3 layers: factor per layer": 2.25,
                "relu: factor per layer, infinitely wide": mean_field.gradient_growth("relu", 32),
            }
        )

    def test_of_a_gradient_that_explodes_with_norm(self):
        laws = (lambda a: a**2, lambda a: a**0.5)
        one, depth = judged(*laws, depth=2, norm="batch", growth=0.5, batch_size=3)
        assert one[0] == depth[0] == "not supported"
        assert one[1]["lowest slope of the gradient to BN's outputs"] == pytest.approx(0.5)
        assert one[1]["highest slope of the gradient to W"] == pytest.approx(2)
        assert depth[1] == pytest.approx({"relu, BN, 2 layers: factor per layer": 0.5})

    def test_of_one_layer(self):
        """There is no other layer whose weights would multiply the gradient, and none to pass it on to."""
        ((words, checks),) = judged(lambda a: 0 * a + 1, lambda a: 0 * a + 1, depth=1, norm="none")
        assert words == "supported"
        assert checks["highest slope of the gradient to W, 1 layers"] == pytest.approx(0)
        ((words, _),) = judged(lambda a: 1 / a, lambda a: 0 * a + 1, depth=1, norm="batch")
        assert words == "supported"

    def test_of_a_power_without_norm(self):
        def passing(a):
            return a ** xr.DataArray([2, 1, 0, 0], dims="layer")

        ((words, checks),) = judged(lambda a: a**2, passing, depth=3, norm="none")
        assert words == "supported"
        assert checks["lowest slope of the gradient to W, 3 layers"] == pytest.approx(2)
        ((words, checks),) = judged(lambda a: a**1.5, passing, depth=3, norm="none")
        assert words == "not supported"
        assert checks["relu, no BN, 3 layers: largest error of a slope"] == pytest.approx(0.5)

    @pytest.mark.parametrize(("activation", "loss"), [("relu", "cross_entropy"), ("sigmoid", "cotangent")])
    def test_of_what_has_no_law(self, activation, loss):
        """The cross-entropy's softmax saturates, and so do sigmoids."""

        def law(a):
            return (a**2 / (1 + a)).where(a < 5e3, 0)

        options = {"depth": 3, "norm": "none", "activation": activation, "loss": loss}
        ((words, checks),) = judged(law, law, **options)
        assert words == "supported"
        assert checks["first W of 3 layers: norm at 1"] == 0.5
        assert checks["first W of 3 layers: norm at 1e+03, where its median is largest"] == pytest.approx(999, abs=0.1)
        assert checks["first W of 3 layers: exactly 0 from init_scale"] == pytest.approx(1e4)
        (table,) = slopes.tables(*made_up(law, law, **options))
        first, last = table.rows
        assert first[:5] == [activation, "1 of 3", "2", "1.04", "0.5"]
        assert first[5:] == ["999", "1e3", "1e4", "-"]
        assert last[1] == "3 of 3"

    def test_of_a_single_power_where_none_is_expected(self):
        ((words, checks),) = judged(lambda a: a**2, lambda a: a, depth=3, norm="none", activation="sigmoid")
        assert words == "not supported"
        assert checks["first W of 3 layers: exactly 0 from init_scale"] == np.inf

    def test_beyond_float32(self):
        results, settings = made_up(lambda a: a**2, lambda a: a, depth=2, norm="none")
        results["activation_spread"] = results.activation_spread.where(results.init_scale < 5e2, np.inf)
        (_, table) = slopes.tables(results, settings)
        assert [row[-1] for row in table.rows] == ["1e3", "1e3"]

    @pytest.mark.parametrize("norm", ["none", "batch"])
    def test_of_dead_units(self, norm):
        laws = (lambda a: 0 * a, lambda a: 0 * a)
        results, settings = made_up(*laws, depth=2, norm=norm)
        (one,) = slopes.judge(results, settings)
        assert verdict(one) == "not judged"
        assert "no 2 scales" in one.note
        assert slopes.draw(results, settings) is not None

    def test_of_weights_that_turn(self):
        angle = xr.DataArray([[[50.0, 50.0]], [[5.0, 60.0]]], dims=("init_scale", "probe_step", "seed"))
        results = xr.Dataset({"angle": angle}, {"init_scale": [0.1, 10.0], "seed": [0, 1], "probe_step": [10]})
        results = results.expand_dims(model=["batch"], layer=["hidden_0"])
        (one,) = training.judge(results, Settings(seeds=(0, 1), steps=(0, 10)))
        assert one.checks[0].values.tolist() == [0.1, 1.2]
        assert training.judge(results, Settings(norms=("none",))) == []


@pytest.mark.slow
class TestMeasured:
    @pytest.mark.parametrize(("norms", "depth"), [(("batch",), 1), (("batch", "none"), 2)])
    def test_powers(self, norms, depth, blobs):
        """The slopes over 6 decades, by numpy."""
        settings = dataclasses.replace(common.TINY, norms=norms, depths=(depth,))
        results = slopes.measure(settings, blobs)
        assert results.sizes["seed"] == 2 + (len(norms) > 1)
        hidden = results.sel(activation="relu", depth=depth).isel(layer=slice(0, depth), seed=slice(0, 2))
        normed = hidden.sel(norm="batch")
        laws = [(normed.weight_gradient, -1), (normed.norm_gradient, 0), (normed.activation_gradient, 0)]
        if "none" in norms:
            assert hidden.sel(norm="none").norm_gradient.isnull().all()
            laws.append((hidden.sel(norm="none").weight_gradient, 1))
        for values, power in laws:
            logs = np.log10(values.transpose("init_scale", ...).values.reshape(len(values.init_scale), -1))
            np.testing.assert_allclose(np.polyfit(np.log10(values.init_scale), logs, 1)[0], power, atol=0.02)
        assert verdict(slopes.judge(results, settings)[0]) == "supported"

    def test_of_what_has_no_power_law(self, blobs):
        """Sigmoid at 1e7: all of some 200 units are saturated, and the gradient is exactly 0."""
        settings = dataclasses.replace(common.TINY, activations=("sigmoid",), norms=("none",), loss="cross_entropy")
        results = slopes.measure(dataclasses.replace(settings, init_scales=(1e-2, 1.0, 1e7)), blobs)
        assert (results.weight_gradient.sel(layer="hidden_0", init_scale=1e7) == 0).all()
        assert (results.weight_gradient.sel(layer="hidden_0", init_scale=1.0) > 0).all()

    def test_with_one_norm(self, blobs, tmp_path):
        """No table, finding or figure needs the other."""
        settings = dataclasses.replace(common.TINY, activations=("linear",), norms=("none",))
        jobs = [(one, settings) for one in gradient_flow.CLAIMS]
        scripts.load("gradient_flow.__main__")
        assert claim.run("gradient_flow", jobs, blobs, tmp_path) == ""
        report = (tmp_path / "gradient_flow.json").read_text()
        assert "Without BN, the gradient to the weights W of linear layers" in report
        assert not [one for one in json.loads(report)["claims"]["slopes"]["findings"] if "With BN" in one["claim"]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activations": "relu,tan"}, r"unknown activation in --activations 'tan' \(did you mean 'tanh'\?\).*relu"),
        ({"activations": ""}, "--activations must name at least one"),
        ({"norms": "batch,batch"}, "--norms must name at least one, and none twice, got 'batch,batch'"),
        ({"norms": "layer"}, "unknown norm in --norms 'layer'.*batch, none"),
        ({"loss": "squared"}, "unknown --loss 'squared'.*cotangent, cross_entropy"),
        ({"depths": "0,2"}, "--depths takes different numbers '1,2,5' of at least 1, got '0,2'"),
        ({"depths": "two"}, "--depths takes different numbers"),
        ({"depths": f"3,{2**31}"}, "--depths takes different numbers"),
        ({"hidden_width": 2**31}, "--hidden_width must be in .* got 2147483648"),
        ({"hidden_width": 0}, "--hidden_width must be at least 1"),
        ({"seeds": 10**20}, "--seeds takes a count .* got '100000000000000000000'"),
        ({"seeds": f"5:{10**20}"}, "--seeds takes a count .* got '5:100000000000000000000'"),
        ({"seeds": "none"}, "--seeds takes"),
        ({"more_seeds": -1}, "--more_seeds must be at least 0"),
        ({"steps": "-1,5"}, "--steps takes different numbers '1,2,5' of at least 0"),
        ({"steps": "0"}, "--steps must have one above 0"),
        ({"epsilon": -1}, "--epsilon must be >= 0 and finite, got -1"),
        ({"init_scales": "1:2"}, "--init_scales takes numbers"),
        ({"init_scales": "0,1"}, "--init_scales .*init_scale must be positive"),
        ({"init_scales": "1"}, "--init_scales must have 2 values at least"),
        ({"init_scales": "1e-4:1e-2:5"}, "--init_scales must have 2 values from 0.268 upward"),
        ({"batch_size": 2}, "--batch_size must be at least 3"),
        ({"jacobian_examples": 2}, "--jacobian_examples must be at least 3"),
        ({"batch_size": 100_000}, "--batch_size must be at most"),
        ({"jacobian_examples": 16}, r"--jacobian_examples=16 .*makes Jacobians of \d+ entries, more than 8388608"),
        ({"learning_rate": 0}, "--learning_rate must be above 0"),
    ],
)
def test_bad_flags(options, words, tmp_path):
    with pytest.raises(SystemExit, match=words):
        scripts.run("gradient_flow.__main__", out=str(tmp_path / "out"), **options)
