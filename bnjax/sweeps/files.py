"""Immutable files by key: each is put only where there is none, in a local folder or in an object store.

In a folder a file is written under a temporary name, synced to the disk and linked to its own name, so that a name
never stands for part of a file. An object store does the same by a conditional put (obstore). Nothing that stands is
replaced, but for two things that no reader of results relies on: the export, and the lock, which says who is writing.
"""

import contextlib
import errno
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zarr

try:
    import fcntl
except ImportError:  # Windows has none: there a second run is not refused
    fcntl = None

LOCK = "bnjax/lock"
HOST, SUFFIX = socket.gethostname(), ".partial"  # of temporary names
PathLike = str | os.PathLike | Any  # or a store of obstore, or zarr's around one


class Busy(RuntimeError):
    """Another run on this host is writing there."""


class Folder:
    """Files in a local folder. Keys are relative, with slashes."""

    def __init__(self, path: str | os.PathLike):
        self.name, self.root = str(path), Path(path).expanduser()
        self.store = zarr.storage.LocalStore(self.root)  # the same place, as zarr sees it

    def get(self, key: str) -> bytes | None:
        """The bytes, or None if there are none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return (self.root / key).read_bytes()

    def create(self, key: str, data: bytes) -> bool:
        """Puts them if there are none: all of them, or nothing. Returns whether it did."""
        path = self.root / key
        for again in (True, False):
            with contextlib.suppress(FileExistsError), self._written(path, data) as temporary:
                try:
                    _link(temporary, path)
                except FileNotFoundError:
                    if not (again and path.parent.is_dir()):
                        raise
                    continue  # a run that began meanwhile took the temporary file for a dead one's
                return True
            return False

    def put(self, key: str, data: bytes) -> None:
        """Puts them in the place of what is there."""
        self.make(os.path.dirname(key))
        with self._written(self.root / key, data) as temporary:
            temporary.replace(self.root / key)

    def delete(self, key: str) -> None:
        """Also if there are none."""
        with self._named():
            (self.root / key).unlink(missing_ok=True)

    def list(self, folder: str = "") -> list[str]:
        """The keys below the folder, without it, in order."""
        root = self.root / folder
        paths = (Path(place, name) for place, _, names in os.walk(root) for name in names)
        return sorted(p.relative_to(root).as_posix() for p in paths if not p.match(f".*{SUFFIX}"))

    def make(self, *folders: str) -> None:
        """Makes these folders, clean of what the dead left. `create` makes none, lest it write where one is gone."""
        with self._named():
            for folder in map(self.root.joinpath, folders):
                _make(folder)
                for path in folder.glob(f".{HOST}-*{SUFFIX}"):
                    path.unlink(missing_ok=True)

    def remove(self, folder: str) -> None:
        """A folder, and all keys below it."""
        shutil.rmtree(self.root / folder, ignore_errors=True)

    def stamp(self) -> tuple[int, int] | None:
        """Another one when another folder has come here, or this one was away."""
        with contextlib.suppress(OSError):
            found = self.root.stat()
            return found.st_ino, found.st_ctime_ns

    @contextlib.contextmanager
    def writing(self) -> Iterator[str]:
        """While it lasts this process is the writer; yields the one before, in words.

        Raises:
          Busy: if another run is writing, by a lock that the kernel drops when its process dies.
        """
        self.make(os.path.dirname(LOCK))
        with contextlib.ExitStack() as stack:
            with self._named():
                lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, lock)
            until = time.monotonic() + 1  # who only looks for a writer has it for a moment, too
            while not _locked(lock, exclusive=True):
                if time.monotonic() > until:
                    raise Busy(f"{self.name}: {_words(self.get(LOCK)) or 'another process'} is writing there")
                time.sleep(0.05)
            before = _words(self.get(LOCK))
            with self._named():
                os.truncate(lock, 0)
                os.pwrite(lock, _who(), 0)
            yield before

    def writer(self) -> str:
        """Who is writing, in words."""
        with contextlib.suppress(OSError), (self.root / LOCK).open("rb") as lock:
            who = _words(lock.read())
            if not _locked(lock, exclusive=False):
                return f"{who or 'another process'} is writing there"
            return f"nobody on this host is writing there{_last(who)}"
        return "nobody is writing there"

    @contextlib.contextmanager
    def _written(self, path, data):
        """A temporary file beside the path that holds the data; what is done with it outlasts a loss of power."""
        temporary = path.with_name(f".{HOST}-{uuid.uuid4().hex}{SUFFIX}")
        with self._named():
            try:
                with temporary.open("xb") as file:
                    _write(file, data)
                yield temporary
                _sync(path.parent)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _named(self):
        """Errors of the system, such as of a full disk, name the place as the user knows it."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), self.name) from error


class Bucket:
    """The same in an object store of obstore; nobody is refused as a second writer."""

    def __init__(self, store: Any, name: str):
        import obstore

        self.name, self._store, self._obstore = name, store, obstore
        self.store = zarr.storage.ObjectStore(store)

    def get(self, key: str) -> bytes | None:  # noqa: D102 (as in `Folder`, and so below)
        with contextlib.suppress(FileNotFoundError), self._named():
            return bytes(self._obstore.get(self._store, key).bytes())

    def create(self, key: str, data: bytes) -> bool:  # noqa: D102
        with contextlib.suppress(FileExistsError):
            self.put(key, data, mode="create")
            return True
        return False

    def put(self, key: str, data: bytes, mode: str = "overwrite") -> None:  # noqa: D102
        with self._named():
            self._obstore.put(self._store, key, data, mode=mode)

    def delete(self, key: str) -> None:  # noqa: D102
        with contextlib.suppress(FileNotFoundError), self._named():
            self._obstore.delete(self._store, key)

    def list(self, folder: str = "") -> list[str]:  # noqa: D102
        with self._named():
            found = self._obstore.list(self._store, prefix=folder or None)
            return sorted(one["path"].removeprefix(f"{folder}/") for several in found for one in several)

    def make(self, *folders: str) -> None:
        """Folders need no making here, and nothing is left over in them."""

    def remove(self, folder: str) -> None:  # noqa: D102
        for key in self.list(folder):
            self.delete(f"{folder}/{key}")

    def stamp(self) -> None:
        """There is none."""

    @contextlib.contextmanager
    def writing(self) -> Iterator[str]:  # noqa: D102
        before = _words(self.get(LOCK))
        self.put(LOCK, _who())
        yield before

    def writer(self) -> str:  # noqa: D102
        return f"whether anybody is writing there is not known{_last(_words(self.get(LOCK)))}"

    @contextlib.contextmanager
    def _named(self):
        try:
            yield
        except self._obstore.exceptions.AlreadyExistsError as error:
            raise FileExistsError from error
        except self._obstore.exceptions.BaseError as error:
            raise OSError(f"{self.name}: {str(error).splitlines()[0]}") from error


class Memory(dict):
    """The same in this process's memory, for results that are not to outlast it."""

    name, make, stamp = "memory", Bucket.make, Bucket.stamp

    def create(self, key: str, data: bytes) -> bool:  # noqa: D102
        return self.setdefault(key, data) is data

    def delete(self, key: str) -> None:  # noqa: D102
        self.pop(key, None)

    def list(self, folder: str) -> list[str]:  # noqa: D102
        return sorted(key.removeprefix(f"{folder}/") for key in self if key.startswith(f"{folder}/"))


Files = Folder | Bucket | Memory


def files_at(path: PathLike) -> Folder | Bucket:
    """The files at a local path, a URL, or a store of obstore (by itself or in zarr's `ObjectStore`).

    Raises:
      ValueError: for any other store; it names the conversion.
      ImportError: for a URL, if obstore is not installed.
    """
    if isinstance(path, zarr.storage.LocalStore):
        return Folder(path.root)
    if isinstance(path, str) and "://" in path:
        try:
            import obstore.store
        except ImportError:
            raise ImportError(f"path={path!r}: URLs need obstore: pip install 'bnjax[cloud]'") from None
        try:
            return Bucket(obstore.store.from_url(path), path)
        except obstore.exceptions.BaseError as error:
            raise ValueError(f"path={path!r}: {str(error).splitlines()[0]}") from None
    if isinstance(path, str | os.PathLike):
        return Folder(path)
    inner = path.store if isinstance(path, zarr.storage.ObjectStore) else path
    if type(inner).__module__.partition(".")[0] == "obstore":
        return Bucket(inner, str(inner))
    raise ValueError(
        f"path must be a local folder, a URL or a store of obstore, where a file can be put only if there is none; "
        f"got {path!r}: give its URL, or obstore.store.from_url(URL) (obstore.store.MemoryStore() for one in memory)"
    )


def _who():
    """This process, as the lock names it."""
    return f"process {os.getpid()} on {HOST} (since {time.strftime('%Y-%m-%d %H:%M')} by its clock)".encode()


def _words(text):
    """The lock's content; empty if `_who` did not write it."""
    found = "".join(filter(str.isprintable, (text or b"")[:200].decode(errors="ignore")))
    return found if found.startswith("process ") else ""


def _last(who):
    return f"; last written by {who}" if who else ""


def _locked(file, *, exclusive):
    """True if this process has the lock now; it has if there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _write(file, data):
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _link(temporary, path):
    """Gives a file its own name; FileExistsError if there is one of that name."""
    try:
        os.link(temporary, path)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # a file system without links: names are digests, but for those of records
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        temporary.rename(path)


def _make(folder):
    """Also those above it."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(folder):
    """So that the name outlasts a loss of power, where the system lets a folder be synced."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        opened = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, opened)
        os.fsync(opened)
