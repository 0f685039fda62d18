"""Programs that JAX compiled, kept in a folder that any number of processes may use at once, and be killed in.

JAX's own cache writes an entry in place and never replaces a broken one. Here an entry is written under a temporary
name and renamed, so it is there whole or not at all; and it begins with a digest of its key and its content, for what
happens to files later. An entry that cannot be read, or not with that digest, is deleted and reported; JAX then
compiles the program again, and the entry is written anew. Nobody waits for anybody: of two processes that write an
entry at once the later one wins, and both have written the same program.

JAX has no public way to keep its entries otherwise, so `use_cache` stands in for the function with which JAX opens a
cache folder, `get_file_cache`, and leaves all folders but its own to it. Where JAX is not as expected here, or the
folder cannot be written, programs are not kept.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
import uuid
from importlib import metadata
from pathlib import Path

import jax
import platformdirs

log = logging.getLogger("bnjax")

DIGEST = 32  # bytes
PARTIAL = ".partial"  # ends the name of a file until it is whole
DAY = 24 * 3600
ISA = ("avx512f", "avx2", "avx", "asimd")  # what decides which instructions XLA uses, best first
CPU_KIND = ("model name", "stepping", "flags", "cpu implementer", "cpu part", "cpu variant", "features")

# LLVM's levels above 1 took 1.5 to 1.8 times the compile time, and gave programs of the same speed
# (0.96 to 1.05 times, five networks; products and sums are library calls).
CPU_OPTIONS = {"xla_backend_optimization_level": 1}


def options(platform: str | None = None) -> dict[str, int] | None:
    """The compiler's, on such a device; None: the default one."""
    return dict(CPU_OPTIONS) if (platform or jax.default_backend()) == "cpu" else None


def use_cache(folder: Path | None = None) -> None:
    """Has JAX keep compiled programs in `folder`, unless the user has set JAX's cache. Never an error.

    May be called before JAX's first array or after, and again: the first folder remains. JAX's settings say which
    programs are worth it: by default those that take a second to compile.

    Args:
      folder: default: in the user's cache folder, apart for each kind of processor (programs hold its instructions),
        each jaxlib and each Python (its libraries decide how JAX compresses programs).
    """
    try:
        if jax.config.jax_compilation_cache_dir is None and jax.config.jax_compilation_cache_max_size == -1:
            _install((folder or _default_folder()).absolute())
    except Exception as error:  # whatever it is, programs can be compiled without a cache
        log.debug("compiled programs are not kept: %s", error)


@functools.cache
def processor() -> dict[str, str]:
    """The system's description of the first core; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:  # only Linux has this file
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in lines}


def isa() -> str:
    """The machine's architecture, and of the vector instructions known here the widest that it has."""
    words = processor().get("flags", processor().get("features", "")).split()
    return " ".join([platform.machine(), *[name for name in ISA if name in words][:1]])


@functools.cache
def machine() -> str:
    """A digest of the kind of processor: programs compiled here run where it is the same."""
    known = [platform.machine(), platform.system(), platform.processor()]
    known += [processor().get(name, "") for name in CPU_KIND]
    return hashlib.blake2b("\n".join(known).encode(), digest_size=8).hexdigest()


class Entries:
    """Bytes by key, each in a file of `folder`, with the methods that JAX calls."""

    def __init__(self, folder: Path):
        self._path = folder  # JAX's own name for it

    def get(self, key: str) -> bytes | None:
        """The value that was put, or None if none was, or if it is damaged."""
        file = self._file(key)
        try:
            entry = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            entry = b""
        digest, value = entry[:DIGEST], entry[DIGEST:]
        if digest == _digest(key, value):
            return value
        try:
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
            log.warning("%s could not be read: it was deleted, and the program is compiled again", file)
        except OSError as error:  # as good as none, and no use in saying so each time
            log.debug("%s cannot be read, nor deleted: %s", file, error)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Replaces what is there, in one stroke, or leaves it if that fails, as on a full disk."""
        partial = self._path / f"{uuid.uuid4().hex}{PARTIAL}"
        try:
            partial.write_bytes(_digest(key, value) + value)
            os.replace(partial, self._file(key))
        except OSError as error:
            log.debug("a compiled program is not kept: %s", error)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self._path / key[-100:]  # a key ends in a hash of 64 digits, after a name of any length


def _digest(key: str, value: bytes) -> bytes:
    digest = hashlib.blake2b(key.encode(), digest_size=DIGEST)
    digest.update(value)
    return digest.digest()


def _default_folder() -> Path:
    kind = f"{machine()}-{metadata.version('jaxlib')}-{sys.implementation.cache_tag}"
    return platformdirs.user_cache_path("bnjax") / "compiled" / kind


def _install(folder: Path) -> None:
    from jax._src import compilation_cache as of_jax  # private: `use_cache` catches what may be wrong with it

    entries = type("Cache", (Entries, of_jax.CacheInterface), {})(folder)  # fails if JAX asks for more methods
    get_file_cache = of_jax.get_file_cache
    _open(folder)
    of_jax.get_file_cache = lambda path: (entries, path) if path == str(folder) else get_file_cache(path)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _open(folder: Path) -> None:
    """Makes the folder, and deletes what killed processes left in it; an OSError if it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    for partial in folder.glob(f"*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > DAY:
                partial.unlink()
