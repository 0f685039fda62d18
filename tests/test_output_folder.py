"""Scripts replace what they made themselves, and nothing else."""

import json
import os
import shutil
from pathlib import Path

import pytest
import scripts
import xarray as xr
from absl import flags
from matplotlib.figure import Figure

import bnjax
from bnjax import export
from experiments import common

# {script: (the first function that works, what it writes)}
SCRIPTS = {
    "benchmark": ("compare_layers", ["results.zarr", "speed.png", "speed.md"]),
    "bn_conformance": ("measure", ["conformance.md"]),
    "why_robust": ("pooled", ["frozen.zarr", "depth.zarr", "depth.png"]),
}
SWEEP = Path(__file__).parents[1] / "docs" / "results" / "relu.zarr"
OWN = "python -m experiments.scale_laws --width=8"


def group(path, text):
    path.mkdir()
    (path / "zarr.json").write_text(text)


def of(command):
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"command": command}})


OTHERS = {
    "a sweep's": lambda path: shutil.copytree(SWEEP, path),
    "a sweep's, cut off while it was replaced": lambda path: shutil.copytree(SWEEP, export.aside(path)),
    "another script's": lambda path: group(path, of("python -m experiments.scale_laws2")),
    "another script's figure": lambda path: path.write_text("made by `python -m experiments.other`"),
    "a file": lambda path: path.write_text("python -m experiments.scale_laws"),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing but itself": lambda path: path.symlink_to(path),
    "a link to a sweep's": lambda path: path.symlink_to(shutil.copytree(SWEEP, path.with_name("elsewhere"))),
    "a pipe": lambda path: (path.mkdir(), os.mkfifo(path / "zarr.json")),
    "empty": lambda path: group(path, ""),
    "cut off": lambda path: group(path, of(OWN)[:-2]),
    "no text": lambda path: (path.mkdir(), (path / "zarr.json").write_bytes(b"\xff\x00")),
    "nested": lambda path: group(path, "[" * 100_000),
    "a list": lambda path: group(path, "[]"),
    "attributes are a list": lambda path: group(path, '{"attributes": []}'),
    "a command that is none": lambda path: group(path, of([OWN])),
}


def tree(folder):
    """{path: bytes, where a link points to, or None}"""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture
def script():
    """The flags of a script, which its command is made of."""
    scripts.load("scale_laws.__main__")
    flags.FLAGS(["scale_laws.py", "--width=8"])
    yield "scale_laws"
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize("name", SCRIPTS)
def test_refused_before_any_work(name, monkeypatch, tmp_path):
    work, outputs = SCRIPTS[name]
    module = scripts.load(f"{name}.__main__")
    monkeypatch.setattr(module, work, lambda *_: pytest.fail("work was started"))
    monkeypatch.setattr(scripts, "load", lambda _: module)
    for number, make in enumerate(OTHERS.values()):
        for output in outputs if number < 2 else outputs[:1]:
            folder = tmp_path / f"{number}{output}"
            folder.mkdir()
            make(folder / output)
            before = tree(folder)
            words = rf"error: --out={folder} holds \.?{output}.*, .*; experiments\.{name} replaces only what it made"
            for options in [{}, {"overwrite": True}] if name == "benchmark" else [{}]:
                with pytest.raises(SystemExit, match=words):
                    scripts.run(f"{name}.__main__", out=str(folder), **options)
            assert tree(folder) == before


@pytest.fixture(params=["r.zarr", "figure.png", "table.md"])
def save(request, tmp_path, script):
    """number -> what `common.save` returns for results, a figure or a table that differ by it."""

    def call(number, **options):
        what = {
            "r.zarr": xr.Dataset({"x": number}),
            "figure.png": Figure(figsize=(1, number)),
            "table.md": f"| {number} |",
        }[request.param]
        return common.save(what, call.path, script, **options)

    call.path = tmp_path / "out" / request.param
    call.path.parent.mkdir()
    return call


def test_own_is_replaced(save, script):
    folder, name = save.path.parent, save.path.name
    for number in (1, 2):
        before = tree(folder)
        common.check_out(folder, script, name)
        assert save(number) == save.path
        assert tree(folder) != before
        assert [path.name for path in folder.iterdir()] == [name]
    assert common.maker(save.path) == script
    with pytest.raises(ValueError, match=r"made by experiments\.scale_laws; .*, with --overwrite"):
        common.check_out(folder, script, name, overwrite=False)
    with pytest.raises(ValueError, match=r"experiments\.mean_field replaces only"):
        common.check_out(folder, "mean_field", name)
    before = tree(folder)
    assert save(3, overwrite=False) != save.path
    assert before.items() < tree(folder).items()


def test_a_link_stays(save, script, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "kept"
    save.path.symlink_to(elsewhere)
    for number in (1, 2):
        common.check_out(save.path.parent, script, save.path.name)
        assert save(number) == save.path
        assert save.path.is_symlink()
        assert common.maker(elsewhere) == script


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_came_meanwhile_stays(save, make, script, capsys):
    make(save.path)
    before = tree(save.path.parent)
    other = save(1)
    assert other != save.path
    assert common.maker(other) == script
    assert str(other) in capsys.readouterr().err
    assert before.items() < tree(save.path.parent).items()


def test_results_carry_the_command(tmp_path, script):
    path = common.save(xr.Dataset({"x": 1}), tmp_path / "r.zarr", script)
    assert bnjax.load_results(path).attrs == {"command": OWN}
