"""What the tests of stored sweeps share: a sweep that dies, that is compared, and that was there before."""

import contextlib
import dataclasses
import shutil
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import pytest
import xarray as xr

import bnjax
from bnjax.sweeps import files, program, run, store

MODEL, OTHER = bnjax.mlp((8,), 4), bnjax.mlp((8,), 4, norm="none")
CONFIG = bnjax.TrainConfig(steps=4, batch_size=32, eval_every=2)
OTHER_CONFIG = dataclasses.replace(CONFIG, data_seed=1)
AXES = MappingProxyType({"seed": range(3), "init_scale": (0.1, 1.0, 10.0), "learning_rate": (0.1, 1e30)})
FEW, MORE, SIX = {"seed": (1, 2)}, {"seed": (3, 2, 1)}, {"seed": range(6)}
PROBE = bnjax.probes.weights(MODEL, (12,))
GOLDEN = Path(__file__).parents[1] / "golden" / "earlier_format.zip"


class Died(BaseException):
    """Not an error: nothing in the package catches it."""


class Sweep:
    """At width 2, on two devices, a part for each group, segments of 2 steps; at `path` unless told."""

    def __init__(self, ds, path, kept):
        self.ds, self.path, self.trained = ds, path, []  # (seed, init_scale) of the cells
        self.other_ds = ds._replace(test_x=ds.test_x + 1)
        self._kept = kept  # {what was asked for: the results, or the folder that holds them}

    def __call__(self, axes=AXES, model=MODEL, config=CONFIG, **options):
        given = {"ds": self.ds, "width": 2, "segment": 2, "progress": False, "path": self.path} | options
        return bnjax.sweep(model, given.pop("ds"), config, axes, **given)

    def given(self, axes, model=MODEL, path=None, **options):
        """Its results, which were there before the test; they are made once, and copied."""
        folder = self._kept["folder"] / f"{len(self._kept)}.zarr"
        folder = self._kept.setdefault(("given", repr((axes, model, options))), folder)
        if not folder.exists():
            self(axes, model, path=folder, **options)
            self.trained.clear()
        shutil.copytree(folder, path or self.path)
        return bnjax.load_results(path or self.path)

    def reference(self, *args, **options):
        """The same in memory."""
        options = {name: value for name, value in options.items() if name in ("model", "config", "probe", "ds")}
        key, count = repr((args, options)) if "ds" not in options else None, len(self.trained)
        found = self._kept.get(key)
        if found is None:
            found = self(*args, **options, path=None)
            del self.trained[count:]
            self._kept |= {key: found} if key else {}
        return found

    def right(self, *args, **options):
        """The same, after it was compared with the same sweep in memory, and with what `load_results` finds."""
        found = self(*args, **options)
        xr.testing.assert_equal(found, self.reference(*args, **options))
        xr.testing.assert_identical(found, bnjax.load_results(options.get("path", self.path)))
        return found

    def refused(self, words, *args, **options):
        with pytest.raises(ValueError, match=words):
            self(*args, **options)

    def killed(self, times, *args, method="commit", **options):
        """Dead after so many of its commits, or of a store's other method; False if it had fewer."""
        whole, left = getattr(store.Store, method), [times]

        def dying(*args):
            found = whole(*args)
            left[0] -= 1
            if left[0] == 0:
                raise Died
            return found

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Died):
            patch.setattr(store.Store, method, dying)
            self(*args, **options)
        self.trained.clear()
        return left[0] == 0

    def load(self):
        return bnjax.load_results(self.path)

    def opened(self):
        with xr.open_zarr(self.path, consolidated=False) as opened:
            return opened.load()

    def kept(self, folder):
        return files.Folder(self.path).list(f"bnjax/{folder}")

    def identities(self):
        return {name.rpartition("-")[0] for name in self.kept("parts")}


def watched(sweep, monkeypatch):
    """The sweep, which notes what is trained."""
    whole = program.run_group

    def seen(*args):
        sweep.trained.extend(zip(*(values.tolist() for values in args[1][:2]), strict=True))
        return whole(*args)

    monkeypatch.setattr(program, "run_group", seen)
    monkeypatch.setattr(run, "GROUPS", 1)
    return sweep


SOURCE = """
def init(key, input_shape, init_scale):{doc}
    return {{"kernel": jax.random.normal(key, (*input_shape, 4)) * init_scale}}, {{"seen": 0.0 * init_scale}}

{space}def apply(params, batch_stats, x, *, train):
    return x @ params["kernel"] + offsets{more}, {{"seen": {seen} * x.mean()}} if train else batch_stats
"""


def network(offsets=(0.0, 0.1, 0.2, 0.3), **changes):
    """A user's own, of which its config tells nothing."""
    names = {"jax": jax, "offsets": np.asarray(offsets, np.float32)}
    text = SOURCE.format(**{"doc": "", "space": "", "more": "", "seen": 1} | changes)
    exec(compile(text, "network.py", "exec"), names)
    return bnjax.Model(names["init"], names["apply"], config={"class": "Net"})


def probe(factor=1):
    return bnjax.Probe(lambda s: {"seen": factor * s.batch_stats["seen"]})


NETWORK, ITS_PROBE = network(), probe()
