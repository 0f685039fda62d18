"""The main experiment: its text forms, its refusals, and its whole run at a tiny size."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scripts
import xarray as xr
from absl import flags

import bnjax
from experiments import common
from experiments.init_robustness import report

ROOT = Path(__file__).parents[1]
TINY = {
    "train_examples": 300,
    "steps": 15,
    "batch_size": 50,
    "depth": 1,
    "hidden_width": 8,
    "seeds": "2",
    "init_scales": "0.01,1,100",
}
ONE_NETWORK = {"norms": "none"}  # where one is enough, since each is compiled


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def main(data_dir, tmp_path):
    """Runs the experiment in this process, with flags over the tiny ones; the output folder is tmp_path/out."""

    def call(**options):
        scripts.run(
            "init_robustness.__main__", **(TINY | {"data_dir": data_dir, "out": str(tmp_path / "out")} | options)
        )

    return call


@pytest.fixture(scope="module")
def one_network(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_network") / "out"
    scripts.run("init_robustness.__main__", **(TINY | ONE_NETWORK | {"data_dir": data_dir, "out": str(out)}))
    return out


@pytest.fixture
def trained(one_network, tmp_path):
    """The output folder, with the results of one network."""
    return shutil.copytree(one_network, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "values"), [("0.1,1,10", [0.1, 1, 10]), ("1e-4:1e4:5", [1e-4, 1e-2, 1, 1e2, 1e4]), ("3", [3])]
)
def test_scales_as_text(text, values):
    assert common.parse_floats("init_scales", text) == values


@pytest.mark.parametrize("text", ["", "1,", "1:2", "1:2:3:4", "2:1:3", "0:1:3", "1:2:1", "a", "1:inf:3", "1:2:2.5"])
def test_malformed_scales(text):
    with pytest.raises(ValueError, match=r"--init_scales.*" + re.escape(repr(text))):
        common.parse_floats("init_scales", text)


@pytest.mark.parametrize(("text", "seeds"), [("3", [0, 1, 2]), ("5:8", [5, 6, 7]), ("4,2", [4, 2])])
def test_seeds_as_text(text, seeds):
    assert common.parse_seeds("seeds", text) == seeds


@pytest.mark.parametrize("text", ["", "0", "-2", "3:3", "1.5", "1:2:3", "x"])
def test_malformed_seeds(text):
    with pytest.raises(ValueError, match=r"--seeds takes .*" + re.escape(repr(text))):
        common.parse_seeds("seeds", text)


def test_whole_run(main, tmp_path, capsys):
    main()
    out = capsys.readouterr().out
    table = out[: out.index("figure: ")]
    for words in ("Robust range", "70%", "80%", "90%", "95%", "no BN: best median", "BN, hidden frozen: best"):
        assert words in table
    assert "Baseline of BN; no BN: BN, hidden frozen." in table
    assert max(map(len, table.splitlines())) <= 80
    assert re.search(r"^plan: +BN; no BN; BN, hidden frozen: width \d+ on 2 devices$", out, re.MULTILINE)
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["accuracy.png"]
    assert (tmp_path / "out" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    results = bnjax.load_results(tmp_path / "out" / "results.zarr")
    assert results.test_accuracy.dims == ("model", "seed", "init_scale", "learning_rate", "step")
    assert results.model.values.tolist() == ["BN", "no BN", "BN, hidden frozen"]
    assert results.attrs["data"]["train_examples"] == 300
    assert results.attrs["config"]["batch_size"] == 50
    assert "jax" in results.attrs["versions"]
    assert results.attrs["command"].startswith("python -m experiments.init_robustness --")
    assert "--train_examples=300" in results.attrs["command"]
    assert "--seeds=8 " in out.splitlines()[-1]
    assert "--overwrite" not in out.splitlines()[-1]
    assert "--seeds=2 " not in out.splitlines()[-1]

    # The same again trains nothing and shows the same table.
    main()
    again = capsys.readouterr().out
    assert "its cells are checked" in again
    assert again[again.index("Robust range") :] == out[out.index("Robust range") :]


def test_a_plan_in_words():
    stored = {"width": 16, "devices": 2}
    assert report._in_words(stored) == "width 16 on 2 devices"
    narrowed = stored | {"devices": 1, "narrowed": "width 32 needs more"}
    assert report._in_words(narrowed).endswith("16 on 1 device; width 32 needs more")


@pytest.fixture
def flagged():
    """Sets the flags, over the tiny ones, without a run; the script's module."""

    def call(**options):
        module, values = scripts.load("init_robustness.__main__"), flags.FLAGS
        values.unparse_flags()
        for flag in values:
            values[flag].unparse()
        values(["init_robustness.py", *(f"--{flag}={value}" for flag, value in (TINY | options).items())])
        return module

    yield call
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "1 hidden layer of 8, relu, BN before activation, he_normal, sgd, learning rate 0.1, momentum 0.9, "),
        ({"depth": 2}, "2 hidden layers of 8"),
        ({"optimizer": "adam"}, "adam, learning rate 0.1"),
        ({"learning_rates": "1,0.01,0.1"}, "learning rate 0.01 to 1 (best of 3 per scale)"),
        ({"initializers": "orthogonal,he_normal"}, "orthogonal, he_normal"),
        ({"norm_position": "after_activation"}, "BN after activation"),
        ({"norms": "none"}, "relu, he_normal"),
        ({"norms": "batch,layer,none"}, "BN and LayerNorm before activation, he_normal"),
        ({"model": "residual"}, "residual, 1 block of 8, relu"),
        ({"weight_decay": 0.01}, "weight_decay 0.01"),
        ({"epsilon": 1e-3}, "epsilon 0.001"),
        ({"scaled_layers": "all"}, "scaled_layers all"),
        ({}, "15 steps of batch 50, train_examples 300"),
    ],
)
def test_the_title_tells_runs_apart(flagged, options, words):
    assert words in flagged(**options).title().replace("\N{NO-BREAK SPACE}", " ")


def test_best_rates_in_words():
    """Of rates 0.01 and 0.1; where the best is no more than 5 points above guessing, none."""
    dims = {"model": ["BN", "no BN"], "init_scale": [1e-4, 1.0, 10.0, 100.0], "learning_rate": [0.01, 0.1], "seed": [0]}
    low, high = [[0.8, 0.7, 0.1, 0.15], [0.1, 0.1, 0.1, 0.1]], [[0.7, 0.6, 0.3, 0.14], [0.1, 0.9, 0.1, 0.1]]
    accuracy = xr.DataArray(np.stack([low, high], -1)[..., None], dims)
    rates = report.best_rates(accuracy, 0.1)
    np.testing.assert_array_equal(rates, [[0.01, 0.01, 0.1, np.nan], [np.nan, 0.1, np.nan, np.nan]])
    assert report.rate_lines(rates)[1:] == [
        "BN: 0.01 (scale 1e-4 to 1), 0.1 (scale 10), none (scale 100)",
        "no BN: none (scale 1e-4), 0.1 (scale 1), none (scale 10 to 100)",
    ]


def test_report_of_several_learning_rates(flagged, tmp_path, capsys):
    """A map beside the curve, each network's width, 80 columns."""
    names = ["BN", "no BN", "BN, hidden frozen"]
    dims = {"model": names, "seed": [0, 1], "init_scale": [0.01, 1.0, 100.0], "learning_rate": [0.01, 0.1]}
    accuracy = xr.DataArray(np.linspace(0.1, 0.9, 36).reshape(3, 2, 3, 2), dims).expand_dims(step=[15], axis=-1)
    plans = {name: {"width": 16 if name == "no BN" else 8, "devices": 2} for name in names}
    results = xr.Dataset(
        {"test_accuracy": accuracy, "diverged": accuracy.isel(step=0, drop=True) < 0},
        attrs={"models": {name: {"num_outputs": 10} for name in names}, "plan": plans},
    )
    module = flagged(learning_rates="0.01,0.1", out=tmp_path)
    module.report(results, tmp_path / "results.zarr", module.networks()[1], 0.8, module.title())
    out = capsys.readouterr().out
    pictures = [tmp_path / name for name in ("accuracy.png", "rates.png")]
    assert [line for line in out.splitlines() if "figure" in line] == [f"figure:   {path}" for path in pictures]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures)
    table = out[: out.index("figure: ")]
    assert "Each scale has its best learning_rate" in table
    assert "Learning rate of the best median" in table
    assert max(map(len, table.splitlines())) <= 80
    assert "plan:     BN; BN, hidden frozen: width 8 on 2 devices\nplan:     no BN: width 16 on 2 devices\n" in out


def test_other_results_are_refused_unless_they_may_be_replaced(main, trained, tmp_path):
    with pytest.raises(SystemExit, match=r"holds other results: config\.steps: 15 there, 16 asked for; "):
        main(**ONE_NETWORK, steps=16)
    assert bnjax.load_results(tmp_path / "out" / "results.zarr").attrs["config"]["steps"] == 15
    main(**ONE_NETWORK, steps=16, overwrite=True)
    assert bnjax.load_results(tmp_path / "out" / "results.zarr").attrs["config"]["steps"] == 16


@pytest.mark.parametrize(
    ("attributes", "origin"),
    [
        ({"command": "python -m experiments.scale_laws"}, "made by experiments.scale_laws"),
        ({}, "which does not say what made it"),
    ],
)
def test_what_others_made_is_not_replaced(main, tmp_path, attributes, origin):
    saved = xr.Dataset({"a": 1.0}, attrs=attributes)
    bnjax.save_results(saved, tmp_path / "out" / "results.zarr")
    with pytest.raises(SystemExit, match=f"results.zarr, {origin}; .* replaces only what it made"):
        main(overwrite=True)
    with pytest.raises(SystemExit, match="holds other results: it was saved at once"):
        main(**ONE_NETWORK)
    xr.testing.assert_identical(bnjax.load_results(tmp_path / "out" / "results.zarr"), saved)


def test_a_figure_of_others_stays(main, trained, tmp_path, capsys):
    picture = tmp_path / "out" / "accuracy.png"
    main(**ONE_NETWORK)  # its own is replaced
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == [picture.name]
    picture.write_bytes(b"mine")
    main(**ONE_NETWORK)
    assert picture.read_bytes() == b"mine"
    (other,) = {*(tmp_path / "out").glob("*.png")} - {picture}
    assert f"figure:   {other}" in capsys.readouterr().out


def test_a_bucket_is_no_folder(main):
    with pytest.raises(SystemExit, match=r"--out=gs:/b/x must be a local folder \(bnjax.sweep takes a bucket"):
        main(out="gs://b/x")


@pytest.mark.slow
def test_learning_rates_and_initializers(main, capsys, tmp_path):
    main(learning_rates="0.01,0.1", initializers="he_normal,orthogonal", norms="batch", seeds="3:4", activation="tanh")
    out = capsys.readouterr().out
    assert "Learning rate of the best median" in out
    assert (tmp_path / "out" / "rates.png").exists()
    results = bnjax.load_results(tmp_path / "out" / "results.zarr")
    assert results.model.values.tolist() == [
        "BN, he_normal",
        "BN, hidden frozen, he_normal",
        "BN, orthogonal",
        "BN, hidden frozen, orthogonal",
    ]
    assert results.seed.values.tolist() == [3]
    assert results.attrs["models"]["BN, orthogonal"]["activation"] == "tanh"
    assert np.isfinite(results.test_loss).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"dataset": "fashion"},
            r"unknown --dataset 'fashion'.*did you mean 'fashion_mnist'.*allowed: fashion_mnist_mini",
        ),
        ({"norms": "batch,layr"}, "unknown norm 'layr'.*did you mean 'layer'"),
        ({"model": "cnov"}, "unknown model 'cnov'.*did you mean 'conv'"),
        ({"norms": ""}, "--norms is empty"),
        ({"initializers": ""}, "--initializers is empty"),
        ({"activation": "Tanh"}, "did you mean 'tanh'"),
        ({"manual_dir": "nowhere"}, "manual_dir=nowhere is not a folder"),
        ({"seeds": "100000000000"}, "--seeds takes .*1000000 seeds"),
        ({"init_scales": "1e-4:1e4:1000000000"}, "--init_scales: a range needs"),
        ({"norms": "none,none"}, "must not repeat a name, got 'no BN' twice"),
        ({"activation": "sigmod"}, "unknown activation 'sigmod'.*did you mean 'sigmoid'"),
        ({"initializers": "he"}, "unknown initializer 'he'.*allowed: random_normal"),
        ({"optimizer": "adma"}, "unknown optimizer 'adma'.*did you mean 'adam'"),
        ({"standardize": "pixel"}, "unknown standardiz.* 'pixel'"),
        ({"init_scales": "1,-1"}, "init_scale must be positive and finite in float32, got -1.0"),
        ({"init_scales": "1,nan"}, "init_scale must be positive .*, got nan"),
        ({"init_scales": "1,1"}, "axis init_scale has duplicate values: 1"),
        ({"init_scales": "1..2"}, "--init_scales takes numbers"),
        ({"learning_rates": "0"}, "learning_rate must be positive"),
        ({"seeds": "one"}, "--seeds takes a count"),
        ({"momentum": "1"}, r"momentum .* in \[0, 1\)"),
        ({"weight_decay": "-1"}, "weight_decay must be zero or positive"),
        ({"epsilon": "-1"}, "epsilon must be >= 0 and finite, got -1"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"batch_size": -1}, "batch_size must be a positive integer, got -1"),
        ({"batch_size": 1}, "--batch_size=1 with BN: a batch of one has no variance"),
        ({"batch_size": 301}, "batch_size must be at most the 300 training examples, got 301"),
        ({"train_examples": 10_001}, "train_examples .* 10001.* 1 to 10000"),
        ({"threshold": 1.5}, r"--threshold must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_input_before_any_work(main, monkeypatch, tmp_path, options, words):
    monkeypatch.setattr(bnjax.sweeps.run, "_train", lambda *_: pytest.fail("work was started"))
    with pytest.raises(SystemExit, match=words) as error:
        main(**options)
    assert str(error.value).startswith("error: ")  # a text: Python prints it to stderr and exits with 1
    assert not (tmp_path / "out" / "results.zarr").exists()


def test_output_folder_with_other_files_is_not_touched(main, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match=r"is not empty and holds no results\.zarr"):
        main()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_other_families_and_norms(flagged):
    """Each norm has BN's frozen baseline; GroupNorm's groups are of 16."""
    models, baselines = flagged(model="conv", norms="batch,layer,group", hidden_width=16, depth=2).networks()
    assert baselines == dict.fromkeys(["BN", "LayerNorm", "GroupNorm"], "BN, hidden frozen")
    assert {model.config["model"] for model in models.values()} == {"conv"}
    assert models["GroupNorm"].config["features"] == [16, 16]
    assert models["GroupNorm"].config["group_size"] == 16


@pytest.mark.slow
def test_damaged_results_are_named_and_trained_again(main, trained, tmp_path, caplog):
    path = tmp_path / "out" / "results.zarr"
    whole = bnjax.load_results(path)
    (part,) = (path / "bnjax" / "parts").iterdir()
    part.write_bytes(b"no part")
    with pytest.raises(ValueError, match=r"results\.zarr is damaged: bnjax/parts/"):
        bnjax.load_results(path)
    main(**ONE_NETWORK)
    assert f"{part.name} is damaged; its cells are trained again" in caplog.text
    assert bnjax.load_results(path).identical(whole)


def test_status_of_nothing(main):
    with pytest.raises(SystemExit, match="holds no results of a sweep"):
        main(status=True)


def test_status(main, trained, capsys):
    capsys.readouterr()
    main(status=True)
    out = capsys.readouterr().out
    assert "nobody on this host is writing there" in out
    assert "no BN: 6 of 6 cells done" in out


@pytest.mark.slow
def test_interrupt_ends_the_process_promptly(tmp_path, data_dir):
    """While the first chunk, of many minutes, is running."""
    flags = [f"--{name}={value}" for name, value in (TINY | {"steps": 10_000_000, "data_dir": data_dir}).items()]
    command = [sys.executable, "-m", "experiments.init_robustness", *flags, f"--out={tmp_path / 'out'}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    time.sleep(15)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err


def test_output_folder_that_cannot_be_written(main, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"--out=.*file/out cannot be written"):
        main(out=str(tmp_path / "file" / "out"))


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--stepz=3", "Unknown command line flag 'stepz'. Did you mean: steps"),
        pytest.param("--depth=0", "depth", marks=pytest.mark.slow),
    ],
)
def test_as_a_command(tmp_path, flag, words):
    """Through `python -m`: the exit status and where the message goes."""
    command = [sys.executable, "-m", "experiments.init_robustness", flag, f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["--activation=sigmoid", "--seeds=2", "--nofrozen_baseline"]], ids=["relu", "sigmoid"]
)
def test_main_job_at_its_defaults(tmp_path, options):
    """The headline on the embedded data: at 80%, BN over the whole grid of 8 decades, no BN under 3.

    Of sigmoid, only what is compared, and two of its seeds: with BN, each reaches 87% of the best at every scale.
    """
    command = [sys.executable, "-m", "experiments.init_robustness", *options]
    paths = [f"--out={tmp_path / 'out'}", f"--data_dir={tmp_path / 'data'}"]
    subprocess.run([*command, *paths], cwd=ROOT, check=True, capture_output=True)
    results = bnjax.load_results(tmp_path / "out" / "results.zarr")
    summaries = bnjax.robustness(results, [0.8]).summaries
    assert summaries["BN"][0.8].range.decades == pytest.approx(8)
    assert summaries["no BN"][0.8].range.decades < 3
