"""Prepared copies: damaged, made by several processes at once, interrupted."""

import errno
import hashlib
import signal
import subprocess
import time

import pytest
from archives import SMALL_MNIST, assert_is, output, python

from bnjax import data
from bnjax.data import builders


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "remove checksums", "empty"])
def test_damaged_prepared_copy(tmp_path, mnist, damage):
    arrays, folder = mnist
    data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)
    prepared = tmp_path / "cache" / "mnist" / "3.0.1"
    (records,) = prepared.glob("*train*")
    match damage:
        case "flip":
            content = bytearray(records.read_bytes())
            content[-100] ^= 1
            records.write_bytes(content)
        case "truncate":
            records.write_bytes(records.read_bytes()[:1000])
        case "remove":
            records.unlink()
        case "remove checksums":
            (prepared / "SHA256SUMS").unlink()
        case "empty":
            (prepared / "SHA256SUMS").write_text("")
    with pytest.raises(OSError, match=r"mnist.3\.0\.1 is not a complete copy .* Delete the folder"):
        data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)
    for file in prepared.iterdir():
        file.unlink()
    prepared.rmdir()
    assert_is(data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder), arrays)


def test_user_settings_of_tfds_are_restored(tmp_path, mnist):
    tqdm_utils = builders.tqdm_utils
    for shown in (False, True):
        builders.tfds.display_progress_bar(shown)
        data.load("mnist", data_dir=tmp_path / str(shown), manual_dir=mnist[1])
        assert tqdm_utils._active is shown


LOAD = """
ds = data.load("mnist", data_dir=cache, manual_dir=archives)
print(hashlib.sha256(b"".join(a.tobytes() for a in ds)).hexdigest())
"""
BEGIN = "pathlib.Path(sys.argv[3]).touch()\n"
# Waits until there are three of them, which the folder argv[3] counts.
MEET = """
pathlib.Path(sys.argv[3], str(os.getpid())).touch()
deadline = time.monotonic() + 60
while len(os.listdir(sys.argv[3])) < 3 and time.monotonic() < deadline:
    time.sleep(0.001)
"""
# Waits (for ever, if need be) in the middle of preparing.
WAIT = """
generate = builders.Builder._generate_examples
def waiting(self, x, y):
    for i, example in enumerate(generate(self, x, y)):
        if i == len(x) // 2:
            pathlib.Path(sys.argv[3]).touch()
            while pathlib.Path(sys.argv[3]).exists():
                time.sleep(0.01)
        yield example
builders.Builder._generate_examples = waiting
"""


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_processes_that_prepare_at_once(tmp_path, mnist):
    (tmp_path / "met").mkdir()
    arguments = (mnist[1], tmp_path / "cache", tmp_path / "met")
    processes = [python(SMALL_MNIST + MEET + LOAD, *arguments) for _ in range(3)]
    ds = data.load("mnist", data_dir=tmp_path / "other", manual_dir=mnist[1])
    expected = hashlib.sha256(b"".join(a.tobytes() for a in ds)).hexdigest()
    assert [output(process) for process in processes] == [expected] * 3
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".mnist.lock", "mnist"]


@pytest.mark.slow
def test_second_process_waits_for_a_slow_one(tmp_path, mnist):
    cache, waiting = tmp_path / "cache", tmp_path / "waiting"
    slow = python(SMALL_MNIST + WAIT + LOAD, mnist[1], cache, waiting)
    wait_for(waiting, slow)
    (temporary,) = cache.glob(".mnist-*")
    second = python(SMALL_MNIST + BEGIN + LOAD, mnist[1], cache, tmp_path / "begun")
    wait_for(tmp_path / "begun", second)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(4)
    assert temporary.exists()
    waiting.unlink()
    while waiting.exists() or slow.poll() is None:  # it waits once a split
        waiting.unlink(missing_ok=True)
        time.sleep(0.01)
    assert output(slow) == output(second)


@pytest.mark.slow
def test_process_killed_half_way(tmp_path, mnist):
    arrays, folder = mnist
    cache, waiting = tmp_path / "cache", tmp_path / "waiting"
    for _ in range(2):  # leftovers do not pile up
        killed = python(SMALL_MNIST + WAIT + LOAD, folder, cache, waiting)
        wait_for(waiting, killed)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        killed.communicate()
        waiting.unlink()
        assert len(list(cache.glob(".mnist-*"))) == 1
        assert not (cache / "mnist").exists()
    assert_is(data.load("mnist", data_dir=cache, manual_dir=folder), arrays)
    assert sorted(path.name for path in cache.iterdir()) == [".mnist.lock", "mnist"]


def test_interrupted_preparation_leaves_nothing(tmp_path, mnist, monkeypatch):
    def interrupted(self, x, y):
        yield 0, {"image": x[0], "label": int(y[0])}
        raise KeyboardInterrupt

    monkeypatch.setattr(builders.Builder, "_generate_examples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist", data_dir=tmp_path / "cache", manual_dir=mnist[1])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".mnist.lock"]


def test_lost_race_without_locks_uses_the_winners_copy(tmp_path, mnist, monkeypatch):
    import fcntl

    arrays, folder = mnist
    prepare = builders.Builder.download_and_prepare

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "no locks")

    def overtaken(self, **kwargs):
        monkeypatch.setattr(builders.Builder, "download_and_prepare", prepare)
        data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)
        prepare(self, **kwargs)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(builders.Builder, "download_and_prepare", overtaken)
    assert_is(data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder), arrays)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".mnist.lock", "mnist"]


def test_data_dir_that_is_a_file(tmp_path, mnist):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        data.load("mnist", data_dir=tmp_path / "file", manual_dir=mnist[1])
