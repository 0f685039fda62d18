"""Plans that are measured, kept, and narrowed where memory does not suffice."""

import dataclasses
import functools
import json
from types import MappingProxyType

import jax
import pytest

import bnjax
from bnjax.sweeps import measure, plan
from bnjax.training import make_run

MODEL = bnjax.mlp((8,), 4, norm="none")
CONFIG = bnjax.TrainConfig(steps=6, batch_size=16)
AXES = {"seed": range(5)}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bnjax" / "plans"


run_of = functools.lru_cache(lambda init, apply, config: make_run(bnjax.Model(init, apply), config))


@pytest.fixture(autouse=True)
def started_once(monkeypatch):
    """One function for all measurements of a network, which compile it once, then."""
    monkeypatch.setattr(measure, "make_run", lambda model, config: run_of(model.init, model.apply, config))


@pytest.fixture
def by_size(blobs):
    return plan.make_plan(MODEL, blobs, CONFIG)


def landscape(monkeypatch, speeds):
    """Programs whose speed is known: {width: cell-steps per second}."""
    tried = []

    def steps_at(model, ds, config, plan, one):
        if plan.width not in speeds:
            return None
        tried.append(plan.width)
        return lambda: speeds[plan.width]

    monkeypatch.setattr(measure, "_steps_at", steps_at)
    return tried


class TestMeasured:
    @pytest.mark.slow
    def test_on_the_real_program_and_kept(self, blobs, by_size, cache):
        found = measure.measured(MODEL, blobs, CONFIG, by_size, seconds=0.0)
        assert len(found.measured) == 2  # no time for more
        assert all(speed > 0 for speed in found.measured.values())
        assert found.width in found.measured
        assert measure.kept(MODEL, blobs, CONFIG, by_size) == found
        assert len(list(cache.iterdir())) == 1

    @pytest.mark.parametrize("start", [1, 4, 16])
    @pytest.mark.parametrize("best", [1, 2, 8, 32])
    def test_climbs_to_the_best_width(self, monkeypatch, blobs, by_size, start, best):
        speeds = {2**k: 100.0 * 0.7 ** abs(k - best.bit_length() + 1) for k in range(8)}
        tried = landscape(monkeypatch, speeds)
        found = measure.measured(MODEL, blobs, CONFIG, by_size._replace(width=start))
        assert found.width == best
        assert found.measured == {width: float(f"{speeds[width]:.4g}") for width in sorted(tried)}

    @pytest.mark.parametrize(
        ("speeds", "start", "best"),
        [
            ({1: 100, 2: 95, 4: 130}, 1, 4),  # behind one that is a little slower
            ({1: 130, 2: 86, 4: 100}, 4, 1),
            ({1: 100, 2: 84, 4: 130}, 1, 1),  # not behind one that is much slower
            ({2: 90, 4: 100, 8: 110, 16: 120}, 4, 16),
        ],
    )
    def test_goes_on_until_it_is_much_slower(self, monkeypatch, blobs, by_size, speeds, start, best):
        landscape(monkeypatch, speeds)
        assert measure.measured(MODEL, blobs, CONFIG, by_size._replace(width=start)).width == best

    def test_noise_does_not_widen(self, monkeypatch, blobs, by_size):
        landscape(monkeypatch, {1: 100.0, 2: 105.0, 4: 106.5})
        assert measure.measured(MODEL, blobs, CONFIG, by_size._replace(width=2)).width == 2

    def test_a_width_that_was_lucky_once_is_not_taken(self, monkeypatch, blobs, by_size):
        """Whatever the rounds in which it is first compared say, the last ones decide."""
        calls = []

        def steps_at(model, ds, config, plan, one):
            def run():
                calls.append(plan.width)
                lucky = plan.width == 8 and calls.count(8) <= measure.FIRST_ROUNDS
                return 130.0 if lucky else {1: 100.0, 2: 90.0, 4: 91.0, 8: 80.0}[plan.width]

            return run if plan.width <= 8 else None

        monkeypatch.setattr(measure, "_steps_at", steps_at)
        found = measure.measured(MODEL, blobs, CONFIG, by_size._replace(width=1))
        assert found.width == 1
        assert found.measured == {1: 100.0, 2: 90.0, 4: 91.0, 8: 80.0}

    def test_a_width_without_memory_is_not_taken(self, monkeypatch, blobs, by_size):
        landscape(monkeypatch, {4: 1.0, 2: 0.5})
        assert measure.measured(MODEL, blobs, CONFIG, by_size._replace(width=4)).width == 4

    def test_segments_take_a_minute(self, monkeypatch, blobs, by_size):
        landscape(monkeypatch, dict.fromkeys((1, 2, 4), 50.0))
        long = dataclasses.replace(CONFIG, steps=10**6)
        found = measure.measured(MODEL, blobs, long, by_size._replace(width=2))
        seconds = found.segment * found.group / 50
        assert plan.SEGMENT_SECONDS / 2 < seconds <= plan.SEGMENT_SECONDS

    @pytest.mark.slow
    def test_a_network_that_diverges_at_once_is_not_measured(self, blobs, by_size, cache):
        huge = MODEL._replace(init=lambda *a: jax.tree.map(lambda v: v * 1e30, MODEL.init(*a)))
        assert measure.measured(huge, blobs, CONFIG, by_size) == by_size
        assert not cache.exists()

    def test_nor_one_that_does_not_fit(self, monkeypatch, blobs, by_size):
        landscape(monkeypatch, {})
        assert measure.measured(MODEL, blobs, CONFIG, by_size) == by_size


class TestKept:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            '{"width": 0, "segment": 1, "measured": {}}',
            '{"width": 2}',
            '{"width": "a", "segment": 1, "measured": {}}',
            '{"width": 2, "segment": 1, "measured": {}}',
            '{"width": 2, "segment": 1, "measured": {"4": 5.0}}',
            '{"width": 2, "segment": 1, "measured": {"2": 0.0}}',
            '{"width": 2, "segment": 1, "measured": {"0": 1.0, "2": 1.0}}',
        ],
    )
    def test_what_cannot_be_read_is_none(self, monkeypatch, blobs, by_size, cache, text):
        landscape(monkeypatch, {by_size.width: 1.0})
        measure.measured(MODEL, blobs, CONFIG, by_size)
        (file,) = cache.iterdir()
        file.write_text(text)
        assert measure.kept(MODEL, blobs, CONFIG, by_size) is None

    def test_for_its_own_kind_alone(self, monkeypatch, blobs, by_size):
        landscape(monkeypatch, {by_size.width: 1.0})
        measure.measured(MODEL, blobs, CONFIG, by_size)
        assert measure.kept(MODEL, blobs, dataclasses.replace(CONFIG, steps=9), by_size) is not None
        assert measure.kept(MODEL, blobs, dataclasses.replace(CONFIG, batch_size=8), by_size) is None
        assert measure.kept(bnjax.mlp((9,), 4, norm="none"), blobs, CONFIG, by_size) is None
        assert measure.kept(MODEL, blobs, CONFIG, by_size._replace(devices=by_size.devices[:1])) is None

    def test_networks_are_told_apart_by_what_they_compute(self, monkeypatch, blobs, by_size):
        landscape(monkeypatch, {by_size.width: 1.0})
        mine = MODEL._replace(config={})
        measure.measured(mine, blobs, CONFIG, by_size)
        again = bnjax.mlp((8,), 4, norm="none")._replace(config={})
        assert measure.kept(again, blobs, CONFIG, by_size) is not None
        other = bnjax.mlp((8,), 4, "sigmoid", norm="none")._replace(config={})
        assert measure.kept(other, blobs, CONFIG, by_size) is None

    def test_a_folder_that_cannot_be_written_is_none(self, monkeypatch, blobs, by_size, cache):
        landscape(monkeypatch, {by_size.width: 1.0})
        cache.parent.mkdir(parents=True)
        cache.write_text("a file where the folder should be")
        assert measure.measured(MODEL, blobs, CONFIG, by_size).width == by_size.width


class TestChosen:
    def test_ways(self, monkeypatch, blobs, by_size):
        other = by_size._replace(width=64)
        monkeypatch.setattr(measure, "measured", lambda *a: other)
        assert measure.chosen(MODEL, blobs, CONFIG, by_size, 100, "auto") == by_size
        assert measure.chosen(MODEL, blobs, CONFIG, by_size, 100, "measure") == other
        assert measure.chosen(MODEL, blobs, CONFIG, by_size, 10**12, "auto") == other
        assert measure.chosen(MODEL, blobs, CONFIG, by_size, 10**12, "size") == by_size
        monkeypatch.setattr(measure, "kept", lambda *a: other)
        assert measure.chosen(MODEL, blobs, CONFIG, by_size, 100, "auto") == other

    def test_a_place_that_is_taken_is_refused_before(self, monkeypatch, blobs, tmp_path):
        tried = landscape(monkeypatch, {2**k: 1.0 for k in range(6)})
        (tmp_path / "notes.txt").touch()
        with pytest.raises(ValueError, match="is not empty"):
            bnjax.sweep(MODEL, blobs, CONFIG, AXES, plan="measure", path=tmp_path, progress=False)
        assert not tried

    def test_a_sweep_says_and_keeps_what_it_used(self, monkeypatch, blobs, tmp_path):
        landscape(monkeypatch, {1: 1.0, 2: 4.0, 4: 5.0, 8: 3.0, 16: 2.0, 32: 1.0})
        path = tmp_path / "results.zarr"
        results = bnjax.sweep(MODEL, blobs, CONFIG, AXES, plan="measure", path=path, progress=False)
        (stored,) = results.attrs["plan"].values()
        assert stored["width"] == 4
        assert stored["measured"] == {"2": 4.0, "4": 5.0, "8": 3.0, "16": 2.0, "32": 1.0}
        assert "width 4 on 2 devices" in plan.in_words(stored)
        assert json.dumps(stored)
        larger = bnjax.sweep(MODEL, blobs, CONFIG, {"seed": range(9)}, plan="size", path=path, progress=False)
        assert larger.attrs["plan"] == results.attrs["plan"]

    def test_an_unknown_way(self, blobs):
        with pytest.raises(ValueError, match="unknown plan 'fast'"):
            bnjax.sweep(MODEL, blobs, CONFIG, AXES, plan="fast")


class TestForCells:
    SPEEDS = MappingProxyType({1: 50.0, 2: 60.0, 4: 80.0, 8: 100.0, 16: 90.0})

    @pytest.mark.parametrize(
        ("cells", "width"),
        # On two devices 3 cells are 2 groups at width 1 (4 / 50 s), and one at width 2 (4 / 60 s).
        [(1, 1), (2, 1), (3, 2), (5, 4), (8, 4), (9, 8), (16, 8), (17, 4), (32, 8), (10**6, 8)],
    )
    def test_groups_that_are_half_empty_cost_as_much(self, by_size, cells, width):
        measured = by_size._replace(width=8, measured=self.SPEEDS)
        fastest = min(
            (w for w in self.SPEEDS if w <= 8), key=lambda w: -(-cells // (2 * w)) * 2 * w / self.SPEEDS[w]
        )
        assert measure.for_cells(measured, cells).width == width == fastest

    def test_many_cells_take_the_width_that_was_found(self, monkeypatch, blobs, by_size):
        """A width is not given up twice for another within the margin."""
        landscape(monkeypatch, {2: 60.0, 4: 99.0, 8: 100.0, 16: 101.5})
        found = measure.measured(MODEL, blobs, CONFIG, by_size._replace(width=8))
        assert found.width == measure.for_cells(found, 10**6).width == 8

    def test_and_so_a_small_sweep_is_narrower(self, monkeypatch, blobs):
        landscape(monkeypatch, {1: 50.0, 2: 60.0, 4: 80.0, 8: 100.0, 16: 90.0, 32: 50.0})
        for cells, width in ((2, 4), (5, 4), (100, 8)):  # 2 and 1 are not tried behind 4
            results = bnjax.sweep(
                MODEL, blobs, CONFIG, {"seed": range(cells)}, plan="measure", progress=False
            )
            (stored,) = results.attrs["plan"].values()
            assert stored["width"] == width
            assert (f"suits {cells} cells best" in plan.in_words(stored)) == (width < 8)


class TestMemory:
    def sweep(self, blobs, **options):
        return bnjax.sweep(MODEL, blobs, CONFIG, AXES, progress=False, **options)

    def limit(self, monkeypatch, blobs, width):
        """Memory for that width, and no wider one."""
        tight = plan.make_plan(MODEL, blobs, CONFIG, width=width)
        programs = measure.program.programs_of(MODEL, CONFIG, tight, None)
        needed = measure.program.memory_needed(programs, blobs, CONFIG, tight)
        monkeypatch.setattr(measure, "_memory", lambda devices: needed)

    @pytest.mark.slow
    def test_counts_what_the_program_takes(self, blobs, by_size):
        def needed(config, width):
            wide = plan.make_plan(MODEL, blobs, config, width=width, segment=3)
            programs = measure.program.programs_of(MODEL, config, wide, None)
            return measure.program.memory_needed(programs, blobs, config, wide)

        data = sum(a.nbytes for a in blobs)
        for steps in (3, 6):  # a program for whole runs, and one for segments
            config = dataclasses.replace(CONFIG, steps=steps)
            assert 2 * data < needed(config, 1) < needed(config, 64)

    def test_a_narrower_plan_is_recorded(self, monkeypatch, blobs, tmp_path):
        expected = self.sweep(blobs, width=4)
        self.limit(monkeypatch, blobs, 4)
        results = self.sweep(blobs, path=tmp_path / "results.zarr")
        (stored,) = results.attrs["plan"].values()
        assert stored["width"] == 4
        assert "width 8 needs" in stored["narrowed"]
        assert results.drop_attrs().equals(expected.drop_attrs())
        again = bnjax.load_results(tmp_path / "results.zarr")
        assert again.identical(results)

    @pytest.mark.slow
    def test_never_in_the_place_of_what_was_asked_for(self, monkeypatch, blobs):
        self.limit(monkeypatch, blobs, 4)
        with pytest.raises(MemoryError, match=r"width 8 on 2 devices needs .* GiB of memory, and there are"):
            self.sweep(blobs, width=8)

    @pytest.mark.slow
    def test_never_half_way(self, monkeypatch, blobs, tmp_path):
        path = tmp_path / "results.zarr"
        results = self.sweep(blobs, path=path, width=8)
        self.limit(monkeypatch, blobs, 4)
        with pytest.raises(MemoryError, match="width 8"):
            bnjax.sweep(MODEL, blobs, CONFIG, {"seed": range(50)}, path=path, progress=False)
        monkeypatch.undo()
        larger = bnjax.sweep(MODEL, blobs, CONFIG, {"seed": range(50)}, path=path, progress=False)
        assert larger.sel(seed=results.seed).equals(results)

    def test_the_compiler_may_run_out_of_it(self, monkeypatch, blobs):
        expected = self.sweep(blobs, width=4)
        whole = measure.program.memory_needed

        def memory_needed(programs, ds, config, plan):
            if plan.width > 4:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return whole(programs, ds, config, plan)

        monkeypatch.setattr(measure.program, "memory_needed", memory_needed)
        results = self.sweep(blobs)
        (stored,) = results.attrs["plan"].values()
        assert (stored["width"], stored["narrowed"]) == (
            4,
            "width 8 needs more memory than the compiler found",
        )
        assert results.drop_attrs().equals(expected.drop_attrs())

    def test_a_container_has_less(self, monkeypatch, tmp_path):
        limits = [tmp_path / name for name in ("absent", "none", "some")]
        limits[1].write_text("max\n")
        monkeypatch.setattr(measure, "CONTAINER_LIMITS", limits[:2])
        assert measure._memory(jax.devices()) > 2**27
        limits[2].write_text(f"{2**27}\n")
        monkeypatch.setattr(measure, "CONTAINER_LIMITS", limits)
        assert measure._memory(jax.devices()) == 2**27

    def test_one_network_is_too_large(self, monkeypatch, blobs):
        monkeypatch.setattr(measure, "_memory", lambda devices: 1000)
        with pytest.raises(MemoryError, match="width 1 on 2 devices needs"):
            self.sweep(blobs)
