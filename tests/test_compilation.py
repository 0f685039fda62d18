"""The cache of compiled programs: between processes, after damage, after kills, and where there can be none."""

import abc
import contextlib
import errno
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
import types
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
import processes
import pytest
from jax._src import compilation_cache as of_jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from bnjax import compilation

KEY = "jit_f-" + 64 * "0"
VALUE = bytes(range(40))
EVENTS = "/jax/compilation_cache/cache_"
SETTINGS = types.MappingProxyType(
    {
        "jax_compilation_cache_dir": None,
        "jax_compilation_cache_max_size": -1,
        "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
)


def run(number=0):
    """Compiles a small program, one of many, as a process that has not met it, and runs it on 1.0."""

    def program(x):
        return jnp.sin(x) * 2 + number

    program.__name__ = f"program{number}"
    assert float(jax.jit(program)(np.float32(1))) == pytest.approx(np.sin(1) * 2 + number)


@contextlib.contextmanager
def counted():
    """A Counter of what was found in JAX's cache ("hits") and of what was written ("misses")."""
    counts = Counter()

    def listen(event, **_):
        if event.startswith(EVENTS):
            counts[event.removeprefix(EVENTS)] += 1

    jax.monitoring.register_event_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(listen)


def found(number=0):
    """Whether the cache has the program; it has afterwards, if there is one."""
    with counted() as counts:
        run(number)
    return {"hits": True, "misses": False}[" ".join(counts)]


@pytest.fixture
def pristine(monkeypatch):
    """JAX as it starts, with a cache for programs of any size but no folder; as it was afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setattr(of_jax, "get_file_cache", of_jax.get_file_cache)
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture
def folder(pristine, tmp_path):
    compilation.use_cache(tmp_path / "compiled")
    return tmp_path / "compiled"


@contextlib.contextmanager
def a_plain_user():
    """Not root, who may do anything."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def public():
    """A folder that a plain user can reach."""
    if not hasattr(os, "seteuid"):
        pytest.skip("the system has no such users")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        with a_plain_user():
            if not os.access(folder, os.X_OK, effective_ids=True):
                pytest.skip("the folder of temporary files is one user's")
        yield folder
        folder.chmod(0o755)


@pytest.fixture
def entries(tmp_path):
    return compilation.Entries(tmp_path)


def truncate(file, rng):
    file.write_bytes(file.read_bytes()[: rng.randrange(1, file.stat().st_size)])


def empty(file, _):
    file.write_bytes(b"")


def flip(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def extend(file, _):
    file.write_bytes(file.read_bytes() + b"\0")


def fill(file, rng):
    file.write_bytes(rng.randbytes(file.stat().st_size))


def make_folder(file, _):
    file.unlink()
    file.mkdir()


def make_full_folder(file, _):
    make_folder(file, _)
    (file / "inside").write_bytes(VALUE)


DAMAGE = (truncate, empty, flip, extend, fill, make_folder, make_full_folder)


def files(folder):
    return sorted(folder.iterdir())


def reports(caplog, file):
    """How many lines of bnjax name the file, of those since the last look; there are no others."""
    lines = [record.getMessage() for record in caplog.records if record.name == "bnjax"]
    caplog.clear()
    assert all(str(file) in line and "\n" not in line for line in lines)
    return len(lines)


class TestEntries:
    @pytest.mark.parametrize("value", [b"", VALUE, bytes(1 << 20)])
    def test_what_was_put_last(self, entries, caplog, value):
        assert entries.get(KEY) is None
        entries.put(KEY, b"another")
        entries.put(KEY, value)
        assert entries.get(KEY) == value
        assert not caplog.records

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damage_is_reported_once_and_mended(self, entries, tmp_path, caplog, damage):
        entries.put(KEY, VALUE)
        (file,) = files(tmp_path)
        damage(file, random.Random(0))
        assert entries.get(KEY) is None
        assert files(tmp_path) == []
        assert entries.get(KEY) is None
        assert reports(caplog, file) == 1
        entries.put(KEY, VALUE)
        assert entries.get(KEY) == VALUE
        assert not caplog.records

    def test_every_bit_and_every_length(self, entries, tmp_path, caplog):
        entries.put(KEY, VALUE)
        (file,) = files(tmp_path)
        whole = file.read_bytes()
        cut = [whole[:n] for n in range(len(whole))]
        number = int.from_bytes(whole, "big")
        flipped = [(number ^ 1 << bit).to_bytes(len(whole), "big") for bit in range(8 * len(whole))]
        for content in cut + flipped:
            file.write_bytes(content)
            assert entries.get(KEY) is None
        assert reports(caplog, file) == len(cut) + len(flipped) == 9 * (compilation.DIGEST + len(VALUE))

    def test_an_entry_of_another_key_is_damage(self, entries, tmp_path, caplog):
        entries.put("another", VALUE)
        (file,) = files(tmp_path)
        file.rename(tmp_path / KEY)
        assert entries.get(KEY) is None
        assert reports(caplog, tmp_path / KEY) == 1

    @pytest.mark.parametrize("fault", ["write", "rename"])
    def test_a_full_disk_is_no_error_and_leaves_nothing(self, entries, tmp_path, monkeypatch, caplog, fault):
        entries.put(KEY, VALUE)
        kept = files(tmp_path)

        def half(file, content):
            with file.open("wb") as stream:
                stream.write(content[: len(content) // 2])
            fail()

        def fail(*_):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(*((Path, "write_bytes", half) if fault == "write" else (os, "replace", fail)))
        entries.put(KEY, b"new")
        assert entries.get(KEY) == VALUE
        assert files(tmp_path) == kept
        assert not caplog.records

    def test_names_of_any_length(self, entries):
        keys = [f"{500 * 'ä'}-{digit:064}" for digit in range(2)]
        for key in keys:
            entries.put(key, key.encode())
        assert [entries.get(key) for key in keys] == [key.encode() for key in keys]

    def test_threads(self, entries, tmp_path, caplog):
        values = [bytes([n]) * (1 << 14) for n in range(4)]
        wrong = []

        def work(seed):
            rng = random.Random(seed)
            for _ in range(200):
                entries.put(KEY, rng.choice(values))
                if entries.get(KEY) not in values:
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert not caplog.records
        assert files(tmp_path) == [tmp_path / KEY]


class TestUseCache:
    def test_a_program_is_compiled_once(self, folder, caplog):
        assert not found()
        assert found()
        (file,) = files(folder)
        assert file.name.startswith("jit_program0-")
        assert not found(1)
        assert found()
        assert not caplog.records

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damage_is_reported_once_and_mended(self, folder, caplog, damage):
        run()
        (file,) = files(folder)
        for seed in range(3):
            damage(file, random.Random(seed))
            assert not found()  # JAX says nothing: its warnings are errors here
            assert reports(caplog, file) == 1
            assert found()
            assert not caplog.records

    def test_what_jax_itself_cannot_read_is_replaced(self, folder):
        run()
        (file,) = files(folder)
        compilation.Entries(folder).put(file.name, b"whole, but no program")
        with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
            run()
        assert found()

    def test_again_and_elsewhere_the_first_folder_remains(self, folder, tmp_path):
        compilation.use_cache()
        compilation.use_cache(tmp_path / "other")
        assert jax.config.jax_compilation_cache_dir == str(folder)
        assert files(tmp_path) == [folder]
        assert not found()
        assert found()

    def test_default_folder(self, pristine, tmp_path, monkeypatch):
        monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
        compilation.use_cache()
        (folder,) = files(tmp_path / "bnjax" / "compiled")
        assert jax.config.jax_compilation_cache_dir == str(folder)
        assert re.fullmatch(rf"[0-9a-f]{{16}}-{re.escape(metadata.version('jaxlib'))}-[\w-]+", folder.name)

    def test_which_programs_are_kept_is_left_to_jax(self, folder):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 100)
        run()
        assert files(folder) == []

    @pytest.mark.parametrize(
        ("name", "value"), [("jax_compilation_cache_dir", ""), ("jax_compilation_cache_max_size", 10**9)]
    )
    def test_a_users_settings_are_left(self, pristine, tmp_path, name, value):
        own = of_jax.get_file_cache
        jax.config.update(name, value)
        compilation.use_cache(tmp_path)
        assert getattr(jax.config, name) == value
        assert not jax.config.jax_compilation_cache_dir
        assert of_jax.get_file_cache is own

    def test_a_users_folder_is_left_to_jax(self, pristine, tmp_path):
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "users"))
        compilation.use_cache(tmp_path / "compiled")
        run()
        assert files(tmp_path) == [tmp_path / "users"]
        assert [file.name[-6:] for file in files(tmp_path / "users")] == ["-cache"]  # as JAX calls an entry

    def test_a_user_may_go_to_another_folder_and_come_back(self, folder, tmp_path):
        run()
        for path, has in ((tmp_path / "users", False), (folder, True), (tmp_path / "users", True)):
            jax.config.update("jax_compilation_cache_dir", str(path))
            reset_cache()
            assert found() is has
        assert len(files(folder)) == 1

    def test_a_user_may_turn_it_off(self, folder):
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()
        run()
        assert files(folder) == []

    def test_files_of_killed_processes_are_deleted_after_a_day(self, pristine, tmp_path):
        for name, hours in (("old.partial", 25), ("new.partial", 23), ("old", 1000)):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, 2 * (time.time() - 3600 * hours,))
        compilation.use_cache(tmp_path)
        assert [file.name for file in files(tmp_path)] == ["new.partial", "old"]

    def test_a_folder_that_cannot_be_made_is_no_error(self, pristine, tmp_path, caplog):
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "compiled"):
            compilation.use_cache(folder)
            assert jax.config.jax_compilation_cache_dir is None
        run()
        assert not caplog.records

    def test_a_folder_that_cannot_be_written_is_no_error(self, pristine, public, caplog):
        public.chmod(0o555)
        with a_plain_user():
            compilation.use_cache(public)
        assert jax.config.jax_compilation_cache_dir is None
        run()
        assert not caplog.records

    @pytest.mark.parametrize("mode", [0o555, 0o000])
    def test_a_folder_that_can_be_written_no_more_is_no_error(self, pristine, public, caplog, mode):
        compilation.use_cache(public)
        run()
        kept = files(public)
        public.chmod(mode)
        with a_plain_user():
            assert [found(number) for number in (0, 1, 1)] == [mode == 0o555, False, False]
        public.chmod(0o755)
        assert files(public) == kept
        assert not caplog.records

    def test_an_entry_that_can_be_neither_read_nor_deleted_is_as_good_as_none(self, pristine, public, caplog):
        compilation.use_cache(public)
        run()
        (file,) = files(public)
        file.chmod(0)
        public.chmod(0o555)
        with a_plain_user():
            run()
        assert files(public) == [file]
        assert not caplog.records

    def test_a_folder_that_goes_away_is_no_error(self, folder, caplog):
        folder.rmdir()
        run()
        assert not folder.exists()
        assert not caplog.records

    @pytest.mark.parametrize("lost", ["module", "get_file_cache", "CacheInterface", "setting", "method"])
    def test_another_jax_is_no_error(self, pristine, tmp_path, monkeypatch, caplog, lost):
        class Wider(of_jax.CacheInterface):
            @abc.abstractmethod
            def has(self, key):
                pass

        if lost == "module":
            monkeypatch.delattr(jax._src, "compilation_cache")
            monkeypatch.setitem(sys.modules, "jax._src.compilation_cache", None)
        elif lost == "setting":
            monkeypatch.setattr(jax, "config", types.SimpleNamespace())
        elif lost == "method":
            monkeypatch.setattr(of_jax, "CacheInterface", Wider)
        else:
            monkeypatch.delattr(of_jax, lost)
        compilation.use_cache(tmp_path / "compiled")
        monkeypatch.undo()
        assert jax.config.jax_compilation_cache_dir is None
        assert files(tmp_path) == []
        run()
        assert not caplog.records


def start(folder, programs=1, die=0):
    """A process that runs so many programs with the folder, and is killed in its `die`-th write, if it is not 0."""
    counts = Path(tempfile.mkdtemp(dir=folder.parent)) / "counts"
    log = counts.with_name("log")
    return processes.start(work, log, folder=folder, programs=programs, die=die, counts=counts), log, counts


def ended(started):
    """(the counts of `counted`, what it printed), or None if it was killed."""
    process, log, counts = started
    code = processes.end_of(process)
    if code == -signal.SIGKILL:
        return None
    assert code == 0, log.read_text()
    return json.loads(counts.read_text()), log.read_text()


@pytest.fixture
def shared(tmp_path):
    """The folder of several processes."""
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.mark.slow
class TestProcesses:
    def test_one_writes_and_the_next_finds(self, shared):
        assert ended(start(shared, 3)) == ({"misses": 3}, "")
        assert ended(start(shared, 3)) == ({"hits": 3}, "")

    def test_damage_is_reported_by_one_process(self, shared):
        ended(start(shared, len(DAMAGE)))
        damaged = files(shared)
        for file, damage in zip(damaged, DAMAGE, strict=True):
            damage(file, random.Random(0))
        counts, err = ended(start(shared, len(DAMAGE)))
        assert counts == {"misses": len(DAMAGE)}
        assert sorted(line.partition(" ")[0] for line in err.splitlines()) == [str(file) for file in damaged]
        assert ended(start(shared, len(DAMAGE))) == ({"hits": len(DAMAGE)}, "")

    @pytest.mark.parametrize("die", [1, 2])
    def test_one_is_killed_while_it_writes(self, shared, die):
        assert ended(start(shared, 3, die)) is None
        assert len(list(shared.glob(f"*{compilation.PARTIAL}"))) == 1
        expected = {"hits": die - 1, "misses": 4 - die}
        assert ended(start(shared, 3)) == ({n: count for n, count in expected.items() if count}, "")
        assert ended(start(shared, 3)) == ({"hits": 3}, "")

    def test_several_at_once_of_which_some_are_killed(self, shared):
        results = [ended(one) for one in [start(shared, 8, die) for die in (0, 2, 0, 5)]]
        assert [result is None for result in results[::2]] == [False, False]
        for result in filter(None, results):
            assert sum(result[0].values()) == 8
            assert result[1] == ""
        assert ended(start(shared, 8)) == ({"hits": 8}, "")


def die_in(times):
    """Has this process be killed in its `times`-th write, half of it written."""
    write, left = Path.write_bytes, [times]

    def half(file, content):
        left[0] -= 1
        if left[0]:
            return write(file, content)
        write(file, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes = half


def work(folder, programs, die, counts):
    warnings.simplefilter("error")
    compilation.use_cache(folder)
    jax.config.update("jax_num_cpu_devices", 1)  # an error if JAX had been started by it
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    die_in(die)
    with counted() as found:
        for number in range(programs):
            run(number)
    counts.write_text(json.dumps(found))
