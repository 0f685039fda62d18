"""Where a sweep is stored, and who reads it: its export, buckets, readers meanwhile, the status, earlier formats."""

import contextlib
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import obstore.store
import pytest
import xarray as xr
import zarr
from stored import AXES, FEW, GOLDEN, ITS_PROBE, MODEL, MORE, NETWORK, OTHER, PROBE, SIX

import bnjax
import bnjax.__main__
from bnjax.sweeps import files, grid, layout, store


class TestExport:
    def test_is_what_xarray_opens_and_may_be_saved_again(self, sweep, tmp_path):
        found, opened = sweep.given(AXES, {"a": MODEL}, probe=PROBE), sweep.opened()
        xr.testing.assert_identical(opened, found)
        bnjax.save_results(opened, tmp_path / "s.zarr")
        xr.testing.assert_identical(bnjax.load_results(tmp_path / "s.zarr"), found)

    def test_follows_an_extension(self, sweep):
        sweep.given(FEW)
        before = (sweep.path / "zarr.json").stat().st_mtime_ns
        sweep(FEW)
        assert (sweep.path / "zarr.json").stat().st_mtime_ns == before  # nothing was written
        xr.testing.assert_identical(sweep(MORE), sweep.opened())

    @pytest.mark.parametrize("axes", [FEW, MORE])
    def test_is_none_unless_it_is_asked_for(self, sweep, axes):
        """One that stands there, of the same or of less, is removed."""
        sweep.given(FEW, export=False)
        assert os.listdir(sweep.path) == ["bnjax"]
        sweep(FEW)
        assert "test_loss" in os.listdir(sweep.path)
        sweep.right(axes, export=False)
        assert os.listdir(sweep.path) == ["bnjax"]

    def test_left_out_and_asked_for_again(self, sweep, caplog):
        sweep.given(FEW)
        for export in (False, True):
            sweep(FEW, export=export)
        xr.testing.assert_identical(sweep.opened(), sweep.load())
        assert caplog.messages == []

    @pytest.mark.filterwarnings("ignore:Object at .* is not recognized")
    def test_is_nothing_that_results_rest_on(self, sweep):
        found = sweep.given(FEW)
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
        assert {name.rpartition("-")[0] for name in inner.list("bnjax/parts")} == {*found.attrs["identity"][""]}
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
        aside, then = tmp_path / ".r.zarr.replaced", tmp_path / "then" / "r.zarr"  # aside, as by `save_results`
        first = sweep.given(FEW, export=False)
        if what == "extended":
            sweep.given(FEW, path=then)
            sweep(MORE, path=then)
        elif what == "overwritten":
            sweep.given(FEW, OTHER, path=then)
            for name in sweep.kept("log"):
                (then / "bnjax" / "log" / name).rename(then / "bnjax" / "log" / "00000002")
        elif what == "begun again":
            sweep.killed(1, SIX, OTHER, path=then)
        elif what == "saved by others":
            bnjax.save_results(first * 0, then)

        def happens():
            sweep.path.rename(aside)
            if what != "moved":
                shutil.rmtree(aside)
                shutil.copytree(then, sweep.path)

        for happening in ((happens, lambda: None), (lambda: None, happens)):
            found = self.read(monkeypatch, sweep.path, number, *happening)
            assert found.identical(sweep.load()) or (number == 6 and found.identical(first))
            assert not found.identical(first) or what == "moved" or number == 6
            for path in (sweep.path, aside):
                shutil.rmtree(path, ignore_errors=True)
            sweep.given(FEW, export=False)

    @pytest.mark.parametrize("number", range(1, 7))
    def test_away_and_back(self, sweep, monkeypatch, tmp_path, number):
        first, aside = sweep.given(FEW, export=False), tmp_path / "aside"
        moves = (lambda: sweep.path.rename(aside), lambda: aside.rename(sweep.path))
        assert self.read(monkeypatch, sweep.path, number, *moves).identical(first)

    @pytest.mark.parametrize("number", range(1, 5))
    def test_removed(self, sweep, monkeypatch, number):
        sweep.given(FEW)
        with pytest.raises(FileNotFoundError, match="no results at"):
            self.read(monkeypatch, sweep.path, number, lambda: None, lambda: shutil.rmtree(sweep.path))

    @pytest.mark.parametrize("n", [5, 9])
    def test_saved_again_by_others(self, tmp_path, monkeypatch, n):
        """Between the variables' names and their values; of the same shape, and of another."""
        whole, path = xr.open_zarr, tmp_path / "r"
        first, second = (
            xr.Dataset({name: ("i", np.full(n, value)) for name in "abc"}) for n, value in ((5, 1.0), (n, 2.0))
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
        sweep.given(FEW, NETWORK, probe=ITS_PROBE)
        sweep.killed(4, SIX, {"a": MODEL, "b": OTHER}, method="save_state", checkpoint_minutes=0, overwrite=True)
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
        found = bnjax.load_results(Path(__file__).parents[2] / "docs" / "results" / f"{activation}.zarr")
        assert np.isfinite(found.test_accuracy).all()
        assert not {"layout", "checksum", "done"} & {*found.attrs, *found}


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_something_odd_in_the_place_of_a_record(sweep, make):
    place = sweep.path / store.LOG / "00000001"
    place.parent.mkdir(parents=True)
    make(place)
    with pytest.raises(OSError, match=r"bnjax/log/00000001 cannot be put: .* something odd is there"):
        sweep(FEW)


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


@pytest.mark.filterwarnings("error")
def test_texts_are_of_any_length(tmp_path):
    """Numpy's, of a fixed length, which Zarr v3 does not specify, are stored as those of any."""
    names = xr.Dataset({"phase": ("network", ["ordered", "chaotic"])}, {"network": ["a", "long"]})
    bnjax.save_results(names, tmp_path / "names.zarr")
    loaded = bnjax.load_results(tmp_path / "names.zarr")
    xr.testing.assert_equal(loaded, names)
    assert "network" in loaded.coords
