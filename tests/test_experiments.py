"""The short experiments' main runs at a tiny size, and what they refuse."""

import jax
import numpy as np
import pytest
import scripts

import bnjax
from bnjax import batch_norm
from experiments.benchmark import layers

TINY = {"rounds": 2, "milliseconds": 0.1}


@pytest.fixture
def main(tmp_path):
    """Runs an experiment in this process, with its defaults but for the flags given; --out is tmp_path/out."""

    def call(name, **options):
        scripts.run(name, **({"out": str(tmp_path / "out")} | options))
        return tmp_path / "out"

    return call


class TestBenchmark:
    @pytest.mark.slow
    @pytest.mark.parametrize(("cells", "shapes"), [(3, "8x4,2x3x3x4"), (1, "2x3x3x4")])
    def test_main(self, main, capsys, cells, shapes):
        folder = main("benchmark.__main__", cells=cells, shapes=shapes, **TINY)
        results = bnjax.load_results(folder / "results.zarr")
        assert dict(results.sizes) == {"shape": shapes.count(",") + 1, "implementation": 4, "round": 2}
        assert (results.seconds > 0).all()
        kept = results.residual_bytes.sel(shape="2x3x3x4")
        assert (kept >= cells * 2 * 3 * 3 * 4 * 4).all()  # x, or as much, in bytes
        printed = capsys.readouterr().out
        assert all(shape in printed for shape in shapes.split(","))
        assert str(folder) in printed

    def test_residuals_are_no_larger_than_any(self):
        """Of a size that counts: what a feature keeps once, against what a sample does."""
        arguments = layers.problem((64, 32), 1)[:3]
        kept = {name: layers.residual_bytes(f, 1, *arguments) for name, f in layers.layers().items()}
        a_row = 4 * 32
        assert kept["bnjax"] <= min(kept.values()) + a_row
        assert kept["bnjax"] < 0.6 * min(kept["autodiff"], kept["flax"])

    def test_implementations_agree(self):
        """They are timed on the same task: outputs, statistics and gradients to float32's rounding."""
        arguments = layers.problem((64, 8), 1)
        expected, *others = (
            jax.tree.leaves(jax.jit(layers.both_passes(layer))(*arguments)) for layer in layers.layers().values()
        )
        assert len(others) == 3
        for found in others:
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("shape", ["8", "8x", "0x3", "axb", ""])
    def test_bad_shapes(self, main, shape):
        with pytest.raises(SystemExit, match=r"error: --shapes takes sizes such as .* got"):
            main("benchmark.__main__", shapes=shape)

    @pytest.mark.parametrize(
        "options", [{"shapes": f"4x{2**31}"}, {"rounds": 2**31}, {"workloads": "all", "growth_cells": f"1,{2**31}"}]
    )
    def test_too_large(self, main, tmp_path, options):
        flag = [*options][-1]
        with pytest.raises(SystemExit, match=rf"error: --{flag} must be in .* got 2147483648"):
            main("benchmark.__main__", **options)
        assert not (tmp_path / "out").exists()

    def test_a_shape_given_twice(self, main):
        with pytest.raises(SystemExit, match="--shapes names a shape twice: 8x4,8X4"):
            main("benchmark.__main__", shapes="8x4,8X4")


class TestJacobianCheck:
    @pytest.mark.slow
    def test_a_wrong_closed_form_is_found(self, main, monkeypatch):
        right = batch_norm.standardize

        def wrong(*args, **kwargs):
            x_hat, inv_sigma = right(*args, **kwargs)
            return x_hat, inv_sigma * 1.001

        monkeypatch.setattr(batch_norm, "standardize", wrong)
        with pytest.raises(SystemExit, match="jacobian must hold, but: The closed forms"):
            main("jacobian_check.__main__", samples=5, operator_samples=100)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"samples": 4, "masked": 4}, "--masked leaves none of --samples=4, got 4"),
            ({"samples": 0}, "--samples must be at least 1"),
            ({"activation": "tan"}, "unknown --activation .*did you mean .tanh"),
            ({"epsilon": 0}, "--epsilon must be above 0"),
            ({"std": 0}, "--std must be above 0"),
            ({"scale": "nan"}, "--scale must be finite"),
            ({"seed": 10**20}, r"--seed must be in \[-2\^31, 2\^31\), got 100000000000000000000"),
        ],
    )
    def test_bad_flags(self, main, options, words):
        with pytest.raises(SystemExit, match=words):
            main("jacobian_check.__main__", **options)
