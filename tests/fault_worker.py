"""A small sweep into a folder, in a process of its own, for tests that do it harm.

    python -m tests.fault_worker '{"path": "...", "seeds": 4}'     one sweep; its options are those of `work`
    python -m tests.fault_worker                                   a server: a line of options on standard input
                                                                   starts a process for them, forked before JAX starts

The server answers the pid at once, and the exit status (as subprocess gives it) when the process has ended.
"""

import json
import os
import random
import resource
import signal
import sys
import time
import uuid
import warnings
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from zarr.storage import LocalStore

import bnjax
from bnjax.sweeps import leases, plan, storage, store

CONFIG = bnjax.TrainConfig(steps=6, batch_size=16, eval_every=2)
RATES = (0.1, 1e30)  # the second is not finite from the first step on
MODELS = MappingProxyType({"mlp": bnjax.mlp((4,), 3)})
GROUPS = 1  # in a chunk, which then is the two cells of a seed: one for each of two devices


def data():
    rng = np.random.default_rng(0)

    def draw(n):
        return rng.normal(size=(n, 6)).astype(np.float32), rng.integers(3, size=n).astype(np.int32)

    return bnjax.Dataset(*draw(64), *draw(32))


def sweep(path, seeds=4, **options):
    """Two cells a seed, one chunk a seed; three calls of the compiled program a chunk, a checkpoint after each."""
    axes = {"seed": range(seeds), "learning_rate": RATES}
    given = {"width": 1, "segment": 2, "checkpoint_minutes": 0, "progress": False}
    return bnjax.sweep(dict(MODELS), data(), CONFIG, axes, path=path, **given | options)


def die_in(what, times):
    """Has the process die in its `times`-th write of a "value", "ledger" entry or "checkpoint", half of it written."""
    left = [times]

    def before(store, key, value):
        left[0] -= kind(key) == what
        if left[0] == 0:
            leave_part(store, key, value)
            os.kill(os.getpid(), signal.SIGKILL)

    on_writes(before)


def leave_part(store, key, value):
    """What is left of a write into a folder that was cut off: it goes to another name first."""
    path = (Path(store.root) / key).with_suffix(f".{uuid.uuid4().hex}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value.to_bytes()[: len(value) // 2])


def on_writes(before, setattr=setattr):
    """Calls `before(store, key, value)` before each write of a file."""

    def watched(whole):
        async def write(self, key, value):
            before(self, key, value)
            await whole(self, key, value)

        return write

    for name in ("set", "set_if_not_exists"):
        setattr(LocalStore, name, watched(getattr(LocalStore, name)))


def kind(key):
    """Of a file: "value" (of a variable or a coordinate), "ledger", "checkpoint", "lease" or "frame"."""
    parts = key.split("/")
    if parts[0] == "bnjax" and len(parts) > 2:
        return parts[1]
    return "value" if "c" in parts[1:-1] else "frame"


def limit_file_size(after, size):
    """After so many commits no file may grow beyond `size` bytes: the system refuses, as when it is full."""
    whole, left, unlimited = store.Store.commit, [after], resource.RLIM_INFINITY

    def commit(self, *args):
        left[0] -= 1
        if left[0] < 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited))
        try:
            whole(self, *args)
        finally:  # what is written about it is no part of this
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))

    store.Store.commit = commit


def pause_until(path):
    """Waits with its first commit until there is this file."""
    whole = store.Store.commit

    def commit(self, *args):
        until = time.monotonic() + 60
        while not Path(path).exists() and time.monotonic() < until:
            time.sleep(0.02)
        whole(self, *args)

    store.Store.commit = commit


def take_and_drop_the_lease(path, seconds, seed):
    """Takes it for moments, and at times dies with it. Raises RuntimeError if another living process has it, too."""
    draw, until = random.Random(seed), time.monotonic() + seconds
    mine = Path(path) / f"holder-{os.getpid()}"
    while time.monotonic() < until:
        try:
            with leases.lease(storage.Files(Path(path) / "r.zarr")):
                mine.touch()
                time.sleep(draw.uniform(0, 0.003))
                if draw.random() < 0.1:
                    os.kill(os.getpid(), signal.SIGKILL)
                holders = {int(p.name.partition("-")[2]) for p in mine.parent.glob("holder-*")} - {
                    os.getpid()
                }
                if living := [pid for pid in holders if leases._born(pid)]:
                    raise RuntimeError(f"{living} have it, too")
                mine.unlink()
        except leases.Busy:
            time.sleep(draw.uniform(0, 0.002))


def work(path, die=None, limit=None, pause=None, leases=None, groups=GROUPS, peak=None, **options):
    """The sweep at `path`, with something done to it; raises what the sweep raises. `peak`: a file for its memory."""
    plan.GROUPS = groups
    if die:
        die_in(*die)
    if limit:
        limit_file_size(*limit)
    if pause:
        pause_until(pause)
    if leases:
        take_and_drop_the_lease(path, *leases)
    else:
        sweep(path, **options)
    if peak:
        (line,) = (text for text in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in text)
        Path(peak).write_text(line.split()[1])


def serve():
    """See the top of this file."""
    warnings.simplefilter("ignore", RuntimeWarning)  # that JAX has threads, which it has not yet
    for line in sys.stdin:
        options = json.loads(line)
        pid = os.fork()
        if pid == 0:
            break
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        return
    log = os.open(options.pop("log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(0)
    work(**options)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    if len(sys.argv) > 1:
        work(**json.loads(sys.argv[1]))
    else:
        serve()
