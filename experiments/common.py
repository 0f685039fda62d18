"""What the experiment scripts share: axes as text, cores, the output folder."""

import concurrent.futures
import contextlib
import math
import os
import shlex
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.progress
import xarray as xr
from absl import flags, logging
from rich.console import Console

from bnjax.sweeps import store
from bnjax.types import History

RESULTS = "results.zarr"
MOST_VALUES = 1_000_000  # on one axis


def fail(message: str) -> SystemExit:
    """The exception that ends a script with `message` on stderr and exit status 1."""
    return SystemExit(f"error: {message}")


def check_arguments(argv: list[str]) -> None:
    """Raises ValueError for what is left on the command line beside the flags."""
    if len(argv) > 1:
        raise ValueError(f"unknown argument {argv[1]!r}: everything is set by flags")


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
    if not (0 < low < high < math.inf) or not 2 <= count <= MOST_VALUES:
        raise ValueError(
            f"--{flag}: a range needs 0 < low < high and a count in [2, {MOST_VALUES}], got {text!r}"
        )
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
            seeds = range(start, stop)
        elif "," in text:
            seeds = [int(part) for part in text.split(",")]
        else:
            seeds = range(int(text))
    except ValueError:
        seeds = []
    if not 1 <= len(seeds) <= MOST_VALUES:
        raise ValueError(
            f"--{flag} takes a count '5', a range '0:5' or a list '0,1,2' of 1 to {MOST_VALUES} seeds, got {text!r}"
        )
    return list(seeds)


def finished_results(folder: Path, asked: Mapping[str, Any], *, overwrite: bool) -> xr.Dataset | None:
    """Makes the output folder ready: results in it that are just what is asked for, or None for a free place.

    Args:
      folder: made if need be.
      asked: attributes that the results must have.
      overwrite: whatever is there may go.

    Raises:
      OSError: if the folder cannot be written.
      ValueError: if something else is there, or what is there is damaged; it says in what the results differ.
    """
    check_writable(folder)
    if overwrite:
        return None
    if not (folder / RESULTS).exists():
        if any(folder.iterdir()):
            raise ValueError(
                f"--out={folder} is not empty and holds no {RESULTS}; choose another, or --overwrite"
            )
        return None
    try:
        found = store.load(folder / RESULTS)
        missing = {*History._fields} - {*found.data_vars}
        if missing or found.isnull().any().to_array().any():
            raise ValueError(f"without {', '.join(sorted(missing)) or 'some of its chunks'}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / RESULTS} is damaged ({error}); choose another --out, or --overwrite"
        ) from error
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


def check_writable(folder: Path) -> None:
    """Makes the folder, and raises OSError naming it if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out={folder} cannot be written: {error.strerror or error}") from None


def save(results: xr.Dataset, folder: Path, *, overwrite: bool) -> Path:
    """Saves the results in the folder and returns where; beside what another run put there meanwhile."""
    path = folder / RESULTS
    try:
        store.save(results, path, overwrite=overwrite)
    except FileExistsError:
        path = folder / f"{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}"
        store.save(results, path)
        print(
            f"Another run has finished in {folder} meanwhile; these results go to {path.name}.",
            file=sys.stderr,
        )
    return path


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ends the process at once at Ctrl-C, with status 130: JAX would first wait for the chunk that is running."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)


def in_threads(
    function: Callable[[Any], Any], arguments: Sequence[Any], description: str, count: int
) -> list[Any]:
    """[function(argument)], `count` at a time, in order; with a progress bar on a terminal's standard error."""
    bar = Console(stderr=True)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        found = pool.map(function, arguments)
        return list(
            rich.progress.track(
                found, description, total=len(arguments), console=bar, disable=not bar.is_terminal
            )
        )


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
