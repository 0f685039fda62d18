"""Measuring a width: on machines that are made up, and once on this one."""

import itertools
import re

import jax
import numpy as np
import pytest
import scripts
import test_init_robustness
import xarray as xr

import bnjax
from experiments.init_robustness import measure_width

DEVICES, FIXED, MANY = 2, 0.3, 10**6


def machine(speeds, *, error=MemoryError, slower=lambda: 1.0):
    """A timed sweep on a machine of those speeds, {width: cell-steps per second}, and memory for no other width.

    It has the calls that were made, with its `fixed` seconds a sweep, and a factor from `slower` for what else runs.
    """
    calls = []

    def run(width, cells, steps):
        calls.append((width, cells, steps))
        if width not in speeds:
            raise error("RESOURCE_EXHAUSTED: out of memory\nwith a long explanation")
        group = width * DEVICES
        return (FIXED + -(-cells // group) * group * steps / speeds[width]) * slower()

    run.calls = calls
    return run


def found(runs, start, cells=MANY, rounds=3):
    """(the best width, the speeds)."""
    speeds = measure_width.measured(runs, start, DEVICES, cells, rounds, lambda text: None)
    seconds = measure_width.job_seconds(speeds, cells, DEVICES, 300).sum("network")
    return measure_width.best(seconds), speeds


@pytest.mark.parametrize("start", [1, 4, 64])
def test_the_climb_finds_the_best(start):
    landscape = {2**k: 1000.0 * 1.3 ** -abs(k - 3) for k in range(10)}
    width, speeds = found({"one": machine(landscape)}, start)
    assert width == 8
    for at in speeds.width.values:  # what is fixed has no part in it
        np.testing.assert_allclose(speeds.sel(width=at), landscape[at])


def test_much_slower_widths_are_not_measured_any_further():
    run = machine({2**k: 1000.0 * 2.0 ** -abs(k - 3) for k in range(10)})
    width, speeds = found({"one": run}, 8)
    assert {w for w, *_ in run.calls} == {4, 8, 16}
    assert speeds.width.values.tolist() == [width] == [8]


def test_where_all_are_alike_the_narrowest_is_taken_and_doubling_ends():
    run = machine({2**k: 1000.0 for k in range(20)})
    width, _ = found({"one": run}, 8)
    assert width == 1
    assert max(w for w, *_ in run.calls) <= 32


@pytest.mark.parametrize(("gain", "width"), [(1.01, 4), (1.03, 8)])
def test_a_wider_one_must_be_clearly_faster(gain, width):
    assert found({"one": machine({4: 1000.0, 8: gain * 1000.0})}, 4)[0] == width


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_widen(seed):
    """Sweeps take up to 2% longer at random; now and then, twice as long."""
    rng = np.random.default_rng(seed)

    def slower():
        return (2 if rng.random() < 0.1 else 1) * (1 + 0.02 * rng.random())

    flat = machine({2**k: 1000.0 for k in range(12)}, slower=slower)
    assert found({"one": flat}, 4, rounds=15)[0] <= 4


@pytest.mark.parametrize("phase", range(0, 40, 3))
def test_a_load_that_comes_and_goes_leaves_none_out(phase):
    """All is twice as slow for twenty sweeps, then as fast as ever for twenty: what runs side by side is compared."""
    calls = itertools.count(phase)
    flat = machine({2**k: 1000.0 for k in range(12)}, slower=lambda: 1 + next(calls) // 20 % 2)
    _, speeds = found({"one": flat}, 4)
    assert {1, 2, 4, 8, 16} <= {*speeds.width.values}


@pytest.mark.parametrize("error", [MemoryError, jax.errors.JaxRuntimeError])
def test_a_width_without_memory_is_left_out(error):
    said = []
    run = machine({2: 500.0, 4: 1000.0}, error=error)
    speeds = measure_width.measured({"one": run}, 4, DEVICES, MANY, 2, said.append)
    assert speeds.width.values.tolist() == [4]
    assert "one, width 8: left out: RESOURCE_EXHAUSTED: out of memory" in said


def test_none_that_has_memory():
    with pytest.raises(MemoryError):
        found({"one": machine({})}, 4)


def test_one_width_for_all_is_that_of_the_least_time():
    """The slow network decides, however much faster another width is for the other."""
    slow = machine({1: 80.0, 2: 100.0, 4: 90.0, 8: 60.0})
    fast = machine({1: 3000.0, 2: 3000.0, 4: 6000.0, 8: 9000.0})
    width, speeds = found({"slow": slow, "fast": fast}, 4)
    assert width == 2
    assert speeds.sizes["network"] == 2


@pytest.mark.parametrize(("cells", "width"), [(2, 1), (4, 2), (7, 4), (16, 8), (MANY, 8)])
def test_groups_that_are_half_empty_cost_as_much(cells, width):
    """At 7 cells: four groups of 2 at width 1, two of 4 at width 2, one of 8 at width 4."""
    run = machine({1: 700.0, 2: 800.0, 4: 900.0, 8: 1000.0, 16: 900.0, 32: 800.0})
    assert found({"one": run}, 4, cells)[0] == width


def test_rounds_that_say_nothing_do_not_count():
    speeds = xr.DataArray([[100.0, np.nan, 101.0], [90.0, 92.0, np.nan]], {"width": [1, 2]}, ("width", "round"))
    assert measure_width.best(1 / speeds) == 1
    assert np.isnan(measure_width.speed(lambda width, cells, steps: 1.0, 1, 2, 64))


def test_the_table_fits_into_80_columns():
    speeds = xr.DataArray([[123456.0, 123789.0], [98765.0, 99999.0]], {"width": [8, 4096]}, ("width", "round"))
    table = measure_width.table("BN, hidden frozen, he_normal", speeds, 3e9 / speeds, MANY, 3000)
    out = table.text()
    assert "123,622 [123,456, 123,789]" in out
    assert "0.80" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_network_that_diverges_is_not_measured(blobs):
    model = bnjax.mlp((4,), 4, norm="none")
    infinite = model._replace(init=lambda *a: jax.tree.map(lambda v: v + np.inf, model.init(*a)))
    run = measure_width.timed_sweep(infinite, blobs, bnjax.TrainConfig(1, 8), bnjax.Hyperparams(), jax.devices())
    with pytest.raises(ValueError, match="diverges at its first steps"):
        run(1, 2, 3)


@pytest.fixture
def command(tmp_path, capsys):
    """Measures the tiny networks of the main experiment; returns what is printed, and the lines of progress."""

    def call(**options):
        flags = test_init_robustness.TINY | {"data_dir": str(tmp_path / "data"), "out": str(tmp_path / "out")}
        scripts.run("init_robustness.__main__", measure_width=True, **flags | options)
        assert not (tmp_path / "out" / "results.zarr").exists()  # nothing is trained
        return capsys.readouterr()

    return call


def test_the_command_prints_tables_and_a_command(monkeypatch, command):
    monkeypatch.setattr(measure_width, "timed_sweep", lambda *_: machine({1: 500.0, 2: 800.0, 4: 1000.0}))
    monkeypatch.setattr(measure_width, "width_by_size", lambda *_: 2)
    out, err = command(width=16)
    *tables, last = out.splitlines()
    assert last.startswith("python -m experiments.init_robustness --")
    assert last.endswith(" --width=4")  # 6 cells on two devices: 8 / 1000 s, 8 / 800 s or 6 / 500 s
    assert "--measure_width" not in last
    titles = ["no BN", "BN", "BN, hidden frozen", "all 3 networks"]
    assert {*titles} <= {line.strip() for line in tables}
    assert "BN, width 8: left out" in err
    assert "Measure again" not in err


def test_the_command_says_that_a_measurement_is_worth_little(monkeypatch, command):
    growing = itertools.count(1)
    busy = machine({1: 500.0}, slower=lambda: 1.05 ** next(growing))
    monkeypatch.setattr(measure_width, "timed_sweep", lambda *_: busy)
    monkeypatch.setattr(measure_width, "width_by_size", lambda *_: 1)
    assert re.search(r"differ by up to [\d.]+ times at one and the same width", command(norms="none").err)


@pytest.mark.slow
def test_on_this_machine(monkeypatch, command):
    monkeypatch.setattr(measure_width, "SECONDS", 0.1)
    monkeypatch.setattr(measure_width, "ROUNDS", 2)
    out, err = command(norms="none", seeds="200")
    assert re.search(r" --width=\d+$", out.strip())
    assert "all 1" not in out
    assert re.search(r"no BN, cell-steps per second: width 32 about [\d,]+, 16 about [\d,]+\n", err)
    assert "by turns: 2 of 2" in err


def test_several_processes_do_not_measure(monkeypatch, command):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit, match="leave out --distributed"):
        command()
