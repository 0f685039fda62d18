"""Bytes by key, in whatever a store of results is kept in: a folder, behind a URL, in memory."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import zarr
from zarr.buffer import default_buffer_prototype
from zarr.core.sync import sync

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial$")  # how zarr calls a file in a folder until it is whole
StoreLike = str | os.PathLike | zarr.abc.store.Store


class Files:
    """Bytes by key, in a folder, behind a URL, or in any store of zarr; None: in memory."""

    def __init__(self, where: StoreLike | None, *, write: bool = True):
        if where is None:
            self.store = zarr.storage.MemoryStore()
        elif isinstance(where, zarr.abc.store.Store):
            self.store = where
        elif "://" in str(where):
            self.store = zarr.storage.FsspecStore.from_url(str(where), read_only=not write)
        else:
            self.store = zarr.storage.LocalStore(Path(where).expanduser(), read_only=not write)
        self.local = Path(self.store.root) if isinstance(self.store, zarr.storage.LocalStore) else None
        self.name = str(where)

    def _absent(self) -> bool:
        return self.local is not None and not self.local.exists()

    def get(self, key: str) -> bytes | None:
        """The bytes, or None if there are none."""
        if self._absent():
            return None
        found = sync(self.store.get(key, default_buffer_prototype()))
        return None if found is None else found.to_bytes()

    def put(self, key: str, value: bytes) -> None:
        """Replaces them; in a folder in one stroke."""
        with self.named():
            sync(self.store.set(key, default_buffer_prototype().buffer.from_bytes(value)))

    def put_new(self, key: str, value: bytes) -> None:
        """Only if there are none."""
        with self.named():
            sync(self.store.set_if_not_exists(key, default_buffer_prototype().buffer.from_bytes(value)))

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Errors of the system, such as of a full disk, say where."""
        try:
            yield
        except OSError as error:
            if error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror or str(error), self.name) from error

    @contextlib.contextmanager
    def alone(self, folder: str) -> Iterator[None]:
        """One process at a time, if it is a folder of a file system."""
        if self.local is None or fcntl is None:
            yield
            return
        with self.named():
            (self.local / folder).mkdir(parents=True, exist_ok=True)
        with exclusive(self.local / folder):
            yield

    def delete(self, key: str) -> None:
        """Also if there are none."""
        sync(self.store.delete(key))

    def list(self, folder: str = "") -> list[str]:
        """The keys in it, without it, but for files that a process is writing, or left when it died."""
        if self._absent():
            return []
        prefix = f"{folder}/" if folder else ""

        async def collect():
            return [key async for key in self.store.list_prefix(prefix)]

        return sorted(key[len(prefix) :] for key in sync(collect()) if not PARTIAL.search(key))


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One process at a time, where the system has such locks."""
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
