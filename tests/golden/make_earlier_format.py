"""Wrote earlier_format.zip with the code before results became parts (commit 9b9d34e), with that on PYTHONPATH.

A grid that is done, one whose process died after its first of four chunks, and what `load_results` made of both.
"""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

import bnjax
from bnjax.sweeps import plan, store

plan.GROUPS = 1


class Died(BaseException):
    """Nothing catches it."""


def sweep(path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 6)).astype(np.float32), rng.integers(3, size=16).astype(np.int32)
    config = bnjax.TrainConfig(steps=4, batch_size=8, eval_every=2)
    model = bnjax.mlp((4,), 3, norm="none")
    axes = {"learning_rate": (0.1, 1e30), "seed": range(3)}
    options = {"width": 2, "segment": 2, "devices": jax.local_devices()[:1], "progress": False, "checkpoint_minutes": 0}
    probe = bnjax.probes.weights(model, (6,))
    return bnjax.sweep({"one": model}, bnjax.Dataset(x, y, x, y), config, axes, path=path, probe=probe, **options)


with tempfile.TemporaryDirectory() as place:
    root = Path(place)
    sweep(root / "whole.zarr")
    commit = store.Store.commit

    def die(*args):
        commit(*args)
        raise Died

    store.Store.commit = die
    with contextlib.suppress(Died):
        sweep(root / "half.zarr")
    for name in ("whole", "half"):
        (root / f"{name}.json").write_text(json.dumps(bnjax.load_results(root / f"{name}.zarr").to_dict()))
    shutil.make_archive(str(Path(__file__).with_name("earlier_format")), "zip", root)
