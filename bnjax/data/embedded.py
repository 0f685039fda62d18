"""The data set that comes with the package: the first images of Fashion-MNIST, read with NumPy alone."""

import hashlib
import io
from pathlib import Path

import numpy as np

from bnjax.types import Dataset

NAME = "fashion_mnist_mini"
NUM_EXAMPLES = {"train": 10_000, "test": 2_000}
PATH = Path(__file__).with_name(f"{NAME}.npz")
SHA256 = "ccc609901845ac1c58490c84a0be31975311059080613224a30a08e72c77399b"  # of the file


def read() -> Dataset:
    """Reads the embedded file.

    Returns:
        The images and labels as stored, uint8: train_x [10000, 28, 28, 1], train_y [10000],
        test_x [2000, 28, 28, 1], test_y [2000].

    Raises:
        FileNotFoundError: the file is missing.
        OSError: the file is not the expected one. Either message names the file.
    """
    try:
        content = PATH.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{PATH} is missing: reinstall bnjax") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise OSError(
            f"{PATH} is not the expected file: it has {len(content):,} bytes and SHA-256 {found}, "
            f"expected {SHA256}: reinstall bnjax"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return Dataset(*(arrays[name] for name in Dataset._fields))
