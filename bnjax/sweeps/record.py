"""What made a set of results: what was computed, on what data, how, and with which versions.

Two runs with the same `describe` compute the same cells. What may change their last bits is in `circumstances`.
"""

import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnjax.sweeps.plan import Plan
from bnjax.training import TrainConfig
from bnjax.types import Dataset, Hyperparams, Model
from bnjax.version import __version__

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "xarray", "zarr")
ISA = ("avx512f", "avx2", "avx", "asimd")  # what decides which instructions XLA uses, best first


def describe(
    models: Mapping[str, Model], config: TrainConfig, hyper: Hyperparams, axes: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What a sweep computes, but for its data, as JSON holds it.

    Args:
      models: {name: network}, told apart by their `config`.
      config: what is the same for all cells.
      hyper: the hyperparameters that are not swept; those that are, are left out.
      axes: from `bnjax.sweeps.grid.check`.

    Raises:
      TypeError: if a model's config holds something that JSON cannot.
    """
    description = {
        "models": {name: dict(model.config) for name, model in models.items()},
        "config": dataclasses.asdict(config),
        "hyper": {name: np.asarray(v).item() for name, v in hyper._asdict().items() if name not in axes},
        "axes": {name: values.tolist() for name, values in axes.items()},
    }
    return json.loads(json.dumps(description))


def computes(model: Model, ds: Dataset, config: TrainConfig) -> str:
    """A digest of what the network computes, as the compiler is given it: a `config` may not say all of it.

    Only to be compared with the same versions, kind of device and batch size.
    """
    return _computes(model.init, model.apply, (config.batch_size, *ds.train_x.shape[1:]), ds.train_x.dtype)


@functools.lru_cache(maxsize=16)
def _computes(init, apply, shape, dtype):
    def outputs(x):
        network, batch_stats = init(jax.random.key(0), x.shape[1:], 1.0)
        return [apply(network, batch_stats, x, train=train) for train in (True, False)]

    text = jax.jit(outputs).lower(jax.ShapeDtypeStruct(shape, dtype)).as_text()
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fingerprint(ds: Dataset) -> str:
    """A digest of the data's values, shapes and types."""
    digest = hashlib.blake2b(digest_size=16)
    for array in ds:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.shape}{array.dtype.str}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def circumstances(plans: Mapping[str, Plan]) -> dict[str, Any]:
    """How and with what a sweep was run: plans by network, versions, code, kind of processor."""
    device = next(iter(plans.values())).devices[0]
    return {
        "plan": {name: plan.as_dict() for name, plan in plans.items()},
        "versions": versions(),
        "device": {"kind": device.device_kind, "isa": isa() if device.platform == "cpu" else ""},
    }


def versions() -> dict[str, str]:
    """Of the package, its code and what it rests on."""
    return {
        "bnjax": __version__,
        "code": code(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


@functools.cache
def code() -> str:
    """A digest of the package's own source, but for what only draws or stores."""
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in ("sweeps", "data", "interop", "theory") and name.name != "plots.py":
            digest.update(f"{name.as_posix()}\n".encode() + path.read_bytes())
    digest.update((root / "sweeps" / "program.py").read_bytes())
    return digest.hexdigest()


@functools.cache
def isa() -> str:
    """The machine's architecture, and of the vector instructions known here the widest that it has."""
    words = _processor().get("flags", _processor().get("features", "")).split()
    return " ".join([platform.machine(), *[name for name in ISA if name in words][:1]])


@functools.cache
def machine() -> str:
    """A digest of all that is known of the processor but its speed: where programs compiled here may run."""
    found = _processor()
    known = [platform.machine(), platform.system(), platform.processor()]
    known += [found.get(name, "") for name in ("model name", "stepping", "flags", "features")]
    return hashlib.blake2b("\n".join(known).encode(), digest_size=8).hexdigest()


def processor() -> str:
    """The processor's name, if it says."""
    return _processor().get("model name", "processor")


def _processor() -> dict[str, str]:
    """What the system says of the first core; nothing where it does not."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in lines}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """`name.key: old there, new asked for`, for each leaf in which two JSON values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = {**old, **new}
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if old == new else [f"{name}: {_short(old)} there, {_short(new)} asked for"]


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
