"""Whole data sets as plain Zarr v3, which xarray opens: saved at once, or exported by a sweep; and the earlier format.

`save` writes beside the place and renames. If that is cut off, what stood there is in `.NAME.replaced`.
"""

import json
import logging
import math
import os
import shutil
import uuid
import warnings
import zlib
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from zarr.core.sync import sync

from bnjax.sweeps.files import Files, Folder

log = logging.getLogger("bnjax")

COMPRESSORS = (zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec())
EARLIER = {"layout", "checksum"}  # the attributes of a sweep's root in the earlier format


class Damaged(ValueError):
    """Stored results that are not what was stored."""


def save(results: xr.Dataset, path: str | Path | zarr.abc.store.Store, *, overwrite: bool = False) -> None:
    """Writes a Zarr v3 group at `path` at once, with a checksum on every chunk.

    In a folder it is written beside `path` and renamed, so that there is never a part of it under that name.

    Args:
      results: from `bnjax.sweep`, or any other.
      path: a local folder, to be made; or a zarr store.
      overwrite: replace what is at `path`; it is removed when the new results are in its place. Where `path` is a
        symbolic link, that is the folder that it points to.

    Raises:
      FileExistsError: if there is something at `path`, unless `overwrite`.
    """
    if isinstance(path, zarr.abc.store.Store) and not isinstance(path, zarr.storage.LocalStore):
        if not overwrite and not sync(path.is_empty("")):
            raise FileExistsError(f"{path} is not empty")
        _write(results, path)
        return
    path = path.root if isinstance(path, zarr.storage.LocalStore) else path
    path = Path(path).expanduser().resolve()
    if (path.exists() or aside(path).exists()) and not overwrite:
        raise FileExistsError(f"{path} exists")
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        _write(results, new)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists")
        replace(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def replace(new: Path, path: Path) -> None:
    """Puts the folder `new` in the place of `path`, which is removed; all is as before if that fails."""
    old = aside(path)
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


def aside(path: Path) -> Path:
    """Where the results at `path` are until others are in their place; `place_of` finds them there."""
    path = Path(os.path.realpath(path))  # a link is followed, as by `save`; one to itself is not
    return path.with_name(f".{path.name}.replaced")


def place_of(files: Files) -> Files:
    """Where the results are that belong there: aside, if `replace` was cut off."""
    if isinstance(files, Folder) and not files.root.exists() and aside(files.root).exists():
        return Folder(aside(files.root))
    return files


def write(results: xr.Dataset, files: Files) -> None:
    """Writes the results for `xarray.open_zarr` where the sweep is, unless they stand there; nobody here reads them."""
    written = {}
    _write(results, zarr.storage.MemoryStore(written))
    root = written.pop("zarr.json")
    written = {key: value.to_bytes() for key, value in [*written.items(), ("zarr.json", root)]}
    # A group of its own, so that zarr takes no offence at the folder; it says what is to be there.
    found = blake2b(b"".join(written.values()), digest_size=16).hexdigest()
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"digest": found}}
    written = {"bnjax/zarr.json": json.dumps(group).encode()} | written
    wrong = [key for key, value in written.items() if files.get(key) != value]
    if wrong and "bnjax/zarr.json" not in wrong:
        log.warning("%s: the export is not whole (%s); it is written again", files.name, ", ".join(wrong[:5]))
    if wrong:
        remove(files)
        for key, value in written.items():  # the root last: until then there is no export
            files.put(key, value)


def remove(files: Files) -> None:
    """Removes the plain Zarr at the root, and what the earlier format kept beside it."""
    for key in ("zarr.json", "bnjax/zarr.json"):
        files.delete(key)
    for key in files.list():
        if key.count("/") == 1 and key.endswith("/zarr.json") and not key.startswith("bnjax/"):
            files.remove(key.partition("/")[0])
    for folder in ("ledger", "checkpoint", "lease"):
        files.remove(f"bnjax/{folder}")


def check_place(files: Files, *of_a_sweep: str) -> None:
    """Raises ValueError if what is there is neither a sweep's (in those folders) nor plain Zarr."""
    if isinstance(files, Folder) and files.root.is_file():
        raise ValueError(f"{files.name} is a file: choose a new folder, or one that holds results of a sweep")
    if (before := place_of(files)) is not files:
        raise ValueError(
            f"{files.name} was being replaced when that was cut off: what it held is in {before.name}; "
            "rename it back, or remove it"
        )
    if any(map(files.list, of_a_sweep)) or stands(files):
        return
    if any(not key.startswith("bnjax/") for key in files.list()):
        raise ValueError(f"{files.name} is not empty, and holds no results of a sweep: choose another place")


def stands(files: Files) -> bool:
    """True if there is a plain Zarr at the root, or the rest of one of a sweep."""
    return any(files.get(key) is not None for key in ("zarr.json", "bnjax/zarr.json"))


def of_others(files: Files) -> bool:
    """True if the plain Zarr at the root is no export: saved at once, or a sweep's in the earlier format."""
    return files.get("zarr.json") is not None and b'"attributes": {"digest"' not in (
        files.get("bnjax/zarr.json") or b""
    )


def load(files: Files) -> xr.Dataset:
    """The results of `save`, of `export`, or of a sweep in the earlier format: then with `done` where not all is.

    Raises:
      FileNotFoundError: if there is nothing.
      Damaged: if what is there is not what was stored.
    """
    try:
        with warnings.catch_warnings():  # what a killed process left of a write is not part of it
            warnings.filterwarnings("ignore", r"Object at .* is not recognized")
            found = xr.open_zarr(files.store, consolidated=False, zarr_format=3).load()
        return _of_the_earlier_format(found, files) if found.attrs.keys() >= EARLIER else found
    except (Damaged, PermissionError):
        raise
    except Exception as error:  # whatever xarray, zarr, its codecs and the file system raise for a damaged file
        if isinstance(error, FileNotFoundError) and not stands(files):
            raise FileNotFoundError(f"no results at {files.name}") from None
        raise Damaged(f"{files.name} is damaged: {first_line(error)}") from error


def _of_the_earlier_format(found, files):
    """Chunks count whose entry in the ledger stands; it holds the digest of their values."""
    checksum = found.attrs.pop("checksum")
    if checksum != zlib.crc32(json.dumps(found.attrs, sort_keys=True).encode()):
        raise Damaged(f"{files.name} is damaged: the attributes are not what was stored")
    layout = found.attrs.pop("layout")
    found = found.transpose("model", *layout["axes"], ...) if layout["labelled"] else found
    shape, tile = [len(values) for values in layout["axes"].values()], layout["tile"]
    values = {name: np.array(found[name].values) for name in layout["variables"]}
    for model in range(len(layout["models"])):
        for number, index in enumerate(np.ndindex(*(-(-n // k) for n, k in zip(shape, tile, strict=True)))):
            region = [slice(i * k, min((i + 1) * k, n)) for i, k, n in zip(index, tile, shape, strict=True)]
            region = (*([model] if layout["labelled"] else []), *region)
            entry = files.get(f"bnjax/ledger/{model}.{number}")
            if entry is None:
                for value in values.values():
                    value[region] = nothing(value.dtype)
            elif entry != _digest({name: value[region] for name, value in values.items()}):
                raise Damaged(f"{files.name} is damaged: chunk {model}.{number} is not what was stored")
    for name, value in values.items():
        found[name].values = value
    return found.drop_vars("done") if found.done.all() else found


def _digest(values: Mapping[str, np.ndarray]) -> bytes:
    found = blake2b(digest_size=16)
    for name in sorted(values):
        array = np.ascontiguousarray(values[name])
        found.update(f"{name}{array.shape}{array.dtype.str}".encode() + array.tobytes())
    return found.hexdigest().encode()


def nothing(dtype: np.dtype | str) -> float | bool | int:
    """The value of cells that are not done."""
    return {"f": math.nan, "b": False}.get(np.dtype(dtype).kind, -1)


def first_line(error: Exception) -> str:
    """Its first line, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _write(results, store):
    # Of texts, Zarr v3 specifies those of any length, as objects are written; numpy's have a fixed one.
    texts = {name: one.astype(object) for name, one in results.variables.items() if one.dtype.kind == "U"}
    results = results.assign(texts)
    encoding = {name: {"compressors": COMPRESSORS} for name in results.variables}
    results.to_zarr(store, mode="w", consolidated=False, zarr_format=3, encoding=encoding)
