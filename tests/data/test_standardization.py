"""Standardization of one's own arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import data
from bnjax.data import standardization


def own(train_x, test_x=None):
    test_x = train_x if test_x is None else test_x
    return data.Dataset(train_x, np.zeros(len(train_x), np.int64), test_x, np.zeros(len(test_x), np.int64))


@pytest.mark.parametrize("per", ["dataset", "feature"])
@pytest.mark.parametrize("offset", [0.0, 1e6, -1e12])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e100])
def test_mean_0_and_standard_deviation_1(per, offset, size, monkeypatch):
    x = (np.random.default_rng(0).normal(size=(300, 7, 100)) + offset) * size
    monkeypatch.setattr(standardization, "_CHUNK_ENTRIES", 1 << 16)  # several chunks
    ds = data.standardize(own(x, x[:5]), per)
    axis = None if per == "dataset" else 0
    np.testing.assert_allclose(ds.train_x.mean(axis, dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(ds.train_x.std(axis, dtype=np.float64), 1, atol=1e-6)
    np.testing.assert_array_equal(ds.test_x, ds.train_x[:5])


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7, 1e300])
def test_constant_features_become_exactly_0(value):
    x = np.random.default_rng(0).normal(size=(1001, 3))
    x[:, 1] = value
    test_x = x[:10] + 1.0
    ds = data.standardize(own(x, test_x), "feature")
    assert not ds.train_x[:, 1].any()
    assert not ds.test_x[:, 1].any()
    assert ds.train_x[:, [0, 2]].all()
    constant = data.standardize(own(np.full((7, 2), value)), "dataset")
    assert not constant.train_x.any()


def test_inputs_of_any_kind_are_left_alone():
    x = np.arange(24, dtype=np.uint8).reshape(6, 4)
    before = x.copy()
    expected = data.standardize(own(x))
    np.testing.assert_array_equal(x, before)
    for other in (jnp.asarray(x), x.astype(bool) * 1, jnp.asarray(x, jnp.bfloat16), np.asfortranarray(x), x.tolist()):
        ds = data.standardize(own(other))
        assert ds.train_x.dtype == np.float32
    np.testing.assert_array_equal(data.standardize(own(jnp.asarray(x))).train_x, expected.train_x)
    assert data.standardize(own(x, x[:0])).test_x.shape == (0, 4)


@pytest.mark.parametrize(
    ("ds", "message"),
    [
        (own(np.ones((3, 2)))._replace(train_y=np.zeros(2, int)), r"train_x has shape \(3, 2\) and train_y \(2,\)"),
        (own(np.ones((3, 2)), np.ones((3, 4))), r"\(2,\) in train_x but \(4,\) in test_x"),
        (own(np.ones((0, 2))), "no training examples"),
        (own(np.array([[1.0], [np.nan]])), "train_x: .* not finite"),
        (own(np.eye(2), np.full((2, 2), np.inf)), "test_x: .* not finite"),
        (own(np.eye(2))._replace(test_y=np.zeros(2)), "test_y must hold integers"),
        (own(np.eye(2))._replace(train_y=np.array([0, -1])), "train_y must hold integers >= 0"),
    ],
)
def test_arrays_that_do_not_fit(ds, message):
    with pytest.raises(ValueError, match=message):
        data.standardize(ds)


def test_unknown_standardization():
    with pytest.raises(ValueError, match="allowed: dataset, feature"):
        data.standardize(own(np.eye(2)), "batch")
