"""A sweep that is killed, or whose disk fails, for real: the same one again ends as if nothing had happened."""

import contextlib
import errno
import functools
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import numpy as np
import obstore.store
import pytest
from fault_worker import sweep
from faults import (
    MANY,
    Disk,
    after_commits,
    check_kept,
    check_part,
    check_whole,
    contents,
    die_at,
    names,
    slow,
    wait_for,
)
from processes import end_of

import bnjax
from bnjax.sweeps import files, program, store


class TestKilled:
    @pytest.mark.slow
    def test_at_random_times(self, start, undisturbed, tmp_path):
        """kill -9 up to 1 s after the start (JAX starts, compiles) or 0.2 s after a file more, until all is done."""
        draw, expected = random.Random(0), undisturbed(MANY)
        killed, sweeps, kept = 0, 0, {}
        while killed < 20:
            path = tmp_path / str(sweeps) / "r.zarr"
            there = lambda: names(path, store.PARTS) | names(path, store.STATES)  # noqa: B023, E731
            before, process = there(), start(path, seeds=MANY)
            early = draw.random() < 0.3
            wait_for(lambda: early or there() - before or process.exitcode is not None)  # noqa: B023
            time.sleep(draw.uniform(0, 1 if early else 0.2))
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
    options, peaks = {"width": 256}, {}
    for name, seeds in {"few": 2**10, "many": 2**15}.items():
        peak = tmp_path / f"peak of {name}"
        assert end_of(start(tmp_path / name, seeds=seeds, peak=peak, **options)) == 0
        peaks[name] = int(peak.read_text())
    path, kept = tmp_path / "killed", set()
    for die in (["parts", 12], ["states", 75], ["link", 125], ["unlink", 175]):
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


def chosen(kinds, some, power):
    """Numbers of operations: all before the export and every 7th of it, which repeats itself; or `some` of the former.

    7 has no factor in common with the 3 or 4 operations for each of the export's files; others with than without power.
    """
    first = kinds.index("export") + 1
    if some:
        return np.linspace(1, first, some + 2, dtype=int)[1:-1].tolist()
    return [*range(1, first + 1), *range(first + 3 + 3 * power, len(kinds) + 1, 7)]


@pytest.mark.parametrize("some", [2, slow(None)])
@pytest.mark.parametrize("power", [False, True], ids=["killed", "no power"])
@pytest.mark.parametrize("before", BEFORE)
def test_at_disk_operations(undisturbed, monkeypatch, tmp_path, before, power, some):
    """Of a sweep, of an extension and of one that overwrites, in this process."""
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
    assert len(disk.kinds) > 90
    for i in chosen(disk.kinds, some, power):
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
