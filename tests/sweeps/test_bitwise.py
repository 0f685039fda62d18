"""What is the same to the last bit: a cell, whatever is trained beside it, and a run, whatever a probe measures.

Programs are compiled as users' are here: whether two give the same bits is up to the compiler.
"""

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import quick
import xarray as xr

import bnjax
from bnjax import compilation, probes
from bnjax.types import History

pytestmark = pytest.mark.usefixtures("as_users_compile")
MODEL = bnjax.mlp((8,), 4)
LINEAR = bnjax.mlp((8, 8), 4, norm="none", activation="linear")  # may diverge
SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)


def sweep(ds, model, seeds=range(7), scales=SCALES, width=4, probe=None, config=None, **options):
    config = bnjax.TrainConfig(**{"steps": 12, "batch_size": 32, "eval_every": 5} | (config or {}))
    hyper = bnjax.Hyperparams(learning_rate=0.02, weight_decay=1e-3)
    axes = {"seed": seeds, "init_scale": scales}
    return bnjax.sweep(model, ds, config, axes, hyper=hyper, width=width, probe=probe, progress=False, **options)


class TestACellIsBitwiseItself:
    """On CPU, at one width: whatever grid, order, neighbours and number of devices a cell is run with."""

    def check(self, found, reference):
        for name in History._fields:
            expected = reference[name].sel(seed=found.seed, init_scale=found.init_scale)
            np.testing.assert_array_equal(found[name].values, expected.values, err_msg=name)

    def test_some_cells_diverge_and_some_do_not(self, blobs):
        assert 0 < sweep(blobs, LINEAR).diverged.mean() < 1

    @pytest.mark.parametrize(("seed", "scale"), [(0, 0.01), (5, 1.0), (6, 100.0)])
    def test_alone(self, blobs, seed, scale):
        self.check(sweep(blobs, LINEAR, [seed], [scale]), sweep(blobs, LINEAR))

    def test_in_another_order(self, blobs):
        self.check(sweep(blobs, LINEAR, range(6, -1, -1), (10.0, 0.1, 1.0)), sweep(blobs, LINEAR))

    def test_in_another_grid(self, blobs):
        found = sweep(blobs, LINEAR, (*range(100, 105), 3, 1), (0.3, *SCALES))
        self.check(found.sel(seed=[3, 1], init_scale=list(SCALES)), sweep(blobs, LINEAR))

    @pytest.mark.parametrize("neighbour", [1e4, 1e30])
    def test_beside_a_diverging_cell(self, blobs, neighbour):
        found = sweep(blobs, LINEAR, [2], (1.0, neighbour))
        assert found.diverged.sel(init_scale=neighbour).all()
        self.check(found.sel(init_scale=[1.0]), sweep(blobs, LINEAR))

    def test_on_one_device(self, blobs):
        assert len(jax.local_devices()) > 1
        self.check(sweep(blobs, LINEAR, devices=jax.devices()[:1]), sweep(blobs, LINEAR))

    def test_with_batch_norm_too(self, blobs):
        reference = sweep(blobs, MODEL)
        self.check(sweep(blobs, MODEL, [4], [10.0]), reference)
        self.check(sweep(blobs, MODEL, [6, 2], (100.0, 1.0)), reference)


def many(ds, **options):
    """70 cells, with normalization and without, of which some diverge; in groups of 4 a device, some not full."""
    return sweep(ds, {"batch": MODEL, "none": LINEAR}, **options)


def many_on(ds, devices, path):
    jax.config.update("jax_num_cpu_devices", devices)
    compilation.CPU_OPTIONS = quick.as_users()
    many(ds, path=path)
    assert jax.local_device_count() == devices


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 3])
def test_a_cell_is_bitwise_itself_on_as_many_devices(blobs, tmp_path, devices):
    """In a process of its own, beside this one with two."""
    path = tmp_path / "r.zarr"
    process = processes.start(many_on, tmp_path / "log", ds=blobs, devices=devices, path=path)
    assert processes.end_of(process) == 0, (tmp_path / "log").read_text()
    found, expected = bnjax.load_results(path), many(blobs)
    assert found.attrs["plan"]["batch"]["devices"] == devices
    assert len(jax.local_devices()) == 2
    assert 0 < expected.diverged.mean() < 1
    xr.testing.assert_equal(found, expected)


def everything(model):
    """Loss and gradient on the training data, accuracy on the test data, and the norm of all that it sees."""

    def measure(s):
        def loss(params):
            outputs, _ = model.apply(params, s.batch_stats, jnp.asarray(s.ds.train_x), train=True)
            return -jax.nn.log_softmax(outputs)[jnp.arange(len(outputs)), s.ds.train_y].mean()

        found, gradient = jax.value_and_grad(loss)(s.params)
        outputs, _ = model.apply(s.params, s.batch_stats, jnp.asarray(s.ds.test_x), train=False)
        right = (outputs.argmax(-1) == s.ds.test_y).mean()
        leaves = [jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves((s, gradient))]
        norms = {f"norm_{i}": jnp.linalg.norm(leaf.ravel()) for i, leaf in enumerate(leaves)}
        return {"loss": found, "right": right} | norms

    return bnjax.Probe(measure)


def weights(model):
    return probes.weights(model, (12,), batch_size=64)


SIGMOID = bnjax.mlp((8, 8), 4, "sigmoid", norm_position="after_activation")


@pytest.mark.parametrize(
    ("model", "config", "segment", "width", "measured"),
    [
        (MODEL, {}, None, 4, [everything]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (MODEL, {}, None, 1, [everything, weights]),
                (MODEL, {"eval_every": None, "optimizer": "adam"}, None, 4, [weights]),
                (LINEAR, {"eval_every": 2}, None, 1, [everything]),
                (LINEAR, {"eval_every": None}, 5, 4, [everything, weights]),
                (SIGMOID, {}, 4, 1, [everything]),
                (bnjax.mlp((64, 64), 4), {"eval_every": 1, "batch_size": 48}, None, 4, [everything]),
            ]
        ),
    ],
)
def test_a_probe_changes_nothing(blobs, model, config, segment, width, measured):
    """On CPU, however much of what the run computes the probe computes, too."""
    options = {"config": config, "segment": segment, "width": width, "scales": (0.1, 1.0, 100.0), "seeds": range(3)}
    plain = sweep(blobs, model, **options)
    assert (0 < plain.diverged.mean() < 1) == (model is LINEAR)
    for probe in measured:
        probed = sweep(blobs, model, probe=probe(model), **options)
        xr.testing.assert_equal(probed[[*History._fields]], plain)
