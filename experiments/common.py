"""Shared by the experiment scripts: axes as text, cores, the output folder."""

import concurrent.futures
import contextlib
import json
import math
import os
import queue
import re
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.progress
import xarray as xr
from absl import flags, logging
from rich.console import Console

from bnjax import compilation, export
from bnjax.sweeps.progress import LINE_SECONDS

RESULTS = "results.zarr"
NORM_NAMES = {
    "batch": "BN",
    "layer": "LayerNorm",
    "group": "GroupNorm",
    "rms": "RMSNorm",
    "l1": "l1 norm",
    "linf": "l-infinity norm",
    "weight": "weight norm",
    "weight_standardized": "weight standardization",
    "none": "no norm",
}
MOST_VALUES = 1_000_000  # on one axis


def fail(message: str) -> SystemExit:
    """The exception that ends a script with `message` on stderr and exit status 1."""
    return SystemExit(f"error: {message}")


def check_arguments(argv: list[str]) -> None:
    """Raises ValueError for what is left on the command line beside the flags, and for too large integers in these."""
    if len(argv) > 1:
        raise ValueError(f"unknown argument {argv[1]!r}: everything is set by flags")
    for name in flags.FLAGS:
        check_size(name, flags.FLAGS[name].value)


def check_size(flag: str, value: Any) -> None:
    """Raises ValueError, naming the flag, for an integer that compiled programs cannot hold."""
    if isinstance(value, int) and not -(2**31) <= value < 2**31:
        raise ValueError(f"--{flag} must be in [-2^31, 2^31), got {value}")


def define_distributed() -> None:
    """The flags of a run on several processes, for `prepare_process`."""
    flags.DEFINE_bool("distributed", False, "Share the grid with the other processes of a jax.distributed job.")
    flags.DEFINE_string("coordinator", None, "host:port of process 0. Default: from Slurm, a TPU pod or Open MPI.")
    flags.DEFINE_integer(
        "processes", None, "Processes in the distributed job. Default: as for --coordinator.", lower_bound=1
    )
    flags.DEFINE_integer(
        "process", None, "Number of this process in the job, from 0. Default: as for --coordinator.", lower_bound=0
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
        raise ValueError(f"--coordinator, --processes and --process belong together, got only {', '.join(named)}")
    if values.distributed:
        jax.distributed.initialize(given["coordinator"], given["processes"], given["process"])


def prepare_process() -> None:
    """Sets up JAX before its first array, where the user has not.

    One XLA device per core on CPU; compiled programs are kept in the user's cache folder; no chatter.
    """
    logging.set_verbosity(logging.WARNING)
    if jax.config.jax_num_cpu_devices == -1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", cores)
    compilation.use_cache()


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
        raise ValueError(f"--{flag} takes numbers '0.1,1,10' or a range 'low:high:count', got {text!r}") from None
    if not (0 < low < high < math.inf) or not 2 <= count <= MOST_VALUES:
        raise ValueError(f"--{flag}: a range needs 0 < low < high and a count in [2, {MOST_VALUES}], got {text!r}")
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
    if not seeds or seeds[MOST_VALUES:]:  # a range's len() may overflow
        raise ValueError(
            f"--{flag} takes a count '5', a range '0:5' or a list '0,1,2' of 1 to {MOST_VALUES} seeds, got {text!r}"
        )
    return list(seeds)


def pooled(images: np.ndarray, side: int) -> np.ndarray:
    """Means of images [N, H, W, C] over squares of `side` pixels a side, which divides both."""
    n, height, width, channels = images.shape
    squares = np.asarray(images).reshape(n, height // side, side, width // side, side, channels)
    return squares.mean((2, 4))


def check_writable(folder: Path) -> None:
    """Makes the folder, and raises OSError naming it if nothing can be written there; ValueError for a URL."""
    if re.match(r"\w{2,}:/", str(folder)):
        raise ValueError(f"--out={folder} must be a local folder (bnjax.sweep takes a bucket as its path)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out={folder} cannot be written: {error.strerror or error}") from None


def maker(path: Path) -> str | None:
    """The script that made the results, figure or table at `path`, by its own account; None: it does not say."""
    try:
        if path.is_dir() and (path / "zarr.json").is_file():
            words = _made_by(json.loads((path / "zarr.json").read_bytes())["attributes"]["command"])
        elif path.is_file():  # a pipe would block
            with path.open("rb") as file:
                words = file.read(1000).decode("latin-1")
        else:
            return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    found = re.search(r"(?:made by `|\"command\": \")python -m experiments\.(\w+)[ `\"]", words)
    return found and found[1]


def _made_by(command: str) -> str:
    return f"made by `{command}`"


def _obstacle(path: Path, script: str, overwrite: bool) -> str:
    """The thing at `path` that the script may not replace, in words; empty: there is none."""
    target = Path(os.path.realpath(path))
    aside = export.aside(target)  # a sweep's results are only there, if it died while it replaced them
    for name, one in ((path.name, target), (aside.name, aside)):
        made_by = maker(one)
        if os.path.lexists(one) and not (overwrite and made_by == script):
            origin = f"made by experiments.{made_by}" if made_by else "which does not say what made it"
            return f"{name}, {origin}"
    return ""


def check_out(folder: Path, script: str, *names: str, overwrite: bool = True) -> None:
    """Makes the folder for these results, figures and tables of a script, which `save` is to put there.

    Args:
      folder: --out.
      script: its name.
      *names: of all that it may write.
      overwrite: whether it may replace what it made itself; it never replaces anything else.

    Raises:
      OSError: if they cannot be written.
      ValueError: if something stands there that it may not replace.
    """
    check_writable(folder)
    for path in (folder / name for name in names):
        check_writable(Path(os.path.realpath(path)).parent)
        if found := _obstacle(path, script, overwrite):
            own = "what it made" if overwrite else "what it made, with --overwrite"
            raise ValueError(
                f"--out={folder} holds {found}; experiments.{script} replaces only {own}. Choose another folder"
            )


def save(what: Any, path: Path, script: str, *, overwrite: bool = True) -> Path:
    """Puts results, a figure or a table where `check_out` allowed it, with the script's command.

    Args:
      what: an xarray.Dataset, a matplotlib figure, Markdown or what JSON holds.
      path: where; what a symbolic link points to, if it is one.
      script: its name.
      overwrite: as for `check_out`.

    Returns:
      `path`, or another beside it, if something that the script may not replace has come there meanwhile.
    """
    target = Path(os.path.realpath(path))
    new = target.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    made_by = command(script)
    move = os.replace
    if isinstance(what, xr.Dataset):
        export.save(what.assign_attrs(command=made_by), new)
        move = export.replace
    elif isinstance(what, dict):
        new.write_text(json.dumps({"command": made_by, **what}, indent=1, ensure_ascii=False) + "\n")
    elif isinstance(what, str):
        new.write_text(f"<!-- {_made_by(made_by)} -->\n\n{what}")
    else:
        what.savefig(new, metadata={"Description": _made_by(made_by)})
    if found := _obstacle(target, script, overwrite):
        print(f"{target.parent} now holds {found}: this run's is {new}", file=sys.stderr)
        return new
    move(new, target)
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
            if number[0] in signals:
                name = signal.Signals(number[0]).name
                print(f"interrupted ({name}); what was stored is kept", file=sys.stderr, flush=True)
                os._exit(128 + number[0])

    # A KeyboardInterrupt beside it would show a traceback. A signal that the shell has ignored stays so.
    signals = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    handlers, wakeup = {n: signal.signal(n, lambda *_: None) for n in signals}, signal.set_wakeup_fd(writer.fileno())
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()
        watching.join()
        reader.close()


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[], None]]:
    """A function to call after each of `total` parts; the time left is shown on standard error.

    On a terminal that is a bar, elsewhere a line a minute.
    """
    console = Console(stderr=True)
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task, start = bar.add_task(description, total=total), time.monotonic()
    last = start

    def tick():
        nonlocal last
        bar.advance(task)
        now, done = time.monotonic(), bar.tasks[0].completed
        if bar.disable and now - last > LINE_SECONDS:
            last, left = now, (now - start) * (total - done) / done
            text = f"{description}: {done:.0f} of {total}, {now - start:.0f} s so far, about {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    with bar:
        yield tick


def in_threads(function: Callable[[Any], Any], arguments: Sequence[Any], description: str, count: int) -> list[Any]:
    """[function(argument)], `count` at a time, in order; with progress."""
    with progress(len(arguments), description) as tick, concurrent.futures.ThreadPoolExecutor(count) as pool:
        found = []
        for one in pool.map(function, arguments):
            found.append(one)
            tick()
    return found


def on_all_devices(function: Callable[[Any], Any], arguments: Sequence[Any], description: str) -> list[Any]:
    """[function(argument)] as numpy arrays, in order, one at a time on each of JAX's devices; with progress."""
    devices = queue.SimpleQueue()
    for device in jax.local_devices():
        devices.put(device)

    def run(argument):
        device = devices.get()
        try:
            with jax.default_device(device):
                return jax.tree.map(np.asarray, function(argument))
        finally:
            devices.put(device)

    return in_threads(run, arguments, description, jax.local_device_count())


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
