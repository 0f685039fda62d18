"""The gradient-flow experiment: its slopes against exact power laws, its main at a tiny size, what it refuses."""

import re
import sys

import numpy as np
import pytest
import scripts
import xarray as xr

import bnjax
from bnjax.theory import mean_field

gradient_flow = scripts.load("gradient_flow")
TINY = {
    "depths": "2",
    "hidden_width": 6,
    "batch_size": 16,
    "seeds": 2,
    "init_scales": "1e-2:1e7:10",
    "shown_scales": "1,10",
    "jacobian_examples": 4,
    "steps": "0,2",
}


@pytest.fixture
def main(tmp_path):
    """Runs the experiment in this process; --out is tmp_path/out."""

    def call(**options):
        scripts.run("gradient_flow", **({"out": str(tmp_path / "out")} | options))
        return tmp_path / "out"

    return call


class TestSlopes:
    SCALES = np.logspace(-3, 5, 9)

    def values(self, *laws):
        data = np.stack([law(self.SCALES) for law in laws], axis=-1)
        return xr.DataArray(data, {"init_scale": self.SCALES}, ("init_scale", "layer"))

    def test_of_powers(self):
        found = gradient_flow.slopes(
            self.values(lambda a: 3 / a, lambda a: 0 * a + 2, lambda a: 1e-9 * a**2.5)
        )
        np.testing.assert_allclose(found, [-1, 0, 2.5], atol=1e-12)

    def test_is_numpys_least_squares_of_what_is_finite_and_not_zero(self):
        values = self.values(lambda a: a * (1 + 0.3 * np.sin(np.arange(9))), lambda a: a**3)
        values[0, 0], values[3, 0], values[8, 0] = 0, np.inf, np.nan
        kept = np.isin(np.arange(9), [0, 3, 8], invert=True)
        line = np.polyfit(np.log10(self.SCALES[kept]), np.log10(values.values[kept, 0]), 1)
        np.testing.assert_allclose(gradient_flow.slopes(values), [line[0], 3], rtol=1e-12)

    def test_one_figure_has_no_slope(self):
        values = self.values(lambda a: np.where(a == 1, a, 0), lambda a: 0 * a)
        assert np.isnan(gradient_flow.slopes(values)[1])

    def test_theory(self):
        """Counted by hand for 3 scaled layers without BN: 2 others; after the first 2, after the last none."""
        layers = range(3)
        assert [gradient_flow.theory("none", "weight", i, 3) for i in layers] == [2, 2, 2]
        assert [gradient_flow.theory("none", "preactivation", i, 3) for i in layers] == [2, 1, 0]
        assert {gradient_flow.theory("batch", "weight", i, 3) for i in layers} == {-1}
        assert {gradient_flow.theory("batch", "activation", i, 3) for i in layers} == {0}


@pytest.fixture
def set_flags():
    """Sets the experiment's flags as a command line does."""

    def call(**options):
        flags = scripts.load("gradient_flow").FLAGS
        flags.unparse_flags()
        for flag in flags:
            flags[flag].unparse()
        flags(["gradient_flow.py", *(f"--{flag}={value}" for flag, value in options.items())])

    yield call
    gradient_flow.FLAGS.unparse_flags()


class TestAnswer:
    """Of data made up from known laws: what is printed follows from them, not from what is expected of BN."""

    SCALES = np.logspace(-3, 5, 9)

    def made_up(self, weight, passing, *, depth, norm, activation="relu", growth=2.25):
        """The job and the results of one network, and its laws; `growth` is of the squared norm, per layer."""
        coords = {
            "activation": [activation],
            "norm": [norm],
            "depth": [depth],
            "init_scale": self.SCALES,
            "seed": [0, 1],
            "layer": [f"hidden_{i}" for i in range(depth)] + ["output"],
        }
        a = xr.DataArray(self.SCALES, dims="init_scale")
        layers = xr.DataArray(growth ** (-0.5 * np.arange(depth + 1)), dims="layer")
        full = xr.DataArray(np.ones([len(v) for v in coords.values()]), coords, list(coords))
        data = {"weight_gradient": full * weight(a) * layers, "activation_spread": full}
        for part in ("preactivation", "norm", "activation"):
            data[f"{part}_gradient"] = full * passing(a) * layers
        shown = [1.0]
        job = gradient_flow.Job([depth], self.SCALES, [0, 1], shown, [0, 1], None, {activation: 1e-4})
        return xr.Dataset(data), job

    def test_with_norm(self, set_flags):
        set_flags(activations="relu", norms="batch", batch_size=32, hidden_width=7)
        found = gradient_flow.answer(
            *self.made_up(lambda a: 3 / a, lambda a: 0 * a + 1, depth=3, norm="batch")
        )
        assert "With BN, no: over 7.0 decades" in found
        assert "slope 0.000 to 0.000: BN divides" in found
        assert "slope -1.000 to -1.000: it shrinks as they grow." in found
        theory = mean_field.gradient_growth("relu", 32)
        assert (
            'That "no" is about init_scale. From layer to layer, towards the input, the gradient still grows '
            "with depth: its squared norm by a factor per layer of relu 2.250 (infinitely wide: "
            f"{theory:.3f}) (3 layers of 7"
        ) in found
        assert "without BN" not in found

    def test_of_a_gradient_that_explodes_with_norm(self, set_flags):
        set_flags(activations="relu", norms="batch", batch_size=3)
        laws = (lambda a: a**2, lambda a: a**0.5)
        found = gradient_flow.answer(*self.made_up(*laws, depth=2, norm="batch", growth=0.5))
        assert "With BN, yes: " in found
        assert "slope 0.500 to 0.500. The" in found
        assert "slope 2.000 to 2.000: it grows with them." in found
        assert (
            "the gradient changes with depth: its squared norm by a factor per layer of relu 0.500 (2"
            in found
        )

    def test_of_one_layer(self, set_flags):
        """There is no other layer whose weights would multiply the gradient, and none to pass it on to."""
        set_flags(activations="relu", norms="batch,none")
        made_up = [self.made_up(lambda a: 0 * a + 1, lambda a: 0 * a + 1, depth=1, norm="none")]
        made_up += [self.made_up(lambda a: 1 / a, lambda a: 0 * a + 1, depth=1, norm="batch")]
        results = xr.concat([results for results, _ in made_up], "norm")
        found = gradient_flow.answer(results, made_up[0][1])
        assert "With BN, no: " in found
        assert "From layer to layer" not in found
        assert (
            "first layer's weights: no, as the power 0.00 to 0.00 of init_scale in all layers (no other layer "
            "is scaled)."
        ) in found
        assert "yes" not in found

    def test_of_a_power_without_norm(self, set_flags):
        set_flags(activations="relu", norms="none")
        made_up = self.made_up(lambda a: a**2, lambda a: a, depth=3, norm="none")
        found = gradient_flow.answer(*made_up)
        assert "With BN" not in found
        assert (
            "yes, as the power 2.00 to 2.00 of init_scale in all layers (2 other layers are scaled)." in found
        )
        made_up = self.made_up(lambda a: a**1.5, lambda a: a, depth=2, norm="none")
        found = gradient_flow.answer(*made_up)
        assert (
            "yes, though as no power, slope 1.50 to 1.50 of init_scale in all layers (1 other layer is"
            in found
        )

    def test_of_what_has_no_law(self, set_flags):
        """The cross-entropy's softmax saturates, and so do sigmoids."""

        def law(a):
            return (a**2).where(a < 5e3, 0)

        for activation, loss in (("relu", "cross_entropy"), ("sigmoid", "cotangent")):
            set_flags(activations=activation, norms="none", loss=loss)
            made_up = self.made_up(law, law, depth=3, norm="none", activation=activation)
            found = gradient_flow.answer(*made_up)
            assert (
                f"{activation} without BN, 3 layers, gradient to the first layer's weights: slope 2.00 at "
                "small scales, 2.00 from 3 to 100, largest (1.0e+06) at 1e+03, exactly 0 from 1e+04."
            ) in found
            assert "power" not in found
            assert gradient_flow.slopes_table(*made_up).row_count == 0
        made_up = self.made_up(lambda a: a**2 / (1 + a), law, depth=3, norm="none", activation="sigmoid")
        found = gradient_flow.answer(*made_up)
        assert "no single power: slope 2.00 at small scales, 1.04 from" in found

    @pytest.mark.parametrize(
        ("norm", "words"), [("none", "weights: no slope"), ("batch", "With BN there are")]
    )
    def test_of_dead_units(self, set_flags, norm, words):
        set_flags(activations="relu", norms=norm)
        made_up = self.made_up(lambda a: 0 * a, lambda a: 0 * a, depth=2, norm=norm)
        (row,) = zip(*(column.cells for column in gradient_flow.slopes_table(*made_up).columns), strict=True)
        assert row[3:] == ("-",) * 6
        assert words in gradient_flow.answer(*made_up)


class TestMain:
    @pytest.mark.slow
    @pytest.mark.parametrize(("norms", "depth"), [("batch", 1), ("batch,none", 2)])
    def test_at_a_tiny_size(self, main, capsys, norms, depth):
        folder = main(**TINY | {"depths": depth}, activations="relu", norms=norms)
        results = bnjax.load_results(folder / "results.zarr")
        printed = capsys.readouterr().out
        for name in ("layers.png", "scales.png"):
            assert (folder / name).stat().st_size > 10_000
            assert name in printed
        sizes = {
            "activation": 1,
            "norm": len(norms.split(",")),
            "depth": 1,
            "init_scale": 10,
            "seed": 2,
            "layer": depth + 1,
        }
        assert sizes.items() <= dict(results.sizes).items()
        # The slopes over 7 decades and more, by numpy and from what is stored.
        hidden = results.sel(activation="relu", depth=depth).isel(layer=slice(0, depth))
        normed = hidden.sel(norm="batch").where(hidden.init_scale > 0.5, drop=True)
        laws = [
            (normed.weight_gradient, -1),
            (normed.preactivation_gradient, -1),
            (normed.norm_gradient, 0),
            (normed.activation_gradient, 0),
        ]
        if "none" in norms:
            plain = hidden.sel(norm="none")
            assert plain.norm_gradient.isnull().all()
            assert re.search(r"relu without BN, 2 layers.*: yes, as the power 1\.00 to 1\.00", printed)
            laws.append((plain.weight_gradient, 1))
        for values, power in laws:
            logs = np.log10(values.transpose("init_scale", ...).values.reshape(len(values.init_scale), -1))
            found = np.polyfit(np.log10(values.init_scale), logs, 1)[0]
            np.testing.assert_allclose(found, power, atol=0.02)
        assert "With BN, no: over 7.0 decades" in printed
        assert ("without BN" in printed) == ("none" in norms)
        assert results.attrs["thresholds"]["relu"] == pytest.approx(np.sqrt(1e-5 / (1 - 1 / np.pi)), rel=1e-4)
        assert results.training_gradient_norm.sizes["probe_step"] == 2

    @pytest.mark.slow
    def test_of_what_has_no_power_law(self, main, capsys):
        """Sigmoid at 1e7: all of some 1000 units are saturated, and the gradient is exactly 0."""
        folder = main(**TINY, activations="sigmoid", loss="cross_entropy")
        results = bnjax.load_results(folder / "results.zarr")
        first = results.weight_gradient.sel(norm="none", layer="hidden_0")
        assert (first.sel(init_scale=1e7, method="nearest") == 0).all()
        printed = capsys.readouterr().out
        assert re.search(r"sigmoid without BN, 2 layers.*: no single power.*exactly 0 from", printed)
        assert "sigmoid, BN" in printed

    @pytest.mark.slow
    def test_with_one_norm(self, main, capsys):
        main(**TINY, activations="linear", norms="none")
        printed = capsys.readouterr().out
        assert "With BN" not in printed
        assert "linear without BN, 2 layers" in printed


def test_without_matplotlib(main, monkeypatch):
    monkeypatch.delattr(bnjax, "plots", raising=False)
    monkeypatch.setitem(sys.modules, "bnjax.plots", None)
    with pytest.raises(SystemExit, match=r"error: .*bnjax\.plots"):
        main(**TINY)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"activations": "relu,tan"},
            r"unknown activation in --activations 'tan' \(did you mean 'tanh'\?\).*relu",
        ),
        ({"activations": ""}, "--activations must name at least one"),
        ({"norms": "batch,batch"}, "--norms must name at least one, and none twice, got 'batch,batch'"),
        ({"norms": "layer"}, "unknown norm in --norms 'layer'.*batch, none"),
        ({"depths": "0,2"}, "--depths must be whole numbers of at least 1, got '0,2'"),
        ({"depths": "two"}, "--depths must be whole numbers"),
        ({"depths": f"3,{2**31}"}, "--depths must be in .* got 2147483648"),
        ({"hidden_width": 2**31}, "--hidden_width must be in .* got 2147483648"),
        ({"seeds": 10**20}, "--seeds takes a count .* got '100000000000000000000'"),
        ({"seeds": f"5:{10**20}"}, "--seeds takes a count .* got '5:100000000000000000000'"),
        ({"steps": "-1,5"}, "--steps must be whole numbers of at least 0"),
        ({"steps": "0"}, "--steps must have one above 0"),
        ({"epsilon": -1}, "--epsilon: epsilon must be >= 0 and finite, got -1"),
        ({"seeds": "none"}, "--seeds takes"),
        ({"init_scales": "1:2"}, "--init_scales takes numbers"),
        ({"init_scales": "0,1"}, "init_scale must be positive"),
        (
            {"init_scales": "1e-4:1e-2:5", "shown_scales": "1e-2"},
            "--init_scales must have 2 values from 0.115 upward",
        ),
        ({"shown_scales": "0.5"}, r"--shown_scales must be among --init_scales.*got \[0.5\]"),
        ({"batch_size": 2}, "at least 3 with BN.*got 2 and 6"),
        ({"batch_size": 100_000}, "--batch_size must be at most"),
        (
            {"jacobian_examples": 16},
            r"--jacobian_examples=16 .*makes Jacobians of \d+ entries, more than 8388608",
        ),
        ({"learning_rate": 0}, "learning_rate must be positive"),
    ],
)
def test_bad_flags(main, options, words):
    with pytest.raises(SystemExit, match=words):
        main(**options)
