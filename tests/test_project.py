"""The project itself: the direction of imports, its requirements, its wheel, and what its README says."""

import ast
import functools
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import bnjax
from bnjax.analysis import robustness

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Data flows down: a module imports only from lines above its own.
ORDER = [
    "types",
    "version",
    "choices",
    "tables",
    "findings",
    "compilation",
    "losses",
    "convolution",
    "dataflow",
    "tracing",
    "batch_norm",
    "jacobian",
    "activations",
    "initializers",
    "theory.quadrature",
    "theory.depth",
    "theory.order_chaos",
    "theory.lp_norms",
    "theory.norm_growth",
    "theory.residual",
    "theory.mean_field",
    "theory.random_matrices",
    "theory",
    "norms.common",
    "norms.batch",
    "norms.layer",
    "norms.group",
    "norms.rms",
    "norms.lp",
    "norms.weight",
    "norms.weight_standardized",
    "norms.none",
    "norms",
    "models.build",
    "models.mlp",
    "models.deep",
    "models.conv",
    "models.residual",
    "models",
    "interop.entries",
    "interop.functions",
    "interop.flax",
    "interop.nnx",
    "interop.equinox",
    "interop.torch",
    "networks",
    "statistics",
    "probes.arrays",
    "probes.reading",
    "probes.forward",
    "probes.backward",
    "probes.runs",
    "probes",
    "data.standardization",
    "data.synthetic",
    "data.embedded",
    "data.builders",
    "data.loading",
    "data",
    "data.make_fashion_mnist_mini",
    "training",
    "sweeps.grid",
    "sweeps.static",
    "sweeps.plan",
    "sweeps.progress",
    "sweeps.provenance",
    "sweeps.program",
    "sweeps.files",
    "export",
    "sweeps.layout",
    "sweeps.store",
    "sweeps.run",
    "analysis.curves",
    "analysis.robustness",
    "plots",
    "__init__",
    "__main__",
]
EMPTY = {"analysis.__init__", "interop.__init__", "sweeps.__init__"}
PACKAGES = {f"{name}.__init__" for name in ("data", "models", "norms", "probes", "theory")}
ONLY_IN = {
    "matplotlib": {"plots"},
    "tensorflow_datasets": {"data.builders"},
    "absl": set(),
    "flax": {"interop.flax", "interop.nnx", "networks"},  # there only where it is imported already
    "equinox": {"interop.equinox"},
    "torch": set(),
}


def module_name(path):
    name = ".".join(path.relative_to(ROOT / "bnjax").with_suffix("").parts)
    return name.removesuffix(".__init__") if name in PACKAGES else name


def imports(path):
    """The modules that a file imports, as full names; `from a import b` is a.b if that is a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inside = ROOT / Path(*node.module.split("."), alias.name)
                is_module = inside.with_suffix(".py").exists() or inside.is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module


@pytest.mark.parametrize("path", sorted((ROOT / "bnjax").rglob("*.py")), ids=module_name)
def test_direction_of_imports(path):
    name = module_name(path)
    found = list(imports(path))
    if name in EMPTY:
        assert found == []
        return
    above = ORDER[: ORDER.index(name)]
    for module in found:
        package, _, local = module.partition(".")
        if package == "bnjax":
            assert local in above, f"bnjax.{name} must not import {module}"
        if package in ONLY_IN:
            assert name in ONLY_IN[package], f"bnjax.{name} must not import {package}"


def test_importing_the_library_imports_nothing_heavy_or_optional():
    """Nor does what converts to and from PyTorch. (jax's own dependencies may import absl.)"""
    code = "import sys, bnjax.interop.torch; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    assert not {"tensorflow_datasets", "array_record", "matplotlib", "flax", "equinox", "torch"} & {*loaded}


def test_requirements_are_the_dependencies_and_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *itertools.chain(*(extras[e] for e in extras if e != "peers"))]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    *listed, last = [line for line in lines if line and not line.startswith("#")]
    assert last == "-e ."  # the package itself
    assert sorted(listed) == sorted(d for d in declared if not d.startswith("bnjax["))


def test_the_citation_is_of_this_version():
    assert f"version: {bnjax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_data_and_nothing_else(tmp_path):
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "results", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, tmp_path / "source"]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"bnjax/data/fashion_mnist_mini.npz", "bnjax/data/FASHION_MNIST_LICENSE", "bnjax/models/mlp.py"} <= names
    assert {name.partition("/")[0].split("-")[0] for name in names} == {"bnjax"}


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


# data.md's needs files of the user's.
@pytest.mark.parametrize(
    "page", ["batch_norm.md", *(pytest.param(p, marks=pytest.mark.slow) for p in ("sweeps.md", "own_network.md"))]
)
def test_snippets_of_the_docs(page, tmp_path, monkeypatch, capsys):
    """Their own assertions say what is to hold; one that prints a table is followed by that table."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text()
    names = {}
    for snippet in snippets(text):
        names = names if snippet.startswith("# continued") else {}
        exec(compile(snippet, page, "exec"), names)
    printed = capsys.readouterr().out
    assert names
    for table in re.findall(r"```\n(.*?)```", re.sub(r"```[a-z]+\n.*?```", "", text, flags=re.DOTALL), re.DOTALL):
        assert table.strip() in printed or page != "own_network.md"


@pytest.mark.filterwarnings("default")
# Of those that train networks all but the cheapest are slow.
@pytest.mark.parametrize(
    "snippet",
    [pytest.param(s, marks=[pytest.mark.slow] if ".sweep(" in s and "nnx" not in s else []) for s in snippets(README)],
    ids=lambda s: s.split("\n")[0],
)
def test_readme_snippet(snippet, tmp_path, monkeypatch):
    """As a user would run it: on its own, in an empty folder, with an empty cache. Networks with batch
    normalization train at every scale of the snippets: 50%, where chance is 10%, is far from either.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "results" in names:
        accuracy = names["results"].test_accuracy.isel(step=-1)
        accuracy = accuracy.sel(model="batch") if "model" in accuracy.dims else accuracy
        assert (accuracy > 0.5).all()
    elif "norm" in names:
        params, stats = names["model"].init(jax.random.key(0), (28, 28, 1), 1.0)
        assert names["model"].apply(params, stats, jnp.ones((4, 28, 28, 1)), train=True)[0].shape == (4, 10)
    else:
        assert names["J"].shape == (8, 3, 8, 3)
        assert abs(names["y"].mean()) < 1e-3


def test_sweeping_a_users_own_network_takes_at_most_ten_lines():
    (snippet,) = (s for s in snippets(README) if "flax" in s)
    assert "bnjax.sweep" in snippet
    after = snippet[snippet.index("model = ") :]  # the imports and the network itself
    assert len(after.strip().splitlines()) <= 10


def readme_rows():
    """(activation, network, threshold, decades) for each figure of the README's table of ranges."""
    (table,) = re.findall(r"\| network \| q = 0.7 .*?\n\n", README, re.DOTALL)
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    for label, *cells in rows:
        activation, network = label.split(", ", 1)
        for title, cell in zip(header[1:], cells, strict=True):
            yield activation, network, float(title.removeprefix("q = ")), cell


@functools.cache
def stored_ranges(activation):
    """{network: {threshold: range}}, of all thresholds of the table."""
    results = bnjax.load_results(ROOT / "docs" / "results" / f"{activation}.zarr")
    thresholds = sorted({threshold for *_, threshold, _ in readme_rows()})
    return robustness.summarize(robustness.final_accuracy(results, 1 / 10), thresholds)


@pytest.mark.parametrize(("activation", "network", "threshold", "cell"), list(readme_rows()))
def test_readme_table_is_the_stored_result(activation, network, threshold, cell):
    found = stored_ranges(activation)[network][threshold]

    def text(r):
        return "-" if r.decades != r.decades else f"{'≥ ' if r.open_low or r.open_high else ''}{r.decades:.1f}"

    assert cell == f"{text(found.range)} [{text(found.interval[0])}, {text(found.interval[1])}]"


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_readme_at_large_scales_bn_is_within_a_point_of_its_baseline(activation):
    results = bnjax.load_results(ROOT / "docs" / "results" / f"{activation}.zarr")
    medians = robustness.final_accuracy(results, 1 / 10).median("seed").squeeze()
    large = medians.sel(init_scale=medians.init_scale[medians.init_scale >= 100])
    assert (abs(large.sel(model="BN") - large.sel(model="BN, hidden frozen")) <= 0.01).all()
