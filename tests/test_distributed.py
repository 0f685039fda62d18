"""Several processes on this machine share one grid; what they leave is what one process leaves."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import bnjax
from bnjax.sweeps import files, run, store

ROOT = Path(__file__).parents[1]
WORKER = """
import json
import sys
import jax
path, address, count, index, options = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, int(count), int(index))
from tests import test_distributed
found = test_distributed.sweep(path, **json.loads(options))
print("all done", "done" not in found, flush=True)
"""


def sweep(path, width=2, odd=None, full=None, **options):
    """10 parts of 2 cells (at that width), on one device. Process `odd` has other data; for `full` there is no room."""
    import jax

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
            devices=jax.local_devices()[:1],
            progress=False,
            **options,
        )
    finally:
        run.GROUPS = groups


def start(path, count, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path), address, str(count), str(i), json.dumps(options)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes):
    for process in processes:
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out
        assert "all done True" in out


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_shares_are_the_whole(tmp_path, count):
    finish(start(tmp_path / "r.zarr", count))
    found = bnjax.load_results(tmp_path / "r.zarr")
    xr.testing.assert_equal(found, sweep(None))
    assert files.Folder(tmp_path / "r.zarr").writer().startswith("nobody on this host is writing there")


@pytest.mark.slow
def test_one_is_killed_and_another_number_goes_on(tmp_path):
    path = tmp_path / "r.zarr"
    processes = start(path, 2)
    parts = path / "bnjax" / "parts"
    until = time.monotonic() + 120
    while not files.Folder(path).list("bnjax/parts") and time.monotonic() < until:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    processes[0].kill()  # JAX would end it, too, but only when it has missed the other for 100 s
    for process in processes:
        process.communicate(timeout=60)
    done = {name: (parts / name).read_bytes() for name in files.Folder(path).list("bnjax/parts")}
    assert done
    finish(start(path, 3))
    assert {name: (parts / name).read_bytes() for name in done} == done
    xr.testing.assert_equal(bnjax.load_results(path), sweep(None))


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("fault", "words", "done"), [("odd", "has others than process 0", 0), ("full", "no room", 6)]
)
def test_one_fails_and_all_end(tmp_path, fault, which, words, done):
    """None waits for ever, the others' shares are stored, and the same job goes on."""
    path, said = tmp_path / "r.zarr", []
    for process in start(path, 3, **{fault: which}):
        said.append(process.communicate(timeout=200)[0])
        assert process.returncode == 1
    words_in = [words in text for text in said]
    assert any(words_in) if fault == "odd" else words_in == [i == which for i in range(3)]
    assert sum("failed, and says why" in text for text in said) >= 1
    assert len(files.Folder(path).list("bnjax/parts")) >= done
    if which or fault == "full":
        finish(start(path, 2))
        xr.testing.assert_equal(bnjax.load_results(path), sweep(None))


def test_needs_a_path(monkeypatch):
    import jax

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="by several processes needs a path"):
        sweep(None)
