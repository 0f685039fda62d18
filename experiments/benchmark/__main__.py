"""Costs of bnjax beside others: the batch normalization layer, or with --workloads whole training sweeps.

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

The second trains the networks of each workload (`workloads.py`) with bnjax.sweep at the width that it chooses by size,
evaluated at the end or along the way, and beside it: the matrix products alone, which is the limit; Flax in
jit(vmap(scan)); PyTorch, one process per core (torch.func.vmap, too); a loop over a jitted JAX step. Those that are not
installed are shown as such.
It then measures where a sweep's time goes, the time to the first result and, with --growth, what a cell costs and how
much memory is taken as the grid grows. docs/speed.md has what was measured; --docs=docs/speed.md writes it there.
"""

import platform
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

import jax
import numpy as np
import xarray as xr
from absl import app, flags

from bnjax import choices
from bnjax.version import __version__
from experiments import common, table
from experiments.benchmark import figure, layers, processes, sweeps, tables, workloads

FLAGS = flags.FLAGS
SCRIPT, FIGURE, TABLES = "benchmark", "speed.png", "speed.md"
LAYER_ROUNDS, SWEEP_ROUNDS = 21, 5
LEGEND = "One cell-step is one SGD step of one network. Medians; of ratios round by round, with [quartiles]."

shapes = "64x32,128x128,256x512,1024x256,8192x1024,32x28x28x64"
flags.DEFINE_list("shapes", shapes, "Inputs, features last: NxC, or NxHxWxC for images.")
flags.DEFINE_list("workloads", [], f"Sweeps to measure instead of layers: all, or {', '.join(workloads.ALL)}.")
words = "Layers of each shape vmapped together (default 1), or networks in a sweep (default: the workload's own)."
flags.DEFINE_integer("cells", None, words, lower_bound=1)
flags.DEFINE_integer("steps", None, "Of each network in a sweep (default: the workload's own).", lower_bound=1)
words = f"Alternating measurements of each (default {LAYER_ROUNDS} of layers, {SWEEP_ROUNDS} of sweeps)."
flags.DEFINE_integer("rounds", None, words, lower_bound=1)
flags.DEFINE_float("milliseconds", 20.0, "Least length of one measurement of a layer.", lower_bound=0.0)
flags.DEFINE_float("seconds", 1.0, "About the least length of one measurement of a sweep.", lower_bound=0.0)
flags.DEFINE_list("peers", [*processes.PEERS], "The implementations to measure beside bnjax's sweeps.")
flags.DEFINE_bool("profile", True, "Measure where a sweep's time goes.")
flags.DEFINE_bool("widths", False, "Measure sweeps at each of some widths, beside the width that is chosen by size.")
flags.DEFINE_bool("first_result", True, "Measure the time to a sweep's first result.")
flags.DEFINE_bool("growth", False, "Measure what a cell of the smallest workload costs as the grid grows.")
flags.DEFINE_list("growth_cells", ["64", "1024", "8192", "65536"], "Grids for --growth.")
flags.DEFINE_integer("growth_steps", 100, "Steps of each cell for --growth.", lower_bound=1)
flags.DEFINE_string("docs", None, "A Markdown page in which to replace the tables of sweeps, between its markers.")
flags.DEFINE_string("out", "results/benchmark", "Output folder.")
flags.DEFINE_bool("overwrite", False, "Replace what an earlier benchmark left in the output folder.")


@common.interruptible()
def main(argv: list[str]) -> None:
    """Flags -> measurements -> tables, stored result."""
    common.prepare_process()
    folder = Path(FLAGS.out).expanduser()
    try:
        common.check_arguments(argv)
        run = check_sweeps() if FLAGS.workloads else check_layers()
        common.check_out(folder, SCRIPT, common.RESULTS, FIGURE, TABLES, overwrite=FLAGS.overwrite)
    except (ValueError, OSError) as error:
        raise common.fail(str(error)) from None
    run(folder)


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
    with common.progress(len(shapes) * rounds, "measuring") as tick:
        parts = [layers.measure(shape, cells, rounds, FLAGS.milliseconds / 1e3, tick) for shape in shapes]
    labels = np.array(["x".join(map(str, shape)) for shape in shapes], object)
    results = xr.concat(parts, xr.DataArray(labels, dims="shape", name="shape"))
    device, versions = jax.devices()[0].device_kind, {"bnjax": __version__, "jax": jax.__version__}
    results.attrs = {"cells": cells, "device": device, "versions": versions}
    path = common.save(results, folder / common.RESULTS, SCRIPT, overwrite=FLAGS.overwrite)
    print(tables.layers(results).text())
    print(f"On {device}, {cells} at a time. All measurements: {path}")


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
        given = ",".join(FLAGS.growth_cells)
        raise ValueError(f"--growth_cells takes numbers such as 64,1024, each at least 1, got {given!r}")
    common.check_size("growth_cells", max(grids))
    page = Path(FLAGS.docs).expanduser() if FLAGS.docs else None
    if page:
        table.check_page("docs", page, SCRIPT)
    return lambda folder: compare_sweeps(names, grids, folder, page)


def compare_sweeps(names: list[str], grids: list[int], folder: Path, page: Path | None) -> None:
    """Measures, stores, prints and draws."""
    rounds = FLAGS.rounds or SWEEP_ROUNDS
    peers = [name for name in FLAGS.peers if processes.installed(processes.PEERS[name])]
    missing = [name for name in FLAGS.peers if name not in peers]
    implementations = [*processes.OURS, *peers, *(processes.PARTS if FLAGS.profile else ())]
    implementations += processes.WIDTHS if FLAGS.widths else ()
    ticks = len(names) * len(implementations) * (rounds + 1)
    ticks += FLAGS.first_result + FLAGS.growth * len(grids) * (rounds + 2)
    sizes, options = {"cells": FLAGS.cells, "steps": FLAGS.steps}, {"rounds": rounds, "seconds": FLAGS.seconds}
    try:
        with common.progress(ticks, "measuring") as tick:
            results = sweeps.measure(names, implementations, tick=tick, **sizes, **options)
            if FLAGS.first_result:
                results = results.merge(sweeps.first_result(names[0], **sizes))
                tick()
            if FLAGS.growth:
                results = results.merge(sweeps.growth(grids, FLAGS.growth_steps, tick=tick, **options))
    except RuntimeError as error:
        raise common.fail(str(error)) from None
    found = {name: metadata.version(name) for name in ("jax", "flax", "torch") if util.find_spec(name)}
    versions = {"bnjax": __version__, "python": platform.python_version(), **found}
    results.attrs = {"machine": sweeps.machine(), "not_installed": missing, "versions": versions}
    path = common.save(results, folder / common.RESULTS, SCRIPT, overwrite=FLAGS.overwrite)

    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    setting = f"{sweeps.machine()}; {named}; {rounds} alternating rounds. {LEGEND}"
    shown = tables.sweeps(results, missing, len(processes.cores()))
    print(*(one.text() for one in shown), table.wrapped(setting), sep="\n\n")
    text = "\n".join([f"`{common.command(SCRIPT)}`, on {setting}\n", *(one.markdown() for one in shown)])
    written = common.save(f"# Training sweeps, measured\n\n{text}", folder / TABLES, SCRIPT, overwrite=FLAGS.overwrite)
    if page:
        table.write_into(page, SCRIPT, text)
    print(f"\nAll measurements: {path}; tables: {page or written}")
    if "products" in peers:
        drawn = figure.shares(results, title=f"Training sweeps on {sweeps.machine()}")
        print(f"figure: {common.save(drawn, folder / FIGURE, SCRIPT, overwrite=FLAGS.overwrite)}")


if __name__ == "__main__":
    app.run(main)
