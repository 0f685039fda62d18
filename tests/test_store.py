"""Sweeps that last: stopped and continued, extended, overwritten, changed, exported, in buckets, and read meanwhile."""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import warnings
import zipfile
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import obstore.store
import pytest
import xarray as xr
import zarr

import bnjax
import bnjax.__main__
from bnjax import training
from bnjax.sweeps import files, grid, layout, program, provenance, run, store

MODEL, OTHER = bnjax.mlp((8,), 4), bnjax.mlp((8,), 4, norm="none")
CONFIG = bnjax.TrainConfig(steps=4, batch_size=32, eval_every=2)
OTHER_CONFIG = dataclasses.replace(CONFIG, data_seed=1)
AXES = MappingProxyType({"seed": range(3), "init_scale": (0.1, 1.0, 10.0), "learning_rate": (0.1, 1e30)})
FEW, MORE, SIX = {"seed": (1, 2)}, {"seed": (3, 2, 1)}, {"seed": range(6)}
PROBE = bnjax.probes.weights(MODEL, (12,))
GOLDEN = Path(__file__).with_name("golden") / "earlier_format.zip"


class Died(BaseException):
    """Not an error: nothing in the package catches it."""


class Sweep:
    """At width 2, on two devices, a part for each group, segments of 2 steps; at `path` unless told."""

    def __init__(self, ds, path):
        self.ds, self.path, self.trained = ds, path, []  # (seed, init_scale) of the cells

    def __call__(self, axes=AXES, model=MODEL, config=CONFIG, **options):
        given = {"ds": self.ds, "width": 2, "segment": 2, "progress": False, "path": self.path} | options
        return bnjax.sweep(model, given.pop("ds"), config, axes, **given)

    def right(self, *args, **options):
        """The same, after it was compared with the same sweep in memory, and with what `load_results` finds."""
        found, count = self(*args, **options), len(self.trained)
        xr.testing.assert_equal(found, self(*args, **options | {"path": None}))
        del self.trained[count:]
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


@pytest.fixture
def sweep(blobs, tmp_path, monkeypatch):
    found, whole = Sweep(blobs, tmp_path / "r.zarr"), program.run_group

    def seen(*args):
        found.trained.extend(zip(*(values.tolist() for values in args[1][:2]), strict=True))
        return whole(*args)

    monkeypatch.setattr(program, "run_group", seen)
    monkeypatch.setattr(run, "GROUPS", 1)
    return found


class TestResume:
    def test_is_the_same_in_memory_and_on_disk(self, sweep):
        sweep.right(probe=PROBE)

    def test_segments_change_nothing(self, sweep):
        options = {"config": bnjax.TrainConfig(steps=11, batch_size=32, eval_every=4), "probe": PROBE}
        one, other = sweep(**options, segment=3), sweep(**options, path=None, segment=None)
        xr.testing.assert_equal(one, other)
        assert sweep.killed(
            2, method="save_state", checkpoint_minutes=0, path=sweep.path.with_name("s"), **options
        )
        xr.testing.assert_equal(sweep(**options, segment=2, path=sweep.path.with_name("s")), one)

    @pytest.mark.parametrize(("method", "times"), [("save_state", 2), ("commit", 1), ("commit", 4)])
    def test_ends_as_if_it_had_never_stopped(self, sweep, method, times):
        assert sweep.killed(times, method=method, checkpoint_minutes=0, probe=PROBE)
        sweep.right(checkpoint_minutes=0, probe=PROBE)
        assert sweep.kept("states") == []

    @pytest.mark.slow
    def test_dies_at_every_state_on_changing_devices(self, sweep):
        options = {"config": bnjax.TrainConfig(11, 32, eval_every=4), "segment": 3, "checkpoint_minutes": 0}
        deaths = 0
        while sweep.killed(2, method="save_state", devices=jax.devices()[: 1 + deaths % 2], **options):
            deaths += 1
        assert deaths > 5
        sweep.right(**options)
        assert sweep.trained == []

    @pytest.mark.slow
    def test_goes_on_from_the_furthest_state(self, sweep, monkeypatch):
        """Of the group's several, which are there if a process dies before it has removed those that are behind."""
        options = {"method": "save_state", "checkpoint_minutes": 0, "segment": 1}
        for times in (2, 1):
            assert sweep.killed(times, {"seed": range(4)}, **options)
        begun, whole = [], program.run_group
        monkeypatch.setattr(program, "run_group", lambda *args: begun.append(args[-1]) or whole(*args))
        sweep.right({"seed": range(4)}, segment=1)
        assert [state and state.step[0] for state in begun] == [3, None]  # and the one in memory

    def test_what_is_done_is_not_trained_again(self, sweep):
        first = sweep()
        assert len(sweep.trained) == 18
        xr.testing.assert_identical(sweep(), first)
        for axes in (AXES, {**AXES, "seed": range(4)}):
            assert sweep(axes, width=None, segment=None).attrs["plan"] == first.attrs["plan"]
        assert len(sweep.trained) == 24
        assert len(sweep.kept("log")) == 1

    def test_half_done_results_say_what_is_done(self, sweep):
        sweep.killed(2)
        found, whole = sweep.load(), sweep(path=None)
        assert found.done.values.ravel().tolist() == [True] * 8 + [False] * 10
        assert found.test_loss.equals(whole.test_loss.where(found.done))
        assert found.diverged.equals(whole.diverged & found.done)
        assert found.diverged_step.equals(whole.diverged_step.where(found.done, -1))
        assert "done" not in whole


class TestExtension:
    LARGER = MappingProxyType(
        {"init_scale": (10.0, 0.1, 0.5, 1.0), "learning_rate": (1e30, 0.1), "seed": (7, 0, 2, 1)}
    )

    def test_keeps_what_is_done(self, sweep):
        sweep()
        sweep.trained.clear()
        sweep.right(self.LARGER)
        scales = np.float32([0.1, 0.5, 1.0, 10.0])
        new = {(seed, scale) for seed in (7, 0, 1, 2) for scale in scales if seed == 7 or scale == 0.5}
        assert {*sweep.trained} == new
        assert len(sweep.kept("log")) == 1

    def test_of_what_is_half_done(self, sweep):
        sweep.killed(2)
        sweep.killed(1, self.LARGER)
        assert sweep.load().done.sum() == 8 + 4
        sweep.right(self.LARGER)
        assert len(sweep.trained) == 32 - 12

    def test_with_an_axis_more(self, sweep):
        sweep({"seed": range(3)})
        sweep.right({"momentum": (0.5, 0.9), "seed": range(4)})
        assert len(sweep.trained) == 3 + 5

    @pytest.mark.parametrize(
        ("before", "after", "new"),
        [
            ({"a": MODEL}, {"b": OTHER, "a": MODEL}, 2),
            ({"a": MODEL}, {"b": MODEL}, 0),
            (MODEL, {"a": MODEL}, 0),
            ({"a": MODEL}, MODEL, 0),
        ],
        ids=["more", "renamed", "labelled", "not labelled any more"],
    )
    def test_of_the_models(self, sweep, before, after, new):
        sweep(FEW, before)
        sweep.right(FEW, after)
        assert len(sweep.trained) == 2 + new

    @pytest.mark.parametrize(
        ("axes", "model", "count"),
        [
            ({**AXES, "seed": [0]}, {"a": MODEL}, 12),
            ({**AXES, "init_scale": (0.1, 10.0, 2.0)}, {"a": MODEL}, 6),
            (AXES, {"b": OTHER}, 18),
        ],
    )
    def test_never_loses_a_cell(self, sweep, axes, model, count):
        first = sweep(model={"a": MODEL})
        words = rf"{count} of the cells there are not among those asked for.*Choose another place, or over"
        sweep.refused(words, axes, model, allow_changed=store.CHANGES)
        xr.testing.assert_identical(sweep(model={"a": MODEL}), first)


SOURCE = """
def init(key, input_shape, init_scale):{doc}
    return {{"kernel": jax.random.normal(key, (*input_shape, 4)) * init_scale}}, {{"seen": 0.0 * init_scale}}

{space}def apply(params, batch_stats, x, *, train):
    return x @ params["kernel"] + offsets{more}, {{"seen": {seen} * x.mean()}} if train else batch_stats
"""
COMPUTES = r"computes\.: \w+\.2 there, \w+\.2 asked for.*allow_changed=models"


def probe(factor=1):
    return bnjax.Probe(lambda s: {"seen": factor * s.batch_stats["seen"]})


def network(offsets=(0.0, 0.1, 0.2, 0.3), **changes):
    """A user's own, of which its config tells nothing."""
    names = {"jax": jax, "offsets": np.asarray(offsets, np.float32)}
    text = SOURCE.format(**{"doc": "", "space": "", "more": "", "seen": 1} | changes)
    exec(compile(text, "network.py", "exec"), names)
    return bnjax.Model(names["init"], names["apply"], config={"class": "Net"})


class TestChanges:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"config": dataclasses.replace(CONFIG, batch_size=16)}, "config.batch_size: 32 there, 16 asked"),
            (
                {"config": dataclasses.replace(CONFIG, optimizer="adam")},
                "optimizer: sgd .*allow_changed=config",
            ),
            ({"config": dataclasses.replace(CONFIG, eval_every=1)}, "config.eval_every: 2 there, 1 asked"),
            (
                {"config": dataclasses.replace(CONFIG, steps=6)},
                r"steps: 4 there.*layout.further.step: \[2, 4\] there.*Choose another place, or overwrite",
            ),
            ({"model": bnjax.mlp((8,), 4, epsilon=0.1)}, "models..epsilon: 1e-05 there, 0.1 asked for"),
            ({"width": 4}, "plan..width: 2 there, 4 asked for.*allow_changed=plan"),
            ({"probe": PROBE}, "layout.variables.angle: nothing there"),
            ({"hyper": bnjax.Hyperparams(momentum=0.8)}, "2 of the cells there are not among those"),
            ({"allow_changed": ["version"]}, "unknown allowed change 'version'.*did you mean 'versions'"),
            ({"ds": 1}, r"data.fingerprint: \w+ there, \w+ asked for"),
        ],
    )
    def test_are_refused_and_named(self, sweep, blobs, change, words):
        first = sweep(FEW)
        change = change if "ds" not in change else {"ds": blobs._replace(train_x=blobs.train_x + 1)}
        sweep.refused(words, FEW, **change)
        xr.testing.assert_identical(sweep(FEW), first)

    @pytest.mark.parametrize(
        ("change", "other"),
        [({"offsets": (0.0, 0.1, 0.2, 0.4)}, 1), ({"more": " * 2"}, 1), ({"seen": 2}, 1), ({}, 2)],
        ids=["constants", "body", "what the probe sees", "probe"],
    )
    def test_of_what_a_config_does_not_tell(self, sweep, change, other):
        """As of a Flax module of the same name with another body, and of a probe."""
        first = sweep(FEW, network(), probe=probe())
        for axes in (FEW, MORE):
            sweep.refused(COMPUTES, axes, network(**change), probe=probe(other))
        xr.testing.assert_identical(sweep(FEW, network(), probe=probe()), first)

    @pytest.mark.parametrize("change", [{"doc": '\n    """Documented."""'}, {"space": "\n\n\n"}])
    def test_of_words_alone_is_none(self, sweep, change):
        """The same function, defined again, is the same: whatever its docstring and the place in its source."""
        first = sweep(FEW, network())
        xr.testing.assert_identical(sweep(FEW, network(**change)), first)
        assert len(sweep.trained) == 2

    def test_of_the_loss(self, sweep, monkeypatch):
        """As by another version of this package, with what else it says of itself unchanged."""
        sweep(FEW, network())
        whole = training._loss_and_accuracy
        monkeypatch.setattr(
            training, "_loss_and_accuracy", lambda *args: [2 * value for value in whole(*args)]
        )
        sweep.refused(COMPUTES, FEW, network())

    def versions(self, monkeypatch, **others):
        """Other packages than those there."""
        found, version = provenance.versions() | others, metadata.version
        monkeypatch.setattr(provenance, "versions", lambda: found)
        monkeypatch.setattr(metadata, "version", lambda name: others.get(name) or version(name))

    def test_of_versions_may_be_allowed_and_are_recorded(self, sweep, monkeypatch):
        first, jaxlib = sweep(FEW), metadata.version("jaxlib")
        self.versions(monkeypatch, jaxlib="0.0.1")
        line = f"versions.jaxlib: {jaxlib} there, 0.0.1 asked for"
        for axes in (FEW, MORE):
            sweep.refused(rf"{line}\. Choose another place, overwrite, or allow_changed=versions", axes)
        found = sweep.right(MORE, allow_changed=["versions"])  # the cells of both
        assert len(sweep.trained) == 3
        assert found.attrs["changes"] == [[line]]
        new, old = found.attrs["identity"][""]
        assert [old] == first.attrs["identity"][""] != [new]
        assert found.attrs["versions"]["jaxlib"] == "0.0.1"
        xr.testing.assert_identical(sweep(MORE), found)  # what is recorded needs no leave any more

    def test_twice_are_recorded_twice(self, sweep, blobs):
        first, ds = sweep(FEW), blobs._replace(test_x=blobs.test_x + 1)
        sweep(MORE, ds=ds, allow_changed=["data"])
        found = sweep({"seed": range(5)}, ds=ds, width=1, allow_changed=["plan"])
        changes = [line.split(":")[0] for lines in found.attrs["changes"] for line in lines]
        assert changes == ["data.fingerprint", "plan..width"]
        assert len(found.attrs["identity"][""]) == 3
        assert found.test_loss.sel(seed=[1, 2]).equals(first.test_loss)

    def test_of_packages_that_compute_nothing_are_none(self, sweep, monkeypatch):
        first = sweep(FEW)
        self.versions(monkeypatch, xarray="1.0", bnjax="1.0", code="changed")
        xr.testing.assert_identical(sweep(FEW), first)
        found = sweep(MORE)
        assert len(sweep.trained) == 3
        assert "changes" not in found.attrs
        assert found.attrs["versions"]["xarray"] == "1.0"


class TestOverwrite:
    def test_where_there_is_nothing_or_the_same(self, sweep):
        sweep.killed(1, SIX, overwrite=True)
        assert sweep.load().done.sum() == 4  # it counts at once
        sweep.right(SIX, overwrite=True)
        assert len(sweep.trained) == 2

    @pytest.fixture(params=["of a sweep", "half done", "saved", "in the earlier format"])
    def before(self, request, sweep, tmp_path):
        """Results that are there."""
        if request.param == "of a sweep":
            sweep(FEW, OTHER)
        elif request.param == "half done":
            sweep.killed(1, SIX, OTHER)
        elif request.param == "saved":
            bnjax.save_results(sweep(FEW, OTHER, path=None), sweep.path)
        else:
            zipfile.ZipFile(GOLDEN).extractall(tmp_path)
            (tmp_path / "whole.zarr").rename(sweep.path)
        return sweep.load()

    def test_of_others(self, sweep, before):
        """They count until the new ones are complete, and are removed then."""
        (sweep.path / "thesis.txt").write_text("mine")
        sweep.refused(r"r\.zarr holds other results: .*", SIX)
        sweep.killed(1, SIX, overwrite=True)
        xr.testing.assert_identical(sweep.load(), before)
        sweep.killed(1, SIX)  # the same sweep, which goes on also without the word
        found = sweep.right(SIX, overwrite=True)
        assert sweep.trained == []
        assert len(sweep.kept("log")) == 1
        assert sweep.identities() == {*found.attrs["identity"][""]}
        assert {*os.listdir(sweep.path / "bnjax")} == {"lock", "log", "parts", "states", "zarr.json"}
        (sweep.path / "thesis.txt").unlink()  # which is another program's, and still there
        xr.testing.assert_equal(sweep.opened(), found)
        xr.testing.assert_identical(sweep(SIX), found)

    def test_abandoned_for_a_third(self, sweep):
        first = sweep(FEW, OTHER)
        sweep.killed(1, SIX, overwrite=True)
        sweep.refused("holds other results", FEW, config=OTHER_CONFIG)
        sweep.killed(1, SIX, config=OTHER_CONFIG, overwrite=True)
        sweep.killed(1, {"seed": range(9)}, config=OTHER_CONFIG)
        xr.testing.assert_identical(sweep.load(), first)
        assert len(sweep.kept("log")) == 2
        found = sweep.right({"seed": range(9)}, config=OTHER_CONFIG)
        assert sweep.identities() == {*found.attrs["identity"][""]}

    def test_abandoned_for_what_stands(self, sweep):
        first = sweep(FEW, OTHER)
        sweep.killed(1, SIX, overwrite=True)
        xr.testing.assert_identical(sweep(FEW, OTHER), first)
        found = sweep.right(MORE, OTHER)
        assert (len(sweep.kept("log")), sweep.identities()) == (1, {*found.attrs["identity"][""]})

    @pytest.mark.parametrize("name", ["thesis.tex", "thesis.partial", "sub/folder/thesis.tex", ""])
    def test_a_place_with_other_things_is_not_touched(self, sweep, name):
        other = sweep.path / name
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("mine")
        for overwrite in (False, True):
            words = (
                "is not empty, and holds no results of a sweep" if name else "is a file: choose a new folder"
            )
            sweep.refused(words, overwrite=overwrite)
            assert [p for p in sweep.path.parent.rglob("*") if p.is_file()] == [other]

    def test_what_stands_is_extended_beside_what_was_abandoned(self, sweep, monkeypatch):
        """And dies when it has removed one of the two records."""
        first, delete = sweep(FEW), files.Folder.delete
        assert sweep.killed(1, FEW, OTHER, method="save_state", checkpoint_minutes=0, overwrite=True)

        def dying(*args):
            delete(*args)
            raise Died

        with monkeypatch.context() as patch:
            patch.setattr(files.Folder, "delete", dying)
            with pytest.raises(Died):
                sweep(MORE)
        assert len(sweep.kept("log")) == 2
        xr.testing.assert_identical(sweep.load(), first)
        sweep.right(MORE)

    def test_what_is_unfinished_is_finished_though_something_else_was_begun(self, sweep):
        assert sweep.killed(1, SIX)
        assert sweep.killed(1, FEW, OTHER, method="save_state", checkpoint_minutes=0, overwrite=True)
        found = sweep.right(SIX)
        xr.testing.assert_identical(sweep.opened(), found)
        assert (len(sweep.kept("log")), sweep.kept("states")) == (1, [])

    def test_saved_results_are_not_back_when_what_overwrote_them_is_extended(self, sweep, monkeypatch):
        """After it died between its last part and its export."""
        bnjax.save_results(sweep(FEW, path=None), sweep.path)
        whole = store.Store.finished
        monkeypatch.setattr(store.Store, "finished", lambda self: False)
        sweep(FEW, OTHER, overwrite=True)
        monkeypatch.setattr(store.Store, "finished", whole)
        assert sweep.killed(1, MORE, OTHER, method="save_state", checkpoint_minutes=0)
        assert sweep.load().done.values.tolist() == [False, True, True]

    def test_what_was_put_aside_is_not_forgotten(self, sweep):
        """By a `save_results` that was cut off between its two renames."""
        first = sweep(FEW)
        sweep.path.rename(bnjax.export.aside(sweep.path))
        sweep.refused(r"cut off: what it held is in .*\.r\.zarr\.replaced", FEW, overwrite=True)
        xr.testing.assert_identical(sweep.load(), first)


class TestExport:
    def test_is_what_xarray_opens_and_may_be_saved_again(self, sweep, tmp_path):
        found, opened = sweep(model={"a": MODEL}, probe=PROBE), sweep.opened()
        xr.testing.assert_identical(opened, found)
        bnjax.save_results(opened, tmp_path / "s.zarr")
        xr.testing.assert_identical(bnjax.load_results(tmp_path / "s.zarr"), found)

    def test_follows_an_extension(self, sweep):
        sweep(FEW)
        before = (sweep.path / "zarr.json").stat().st_mtime_ns
        sweep(FEW)
        assert (sweep.path / "zarr.json").stat().st_mtime_ns == before  # nothing was written
        xr.testing.assert_identical(sweep(MORE), sweep.opened())

    @pytest.mark.parametrize("axes", [FEW, MORE])
    def test_is_none_unless_it_is_asked_for(self, sweep, axes):
        """One that stands there, of the same or of less, is removed."""
        sweep(FEW, export=False)
        assert os.listdir(sweep.path) == ["bnjax"]
        sweep(FEW)
        assert "test_loss" in os.listdir(sweep.path)
        sweep.right(axes, export=False)
        assert os.listdir(sweep.path) == ["bnjax"]

    def test_left_out_and_asked_for_again(self, sweep, caplog):
        for export in (True, False, True):
            sweep(FEW, export=export)
        xr.testing.assert_identical(sweep.opened(), sweep.load())
        assert caplog.messages == []

    @pytest.mark.filterwarnings("ignore:Object at .* is not recognized")
    def test_is_nothing_that_results_rest_on(self, sweep):
        found = sweep(FEW)
        shutil.rmtree(sweep.path / "test_loss")
        (sweep.path / "seed" / "c" / "0").write_text("broken")
        xr.testing.assert_identical(sweep.load(), found)
        sweep(FEW)
        xr.testing.assert_identical(sweep.opened(), found)


class TestBuckets:
    @pytest.mark.parametrize("kind", ["memory", "zarr's", "local", "url"])
    def test_are_as_a_folder(self, sweep, tmp_path, kind):
        """Half done, done, extended, and overwritten."""
        (tmp_path / "b.zarr").mkdir()
        bucket = {
            "memory": obstore.store.MemoryStore(),
            "zarr's": zarr.storage.ObjectStore(obstore.store.MemoryStore()),
            "local": obstore.store.LocalStore(tmp_path / "b.zarr"),
            "url": (tmp_path / "b.zarr").as_uri(),
        }[kind]
        with pytest.raises(FileNotFoundError, match="no results at"):
            bnjax.load_results(bucket)
        sweep.killed(1, SIX, path=bucket, checkpoint_minutes=0)
        assert bnjax.load_results(bucket).done.sum() == 4
        sweep.right(SIX, path=bucket)
        found = sweep.right({"seed": range(7)}, path=bucket)
        assert len(sweep.trained) == 3
        sweep.killed(1, SIX, OTHER, path=bucket, overwrite=True)
        xr.testing.assert_identical(bnjax.load_results(bucket), found)
        found, inner = sweep.right(SIX, OTHER, path=bucket), files.files_at(bucket)
        assert {name.rpartition("-")[0] for name in inner.list("bnjax/parts")} == {
            *found.attrs["identity"][""]
        }
        with xr.open_zarr(inner.store, consolidated=False) as opened:
            xr.testing.assert_equal(opened.load(), found)

    def test_a_folder_of_zarr_is_a_folder(self, sweep):
        sweep.right(FEW, path=zarr.storage.LocalStore(sweep.path))
        assert sweep.load().sizes["seed"] == 2

    def test_stores_that_cannot_put_once_are_refused(self, sweep):
        for other in (zarr.storage.MemoryStore(), zarr.storage.FsspecStore.from_url("memory://r.zarr")):
            sweep.refused(r"give its URL, or obstore\.store\.from_url\(URL\)", path=other)

    def test_a_url_needs_obstore(self, sweep, monkeypatch):
        monkeypatch.setitem(sys.modules, "obstore.store", None)
        with pytest.raises(ImportError, match=r"pip install 'bnjax\[cloud\]'"):
            sweep(path="s3://bucket/r.zarr")

    @pytest.mark.parametrize("kind", ["folder", "bucket", "memory"])
    def test_files_are_put_once(self, tmp_path, kind):
        folder, bucket = files.Folder(tmp_path), files.Bucket(obstore.store.MemoryStore(), "bucket")
        place = {"folder": folder, "bucket": bucket, "memory": files.Memory()}[kind]
        place.make("a/b")
        assert place.get("a/b/c") is None
        assert [place.create("a/b/c", data) for data in (b"1", b"2")] == [True, False]
        assert place.get("a/b/c") == b"1"
        assert place.create("a/b/d", b"3")
        assert place.list("a") == ["b/c", "b/d"]
        for _ in range(2):
            place.delete("a/b/c")
        assert place.list("a/b") == ["d"]


class TestReadMeanwhile:
    """Something happens once, while the reader has listed what there is and not read it."""

    def read(self, monkeypatch, path, number, before, after):
        """What `load_results` finds if it is so before and after its n-th listing."""
        whole, count = files.Folder.list, [0]

        def listed(*args):
            count[0] += 1
            if count[0] != number:
                return whole(*args)
            monkeypatch.setattr(files.Folder, "list", whole)
            before()
            found = whole(*args)
            after()
            return found

        monkeypatch.setattr(files.Folder, "list", listed)
        found = bnjax.load_results(path)
        assert files.Folder.list is whole
        return found

    # Some listings before it reads, some while it does, and some after.
    @pytest.mark.parametrize("number", range(1, 7))
    @pytest.mark.parametrize("what", ["moved", "extended", "overwritten", "begun again", "saved by others"])
    def test_finds_one_or_the_other_whole(self, sweep, monkeypatch, tmp_path, number, what):
        first = sweep(FEW, export=False)
        shutil.copytree(sweep.path, tmp_path / "first")

        def begun_again():
            shutil.rmtree(sweep.path)
            sweep.killed(1, SIX, OTHER)

        happens = {
            "moved": lambda: sweep.path.rename(tmp_path / ".r.zarr.replaced"),  # as by `save_results`
            "extended": lambda: sweep(MORE),
            "overwritten": lambda: sweep(FEW, OTHER, overwrite=True),
            "begun again": begun_again,
            "saved by others": lambda: bnjax.save_results(first * 0, sweep.path, overwrite=True),
        }[what]
        for happening in ((happens, lambda: None), (lambda: None, happens)):
            found = self.read(monkeypatch, sweep.path, number, *happening)
            assert found.identical(sweep.load()) or (number == 6 and found.identical(first))
            assert not found.identical(first) or what == "moved" or number == 6
            for path in (sweep.path, tmp_path / ".r.zarr.replaced"):
                shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(tmp_path / "first", sweep.path)

    @pytest.mark.parametrize("number", range(1, 7))
    def test_away_and_back(self, sweep, monkeypatch, tmp_path, number):
        first, aside = sweep(FEW, export=False), tmp_path / "aside"
        moves = (lambda: sweep.path.rename(aside), lambda: aside.rename(sweep.path))
        assert self.read(monkeypatch, sweep.path, number, *moves).identical(first)

    @pytest.mark.parametrize("number", range(1, 5))
    def test_removed(self, sweep, monkeypatch, number):
        sweep(FEW)
        with pytest.raises(FileNotFoundError, match="no results at"):
            self.read(monkeypatch, sweep.path, number, lambda: None, lambda: shutil.rmtree(sweep.path))

    @pytest.mark.parametrize("n", [5, 9])
    def test_saved_again_by_others(self, tmp_path, monkeypatch, n):
        """Between the variables' names and their values; of the same shape, and of another."""
        whole, path = xr.open_zarr, tmp_path / "r"
        first, second = (
            xr.Dataset({name: ("i", np.full(n, value)) for name in "abc"})
            for n, value in ((5, 1.0), (n, 2.0))
        )
        bnjax.save_results(first, path)

        def late(*args, **options):
            monkeypatch.setattr(xr, "open_zarr", whole)
            found = whole(*args, **options)
            bnjax.save_results(second, path, overwrite=True)
            return found

        monkeypatch.setattr(xr, "open_zarr", late)
        assert bnjax.load_results(path).identical(second)


class TestStatus:
    def test_says_what_is_done(self, sweep, capsys):
        sweep(FEW, network())
        sweep.killed(
            4, SIX, {"a": MODEL, "b": OTHER}, method="save_state", checkpoint_minutes=0, overwrite=True
        )
        bnjax.__main__.main(["status", str(sweep.path)])
        out, err = capsys.readouterr()
        assert err == ""
        *lines, writer = out.splitlines()
        assert lines == [
            str(sweep.path),
            "  a: 6 of 6 cells done",
            "  b: 4 of 6 cells done",
            "  1 groups of cells half way",
        ]
        last = f"  nobody on this host is writing there; last written by process {os.getpid()} on"
        assert writer.startswith(last)
        with files.Folder(sweep.path).writing():
            assert f"process {os.getpid()} on" in bnjax.status(sweep.path).writer
        parts = [f"bnjax/parts/{name}" for name in sweep.kept("parts")]
        for part in parts:
            (sweep.path / part).write_text("broken")
        damaged = bnjax.status(sweep.path).damaged
        assert len(damaged) == 3  # of what overwrites
        assert {*damaged} < {*parts}

    def test_of_no_results_of_a_sweep(self, tmp_path, capsys):
        bnjax.save_results(xr.Dataset({"a": 1.0}), tmp_path / "saved")
        for path in (tmp_path / "saved", tmp_path / "nothing"):
            with pytest.raises(SystemExit) as exit_:
                bnjax.__main__.main(["status", str(path)])
            assert exit_.value.code == f"error: {path} holds no results of a sweep"  # to stderr; status 1
            assert capsys.readouterr().out == ""


class TestLayout:
    def test_round_trip(self):
        axes = grid.check({"init_scale": (0.1, 3.0), "seed": (2**31 - 1, 0)}, bnjax.Hyperparams())
        further = {"step": (1, 2), "layer": ("a", "b")}
        variables = {
            "loss": layout.Variable(("step", "layer"), "float32", {"long_name": "loss"}),
            "n": layout.Variable((), "int32", {}),
        }
        attributes = {"hyper": {"momentum": 0.5}, "about": {"text": "ä", "number": 1e-300}}
        written = layout.Layout({"m": ("a.1", "b.1")}, True, axes, further, variables, attributes)
        found = layout.Layout.from_bytes(written.to_bytes())
        assert found.to_bytes() == written.to_bytes()
        xr.testing.assert_identical(layout.View(found).dataset(), layout.View(written).dataset())
        assert found.hyper == bnjax.Hyperparams(momentum=0.5)

    def test_positions(self):
        """The inverse of `cells`, whatever the axes' order and that of their values; in float32, as they are used."""
        hyper = bnjax.Hyperparams(momentum=0.3)
        axes = grid.check({"seed": (5, 1, 3), "init_scale": (0.1, 10.0, 0.7, 1 / 3)}, hyper)
        cells = grid.cells(axes, hyper)
        np.testing.assert_array_equal(grid.positions(axes, hyper, cells), np.arange(12))
        other = grid.check({"init_scale": np.float32([0.7, 1 / 3, 0.1]).tolist(), "seed": (3, 4, 5)}, hyper)
        found, theirs = grid.positions(other, hyper, cells), grid.cells(other, hyper)
        for place, *cell in zip(found, cells.seed, cells.init_scale, strict=True):
            expected = cell if cell[0] in (3, 5) and cell[1] != 10 else None
            assert expected == (None if place < 0 else [theirs.seed[place], theirs.init_scale[place]])

        cells = grid.cells(grid.check({"seed": (0, 1, 3), "momentum": (0.3, 0.8)}, hyper), hyper)
        assert grid.positions({"seed": np.asarray((1, 2))}, hyper, cells).tolist() == [-1, -1, 0, -1, -1, -1]


class TestEarlierFormat:
    @pytest.fixture(params=["whole", "half"])
    def path(self, request, tmp_path):
        zipfile.ZipFile(GOLDEN).extractall(tmp_path)
        return tmp_path / f"{request.param}.zarr"

    def test_is_read_and_not_continued(self, sweep, path):
        expected, found = json.loads(path.with_suffix(".json").read_text()), bnjax.load_results(path)
        xr.testing.assert_identical(found, xr.Dataset.from_dict(expected).astype(found.dtypes))
        assert ("done" in found) == (path.stem == "half")
        sweep.refused("was saved at once, or by an earlier version", FEW, path=path)

    def test_damage_is_noticed(self, path):
        """In every file; but what no cell counts in may change."""
        first, noticed = bnjax.load_results(path), set()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            whole = file.read_bytes()
            broken = bytes([whole[0] ^ 1]) + whole[1:] if path.stem == "whole" else whole[: len(whole) // 2]
            file.write_bytes(broken)
            try:
                assert bnjax.load_results(path).identical(first), file
            except bnjax.export.Damaged:
                noticed.add(file.relative_to(path).parts[0])
            file.write_bytes(whole)
        assert {"zarr.json", "test_loss", "diverged_step", "seed", "bnjax"} <= noticed

    def test_what_is_whole_and_of_something_else_is_noticed(self, path):
        """Other attributes, and values of another place."""
        text, chunks = (path / "zarr.json").read_text(), path / "test_loss" / "c" / "0" / "0"
        (path / "zarr.json").write_text(text.replace('"batch_size": 8', '"batch_size": 9'))
        with pytest.raises(bnjax.export.Damaged, match="the attributes are not what was stored"):
            bnjax.load_results(path)
        (path / "zarr.json").write_text(text)
        shutil.copy(path / "train_loss" / "c" / "0" / "0" / "0" / "0", chunks / "0" / "0")
        with pytest.raises(bnjax.export.Damaged, match=r"chunk 0\.0 is not what was stored"):
            bnjax.load_results(path)

    @pytest.mark.parametrize("activation", ["relu", "sigmoid"])
    def test_of_the_repository(self, activation):
        found = bnjax.load_results(Path(__file__).parents[1] / "docs" / "results" / f"{activation}.zarr")
        assert np.isfinite(found.test_accuracy).all()
        assert not {"layout", "checksum", "done"} & {*found.attrs, *found}


class TestNarrowed:
    """A network of which no cell is done turns out not to fit: only its own part of the record changes."""

    @pytest.fixture
    def too_little(self, monkeypatch):
        def needed(trainer):
            if trainer.width > 1:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return 0

        return lambda: monkeypatch.setattr(program, "memory_needed", needed)

    def test_others_cells_and_changes_stay(self, sweep, too_little):
        """Those of a second identity, too."""
        options = {"width": None, "allow_changed": ["config"], "probe": None}
        sweep({"seed": range(4)}, {"a": MODEL}, width=2, probe=None)
        before = sweep({"seed": range(6)}, {"a": MODEL}, config=OTHER_CONFIG, **options | {"width": 2})
        too_little()
        models = {"a": MODEL, "z": bnjax.mlp((8, 8), 4, norm="none")}
        found = sweep({"seed": range(6)}, models, config=OTHER_CONFIG, **options)
        assert "done" not in found
        assert found.attrs["changes"] == before.attrs["changes"]
        assert [plan["width"] for plan in found.attrs["plan"].values()] == [2, 1]
        xr.testing.assert_equal(found.sel(model=["a"]), before)

    def test_what_is_overwritten_stands_until_it_is_complete(self, sweep, too_little):
        first = sweep({"seed": range(4)}, width=2, probe=None)
        too_little()
        options = {"config": OTHER_CONFIG, "overwrite": True, "width": None, "probe": None}
        assert sweep.killed(1, {"seed": range(4)}, **options)
        xr.testing.assert_identical(sweep.load(), first)


def test_parts_of_another_network_are_not_removed_when_the_record_is_damaged(sweep):
    both = {"a": MODEL, "b": bnjax.mlp((8, 8), 4, norm="none")}
    first = sweep({"seed": range(2)}, both, probe=None)
    (record,) = (sweep.path / store.LOG).iterdir()
    record.write_bytes(b"damaged")
    with pytest.raises(store.Damaged, match="bnjax/log/"):
        sweep({"seed": range(2)}, {"a": MODEL}, probe=None)
    xr.testing.assert_identical(sweep({"seed": range(2)}, both, probe=None), first)


def test_two_names_of_one_network_are_continued(sweep):
    first = sweep({"seed": range(2)}, {"a": MODEL, "b": MODEL}, probe=None)
    xr.testing.assert_identical(sweep({"seed": range(2)}, {"a": MODEL, "b": MODEL}, probe=None), first)


def test_what_a_record_knows_is_not_lost_with_a_damaged_one_beside_it(sweep):
    """The cells of a second identity, and what was changed."""
    sweep(FEW, probe=None)
    first = sweep(FEW, config=OTHER_CONFIG, allow_changed=["config"])
    record = max((sweep.path / store.LOG).iterdir())
    record.with_name("00000099").write_bytes(b"damaged")
    sweep.trained.clear()
    xr.testing.assert_identical(sweep(FEW, config=OTHER_CONFIG), first)
    assert sweep.trained == []
    xr.testing.assert_identical(sweep.load(), first)


def test_a_network_that_takes_no_two_examples_in_training(sweep):
    """As one that normalizes groups of 16."""

    def apply(params, batch_stats, x, *, train):
        x = x.reshape(-1, 16, x.shape[-1]) if train else x[None]
        x = bnjax.batch_norm.normalize(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return x.reshape(-1, x.shape[-1]) @ params, batch_stats

    ghost = bnjax.Model(lambda key, shape, scale: (jax.random.normal(key, (*shape, 4)) * scale, ()), apply)
    assert "done" not in sweep(FEW, ghost)


def test_a_width_that_does_not_fit_is_not_recorded(sweep, monkeypatch):
    first = sweep(FEW)
    monkeypatch.setattr(program, "memory_needed", lambda trainer: 2**50 if trainer.width > 2 else 0)
    with pytest.raises(MemoryError, match="width 8 on"):
        sweep(MORE, width=8, allow_changed=["plan"])
    xr.testing.assert_identical(sweep(FEW), first)


def test_identities_with_a_segment_are_read(sweep):
    """As records and parts once had them."""
    first = sweep(FEW)
    folder = files.Folder(sweep.path)
    (identity,), (record,) = sweep.identities(), sweep.kept("log")
    one = layout.Layout.from_bytes(folder.get(f"bnjax/log/{record}"))
    for name in sweep.kept("parts"):
        _, cells, values = store.unpack(name, folder.get(f"bnjax/parts/{name}"))
        data = store.pack(f"{identity}.2", cells, values, compress=True)
        folder.delete(f"bnjax/parts/{name}")
        folder.create(f"bnjax/parts/{identity}.2-{layout.digest(data)}", data)
    one = dataclasses.replace(one, models={"": (f"{identity}.2",)})
    folder.put(f"bnjax/log/{record}", one.to_bytes())
    xr.testing.assert_equal(sweep.load(), first)
    sweep.refused("computes", MORE)
    sweep.trained.clear()
    xr.testing.assert_equal(sweep(MORE, allow_changed=["models"]).sel(seed=first.seed), first)
    assert len(sweep.trained) == 1


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_something_odd_in_the_place_of_a_record(sweep, make):
    place = sweep.path / store.LOG / "00000001"
    place.parent.mkdir(parents=True)
    make(place)
    with pytest.raises(OSError, match=r"bnjax/log/00000001 cannot be put: .* something odd is there"):
        sweep(FEW)


def test_segments_are_those_of_the_width(sweep, monkeypatch):
    """Of a stored one, and of one that has become narrower."""
    seen, whole = [], program.run_group

    def noted(trainer, *args):
        seen.append((trainer.width, trainer.segment))
        return whole(trainer, *args)

    monkeypatch.setattr(program, "run_group", noted)
    monkeypatch.setattr(program, "segment_of", lambda model, ds, config, width, device, extra: 16 // width)
    sweep(FEW, segment=None)
    sweep(MORE, width=None, segment=None)
    monkeypatch.setattr(program, "memory_needed", lambda trainer: 2**50 if trainer.width > 1 else 0)
    sweep(FEW, width=None, segment=None, path=sweep.path.with_name("narrow"))
    assert {*seen} == {(2, 8), (1, 16)}


def test_a_network_is_compiled_once(sweep, caplog):
    """Its `start` and its `advance`, whatever the segments, the evaluations and the check of the memory."""
    with jax.log_compiles(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = bnjax.mlp((7,), 4)
        sweep(MORE, model, path=None, segment=3, config=bnjax.TrainConfig(10, 32, eval_every=4))
    assert sum("Finished XLA compilation of jit(on_one_device)" in line for line in caplog.messages) == 2


def test_a_width_that_was_changed_is_kept(sweep):
    sweep({"seed": range(2)}, width=2, probe=None)
    changed = sweep({"seed": range(4)}, width=4, allow_changed=["plan"], probe=None)
    xr.testing.assert_identical(sweep({"seed": range(4)}, width=None, probe=None), changed)


def test_a_width_that_was_asked_for_is_kept_when_something_else_changes(sweep):
    """Not that of the network's size, which is 16."""
    sweep({"seed": range(2)}, width=4, probe=None)
    allow = ["config"]
    changed = sweep({"seed": range(4)}, config=OTHER_CONFIG, width=None, allow_changed=allow, probe=None)
    assert changed.attrs["plan"][""]["width"] == 4
    assert len(changed.attrs["identity"][""]) == 2


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"data": 3}, "what JSON holds"),
        ({"plan": 1, "mine": 2}, r"must not have \['plan'\]"),
        ({"mine": {1}}, "what JSON holds: .* set"),
    ],
)
def test_odd_attributes_are_refused(sweep, about, words):
    sweep.refused(words, about=about)
    assert not sweep.path.exists()


def test_states_are_saved_by_the_time_that_the_devices_take(sweep, monkeypatch):
    """A minute for each of 4 pieces, whose calls return at once; a state is due after 2."""
    clock, states, whole = [0.0], [], store.Store.save_state

    def waited(value):
        clock[0] += 60
        return value

    monkeypatch.setattr(jax, "block_until_ready", waited)
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(store.Store, "save_state", lambda *args: states.append(clock[0]) or whole(*args))
    sweep({"seed": range(4)}, segment=1, checkpoint_minutes=2, probe=None)
    assert states == [120.0]


def test_a_temporary_file_that_another_run_took_for_a_dead_ones(tmp_path, monkeypatch):
    """Is written again, once."""
    folder, link, taken = files.Folder(tmp_path / "r"), os.link, []

    def late(temporary, path):
        if not taken:
            taken.append(temporary)
            files.Folder(tmp_path / "r").make("a")
        link(temporary, path)

    folder.make("a")
    monkeypatch.setattr(os, "link", late)
    assert folder.create("a/b", b"1")
    assert (folder.get("a/b"), folder.list(), len(taken)) == (b"1", ["a/b"], 1)


def test_a_larger_grid_that_has_begun_in_its_place_is_left_alone(sweep, monkeypatch):
    """At a run's last step, and in a record of the same name."""
    whole, states = store.Store.finished, []

    def late(self):
        monkeypatch.setattr(store.Store, "finished", whole)
        shutil.rmtree(sweep.path)
        assert sweep.killed(1, MORE, method="save_state", checkpoint_minutes=0)
        states.extend(sweep.kept("states"))
        return whole(self)

    monkeypatch.setattr(store.Store, "finished", late)
    assert "done" not in sweep(FEW)
    assert sweep.kept("states") == states != []
    assert sweep.load().seed.values.tolist() == [3, 2, 1]


def test_a_store_of_zarr_is_not_overwritten_silently(tmp_path):
    results = xr.Dataset({"a": ("x", [1.0])})
    for place in (zarr.storage.LocalStore(tmp_path / "r.zarr"), zarr.storage.MemoryStore()):
        bnjax.save_results(results, place)
        with pytest.raises(FileExistsError):
            bnjax.save_results(results + 1, place)
        with contextlib.closing(xr.open_zarr(place, consolidated=False)) as opened:
            xr.testing.assert_identical(opened.load(), results)
        bnjax.save_results(results, place, overwrite=True)
