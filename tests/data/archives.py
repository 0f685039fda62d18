"""Small archives of the official formats, as data sets; and processes that load them."""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from bnjax.data import builders

REPOSITORY = Path(__file__).parents[2]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
needs_debian = pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
NOWHERE = "http://bnjax.invalid/"


def python(code, *args, **environment):
    """Starts a process of its own that runs `code`, with warnings as errors."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process):
    """What a successful process printed."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), err
    return out.strip()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def random_arrays(num_train, num_test, shape):
    rng = np.random.default_rng(0)
    images, labels = (
        [rng.integers(0, high, (n, *tail), np.uint8) for n in (num_train, num_test)]
        for high, tail in ((256, shape), (10, ()))
    )
    return builders.Arrays(images[0], labels[0], images[1], labels[1])


def write_mnist(folder, arrays):
    folder.mkdir(exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        x, y = getattr(arrays, f"{split}_x")[..., 0], getattr(arrays, f"{split}_y")
        for kind, array in (("images-idx3", x), ("labels-idx1", y)):
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array), mtime=0))


def write_cifar10(folder, arrays):
    folder.mkdir(exist_ok=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    xs = [*np.split(arrays.train_x, 5), arrays.test_x]
    ys = [*np.split(arrays.train_y, 5), arrays.test_y]
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, x, y in zip(names, xs, ys, strict=True):
            planes = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
            content = np.concatenate([y[:, None], planes], axis=1).tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def flip(content):
    return content[:60] + bytes([content[60] ^ 1]) + content[61:]


SMALL = {"train": 40, "test": 12}


def small_source(name, folder, base=NOWHERE, **changes):
    """`name` as a data set of the archives in `folder`, with their checksums, at the address `base`."""
    infos = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        infos[base + path.name] = builders.UrlInfo(size=len(content), checksum=digest, filename=path.name)
    return builders.SOURCES[name]._replace(**{"archives": infos, "num_examples": SMALL, **changes})


def declare(monkeypatch, name, *args, **changes):
    monkeypatch.setitem(builders.SOURCES, name, small_source(name, *args, **changes))


# Begins the code of a process: its mnist is the small one, of the archives in argv[1]; argv[2] is data_dir.
SMALL_MNIST = """
import hashlib, os, pathlib, sys, time
sys.path.insert(0, "tests/data")
import archives as small
from bnjax import data
from bnjax.data import builders
archives, cache = map(pathlib.Path, sys.argv[1:3])
builders.SOURCES["mnist"] = small.small_source("mnist", archives)
"""


def assert_is(ds, arrays):
    """`ds` is `arrays`, standardized over the data set."""
    mean, std = arrays.train_x.mean(dtype=np.float64), arrays.train_x.std(dtype=np.float64)
    for found, stored in ((ds.train_x, arrays.train_x), (ds.test_x, arrays.test_x)):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(np.rint(found * std + mean), stored)
    np.testing.assert_array_equal(ds.train_y, arrays.train_y)
    np.testing.assert_array_equal(ds.test_y, arrays.test_y)
    assert ds.train_y.dtype == ds.test_y.dtype == np.int32
