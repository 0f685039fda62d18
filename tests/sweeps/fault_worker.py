"""A small sweep into a folder, in a process of its own, for tests that do it harm.

python -m fault_worker '{"path": "...", "seeds": 4}'     its options are those of `work`
"""

import itertools
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import quick

import bnjax
from bnjax.sweeps import files, store

CONFIG = bnjax.TrainConfig(steps=6, batch_size=16, eval_every=2)
RATES = (0.1, 1e30)  # the second is not finite from the first step on
MODELS = MappingProxyType({"mlp": bnjax.mlp((4,), 3)})


def data(seed=0):
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.normal(size=(n, 6)).astype(np.float32), rng.integers(3, size=n).astype(np.int32)

    return bnjax.Dataset(*draw(64), *draw(32))


def sweep(path, seeds=4, of=0, **options):
    """Two cells a seed, which are a group and a part; three calls of the compiled program each, states in between.

    What is `of` other data is another sweep, at the price of no compilation.
    """
    axes = {"seed": range(seeds) if isinstance(seeds, int) else seeds, "learning_rate": RATES}
    given = {"width": 1, "segment": 2, "checkpoint_minutes": 0, "progress": False}
    return bnjax.sweep(dict(MODELS), data(of), CONFIG, axes, path=path, **given | options)


def watch(step, setattr=setattr):
    """Calls `step(kind, half)` before each operation on the disk; `half()` does half of it.

    Kinds: writes into "log", "parts", "states", "lock" or the "export"; or the name of the function.
    """

    def watched(owner, name, kind_of=None, halved=None):
        whole = getattr(owner, name)

        def call(*args, **options):
            step(kind_of(*args) if kind_of else name, lambda: halved and whole(*halved(*args)))
            return whole(*args, **options)

        setattr(owner, name, call)

    def kind_of(file, data):
        folder = Path(file.name).parent
        return folder.name if folder.parent.name == "bnjax" else "export"

    watched(files, "_write", kind_of, lambda file, data: (file, data[: len(data) // 2]))
    watched(os, "pwrite", lambda *_: "lock", lambda file, data, at: (file, data[: len(data) // 2], at))
    for owner, names in {
        os: ("link", "truncate"),
        Path: ("mkdir", "rename", "replace", "unlink"),
        shutil: ["rmtree"],
    }.items():
        for name in names:
            watched(owner, name)


def work(path, die=None, limit=None, pause=None, peak=None, **options):
    """The sweep at `path`, with something done to it; raises what the sweep raises.

    It dies in the half of an operation on the disk, die = (kind, number); or after `limit` commits no file may grow:
    the system refuses, as when it is full. Each commit waits for the file `pause`. `peak`: a file for its most memory.
    """
    jax.config.update("jax_num_cpu_devices", 2)
    quick.use()
    commit, numbers, deadline = store.Store.commit, itertools.count(), time.monotonic() + 60
    operations = itertools.count(1)

    def step(kind, half):
        if die and kind == die[0] and next(operations) == die[1]:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def disturbed(self, *args):
        while pause and not Path(pause).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if limit is not None and next(numbers) >= limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        try:
            commit(self, *args)
        finally:  # what is written about it is no part of this
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    watch(step)
    store.Store.commit = disturbed
    sweep(path, **options)
    if peak:
        (line,) = (text for text in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in text)
        Path(peak).write_text(line.split()[1])


if __name__ == "__main__":
    work(**json.loads(sys.argv[1]))
