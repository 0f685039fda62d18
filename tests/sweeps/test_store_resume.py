"""Sweeps that last: stopped and continued, extended, and at the width that they have."""

import dataclasses
import warnings
from types import MappingProxyType

import jax
import numpy as np
import pytest
import xarray as xr
from stored import AXES, FEW, MODEL, MORE, OTHER, OTHER_CONFIG, PROBE, SIX

import bnjax
from bnjax.sweeps import files, layout, program, run, store


class TestResume:
    def test_is_the_same_in_memory_and_on_disk(self, sweep):
        sweep.right(probe=PROBE)

    def test_segments_change_nothing_and_a_network_is_compiled_once(self, sweep, caplog):
        """Its `start` and its `advance`, whatever the segments, the evaluations and the check of the memory."""
        options = {"config": bnjax.TrainConfig(steps=11, batch_size=32, eval_every=4), "probe": PROBE}
        options["model"] = bnjax.mlp((8,), 4)  # as nobody has seen it
        with jax.log_compiles(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one, other = sweep(**options, segment=3), sweep(**options, path=None, segment=None)
        assert sum("Finished XLA compilation of jit(on_one_device)" in line for line in caplog.messages) == 2
        xr.testing.assert_equal(one, other)
        assert sweep.killed(2, method="save_state", checkpoint_minutes=0, path=sweep.path.with_name("s"), **options)
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
        first = sweep.given(AXES)
        xr.testing.assert_identical(sweep(), first)
        for axes in (AXES, {**AXES, "seed": range(4)}):
            assert sweep(axes, width=None, segment=None).attrs["plan"] == first.attrs["plan"]
        assert len(sweep.trained) == 6
        assert len(sweep.kept("log")) == 1

    def test_half_done_results_say_what_is_done(self, sweep):
        sweep.killed(2)
        found, whole = sweep.load(), sweep.reference(AXES)
        assert found.done.values.ravel().tolist() == [True] * 8 + [False] * 10
        assert found.test_loss.equals(whole.test_loss.where(found.done))
        assert found.diverged.equals(whole.diverged & found.done)
        assert found.diverged_step.equals(whole.diverged_step.where(found.done, -1))
        assert "done" not in whole


class TestExtension:
    LARGER = MappingProxyType({"init_scale": (10.0, 0.1, 0.5, 1.0), "learning_rate": (1e30, 0.1), "seed": (7, 0, 2, 1)})

    def test_keeps_what_is_done(self, sweep):
        sweep.given(AXES)
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
        sweep.given({"seed": range(3)})
        sweep.right({"momentum": (0.5, 0.9), "seed": range(4)})
        assert len(sweep.trained) == 5

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
        sweep.given(FEW, before)
        sweep.right(FEW, after)
        assert len(sweep.trained) == new

    @pytest.mark.parametrize(
        ("axes", "model", "count"),
        [
            ({**AXES, "seed": [0]}, {"a": MODEL}, 12),
            ({**AXES, "init_scale": (0.1, 10.0, 2.0)}, {"a": MODEL}, 6),
            (AXES, {"b": OTHER}, 18),
        ],
    )
    def test_never_loses_a_cell(self, sweep, axes, model, count):
        first = sweep.given(AXES, {"a": MODEL})
        words = rf"{count} of the cells there are not among those asked for.*Choose another place, or over"
        sweep.refused(words, axes, model, allow_changed=store.CHANGES)
        xr.testing.assert_identical(sweep(model={"a": MODEL}), first)


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
        sweep.given(FEW, {"a": MODEL})
        options = {"ds": sweep.other_ds, "allow_changed": ["data"]}
        before = sweep(MORE, {"a": MODEL}, **options)
        too_little()
        found = sweep(MORE, {"a": MODEL, "z": OTHER}, **options, width=None)
        assert "done" not in found
        assert found.attrs["changes"] == before.attrs["changes"]
        assert [plan["width"] for plan in found.attrs["plan"].values()] == [2, 1]
        xr.testing.assert_equal(found.sel(model=["a"]), before)

    def test_what_is_overwritten_stands_until_it_is_complete(self, sweep, too_little):
        first = sweep.given(SIX)
        too_little()
        assert sweep.killed(1, SIX, ds=sweep.other_ds, overwrite=True, width=None)
        xr.testing.assert_identical(sweep.load(), first)


def test_two_names_of_one_network_are_continued(sweep):
    first = sweep.given(FEW, {"a": MODEL, "b": MODEL})
    xr.testing.assert_identical(sweep(FEW, {"a": MODEL, "b": MODEL}), first)
    assert sweep.trained == []


def test_a_network_that_takes_no_two_examples_in_training(sweep):
    """As one that normalizes groups of 16."""

    def apply(params, batch_stats, x, *, train):
        x = x.reshape(-1, 16, x.shape[-1]) if train else x[None]
        x = bnjax.batch_norm.normalize(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return x.reshape(-1, x.shape[-1]) @ params, batch_stats

    ghost = bnjax.Model(lambda key, shape, scale: (jax.random.normal(key, (*shape, 4)) * scale, ()), apply)
    assert "done" not in sweep(FEW, ghost)


def test_a_width_that_does_not_fit_is_not_recorded(sweep, monkeypatch):
    first = sweep.given(FEW)
    monkeypatch.setattr(program, "memory_needed", lambda trainer: 2**50 if trainer.width > 2 else 0)
    with pytest.raises(MemoryError, match="width 8 on"):
        sweep(MORE, width=8, allow_changed=["plan"])
    xr.testing.assert_identical(sweep(FEW), first)


def test_identities_with_a_segment_are_read(sweep):
    """As records and parts once had them."""
    first = sweep.given(FEW)
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


def test_segments_are_those_of_the_width(sweep, monkeypatch):
    """Of a stored one, and of one that has become narrower."""
    seen, whole = [], program.run_group

    def noted(trainer, *args):
        seen.append((trainer.width, trainer.segment))
        return whole(trainer, *args)

    monkeypatch.setattr(program, "run_group", noted)
    monkeypatch.setattr(program, "segment_of", lambda model, ds, config, width, device, extra: 16 // width)
    sweep(FEW, path=None, segment=None)
    sweep.given(FEW)
    sweep(MORE, width=None, segment=None)
    monkeypatch.setattr(program, "memory_needed", lambda trainer: 2**50 if trainer.width > 1 else 0)
    sweep(FEW, width=None, segment=None, path=sweep.path.with_name("narrow"))
    assert {*seen} == {(2, 8), (1, 16)}


def test_a_width_that_was_changed_is_kept(sweep):
    sweep.given(FEW)
    changed = sweep(MORE, width=1, allow_changed=["plan"])
    xr.testing.assert_identical(sweep(MORE, width=None), changed)


def test_a_width_that_was_asked_for_is_kept_when_something_else_changes(sweep):
    """Not that of the network's size, which is 16."""
    sweep.given(FEW)
    changed = sweep(MORE, config=OTHER_CONFIG, width=None, allow_changed=["config"])
    assert changed.attrs["plan"][""]["width"] == 2
    assert len(changed.attrs["identity"][""]) == 2


def test_states_are_saved_by_the_time_that_the_devices_take(sweep, monkeypatch):
    """A minute for each of 4 pieces, whose calls return at once; a state is due after 2."""
    clock, states, whole = [0.0], [], store.Store.save_state

    def waited(value):
        clock[0] += 60
        return value

    monkeypatch.setattr(jax, "block_until_ready", waited)
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(store.Store, "save_state", lambda *args: states.append(clock[0]) or whole(*args))
    sweep({"seed": range(4)}, segment=1, checkpoint_minutes=2)
    assert states == [120.0]
