"""What the experiment scripts share: axes as text, cores, the output folder."""

import math
import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
from absl import flags, logging
from rich.console import Console

from bnjax.sweeps import store

RESULTS = "results.zarr"


def fail(message: str) -> SystemExit:
    """The exception that ends a script with `message` on stderr and exit status 1."""
    return SystemExit(f"error: {message}")


def prepare_process() -> None:
    """One XLA device per core on CPU, unless set otherwise; no chatter. To be called before JAX's first array."""
    logging.set_verbosity(logging.WARNING)
    if jax.config.jax_num_cpu_devices == -1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", cores)


def parse_floats(flag: str, text: str) -> list[float]:
    """`0.1,1,10`, or `1e-4:1e4:17` for 17 values from 1e-4 to 1e4, evenly spaced in the logarithm.

    Raises:
      ValueError: naming the flag, for any other text.
    """
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        low, high, count = text.split(":")
        low, high, count = float(low), float(high), int(count)
    except ValueError:
        raise ValueError(
            f"--{flag} takes numbers '0.1,1,10' or a range 'low:high:count', got {text!r}"
        ) from None
    if not (0 < low < high < math.inf) or count < 2:
        raise ValueError(f"--{flag}: a range needs 0 < low < high and a count of at least 2, got {text!r}")
    exponents = np.linspace(math.log10(low), math.log10(high), count)
    return [float(f"{10**e:.6g}") for e in exponents]


def parse_seeds(flag: str, text: str) -> list[int]:
    """`5` for seeds 0 to 4, `10:15` for 10 to 14, `3,1,4` for just these.

    Raises:
      ValueError: naming the flag, for any other text.
    """
    try:
        if ":" in text:
            start, stop = (int(part) for part in text.split(":"))
            seeds = list(range(start, stop))
        elif "," in text:
            seeds = [int(part) for part in text.split(",")]
        else:
            seeds = list(range(int(text)))
    except ValueError:
        seeds = []
    if not seeds:
        raise ValueError(
            f"--{flag} takes a count '5', a range '0:5' or a list '0,1,2' of seeds, got {text!r}"
        )
    return seeds


def parse_ints(flag: str, text: str) -> list[int]:
    """`128,128`; an empty text gives an empty list.

    Raises:
      ValueError: naming the flag, for any other text.
    """
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"--{flag} takes whole numbers '128,128', got {text!r}") from None


def finished_results(folder: Path, asked: Mapping[str, Any], *, overwrite: bool) -> xr.Dataset | None:
    """Makes the output folder ready: results in it that are just what is asked for, or None for a free place.

    Args:
      folder: made if need be.
      asked: attributes that the results must have.
      overwrite: whatever is there may go.

    Raises:
      OSError: if the folder cannot be written.
      ValueError: if something else is there; it says in what the results there differ.
    """
    _check_writable(folder)
    if overwrite:
        return None
    if not (folder / RESULTS).exists():
        if any(folder.iterdir()):
            raise ValueError(
                f"--out={folder} is not empty and holds no {RESULTS}; choose another, or --overwrite"
            )
        return None
    found = store.load(folder / RESULTS)
    different = [name for name in asked if found.attrs.get(name) != asked[name]]
    if different:
        changes = "; ".join(f"{name}: {_changes(found.attrs.get(name), asked[name])}" for name in different)
        raise ValueError(f"--out={folder} holds other results ({changes}); choose another, or --overwrite")
    return found


def _changes(old: Any, new: Any) -> str:
    """`key: old -> new` for what differs between two JSON values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return ", ".join(f"{key} {_changes(old.get(key), new.get(key))}" for key in keys)
    return f"{_short(old)} there, {_short(new)} asked for"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_writable(folder: Path) -> None:
    """Makes the folder, and raises OSError naming it if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out={folder} cannot be written: {error.strerror or error}") from None


def command(script: str, **changes: Any) -> str:
    """The command line of this run, with `changes` to its flags.

    Args:
      script: its name; it is the module that defines the flag --out.
      changes: {flag: value}.
    """
    values = flags.FLAGS.get_flags_for_module(flags.FLAGS.find_module_defining_flag("out"))
    words = [flag.serialize() for flag in values if flag.present and flag.name not in changes]
    words += [f"--{name}={value}" for name, value in changes.items()]
    return shlex.join(["python", "-m", f"experiments.{script}", *words])


def console() -> Console:
    """For tables: as wide as the terminal, and wide enough for a table where there is none."""
    found = Console()
    return found if found.is_terminal else Console(width=140)
