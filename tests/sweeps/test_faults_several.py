"""Several at a sweep: it is removed or replaced under a run, written by two, read meanwhile; and signals."""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fault_worker
import jax.numpy as jnp
import numpy as np
import obstore.store
import pytest
import scripts
import xarray as xr
import zarr
from fault_worker import sweep
from faults import MANY, after_commits, check_part, check_whole, contents, die_at, names, slow, wait_for
from processes import end_of

import bnjax
from bnjax.sweeps import files, program, store

ROOT = Path(__file__).parents[2]
STOPS = r"was removed, or replaced by another run: this one stops"


class TestReplaced:
    @pytest.mark.parametrize("commits", [pytest.param(1, id="early"), slow(4, id="at the end")])
    @pytest.mark.parametrize("begun", ["none", "half", "whole"])
    @pytest.mark.parametrize("how", ["removed", "renamed", "overwritten"])
    def test_under_a_run(self, undisturbed, monkeypatch, tmp_path, how, begun, commits):
        """No cell of the first run gets among the other's; it stops when there is nothing more to be done for it."""
        path, aside, overwrite = tmp_path / "r.zarr", tmp_path / "aside", how == "overwritten"
        other = functools.partial(sweep, path, of=1, overwrite=overwrite)

        def call(number):
            if number != commits:
                return
            monkeypatch.undo()
            if overwrite:  # by a process that the lock does not reach
                monkeypatch.setattr(files, "_locked", lambda *_, **__: True)
            else:
                path.rename(aside) if how == "renamed" else shutil.rmtree(path)
            {"none": lambda: None, "half": lambda: die_at(3, "parts", other), "whole": other}[begun]()

        after_commits(monkeypatch, call)
        if overwrite and begun != "whole":
            for found in (sweep(path), bnjax.load_results(path)):
                xr.testing.assert_identical(found, undisturbed()[0])
        else:
            with pytest.raises(OSError, match=STOPS):
                sweep(path)
            assert contents(path, store.PARTS).items() <= undisturbed(of=1)[1].items()
        assert path.exists() == (begun != "none" or overwrite)
        assert how != "renamed" or len(contents(aside, store.PARTS)) == commits
        other()
        check_whole(path, undisturbed(of=1))

    def test_a_run_that_overwrites_is_killed_and_repeated(self, copy_of, undisturbed, monkeypatch):
        """The old results stand until the new ones are there; nothing is trained twice; others are still refused."""
        path, calls = copy_of("done"), []
        for _ in range(2):
            die_at(2, "parts", lambda: sweep(path, of=1, overwrite=True))
            xr.testing.assert_identical(bnjax.load_results(path), undisturbed()[0])
        with pytest.raises(ValueError, match="holds other results"):
            sweep(path, of=2)
        after_commits(monkeypatch, calls.append)
        sweep(path, of=1)
        assert len(calls) == 2
        check_whole(path, undisturbed(of=1))

    def test_a_symbolic_link_stays_one(self, undisturbed, tmp_path):
        path, elsewhere = tmp_path / "r.zarr", tmp_path / "elsewhere"
        elsewhere.mkdir()
        path.symlink_to(elsewhere)
        for seeds, of in ((2, 0), (4, 0), (4, 1)):
            sweep(path, seeds, of, overwrite=True)
        assert path.is_symlink()
        check_whole(elsewhere, undisturbed(of=1))

    @pytest.mark.slow
    def test_under_a_script(self, monkeypatch, tmp_path):
        """It ends with one line; the same command begins anew."""
        path = tmp_path / "out" / "results.zarr"
        flags = TRAINING | {"steps": 30, "segment": 10, "out": path.parent}
        with monkeypatch.context() as patch:
            after_commits(patch, lambda number: number == 2 and shutil.rmtree(path))
            with pytest.raises(SystemExit, match=rf"^error: {re.escape(str(path))} {STOPS}$"):
                scripts.run("init_robustness.__main__", **flags)
        assert not path.exists()
        scripts.run("init_robustness.__main__", **flags)
        assert bnjax.load_results(path).identical(xr.open_zarr(path, consolidated=False).load())


def in_another_namespace(path, **options):
    """Starts a sweep whose process number is 1 to itself, as in a container of the same host name."""
    alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    command = [*alone, sys.executable, "-m", "fault_worker", json.dumps({"path": str(path)} | options)]
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "sweeps")))
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": folders})


class TestTwoWriters:
    @pytest.mark.parametrize("first", ["goes on", slow("is killed"), slow("is contained")])
    def test_the_second_is_told_who_writes(self, start, undisturbed, tmp_path, first):
        """And is not held up by who is dead."""
        path, go_on, contained = tmp_path / "r.zarr", tmp_path / "go-on", first == "is contained"
        process = (in_another_namespace if contained else start)(path, pause=str(go_on))
        wait_for(lambda: names(path, store.STATES))
        who = f"process {1 if contained else process.pid} on {socket.gethostname()}"
        for options in ({}, {"of": 1}, {"of": 1, "overwrite": True}):
            with pytest.raises(files.Busy, match=rf"r\.zarr: {who} \(since .*\) is writing there"):
                sweep(path, **options)
        assert f"{who} (since" in str(bnjax.status(path))
        if first == "is killed":
            process.kill()
            assert end_of(process) == -signal.SIGKILL
            assert "nobody on this host is writing there" in str(bnjax.status(path))
            sweep(path)
        else:
            go_on.touch()
            assert (process.wait() if contained else end_of(process)) == 0
        check_whole(path, undisturbed())

    @pytest.mark.slow
    def test_started_at_the_same_time(self, start, undisturbed, tmp_path):
        """One ends normally; others do too, if they came when it was done, or say who is writing."""
        path = tmp_path / "r.zarr"
        logs = [tmp_path / str(i) for i in range(3)]
        ends = [end_of(process) for process in [start(path, log=log) for log in logs]]
        assert 0 in ends
        for log, status in zip(logs, ends, strict=True):
            assert status == 0 or re.search(r"Busy.* is writing there$", log.read_text().strip())
        check_whole(path, undisturbed())

    def test_a_stopped_writer_that_is_taken_over(self, start, undisturbed, monkeypatch, tmp_path):
        """Where the lock does not reach; the grid is extended in another order, to half, and the first goes on."""
        path, go_on = tmp_path / "r.zarr", tmp_path / "go-on"
        process = start(path, pause=go_on)
        wait_for(lambda: names(path, store.STATES))
        os.kill(process.pid, signal.SIGSTOP)
        monkeypatch.setattr(files, "_locked", lambda *_, **__: True)
        larger = functools.partial(sweep, path, [5, 3, 0, 4, 2, 1])
        die_at(4, "parts", larger)
        go_on.touch()
        os.kill(process.pid, signal.SIGCONT)
        assert end_of(process) == 0
        assert int(bnjax.load_results(path).done.sum()) >= 8
        for found in (larger(), bnjax.load_results(path)):
            xr.testing.assert_identical(found.sortby("seed"), undisturbed(6)[0])
        assert contents(path, store.STATES) == {}

    @pytest.mark.parametrize("kind", ["MemoryStore", "LocalStore"])
    def test_two_on_a_bucket(self, undisturbed, monkeypatch, tmp_path, kind):
        """Nobody is refused there. Both find nothing, begin at the same moment, and end with all cells."""
        local = {"prefix": tmp_path / "r.zarr", "mkdir": True} if kind == "LocalStore" else {}
        bucket = getattr(obstore.store, kind)(**local)
        whole, begun, calls = store.records, threading.Barrier(2), itertools.count()

        def records(where):
            history = whole(where)
            if next(calls) < 2:
                assert history == {}
                begun.wait(60)
            return history

        with monkeypatch.context() as patch, concurrent.futures.ThreadPoolExecutor() as threads:
            patch.setattr(store, "records", records)
            found = [*threads.map(sweep, [bucket] * 2)]
        exported = xr.open_zarr(zarr.storage.ObjectStore(bucket), consolidated=False)
        for one in (*found, bnjax.load_results(bucket), exported):
            xr.testing.assert_identical(one.load(), undisturbed()[0])
        if local:
            check_whole(tmp_path / "r.zarr", undisturbed())

    def test_stores_that_cannot_refuse_a_second_file_are_refused(self):
        for one in (zarr.storage.MemoryStore(), zarr.storage.FsspecStore.from_url("memory://r.zarr")):
            with pytest.raises(ValueError, match=r"give its URL, or obstore\.store\.from_url\(URL\)"):
                sweep(one)


@pytest.mark.slow
def test_readers(start, undisturbed, tmp_path):
    """From before the first file on: what is done only grows, and is what it will be."""
    path, seeds, seen = tmp_path / "r.zarr", 10 * MANY, []
    expected = undisturbed(seeds)
    process = start(path, seeds=seeds)
    for number in itertools.count():
        if seen and seen[-1] == 2 * seeds:
            break
        assert seen or process.exitcode is None
        stopped = number % 4 and process.exitcode is None  # so that it does not overtake a slow reader
        if stopped:
            os.kill(process.pid, signal.SIGSTOP)
        with contextlib.suppress(FileNotFoundError) if not seen else contextlib.nullcontext():
            seen.append(check_part(bnjax.load_results(path), expected))
        if stopped:
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.01)
    assert end_of(process) == 0
    assert seen == sorted(seen)
    assert len({*seen}) > 3
    check_whole(path, expected)


def test_not_a_number_from_the_first_step_on(undisturbed):
    steps = undisturbed()[0].diverged_step
    assert steps.sel(learning_rate=1e30).isin([0, 1]).all()
    assert (steps.sel(learning_rate=0.1) == -1).all()


@pytest.mark.slow
def test_not_a_number_from_the_start(monkeypatch, tmp_path):
    """A network that is drawn as NaN is committed like any other, and not trained again."""
    model = fault_worker.MODELS["mlp"]

    def init(key, shape, scale):
        params, stats = model.init(key, shape, scale)
        params["hidden_0"]["kernel"] = params["hidden_0"]["kernel"] * jnp.where(scale > 5, jnp.nan, 1)
        return params, stats

    axes = {"seed": range(2), "init_scale": (1.0, 10.0)}
    given = (model._replace(init=init), fault_worker.data(), fault_worker.CONFIG, axes)
    call = functools.partial(bnjax.sweep, *given, path=tmp_path / "r.zarr", width=1, progress=False)
    found = call()
    assert found.diverged.values.tolist() == [[False, True]] * 2
    assert (found.diverged_step.sel(init_scale=10.0) == 0).all()
    assert np.isfinite(found.test_loss.sel(init_scale=1.0)).all()
    assert bnjax.load_results(tmp_path / "r.zarr").identical(found)
    monkeypatch.setattr(program, "run_group", lambda *_, **__: pytest.fail("trained again"))
    assert call().identical(found)


TRAINING = {"norms": "none", "train_examples": 300, "batch_size": 50, "depth": 1, "hidden_width": 8}
TRAINING |= {"seeds": 16, "init_scales": 1, "steps": 45_000, "segment": 15_000, "width": 1, "devices": 2}
TRAINING |= {"checkpoint_minutes": 0}  # 8 groups of 3 calls: far more than pass before the last signal


@pytest.mark.slow
def test_signals_to_the_main_experiment(tmp_path):
    """In calls of the compiled program that take most of a second: each ends it within 10 s, and it goes on."""
    path, other = (tmp_path / name / "results.zarr" for name in ("out", "undisturbed"))
    given = TRAINING | {"data_dir": tmp_path / "data"}
    command = [sys.executable, "-m", "experiments.init_robustness"]
    command += [f"--{name}={value}" for name, value in given.items()]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": os.environ | {"XLA_FLAGS": ""}}
    start = functools.partial(subprocess.Popen, [*command, f"--out={path.parent}"], cwd=ROOT, text=True, **options)
    draw, ends = random.Random(0), {"SIGTERM": 143, "SIGINT": 130, "SIGINT SIGINT": 130}
    for signals, status in ends.items():
        before, process = names(path, store.STATES), start()
        wait_for(lambda: names(path, store.STATES) - before, seconds=120)  # noqa: B023
        if signals == "SIGTERM":
            process.send_signal(signal.SIGSTOP)  # it lives, and is not done before the second one has come up
            second = start()
            _, said = second.communicate()
            process.send_signal(signal.SIGCONT)
            assert (second.returncode, "Traceback" in said) == (1, False)
            assert f"process {process.pid} on {socket.gethostname()} (since" in said
        time.sleep(draw.uniform(0, 0.3))
        sent = time.monotonic()
        for name in signals.split():
            process.send_signal(signal.Signals[name])
            time.sleep(0.02)
        _, said = process.communicate(timeout=30)
        assert time.monotonic() - sent < 10
        assert (process.returncode, "interrupted" in said, "Traceback" in said) == (status, True, False)
    with start() as last:
        assert last.wait() == 0
    subprocess.run([*command, f"--out={other.parent}"], cwd=ROOT, check=True, **options)
    found = [bnjax.load_results(place).drop_attrs(deep=False) for place in (path, other)]
    xr.testing.assert_identical(*found)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "before"), [(2, (57, 220)), (16, (56, 132))])
def test_bytes_per_cell(tmp_path, width, before):
    """Of the files and of the disk, for 1,024 cells of 53 bytes: less than arrays that were written in place took."""
    sweep(tmp_path, 512, width=width, segment=6, checkpoint_minutes=5)
    found = [p.stat() for p in (tmp_path / store.PARTS).iterdir()]
    totals = sum(f.st_size for f in found), sum(512 * f.st_blocks for f in found)
    for total, most in zip(totals, before, strict=True):
        assert 4 < total / 1024 < most
