"""The benchmark of whole sweeps: all implementations do the same work, and the tables say what was measured."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scripts
import xarray as xr

import bnjax
from bnjax.interop import flax as interop_flax
from bnjax.interop import torch as interop_torch
from experiments import common
from experiments.benchmark import figure, jax_peers, processes, sweeps, tables, workloads

TINY = {"cells": 4, "steps": 3, "rounds": 2, "seconds": 0.01}
NAMES = [*workloads.ALL]


@pytest.fixture
def main(tmp_path):
    """Runs the benchmark in this process, of the smallest workload unless asked otherwise."""

    def call(**options):
        options = {"out": str(tmp_path / "out"), "workloads": workloads.SMALLEST} | options
        scripts.run("benchmark.__main__", **options)
        return tmp_path / "out"

    return call


@functools.cache
def problem(name):
    """The workload, bnjax's network of it, its initial state (BN's scales and biases moved), and two batches."""
    w = workloads.ALL[name]
    model = bnjax.mlp(w.features, w.sizes[-1], w.activation)
    params, batch_stats = model.init(jax.random.key(3), (w.sizes[0],), 1.0)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    moved = [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    x, y, *_ = workloads.data(w)
    order = workloads.batches(w, 2)
    return w, model, jax.tree.unflatten(structure, moved), batch_stats, [(x[i], y[i]) for i in order]


@functools.cache
def expected_of(name):
    """What `reference` finds of the problem."""
    _, *arguments = problem(name)
    return reference(*arguments)


def reference(model, params, batch_stats, batches):
    """Losses, parameters and statistics of SGD with momentum, v = g + 0.9 v, W = W - 0.1 v, written out."""

    @jax.jit
    def step(params, batch_stats, velocity, x, y):
        def loss_fn(params):
            logits, new = model.apply(params, batch_stats, x, train=True)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        return loss, jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity), new, velocity

    losses, velocity = [], jax.tree.map(jnp.zeros_like, params)
    for x, y in batches:
        loss, params, batch_stats, velocity = step(params, batch_stats, velocity, x, y)
        losses.append(float(loss))
    return losses, params, batch_stats


def assert_close(found, expected):
    """To 1e-5 of the largest entry of each array."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max())), found, expected
    )


class TestSameWork:
    """Two steps on equal weights, so that momentum counts: equal losses and weights."""

    @pytest.mark.slow
    def test_sweep(self):
        """What `bnjax.sweep` trains is the reference: the digest of its weights, seen by a probe, and the mean loss."""
        w, model, *_, batches = problem(workloads.SMALLEST)
        params, batch_stats = model.init(jax.random.key(0), (w.sizes[0],), 1.0)
        x, y = map(np.concatenate, zip(*batches, strict=True))

        def digest(params):
            return jnp.stack(
                [jnp.vdot(p, jnp.sin(jnp.arange(p.size).reshape(p.shape))) for p in jax.tree.leaves(params)]
            )

        layers = tuple(map(str, range(len(jax.tree.leaves(params)))))
        probe = bnjax.Probe(lambda snapshot: {"digest": digest(snapshot.params)}, layers)
        config = bnjax.TrainConfig(steps=1, batch_size=len(x))  # one batch of all: its order does not matter
        results = bnjax.sweep(model, bnjax.Dataset(x, y, x, y), config, {"seed": [0]}, probe=probe, progress=False)
        losses, params, _ = reference(model, params, batch_stats, [(x, y)])
        np.testing.assert_allclose(results.train_loss.values.ravel(), losses, rtol=1e-5)
        assert_close(results.digest.sel(seed=0).values[-1], np.asarray(digest(params)))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [workloads.SMALLEST, "784-100x3-10-sigmoid"])
    def test_jax_peers(self, name):
        w, model, params, batch_stats, batches = problem(name)
        losses, new_params, new_stats = expected_of(name)
        expected = interop_flax.mlp_to_flax(model, new_params, new_stats)

        def run(step, state):
            found = []
            for x, y in batches:
                state, loss = jax.jit(step)(state, x, y)
                found.append(float(loss))
            np.testing.assert_allclose(found, losses, rtol=1e-5)
            return state

        _, step = jax_peers.bnjax_network(w)
        state = run(step, (params, batch_stats, jax_peers.sgd().init(params)))
        assert_close(interop_flax.mlp_to_flax(model, *state[:2]), expected)

        _, step = jax_peers.flax_network(w)
        start = interop_flax.mlp_to_flax(model, params, batch_stats)
        state = run(step, (start["params"], start["batch_stats"], jax_peers.sgd().init(start["params"])))
        assert_close(dict(zip(("params", "batch_stats"), state[:2], strict=True)), expected)

    @pytest.mark.parametrize("name", [workloads.SMALLEST, "784-100x3-10-sigmoid"])
    def test_torch_peers(self, name):
        torch = pytest.importorskip("torch")
        from experiments.benchmark import torch_peers

        w, model, params, batch_stats, batches = problem(name)
        losses, new_params, new_stats = expected_of(name)
        expected = interop_torch.mlp_to_torch(model, new_params, new_stats)
        start = interop_torch.mlp_to_torch(model, params, batch_stats)
        start = {key: torch.from_numpy(value) for key, value in start.items()}
        batches = [(torch.from_numpy(x), torch.from_numpy(y).long()) for x, y in batches]

        def compare(found):
            assert found.keys() == expected.keys()
            for key, value in found.items():
                if not key.endswith("running_var"):  # PyTorch averages unbiased variances
                    assert_close(value.detach().numpy(), expected[key])

        net = torch_peers.network(w)
        net.load_state_dict(start)
        optimizer = torch_peers.optimizer(net.parameters())
        found = [float(torch_peers.eager_step(net, optimizer, *batch)) for batch in batches]
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        compare(net.state_dict())

        nets = [torch_peers.network(w) for _ in range(3)]
        nets[1].load_state_dict(start)
        state = torch_peers.stacked(nets)
        step = torch_peers.vmap_step(w)
        found = [float(step(*state, *batch)[1]) for batch in batches]
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        compare({key: value[1] for part in (state[0], state[2]) for key, value in part.items()})

    @pytest.mark.parametrize("name", NAMES)
    def test_products(self, name):
        """Each has its shape's operations, and none is left out of the compiled loop, whatever the compiler does."""
        w = workloads.ALL[name]
        x = jax.ShapeDtypeStruct((w.batch_size, w.sizes[0]), "float32")
        kernels = [jax.ShapeDtypeStruct(s, "float32") for s in zip(w.sizes, w.sizes[1:], strict=False)]
        jaxpr = jax.make_jaxpr(jax_peers.products_of_a_step)(x, kernels)
        operations = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                inner = equation.invars[0].aval.shape[contracted[0]]
                operations += 2 * inner * equation.outvars[0].aval.size
        weights = [i * o for i, o in zip(w.sizes, w.sizes[1:], strict=False)]
        assert operations == 2 * w.batch_size * (3 * sum(weights) - weights[0])  # all inputs' but x's
        layers = len(w.sizes) - 1
        loop = jax.jit(jax_peers.products_loop, static_argnums=(0, 1))
        text = loop.lower(jax_peers.products_of_a_step, 7, x, kernels).compile().as_text()
        inside = [block for block in text.split("\n\n") if " dot(" in block and "ENTRY" not in block]
        assert sum(block.count(" dot(") for block in inside) == 3 * layers - 1

    def test_data(self):
        w = workloads.ALL[workloads.SMALLEST]
        for a, b in zip(workloads.data(w), workloads.data(w), strict=True):
            np.testing.assert_array_equal(a, b)
        order = workloads.batches(w, 400)
        an_epoch = workloads.EXAMPLES // w.batch_size
        assert order.shape == (400, w.batch_size)
        assert len(np.unique(order[:an_epoch])) == an_epoch * w.batch_size
        assert (order[:50] != order[an_epoch : an_epoch + 50]).any()


def made_up():
    """Three rounds of one workload, whose ratios are seen at a glance; the parts take 1, 2, ... 10 seconds."""
    speeds = {
        "bnjax": [6, 12, 60],
        "bnjax_evaluated": [3, 6, 30],
        "products": [10, 16, 60],
        "flax": [4, 10, 40],
        "products_at_width": [8, 16, 80],
        "network": [7.5, 15, 75],
        "momentum": [7.5, 15, 75],
        "batch_norm": [7.5, 15, 75],
        "shuffle": [7.5, 15, 75],
    }
    workload = np.array([workloads.SMALLEST], object)
    sizes = np.zeros((1, len(speeds)), int)
    sizes[0, 0] = 16
    return xr.Dataset(
        {
            "speed": (("workload", "implementation", "round"), [list(speeds.values())]),
            "width": (("workload", "implementation"), sizes),
        },
        {"workload": workload, "implementation": np.array(list(speeds), object)},
    )


class TestTables:
    def test_ratios_are_paired_by_round(self):
        found = tables.ratios(made_up().speed, "bnjax", "products")
        np.testing.assert_allclose(found.values[0], [0.675, 0.75, 0.875])  # of 0.6, 0.75, 1

    def test_beside(self):
        found = tables.beside(made_up(), workloads.SMALLEST, ["torch"])
        assert found.title == "64-32x3-10, batch 32"
        assert found.rows == [
            ["bnjax.sweep", "16", "12.0", "", ""],
            ["evaluated 4 times", "", "6.00", "", ""],
            ["products alone", "", "16.0", "0.75 [0.675, 0.875]", "0.6: reached"],
            ["Flax", "", "10.0", "1.5 [1.35, 1.5]", "1.4: reached"],  # of 1.5, 1.2, 1.5
            ["PyTorch eager", "", "not installed", "", ""],
        ]
        assert found.caption == "Evaluated 4 times: 0.5 [0.5, 0.5] of the speed of bnjax.sweep."

    def test_aims_that_are_missed(self):
        slower = made_up()
        slower["speed"] = slower.speed * xr.where(slower.implementation == "bnjax", 0.7, 1)
        rows = tables.beside(slower, workloads.SMALLEST, []).rows
        assert [row[-1] for row in rows] == ["", "", "0.6: missed", "1.4: missed"]

    def test_profile(self):
        """Each part's seconds over the sweep's: in the second round 12/16, then 0, 0.8 - 0.75, 0, and the rest."""
        rows = tables.profile(made_up()).rows
        shares = [row[1] for row in rows[:-1]]
        assert shares == ["75%", "0%", "5%", "0%", "0%", "0%", "20%"]
        assert rows[-1][1] == "83,300"  # 1e6 / 12

    def test_widths(self):
        """The one chosen, of the width 8, has 10, 20, 30 where the fastest has 20, 25, 24."""
        speeds = np.array([[[9, 19, 29], [20, 25, 24], [10, 20, 30]]], float)
        results = xr.Dataset(
            {
                "speed": (("workload", "implementation", "round"), speeds),
                "width": (("workload", "implementation"), [[8, 1, 8]]),
            },
            {"workload": [workloads.SMALLEST], "implementation": ["bnjax", "width_1", "width_8"]},
        )
        found = tables.widths(results)
        assert [row[0] for row in found.rows] == ["width 1", "width 8", "chosen", "over the fastest"]
        assert [row[1] for row in found.rows] == ["24.0", "20.0", "8", "0.8 [0.65, 1.02]"]

    def test_layers(self):
        """Half and twice the time of the fastest in single rounds; 3 and 1 times the bytes of x."""
        results = xr.Dataset(
            {
                "seconds": (("shape", "implementation", "round"), [[[2e-6, 4e-6, 3e-6], [1e-6, 4e-6, 2e-6]]]),
                "residual_bytes": (("shape", "implementation"), [[3 * 4 * 6, 4 * 6]]),
            },
            {"shape": ["2x3"], "implementation": ["a", "b"]},
            {"cells": 1},
        )
        found = tables.layers(results)
        assert found.rows == [["2x3", "a", "1.5 [1.25, 1.75]", "3.00", "3"], ["", "b", "1 [1, 1]", "2.00", "1"]]

    def test_growth(self):
        results = xr.Dataset(
            {
                "cell_seconds": (("grid", "grid_round"), [[0.2, 0.3, 0.4], [0.12, 0.12, 0.12], [0.102] * 3]),
                "peak_memory": ("grid", [2**29, 2**30, 2**30]),
            },
            {"grid": [10, 100, 1000]},
        )
        results.cell_seconds.attrs = {"workload": workloads.SMALLEST, "steps": 7}
        np.testing.assert_allclose(tables.line(results), [2, 0.1])
        found = tables.growth(results)
        assert found.title == "As the grid grows, 64-32x3-10, 7 steps"
        assert found.caption == "The law: 2 s + 100,000 µs x cells."
        assert found.rows[0] == ["10", "300,000", "1 [0.833, 1.17]", "512"]
        assert found.rows[2] == ["1,000", "102,000", "1 [1, 1]", "1024"]

    def test_scaled(self):
        """300 steps at 12 a second on 2 cores: 50 core-seconds a cell."""
        (row,) = tables.scaled(made_up(), cores=2).rows
        assert row == ["64-32x3-10", "50,000 ms", "13,900", "13,900,000", "579 days"]

    def test_processes_together(self):
        """Their speeds add up, each over its own time."""
        answers = [{"cell_steps": 10, "seconds": 2.0}, {"cell_steps": 9, "seconds": 3.0}]
        assert sweeps.speed(answers) == 8

    @pytest.mark.parametrize(
        ("value", "text"), [(1234.5, "1,230"), (99.96, "100.0"), (0.01234, "0.0123"), (float("nan"), "-"), (0, "-")]
    )
    def test_three_digits(self, value, text):
        assert tables.three_digits(value) == text


def test_figure():
    """Medians over the products' as points, with the quartiles as bars; the products are the line at 100%."""
    (axes,) = figure.shares(made_up(), title="A title").axes
    assert axes.get_title() == "A title"
    assert axes.get_yscale() == "log"
    points = {bars.get_label(): bars[0].get_ydata() for bars in axes.containers}
    assert points == {"bnjax.sweep": [75], "Flax": [62.5]}
    (quartiles,) = axes.containers[0][2][0].get_segments()
    np.testing.assert_allclose(quartiles[:, 1], [67.5, 87.5])
    assert [label.get_text() for label in axes.get_xticklabels()] == [workloads.SMALLEST]
    assert [text.get_text() for text in axes.texts] == ["75%"]


class TestMain:
    @pytest.mark.slow
    def test_sweeps(self, main, tmp_path, capsys):
        page = tmp_path / "page.md"
        page.write_text("before\n<!-- benchmark: begin -->\nold\n<!-- benchmark: end -->\nafter\n")
        folder = main(peers="products,jax_loop", profile=False, docs=page, **TINY)
        results = bnjax.load_results(folder / "results.zarr")
        assert (results.speed > 0).all()
        assert dict(results.speed.sizes) == {"workload": 1, "implementation": 4, "round": 2}
        assert (results.first_result > 0).all()
        assert results.attrs["versions"]["jax"] == jax.__version__
        assert (folder / "speed.png").stat().st_size > 10_000
        text = page.read_text()
        assert text.startswith("before\n<!-- benchmark: begin -->")
        assert text.endswith("<!-- benchmark: end -->\nafter\n")
        assert "old" not in text
        assert "**64-32x3-10, batch 32**" in text
        assert text.count("**") == 6  # three tables
        assert (folder / "speed.md").read_text().count("**") == 6
        assert "jitted JAX step" in capsys.readouterr().out

    @pytest.mark.slow
    def test_flax_parts_and_growth(self, main, capsys):
        options = {"first_result": False, "growth": True, "growth_cells": "3", "growth_steps": 2}
        folder = main(peers="flax", **options, **TINY)
        results = bnjax.load_results(folder / "results.zarr")
        assert (results.speed > 0).all()
        width = results.width.isel(workload=0)
        assert width.sel(implementation="products_at_width") == width.sel(implementation="bnjax") > 0
        assert (results.cell_seconds > 0).all()
        assert (results.peak_memory > 100e6).all()
        assert not (folder / "speed.png").exists()  # in per cent of the products
        printed = capsys.readouterr().out
        assert max(map(len, printed[: printed.index("All measurements")].splitlines())) <= 80

    @pytest.mark.slow
    def test_torch(self):
        pytest.importorskip("torch")
        found = sweeps.measure([workloads.SMALLEST], ["torch", "torch_vmap"], tick=lambda: None, **TINY)
        assert (found.speed > 0).all()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"workloads": "64-32x3"}, r"unknown name in --workloads '64-32x3' \(did you mean '64-32x3-10'\?\)"),
            ({"workloads": "64-32x3-10,64-32x3-10"}, "--workloads has a name twice"),
            ({"peers": "flx"}, r"did you mean 'flax'\?.*torch_vmap"),
            ({"growth_cells": "64,0"}, "--growth_cells takes numbers"),
            ({"docs": "nowhere.md"}, "--docs=nowhere.md is not a page"),
            ({"workloads": "", "docs": "nowhere.md"}, "needs --workloads"),
        ],
    )
    def test_bad_flags(self, main, options, words):
        with pytest.raises(SystemExit, match=words):
            main(**options)

    @pytest.mark.parametrize("flag", ["rounds", "cells", "steps"])
    def test_bad_counts(self, main, flag):
        with pytest.raises(Exception, match=f"{flag}=0"):
            main(**{flag: 0})


class TestProcesses:
    def test_an_error_is_told(self):
        with processes.started("whole") as crew, pytest.raises(RuntimeError, match="KeyError: 'no such run'"):
            processes.ask(crew, "run", name="no such run")

    def test_a_death_is_told(self):
        with processes.started("whole") as crew:
            crew[0].kill()
            with pytest.raises(RuntimeError, match="ended with status -9"):
                processes.ask(crew, "run", name="x" * 10_000)

    def test_one_that_is_not_installed(self):
        assert not processes.installed(processes.PEERS["flax"]._replace(needs="no_such_package"))
        assert processes.installed(processes.PEERS["flax"])

    @pytest.mark.skipif(sys.platform != "linux", reason="processes are bound to cores on Linux alone")
    def test_a_process_per_core(self):
        with processes.started("per_core") as crew:
            assert len(crew) == len(processes.cores())
            answers = processes.ask(crew, "peak_memory")
        assert all(answer["bytes"] > 1e6 for answer in answers)


def test_without_a_terminal_progress_is_lines_that_say_what_is_left(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)  # it would be taken for a terminal
    monkeypatch.setattr(common, "LINE_SECONDS", -1)
    with common.progress(3, "measuring") as tick:
        for _ in range(3):
            tick()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"measuring: {k} of 3" for k in (1, 2, 3)]
    assert lines[-1].endswith(" 0 s left")
    monkeypatch.setattr(common, "LINE_SECONDS", 60)
    with common.progress(1, "measuring") as tick:
        tick()
    assert not capsys.readouterr().err
