"""The data sets of TFDS, and the builder that prepares any of them, without TensorFlow.

The official archives are read with the standard library. Their addresses, sizes and checksums are
those of the TFDS data set of the same name; nothing is prepared from a file that does not match.
"""

import contextlib
import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

UrlInfo = tfds.download.checksums.UrlInfo  # size, checksum (SHA-256), filename
Paths = Mapping[str, Path]  # an archive's file name -> where it lies


class Arrays(NamedTuple):
    """A data set as stored: bytes and class numbers."""

    train_x: np.ndarray  # [N, height, width, channels] uint8
    train_y: np.ndarray  # [N] uint8
    test_x: np.ndarray  # [M, height, width, channels] uint8
    test_y: np.ndarray  # [M] uint8


class Source(NamedTuple):
    """A data set and its origin."""

    name: str
    version: str
    description: str
    homepage: str
    image_shape: tuple[int, int, int]
    labels: tuple[str, ...]  # the classes' names
    num_examples: Mapping[str, int]  # as declared: {"train": N, "test": M}
    read: Callable[[Paths], Arrays]
    archives: Mapping[str, UrlInfo] | None = None  # by address; None: those of TFDS's data set of this name
    gzip_times: Mapping[str, int] = {}  # by file name; see `verify`


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepares one `Source`, one record an image, in the archives' order.

    Not registered with TFDS, where data sets of the same names are.
    """

    VERSION = tfds.core.Version("0.0.0")  # each instance has its source's

    def __init__(self, source: Source, data_dir: Path, manual_dir: Path | None = None):
        self.source = source
        self.name = source.name
        self.VERSION = tfds.core.Version(source.version)
        self.manual_dir = manual_dir
        super().__init__(data_dir=data_dir, file_format="array_record")

    @property
    def url_infos(self) -> dict[str, UrlInfo]:
        """The checksums that TFDS's download manager holds downloads to."""
        return dict(archives(self.source))

    def _info(self) -> tfds.core.DatasetInfo:
        # An Image feature would need TensorFlow to encode; a Tensor of the same shape does not.
        features = {
            "image": tfds.features.Tensor(shape=self.source.image_shape, dtype=np.uint8),
            "label": tfds.features.ClassLabel(names=list(self.source.labels)),
        }
        return _DatasetInfo(
            builder=self,
            description=self.source.description,
            homepage=self.source.homepage,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # the first n examples are the archives' first n
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        paths = find(self.source, self.manual_dir)
        for info in archives(self.source).values():
            if info.filename in paths:
                verify(paths[info.filename], info, self.source.gzip_times.get(info.filename))
        # One after another, so that nothing is still being written when one fails. TFDS verifies them.
        for url, info in archives(self.source).items():
            if info.filename not in paths:
                paths[info.filename] = _download(dl_manager, url)
        arrays = self.source.read(paths)
        _check_declared(self.source, arrays, paths)
        return {
            "train": self._generate_examples(arrays.train_x, arrays.train_y),
            "test": self._generate_examples(arrays.test_x, arrays.test_y),
        }

    def _generate_examples(self, x: np.ndarray, y: np.ndarray) -> Iterator:
        for key, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
            yield key, {"image": image, "label": label}

    def _log_download_bytes(self) -> None:
        """Prints nothing."""

    def _log_download_done(self) -> None:
        """Prints nothing."""


class _DatasetInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Asks no server about the data set, and leaves no temporary folder."""


def archives(source: Source) -> Mapping[str, UrlInfo]:
    """The archives of `source`, by address."""
    return tfds.builder_cls(source.name).url_infos if source.archives is None else source.archives


def prepare(source: Source, root: Path, manual_dir: Path | None) -> Path:
    """Prepares `source` under the empty folder `root`. Returns the folder with the prepared files."""
    builder = Builder(source, root, manual_dir)
    shown = tqdm_utils._active  # TFDS has one switch for the progress bars of the whole process
    tfds.disable_progress_bar()
    try:
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_dir=root / "downloads", download_config=config)
    finally:
        tfds.display_progress_bar(shown)
    return Path(builder.data_dir)


def find(source: Source, manual_dir: Path | None) -> dict[str, Path]:
    """Those of the archives that are at hand, by file name."""
    names = [info.filename for info in archives(source).values()]
    return {name: manual_dir / name for name in names if manual_dir and (manual_dir / name).is_file()}


def verify(path: Path, info: UrlInfo, gzip_time: int | None = None) -> None:
    """Raises an OSError that names the file, unless its SHA-256 is `info.checksum`.

    Some distributions repackage .gz archives and blank the name and the time in the gzip header, which
    say nothing about the content. `gzip_time` (seconds since 1970) is the time that the original header
    holds: given it, a file whose header is blank also passes if with the original header it would.
    """
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        if found == info.checksum:
            return
        file.seek(0)
        if gzip_time is not None and file.read(10)[:4] == b"\x1f\x8b\x08\x00":  # deflate, no name
            name = info.filename.removesuffix(".gz").encode() + b"\0"
            header = b"\x1f\x8b\x08\x08" + gzip_time.to_bytes(4, "little") + b"\x00\x03" + name
            if hashlib.file_digest(file, lambda: hashlib.sha256(header)).hexdigest() == info.checksum:
                return
    raise OSError(
        f"{path} is not the expected file: it has {int(size):,} bytes and SHA-256 {found}, "
        f"expected {int(info.size):,} bytes and {info.checksum}"
    )


def read_idx(paths: Paths) -> Arrays:
    """Reads the four .gz archives of MNIST and of the data sets that share its format."""
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        arrays[f"{split}_x"] = _read_idx_file(paths[f"{prefix}-images-idx3-ubyte.gz"], 3)[..., None]
        arrays[f"{split}_y"] = _read_idx_file(paths[f"{prefix}-labels-idx1-ubyte.gz"], 1)
    return Arrays(**arrays)


def _read_idx_file(path: Path, ndim: int) -> np.ndarray:
    """An array of bytes: two zeros, the type (8), `ndim`, the big-endian sizes, then the entries."""
    with _naming(path):
        data = gzip.decompress(path.read_bytes())
        if data[:4] != bytes([0, 0, 8, ndim]):
            raise ValueError(f"not an idx file of {ndim}-dimensional bytes")
        shape = np.frombuffer(data, ">u4", count=ndim, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def read_cifar10(paths: Paths) -> Arrays:
    """Reads CIFAR-10's binary version: records of one label and three 32 x 32 colour planes."""
    path = paths["cifar-10-binary.tar.gz"]
    batches = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    arrays = {}
    with _naming(path), tarfile.open(path, "r:gz") as archive:
        for split, names in batches.items():
            data = b"".join(archive.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names)
            records = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
            arrays[f"{split}_x"] = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            arrays[f"{split}_y"] = records[:, 0]
    return Arrays(**arrays)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong with the content of a file into an OSError that names it."""
    try:
        yield
    except (EOFError, KeyError, OSError, TypeError, ValueError, tarfile.TarError, zlib.error) as error:
        raise OSError(f"{path} cannot be read: {error}") from error


def _download(dl_manager: Any, url: str) -> Path:
    try:
        return Path(dl_manager.download(url))
    except Exception as error:  # TFDS's and requests' own, which share no base
        raise OSError(f"could not download {url}: {error}") from error


def _check_declared(source: Source, arrays: Arrays, paths: Paths) -> None:
    """Raises an OSError unless the arrays are what the source declares."""
    where = ", ".join(map(str, paths.values()))
    for split, x, y in (("train", *arrays[:2]), ("test", *arrays[2:])):
        declared = source.num_examples[split]
        if len(x) != declared or len(y) != declared:
            raise OSError(
                f"{source.name} declares {declared:,} {split} examples, but {len(x):,} images and "
                f"{len(y):,} labels were read from {where}"
            )
        if x.shape[1:] != source.image_shape or y.max(initial=0) >= len(source.labels):
            raise OSError(
                f"{source.name} declares images of shape {source.image_shape} in {len(source.labels)} "
                f"classes, but {x.shape[1:]} and the class {y.max(initial=0)} were read from {where}"
            )


_MNIST = Source(
    name="mnist",
    version="3.0.1",
    description="MNIST: handwritten digits.",
    homepage="http://yann.lecun.com/exdb/mnist/",
    image_shape=(28, 28, 1),
    labels=tuple("0123456789"),
    num_examples={"train": 60_000, "test": 10_000},
    read=read_idx,
)
_FASHION_MNIST = _MNIST._replace(
    name="fashion_mnist",
    description="Fashion-MNIST: pictures of clothes, by Zalando.",
    homepage="https://github.com/zalandoresearch/fashion-mnist",
    labels=("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    gzip_times={
        "train-images-idx3-ubyte.gz": 1504176606,
        "train-labels-idx1-ubyte.gz": 1504176606,
        "t10k-images-idx3-ubyte.gz": 1504176627,
        "t10k-labels-idx1-ubyte.gz": 1504176627,
    },
)
_CIFAR10 = Source(
    name="cifar10",
    version="3.0.2",
    description="CIFAR-10: colour photographs of animals and vehicles.",
    homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    image_shape=(32, 32, 3),
    labels=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    num_examples={"train": 50_000, "test": 10_000},
    read=read_cifar10,
)

SOURCES = {source.name: source for source in (_FASHION_MNIST, _MNIST, _CIFAR10)}
