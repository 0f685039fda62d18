"""Several processes on this machine share one grid; what they leave is what one process leaves."""

import functools
import signal
import socket
import time

import jax
import numpy as np
import pytest
import quick
import xarray as xr
from processes import end_as_python, end_of
from processes import start as start_process

import bnjax
from bnjax.sweeps import files, run, store


def work(path, address, count, index, devices, options):
    """What one of the processes does."""
    quick.use()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(address, count, index)
    found = sweep(path, **options)
    print("all done", "done" not in found, flush=True)


def sweep(path, width=2, odd=None, full=None, devices=1, **options):
    """10 parts of 2 cells (at that width), on one device. Process `odd` has other data; for `full` there is no room."""
    rng = np.random.default_rng(int(odd == jax.process_index()))

    def refuse(*_):
        raise OSError("no room")

    if full == jax.process_index():
        store.Store.commit = refuse
    x, y = rng.normal(size=(128, 12)).astype(np.float32), rng.integers(4, size=128).astype(np.int32)
    groups, run.GROUPS = run.GROUPS, 1
    try:
        return bnjax.sweep(
            bnjax.mlp((8,), 4),
            bnjax.Dataset(x, y, x, y),
            bnjax.TrainConfig(steps=20, batch_size=32),
            {"seed": range(10), "init_scale": (0.1, 1.0)},
            path=path,
            width=width,
            devices=None if jax.process_count() > 1 else jax.local_devices()[:devices],
            progress=False,
            **options,
        )
    finally:
        run.GROUPS = groups


def start(path, count, devices=(1, 1, 1, 1), **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    given = {"path": path, "address": address, "count": count, "options": options}
    started = []
    for index, number in zip(range(count), devices, strict=False):
        log = path.with_name(f"{len(list(path.parent.glob('*.log')))}.log")
        log.touch()
        process = start_process(functools.partial(end_as_python, work), log, index=index, devices=number, **given)
        started.append((process, log))
    return started


def finish(processes):
    for process, log in processes:
        assert end_of(process, 200) == 0, log.read_text()
        assert "all done True" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_shares_are_the_whole(tmp_path, count):
    finish(start(tmp_path / "r.zarr", count))
    found = bnjax.load_results(tmp_path / "r.zarr")
    xr.testing.assert_equal(found, sweep(None))
    assert files.Folder(tmp_path / "r.zarr").writer().startswith("nobody on this host is writing there")


@pytest.mark.slow
def test_unlike_numbers_of_devices(tmp_path):
    """And states of groups that are not theirs: of two devices, half way."""
    path = tmp_path / "r.zarr"
    save, states = store.Store.save_state, []

    class Died(BaseException):
        pass

    def dying(*args):
        save(*args)
        states.append(len(args[2]))
        raise Died

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "save_state", dying)
        with pytest.raises(Died):
            sweep(path, devices=2, segment=10, checkpoint_minutes=0)
    assert states == [4]
    finish(start(path, 3, devices=(1, 3, 2), segment=10))
    found = bnjax.load_results(path)
    xr.testing.assert_equal(found, sweep(None, segment=10))


@pytest.mark.slow
def test_one_is_killed_and_another_number_goes_on(tmp_path):
    path = tmp_path / "r.zarr"
    processes = start(path, 2)
    parts = path / "bnjax" / "parts"
    until = time.monotonic() + 120
    while not files.Folder(path).list("bnjax/parts") and time.monotonic() < until:
        time.sleep(0.01)
    for process, _ in processes[::-1]:  # JAX would end the first, too, but only when it has missed the other for 100 s
        process.kill()
    assert [end_of(process, 60) for process, _ in processes] == 2 * [-signal.SIGKILL]
    done = {name: (parts / name).read_bytes() for name in files.Folder(path).list("bnjax/parts")}
    assert done
    finish(start(path, 3))
    assert {name: (parts / name).read_bytes() for name in done} == done
    xr.testing.assert_equal(bnjax.load_results(path), sweep(None))


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("fault", "words", "done"), [("odd", "has others than process 0", 0), ("full", "no room", 6)])
def test_one_fails_and_all_end(tmp_path, fault, which, words, done):
    """None waits for ever, each says what happened, the others' shares are stored, and the same job goes on."""
    path, said = tmp_path / "r.zarr", []
    for process, log in start(path, 3, **{fault: which}):
        assert end_of(process, 200) == 1, log.read_text()
        said.append(log.read_text())
    assert all(words in text for text in said), said
    parts = len(files.Folder(path).list("bnjax/parts"))
    assert parts >= done if fault == "full" else parts == 0
    if which or fault == "full":
        finish(start(path, 2))
        xr.testing.assert_equal(bnjax.load_results(path), sweep(None))


def test_needs_a_path(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="by several processes needs a path"):
        sweep(None)
