"""Plans: widths and segments by size, and narrower where memory does not suffice."""

import dataclasses
import itertools
import json
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax.sweeps import plan, program

MODEL = bnjax.mlp((8,), 4, norm="none")
CONFIG = bnjax.TrainConfig(steps=6, batch_size=16)
AXES = {"seed": range(5)}


def images(n=2):
    return bnjax.Dataset(*[np.zeros((n, 28, 28, 1), np.float32), np.zeros(n, np.int32)] * 2)


def trainer(ds, config=CONFIG, model=MODEL, **options):
    return program.trainers({"": model}, ds, config, {"": None}, **options)[""]


def sweep(ds, axes=AXES, **options):
    return bnjax.sweep(MODEL, ds, CONFIG, axes, progress=False, **options)


class TestBySize:
    # 3 times the parameters' bytes in 5 MiB, at most 16; or in 2 GiB, at most 256
    @pytest.mark.parametrize(
        ("features", "cpu", "gpu"),
        [((8,), 16, 256), ((100,) * 3, 4, 256), ((128,) * 3, 2, 256), ((512,) * 3, 1, 128), ((4096,) * 3, 1, 4)],
    )
    def test_widths(self, features, cpu, gpu):
        model, parameters = bnjax.mlp(features), 784 * features[0] + 10 * features[-1] + 10
        parameters += sum(a * b for a, b in itertools.pairwise(features)) + 2 * sum(features)
        for width, platform, room, most in ((cpu, "cpu", 5 * 2**20, 16), (gpu, "gpu", 2**31, 256)):
            device = mock.Mock(spec=jax.Device, platform=platform)
            assert plan.width_of(model, images(), device) == width
            assert width == 1 or width * 12 * parameters <= room
            assert width == most or 2 * width * 12 * parameters > room

    def test_of_a_convolutional_network(self):
        """Wherever the convolution is in its program."""
        kernel = jnp.ones((3, 3, 1, 4))

        def apply(params, batch_stats, x, *, train):
            x = jax.lax.scan(lambda y, _: (convolve(y), None), x.reshape(-1, 28, 28, 1), None, 2)[0]
            return x.reshape(len(x), -1) @ params, batch_stats

        @jax.jit
        def convolve(x):
            numbers = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
            return y.sum(-1, keepdims=True)

        model = bnjax.Model(lambda key, shape, scale: (jax.random.normal(key, (784, 10)) * scale, ()), apply)
        devices = [mock.Mock(spec=jax.Device, platform=platform) for platform in ("cpu", "gpu")]
        assert [plan.width_of(model, images(), device) for device in devices] == [1, 256]

    def test_devices(self, blobs):
        count = len(jax.local_devices())
        assert count > 1
        found = trainer(blobs, width=3)
        assert found.devices == tuple(jax.local_devices())
        assert (found.width, found.group) == (3, 3 * count)

    @pytest.mark.parametrize("width", [None, 1, 8])
    def test_segments_take_a_minute(self, width):
        """By the guess of the device's speed; the flops of a step are 6 for each parameter and example."""
        config = bnjax.TrainConfig(steps=10**9, batch_size=128)
        found = trainer(images(128), config, bnjax.mlp(use_bias=False), width=width)
        parameters = 784 * 128 + 2 * 128**2 + 128 * 10 + 10 + 6 * 128
        seconds = found.segment * found.width * 6 * parameters * 128 / plan.CPU_FLOPS
        assert 0.99 * plan.SEGMENT_SECONDS < seconds <= plan.SEGMENT_SECONDS

    def test_segments_of_long_steps(self):
        assert trainer(images(16), segment=4).segment == 4
        slow = dataclasses.replace(CONFIG, batch_size=10**9)
        assert plan.segment_of(bnjax.mlp(), images(), slow, 1, jax.devices()[0]) == 1

    def test_a_sweep_says_what_it_used(self, blobs):
        stored = sweep(blobs, width=4).attrs["plan"][""]
        assert json.loads(json.dumps(stored)) == {"width": 4, "devices": 2}

    def test_no_other_way_is_taken(self, blobs):
        with pytest.raises(ValueError, match=r"plan='measure' is no longer taken: .* width= sets another"):
            sweep(blobs, plan="measure")


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (3, [3]), (4, [4]), (9, [4, 4, 1])])
def test_groups(count, sizes):
    found = program.in_groups(np.arange(count), 4)
    assert [len(group) for group in found] == sizes
    assert [place for group in found for place in group] == list(range(count))


class TestFitting:
    @pytest.fixture
    def made(self, blobs, monkeypatch):
        monkeypatch.setattr(program, "memory", lambda devices: 2**30)
        return trainer(blobs, width=16)

    @pytest.mark.parametrize(("each", "width"), [(2**26, 16), (2**26 + 1, 8), (2**28, 4), (2**30, 1)])
    def test_the_widest_that_fits(self, made, monkeypatch, each, width):
        monkeypatch.setattr(program, "memory_needed", lambda trainer: trainer.width * each)
        found, needs = made.fitted(may_change=True), f"{2 * width * each / 2**30:.2f} GiB of memory"
        words = f"width {2 * width} on 2 devices needs {needs}, and there are 1.00 GiB"
        assert (found.width, found.narrowed) == (width, words if width < 16 else None)

    @pytest.mark.parametrize(
        ("each", "may_change", "words"),
        [
            (2**28, False, "width 16 on 2 devices needs 4.00 GiB of memory.* there are 1.00 GiB: use a smaller"),
            (2**31, True, "width 1 on 2 devices needs 2.00 GiB of memory, and there are 1.00 GiB$"),
        ],
    )
    def test_none_does(self, made, monkeypatch, each, may_change, words):
        monkeypatch.setattr(program, "memory_needed", lambda trainer: trainer.width * each)
        with pytest.raises(MemoryError, match=words):
            made.fitted(may_change=may_change)

    def test_other_errors_of_the_compiler_are_no_matter_of_memory(self, made, monkeypatch):
        def needed(trainer):
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

        monkeypatch.setattr(program, "memory_needed", needed)
        with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
            made.fitted(may_change=True)


class TestMemory:
    def limit(self, monkeypatch, blobs, width):
        """Memory for that width, and no wider one."""
        needed = program.memory_needed(trainer(blobs, width=width))
        monkeypatch.setattr(program, "memory", lambda devices: needed)

    @pytest.mark.slow
    def test_counts_what_the_program_takes(self, blobs):
        one, many = (program.memory_needed(trainer(blobs, width=width)) for width in (1, 64))
        assert 2 * sum(a.nbytes for a in blobs) < one < many

    def test_a_narrower_plan_is_recorded(self, monkeypatch, blobs, tmp_path):
        path = tmp_path / "results"
        self.limit(monkeypatch, blobs, 4)
        results = sweep(blobs, path=path)
        (stored,) = results.attrs["plan"].values()
        assert stored["width"] == 4
        assert "width 8 on 2 devices needs" in stored["narrowed"]
        assert bnjax.load_results(path).identical(results)
        assert results.drop_attrs().equals(sweep(blobs, width=4).drop_attrs())
        # another call goes on at the width that is there
        larger = sweep(blobs, {"seed": range(9)}, path=path)
        assert larger.attrs["plan"][""]["width"] == 4
        assert larger.sel(seed=results.seed).equals(results)

    @pytest.mark.slow
    def test_never_in_the_place_of_what_was_asked_for(self, monkeypatch, blobs):
        self.limit(monkeypatch, blobs, 4)
        with pytest.raises(MemoryError, match=r"width 8 on 2 devices needs .* GiB of memory, and there are"):
            sweep(blobs, width=8)

    @pytest.mark.slow
    def test_never_half_way(self, monkeypatch, blobs, tmp_path):
        path = tmp_path / "results"
        results = sweep(blobs, path=path, width=8)
        with monkeypatch.context() as patch:
            self.limit(patch, blobs, 4)
            with pytest.raises(MemoryError, match="width 8"):
                sweep(blobs, {"seed": range(50)}, path=path)
        larger = sweep(blobs, {"seed": range(50)}, path=path)
        assert larger.sel(seed=results.seed).equals(results)

    def test_the_compiler_may_run_out_of_it(self, monkeypatch, blobs):
        whole = program.memory_needed

        def memory_needed(trainer):
            if trainer.width > 4:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return whole(trainer)

        monkeypatch.setattr(program, "memory_needed", memory_needed)
        results = sweep(blobs)
        (stored,) = results.attrs["plan"].values()
        assert stored["width"] == 4
        assert stored["narrowed"] == "width 8 on 2 devices needs more memory than the compiler found"
        assert results.drop_attrs().equals(sweep(blobs, width=4).drop_attrs())

    def test_a_container_has_less(self, monkeypatch, tmp_path):
        limits = [tmp_path / name for name in ("absent", "none", "some")]
        limits[1].write_text("max\n")
        monkeypatch.setattr(plan, "CONTAINER_LIMITS", limits[:2])
        assert plan.memory(jax.devices()) > 2**27
        limits[2].write_text(f"{2**27}\n")
        monkeypatch.setattr(plan, "CONTAINER_LIMITS", limits)
        assert plan.memory(jax.devices()) == 2**27

    @pytest.mark.parametrize(("stats", "expected"), [({"bytes_limit": 5}, 10), ({}, math.inf), (None, math.inf)])
    def test_of_accelerators(self, stats, expected):
        device = mock.Mock(spec=jax.Device, platform="gpu")
        device.memory_stats.return_value = stats
        assert plan.memory((device, device)) == expected

    def test_one_network_is_too_large(self, monkeypatch, blobs):
        monkeypatch.setattr(program, "memory", lambda devices: 1000)
        with pytest.raises(MemoryError, match="width 1 on 2 devices needs"):
            sweep(blobs)
