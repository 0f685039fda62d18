"""The origin of a set of results. Cells are known by `identity`; the rest says in words in what two sweeps differ."""

import dataclasses
import functools
import hashlib
import json
import platform
import textwrap
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnjax import compilation
from bnjax.training import TrainConfig
from bnjax.types import Dataset, Hyperparams, Model
from bnjax.version import __version__

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "xarray", "zarr")


def describe(
    models: Mapping[str, Model],
    config: TrainConfig,
    axes: Iterable[str],
    hyper: Hyperparams,
    device: jax.Device,
    data: str,
    about: Mapping[str, Any],
    kernels: Mapping[str, Any],
) -> dict[str, Any]:
    """A sweep's computation, on data of that `fingerprint`, and its environment; `about`: further attributes.

    Raises:
      ValueError: if `about` has a name that is taken, or it or a network's config has what JSON does not hold.
    """
    found = {
        "models": {name: dict(model.config) for name, model in models.items()},
        "config": {one.name: _in_words(getattr(config, one.name)) for one in dataclasses.fields(config)},
        "hyper": {name: np.asarray(v).item() for name, v in hyper.named().items() if name not in axes},
        "versions": versions(),
        "device": _kind(device),
        "kernels": kernels,
    }
    if taken := {*found, "plan", "identity", "changes"} & {*about}:
        raise ValueError(f"about must not have {sorted(taken)}, which results have anyway")
    try:
        found |= dict(about) | {"data": {"fingerprint": data} | dict(about.get("data", {}))}
        return json.loads(json.dumps(found))
    except (TypeError, ValueError) as error:
        raise ValueError(f"about and the networks' config must be what JSON holds: {error}") from None


def identity(program: str, data: str, device: jax.Device) -> str:
    """A digest of what decides a cell's results, but for its hyperparameters and the width.

    It is of the program of one cell as the compiler is given it, with its probe (`Trainer.text`), of the data
    (its `fingerprint`), of jaxlib and of the kind of processor.
    """
    parts = [program, data, metadata.version("jaxlib"), *_kind(device).values()]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=12).hexdigest()


def fingerprint(ds: Dataset) -> str:
    """A digest of the data's values, shapes and types."""
    digest = hashlib.blake2b(digest_size=16)
    for array in ds:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.shape}{array.dtype.str}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _in_words(value):
    """A function's name; what it computes is part of the identity. Numbers of NumPy as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value


def _kind(device):
    return {"kind": device.device_kind, "isa": compilation.isa() if device.platform == "cpu" else ""}


def versions() -> dict[str, str]:
    """Of the package, its code and what it rests on."""
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"bnjax": __version__, "code": _code(), "python": platform.python_version(), **found}


@functools.cache
def _code():
    """A digest of the package's own source."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.blake2b(b"".join(path.read_bytes() for path in files), digest_size=8).hexdigest()


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """`name.key: old there, new asked for`, for each leaf in which two JSON values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = {key: f"{name}.{key}" if name else str(key) for key in {**old, **new}}
        return [line for key in names for line in differences(old.get(key), new.get(key), names[key])]
    short = ["nothing" if value is None else textwrap.shorten(str(value), 60) for value in (old, new)]
    return [] if old == new else [f"{name}: {short[0]} there, {short[1]} asked for"]
