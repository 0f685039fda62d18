"""`load`: from a name to standardized arrays in memory.

The embedded data set is read from the package. Any other is prepared once: it is built in a temporary
folder beside its final place and then renamed, under a lock that the system drops when its holder dies.
So a folder of the final name is complete, and whatever lies beside it while the lock is held was left by
a process that is gone.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import platformdirs

from bnjax import choices
from bnjax.data import embedded, standardization
from bnjax.types import Dataset

NAMES = (embedded.NAME, "fashion_mnist", "mnist", "cifar10")
_CHECKSUMS = "SHA256SUMS"  # of a prepared copy's files, in the format of `sha256sum`
_PROBE_SECONDS = 2.5  # with the imports, an error comes within 5
_ROWS = 1000  # records read at once


def load(
    name: str = embedded.NAME,
    *,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
    train_examples: int | None = None,
    standardize: str = "dataset",
    download: bool = True,
) -> Dataset:
    """Loads a data set, preparing it on first use unless it comes with the package.

    Args:
        name: one of `NAMES`. `fashion_mnist_mini` comes with the package; the others need the extra
            `bnjax[data]` and their official archives, from `manual_dir` or from the network. The next
            two arguments and `download` are for these.
        data_dir: where prepared copies are kept; default `default_data_dir()`. Read-only once prepared.
        manual_dir: a folder with the official archives, under their own file names. Those that are not
            there are downloaded.
        train_examples: use only the first n training examples; default all. The test split stays whole.
        standardize: "dataset" or "feature", see `bnjax.data.standardize`: the statistics are those of
            the training examples used.
        download: False: never touch the network.

    Returns:
        A `Dataset`: train_x [N, 28, 28, 1] or, for cifar10, [N, 32, 32, 3], and test_x [M, ...],
        float32, standardized; train_y [N] and test_y [M], int32 in 0..9.

    Raises:
        ValueError: `name` or `standardize` is unknown, or `train_examples` out of range.
        ImportError: the packages of the extra `bnjax[data]` are needed, and not installed.
        FileNotFoundError: `manual_dir` is no folder; the embedded file is missing; or the data set is
            not prepared, and archives are missing and cannot be downloaded: within 5 seconds, where
            there is no network.
        OSError: an archive, a prepared copy or the embedded file is damaged, or is not what it should
            be; the message names it. Nothing half-prepared is left behind.
    """
    choices.check("dataset", name, NAMES)
    choices.check("standardize", standardize, standardization.PER)
    if manual_dir is not None and not Path(manual_dir).expanduser().is_dir():
        raise FileNotFoundError(f"manual_dir={manual_dir} is not a folder")
    if name == embedded.NAME:
        _check_train_examples(train_examples, name, embedded.NUM_EXAMPLES)
        ds = embedded.read()
        ds = ds._replace(train_x=ds.train_x[:train_examples], train_y=ds.train_y[:train_examples])
    else:
        builders = _import_builders(name)
        source = builders.SOURCES[name]
        _check_train_examples(train_examples, name, source.num_examples)
        root = Path(data_dir).expanduser() if data_dir else default_data_dir()
        folder = root / name / source.version
        if not folder.exists():
            manual_dir = Path(manual_dir).expanduser() if manual_dir else None
            _check_obtainable(builders, source, root, manual_dir, download)
            _prepare(builders, source, folder, root, manual_dir)
        _verify_prepared(folder)
        data_sets = builders.Builder(source, root).as_data_source()
        train = _read(data_sets["train"], source, "train", folder, train_examples)
        ds = Dataset(*train, *_read(data_sets["test"], source, "test", folder))
    return standardization.standardize(ds, standardize)


def default_data_dir() -> Path:
    """The platform's cache folder for this library."""
    return platformdirs.user_cache_path("bnjax")


def _check_train_examples(train_examples: int | None, name: str, num_examples: Mapping[str, int]) -> None:
    available = num_examples["train"]
    if train_examples is not None and not 1 <= train_examples <= available:
        raise ValueError(f"train_examples is {train_examples}, but {name} allows 1 to {available}")


def _import_builders(name: str) -> ModuleType:
    """`bnjax.data.builders`, which imports tensorflow-datasets, for the data set `name`."""
    try:
        import array_record  # noqa: F401  (TFDS imports these two late, with a less helpful error)
        import importlib_resources  # noqa: F401

        from bnjax.data import builders
    except ImportError as error:
        raise ImportError(
            f"loading {name} needs the extra `bnjax[data]`: {error}. {embedded.NAME} and arrays of your own "
            "do not: see bnjax.data.Dataset and bnjax.data.standardize"
        ) from error
    return builders


def _check_obtainable(builders: ModuleType, source, root: Path, manual_dir: Path | None, download: bool) -> None:
    """Raises a FileNotFoundError if archives are missing that cannot be downloaded either."""
    found = builders.find(source, manual_dir)
    missing = {u: i.filename for u, i in builders.archives(source).items() if i.filename not in found}
    if not missing:
        return
    obstacle = _unreachable(next(iter(missing))) if download else "download=False"
    if obstacle:
        looked = f" (looked in {manual_dir})" if manual_dir else ""
        raise FileNotFoundError(
            f"{source.name} is not prepared in {root}, and these files are missing: "
            f"{', '.join(missing.values())}. Put them into a folder and pass it as manual_dir{looked}. "
            f"They come from {', '.join(missing)}, which was not downloaded: {obstacle}"
        )


def _unreachable(url: str) -> str | None:
    """Why `url` cannot be fetched, or None if it can.

    Asked in a thread of its own, because looking up a host's name knows no time-out. TFDS itself would
    try for minutes.
    """
    outcome = [f"no answer within {_PROBE_SECONDS:g} seconds"]

    def probe() -> None:
        try:
            with urllib.request.urlopen(url, timeout=_PROBE_SECONDS):
                outcome[0] = None
        except Exception as error:
            outcome[0] = f"{type(error).__name__}: {error}"

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return outcome[0]


def _prepare(builders: ModuleType, source, folder: Path, root: Path, manual_dir: Path | None) -> None:
    """Makes `folder`, completely or not at all."""
    root.mkdir(parents=True, exist_ok=True)
    prefix = f".{source.name}-{socket.gethostname()}-"
    with _lock(root / f".{source.name}.lock") as locked:
        if folder.exists():  # another process was faster
            return
        if locked:
            for leftover in root.glob(f"{prefix}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        try:
            prepared = builders.prepare(source, temporary, manual_dir)
            sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(prepared.iterdir())]
            (prepared / _CHECKSUMS).write_text("".join(sums))
            folder.parent.mkdir(exist_ok=True)
            try:
                prepared.rename(folder)
            except OSError as error:
                # Without a lock another process may have been faster, and its copy is as good.
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Waits for an exclusive lock. Yields whether there is one: Windows and some file systems have none."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            yield False
        else:
            yield True


def _verify_prepared(folder: Path) -> None:
    """Raises an OSError that names the folder if any of its files is missing or was changed."""
    try:
        sums = dict(line.split("  ")[::-1] for line in (folder / _CHECKSUMS).read_text().splitlines())
        damaged = [name for name, digest in sums.items() if _sha256(folder / name) != digest]
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(folder, str(error)) from error
    if damaged or not sums:
        raise _damaged(folder, f"{', '.join(damaged) or _CHECKSUMS} was changed")


def _damaged(folder: Path, why: str) -> OSError:
    return OSError(
        f"{folder} is not a complete copy prepared by this library ({why}). "
        "Delete the folder, and it is prepared again; or choose another data_dir"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(records, source, split: str, folder: Path, first: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The images [N, height, width, channels] uint8 and labels [N] of the first, or of all, examples."""
    if len(records) != source.num_examples[split]:
        declared = source.num_examples[split]
        raise _damaged(folder, f"it holds {len(records)} {split} examples, but {declared} are declared")
    count = first or len(records)
    images = np.empty((count, *source.image_shape), np.uint8)
    labels = np.empty(count, np.int32)
    for start in range(0, count, _ROWS):
        rows = range(start, min(start + _ROWS, count))
        for row, example in zip(rows, records.__getitems__(list(rows)), strict=True):
            images[row] = example["image"]
            labels[row] = example["label"]
    return images, labels
