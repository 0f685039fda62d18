"""What the experiment scripts share: axes as text, cores, the output folder."""

import concurrent.futures
import contextlib
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import platformdirs
import rich.progress
import xarray as xr
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from bnjax.sweeps import leases, record, storage, store

RESULTS = "results.zarr"
MOST_VALUES = 1_000_000  # on one axis


def fail(message: str) -> SystemExit:
    """The exception that ends a script with `message` on stderr and exit status 1."""
    return SystemExit(f"error: {message}")


def check_arguments(argv: list[str]) -> None:
    """Raises ValueError for what is left on the command line beside the flags."""
    if len(argv) > 1:
        raise ValueError(f"unknown argument {argv[1]!r}: everything is set by flags")


def define_distributed() -> None:
    """The flags of a run on several processes, for `prepare_process`."""
    flags.DEFINE_bool(
        "distributed", False, "Share the grid with the other processes of a jax.distributed job."
    )
    flags.DEFINE_string(
        "coordinator", None, "host:port of process 0. Default: from Slurm, a TPU pod or Open MPI."
    )
    flags.DEFINE_integer("processes", None, "How many there are. Default: likewise.", lower_bound=1)
    flags.DEFINE_integer(
        "process", None, "Which of them this one is, from 0. Default: likewise.", lower_bound=0
    )


def join_others() -> None:
    """Joins the job that the flags of `define_distributed` name, if any.

    Raises:
      ValueError: if they name it in part.
      RuntimeError: if the job cannot be joined.
    """
    values = flags.FLAGS
    given = {name: values[name].value for name in ("coordinator", "processes", "process")}
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if named and not values.distributed:
        raise ValueError(f"{', '.join(named)} without --distributed")
    if named and len(named) < 3:
        raise ValueError(
            f"--coordinator, --processes and --process belong together, got only {', '.join(named)}"
        )
    if values.distributed:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(given["coordinator"], given["processes"], given["process"])


def prepare_process() -> None:
    """What is to be set before JAX's first array, unless it is set otherwise.

    One XLA device per core on CPU; compiled programs are kept in the user's cache folder, apart for each kind of
    processor (they hold its instructions) and each jaxlib; no chatter.
    """
    logging.set_verbosity(logging.WARNING)
    if jax.config.jax_num_cpu_devices == -1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", cores)
    if jax.config.jax_compilation_cache_dir is None:
        folder = f"{record.machine()}-{record.versions()['jaxlib']}"
        jax.config.update(
            "jax_compilation_cache_dir", str(platformdirs.user_cache_path("bnjax") / "compiled" / folder)
        )


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


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[None]:
    """With `overwrite`, what is at `path` is put aside, and removed when new results are in its place, or put back."""
    aside = path.with_name(f".{path.name}.before")
    if not (overwrite and path.exists()):
        yield
        return
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
        raise
    shutil.rmtree(aside)


def is_done(path: Path) -> bool:
    """Whether all chunks of the results at `path` are committed; False if there are none."""
    with contextlib.suppress(store.Damaged):
        files = storage.Files(path, write=False)
        layout = store.read_layout(files)
        return layout is not None and len(files.list(store.LEDGER)) == len(layout.chunks())
    return False


def status_table(path: Path) -> Table:
    """What of the results at `path` is done, without training or loading any data.

    Raises:
      ValueError: if there are none.
    """
    files = storage.Files(path, write=False)
    layout = store.read_layout(files)
    if layout is None:
        raise ValueError(f"{path} holds no results of a sweep")
    entries, checkpoints = ({*files.list(folder)} for folder in (store.LEDGER, store.CHECKPOINT))
    found = Table(title=str(path), caption=_writers(files), caption_justify="left")
    for column in ("network", "cells committed", "cells", "chunks with a checkpoint"):
        found.add_column(column, justify="left" if column == "network" else "right")
    for i, name in enumerate(layout.models):
        chunks = [chunk for chunk in layout.chunks() if chunk.model == i]
        done = sum(len(chunk.cells) for chunk in chunks if chunk.key in entries)
        started = sum(chunk.key in checkpoints for chunk in chunks)
        found.add_row(name, f"{done:,}", f"{sum(len(c.cells) for c in chunks):,}", f"{started:,}")
    return found


def _writers(files: storage.Files) -> str:
    writing = [f"process {one['pid']} on {one['host']}" for one in leases.writers(files)]
    return f"being written by {', '.join(writing)}" if writing else "nobody is writing there"


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
    """Ends the process at once at Ctrl-C and SIGTERM, with status 130 and 143: JAX would first finish what is running.

    Nothing that was stored is lost: whatever is written is either whole or does not count.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch():
        # Python's own handlers wait for the main thread, which may be in a long call; this descriptor does not.
        while number := reader.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                leave(number[0])

    def leave(number):
        print(
            f"interrupted ({signal.Signals(number).name}); what was stored is kept",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + number)

    before = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(writer.fileno())
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    except KeyboardInterrupt:
        leave(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.set_wakeup_fd(before[1])
        writer.close()
        watching.join()
        reader.close()


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
      changes: {flag: value}; None: without it.
    """
    values = flags.FLAGS.get_flags_for_module(flags.FLAGS.find_module_defining_flag("out"))
    words = [flag.serialize() for flag in values if flag.present and flag.name not in changes]
    words += [f"--{name}={value}" for name, value in changes.items() if value is not None]
    return shlex.join(["python", "-m", f"experiments.{script}", *words])


def console() -> Console:
    """For tables: as wide as the terminal, and wide enough for a table where there is none."""
    found = Console()
    return found if found.is_terminal else Console(width=140)
