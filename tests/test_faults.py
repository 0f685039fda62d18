"""Faults, injected for real: after each the same sweep is run again, and nothing of it may be lost or wrong.

"Whole" means: `load_results` gives what a sweep gives that was never disturbed, attributes included; the parts are
byte for byte that sweep's; the export opens and equals; and nothing else is left.
"""

import concurrent.futures
import contextlib
import errno
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
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

import bnjax
from bnjax.export import Damaged
from bnjax.sweeps import files, program, store

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["fault_worker"])
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MANY = 12  # seeds, for what has to be hit on its way
STOPS = r"was removed, or replaced by another run: this one stops"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(seeds, of) -> (the data set, {part: bytes}) of a sweep that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def call(seeds=4, of=0):
        path = folder / f"{seeds}-{of}"
        found = sweep(path, seeds, of)
        assert len(contents(path, store.PARTS)) == seeds
        return found, contents(path, store.PARTS)

    return call


def contents(path, folder="."):
    """{key: bytes} of all files, but for what a write that was cut off leaves under names of its own."""
    found = (p for p in (path / folder).rglob("*") if p.is_file() and p.suffix != files.SUFFIX)
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in found}


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


@contextlib.contextmanager
def noted(failed, what):
    """Goes on after an error, which is noted."""
    try:
        yield
    except Exception as error:
        failed.append(f"{what}: {type(error).__name__}: {error}")


def after_commits(monkeypatch, call):
    """Has `call(number)` come after each commit in this process."""
    whole, numbers = store.Store.commit, itertools.count(1)
    monkeypatch.setattr(store.Store, "commit", lambda *args: (whole(*args), call(next(numbers))))


class Dead(BaseException):
    """Not an error: nothing in the package catches it."""


class Disk:
    """One that takes nothing any more from the operation number `last` (of a kind) on, which it does by half."""

    def __init__(self, monkeypatch, last, of=None):
        self.count, self.last, self.of = 0, last, of
        fault_worker.watch(self.step, monkeypatch.setattr)

    def step(self, kind, half):
        self.count += (counts := self.of in (None, kind))
        if self.count == self.last and counts:
            half()
        if self.count >= self.last:
            raise Dead


def die_at(last, of, call):
    """The call, dead in that operation."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, last, of)
        with pytest.raises(Dead):
            call()


@pytest.fixture
def start(tmp_path):
    """(path, options of `fault_worker.work`) -> a process, forked from one that has imported everything."""
    processes = []

    def call(path, **options):
        kwargs = {"path": path, "log": tmp_path / "log"} | options
        processes.append(SERVER.Process(target=fault_worker.work, kwargs=kwargs))
        processes[-1].start()
        return processes[-1]

    yield call
    for process in processes:
        process.kill()
        process.join()


def end_of(process):
    process.join()
    return process.exitcode


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "what was waited for did not come"
        time.sleep(0.005)


def names(path, folder):
    return {found.name for found in (path / folder).glob("[!.]*")}


class TestKilled:
    @pytest.mark.slow
    def test_at_random_times(self, start, undisturbed, tmp_path):
        """kill -9 up to 1.5 s after the start (JAX starts, compiles) or 0.3 s after a file more, until all is done."""
        draw, expected = random.Random(0), undisturbed(MANY)
        killed, sweeps, kept = 0, 0, {}
        while killed < 30:
            path = tmp_path / str(sweeps) / "r.zarr"
            there = lambda: names(path, store.PARTS) | names(path, store.STATES)  # noqa: B023, E731
            before, process = there(), start(path, seeds=MANY)
            early = draw.random() < 0.3
            wait_for(lambda: early or there() - before or process.exitcode is not None)  # noqa: B023
            time.sleep(draw.uniform(0, 1.5 if early else 0.3))
            process.kill()
            status = end_of(process)
            assert status in (0, -signal.SIGKILL)
            killed += status != 0
            kept = check_kept(path, kept, expected)
            if status == 0:
                check_whole(path, expected)
                sweeps, kept = sweeps + 1, {}
        sweep(path, MANY)
        check_whole(path, expected)

    @pytest.mark.parametrize(
        ("what", "times", "done"),
        [("parts", 2, 1), slow("states", 5, 2), slow("log", 1, 0), slow("lock", 1, 0), slow("export", 9, 4)],
    )
    def test_in_the_middle_of_a_write(self, start, undisturbed, tmp_path, what, times, done):
        path, expected = tmp_path / "r.zarr", undisturbed()
        assert end_of(start(path, die=(what, times))) == -signal.SIGKILL
        assert len(check_kept(path, {}, expected)) == done
        sweep(path)
        check_whole(path, expected)


@pytest.mark.slow
def test_65536_cells_in_bounded_memory(start, tmp_path):
    """Killed four times and resumed: every part as if it had not been; and memory for the results, but no more."""
    options, peaks = {"width": 64}, {}
    for name, seeds in {"few": 2**10, "many": 2**15}.items():
        peak = tmp_path / f"peak of {name}"
        assert end_of(start(tmp_path / name, seeds=seeds, peak=peak, **options)) == 0
        peaks[name] = int(peak.read_text())
    path, kept = tmp_path / "killed", set()
    for die in (["parts", 50], ["states", 301], ["link", 500], ["unlink", 700]):
        assert end_of(start(path, seeds=2**15, die=die, **options)) == -signal.SIGKILL
        assert kept < {*contents(path, store.PARTS)}
        kept = {*contents(path, store.PARTS)}
    assert end_of(start(path, seeds=2**15, **options)) == 0
    results = bnjax.load_results(tmp_path / "many")
    assert results.diverged.size == 2**16
    check_whole(path, (results, contents(tmp_path / "many", store.PARTS)))
    # Kibibytes; and some copies of the results, such as those that are read to check them.
    assert peaks["many"] - peaks["few"] < 20 * results.nbytes / 2**10


class Power:
    """Knows what its loss leaves: of a file what was synced, of a folder the names that it had when it was synced."""

    def __init__(self, monkeypatch, base):
        self.base, self.synced, self.held = base, {}, {}
        whole = os.fsync
        for path in (base, *base.rglob("*")):
            self.note(path)
        monkeypatch.setattr(os, "fsync", lambda file: (whole(file), self.note(f"/proc/self/fd/{file}")))

    def note(self, path):
        number, folder = self.hold(path)
        content = {name: self.hold(f"{path}/{name}") for name in os.listdir(path)} if folder else None
        self.synced[number] = content if folder else Path(path).read_bytes()

    def hold(self, path):
        """(its number, whether it is a folder); it stays open, so that the number is given to no other."""
        found = os.stat(path)
        if found.st_ino not in self.held:
            self.held[found.st_ino] = os.open(path, os.O_RDONLY)
        return found.st_ino, stat.S_ISDIR(found.st_mode)

    def is_lost(self):
        """Puts what is left in the place of what is there."""
        root = self.hold(self.base)
        shutil.rmtree(self.base)
        self.restore(self.base, *root)
        for file in self.held.values():
            os.close(file)

    def restore(self, path, number, folder):
        if not folder:
            path.write_bytes(self.synced.get(number, b""))
            return
        path.mkdir()
        for name, one in self.synced.get(number, {}).items():
            self.restore(path / name, *one)


BEFORE = {"new": None, "larger": {"seeds": 1}, "other": {"seeds": 2, "of": 1}}


@pytest.mark.parametrize("some", [2, slow(None)])
@pytest.mark.parametrize("power", [False, True], ids=["killed", "no power"])
@pytest.mark.parametrize("before", BEFORE)
def test_at_every_disk_operation(undisturbed, monkeypatch, tmp_path, before, power, some):
    """Of a sweep, of an extension and of one that overwrites, in this process: every one, or some of them."""
    expected, old = undisturbed(2), BEFORE[before] and undisturbed(**BEFORE[before])
    call = functools.partial(sweep, seeds=2, overwrite=before == "other")
    if old:
        sweep(tmp_path / "before" / "r.zarr", **BEFORE[before])

    def prepared(name):
        path = tmp_path / name / "r.zarr"
        shutil.copytree(tmp_path / "before", path.parent) if old else path.parent.mkdir()
        return path

    path = prepared("counted")
    with monkeypatch.context() as patch:
        disk = Disk(patch, np.inf)
        call(path)
    check_whole(path, expected)
    assert disk.count > 90
    for i in np.linspace(1, disk.count, some + 2, dtype=int)[1:-1] if some else range(1, disk.count + 1):
        path, committed = prepared(str(i)), {}
        with monkeypatch.context() as patch:
            current = Power(patch, path.parent) if power else None
            after_commits(patch, lambda _: committed.update(contents(path, store.PARTS)))  # noqa: B023
            die_at(i, None, lambda: call(path))  # noqa: B023
        if power:
            current.is_lost()
        new = {key for key in contents(path, store.PARTS) if key in expected[1]}
        assert new >= committed.keys() & expected[1].keys()
        if old or contents(path, store.LOG):
            found = bnjax.load_results(path)
            if not (old and found.identical(old[0])):
                assert check_part(found, expected) == 2 * len(new)
                assert before != "other" or len(new) == 2
        call(path)
        check_whole(path, expected)


class TestWithoutHardLinks:
    @pytest.fixture(autouse=True)
    def no_links(self, monkeypatch):
        def refuse(*_):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
        return refuse

    @pytest.mark.parametrize("kind", ["parts", "states", "log"])
    def test_killed_half_way(self, undisturbed, tmp_path, kind):
        """No more is left under a file's own name than with links."""
        path = tmp_path / "r.zarr"
        die_at(1 if kind == "log" else 2, kind, lambda: sweep(path))
        if kind != "log":
            check_kept(path, {}, undisturbed())
        sweep(path)
        check_whole(path, undisturbed())

    def test_no_file_is_replaced(self, tmp_path):
        folder = files.Folder(tmp_path)
        assert [folder.create("a", data) for data in (b"1", b"2")] == [True, False]
        assert folder.get("a") == b"1"
        assert folder.list() == ["a"]

    def test_nor_renaming_is_refused_before_training(self, monkeypatch, tmp_path, no_links):
        monkeypatch.setattr(Path, "rename", no_links)
        monkeypatch.setattr(program, "run_group", lambda *_, **__: pytest.fail("trained"))
        with pytest.raises(OSError, match=r"r\.zarr"):
            sweep(tmp_path / "r.zarr")


@pytest.fixture(scope="module")
def places(undisturbed, tmp_path_factory):
    """A sweep of 4 seeds that died: two are committed, one is half way, one was not begun. And one that is done."""
    base = tmp_path_factory.mktemp("places")
    die_at(6, "states", lambda: sweep(base / "halfway"))
    assert len(check_kept(base / "halfway", {}, undisturbed())) == 2
    assert len(contents(base / "halfway", store.STATES)) == 1
    sweep(base / "done")
    return base


@pytest.fixture
def copy_of(places, tmp_path):
    """(place) -> a fresh copy of it."""

    def call(place):
        shutil.rmtree(tmp_path / "r.zarr", ignore_errors=True)
        return Path(shutil.copytree(places / place, tmp_path / "r.zarr"))

    return call


def loaded(path):
    """(the data set, None), or (None, what is damaged, in one line)."""
    try:
        return bnjax.load_results(path), None
    except Damaged as error:
        return None, one_line(error)


def one_line(error):
    (line,) = str(error).splitlines()
    return line


def flip(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


DAMAGES = {
    "a bit flipped": flip,
    "truncated": lambda path, draw: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path, draw: os.truncate(path, 0),
    "missing": lambda path, draw: path.unlink(),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize(("place", "some"), [("halfway", 1), ("done", 8), slow("done", 1)])
    def test_of_every_file(self, copy_of, undisturbed, caplog, place, some, damage):
        """Never loaded wrong; named by who reads it; mended by the same sweep, which says so. Some: every n-th."""
        keys, failed = sorted(contents(copy_of(place))), []
        for key in keys[::some]:
            path, kind = copy_of(place), key.rpartition("/")[0]
            right, gone = bnjax.load_results(path), damage == "missing"
            DAMAGES[damage](path / key, random.Random(f"{key} {damage}"))
            with noted(failed, key):
                found, said = loaded(path)
                if kind == store.LOG or (kind == store.PARTS and not gone):
                    assert f"{path} is damaged" in said
                    assert (kind if gone else key) in said
                elif kind == store.PARTS:
                    assert check_part(found, undisturbed()) == 2 * len(contents(path, store.PARTS))
                else:
                    xr.testing.assert_identical(found, right)
                caplog.clear()
                sweep(path)
                lost = gone and kind in (store.PARTS, store.STATES)  # as if it had never been
                assert (
                    lost or key in ("bnjax/lock", "bnjax/zarr.json") or (kind if gone else key) in caplog.text
                )
                check_whole(path, undisturbed())
        assert failed == []
        assert len(keys) > (4 if place == "halfway" else 24)

    @pytest.mark.slow
    def test_of_any_byte_is_never_loaded_wrong(self, copy_of):
        """300 random bits in each file."""
        path, draw, failed = copy_of("halfway"), random.Random(0), []
        right = bnjax.load_results(path)
        for key, whole in contents(path, "bnjax").items():
            for i in range(300):
                flip(path / key, draw)
                with noted(failed, (key, i)):
                    found, said = loaded(path)
                    assert said or found.identical(right)
                (path / key).write_bytes(whole)
        assert failed == []

    @pytest.mark.parametrize("damage", ["a bit flipped", "missing"])
    def test_of_the_record_of_another_sweep(self, copy_of, undisturbed, damage):
        path = copy_of("done")
        (key,) = contents(path, store.LOG)
        DAMAGES[damage](path / key, random.Random(0))
        before = contents(path, store.PARTS)
        for call in (bnjax.load_results, bnjax.status, functools.partial(sweep, of=1)):
            with pytest.raises(Damaged, match=store.LOG):
                call(path)
        assert contents(path, store.PARTS) == before
        sweep(path, of=1, overwrite=True)
        check_whole(path, undisturbed(of=1))

    @pytest.mark.parametrize("of", [0, 1])
    @pytest.mark.parametrize("which", [slice(0, 1), slice(1, 2), slice(2)], ids=["old", "new", "both"])
    def test_of_several_while_another_overwrites(self, copy_of, undisturbed, caplog, which, of):
        """Whichever of the two records it is, and some parts, either sweep goes on."""
        path = copy_of("done")
        die_at(3, "parts", lambda: sweep(path, of=1, overwrite=True))
        damaged = (*sorted(contents(path, store.LOG))[which], *sorted(contents(path, store.PARTS))[::2])
        for key in damaged:
            flip(path / key, random.Random(0))
        sweep(path, of=of, overwrite=True)
        assert all(key in caplog.text for key in damaged if key.startswith(store.LOG))
        check_whole(path, undisturbed(of=of))


def zipped(header):
    """A zip of one array with that header, and no values."""
    text = io.BytesIO()
    with zipfile.ZipFile(text, "w") as found:
        found.writestr("cell seed.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return text.getvalue()


ODD = [b"[" * 100_000, b"", b"\x00\xff\n" * 50, b"7", b"null", b"[[1], {}]", zipped(b"[" * 60_000)]
ODD += [zipped(b"{'descr': '|V1000000000', 'fortran_order': False, 'shape': (1,)}\n")]
ODD_ARRAYS = {  # those whose names begin so, changed
    "parts": {
        "test_loss": [lambda a: a.astype(complex), lambda a: a[:, :1], lambda a: None],
        "cell": [lambda a: a[0], lambda a: a.astype(object), lambda a: a[:, None]],
        "identity": [lambda a: np.array("another")],
    },
    "states": {
        "leaf 0": [lambda a: a + 7, lambda a: -a, lambda a: np.array("x"), lambda a: None],
        "leaf 3": [lambda a: a[:1], lambda a: a.astype(np.float64), lambda a: a[..., None], lambda a: None],
    },
}


def with_odd_arrays(data, beginning, change):
    arrays, text = dict(np.load(io.BytesIO(data))), io.BytesIO()
    changed = {name: change(a) if name.startswith(beginning) else a for name, a in arrays.items()}
    np.savez(text, **{name: a for name, a in changed.items() if a is not None})
    return text.getvalue()


class TestOddFiles:
    """Whoever wrote them: their digests are right."""

    @pytest.mark.parametrize("kind", ODD_ARRAYS)
    def test_parts_and_states(self, copy_of, undisturbed, caplog, kind):
        path = copy_of("halfway")
        first = sorted(contents(path, f"bnjax/{kind}"))[0]
        data, base = (path / first).read_bytes(), first.rpartition("-")[0]
        changes = ((name, one) for name, several in ODD_ARRAYS[kind].items() for one in several)
        odd = [*ODD, *(with_odd_arrays(data, *change) for change in changes)]
        odd = {f"{base}-{store.digest(one)}": one for one in odd}
        (path / first).unlink()
        for key, one in odd.items():
            (path / key).write_bytes(one)
        found, said = loaded(path)
        assert found is not None if kind == "states" else said.count(base) == 5
        sweep(path)
        assert sum(key in one_line(record.getMessage()) for record in caplog.records for key in odd) == len(
            odd
        )
        check_whole(path, undisturbed())

    @pytest.mark.parametrize("some", [16, slow(1)])
    def test_records(self, copy_of, undisturbed, some):
        """All of it is odd, or one value of it, at most two levels deep. It may turn out to be of another sweep."""
        (key,) = contents(copy_of("halfway"), store.LOG)
        right = json.loads((copy_of("halfway") / key).read_bytes().partition(b"\n")[2])
        bodies, failed = [*ODD], []
        for name, value in right.items():
            for odd in (None, 7, -1.5, "x", [], {}, [["x"]], {"x": {"y": []}}, "1000000000f4"):
                several = [value | {inner: odd} for inner in value] if isinstance(value, dict) else []
                bodies += [json.dumps(right | {name: one}).encode() for one in (odd, *several)]
        for body in bodies[::some]:
            path = copy_of("halfway")
            (path / key).write_bytes(store.digest(body).encode() + b"\n" + body)
            with noted(failed, body[:1000]):
                loaded(path)
                with contextlib.suppress(Damaged):
                    assert "cells done" in str(bnjax.status(path))
                try:
                    found = sweep(path)
                except ValueError as error:
                    one_line(error)
                else:
                    xr.testing.assert_equal(found, undisturbed()[0])
        assert failed == []

    def test_files_of_others_beside_them(self, copy_of, undisturbed):
        """Such as file managers and network file systems leave."""
        path = copy_of("halfway")
        for folder in (store.LOG, store.PARTS, store.STATES):
            for name in (".DS_Store", ".nfs0001", "~", "a-b", "00000001~"):
                (path / folder / name).write_bytes(b"odd")
        sweep(path)
        xr.testing.assert_identical(bnjax.load_results(path), undisturbed()[0])

    @pytest.mark.parametrize("hours", [-2, 2, 1e6])
    def test_locks(self, copy_of, undisturbed, monkeypatch, hours):
        """Nobody is locked out by what a note says, or by clocks that differ."""
        path, now = copy_of("halfway"), time.time()
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(now + 3600 * hours))
        note = f"process {os.getpid()} on elsewhere (since {when} by its clock)".encode()
        earlier = json.dumps({"pid": os.getpid(), "host": "elsewhere", "since": now}).encode()
        for one in (*ODD, b"\x1b[31m\r\n" * 10**6, earlier, b"process 1 on m\xc3\xbcller \xff\x1b[31m", note):
            (path / files.LOCK).write_bytes(one)
            assert "4 of 8 cells done" in str(bnjax.status(path))
        monkeypatch.setattr(time, "time", lambda: now - 3600 * hours)
        sweep(path)
        check_whole(path, undisturbed())


class TestNoRoom:
    def check(self, start, log, path, expected, error, **options):
        assert end_of(start(path, **options)) == 1
        last = log.read_text().splitlines()[-1]
        assert re.match(rf"OSError.*{re.escape(os.strerror(error))}.*{re.escape(str(path))}", last)
        return len(check_kept(path, {}, expected))

    def test_for_a_larger_file(self, start, undisturbed, tmp_path):
        """The system refuses to let files grow (RLIMIT_FSIZE), from the third commit on."""
        path = tmp_path / "r.zarr"
        assert self.check(start, tmp_path / "log", path, undisturbed(), errno.EFBIG, limit=2) == 2
        sweep(path)
        check_whole(path, undisturbed())

    @pytest.mark.slow
    def test_on_the_disk(self, start, undisturbed, tmp_path):
        """A file system in memory of 60 kB: there is room for some parts."""
        path, elsewhere = (tmp_path / name / "r.zarr" for name in ("disk", "elsewhere"))
        with mounted(path.parent, "-t", "tmpfs", "-o", "size=60k", "tmpfs"):
            parts = self.check(start, tmp_path / "log", path, undisturbed(MANY), errno.ENOSPC, seeds=MANY)
            assert 0 < parts < MANY
            shutil.copytree(path, elsewhere)
            subprocess.run(["mount", "-o", "remount,size=10m", path.parent], check=True)
            for place in (path, elsewhere):
                sweep(place, MANY)
                check_whole(place, undisturbed(MANY))


@contextlib.contextmanager
def mounted(folder, *options):
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


class TestNoPermission:
    def test_a_file_in_the_place_of_the_folder(self, tmp_path):
        (tmp_path / "r.zarr").write_text("mine")
        for path in (tmp_path / "r.zarr", tmp_path / "r.zarr" / "below"):
            with pytest.raises((OSError, ValueError), match=r"r\.zarr"):
                sweep(path)
        assert (tmp_path / "r.zarr").read_text() == "mine"

    def test_a_folder_that_is_read_only(self, copy_of):
        path = copy_of("halfway")
        before = contents(path)
        root = os.geteuid() == 0  # the permissions bind all but root, whom a mount binds
        with mounted(path.parent, "--bind", path.parent) if root else contextlib.nullcontext():
            change = ["mount", "-o", "remount,ro,bind"] if root else ["chmod", "-R", "a-w"]
            subprocess.run([*change, path.parent], check=True)
            assert int(bnjax.load_results(path).done.sum()) == 4
            for place in ("r.zarr", "new.zarr"):
                with pytest.raises(OSError, match=place):
                    sweep(path.with_name(place))
        assert contents(path) == before

    def test_a_bucket_that_refuses(self, tmp_path):
        (tmp_path / "bnjax").write_text("mine")
        with pytest.raises(OSError, match=r"^.*LocalStore.*: [^\n]*$"):
            sweep(obstore.store.LocalStore(tmp_path))


class TestReplaced:
    @pytest.mark.parametrize("commits", [1, 4], ids=["early", "at the end"])
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
                scripts.run("init_robustness", **flags)
        assert not path.exists()
        scripts.run("init_robustness", **flags)
        assert bnjax.load_results(path).identical(xr.open_zarr(path, consolidated=False).load())


def in_another_namespace(path, **options):
    """Starts a sweep whose process number is 1 to itself, as in a container of the same host name."""
    alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    command = [*alone, sys.executable, "-m", "tests.fault_worker", json.dumps({"path": str(path)} | options)]
    return subprocess.Popen(command, cwd=ROOT)


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
    flags = [f"--{name}={value}" for name, value in (given | {"out": path.parent}).items()]
    command = [sys.executable, "-m", "experiments.init_robustness", *flags]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    start = functools.partial(subprocess.Popen, command, cwd=ROOT, text=True, **pipes)
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
    scripts.run("init_robustness", **given | {"out": other.parent})
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
