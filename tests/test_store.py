"""Sweeps that last: committed chunk by chunk, stopped and continued, extended, and by one writer only."""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import pytest
import xarray as xr
import zarr

import bnjax
from bnjax.sweeps import exchange, leases, plan, program, record, run, storage, store
from bnjax.training import pieces

MODEL = bnjax.mlp((8, 8), 4)
CONFIG = bnjax.TrainConfig(steps=11, batch_size=32, eval_every=4)
AXES = MappingProxyType({"seed": range(3), "init_scale": (0.1, 1.0, 10.0), "learning_rate": (0.1, 1e30)})
PROBE = bnjax.probes.weights(MODEL, (12,))


@pytest.fixture
def sweep(blobs, tmp_path, monkeypatch):
    """At width 2, chunks of one group, segments of 3 steps, with a probe; at tmp_path/r.zarr unless told."""
    monkeypatch.setattr(plan, "GROUPS", 1)

    def call(axes=AXES, model=MODEL, config=CONFIG, ds=blobs, **options):
        given = {"width": 2, "segment": 3, "probe": PROBE, "progress": False, "path": tmp_path / "r.zarr"}
        return bnjax.sweep(model, ds, config, axes, **given | options)

    return call


class Died(BaseException):
    """Not an error: nothing in the package catches it."""


def dying(monkeypatch, method, times):
    """Lets that method of a store do its work, and die after the given number of calls."""
    whole, left = getattr(store.Store, method), [times]

    def call(self, *args):
        whole(self, *args)
        left[0] -= 1
        if left[0] == 0:
            raise Died

    monkeypatch.setattr(store.Store, method, call)


class TestPieces:
    @pytest.mark.parametrize("every", [None, 1, 4, 5, 11, 12])
    @pytest.mark.parametrize("segment", [None, 1, 2, 4, 5, 9, 11, 20])
    def test_are_the_run(self, every, segment):
        config = bnjax.TrainConfig(steps=11, eval_every=every)
        first, evaluated = 0, []
        for start, steps, evaluations in pieces(config, segment):
            assert start == first
            assert 1 <= steps <= (segment or 11)
            evaluated += [start + steps * (i + 1) // evaluations for i in range(evaluations)]
            first += steps
        assert first == 11
        assert tuple(evaluated) == config.eval_steps

    def test_are_few(self):
        assert pieces(CONFIG) == [(0, 8, 2), (8, 3, 1)]


class TestResume:
    @pytest.mark.slow
    def test_is_the_same_in_memory_and_on_disk(self, sweep):
        xr.testing.assert_equal(sweep(), sweep(path=None))

    @pytest.mark.slow
    def test_segments_change_nothing_but_rounding(self, sweep):
        """11 steps amplify 1e-7 to less than 1e-4; an angle near 0 is the root of a rounding error."""
        one, other = sweep(), sweep(path=None, segment=None)
        xr.testing.assert_allclose(one.drop_vars("angle"), other.drop_vars("angle"), rtol=1e-4)
        np.testing.assert_allclose(one.angle, other.angle, rtol=1e-4, atol=0.1)

    @pytest.mark.parametrize(
        ("method", "times"),
        [("save_checkpoint", 2), *(pytest.param("commit", n, marks=pytest.mark.slow) for n in (1, 4))],
    )
    def test_ends_as_if_it_had_never_stopped(self, sweep, monkeypatch, method, times):
        with monkeypatch.context() as patch:
            dying(patch, method, times)
            with pytest.raises(Died):
                sweep(checkpoint_minutes=0)
        xr.testing.assert_equal(sweep(checkpoint_minutes=0), sweep(path=None))

    @pytest.mark.slow
    def test_dies_at_every_checkpoint_on_changing_devices(self, sweep, monkeypatch):
        deaths = 0
        while True:
            with monkeypatch.context() as patch, contextlib.suppress(Died):
                dying(patch, "save_checkpoint", 2)
                found = sweep(checkpoint_minutes=0, devices=jax.devices()[: 1 + deaths % 2])
                break
            deaths += 1
        assert deaths > 5
        xr.testing.assert_equal(found, sweep(path=None))

    def test_what_is_done_is_not_trained_again(self, sweep, monkeypatch):
        first = sweep()
        monkeypatch.setattr(run, "train_chunk", lambda *_, **__: pytest.fail("trained again"))
        xr.testing.assert_identical(sweep(), first)

    def test_width_and_segment_are_those_of_the_results(self, sweep):
        first = sweep()
        assert sweep(width=None, segment=None).attrs["plan"] == first.attrs["plan"]

    def test_half_done_results_say_what_is_done(self, sweep, monkeypatch, tmp_path):
        with monkeypatch.context() as patch:
            dying(patch, "commit", 2)
            with pytest.raises(Died):
                sweep()
        found = bnjax.load_results(tmp_path / "r.zarr")
        whole = sweep(path=None)
        assert found.done.values.ravel().tolist() == [True] * 6 + [False] * 12
        assert (found.test_loss.where(found.done) == whole.test_loss).sum() == 6 * 3
        assert found.test_loss.where(~found.done).isnull().all()
        with pytest.raises(KeyError):
            whole["done"]

    def test_that_begins_while_it_is_read(self, sweep, monkeypatch, tmp_path):
        """The reader finds nothing; then the writer writes all but a ledger entry; then the reader goes on."""
        path, first = tmp_path / "r.zarr", store.read_layout

        def late(files):
            found = first(files)
            monkeypatch.setattr(store, "read_layout", first)
            with monkeypatch.context() as patch:
                patch.setattr(store, "digest", dies)
                with pytest.raises(Died):
                    sweep()
            return found

        def dies(values):
            raise Died

        monkeypatch.setattr(store, "read_layout", late)
        found = bnjax.load_results(path)
        assert not found.done.any()
        assert (found.diverged_step == -1).all()
        assert found.attrs == bnjax.load_results(path).attrs

    def test_a_user_may_read_it_with_xarray_alone(self, sweep, tmp_path):
        found = sweep()
        with xr.open_zarr(tmp_path / "r.zarr", consolidated=False) as opened:
            assert opened.done.all()
            xr.testing.assert_equal(opened.drop_vars("done").load(), found)

    def test_any_store_of_zarr(self, sweep):
        memory = zarr.storage.MemoryStore()
        xr.testing.assert_equal(sweep(path=memory), sweep(path=None))
        xr.testing.assert_equal(bnjax.load_results(memory), sweep(path=memory))

    @pytest.mark.slow
    def test_several_models(self, sweep):
        models = {"a": MODEL, "b": bnjax.mlp((8, 8), 4, norm="none")}
        options = {"model": models, "probe": None, "segment": None}
        xr.testing.assert_equal(
            sweep({"seed": range(3)}, **options), sweep({"seed": range(3)}, **options, path=None)
        )


class TestReadMeanwhile:
    """Something happens once, before or after the reader has looked what there is."""

    @pytest.fixture
    def once(self, monkeypatch):
        def call(action, where="read_layout", before=False):
            whole, module = (
                (store.xr.open_zarr, store.xr) if where == "open_zarr" else (store.read_layout, store)
            )

            def changed(*args, **options):
                monkeypatch.setattr(module, where, whole)
                if before:
                    action()
                found = whole(*args, **options)
                if not before:
                    action()
                return found

            monkeypatch.setattr(module, where, changed)

        return call

    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("what", ["moved away", "another saved", "begun again"])
    def test_finds_one_or_the_other_whole(self, sweep, once, tmp_path, what, before):
        path, aside = tmp_path / "r.zarr", tmp_path / "aside"
        one, other = sweep({"seed": (1, 2)}), sweep({"seed": (3,)}, path=None)

        def begun_again():
            path.rename(aside)
            sweep({"seed": (1, 2)}, config=dataclasses.replace(CONFIG, data_seed=1))

        once(
            {
                "moved away": lambda: path.rename(exchange.replaced(path)),
                "another saved": lambda: store.save(other, path, overwrite=True),
                "begun again": begun_again,
            }[what],
            before=before,
        )
        found = bnjax.load_results(path)
        assert found.identical(
            {"moved away": one, "another saved": other}.get(what, bnjax.load_results(path))
        )
        assert not found.equals(one) or what == "moved away"

    def test_away_and_back(self, sweep, once, monkeypatch, tmp_path):
        """While the ledger is listed, as a run with --overwrite does that fails."""
        path, aside = tmp_path / "r.zarr", tmp_path / "aside"
        one, whole = sweep({"seed": (1, 2)}), storage.Files.list

        def without(*args):
            monkeypatch.setattr(storage.Files, "list", whole)
            found = whole(*args)
            aside.rename(path)
            return found

        def away():
            path.rename(aside)
            monkeypatch.setattr(storage.Files, "list", without)

        once(away)
        assert bnjax.load_results(path).identical(one)

    def test_removed(self, sweep, once, tmp_path):
        sweep({"seed": (1,)})
        once(lambda: shutil.rmtree(tmp_path / "r.zarr"))
        with pytest.raises(FileNotFoundError, match="no results at"):
            bnjax.load_results(tmp_path / "r.zarr")

    def test_extended_to_what_has_no_chunk_yet(self, sweep, once, monkeypatch, tmp_path):
        """The two cells that are done are a part of the new grid's only chunk: in its checkpoint."""
        monkeypatch.setattr(plan, "GROUPS", 100)
        sweep({"seed": (1, 2)})

        def extended():
            with monkeypatch.context() as patch:
                patch.setattr(store.Store, "commit", dies)
                with pytest.raises(Died):
                    sweep({"seed": (1, 2, 3)})

        def dies(*args):
            raise Died

        once(extended)
        assert bnjax.load_results(tmp_path / "r.zarr").sizes["seed"] == 3

    def test_saved_results_by_others(self, once, tmp_path):
        """Between the variables' names and their values; of another shape, and of the same."""
        for n in (5, 9, 9):
            results = xr.Dataset({name: ("i", np.full(n, float(n))) for name in "abc"}, attrs={"n": n})
            if n > 5:
                once(lambda results=results: store.save(results, tmp_path / "r", overwrite=True), "open_zarr")
                assert bnjax.load_results(tmp_path / "r").identical(results)
            store.save(results, tmp_path / "r", overwrite=True)

    def test_begun_and_removed(self, sweep, monkeypatch, once, tmp_path):
        """What was read had no ledger then; it is not taken for results that were saved at once."""
        path = tmp_path / "r.zarr"
        open_zarr = xr.open_zarr

        def opened(*args, **options):
            found = open_zarr(*args, **options).load()
            shutil.rmtree(path)
            return found

        once(lambda: sweep({"seed": (1, 2)}))
        monkeypatch.setattr(store.xr, "open_zarr", opened)
        with pytest.raises(FileNotFoundError, match="no results at"):
            bnjax.load_results(path)


def test_what_xarray_opened_may_be_saved(sweep, tmp_path):
    found = sweep({"seed": (1, 2)})
    with xr.open_zarr(tmp_path / "r.zarr", consolidated=False) as opened:
        store.save(opened.load(), tmp_path / "s.zarr")
    assert bnjax.load_results(tmp_path / "s.zarr").drop_vars("done").equals(found)


def test_another_format_of_zarr_is_not_read(sweep, tmp_path):
    sweep({"seed": (1,)})
    found = xr.open_zarr(tmp_path / "r.zarr", consolidated=False).load()
    found.drop_encoding().to_zarr(tmp_path / "v2.zarr", zarr_format=2, consolidated=False)
    with pytest.raises(FileNotFoundError, match="no results at"):
        bnjax.load_results(tmp_path / "v2.zarr")


def test_saved_attributes_may_have_any_name(tmp_path):
    results = xr.Dataset({"a": 1.0}, attrs={"layout": "NHWC", "models": {"": {"layout": "NHWC"}}})
    store.save(results, tmp_path / "r.zarr")
    assert bnjax.load_results(tmp_path / "r.zarr").identical(results)


class TestExtension:
    LARGER = MappingProxyType(
        {"init_scale": (10.0, 0.1, 0.5, 1.0), "learning_rate": (1e30, 0.1), "seed": (7, 0, 2, 1)}
    )

    def test_keeps_what_is_done(self, sweep, monkeypatch):
        sweep()
        trained = []

        def seen(*args, **options):
            trained.extend(zip(*(a.tolist() for a in args[3][:2]), strict=True))
            return whole(*args, **options)

        whole = program.run_group
        with monkeypatch.context() as patch:
            patch.setattr(program, "run_group", seen)
            found = sweep(self.LARGER)
        new = {(s, np.float32(i)) for s in (7, 0, 1, 2) for i in (0.1, 0.5, 1.0, 10.0) if s == 7 or i == 0.5}
        assert {*trained} == new
        xr.testing.assert_equal(found, sweep(self.LARGER, path=None))

    def test_of_what_is_half_done(self, sweep, monkeypatch):
        with monkeypatch.context() as patch:
            dying(patch, "commit", 2)
            with pytest.raises(Died):
                sweep()
        xr.testing.assert_equal(sweep(self.LARGER), sweep(self.LARGER, path=None))

    def test_with_an_axis_more(self, sweep):
        sweep({"seed": range(3)})
        axes = {"momentum": (0.5, 0.9), "seed": range(4)}
        xr.testing.assert_equal(sweep(axes), sweep(axes, path=None))

    def test_never_loses_a_cell(self, sweep):
        first = sweep()
        with pytest.raises(
            ValueError, match=r"12 of the cells there are not among those asked for.*Choose another"
        ):
            sweep({"seed": [0]} | {k: v for k, v in AXES.items() if k != "seed"})
        xr.testing.assert_identical(sweep(), first)

    def test_that_was_cut_off_while_folders_were_swapped(self, sweep, tmp_path):
        first = sweep()
        (tmp_path / "r.zarr").rename(tmp_path / ".r.zarr.replaced")
        xr.testing.assert_identical(bnjax.load_results(tmp_path / "r.zarr"), first)
        xr.testing.assert_identical(sweep(), first)

    def test_that_was_cut_off_and_another_run_came_then(self, sweep, tmp_path):
        """Who looks for a writer makes the folder anew."""
        first = sweep()
        (tmp_path / "r.zarr").rename(tmp_path / ".r.zarr.replaced")
        with leases.lease(storage.Files(tmp_path / "r.zarr")), pytest.raises(leases.Busy):
            sweep()
        xr.testing.assert_identical(sweep(), first)
        assert [p.name for p in tmp_path.iterdir()] == ["r.zarr"]

    def test_that_was_cut_off_and_another_run_went_meanwhile(self, sweep, tmp_path, monkeypatch):
        """It was there when this one looked for results, and not when it looked for a writer."""
        first = sweep()
        (tmp_path / "r.zarr").rename(tmp_path / ".r.zarr.replaced")
        with contextlib.ExitStack() as other:
            other.enter_context(leases.lease(storage.Files(tmp_path / "r.zarr")))

            def late(ds):
                other.close()
                return record.fingerprint(ds)

            monkeypatch.setattr(run, "fingerprint", late)
            with pytest.raises(leases.Busy, match="or was a moment ago"):
                sweep()
        xr.testing.assert_identical(bnjax.load_results(tmp_path / "r.zarr"), first)
        xr.testing.assert_identical(sweep(), first)

    def test_that_fails_while_folders_are_swapped(self, sweep, tmp_path, monkeypatch):
        first = sweep({"seed": (1, 2)})
        whole = Path.rename

        def refused(path, target):
            if path.name == ".r.zarr.extended":
                raise OSError("refused")
            return whole(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", refused)
            with pytest.raises(OSError, match="refused"):
                sweep({"seed": (1, 2, 3)})
        xr.testing.assert_identical(bnjax.load_results(tmp_path / "r.zarr"), first)
        xr.testing.assert_equal(sweep({"seed": (1, 2, 3)}), sweep({"seed": (1, 2, 3)}, path=None))

    @pytest.mark.parametrize("seeds", [(1, 2), (1, 2, 3)])
    def test_by_another_run_meanwhile(self, sweep, tmp_path, monkeypatch, seeds):
        """After the results were read, and before the lease was taken."""
        sweep({"seed": (1, 2)})
        whole = run._continued

        def late(*args):
            monkeypatch.setattr(run, "_continued", whole)
            sweep({"seed": (0, 1, 2)})
            return whole(*args)

        monkeypatch.setattr(run, "_continued", late)
        with pytest.raises(leases.Busy, match="another run is writing there, or was a moment ago"):
            sweep({"seed": seeds})
        found = bnjax.load_results(tmp_path / "r.zarr")
        xr.testing.assert_equal(found, sweep({"seed": (0, 1, 2)}, path=None))


class TestChanges:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                {"config": bnjax.TrainConfig(steps=11, batch_size=16, eval_every=4)},
                "config.batch_size: 32 there, 16",
            ),
            ({"model": bnjax.mlp((8, 8), 4, epsilon=0.1)}, "models..epsilon: 1e-05 there, 0.1 asked for"),
            ({"width": 4}, r"plan..width: 2 there, 4 asked for.*allow_changed=plan"),
        ],
    )
    def test_are_refused_and_named(self, sweep, change, words):
        first = sweep()
        with pytest.raises(ValueError, match=words):
            sweep(**change)
        xr.testing.assert_identical(sweep(), first)

    def test_of_a_network_that_its_config_does_not_tell(self, sweep):
        """As of a Flax module of the same name with another body; the same function, defined again, is the same."""

        def network(activation):
            return bnjax.mlp((8, 8), 4, activation)._replace(config={"class": "Net"})

        first = sweep({"seed": (1, 2)}, model=network("relu"))
        for axes in ({"seed": (1, 2)}, {"seed": (1, 2, 3)}):
            with pytest.raises(
                ValueError, match=r"computes\.: \w+ there, \w+ asked for.*allow_changed=models"
            ):
                sweep(axes, model=network("sigmoid"))
        xr.testing.assert_identical(sweep({"seed": (1, 2)}, model=network("relu")), first)

    def test_a_file_in_the_place(self, sweep, tmp_path):
        (tmp_path / "r.zarr").touch()
        with pytest.raises(ValueError, match=r"r\.zarr is a file: choose a new folder"):
            sweep()

    def test_of_data(self, sweep, blobs):
        first = sweep()
        with pytest.raises(ValueError, match=r"data.fingerprint: \w+ there, \w+ asked for"):
            sweep(ds=blobs._replace(train_x=blobs.train_x + 1))
        xr.testing.assert_identical(sweep(), first)

    def test_of_versions_may_be_allowed_and_are_recorded(self, sweep, monkeypatch):
        sweep({"seed": range(3)})
        versions = record.versions() | {"jaxlib": "0.0.1"}
        monkeypatch.setattr(record, "versions", lambda: versions)
        with pytest.raises(
            ValueError, match=r"versions.jaxlib: .* there, 0.0.1 asked for.*allow_changed=versions"
        ):
            sweep({"seed": range(4)})
        found = sweep({"seed": range(4)}, allow_changed=["versions"])
        assert found.attrs["changes"] == [[f"versions.jaxlib: {jax.lib.__version__} there, 0.0.1 asked for"]]

    def test_that_make_no_sense(self, sweep):
        with pytest.raises(ValueError, match=r"unknown allowed change 'version'.*did you mean 'versions'"):
            sweep(allow_changed=["version"])


class TestOneWriter:
    def test_a_second_is_told_who_writes(self, sweep, tmp_path):
        with (
            leases.lease(storage.Files(tmp_path / "r.zarr")),
            pytest.raises(leases.Busy, match=f"process {os.getpid()} on"),
        ):
            sweep()
        sweep()

    def test_of_another_share_may_write_beside(self, tmp_path):
        files = storage.Files(tmp_path / "r.zarr")
        with leases.lease(files, 0, 2), leases.lease(files, 1, 2):
            assert len(leases.writers(files)) == 2
            with pytest.raises(leases.Busy):
                leases.lease(files, 0, 3).__enter__()
        assert leases.writers(files) == []

    @pytest.mark.parametrize(
        ("change", "alive"),
        [
            ({"pid": 2**22 + 1}, False),  # above Linux's largest
            ({"born": "1"}, False),  # the number belongs to another process now
            ({"host": "elsewhere", "confirmed": time.time() + 3600}, True),
            ({"host": "elsewhere", "confirmed": time.time() - leases.LEASE_SECONDS - 1}, False),
        ],
    )
    def test_the_dead_do_not_hold_it(self, sweep, tmp_path, change, alive):
        files = storage.Files(tmp_path / "r.zarr")
        key = f"{leases.LEASE}/0-of-1"
        with leases.lease(files):
            mine = json.loads(files.get(key))
        files.put(key, json.dumps(mine | {"id": "other"} | change).encode())
        if alive:
            with pytest.raises(leases.Busy, match="on elsewhere"):
                sweep()
        else:
            sweep()
            assert files.list(leases.LEASE) == []

    def test_is_confirmed_while_it_lasts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(leases, "CONFIRM_SECONDS", 0.05)
        files = storage.Files(tmp_path / "r.zarr")
        with leases.lease(files):
            first = leases.writers(files)[0]["confirmed"]
            until = time.monotonic() + 10
            while leases.writers(files)[0]["confirmed"] == first and time.monotonic() < until:
                time.sleep(0.05)
            assert leases.writers(files)[0]["confirmed"] > first
        assert threading.active_count() < 50

    def test_is_dead_if_it_was_given_up_and_could_not_be_deleted(self, sweep, tmp_path):
        files = storage.Files(tmp_path / "r.zarr")
        key = f"{leases.LEASE}/0-of-1"
        with leases.lease(files):
            mine = files.get(key)
        files.put(key, mine)
        assert leases.writers(files) == []
        sweep()

    def test_is_given_up_if_its_thread_cannot_start(self, sweep, tmp_path, monkeypatch):
        def refused(self):
            raise RuntimeError("can't start new thread")

        files = storage.Files(tmp_path / "r.zarr")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            with pytest.raises(RuntimeError, match="new thread"), leases.lease(files):
                pass
        assert files.list(leases.LEASE) == []

    def test_is_not_confirmed_after_it_was_given_up(self, tmp_path, monkeypatch):
        monkeypatch.setattr(leases, "CONFIRM_SECONDS", 0)
        files = storage.Files(tmp_path / "r.zarr")
        for _ in range(50):
            with leases.lease(files) as rest:
                time.sleep(0.002)
                rest()
                (before,) = leases.writers(files)
                time.sleep(0.002)
                assert leases.writers(files) == [before]
            with leases.lease(files):
                time.sleep(0.002)
            assert files.list(leases.LEASE) == []


class TestLayout:
    @pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 5)])
    @pytest.mark.parametrize("cells", [1, 2, 4, 7, 100])
    def test_chunks_are_all_cells_in_order(self, shape, cells):
        axes = {f"a{i}": np.arange(n) for i, n in enumerate(shape)}
        layout = store.Layout(("",), False, axes, {}, {}, store.tile_of(shape, cells), {})
        chunks = layout.chunks()
        assert [i for chunk in chunks for i in chunk.cells] == list(range(int(np.prod(shape))))
        numbers = np.arange(int(np.prod(shape))).reshape(shape)
        for chunk in chunks:
            assert len(chunk.cells) <= cells
            np.testing.assert_array_equal(numbers[chunk.region].ravel(), list(chunk.cells))


@pytest.mark.parametrize("name", ["thesis.tex", "thesis.partial"])
def test_a_place_with_other_things_is_not_touched(sweep, tmp_path, name):
    other = tmp_path / "r.zarr" / name
    other.parent.mkdir()
    other.write_text("mine")
    with pytest.raises(ValueError, match="is not empty, and holds no results of a sweep"):
        sweep()
    assert other.read_text() == "mine"


def test_a_file_of_another_program_among_the_results_is_left(sweep, tmp_path):
    sweep()
    other = tmp_path / "r.zarr" / "thesis.partial"
    other.write_text("mine")
    sweep()
    assert other.read_text() == "mine"
