"""The implementations in processes of their own, each with the settings that suit it.

    devices   one process, one XLA device per core: bnjax, the matrix products, the parts of a sweep
    whole     one process with its library's own settings, which use all cores
    per_core  a process per core, bound to it

A process waits, blocked, while others are measured. It answers a line of JSON with a line of JSON, and ends with
the process that started it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from importlib import import_module, util
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Implementation(NamedTuple):
    """One way of training the networks of a workload."""

    title: str
    function: str  # module.function of this package, that makes a run ready
    needs: str = "jax"  # the package
    kind: str = "devices"  # of process; see above
    options: Mapping[str, Any] = MappingProxyType({})
    crew: str | None = None  # those of one crew share their processes; None: they are its own


PEERS = MappingProxyType(
    {
        "products": Implementation("products alone", "jax_peers.products"),
        "flax": Implementation("Flax", "jax_peers.flax", "flax", "whole"),
        "torch": Implementation("PyTorch eager", "torch_peers.eager", "torch", "per_core"),
        "torch_vmap": Implementation("torch.func.vmap", "torch_peers.vmap", "torch", "whole"),
        "jax_loop": Implementation("jitted JAX step", "jax_peers.jax_loop", kind="per_core"),
    }
)
SWEEP = Implementation("bnjax.sweep", "jax_peers.bnjax_sweep")
OURS = MappingProxyType(
    {"bnjax": SWEEP, "bnjax_evaluated": SWEEP._replace(title="evaluated 4 times", options={"evaluations": 4})}
)
WIDTHS = MappingProxyType(
    {f"width_{n}": SWEEP._replace(title=f"width {n}", options={"width": n}, crew="widths") for n in (1, 2, 4, 8, 16)}
)
PARTS = MappingProxyType(
    {
        name: Implementation(title, "jax_peers.part", options={"name": name}, crew="parts")
        for name, title in (
            ("products_at_width", "+ at width"),
            ("network", "+ network"),
            ("momentum", "+ momentum"),
            ("batch_norm", "+ BN"),
            ("shuffle", "+ shuffle"),
        )
    }
)
ALL = MappingProxyType({**OURS, **PEERS, **PARTS, **WIDTHS})


def installed(implementation: Implementation) -> bool:
    """Its package is there."""
    return util.find_spec(implementation.needs) is not None


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


@contextlib.contextmanager
def started(kind: str, **environment: str) -> Iterator[list[subprocess.Popen]]:
    """Processes of that kind, with changes to their environment; they end with the block."""
    count = len(cores()) if kind == "per_core" else 1
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "experiments.benchmark.processes", kind]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    found = [subprocess.Popen([*command, str(i)], env=environment, **pipes) for i in range(count)]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            with contextlib.suppress(BrokenPipeError):  # a request that one that had died never read
                process.stdin.close()
            process.stdout.close()
            process.wait()


def ask(processes: list[subprocess.Popen], call: str, **arguments: Any) -> list[dict[str, Any]]:
    """The answers of all processes to one request, which they work on at the same time.

    Raises:
      RuntimeError: if one fails or has died.
    """
    for process in processes:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"call": call} | arguments), file=process.stdin, flush=True)
    answers = []
    for process in processes:
        line = process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with status {process.wait()}"}
        if "error" in answer:
            raise RuntimeError(f"a process that was to {call} {arguments}: {answer['error']}")
        answers.append(answer)
    return answers


def serve(kind: str, index: int) -> None:
    """Answers requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    if kind == "per_core" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores()[index]})
    runs = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = CALLS[request.pop("call")](runs, kind, **request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers)


def _prepare(runs, kind, name, implementation, workload, **arguments):
    """Makes a run ready under a name, in the place of what had it before; what there is to know of it."""
    if kind == "devices":
        _module("common").prepare_process()
    module, function = ALL[implementation].function.split(".")
    ready = getattr(_module(f"benchmark.{module}"), function)
    runs.pop(name, None)
    runs[name] = ready(_module("benchmark.workloads").ALL[workload], **ALL[implementation].options, **arguments)
    return runs[name][1]


def _run(runs, kind, name):
    run, _ = runs[name]
    start = time.perf_counter()
    cell_steps = run()
    return {"cell_steps": cell_steps, "seconds": time.perf_counter() - start}


def _first_sweep(runs, kind, workload, cells, steps):
    """Seconds of what comes before the first result, in a process that has imported nothing yet."""
    times = {}

    def lap(name, since):
        times[name] = time.perf_counter() - since
        return time.perf_counter()

    now = time.perf_counter()
    bnjax = import_module("bnjax")
    _module("common").prepare_process()
    lap("import", now)
    workloads = _module("benchmark.workloads")
    w = workloads.ALL[workload]
    model = bnjax.mlp(w.features, w.sizes[-1], w.activation)
    ds = bnjax.Dataset(*workloads.data(w))
    config = bnjax.TrainConfig(steps, w.batch_size)
    now = time.perf_counter()
    for name in ("first sweep", "second sweep"):
        bnjax.sweep(model, ds, config, {"seed": range(cells)}, progress=False)
        now = lap(name, now)
    return times


def _peak_memory(runs, kind):
    """Bytes of main memory, the most at any time."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure would begin with that of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return {"bytes": 1024 * int(line.split()[1])}
    resource = import_module("resource")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": peak if sys.platform == "darwin" else 1024 * peak}


def _module(name):
    return import_module(f"experiments.{name}")


CALLS = {"prepare": _prepare, "run": _run, "first_sweep": _first_sweep, "peak_memory": _peak_memory}

if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
