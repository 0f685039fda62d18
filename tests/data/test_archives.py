"""Official archives: read, downloaded, damaged, missing."""

import gzip
import http.server
import os
import socket
import threading
import time

import numpy as np
import pytest
from archives import (
    DEBIAN,
    NOWHERE,
    SMALL,
    SMALL_MNIST,
    assert_is,
    declare,
    flip,
    needs_debian,
    output,
    python,
    random_arrays,
    write_cifar10,
    write_mnist,
)

from bnjax import data
from bnjax.data import builders


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
