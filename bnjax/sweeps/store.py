"""Results on disk: labelled arrays in one Zarr group, with what made them as attributes."""

import dataclasses
import json
import os
import platform
import shutil
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec

from bnjax.sweeps.plan import Plan
from bnjax.training import TrainConfig
from bnjax.types import Hyperparams, Model
from bnjax.version import __version__


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


def circumstances(plans: Mapping[str, Plan]) -> dict[str, Any]:
    """How and with what a sweep was run: plans by network, versions."""
    return {
        "plan": {
            name: {
                "width": plan.width,
                "devices": len(plan.devices),
                "device_kind": plan.devices[0].device_kind,
            }
            for name, plan in plans.items()
        },
        "versions": {
            "bnjax": __version__,
            "python": platform.python_version(),
            **{
                name: metadata.version(name) for name in ("jax", "jaxlib", "optax", "numpy", "xarray", "zarr")
            },
        },
    }


def save(results: xr.Dataset, path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes a Zarr v3 group at `path`, with a checksum on every chunk.

    It is written beside `path` and renamed, so that there is never a part of it under that name.

    Args:
      results: from `bnjax.sweep`.
      path: a local folder, to be made.
      overwrite: replace what is at `path`; it is removed when the new results are in its place.

    Raises:
      FileExistsError: if there is something at `path`, unless `overwrite`.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    replaced = temporary.with_name(f"{temporary.name}.replaced")
    encoding = {name: {"compressors": [zarr.codecs.ZstdCodec(), Crc32cCodec()]} for name in results.variables}
    try:
        results.to_zarr(temporary, mode="w", consolidated=False, zarr_format=3, encoding=encoding)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists")
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def load(path: str | os.PathLike) -> xr.Dataset:
    """Reads what `save` wrote, into memory.

    Args:
      path: the folder.

    Raises:
      FileNotFoundError: if there are no results at `path`.
      ValueError: if a checksum does not match.
    """
    return xr.open_zarr(path, consolidated=False).load()
