"""One folder of results in the place of another, at once; and what is left where a process died half way.

    r.zarr               the results
    .r.zarr.extended     the same with a larger grid, in the making
    .r.zarr.replaced     the results before, until the new ones are in their place

`bnjax.load_results` finds either whole, whenever it looks: it looks again if another folder has come meanwhile.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bnjax.sweeps.leases import LEASE, writers
from bnjax.sweeps.storage import PARTIAL, Files, StoreLike, exclusive


def extended(path: Path) -> Path:
    """Where an extension of the results at `path` is made."""
    return path.with_name(f".{path.name}.extended")


def replaced(path: Path) -> Path:
    """Where the results at `path` are until others are in their place."""
    return path.with_name(f".{path.name}.replaced")


def replace(new: Path, path: Path) -> None:
    """Puts the folder `new` in the place of `path`, which is removed; all is as before if that fails."""
    old = replaced(path)
    with exclusive(path.parent):
        try:
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            new.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def watched(files: Files) -> Iterator[Callable[[], bool]]:
    """Yields what tells whether another folder has come there, or gone, since; outside of folders never."""
    folders = [] if files.local is None else [files.local, replaced(files.local)]

    def numbers():
        return [_number(folder) for folder in folders]

    with contextlib.ExitStack() as opened:
        for folder in folders:
            with contextlib.suppress(OSError):  # held, so that no other is given its number
                opened.callback(os.close, os.open(folder, os.O_RDONLY))
        before = numbers()
        yield lambda: numbers() != before


def _number(folder):
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns  # the time tells of one that was away, and came back


def cut_off(files: Files) -> bool:
    """Whether all that is left is what a `replace` had moved away, when its process died."""
    return files.local is not None and replaced(files.local).exists() and empty(files)


def recovered(path: StoreLike) -> Files:
    """The files at `path`, after undoing a `replace` that was cut off half way.

    Raises:
      ValueError: if it is a file.
    """
    files = Files(path)
    if files.local is not None and files.local.is_file():
        raise ValueError(f"{path} is a file: choose a new folder, or one that holds results of a sweep")
    if cut_off(files):
        with exclusive(files.local.parent):
            if cut_off(files) and not writers(files):
                shutil.rmtree(files.local, ignore_errors=True)  # somebody looked for a writer there meanwhile
                replaced(files.local).rename(files.local)
    return files


def empty(files: Files) -> bool:
    """Whether nothing stands there, but for leases."""
    return all(key.startswith(f"{LEASE}/") for key in files.list())


def remove_left_over(files: Files, *, beside: bool) -> None:
    """Removes what processes that died have left, unless another process is writing there.

    Args:
      files: where, under a lease.
      beside: not only parts of single files, but also an extension that was not finished, and the results before one
        that was; only where results stand, or those are all there is of them.
    """
    if files.local is None or len(writers(files)) > 1:
        return
    if beside:
        for folder in (replaced(files.local), extended(files.local)):
            shutil.rmtree(folder, ignore_errors=True)
    with files.alone(LEASE):
        for path in files.local.rglob("*.partial"):
            if PARTIAL.search(path.name):
                path.unlink(missing_ok=True)
