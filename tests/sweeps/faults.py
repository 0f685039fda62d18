"""What the tests of faults share: a sweep that dies at an operation on the disk, and what has to be left of it.

"Whole" means: `load_results` gives what a sweep gives that was never disturbed, attributes included; the parts are
byte for byte that sweep's; the export opens and equals; and nothing else is left.
"""

import functools
import itertools
import time

import fault_worker
import numpy as np
import pytest
import xarray as xr

import bnjax
from bnjax.sweeps import files, store

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MANY = 12  # seeds, for what has to be hit on its way


def contents(path, folder="."):
    """{key: bytes} of all files, but for what a write that was cut off leaves under names of its own."""
    found = (p for p in (path / folder).rglob("*") if p.is_file() and p.suffix != files.SUFFIX)
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in found}


def names(path, folder):
    return {found.name for found in (path / folder).glob("[!.]*")}


def check_whole(path, expected):
    results, parts = expected
    xr.testing.assert_identical(bnjax.load_results(path), results)
    with xr.open_zarr(path, consolidated=False) as exported:
        xr.testing.assert_identical(exported.load(), results)
    assert contents(path, store.PARTS) == parts
    assert len(contents(path, store.LOG)) == 1
    assert contents(path, store.STATES) == {}
    assert [*path.parent.rglob(f"*{files.SUFFIX}")] == []


def check_part(found, expected):
    """Cells that are done are those of the undisturbed sweep, others have no value. Returns how many are done."""
    results, _ = expected
    done = found.get("done", xr.ones_like(results.diverged))
    for name in results.data_vars:
        nothing = {"f": np.nan, "b": False, "i": -1}[results[name].dtype.kind]
        xr.testing.assert_equal(found[name], results[name].where(done, nothing).astype(results[name].dtype))
    assert found.attrs == results.attrs
    return int(done.sum())


def check_kept(path, kept, expected):
    """What was committed still is, unchanged, and is what is loaded. Returns what is committed."""
    found = contents(path, store.PARTS)
    assert found.items() >= kept.items()
    assert found.items() <= expected[1].items()
    if contents(path, store.LOG):  # else there are no results yet
        assert check_part(bnjax.load_results(path), expected) == 2 * len(found)
    return found


def after_commits(monkeypatch, call):
    """Has `call(number)` come after each commit in this process."""
    whole, numbers = store.Store.commit, itertools.count(1)
    monkeypatch.setattr(store.Store, "commit", lambda *args: (whole(*args), call(next(numbers))))


class Dead(BaseException):
    """Not an error: nothing in the package catches it."""


class Disk:
    """One that takes nothing any more from the operation number `last` (of a kind) on, which it does by half."""

    def __init__(self, monkeypatch, last, of=None):
        self.kinds, self.last, self.of = [], last, of
        fault_worker.watch(self.step, monkeypatch.setattr)

    def step(self, kind, half):
        if counts := self.of in (None, kind):
            self.kinds.append(kind)
        if len(self.kinds) == self.last and counts:
            half()
        if len(self.kinds) >= self.last:
            raise Dead


def die_at(last, of, call):
    """The call, dead in that operation."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, last, of)
        with pytest.raises(Dead):
            call()


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "what was waited for did not come"
        time.sleep(0.005)
