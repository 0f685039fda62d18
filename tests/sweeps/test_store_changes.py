"""A stored sweep and another one: what is changed is refused, allowed and recorded, or overwrites."""

import dataclasses
import os
import zipfile
from importlib import metadata

import pytest
import xarray as xr
from stored import CONFIG, FEW, GOLDEN, ITS_PROBE, MODEL, MORE, NETWORK, OTHER, PROBE, SIX, Died, network, probe

import bnjax
from bnjax import training
from bnjax.sweeps import files, provenance, store

COMPUTES = r"computes\.: \w+\.2 there, \w+\.2 asked for.*allow_changed=models"


class TestChanges:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                {"config": dataclasses.replace(CONFIG, batch_size=16, optimizer="adam")},
                "config.batch_size: 32 there, 16 asked for; config.optimizer: sgd .*allow_changed=config",
            ),
            (
                {"config": dataclasses.replace(CONFIG, steps=6, eval_every=1)},
                "config.steps: 4 there, 6 asked for; config.eval_every: 2 there, 1 asked for; "
                r"layout.further.step: \[2, 4\] there.*Choose another place, or overwrite",
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
        first = sweep.given(FEW)
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
        first, model, its_probe = sweep.given(FEW, NETWORK, probe=ITS_PROBE), network(**change), probe(other)
        for axes in (FEW, MORE):
            sweep.refused(COMPUTES, axes, model, probe=its_probe)
        xr.testing.assert_identical(sweep(FEW, NETWORK, probe=ITS_PROBE), first)
        assert sweep.trained == []

    def test_of_words_alone_is_none(self, sweep):
        """The same functions, defined again, are the same: whatever the docstring and the place in the source."""
        first = sweep.given(FEW, NETWORK, probe=ITS_PROBE)
        again = network(doc='\n    """Documented."""', space="\n\n\n")
        xr.testing.assert_identical(sweep(FEW, again, probe=probe()), first)
        assert sweep.trained == []

    def test_of_the_loss(self, sweep, monkeypatch):
        """As by another version of this package, with what else it says of itself unchanged."""
        sweep.given(FEW, NETWORK, probe=ITS_PROBE)
        whole = training._loss_and_accuracy
        monkeypatch.setattr(training, "_loss_and_accuracy", lambda *args: [2 * value for value in whole(*args)])
        sweep.refused(COMPUTES, FEW, network(), probe=ITS_PROBE)

    def versions(self, monkeypatch, **others):
        """Other packages than those there."""
        found, version = provenance.versions() | others, metadata.version
        monkeypatch.setattr(provenance, "versions", lambda: found)
        monkeypatch.setattr(metadata, "version", lambda name: others.get(name) or version(name))

    def test_of_versions_may_be_allowed_and_are_recorded(self, sweep, monkeypatch):
        first, jaxlib = sweep.given(FEW), metadata.version("jaxlib")
        self.versions(monkeypatch, jaxlib="0.0.1")
        line = f"versions.jaxlib: {jaxlib} there, 0.0.1 asked for"
        for axes in (FEW, MORE):
            sweep.refused(rf"{line}\. Choose another place, overwrite, or allow_changed=versions", axes)
        found = sweep.right(MORE, allow_changed=["versions"])  # the cells of both
        assert len(sweep.trained) == 1
        assert found.attrs["changes"] == [[line]]
        new, old = found.attrs["identity"][""]
        assert [old] == first.attrs["identity"][""] != [new]
        assert found.attrs["versions"]["jaxlib"] == "0.0.1"
        xr.testing.assert_identical(sweep(MORE), found)  # what is recorded needs no leave any more

    def test_twice_are_recorded_twice(self, sweep):
        first, ds = sweep.given(FEW), sweep.other_ds
        sweep(MORE, ds=ds, allow_changed=["data"])
        found = sweep({"seed": range(5)}, ds=ds, width=1, allow_changed=["plan"])
        changes = [line.split(":")[0] for lines in found.attrs["changes"] for line in lines]
        assert changes == ["data.fingerprint", "plan..width"]
        assert len(found.attrs["identity"][""]) == 3
        assert found.test_loss.sel(seed=[1, 2]).equals(first.test_loss)

    def test_of_packages_that_compute_nothing_are_none(self, sweep, monkeypatch):
        first = sweep.given(FEW)
        self.versions(monkeypatch, xarray="1.0", bnjax="1.0", code="changed")
        xr.testing.assert_identical(sweep(FEW), first)
        found = sweep(MORE)
        assert len(sweep.trained) == 1
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
            sweep.given(FEW, OTHER)
        elif request.param == "half done":
            sweep.killed(1, SIX, OTHER)
        elif request.param == "saved":
            bnjax.save_results(sweep.reference(FEW, OTHER), sweep.path)
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
        first = sweep.given(FEW, OTHER)
        sweep.killed(1, SIX, overwrite=True)
        sweep.refused("holds other results", FEW, ds=sweep.other_ds)
        sweep.killed(1, SIX, ds=sweep.other_ds, overwrite=True)
        sweep.killed(1, {"seed": range(9)}, ds=sweep.other_ds)
        xr.testing.assert_identical(sweep.load(), first)
        assert len(sweep.kept("log")) == 2
        found = sweep.right({"seed": range(9)}, ds=sweep.other_ds)
        assert sweep.identities() == {*found.attrs["identity"][""]}

    def test_abandoned_for_what_stands(self, sweep):
        first = sweep.given(FEW, OTHER)
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
            words = "is not empty, and holds no results of a sweep" if name else "is a file: choose a new folder"
            sweep.refused(words, overwrite=overwrite)
            assert [p for p in sweep.path.parent.rglob("*") if p.is_file()] == [other]

    def test_what_stands_is_extended_beside_what_was_abandoned(self, sweep, monkeypatch):
        """And dies when it has removed one of the two records."""
        first, delete = sweep.given(FEW), files.Folder.delete
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
        bnjax.save_results(sweep.reference(FEW), sweep.path)
        whole = store.Store.finished
        monkeypatch.setattr(store.Store, "finished", lambda self: False)
        sweep(FEW, OTHER, overwrite=True)
        monkeypatch.setattr(store.Store, "finished", whole)
        assert sweep.killed(1, MORE, OTHER, method="save_state", checkpoint_minutes=0)
        assert sweep.load().done.values.tolist() == [False, True, True]

    def test_what_was_put_aside_is_not_forgotten(self, sweep):
        """By a `save_results` that was cut off between its two renames."""
        first = sweep.given(FEW)
        sweep.path.rename(bnjax.export.aside(sweep.path))
        sweep.refused(r"cut off: what it held is in .*\.r\.zarr\.replaced", FEW, overwrite=True)
        xr.testing.assert_identical(sweep.load(), first)


def test_parts_of_another_network_are_not_removed_when_the_record_is_damaged(sweep):
    both = {"a": MODEL, "b": OTHER}
    first = sweep.given(FEW, both)
    (record,) = (sweep.path / store.LOG).iterdir()
    record.write_bytes(b"damaged")
    with pytest.raises(store.Damaged, match="bnjax/log/"):
        sweep(FEW, {"a": MODEL})
    xr.testing.assert_identical(sweep(FEW, both), first)


def test_what_a_record_knows_is_not_lost_with_a_damaged_one_beside_it(sweep):
    """The cells of a second identity, and what was changed."""
    sweep.given(FEW)
    first = sweep(FEW, ds=sweep.other_ds, allow_changed=["data"])
    record = max((sweep.path / store.LOG).iterdir())
    record.with_name("00000099").write_bytes(b"damaged")
    sweep.trained.clear()
    xr.testing.assert_identical(sweep(FEW, ds=sweep.other_ds), first)
    assert sweep.trained == []
    xr.testing.assert_identical(sweep.load(), first)


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
