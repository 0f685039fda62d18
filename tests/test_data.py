import gzip
import hashlib
import http.server
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import data
from bnjax.data import builders, embedded, make_fashion_mnist_mini

REPOSITORY = Path(__file__).parents[1]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
needs_debian = pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
NOWHERE = "http://bnjax.invalid/"


@pytest.fixture
def mini():
    """The arrays of the embedded file."""
    with np.load(embedded.PATH) as arrays:
        return dict(arrays)


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


# ---------------------------------------------------------------- small archives of the official formats


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
sys.path.insert(0, "tests")
import test_data
from bnjax import data
from bnjax.data import builders
archives, cache = map(pathlib.Path, sys.argv[1:3])
builders.SOURCES["mnist"] = test_data.small_source("mnist", archives)
"""


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A small MNIST: its arrays, and the folder with its archives."""
    arrays = random_arrays(40, 12, (28, 28, 1))
    write_mnist(tmp_path / "archives", arrays)
    declare(monkeypatch, "mnist", tmp_path / "archives")
    return arrays, tmp_path / "archives"


def assert_is(ds, arrays):
    """`ds` is `arrays`, standardized over the data set."""
    mean, std = arrays.train_x.mean(dtype=np.float64), arrays.train_x.std(dtype=np.float64)
    for found, stored in ((ds.train_x, arrays.train_x), (ds.test_x, arrays.test_x)):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(np.rint(found * std + mean), stored)
    np.testing.assert_array_equal(ds.train_y, arrays.train_y)
    np.testing.assert_array_equal(ds.test_y, arrays.test_y)
    assert ds.train_y.dtype == ds.test_y.dtype == np.int32


# ---------------------------------------------------------------- the embedded data set


def test_mini_is_the_embedded_file(mini):
    ds = data.load("fashion_mnist_mini")
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


def test_without_the_extra_the_mini_loads():
    code = """
import hashlib, sys
import numpy as np
from bnjax import data
extra = {"tensorflow_datasets", "array_record", "importlib_resources", "tensorflow"}
assert not extra & set(sys.modules), extra & set(sys.modules)
sys.modules.update({name: None for name in extra})  # importing one is an ImportError
print(hashlib.sha256(b"".join(a.tobytes() for a in data.load())).hexdigest())
ds = data.standardize(data.Dataset(np.eye(3), np.arange(3), np.eye(3), np.arange(3)))
print(ds.train_x.dtype)
for name in data.NAMES[1:]:
    try:
        data.load(name)
    except ImportError as error:
        print(f"loading {name} needs the extra `bnjax[data]`" in str(error))
"""
    digest = hashlib.sha256(b"".join(a.tobytes() for a in data.load())).hexdigest()
    assert output(python(code)).split() == [digest, "float32", "True", "True", "True"]


def test_the_mini_needs_no_folder_and_no_network(tmp_path):
    """Where its arguments lead is of no effect, but `manual_dir` is a folder."""
    (tmp_path / "file").touch()
    ds = data.load(data_dir=tmp_path / "file", manual_dir=tmp_path, download=False)
    for found, expected in zip(ds, data.load(), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        data.load(manual_dir=tmp_path / "nowhere")


# ---------------------------------------------------------------- what a caller may ask for


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


def test_all_training_examples_are_allowed():
    for found, expected in zip(data.load(train_examples=10_000), data.load(), strict=True):
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


# ---------------------------------------------------------------- standardization of one's own arrays


def own(train_x, test_x=None):
    test_x = train_x if test_x is None else test_x
    return data.Dataset(train_x, np.zeros(len(train_x), np.int64), test_x, np.zeros(len(test_x), np.int64))


@pytest.mark.parametrize("per", ["dataset", "feature"])
@pytest.mark.parametrize("offset", [0.0, 1e6, -1e12])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e100])
def test_mean_0_and_standard_deviation_1(per, offset, size):
    x = (np.random.default_rng(0).normal(size=(3000, 7, 100)) + offset) * size  # several chunks
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


# ---------------------------------------------------------------- official archives


@pytest.mark.slow
def test_first_use_is_silent_and_never_imports_tensorflow(tmp_path, mnist):
    (tmp_path / "tensorflow").mkdir()
    stub = f"open({str(tmp_path / 'imported')!r}, 'w').close()\nraise ImportError('a stub')\n"
    (tmp_path / "tensorflow" / "__init__.py").write_text(stub)
    load = 'data.load("mnist", data_dir=cache, manual_dir=archives)\n'
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = python(SMALL_MNIST + load + load, mnist[1], tmp_path / "cache", PYTHONPATH=path)
    assert output(process) == ""
    assert not (tmp_path / "imported").exists()
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [".mnist.lock", "mnist"]


def test_mnist(tmp_path, mnist):
    arrays, folder = mnist
    assert_is(data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder), arrays)
    ds = data.load("mnist", data_dir=tmp_path / "cache", download=False, train_examples=7)  # prepared by now
    assert_is(ds, arrays._replace(train_x=arrays.train_x[:7], train_y=arrays.train_y[:7]))


def test_cifar10(tmp_path, monkeypatch):
    arrays = random_arrays(40, 12, (32, 32, 3))
    write_cifar10(tmp_path / "archives", arrays)
    declare(monkeypatch, "cifar10", tmp_path / "archives")
    assert_is(data.load("cifar10", data_dir=tmp_path / "cache", manual_dir=tmp_path / "archives"), arrays)


def test_sources_agree_with_tfds(tmp_path):
    for name in ("mnist", "fashion_mnist", "cifar10"):
        source, stock = builders.SOURCES[name], builders.tfds.builder_cls(name)
        assert source.version == str(stock.VERSION)
        assert len(builders.archives(source)) == (1 if name == "cifar10" else 4)
        info = stock(data_dir=tmp_path).info
        assert source.image_shape == info.features["image"].shape
        assert len(source.labels) == info.features["label"].num_classes
        if name != "cifar10":  # there TFDS reads the names from the archive
            assert source.labels == tuple(info.features["label"].names)


def test_prepared_copy_is_an_ordinary_tfds_data_set(tmp_path, mnist):
    arrays, folder = mnist
    data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)
    records = builders.tfds.builder_from_directory(tmp_path / "cache" / "mnist" / "3.0.1").as_data_source("test")
    np.testing.assert_array_equal([record["label"] for record in records], arrays.test_y)
    np.testing.assert_array_equal(records[3]["image"], arrays.test_x[3])


@pytest.mark.parametrize("damage", [flip, lambda c: c[:-5], lambda c: b"", lambda c: b"<html>not found</html>"])
@pytest.mark.parametrize("declared", ["before", "after"])
def test_damaged_archive(tmp_path, mnist, monkeypatch, damage, declared):
    _, folder = mnist
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    if declared == "after":  # so that the checksum does not catch it
        declare(monkeypatch, "mnist", folder)
    with pytest.raises(OSError, match=r"archives.t10k-images-idx3-ubyte\.gz"):
        data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".mnist.lock"]


def test_damaged_cifar10_archive(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "archives", random_arrays(40, 12, (32, 32, 3)))
    path = tmp_path / "archives" / "cifar-10-binary.tar.gz"
    whole = path.read_bytes()
    for content in (whole[:-2000], b"nothing", gzip.compress(b"no tar")):
        path.write_bytes(content)
        declare(monkeypatch, "cifar10", tmp_path / "archives")
        with pytest.raises(OSError, match=r"cifar-10-binary\.tar\.gz cannot be read"):
            data.load("cifar10", data_dir=tmp_path / "cache", manual_dir=tmp_path / "archives")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".cifar10.lock"]


def test_archives_of_another_data_set(tmp_path, mnist):
    arrays, folder = mnist
    write_mnist(folder, arrays._replace(train_y=arrays.train_y[::-1].copy()))
    with pytest.raises(OSError, match=r"train-labels-idx1-ubyte\.gz is not the expected file"):
        data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)


@pytest.mark.parametrize(("split", "number"), [("train", 41), ("test", 11)])
def test_number_of_examples_is_checked(tmp_path, mnist, monkeypatch, split, number):
    _, folder = mnist
    right = builders.SOURCES["mnist"]
    declare(monkeypatch, "mnist", folder, num_examples={**SMALL, split: number})
    with pytest.raises(OSError, match=rf"mnist declares {number} {split} examples, but {SMALL[split]} images"):
        data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)
    wrong, builders.SOURCES["mnist"] = builders.SOURCES["mnist"], right
    data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)
    builders.SOURCES["mnist"] = wrong
    with pytest.raises(OSError, match=rf"holds {SMALL[split]} {split} examples, but {number} are declared"):
        data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)


def test_images_and_classes_are_checked(tmp_path, mnist, monkeypatch):
    arrays, folder = mnist
    for wrong in (arrays._replace(train_x=arrays.train_x[:, 1:]), arrays._replace(test_y=arrays.test_y + 9)):
        write_mnist(folder, wrong)
        declare(monkeypatch, "mnist", folder)
        with pytest.raises(OSError, match=r"declares images of shape \(28, 28, 1\) in 10 classes"):
            data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)


def test_blank_gzip_header(tmp_path, mnist, monkeypatch):
    arrays, folder = mnist
    when, name = 1504176606, "train-images-idx3-ubyte.gz"
    blank = (folder / name).read_bytes()
    header = b"\x1f\x8b\x08\x08" + when.to_bytes(4, "little") + b"\x00\x03" + name[:-3].encode() + b"\0"
    (folder / name).write_bytes(header + blank[10:])
    declare(monkeypatch, "mnist", folder, gzip_times={name: when})
    (folder / name).write_bytes(blank)
    assert_is(data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder), arrays)
    (folder / name).write_bytes(flip(blank))  # a blank header excuses nothing else
    with pytest.raises(OSError, match="is not the expected file"):
        data.load("mnist", data_dir=tmp_path / "other", manual_dir=folder)


@needs_debian
@pytest.mark.slow
def test_all_of_fashion_mnist(tmp_path):
    start = time.perf_counter()
    ds = data.load("fashion_mnist", data_dir=tmp_path, manual_dir=DEBIAN, download=False)
    print(f"prepared and loaded in {time.perf_counter() - start:.1f} s")
    full = builders.read_idx({path.name: path for path in DEBIAN.glob("*.gz")})
    assert full.train_x.shape == (60_000, 28, 28, 1)
    assert full.test_x.shape == (10_000, 28, 28, 1)
    assert_is(ds, full)
    np.testing.assert_array_equal(np.bincount(ds.train_y), np.full(10, 6_000))
    np.testing.assert_array_equal(np.bincount(ds.test_y), np.full(10, 1_000))


# ---------------------------------------------------------------- network


@pytest.mark.parametrize("download", [True, False])
def test_missing_files_are_named_within_5_seconds(tmp_path, mnist, download):
    _, folder = mnist
    (folder / "train-images-idx3-ubyte.gz").unlink()
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder, download=download)
    assert time.perf_counter() - start < 5
    message = str(error.value)
    assert "missing: t10k-labels-idx1-ubyte.gz, train-images-idx3-ubyte.gz. Put" in message
    assert "manual_dir" in message
    assert str(folder) in message
    assert NOWHERE in message
    assert ("download=False" in message) is not download
    assert not (tmp_path / "cache").exists()


def test_missing_files_with_real_addresses(tmp_path):
    for name, number in (("fashion_mnist", 4), ("mnist", 4), ("cifar10", 1)):
        with pytest.raises(FileNotFoundError) as error:
            data.load(name, data_dir=tmp_path / "cache", download=False)
        named = str(error.value).partition("Put")[0]
        assert named.count(".gz") == number
    assert not (tmp_path / "cache").exists()


def test_name_server_that_never_answers(tmp_path, mnist, monkeypatch):
    released = threading.Event()

    def getaddrinfo(*args, **kwargs):
        released.wait(60)
        raise socket.gaierror("released")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=r"no answer within 2\.5 seconds"):
        data.load("mnist", data_dir=tmp_path / "cache")
    assert time.perf_counter() - start < 5
    released.set()


def test_host_that_never_answers(tmp_path, mnist, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        declare(monkeypatch, "mnist", mnist[1], base=f"http://127.0.0.1:{silent.getsockname()[1]}/")
        start = time.perf_counter()
        with pytest.raises(FileNotFoundError, match="which was not downloaded: "):
            data.load("mnist", data_dir=tmp_path / "cache")
        assert time.perf_counter() - start < 5


@pytest.fixture
def served(mnist, monkeypatch):
    """The small MNIST, its archives served over HTTP by this process."""
    arrays, folder = mnist

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        declare(monkeypatch, "mnist", folder, base=f"http://127.0.0.1:{server.server_port}/")
        yield arrays, folder
        server.shutdown()
        thread.join()


def test_download(tmp_path, served, capfd):
    arrays, folder = served
    assert_is(data.load("mnist", data_dir=tmp_path / "cache"), arrays)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".mnist.lock", "mnist"]
    assert capfd.readouterr() == ("", "")
    # What manual_dir lacks is downloaded.
    (tmp_path / "manual").mkdir()
    (folder / "train-images-idx3-ubyte.gz").rename(tmp_path / "manual" / "train-images-idx3-ubyte.gz")
    assert_is(data.load("mnist", data_dir=tmp_path / "other", manual_dir=tmp_path / "manual"), arrays)


def test_download_of_a_wrong_file(tmp_path, served):
    _, folder = served
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(OSError, match=r"could not download .*train-images-idx3-ubyte\.gz"):
        data.load("mnist", data_dir=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".mnist.lock"]


def test_file_that_the_host_does_not_have(tmp_path, served):
    _, folder = served
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="404"):
        data.load("mnist", data_dir=tmp_path / "cache")


# ---------------------------------------------------------------- prepared copies


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "remove checksums", "empty"])
def test_damaged_prepared_copy(tmp_path, mnist, damage):
    arrays, folder = mnist
    data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)
    prepared = tmp_path / "cache" / "mnist" / "3.0.1"
    (records,) = prepared.glob("*train*")
    match damage:
        case "flip":
            content = bytearray(records.read_bytes())
            content[-100] ^= 1
            records.write_bytes(content)
        case "truncate":
            records.write_bytes(records.read_bytes()[:1000])
        case "remove":
            records.unlink()
        case "remove checksums":
            (prepared / "SHA256SUMS").unlink()
        case "empty":
            (prepared / "SHA256SUMS").write_text("")
    with pytest.raises(OSError, match=r"mnist.3\.0\.1 is not a complete copy .* Delete the folder"):
        data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)
    for file in prepared.iterdir():
        file.unlink()
    prepared.rmdir()
    assert_is(data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder), arrays)


def test_user_settings_of_tfds_are_restored(tmp_path, mnist):
    tqdm_utils = builders.tqdm_utils
    for shown in (False, True):
        builders.tfds.display_progress_bar(shown)
        data.load("mnist", data_dir=tmp_path / str(shown), manual_dir=mnist[1])
        assert tqdm_utils._active is shown


LOAD = """
ds = data.load("mnist", data_dir=cache, manual_dir=archives)
print(hashlib.sha256(b"".join(a.tobytes() for a in ds)).hexdigest())
"""
BEGIN = "pathlib.Path(sys.argv[3]).touch()\n"
# Waits until there are three of them, which the folder argv[3] counts.
MEET = """
pathlib.Path(sys.argv[3], str(os.getpid())).touch()
deadline = time.monotonic() + 60
while len(os.listdir(sys.argv[3])) < 3 and time.monotonic() < deadline:
    time.sleep(0.001)
"""
# Waits (for ever, if need be) in the middle of preparing.
WAIT = """
generate = builders.Builder._generate_examples
def waiting(self, x, y):
    for i, example in enumerate(generate(self, x, y)):
        if i == len(x) // 2:
            pathlib.Path(sys.argv[3]).touch()
            while pathlib.Path(sys.argv[3]).exists():
                time.sleep(0.01)
        yield example
builders.Builder._generate_examples = waiting
"""


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_processes_that_prepare_at_once(tmp_path, mnist):
    (tmp_path / "met").mkdir()
    arguments = (mnist[1], tmp_path / "cache", tmp_path / "met")
    processes = [python(SMALL_MNIST + MEET + LOAD, *arguments) for _ in range(3)]
    ds = data.load("mnist", data_dir=tmp_path / "other", manual_dir=mnist[1])
    expected = hashlib.sha256(b"".join(a.tobytes() for a in ds)).hexdigest()
    assert [output(process) for process in processes] == [expected] * 3
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".mnist.lock", "mnist"]


@pytest.mark.slow
def test_second_process_waits_for_a_slow_one(tmp_path, mnist):
    cache, waiting = tmp_path / "cache", tmp_path / "waiting"
    slow = python(SMALL_MNIST + WAIT + LOAD, mnist[1], cache, waiting)
    wait_for(waiting, slow)
    (temporary,) = cache.glob(".mnist-*")
    second = python(SMALL_MNIST + BEGIN + LOAD, mnist[1], cache, tmp_path / "begun")
    wait_for(tmp_path / "begun", second)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(4)
    assert temporary.exists()
    waiting.unlink()
    while waiting.exists() or slow.poll() is None:  # it waits once a split
        waiting.unlink(missing_ok=True)
        time.sleep(0.01)
    assert output(slow) == output(second)


@pytest.mark.slow
def test_process_killed_half_way(tmp_path, mnist):
    arrays, folder = mnist
    cache, waiting = tmp_path / "cache", tmp_path / "waiting"
    for _ in range(2):  # leftovers do not pile up
        killed = python(SMALL_MNIST + WAIT + LOAD, folder, cache, waiting)
        wait_for(waiting, killed)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        killed.communicate()
        waiting.unlink()
        assert len(list(cache.glob(".mnist-*"))) == 1
        assert not (cache / "mnist").exists()
    assert_is(data.load("mnist", data_dir=cache, manual_dir=folder), arrays)
    assert sorted(path.name for path in cache.iterdir()) == [".mnist.lock", "mnist"]


def test_interrupted_preparation_leaves_nothing(tmp_path, mnist, monkeypatch):
    def interrupted(self, x, y):
        yield 0, {"image": x[0], "label": int(y[0])}
        raise KeyboardInterrupt

    monkeypatch.setattr(builders.Builder, "_generate_examples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist", data_dir=tmp_path / "cache", manual_dir=mnist[1])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".mnist.lock"]


def test_lost_race_without_locks_uses_the_winners_copy(tmp_path, mnist, monkeypatch):
    import errno
    import fcntl

    arrays, folder = mnist
    prepare = builders.Builder.download_and_prepare

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "no locks")

    def overtaken(self, **kwargs):
        monkeypatch.setattr(builders.Builder, "download_and_prepare", prepare)
        data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder)
        prepare(self, **kwargs)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(builders.Builder, "download_and_prepare", overtaken)
    assert_is(data.load("mnist", data_dir=tmp_path / "cache", manual_dir=folder), arrays)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".mnist.lock", "mnist"]


def test_data_dir_that_is_a_file(tmp_path, mnist):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        data.load("mnist", data_dir=tmp_path / "file", manual_dir=mnist[1])
