"""Static axes of a sweep: keywords of a function that makes the network."""

import functools

import numpy as np
import pytest
import xarray as xr
from flax import linen as nn
from flax import nnx

import bnjax
import bnjax.interop.nnx
from bnjax import probes

CONFIG = bnjax.TrainConfig(steps=3, batch_size=32, eval_every=3)


def network(width, norm="batch", momentum=0.9):
    return bnjax.mlp((width,), 4, norm=norm, momentum=momentum)


def sweep(make_model, blobs, axes, **options):
    return bnjax.sweep(make_model, blobs, CONFIG, axes, progress=False, **options)


@pytest.mark.slow
def test_each_combination_is_what_that_network_gives(blobs):
    axes = {"width": [4, 8], "seed": [0, 1], "norm": ["batch", "none"]}
    found = sweep(network, blobs, axes)
    assert found.test_loss.dims == ("width", "norm", "seed", "step")
    assert found.width.dtype.kind == "i"
    for width, norm in ((4, "none"), (8, "batch")):
        expected = sweep(network(width, norm), blobs, {"seed": [0, 1]})
        np.testing.assert_array_equal(found.test_loss.sel(width=width, norm=norm), expected.test_loss)
    assert [*found.attrs["models"]][1] == "width=4, norm=none"


def test_kept_and_continued(blobs, tmp_path):
    """A larger grid has the cells of the one before; the export is read by xarray alone."""
    path = tmp_path / "results"
    first = sweep(network, blobs, {"width": [8], "seed": [0]}, path=path)
    more = sweep(network, blobs, {"norm": ["batch"], "width": [4, 8], "seed": [0]}, path=path)
    np.testing.assert_array_equal(more.test_loss.sel(width=[8], norm="batch"), first.test_loss)
    assert bnjax.load_results(path).identical(more)
    with xr.open_zarr(path, consolidated=False) as exported:
        np.testing.assert_array_equal(exported.test_loss, more.test_loss)
        assert exported.test_loss.dims == more.test_loss.dims
    assert "norm=batch, width=4: 1 of 1 cells done" in str(bnjax.status(path))


def test_what_is_closed_over_is_part_of_the_identity(blobs, tmp_path):
    """The same function, made again, continues; one that computes something else is refused."""

    def made(epsilon):
        return lambda width: bnjax.mlp((width,), 4, epsilon=epsilon)

    path, axes = tmp_path / "results", {"width": [4]}
    first = sweep(made(0.1), blobs, axes, path=path)
    assert sweep(made(0.1), blobs, axes, path=path).identical(first)
    with pytest.raises(ValueError, match=r"holds other results.*epsilon: 0.1 there, 0.2 asked for"):
        sweep(made(0.2), blobs, axes, path=path)


def test_a_name_that_a_hyperparameter_has(blobs):
    with pytest.raises(ValueError, match=r"momentum is a hyperparameter and an argument .*'model.momentum'"):
        sweep(network, blobs, {"width": [4], "momentum": [0.5]})
    both = sweep(network, blobs, {"model.momentum": [0.0, 0.9], "width": [4], "momentum": [0.5, 0.9]})
    assert both.test_loss.dims == ("model.momentum", "width", "momentum", "step")
    assert (both.test_loss[0, 0, :, -1] != both.test_loss[1, 0, :, -1]).all()
    wrapped = sweep(lambda width: network(width), blobs, {"width": [4], "momentum": [0.5, 0.9]})
    assert wrapped.test_loss.dims == ("width", "momentum", "step")


class Net(nn.Module):
    features: int = 8
    act: str = "relu"

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(getattr(nn, self.act)(nn.Dense(self.features)(x)))


class Drawn(nnx.Module):
    def __init__(self, width, rngs):
        self.hidden, self.output = nnx.Linear(12, width, rngs=rngs), nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.hidden(x)))


@pytest.mark.slow
def test_classes_of_flax(blobs):
    """A class is a function of its fields; one with random numbers says how."""
    found = sweep(Net, blobs, {"act": ["relu", "tanh"], "features": [8], "seed": [0]})
    assert found.test_loss.dims == ("act", "features", "seed", "step")
    assert found.test_loss[0, 0, 0, -1] != found.test_loss[1, 0, 0, -1]

    def drawn(width):
        return bnjax.interop.nnx.as_model(functools.partial(Drawn, width))

    found = sweep(drawn, blobs, {"width": [4, 8], "seed": [0, 1]})
    assert len({*found.test_loss.values.ravel().tolist()}) == 4
    with pytest.raises(ValueError, match=r"arguments \['rngs'\], which are no axes .*interop.nnx.as_model"):
        sweep(Drawn, blobs, {"width": [4], "seed": [0]})


@pytest.mark.slow
def test_a_probe_for_each(blobs):
    def probe(model):
        return probes.weights(model, (12,), batch_size=32)

    found = sweep(network, blobs, {"width": [4, 8], "seed": [0]}, probe=probe)
    assert found.gradient_norm.dims == ("width", "seed", "probe_step", "layer")
    with pytest.raises(ValueError, match=r"probe must be a bnjax.Probe, got int"):
        sweep(network, blobs, {"width": [4], "seed": [0]}, probe=lambda model: 3)
    alone = sweep(network(8), blobs, {"seed": [0]}, probe=probe)
    np.testing.assert_array_equal(found.gradient_norm.sel(width=8), alone.gradient_norm)


def test_robustness_takes_them():
    scales = [0.1, 1.0]
    accuracy = xr.DataArray([[[0.9, 0.2]], [[0.1, 0.8]]], dims=("norm", "seed", "init_scale"))
    results = xr.Dataset({"test_accuracy": accuracy.expand_dims("step", -1)})
    results = results.assign_coords(norm=["batch", "none"], init_scale=scales, seed=[0], step=[3])
    results["diverged"] = xr.zeros_like(accuracy, bool)
    found = bnjax.robustness(results)
    assert found.chosen == ("norm",)
    assert found.best["network"].accuracy == 0.9
    assert found.summaries["network"][0.8].range.decades == 1.0


class Callable:
    def __call__(self, *args, **options):
        raise AssertionError("this is no function that makes networks")


class Nothing:
    pass


def test_without_static_axes_it_is_one_network(blobs):
    found = sweep(lambda: network(4), blobs, {"seed": [0]})
    assert found.identical(sweep(network(4), blobs, {"seed": [0]}))


@pytest.mark.parametrize(
    ("make_model", "axes", "message"),
    [
        (network, {"widht": [4], "seed": [0]}, r"unknown axis 'widht' \(did you mean 'width'\?\)"),
        (network, {"seed": [0]}, r"has the arguments \['width'\], which are no axes and have no default"),
        (network, {"width": [4], "norm": "batch"}, "axis norm takes a list of values, got 'batch'"),
        (network, {"width": []}, r"axis width takes different values, at least one, got \[\]"),
        (network, {"width": [4, 4]}, r"axis width takes different values, at least one, got \[4, 4\]"),
        (network, {"width": [4], "norm": ["batch", None]}, "axis norm takes numbers, or strings, got"),
        (network, {"width": [(4,), (8,)]}, "axis width takes numbers, or strings, got"),
        (network, {"width": [4], "norm": ["a/b"]}, "a value of the axis norm must be a string that can name"),
        (network, {"width": [4], "model.width": [4]}, "axes name an argument .* twice"),
        (network, {"width": [4], "model.seed": [4]}, "unknown axis 'model.seed'"),
        (lambda width: width, {"width": [4]}, "a network must be a bnjax.Model.*got int 4"),
        (lambda **options: network(4), {"test_loss": [1, 2]}, r"axes must not have the names \['test_loss'\]"),
        (Callable(), {"seed": [0]}, "a network must be a bnjax.Model.*got Callable"),
        (Nothing, {"width": [4]}, "unknown axis 'width'"),
        (3, {"seed": [0]}, "a network must be a bnjax.Model.*got int 3"),
    ],
)
def test_refused(blobs, make_model, axes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep(make_model, blobs, axes, path=tmp_path / "results")
    assert not any(tmp_path.iterdir())
