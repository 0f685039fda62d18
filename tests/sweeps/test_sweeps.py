"""Grids: axes to cells, labels, probes, what is shown, what is refused, and plain storage."""

import inspect
import json
import re
import resource
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import quick
import xarray as xr

import bnjax
from bnjax import compilation
from bnjax.sweeps import grid, program, run

MODEL = bnjax.mlp((8,), 4)
CONFIG = bnjax.TrainConfig(steps=12, batch_size=32, eval_every=5)


def sweep(ds, axes, model=MODEL, **options):
    return bnjax.sweep(model, ds, CONFIG, axes, **{"progress": False} | options)


class TestGrid:
    def test_cells_are_the_product_with_the_last_axis_fastest(self):
        hyper = bnjax.Hyperparams(momentum=0.5)
        axes = grid.check({"init_scale": [1, 10], "seed": range(3)}, hyper)
        cells = grid.cells(axes, hyper)
        np.testing.assert_array_equal(cells.init_scale, np.float32([1, 1, 1, 10, 10, 10]))
        np.testing.assert_array_equal(cells.seed, [0, 1, 2, 0, 1, 2])
        np.testing.assert_array_equal(cells.momentum, np.float32([0.5] * 6))
        assert cells.seed.dtype == np.uint32

    def test_no_axes_are_one_cell(self):
        assert grid.cells({}, bnjax.Hyperparams(seed=7)).seed.tolist() == [7]

    @pytest.mark.parametrize(
        ("axes", "words"),
        [
            ({"sed": [1]}, r"unknown axis 'sed' \(did you mean 'seed'\?\); allowed: seed, init_scale"),
            ({"seed": []}, "axis seed is empty"),
            ({"seed": 2}, "axis seed takes a list of values, got 2"),
            ({"seed": [1, 2, 1]}, "axis seed has duplicate values: 1"),
            ({"init_scale": [0.1, 0.1 + 1e-12]}, "axis init_scale has duplicate values: 0.1"),
            ({"seed": [0.5]}, r"seed must be a whole number in \[0, 2\^31\), got 0.5"),
            ({"seed": [-1]}, r"seed must be a whole number in \[0, 2\^31\), got -1"),
            ({"init_scale": [0.0]}, "init_scale must be positive and finite in float32, got 0.0"),
            ({"init_scale": [1e-60]}, "init_scale must be positive and finite in float32, got 1e-60"),
            ({"init_scale": [float("nan")]}, "init_scale must be positive .*, got nan"),
            ({"init_scale": [float("inf")]}, "init_scale must be positive .*, got inf"),
            ({"learning_rate": [-0.1]}, "learning_rate must be positive .*, got -0.1"),
            ({"momentum": [1.0]}, r"momentum must be in \[0, 1\) \(the optimizer's\), got 1.0"),
            ({"weight_decay": [-1e-4]}, "weight_decay must be zero or positive"),
            ({"init_scale": ["big"]}, "init_scale must be positive .*, got 'big'"),
        ],
    )
    def test_bad_axes(self, axes, words):
        with pytest.raises(ValueError, match=words):
            grid.check(axes, bnjax.Hyperparams())

    def test_bad_value_of_what_is_not_swept(self):
        with pytest.raises(ValueError, match="learning_rate must be positive"):
            grid.check({}, bnjax.Hyperparams(learning_rate=0.0))


class TestSweep:
    axes = {"learning_rate": [0.05, 0.2], "seed": range(3), "init_scale": [0.1, 1.0, 10.0]}  # noqa: RUF012

    def test_is_labelled(self, blobs):
        results = sweep(blobs, self.axes, hyper=bnjax.Hyperparams(momentum=0.5))
        assert results.test_accuracy.dims == ("learning_rate", "seed", "init_scale", "step")
        assert results.diverged.dims == ("learning_rate", "seed", "init_scale")
        assert results.step.values.tolist() == [5, 10, 12]
        assert results.learning_rate.values.tolist() == [0.05, 0.2]
        assert results.attrs["hyper"] == {"momentum": 0.5, "weight_decay": 0.0}
        assert results.attrs["config"]["steps"] == 12
        assert results.attrs["models"][""]["features"] == [8]
        json.dumps(results.attrs)

    def test_each_cell_is_the_run_of_its_own_hyperparameters(self, blobs):
        """A run outside any grid may differ by rounding: 12 steps amplify 1e-7 to less than 1e-3."""
        results = sweep(blobs, self.axes)
        train = jax.jit(bnjax.make_train(MODEL, CONFIG))
        for lr, seed, scale in [(0.05, 0, 10.0), (0.2, 2, 0.1)]:
            alone = train(bnjax.Hyperparams(seed=seed, init_scale=scale, learning_rate=lr), blobs)
            cell = results.sel(learning_rate=lr, seed=seed, init_scale=scale)
            np.testing.assert_allclose(cell.train_loss, alone.train_loss, rtol=1e-3)
            np.testing.assert_allclose(cell.test_loss, alone.test_loss, rtol=1e-3)

    def test_no_axes_are_one_cell(self, blobs):
        results = sweep(blobs, {})
        assert results.test_loss.dims == ("step",)
        assert results.diverged.shape == ()

    @pytest.mark.slow
    def test_several_models(self, blobs):
        models = {"batch": MODEL, "none": bnjax.mlp((8,), 4, norm="none")}
        both = sweep(blobs, {"seed": range(3)}, models)
        assert both.test_loss.dims == ("model", "seed", "step")
        for name, model in models.items():
            assert (both.test_loss.sel(model=name) == sweep(blobs, {"seed": range(3)}, model).test_loss).all()

    def test_probes(self, blobs):
        """What they measure in each cell, labelled; the runs themselves are as without."""

        def measure(s):
            norms = [jnp.linalg.norm(s.params[name]["kernel"]) for name in ("hidden_0", "output")]
            return {"norm": jnp.stack(norms), "scale": jnp.float32(s.hyper.init_scale), "one": 1.0}

        probe = bnjax.Probe(measure, layers=["hidden_0", "output"])
        axes = {"seed": range(3), "init_scale": [0.5, 2.0]}
        found = sweep(blobs, axes, {"a": MODEL}, probe=probe).sel(model="a")
        assert found.norm.dims == ("seed", "init_scale", "probe_step", "layer")
        assert found.scale.dims == ("seed", "init_scale", "probe_step")
        assert found.probe_step.values.tolist() == [0, 5, 10, 12]
        assert (found.scale == found.init_scale).all()
        start, _ = MODEL.init(jax.random.key(2), (12,), 2.0)
        cell = found.sel(seed=2, init_scale=2.0)
        np.testing.assert_allclose(
            cell.norm.sel(probe_step=0, layer="hidden_0"), jnp.linalg.norm(start["hidden_0"]["kernel"]), rtol=1e-6
        )
        np.testing.assert_allclose(found.test_loss, sweep(blobs, axes).test_loss, rtol=1e-3)

    @pytest.mark.parametrize(
        ("probe", "words"),
        [
            (bnjax.Probe(lambda s: {"a": jnp.ones(3)}, ("x", "y")), r"'a' must be a scalar or one figure"),
            (bnjax.Probe(lambda s: {"test_loss": jnp.ones(())}), "must not call a quantity 'test_loss'"),
            (bnjax.Probe(lambda s: {"seed": jnp.ones(())}), "must not call a quantity 'seed'"),
            ({"other": bnjax.Probe(lambda s: {})}, r"one for the one model, and no mapping, got \['other'\]"),
        ],
    )
    def test_bad_probes(self, blobs, monkeypatch, probe, words):
        monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("work was started"))
        with pytest.raises(ValueError, match=words):
            sweep(blobs, {"seed": [0]}, probe=probe)

    def test_probes_of_several_models_must_agree(self, blobs):
        probes = {"a": bnjax.Probe(lambda s: {"x": jnp.ones(())}), "b": bnjax.Probe(lambda s: {})}
        with pytest.raises(ValueError, match="all models' probes must measure the same"):
            sweep(blobs, {"seed": [0]}, {"a": MODEL, "b": MODEL}, probe=probes)

    @pytest.mark.parametrize(
        ("width", "devices"),
        [(1, 2), pytest.param(None, 1, marks=pytest.mark.slow), pytest.param(5, 2, marks=pytest.mark.slow)],
    )
    def test_width_and_devices_change_nothing_but_rounding(self, blobs, width, devices):
        found = sweep(blobs, self.axes, width=width, devices=jax.devices()[:devices])
        np.testing.assert_allclose(found.test_loss, sweep(blobs, self.axes).test_loss, rtol=1e-3)

    def test_progress_is_shown_or_not(self, blobs, capsys):
        sweep(blobs, {"seed": [0]}, progress=True)
        captured = capsys.readouterr()
        first, *_, last = captured.err.splitlines()
        assert first == "compiling the network ..."
        assert last.startswith("1/1 cells, ")
        assert ", 0 diverged, " in last
        assert captured.out == ""
        sweep(blobs, {"seed": [0]}, progress=False)
        assert capsys.readouterr() == ("", "")

    def test_in_a_notebook_it_is_one_line(self, blobs, capsys, monkeypatch):
        shown = []

        class Line:
            def update(self, data, raw):
                shown.append(data["text/plain"])

        def display(data, raw, display_id):
            shown.append(data["text/plain"])
            return Line()

        ipython = types.ModuleType("IPython.display")
        ipython.display = display
        monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
        monkeypatch.setitem(sys.modules, "IPython.display", ipython)
        monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
        sweep(blobs, {"seed": [0]}, progress=True)
        assert shown[0] == "compiling the network ..."
        assert shown[-1].startswith("1/1 cells, ")
        assert capsys.readouterr() == ("", "")

    def test_what_is_compiled_is_said_before_it_is(self, blobs, capsys, monkeypatch):
        """Each network once, and nothing where all cells stand."""
        said, fitted = [], program.Trainer.fitted

        def spy(trainer, **options):
            said.append(capsys.readouterr().err)
            return fitted(trainer, **options)

        monkeypatch.setattr(program.Trainer, "fitted", spy)
        sweep(blobs, {"seed": [0]}, {"a": MODEL, "b": MODEL}, progress=True)
        assert said[:2] == ["compiling a ...\n", "compiling b ...\n"]
        assert "compiling" not in "".join(said[2:]) + capsys.readouterr().err

    @pytest.mark.parametrize(
        ("model", "change", "words"),
        [
            ({}, {}, "model is an empty mapping"),
            (MODEL, {"train_x": np.zeros((9, 12), np.float32)}, "9 examples and 256 labels"),
            (bnjax.mlp((8,), 2), {}, r"train labels must be in \[0, 2\)"),
        ],
    )
    def test_bad_input_before_any_work(self, blobs, monkeypatch, model, change, words):
        monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("work was started"))
        with pytest.raises(ValueError, match=words):
            sweep(blobs._replace(**change), {"seed": [0]}, model)


class TestRefusedBeforeAnyWork:
    @pytest.fixture
    def refused(self, blobs, tmp_path, monkeypatch):
        """Checks that it raises a ValueError with these words, trains and compiles nothing and writes nothing."""
        for module, name in ((run, "_train"), (program, "compiled"), (program, "_text")):
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("work was started"))
        # Without the tests' checks of types, as users call it.
        whatever = inspect.unwrap(bnjax.sweep)

        def check(words, model=MODEL, **options):
            options = {"path": tmp_path / "r.zarr", "progress": False} | options
            with pytest.raises(ValueError, match=words):
                whatever(model, blobs, CONFIG, {"seed": [0]}, **options)
            assert [*tmp_path.iterdir()] == []

        return check

    NAMES = ("a/b", "", None, 1, 0.5, True, "a\0b", "a\nb", ".", "..", "\ud800", 128 * "ü")

    @pytest.mark.parametrize("name", NAMES)
    def test_names_of_models(self, refused, name):
        words = r"a model's name must be a string that can name a file \(not empty, .* got " + re.escape(repr(name))
        refused(words, {"a": MODEL, name: MODEL})

    @pytest.mark.parametrize("name", NAMES)
    def test_names_of_quantities(self, refused, name):
        words = r"a probe's quantity must be a string .* no '/', control .* got " + re.escape(repr(name))
        refused(words, probe=bnjax.Probe(lambda s: {"a": jnp.ones(()), name: jnp.ones(())}))

    @pytest.mark.parametrize("name", ["zarr.json", "bnjax", "done"])
    def test_quantities_that_are_there_anyway(self, refused, name):
        words = f"a probe must not call a quantity '{name}', a name that results have anyway"
        refused(words, probe=bnjax.Probe(lambda s: {name: jnp.ones(())}))

    @pytest.mark.parametrize("layers", [(1, 2), ("a", None), ("a", "b", "a"), ["a", []], "ab", None])
    def test_layers(self, refused, layers):
        words = "a probe's layers must be a list of different strings, got " + re.escape(repr(layers))
        refused(words, probe=bnjax.Probe(lambda s: {"a": jnp.ones(2)}, layers))

    @pytest.mark.parametrize("devices", [[], ()])
    def test_no_devices(self, refused, devices):
        refused(r"devices must be at least one \(None: all local ones\), got an empty list", devices=devices)

    @pytest.mark.parametrize("minutes", [float("nan"), -1, -0.5, float("-inf"), "5", None, True, 1j])
    def test_checkpoint_minutes(self, refused, minutes):
        words = "checkpoint_minutes must be a number of at least 0, got " + re.escape(repr(minutes))
        refused(words, checkpoint_minutes=minutes)

    @pytest.mark.parametrize("argument", ["width", "segment"])
    @pytest.mark.parametrize("value", [0, -1, True, 2.0, 2.5, float("nan"), "2"])
    def test_counts(self, refused, argument, value):
        words = f"{argument} must be a positive integer, got " + re.escape(repr(value))
        refused(words, **{argument: value})

    @pytest.mark.parametrize("argument", ["width", "segment"])
    def test_large_counts(self, refused, argument):
        refused(rf"{argument} must be below 2\^31, got 2147483648", **{argument: 2**31})


def test_what_is_not_refused(blobs, tmp_path):
    """Names and numbers of numpy, a layer's name with a slash or empty, and no checkpoints."""
    results = inspect.unwrap(bnjax.sweep)(
        {np.str_("BN, he_normal"): bnjax.mlp((), 4)},
        blobs,
        CONFIG,
        {"seed": [0]},
        probe=bnjax.Probe(lambda s: {np.str_("a quantity"): jnp.ones(2)}, ["x/y", np.str_("")]),
        path=tmp_path / "r.zarr",
        checkpoint_minutes=float("inf"),
        width=np.int64(2),
        segment=np.int32(5),
        progress=False,
    )
    xr.testing.assert_identical(bnjax.load_results(tmp_path / "r.zarr"), results)


@pytest.mark.slow
def test_orthogonal_kernels_on_several_devices(blobs):
    """A batched QR decomposition on several CPU devices once waited for its own threads for ever."""
    config = bnjax.TrainConfig(steps=2, batch_size=32)
    model = bnjax.mlp((8, 8), 4, initializer="orthogonal")
    results = bnjax.sweep(model, blobs, config, {"seed": range(16)}, progress=False, width=8)
    assert len(np.unique(results.train_loss)) == 16


class TestStore:
    def test_reads_what_it_wrote(self, blobs, tmp_path):
        results = sweep(blobs, {"seed": range(2), "init_scale": [0.1, 1.0]}, {"batch": MODEL})
        bnjax.save_results(results, tmp_path / "r.zarr")
        found = bnjax.load_results(tmp_path / "r.zarr")
        xr.testing.assert_identical(found, results)
        assert found.attrs == results.attrs
        assert [p.name for p in tmp_path.iterdir()] == ["r.zarr"]

    def test_never_overwrites_silently(self, tmp_path):
        one, two = xr.Dataset({"a": ("x", [1.0])}), xr.Dataset({"a": ("x", [2.0])})
        bnjax.save_results(one, tmp_path / "r.zarr")
        with pytest.raises(FileExistsError, match=r"r\.zarr exists"):
            bnjax.save_results(two, tmp_path / "r.zarr")
        xr.testing.assert_identical(bnjax.load_results(tmp_path / "r.zarr"), one)
        bnjax.save_results(two, tmp_path / "r.zarr", overwrite=True)
        xr.testing.assert_identical(bnjax.load_results(tmp_path / "r.zarr"), two)

    def test_a_write_that_fails_leaves_what_was_there(self, tmp_path, monkeypatch):
        one = xr.Dataset({"a": ("x", [1.0])})
        bnjax.save_results(one, tmp_path / "r.zarr")

        def fail(*_, **__):
            raise OSError("disk full")

        monkeypatch.setattr(xr.Dataset, "to_zarr", fail)
        with pytest.raises(OSError, match="disk full"):
            bnjax.save_results(one, tmp_path / "r.zarr", overwrite=True)
        xr.testing.assert_identical(bnjax.load_results(tmp_path / "r.zarr"), one)
        assert [p.name for p in tmp_path.iterdir()] == ["r.zarr"]

    def test_a_flipped_bit_is_noticed(self, tmp_path):
        bnjax.save_results(xr.Dataset({"a": ("x", np.arange(64.0))}), tmp_path / "r.zarr")
        chunk = tmp_path / "r.zarr" / "a" / "c" / "0"
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)
        with pytest.raises(ValueError, match="checksum"):
            bnjax.load_results(tmp_path / "r.zarr")

    def test_a_config_that_json_cannot_hold(self, blobs):
        with pytest.raises(ValueError, match=r"must be what JSON holds: .* not JSON serializable"):
            sweep(blobs, {"seed": [0]}, MODEL._replace(config={"f": print}))


def peak(cells, file):
    """Writes the most memory that a process takes for so many cells of the default network."""
    jax.config.update("jax_num_cpu_devices", 2)
    compilation.CPU_OPTIONS = quick.as_users()  # it takes longer to run than to compile
    compilation.use_cache()
    rng, splits = np.random.default_rng(0), []
    for n in (2000, 1000):
        splits += [rng.normal(size=(n, 784)).astype(np.float32), rng.integers(10, size=n).astype(np.int32)]
    config, axes = bnjax.TrainConfig(steps=2), {"seed": range(cells)}
    bnjax.sweep(bnjax.mlp(), bnjax.Dataset(*splits), config, axes, progress=False)
    file.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_grid(tmp_path):
    """400 cells against 100, each in a process of its own."""
    for cells in (100, 400):
        log = tmp_path / "log"
        process = processes.start(peak, log, cells=cells, file=tmp_path / str(cells))
        assert processes.end_of(process) == 0, log.read_text()
    few, many = (int((tmp_path / str(cells)).read_text()) for cells in (100, 400))
    assert many <= 1.1 * few
