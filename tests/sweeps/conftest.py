"""Shared by the tests of sweeps: an undisturbed sweep to compare with, and processes with a sweep to disturb."""

import functools
import shutil
from pathlib import Path

import pytest

pytest.register_assert_rewrite("faults", "stored")

import fault_worker  # noqa: E402
import faults  # noqa: E402
import processes  # noqa: E402
import stored  # noqa: E402

from bnjax.sweeps import store  # noqa: E402


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """(seeds, of) -> (the data set, {part: bytes}) of a sweep that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def call(seeds=4, of=0):
        path = folder / f"{seeds}-{of}"
        found = fault_worker.sweep(path, seeds, of)
        assert len(faults.contents(path, store.PARTS)) == seeds
        return found, faults.contents(path, store.PARTS)

    return call


@pytest.fixture
def start(tmp_path):
    """(path, log, options of `fault_worker.work`) -> a process."""
    started = []

    def call(path, log=tmp_path / "log", **options):
        started.append(processes.start(fault_worker.work, log, path=path, **options))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def places(undisturbed, tmp_path_factory):
    """A sweep of 4 seeds that died: two are committed, one is half way, one was not begun. And one that is done."""
    base = tmp_path_factory.mktemp("places")
    faults.die_at(6, "states", lambda: fault_worker.sweep(base / "halfway"))
    assert len(faults.check_kept(base / "halfway", {}, undisturbed())) == 2
    assert len(faults.contents(base / "halfway", store.STATES)) == 1
    fault_worker.sweep(base / "done")
    return base


@pytest.fixture
def copy_of(places, tmp_path):
    """(place) -> a fresh copy of it."""

    def call(place):
        shutil.rmtree(tmp_path / "r.zarr", ignore_errors=True)
        return Path(shutil.copytree(places / place, tmp_path / "r.zarr"))

    return call


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """What `stored.Sweep` makes once."""
    return {"folder": tmp_path_factory.mktemp("given")}


@pytest.fixture
def sweep(blobs, kept, tmp_path, monkeypatch):
    return stored.watched(stored.Sweep(blobs, tmp_path / "r.zarr", kept), monkeypatch)
