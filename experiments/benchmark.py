"""What bnjax costs beside others: the batch normalization layer, or with --workloads whole training sweeps.

    python -m experiments.benchmark
    python -m experiments.benchmark --workloads=all

The first times the forward and backward pass of a whole layer in training mode (y, updated statistics, gradients to
x, scale and bias), and takes from the compiled program what it keeps from the one pass for the other, of

    bnjax       corrected two-pass statistics at any magnitude, one custom_jvp rule
    autodiff    the textbook formula, two passes, differentiated by JAX
    flax        flax.linen.BatchNorm: E[x^2] - E[x]^2 (needs flax; left out without)
    custom_vjp  the textbook formula with the closed form of the whole layer as its backward pass, reverse mode only

all in one process, alternating, so that they share whatever the machine is doing. docs/batch_norm.md has what was
measured. bnjax sums twice as often in the forward pass, since the others are wrong far from zero; it keeps x_hat
and one number a feature, as little as any.

The second trains the networks of each workload (`experiments/workloads`) with bnjax.sweep at the width that it chooses
by size, evaluated at the end or along the way, and beside it: the matrix products alone, which is the limit; Flax in
jit(vmap(scan)); PyTorch, one process per core (torch.func.vmap, too); a loop over a jitted JAX step. Those that are not
installed are shown as such.
It then measures where a sweep's time goes, the time to the first result and, with --growth, what a cell costs and how
much memory is taken as the grid grows. docs/speed.md has what was measured; --docs=docs/speed.md writes it there.
"""

import contextlib
import math
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
import xarray as xr
from absl import app, flags
from rich.console import Console
from rich.table import Table

from bnjax import batch_norm, choices
from bnjax.sweeps.progress import LINE_SECONDS
from bnjax.types import BatchNormParams, BatchStats
from bnjax.version import __version__
from experiments import common
from experiments.workloads import processes, speed, tables, workloads

FLAGS = flags.FLAGS
SCRIPT, FIGURE, TABLES = "benchmark", "speed.png", "speed.md"
LAYER_ROUNDS, SWEEP_ROUNDS = 21, 5
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"

flags.DEFINE_list(
    "shapes",
    "64x32,128x128,256x512,1024x256,8192x1024,32x28x28x64",
    "Inputs, features last: NxC, or NxHxWxC for images.",
)
flags.DEFINE_list("workloads", [], f"Sweeps to measure instead of layers: all, or {', '.join(workloads.ALL)}.")
flags.DEFINE_integer(
    "cells",
    None,
    "Layers of each shape vmapped together (default 1), or networks in a sweep (default: the workload's own).",
    lower_bound=1,
)
flags.DEFINE_integer("steps", None, "Of each network in a sweep (default: the workload's own).", lower_bound=1)
flags.DEFINE_integer(
    "rounds",
    None,
    f"Alternating measurements of each implementation (default {LAYER_ROUNDS} of layers, {SWEEP_ROUNDS} of sweeps).",
    lower_bound=1,
)
flags.DEFINE_float("milliseconds", 20.0, "Least length of one measurement of a layer.", lower_bound=0.0)
flags.DEFINE_float("seconds", 1.0, "About the least length of one measurement of a sweep.", lower_bound=0.0)
flags.DEFINE_list("peers", [*processes.PEERS], "What to measure beside bnjax's sweeps.")
flags.DEFINE_bool("profile", True, "Measure where a sweep's time goes.")
flags.DEFINE_bool("widths", False, "Measure sweeps at each of some widths, beside the width that is chosen by size.")
flags.DEFINE_bool("first_result", True, "Measure the time to a sweep's first result.")
flags.DEFINE_bool("growth", False, "Measure what a cell of the smallest workload costs as the grid grows.")
flags.DEFINE_list("growth_cells", ["64", "1024", "8192", "65536"], "Grids for --growth.")
flags.DEFINE_integer("growth_steps", 100, "Steps of each cell for --growth.", lower_bound=1)
flags.DEFINE_string("docs", None, "A Markdown page in which to replace the tables of sweeps, between its markers.")
flags.DEFINE_string("out", "results/benchmark", "Output folder.")
flags.DEFINE_bool("overwrite", False, "Replace what an earlier benchmark left in the output folder.")

MOMENTUM, EPSILON = 0.99, 1e-5
Layer = Callable[[jax.Array, BatchNormParams, BatchStats], tuple[jax.Array, BatchStats]]


def bnjax_layer(x, params, stats):
    """Ours."""
    return batch_norm.apply(params, stats, x, train=True, momentum=MOMENTUM, epsilon=EPSILON)


def autodiff_layer(x, params, stats):
    """The textbook formula, for JAX to differentiate."""
    x_hat, _, mean, var = textbook(x)
    return params.scale * x_hat + params.bias, averaged(stats, mean, var)


def textbook(x):
    """x_hat, 1 / sigma, mean and variance as the formula is written."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    var = jnp.square(x - mean).mean(axes)
    inv_sigma = 1 / jnp.sqrt(var + EPSILON)
    return (x - mean) * inv_sigma, inv_sigma, mean, var


def averaged(stats, mean, var):
    """The running statistics, as constants to the derivative."""
    mean, var = (MOMENTUM * old + (1 - MOMENTUM) * new for old, new in ((stats.mean, mean), (stats.var, var)))
    return jax.lax.stop_gradient(BatchStats(mean, var, stats.count + 1))


def custom_vjp_layer(x, params, stats):
    """The closed form as the backward pass of the textbook formula."""
    y, mean, var = closed_form(x, *params)
    return y, averaged(stats, mean, var)


@jax.custom_vjp
def closed_form(x, scale, bias):
    """y, mean, variance; the derivative of the first alone."""
    x_hat, _, mean, var = textbook(x)
    return scale * x_hat + bias, mean, var


def _closed_form_forward(x, scale, bias):
    x_hat, inv_sigma, mean, var = textbook(x)
    return (scale * x_hat + bias, mean, var), (x_hat, scale * inv_sigma)


def _closed_form_backward(residuals, cotangents):
    x_hat, slope = residuals
    g = cotangents[0]
    axes = tuple(range(g.ndim - 1))
    n = g.size // g.shape[-1]
    dbias, dscale = g.sum(axes), (g * x_hat).sum(axes)
    return slope * g - slope * dbias / n - x_hat * (slope * dscale / n), dscale, dbias


closed_form.defvjp(_closed_form_forward, _closed_form_backward)


def flax_layer(x, params, stats):
    """flax.linen's, with its defaults."""
    import flax.linen as nn

    layer = nn.BatchNorm(use_running_average=False, momentum=MOMENTUM, epsilon=EPSILON)
    variables = {"params": params._asdict(), "batch_stats": {"mean": stats.mean, "var": stats.var}}
    y, new = layer.apply(variables, x, mutable=["batch_stats"])
    return y, BatchStats(**jax.lax.stop_gradient(new["batch_stats"]), count=stats.count + 1)


def layers() -> dict[str, Layer]:
    """The implementations that can be run here."""
    found = {"bnjax": bnjax_layer, "autodiff": autodiff_layer}
    if util.find_spec("flax"):
        found["flax"] = flax_layer
    return found | {"custom_vjp": custom_vjp_layer}


def parse_shape(text: str) -> tuple[int, ...]:
    """`128x64` -> (128, 64).

    Raises:
      ValueError: naming the flag, for any other text or a shape of fewer than two axes.
    """
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"--shapes takes sizes such as 128x64 or 32x28x28x64, each at least 1, got {text!r}")
    common.check_size("shapes", max(shape))
    return shape


def problem(shape: tuple[int, ...], cells: int):
    """x, parameters, statistics and cotangent: of one layer, or with a leading axis of more `cells`."""
    keys = jax.random.split(jax.random.key(0), 2)
    leading = (cells,) if cells > 1 else ()
    params, stats = batch_norm.init(shape[-1])
    params, stats = jax.tree.map(lambda a: jnp.broadcast_to(a, (*leading, *a.shape)), (params, stats))
    x, g = (jax.random.normal(key, (*leading, *shape)) for key in keys)
    return x + 1, params, stats, g


def over_cells(function: Callable, cells: int) -> Callable:
    """The function for `cells` layers at once; for one, itself."""
    return jax.vmap(function) if cells > 1 else function


def both_passes(layer: Layer) -> Callable:
    """(x, params, stats, cotangent) -> y, new statistics, gradients."""

    def run(x, params, stats, g):
        y, pullback, stats = jax.vjp(lambda x, params: layer(x, params, stats), x, params, has_aux=True)
        return y, stats, pullback(g)

    return run


def residual_bytes(layer: Layer, cells: int, x, params, stats) -> int:
    """What a forward pass keeps for the backward pass: the compiled program's output beyond y and statistics."""

    def forward(x, params, stats):
        return jax.vjp(lambda x, params: layer(x, params, stats), x, params, has_aux=True)

    def compiled_output(function):
        program = jax.jit(over_cells(function, cells)).lower(x, params, stats).compile()
        return program.memory_analysis().output_size_in_bytes

    return compiled_output(forward) - compiled_output(layer)


def measure(shape: tuple[int, ...], cells: int, rounds: int, least_seconds: float, tick) -> xr.Dataset:
    """Seconds per pass, [implementation, round], and residual bytes, [implementation]."""
    x, params, stats, g = problem(shape, cells)
    programs = {name: jax.jit(over_cells(both_passes(layer), cells)) for name, layer in layers().items()}
    seconds = {name: [] for name in programs}

    def once(program, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            result = program(x, params, stats, g)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / repeats

    for program in programs.values():
        once(program, 2)  # compiles
    repeats = max(1, math.ceil(least_seconds / once(programs["bnjax"], 3)))
    for _ in range(rounds):
        for name, program in programs.items():
            seconds[name].append(once(program, repeats))
        tick()
    residuals = [residual_bytes(layer, cells, x, params, stats) for layer in layers().values()]
    return xr.Dataset(
        {
            "seconds": (("implementation", "round"), list(seconds.values()), {"units": "s"}),
            "residual_bytes": ("implementation", residuals, {"units": "B"}),
        },
        coords={"implementation": np.array(list(programs), object)},
    )


def report(results: xr.Dataset) -> tuple[Table, Table]:
    """Time over the fastest implementation's, and residuals over the input's size."""
    times = Table(title="Forward + backward, times the fastest (median and quartiles over rounds), and microseconds")
    kept = Table(title="Kept for the backward pass, times the size of x")
    # Paired: each round's ratio to the implementation that is the fastest by its median.
    fastest = results.seconds.median("round").argmin("implementation")
    ratio = results.seconds / results.seconds.isel(implementation=fastest)
    for table in (times, kept):
        table.add_column("shape")
        for name in results.implementation.values:
            table.add_column(str(name), justify="right")
    for shape in results["shape"].values:
        size = 4 * math.prod(parse_shape(shape)) * results.attrs["cells"]
        cells = []
        for name in results.implementation.values:
            at = {"shape": shape, "implementation": name}
            low, middle, high = ratio.sel(at).quantile([0.25, 0.5, 0.75], "round").values
            micro = 1e6 * float(results.seconds.sel(at).median())
            cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]  {micro:.0f}")
        times.add_row(shape, *cells)
        kept.add_row(shape, *(f"{b / size:.2f}" for b in results.residual_bytes.sel(shape=shape).values))
    return times, kept


@common.interruptible()
def main(argv: list[str]) -> None:
    """Flags -> measurements -> tables, stored result."""
    common.prepare_process()
    folder = Path(FLAGS.out).expanduser()
    try:
        common.check_arguments(argv)
        run = check_sweeps() if FLAGS.workloads else check_layers()
        names = common.RESULTS, FIGURE, TABLES
        common.check_out(folder, SCRIPT, *names, overwrite=FLAGS.overwrite)
    except (ValueError, OSError) as error:
        raise common.fail(str(error)) from None
    run(folder)


def check_layers() -> Callable[[Path], None]:
    """The measurement of layers that the flags ask for, which takes the output folder; or ValueError."""
    shapes = [parse_shape(text) for text in FLAGS.shapes or [""]]
    if len({*shapes}) < len(shapes):
        raise ValueError(f"--shapes names a shape twice: {','.join(FLAGS.shapes)}")
    if FLAGS.docs:
        raise ValueError(f"--docs={FLAGS.docs} takes the tables of sweeps: it needs --workloads")
    return lambda folder: compare_layers(shapes, folder)


def compare_layers(shapes: list[tuple[int, ...]], folder: Path) -> None:
    """Measures, stores and prints."""
    rounds, cells = FLAGS.rounds or LAYER_ROUNDS, FLAGS.cells or 1
    with progress_of(len(shapes) * rounds) as tick:
        parts = [measure(shape, cells, rounds, FLAGS.milliseconds / 1e3, tick) for shape in shapes]
    labels = np.array(["x".join(map(str, shape)) for shape in shapes], object)
    results = xr.concat(parts, xr.DataArray(labels, dims="shape", name="shape"))
    device = jax.devices()[0]
    results.attrs = {
        "cells": cells,
        "device": device.device_kind,
        "versions": {"bnjax": __version__, "jax": jax.__version__},
    }
    path = common.save(results, folder / common.RESULTS, SCRIPT, overwrite=FLAGS.overwrite)
    for table in report(results):
        common.console().print(table)
    print(f"On {device.device_kind}, {cells} at a time. All measurements: {path}")


def check_sweeps() -> Callable[[Path], None]:
    """The measurement of sweeps that the flags ask for, which takes the output folder; or ValueError, OSError."""
    names = [*workloads.ALL] if FLAGS.workloads == ["all"] else FLAGS.workloads
    for flag, given, allowed in (("workloads", names, workloads.ALL), ("peers", FLAGS.peers, processes.PEERS)):
        for name in given:
            choices.check(f"name in --{flag}", name, [*allowed])
        if len({*given}) < len(given):
            raise ValueError(f"--{flag} has a name twice: {','.join(given)}")
    try:
        grids = [int(text) for text in FLAGS.growth_cells]
    except ValueError:
        grids = []
    if not grids or min(grids) < 1:
        raise ValueError(
            f"--growth_cells takes numbers such as 64,1024, each at least 1, got {','.join(FLAGS.growth_cells)!r}"
        )
    common.check_size("growth_cells", max(grids))
    page = Path(FLAGS.docs).expanduser() if FLAGS.docs else None
    if page and not (page.is_file() and BEGIN in page.read_text() and END in page.read_text()):
        raise ValueError(f"--docs={page} is not a page with the markers {BEGIN} and {END}")
    return lambda folder: compare_sweeps(names, grids, folder, page)


def compare_sweeps(names: list[str], grids: list[int], folder: Path, page: Path | None) -> None:
    """Measures, stores, prints and draws."""
    from bnjax import plots  # matplotlib is for this alone

    rounds = FLAGS.rounds or SWEEP_ROUNDS
    peers = [name for name in FLAGS.peers if processes.installed(processes.PEERS[name])]
    missing = [name for name in FLAGS.peers if name not in peers]
    implementations = [*processes.OURS, *peers, *(processes.PARTS if FLAGS.profile else ())]
    implementations += processes.WIDTHS if FLAGS.widths else ()
    ticks = len(names) * len(implementations) * (rounds + 1)
    ticks += FLAGS.first_result + FLAGS.growth * len(grids) * (rounds + 2)
    options = {"rounds": rounds, "seconds": FLAGS.seconds}
    try:
        with progress_of(ticks) as tick:
            results = speed.measure(names, implementations, cells=FLAGS.cells, steps=FLAGS.steps, tick=tick, **options)
            if FLAGS.first_result:
                results = results.merge(speed.first_result(names[0], FLAGS.cells, FLAGS.steps))
                tick()
            if FLAGS.growth:
                results = results.merge(speed.growth(grids, FLAGS.growth_steps, tick=tick, **options))
    except RuntimeError as error:
        raise common.fail(str(error)) from None
    found = {name: metadata.version(name) for name in ("jax", "flax", "torch") if util.find_spec(name)}
    results.attrs = {
        "machine": speed.machine(),
        "not_installed": missing,
        "versions": {"bnjax": __version__, "python": platform.python_version(), **found},
    }
    path = common.save(results, folder / common.RESULTS, SCRIPT, overwrite=FLAGS.overwrite)
    if "products" in peers:
        shown = ["bnjax", *(name for name in peers if name != "products")]
        share = xr.concat([tables.ratios(results.speed, name, "products") for name in shown], "implementation")
        titles = [tables.title(name) for name in shown]
        share = share.assign_coords(implementation=np.array(titles, object))
        figure = plots.shares(share, title=f"Training sweeps on {speed.machine()}")
        figure = common.save(figure, folder / FIGURE, SCRIPT, overwrite=FLAGS.overwrite)

    figures = tables.all_figures(results, missing, len(processes.cores()))
    verdicts = [*tables.verdicts(results)]
    versions = ", ".join(f"{name} {version}" for name, version in results.attrs["versions"].items())
    setting = f"{speed.machine()}; {versions}; {rounds} alternating rounds."
    for one in figures:
        common.console().print(tables.for_terminal(one))
    print(*verdicts, setting, sep="\n")
    text = "\n".join(
        [f"`{common.command(SCRIPT)}`, on {setting}\n", *map(tables.markdown, figures), *(f"- {v}" for v in verdicts)]
    )
    page_text = f"# Training sweeps, measured\n\n{text}\n"
    written = common.save(page_text, folder / TABLES, SCRIPT, overwrite=FLAGS.overwrite)
    if page:
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
    print(f"All measurements: {path}; tables: {page or written}")
    if "products" in peers:
        print(f"figure: {figure}")


@contextlib.contextmanager
def progress_of(total: int) -> Iterator[Callable[[], None]]:
    """A function to call after each of `total` measurements; what is left is shown on standard error.

    On a terminal that is a bar, elsewhere a line a minute.
    """
    columns = (
        rich.progress.TextColumn("measuring"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    bar = rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=total)
    start = last = time.monotonic()

    def tick():
        nonlocal last
        bar.advance(task)
        now, done = time.monotonic(), bar.tasks[0].completed
        if not console.is_terminal and now - last > LINE_SECONDS:
            last = now
            left = (now - start) * (total - done) / done
            text = f"{done:.0f}/{total} measurements, {now - start:.0f} s so far, about {left:.0f} s left"
            console.print(text, soft_wrap=True, highlight=False)

    with bar:
        yield tick


if __name__ == "__main__":
    app.run(main)
