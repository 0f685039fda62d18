"""Faults, injected for real: after each the same sweep is run again, and nothing of it may be lost or wrong.

"Whole" means: every stored file is byte for byte that of a sweep which was never disturbed, and no other is there.
"""

import contextlib
import errno
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fault_worker
import jax.numpy as jnp
import numpy as np
import pytest
import scripts
import xarray as xr
from fault_worker import sweep
from zarr.storage import LocalStore

import bnjax
from bnjax.sweeps import leases, plan, storage, store

ROOT = Path(__file__).parents[1]
MANY = 12  # seeds, each a chunk, for what has to be hit on its way


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(plan, "GROUPS", fault_worker.GROUPS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(seeds) -> (the data set, {file: bytes}) of a sweep that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def call(seeds):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "GROUPS", fault_worker.GROUPS)
            found = sweep(None, seeds)
            sweep(folder / str(seeds), seeds)
        return found, contents(folder / str(seeds))

    return call


def contents(path):
    """{key: bytes} of all files of a store, but for what a write that was cut off leaves under names of its own."""
    files = (p for p in path.rglob("*") if p.is_file() and p.suffix != ".partial")
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def committed(path):
    """{key: bytes} of the ledger and of the values of the chunks in it."""
    found = contents(path)
    entries = {key.rpartition(".")[2] for key in found if key.startswith(f"{store.LEDGER}/")}
    return {
        key: data
        for key, data in found.items()
        if key.startswith(f"{store.LEDGER}/") or ("/c/0/" in key and key.split("/")[3] in entries)
    }


def check_whole(path, expected):
    """Equal to the undisturbed sweep: the data set and its attributes, and each file; and there are no others."""
    results, files = expected
    xr.testing.assert_identical(bnjax.load_results(path), results)
    found = contents(path)
    assert not [*path.rglob("*.partial")]
    assert sorted(found) == sorted(files)
    assert [key for key in files if found[key] != files[key]] == []


def check_part(found, expected):
    """Cells that are done are those of the undisturbed sweep, others have no value. Returns how many are done."""
    results, _ = expected
    done = found.get("done", xr.ones_like(results.diverged))
    for name in results.data_vars:
        nothing = {"f": np.nan, "b": False, "i": -1}[results[name].dtype.kind]
        xr.testing.assert_equal(found[name], results[name].where(done, nothing).astype(results[name].dtype))
    assert found.attrs == results.attrs
    return int(done.sum())


# Processes


class Server:
    """Sweeps in processes of their own, one at a time, forked from one that has imported everything."""

    def __init__(self, log):
        self.log = log
        command = [sys.executable, "-m", "tests.fault_worker"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = None

    def start(self, path, **options):
        if self.pid is not None:
            self.kill()
        self.log.write_text("")
        request = {"path": str(path), "log": str(self.log)} | options
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())

    def kill(self):
        """Returns the exit status: it may have come to its end before."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self):
        """Returns the exit status, as subprocess gives it."""
        status = int(self.process.stdout.readline())
        self.pid = None
        return status

    def ended(self):
        return not Path(f"/proc/{self.pid}").exists()

    def run(self, path, **options):
        self.start(path, **options)
        return self.wait()

    def close(self):
        if self.pid is not None:
            self.kill()
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("server") / "log")
    yield found
    found.close()


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "what was waited for did not come"
        time.sleep(0.005)


class TestKilled:
    @pytest.mark.slow
    @pytest.mark.parametrize("kills", [30])
    def test_at_random_times(self, server, undisturbed, tmp_path, kills):
        """kill -9 up to 1.5 s after the start (JAX starts and compiles) or up to 0.3 s after a file more (chunks).

        One sweep, killed and continued until it is done; then the next one.
        """
        draw, expected = random.Random(kills), undisturbed(MANY)
        killed, sweeps, kept = 0, 0, {}
        while killed < kills:
            path = tmp_path / f"{sweeps}.zarr"
            before = contents(path)
            server.start(path, seeds=MANY)
            if draw.random() < 0.7:
                wait_for(lambda path=path, before=before: contents_grew(path, before, server))
                time.sleep(draw.uniform(0, 0.3))
            else:
                time.sleep(draw.uniform(0, 1.5))
            status = server.kill()
            assert status in (0, -signal.SIGKILL), server.log.read_text()
            killed += status != 0
            kept = check_kept(path, kept, expected)
            if status == 0:
                check_whole(path, expected)
                sweeps, kept = sweeps + 1, {}
        sweep(path, MANY)
        check_whole(path, expected)

    @pytest.mark.parametrize(
        ("what", "times", "done"),
        [
            ("value", 15, 1),  # the second chunk's, after those of the coordinates: some are there
            pytest.param("ledger", 2, 1, marks=pytest.mark.slow),  # all its values are there
            pytest.param("checkpoint", 5, 1, marks=pytest.mark.slow),
            pytest.param("ledger", 1, 0, marks=pytest.mark.slow),
            pytest.param("frame", 4, 0, marks=pytest.mark.slow),
            pytest.param("lease", 1, 0, marks=pytest.mark.slow),
        ],
    )
    def test_in_the_middle_of_a_write(self, server, undisturbed, tmp_path, what, times, done):
        path, expected = tmp_path / "r.zarr", undisturbed(4)
        assert server.run(path, die=(what, times)) == -signal.SIGKILL
        kept = check_kept(path, {}, expected)
        assert len([key for key in kept if key.startswith(store.LEDGER)]) == done
        sweep(path)
        check_kept(path, kept, expected)
        check_whole(path, expected)


def contents_grew(path, before, server):
    """Whether there is a checkpoint or a ledger entry more, or no process any more."""
    folders = (store.LEDGER, store.CHECKPOINT)
    found = {p.relative_to(path).as_posix() for folder in folders for p in (path / folder).glob("*.*")}
    return bool(found - {*before}) or server.ended()


def check_kept(path, kept, expected):
    """What was committed still is, unchanged, and is what is loaded. Returns what is committed."""
    found = committed(path)
    assert [key for key in kept if found.get(key) != kept[key]] == []
    if found:
        entries = [key for key in found if key.startswith(store.LEDGER)]
        assert check_part(bnjax.load_results(path), expected) == 2 * len(entries)
    return found


class Dead(BaseException):
    """Not an error: nothing in the package catches it."""


class Disk:
    """One that takes nothing any more from the operation number `last` on: what a process leaves that is killed there.

    Operations are writes, deletions and renamings. Of the last write a part is left, under a name of its own.
    """

    def __init__(self, monkeypatch, last):
        self.count, self.last = 0, last
        fault_worker.on_writes(self.write, monkeypatch.setattr)
        delete, rename, rmtree = LocalStore.delete, Path.rename, shutil.rmtree

        async def counted_delete(store, key):
            self.step()
            await delete(store, key)

        def counted_rename(path, target):
            self.step()
            return rename(path, target)

        def counted_rmtree(path, ignore_errors=False):
            self.step()
            rmtree(path, ignore_errors=ignore_errors)

        monkeypatch.setattr(LocalStore, "delete", counted_delete)
        monkeypatch.setattr(Path, "rename", counted_rename)
        monkeypatch.setattr(shutil, "rmtree", counted_rmtree)

    def step(self, leave=lambda: None):
        self.count += 1
        if self.count == self.last:
            leave()
        if self.count >= self.last:
            raise Dead

    def write(self, files, key, value):
        self.step(lambda: fault_worker.leave_part(files, key, value))


def bury(path):
    """Has the lease's owner be dead: its number is that of a later process."""
    for lease in (path / leases.LEASE).glob("*"):
        with contextlib.suppress(ValueError):
            lease.write_text(json.dumps(json.loads(lease.read_bytes()) | {"born": "1"}))


def kill_at(monkeypatch, last, call, path):
    """The call, killed at the disk operation number `last`."""
    with monkeypatch.context() as patch:
        Disk(patch, last)
        with pytest.raises(Dead):
            call()
    for folder in (path, path.with_name(f".{path.name}.replaced")):
        bury(folder)


def operations(monkeypatch, call):
    """How many disk operations the call takes."""
    with monkeypatch.context() as patch:
        disk = Disk(patch, np.inf)
        call()
        return disk.count


@pytest.mark.slow
def test_65536_cells_in_bounded_memory(server, tmp_path):
    """Killed four times and resumed: every file as if it had not been; and memory for the results, but no more."""
    options = {"seeds": 2**15, "width": 64, "segment": 6, "groups": 16}
    peaks = {}
    for name, seeds in {"few": 2**10, "many": 2**15}.items():
        peak = tmp_path / name
        assert server.run(tmp_path / f"{name}.zarr", **options | {"seeds": seeds, "peak": str(peak)}) == 0
        peaks[name] = int(peak.read_text())
    path = tmp_path / "killed.zarr"
    for die in (["ledger", 3], ["value", 60], ["checkpoint", 30], ["ledger", 8]):
        assert server.run(path, **options, die=die) == -signal.SIGKILL
    assert server.run(path, **options) == 0
    found, expected = contents(path), contents(tmp_path / "many.zarr")
    assert sorted(found) == sorted(expected)
    assert [key for key in expected if found[key] != expected[key]] == []
    results = bnjax.load_results(path)
    assert results.diverged.size == 2**16
    assert "done" not in results
    # Kibibytes; and some copies of the results, such as those that are read to check them.
    assert peaks["many"] - peaks["few"] < 20 * results.nbytes / 2**10


@pytest.mark.parametrize("some", [3, pytest.param(None, marks=pytest.mark.slow)])
class TestKilledAtEveryDiskOperation:
    """In this process, with a disk that stops: at (every second) operation in the slow suite, else at a few."""

    def test_of_a_sweep(self, undisturbed, monkeypatch, tmp_path, some):
        expected = undisturbed(2)
        count = operations(monkeypatch, lambda: sweep(tmp_path / "counted.zarr", 2))
        assert count > 35
        for i in np.linspace(1, count, some or count, dtype=int):
            path = tmp_path / f"{i}.zarr"
            kill_at(monkeypatch, i, lambda path=path: sweep(path, 2), path)
            kept = check_kept(path, {}, expected)
            if (path / store.RECORD).exists():  # else there are no results yet
                done = check_part(bnjax.load_results(path), expected)
                assert done == 2 * sum(key.startswith(store.LEDGER) for key in kept)
            sweep(path, 2)
            check_kept(path, kept, expected)
            check_whole(path, expected)

    def test_of_an_extension(self, undisturbed, monkeypatch, tmp_path, some):
        """From 2 seeds to 3, in a folder beside the first that then takes its place."""
        first, larger = undisturbed(2), undisturbed(3)
        for name in ("first", "counted"):
            sweep(tmp_path / name, 2)
        count = operations(monkeypatch, lambda: sweep(tmp_path / "counted", 3))
        assert count > 40
        for i in np.linspace(1, count, some or count // 2, dtype=int):
            path = tmp_path / str(i) / "r.zarr"
            shutil.copytree(tmp_path / "first", path)
            kill_at(monkeypatch, i, lambda path=path: sweep(path, 3), path)
            there = path if path.exists() else path.with_name(".r.zarr.replaced")
            for key, data in first[1].items():
                if "/c/0/" in key:
                    assert (there / key).read_bytes() == data
            sweep(path, 3)
            check_whole(path, larger)
            assert [p.name for p in path.parent.iterdir()] == ["r.zarr"]


# Damage


@pytest.fixture(scope="module")
def damaged(undisturbed, tmp_path_factory):
    """A sweep of 4 seeds that died: two are committed, one is half way at a checkpoint, one was not begun."""
    path = tmp_path_factory.mktemp("damaged") / "r.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "GROUPS", fault_worker.GROUPS)
        whole, left = store.Store.save_checkpoint, [8]

        def save(self, *args):
            whole(self, *args)
            left[0] -= 1
            if left[0] == 0:
                raise Dead

        patch.setattr(store.Store, "save_checkpoint", save)
        with contextlib.suppress(Dead):
            sweep(path)
    assert check_part(bnjax.load_results(path), undisturbed(4)) == 4
    assert (path / store.CHECKPOINT / "0.2").exists()
    return path


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
SAMPLE = (
    ("bnjax/zarr.json", "a bit flipped"),
    ("zarr.json", "truncated"),
    ("test_loss/zarr.json", "missing"),
    ("seed/c/0", "a bit flipped"),
    ("test_loss/c/0/1/0/0", "a bit flipped"),
    ("diverged/c/0/0/0", "missing"),
    ("bnjax/ledger/0.1", "emptied"),
    ("bnjax/checkpoint/0.2", "a bit flipped"),
)


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized")  # zarr's, of a folder without metadata
class TestDamage:
    def check(self, damaged, expected, path, key, damage, caplog):
        """Never loaded wrong; named by whoever reads it; mended by the same sweep, which says so."""
        shutil.copytree(damaged, path)
        right = bnjax.load_results(path)
        DAMAGES[damage](path / key, random.Random(f"{key} {damage}"))
        found, said = loaded(path)
        if found is None:
            assert str(path) in said
            assert names(said, key), said
        else:
            check_part(found, expected)
            if not key.startswith(store.LEDGER):
                xr.testing.assert_identical(found, right)
        caplog.clear()
        sweep(path)
        if damage != "missing" or fault_worker.kind(key) not in ("ledger", "checkpoint"):
            assert names(caplog.text, key), caplog.text
        check_whole(path, expected)
        shutil.rmtree(path)

    @pytest.mark.parametrize(("key", "damage"), SAMPLE)
    def test_of_a_file(self, damaged, undisturbed, tmp_path, caplog, key, damage):
        self.check(damaged, undisturbed(4), tmp_path / "r.zarr", key, damage, caplog)

    @pytest.mark.slow
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_of_every_file(self, damaged, undisturbed, tmp_path, caplog, damage):
        keys = [key for key in sorted(contents(damaged)) if not key.startswith(leases.LEASE)]
        assert {fault_worker.kind(key) for key in keys} == {"value", "frame", "ledger", "checkpoint"}
        failed = {}
        for key in keys:
            try:
                self.check(damaged, undisturbed(4), tmp_path / key / "r.zarr", key, damage, caplog)
            except Exception as error:
                failed[key] = f"{type(error).__name__}: {error}"
        assert failed == {}

    @pytest.mark.slow
    def test_of_any_byte_is_never_loaded_wrong(self, damaged, undisturbed, tmp_path):
        """A random bit of every 60th byte, and of every 5th of small files."""
        path, draw = tmp_path / "r.zarr", random.Random(0)
        shutil.copytree(damaged, path)
        right, failed, flips = bnjax.load_results(path), {}, 0
        for key, whole in contents(path).items():
            if fault_worker.kind(key) in ("lease", "checkpoint"):
                continue
            for i in range(draw.randrange(5), len(whole), 60 if len(whole) > 60 else 5):
                data = bytearray(whole)
                data[i] ^= 1 << draw.randrange(8)
                (path / key).write_bytes(data)
                flips += 1
                with contextlib.suppress(store.Damaged):
                    try:
                        xr.testing.assert_identical(bnjax.load_results(path), right)
                    except (AssertionError, ArithmeticError, OSError) as error:
                        failed[key, i] = f"{type(error).__name__}: {error}"
            (path / key).write_bytes(whole)
        assert failed == {}
        assert flips > 300

    def test_of_several_files_at_once(self, damaged, undisturbed, tmp_path, caplog):
        path = tmp_path / "r.zarr"
        shutil.copytree(damaged, path)
        shutil.rmtree(path / "test_loss")
        (path / "zarr.json").unlink()
        flip(path / store.LEDGER / "0.1", random.Random(0))
        sweep(path)
        for words in ("zarr.json was damaged", "cells 0 to 1 of mlp", "cells 2 to 3 of mlp"):
            assert words in caplog.text
        check_whole(path, undisturbed(4))

    def test_beyond_repair_is_said(self, damaged, tmp_path):
        path = tmp_path / "r.zarr"
        shutil.copytree(damaged, path)
        for key in ("zarr.json", store.RECORD):
            os.truncate(path / key, 100)
        for call in (bnjax.load_results, sweep):
            with pytest.raises(store.Damaged, match=r"neither bnjax/zarr\.json nor zarr\.json can be read"):
                call(path)


def loaded(path):
    """(the data set, None), or (None, what is damaged)."""
    try:
        return bnjax.load_results(path), None
    except store.Damaged as error:
        return None, str(error)


def names(text, key):
    """Whether a message names the file, its variable or the cells in it."""
    kind, parts = fault_worker.kind(key), key.split("/")
    if kind == "checkpoint":
        return f"checkpoint {parts[-1]}" in text
    if kind == "frame":
        return key in text or (len(parts) > 1 and parts[0] in text)
    if kind == "value" and len(parts) < 4:
        return parts[0] in text  # a coordinate
    chunk = int(parts[-1].split(".")[1] if kind == "ledger" else parts[3])
    return f"cells {2 * chunk} to {2 * chunk + 1} of mlp" in text


# No room, no permission


class TestNoRoom:
    def test_for_a_larger_file(self, server, undisturbed, tmp_path):
        """The system refuses to let files grow (RLIMIT_FSIZE), from the third commit on."""
        path, expected = tmp_path / "r.zarr", undisturbed(4)
        assert server.run(path, limit=(2, 10)) == 1
        last = server.log.read_text().splitlines()[-1]
        assert last.startswith("OSError")
        assert os.strerror(errno.EFBIG) in last
        assert str(path) in last
        kept = check_kept(path, {}, expected)
        assert sum(key.startswith(store.LEDGER) for key in kept) == 2
        sweep(path)
        check_kept(path, kept, expected)
        check_whole(path, expected)

    @pytest.mark.slow
    def test_on_the_disk(self, server, undisturbed, tmp_path):
        """A file system in memory of 250 kB: there is room for some chunks."""
        disk, expected = tmp_path / "disk", undisturbed(MANY)
        with mounted(disk, "-t", "tmpfs", "-o", "size=250k", "tmpfs"):
            path = disk / "r.zarr"
            assert server.run(path, seeds=MANY) == 1
            last = server.log.read_text().splitlines()[-1]
            assert os.strerror(errno.ENOSPC) in last
            assert str(path) in last
            kept = check_kept(path, {}, expected)
            assert 0 < sum(key.startswith(store.LEDGER) for key in kept) < MANY
            elsewhere = tmp_path / "r.zarr"
            shutil.copytree(path, elsewhere)
            subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
            for place in (path, elsewhere):
                sweep(place, MANY)
                check_kept(place, kept, expected)
                check_whole(place, expected)


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
        with pytest.raises((OSError, ValueError), match=r"r\.zarr"):
            sweep(tmp_path / "r.zarr")
        with pytest.raises((OSError, ValueError), match=r"r\.zarr"):
            sweep(tmp_path / "r.zarr" / "below")
        assert (tmp_path / "r.zarr").read_text() == "mine"

    def test_a_folder_that_is_read_only(self, damaged, tmp_path):
        folder = tmp_path / "folder"
        shutil.copytree(damaged, folder / "r.zarr")
        before = contents(folder / "r.zarr")
        with read_only(folder):
            found = bnjax.load_results(folder / "r.zarr")
            assert int(found.done.sum()) == 4
            for place in ("r.zarr", "new.zarr"):
                with pytest.raises(OSError, match=rf"{place}"):
                    sweep(folder / place)
        assert contents(folder / "r.zarr") == before


@contextlib.contextmanager
def read_only(folder):
    """The permissions bind all but root, whom a mount binds."""
    if os.geteuid() == 0:
        with mounted(folder, "--bind", folder):
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
            yield
        return
    places = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    for place in places:
        place.chmod(0o555)
    yield
    for place in places:
        place.chmod(0o755)


# More than one process


class TestTwoWriters:
    def test_the_second_is_told_who_writes(self, server, undisturbed, tmp_path):
        path, go_on = tmp_path / "r.zarr", tmp_path / "go-on"
        server.start(path, pause=str(go_on))
        wait_for(lambda: any((path / store.CHECKPOINT).glob("*")))
        words = f"r.zarr: process {server.pid} on {socket.gethostname()} is writing there"
        with pytest.raises(leases.Busy, match=words):
            sweep(path)
        go_on.touch()
        assert server.wait() == 0
        check_whole(path, undisturbed(4))

    @pytest.mark.slow
    def test_started_at_the_same_time(self, undisturbed, tmp_path):
        """One ends normally; others do too, if they came when it was done, or say who is writing."""
        path = tmp_path / "r.zarr"
        command = [sys.executable, "-m", "tests.fault_worker", json.dumps({"path": str(path)})]
        both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
        said = [process.communicate()[1] for process in both]
        statuses = [process.returncode for process in both]
        assert 0 in statuses
        assert {*statuses} <= {0, 1}
        for status, text in zip(statuses, said, strict=True):
            if status:
                assert "Busy" in text.splitlines()[-1]
                assert "is writing there" in text
        check_whole(path, undisturbed(4))

    @pytest.mark.slow
    def test_a_killed_writer_does_not_hold_it(self, server, undisturbed, tmp_path):
        path = tmp_path / "r.zarr"
        server.start(path, pause=str(tmp_path / "never"))
        wait_for(lambda: any((path / store.CHECKPOINT).glob("*")))
        assert server.kill() == -signal.SIGKILL
        assert (path / leases.LEASE / "0-of-1").exists()
        sweep(path)
        check_whole(path, undisturbed(4))

    def test_of_another_host(self, damaged, undisturbed, tmp_path):
        """It is believed for LEASE_SECONDS after it was last confirmed: from here nobody can see whether it lives."""
        path = tmp_path / "r.zarr"
        shutil.copytree(damaged, path)
        lease = path / leases.LEASE / "0-of-1"
        with leases.lease(storage.Files(path)):
            theirs = json.loads(lease.read_bytes()) | {"host": "elsewhere", "id": "theirs"}
        before = contents(path)
        fresh = time.time() - leases.LEASE_SECONDS + 30
        lease.write_text(json.dumps(theirs | {"confirmed": fresh}))
        with pytest.raises(
            leases.Busy, match=r"r\.zarr: process \d+ on elsewhere is writing there, last confirmed 9\d s ago"
        ):
            sweep(path)
        old = json.dumps(theirs | {"confirmed": time.time() - leases.LEASE_SECONDS - 1})
        assert contents(path) == before | {
            f"{leases.LEASE}/0-of-1": json.dumps(theirs | {"confirmed": fresh}).encode()
        }
        lease.write_text(old)
        sweep(path)
        check_whole(path, undisturbed(4))

    @pytest.mark.slow
    def test_many_that_die_with_the_lease(self, tmp_path):
        """4 processes take it in turns for 4 s; one time in ten its holder is killed, and started again."""
        servers = [Server(tmp_path / f"log-{i}") for i in range(4)]
        until, number, failed = time.monotonic() + 4, 0, []
        try:
            for i, one in enumerate(servers):
                one.start(tmp_path, leases=(4, i))
            while any(one.pid for one in servers):
                for one in servers:
                    if one.pid is None or not one.ended():
                        continue
                    status = one.wait()
                    if status not in (0, -signal.SIGKILL):
                        failed.append(one.log.read_text().splitlines()[-1])
                    number += status == -signal.SIGKILL
                    if time.monotonic() < until - 0.5:
                        one.start(tmp_path, leases=(until - time.monotonic(), 4 + number))
        finally:
            for one in servers:
                one.close()
        assert failed == []
        assert number > 3


class TestReaders:
    @pytest.mark.slow
    def test_while_it_is_written(self, server, undisturbed, tmp_path):
        """From before the first file on: what is done only grows, and is what it will be."""
        path, expected = tmp_path / "r.zarr", undisturbed(MANY)
        server.start(path, seeds=MANY)
        seen = []
        while len(seen) == 0 or seen[-1] < 2 * MANY:
            assert seen or not server.ended(), server.log.read_text()
            try:
                found = bnjax.load_results(path)
            except FileNotFoundError:
                assert not seen
                continue
            seen.append(check_part(found, expected))
            if seen[-1] == 0:  # not all of its metadata may be there yet
                continue
            with xr.open_zarr(path, consolidated=False) as opened:
                there = opened.done.load()  # before what it speaks of: the writer sets it last
                for name in expected[0].data_vars:
                    assert (opened[name] == expected[0][name]).where(there, True).all(), name
        assert server.wait() == 0
        assert seen == sorted(seen)
        assert len({*seen}) > 3
        check_whole(path, expected)


# Runs that are not numbers


class TestNotANumber:
    def test_from_the_first_step_on(self, undisturbed):
        found, _ = undisturbed(4)
        hopeless, fine = (found.sel(learning_rate=rate) for rate in (1e30, 0.1))
        assert hopeless.diverged.all()
        assert (hopeless.diverged_step <= 1).all()
        assert not fine.diverged.any()

    @pytest.mark.slow
    def test_from_the_start(self, tmp_path):
        """A network that is drawn as NaN is committed like any other, and not trained again."""
        model = fault_worker.MODELS["mlp"]

        def init(key, shape, scale):
            params, stats = model.init(key, shape, scale)
            params["hidden_0"]["kernel"] = params["hidden_0"]["kernel"] * jnp.where(scale > 5, jnp.nan, 1)
            return params, stats

        path, call = (
            tmp_path / "r.zarr",
            functools.partial(
                bnjax.sweep, model._replace(init=init), fault_worker.data(), fault_worker.CONFIG
            ),
        )
        axes = {"seed": range(2), "init_scale": (1.0, 10.0)}
        found = call(axes, path=path, width=1, progress=False)
        assert found.diverged.values.tolist() == [[False, True]] * 2
        assert (found.diverged_step.sel(init_scale=10.0) == 0).all()
        assert np.isfinite(found.test_loss).all()
        assert bnjax.load_results(path).identical(found)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bnjax.sweeps.run, "train_chunk", lambda *_, **__: pytest.fail("trained again"))
            assert call(axes, path=path, width=1, progress=False).identical(found)


# Signals


TRAINING = {
    "norms": "none",
    "train_examples": 300,
    "batch_size": 50,
    "depth": 1,
    "hidden_width": 8,
    "seeds": 16,  # 8 groups of 3 calls: far more than pass before the last signal
    "init_scales": 1,
    "steps": 45_000,
    "segment": 15_000,
    "width": 1,
    "devices": 2,
    "checkpoint_minutes": 0,
}


@pytest.mark.slow
def test_signals_to_the_main_experiment(tmp_path):
    """In calls of the compiled program that take most of a second: each ends it within 10 s, and it goes on."""
    given = TRAINING | {"data_dir": tmp_path / "data"}
    flags = [f"--{name}={value}" for name, value in (given | {"out": tmp_path / "out"}).items()]
    command = [sys.executable, "-m", "experiments.init_robustness", *flags]
    start = functools.partial(subprocess.Popen, command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    checkpoint = tmp_path / "out" / "results.zarr" / store.CHECKPOINT / "0.0"
    draw = random.Random(0)
    for i, (signals, status) in enumerate(
        [([signal.SIGTERM], 143), ([signal.SIGINT], 130), ([signal.SIGINT] * 2, 130)]
    ):
        before = checkpoint.read_bytes() if i else None
        process = start(stdout=subprocess.DEVNULL)
        wait_for(lambda before=before: checkpoint.exists() and checkpoint.read_bytes() != before, seconds=120)
        if i == 0:
            process.send_signal(signal.SIGSTOP)  # it lives, and is not done before the second one has come up
            second = start(stdout=subprocess.DEVNULL)
            _, said = second.communicate()
            process.send_signal(signal.SIGCONT)
            assert second.returncode == 1
            assert f"process {process.pid} on {socket.gethostname()} is writing there" in said
            assert "Traceback" not in said
        time.sleep(draw.uniform(0, 0.3))
        sent = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.02)
        _, said = process.communicate(timeout=30)
        assert time.monotonic() - sent < 10
        assert process.returncode == status
        assert "interrupted" in said
        assert "Traceback" not in said
    last = start(stdout=subprocess.DEVNULL)
    _, said = last.communicate()
    assert last.returncode == 0, said
    found = bnjax.load_results(tmp_path / "out" / "results.zarr")
    scripts.run("init_robustness", **given | {"out": tmp_path / "undisturbed"})
    expected = bnjax.load_results(tmp_path / "undisturbed" / "results.zarr")
    xr.testing.assert_equal(found, expected)
    other = {"command"}
    assert {k: v for k, v in found.attrs.items() if k not in other} == {
        k: v for k, v in expected.attrs.items() if k not in other
    }
