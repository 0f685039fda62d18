"""The embedded data set, and a small MNIST."""

import archives
import numpy as np
import pytest

from bnjax import data
from bnjax.data import embedded


@pytest.fixture(scope="package")
def mini():
    """The arrays of the embedded file."""
    with np.load(embedded.PATH) as arrays:
        return dict(arrays)


@pytest.fixture(scope="package")
def whole():
    """What `load` makes of them."""
    return data.load()


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A small MNIST: its arrays, and the folder with its archives."""
    arrays = archives.random_arrays(40, 12, (28, 28, 1))
    archives.write_mnist(tmp_path / "archives", arrays)
    archives.declare(monkeypatch, "mnist", tmp_path / "archives")
    return arrays, tmp_path / "archives"
