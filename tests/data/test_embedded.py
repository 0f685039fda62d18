"""The embedded data set, and what a caller of `load` may ask for."""

import hashlib
import re
import sys

import numpy as np
import pytest
import without_extra
from archives import DEBIAN, assert_is, flip, needs_debian
from processes import end_of, start

from bnjax import data
from bnjax.data import builders, embedded, make_fashion_mnist_mini


def test_mini_is_the_embedded_file(mini, whole):
    ds = whole
    assert ds.train_x.shape == (10_000, 28, 28, 1)
    assert ds.test_x.shape == (2_000, 28, 28, 1)
    assert_is(ds, builders.Arrays(**mini))
    assert set(ds.train_y) == set(ds.test_y) == set(range(10))
    assert {"train": len(ds.train_y), "test": len(ds.test_y)} == embedded.NUM_EXAMPLES


def test_values_of_the_mini():
    """Whatever compressed them: the digest of the stored arrays, one after another."""
    stored = embedded.read()
    assert all(array.dtype == np.uint8 for array in stored)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in stored)).hexdigest()
    assert digest == "4084017359325b0b158fe7759bc20781f98a81c5bd2d091c099af840dbce1625"


@needs_debian
def test_mini_is_the_beginning_of_the_original_and_reproducible(tmp_path, mini, monkeypatch, capsys):
    full = builders.read_idx({path.name: path for path in DEBIAN.glob("*.gz")})
    for name, stored in mini.items():
        np.testing.assert_array_equal(stored, getattr(full, name)[: len(stored)])
    monkeypatch.setattr(sys, "argv", ["make", str(DEBIAN), str(tmp_path / "again.npz")])
    make_fashion_mnist_mini.main()
    assert "again.npz: 5" in capsys.readouterr().out
    with np.load(tmp_path / "again.npz") as again:
        assert all(np.array_equal(again[name], mini[name]) for name in mini)


def test_mini_is_about_5_mb_with_its_licence():
    assert embedded.PATH.stat().st_size < 5.5e6
    assert "Copyright (c) 2017 Zalando SE" in embedded.PATH.with_name("FASHION_MNIST_LICENSE").read_text()


@pytest.mark.parametrize("damage", [flip, lambda c: c[:-5], lambda c: b""])
def test_damaged_embedded_file(tmp_path, monkeypatch, damage):
    path = tmp_path / embedded.PATH.name
    path.write_bytes(damage(embedded.PATH.read_bytes()))
    monkeypatch.setattr(embedded, "PATH", path)
    name = re.escape(str(path))
    with pytest.raises(OSError, match=rf"{name} is not the expected file: .*: reinstall bnjax"):
        data.load()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing: reinstall bnjax"):
        data.load()


def test_without_the_extra_the_mini_loads(whole, tmp_path):
    log = tmp_path / "log"
    assert end_of(start(without_extra.check, log)) == 0, log.read_text()
    digest = hashlib.sha256(b"".join(a.tobytes() for a in whole)).hexdigest()
    assert log.read_text().split() == [digest, "float32", "True", "True", "True"]


def test_the_mini_needs_no_folder_and_no_network(tmp_path, whole):
    """Where its arguments lead is of no effect, but `manual_dir` is a folder."""
    (tmp_path / "file").touch()
    ds = data.load("fashion_mnist_mini", data_dir=tmp_path / "file", manual_dir=tmp_path, download=False)
    for found, expected in zip(ds, whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        data.load(manual_dir=tmp_path / "nowhere")


@pytest.mark.parametrize("per", ["dataset", "feature"])
def test_statistics_are_those_of_the_training_examples_used(mini, per):
    ds = data.load(train_examples=300, standardize=per)
    axis = None if per == "dataset" else 0
    x = mini["train_x"][:300].astype(np.float64)
    mean, std = x.mean(axis), x.std(axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = [np.where(std > 0, (mini[n][:k] - mean) / std, 0) for n, k in (("train_x", 300), ("test_x", None))]
    np.testing.assert_allclose(ds.train_x, expected[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(ds.test_x, expected[1], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(ds.train_y, mini["train_y"][:300])
    assert len(ds.test_y) == 2_000


def test_one_training_example_is_allowed():
    ds = data.load(train_examples=1, standardize="feature")
    assert not ds.train_x.any()  # every feature is constant
    assert not ds.test_x.any()


@pytest.mark.parametrize(("name", "available"), [("fashion_mnist_mini", 10_000), ("mnist", 60_000)])
def test_train_examples_out_of_range(tmp_path, name, available):
    for n in (0, -1, available + 1):
        with pytest.raises(ValueError, match=f"train_examples is {n}, but {name} allows 1 to {available}$"):
            data.load(name, data_dir=tmp_path / "cache", train_examples=n)
    assert not (tmp_path / "cache").exists()


def test_all_training_examples_are_allowed(whole):
    for found, expected in zip(data.load(train_examples=10_000), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'fashion-mnist' \(did you mean 'fashion_mnist'\?\).*mnist, cifar10"):
        data.load("fashion-mnist")
    with pytest.raises(ValueError, match=r"'features' \(did you mean 'feature'\?\); allowed: dataset, feature"):
        data.load(standardize="features")
    assert (embedded.NAME, *builders.SOURCES) == data.NAMES


def test_default_data_dir_is_the_platforms_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.default_data_dir().name == "bnjax"
    if sys.platform == "linux":
        assert data.default_data_dir() == tmp_path / "bnjax"
