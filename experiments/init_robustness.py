"""Over how many decades of initialization scale does a network train, with batch normalization and without?

    python -m experiments.init_robustness

trains BN, no BN, and BN with frozen hidden weights (5 seeds x 17 scales each) on 10,000 images of
Fashion-MNIST, in about a minute on 2 cores. Expect, at 80% of the best accuracy: BN over all 8 decades,
no BN over 1.5. Above a scale of 100 BN is no better than its frozen baseline: what trains is a readout.
"""

import contextlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import xarray as xr
from absl import app, flags
from rich.table import Table

import bnjax
from bnjax import activations, choices, plots, training
from bnjax.models import mlp
from bnjax.sweeps import grid, robustness, store
from experiments import common, measure_width

FLAGS = flags.FLAGS

# data
flags.DEFINE_string("dataset", "fashion_mnist_mini", "fashion_mnist_mini, fashion_mnist, mnist or cifar10.")
flags.DEFINE_string("data_dir", None, "Where prepared data sets are kept. Default: the user's cache folder.")
flags.DEFINE_string("manual_dir", None, "Folder with a data set's original archives, instead of a download.")
flags.DEFINE_integer("train_examples", None, "Use only the first of the training examples. Default: all.")
flags.DEFINE_string(
    "standardize", "dataset", "Standardize inputs over the whole data 'set' or per 'feature'."
)
# network
flags.DEFINE_integer("depth", 3, "Number of hidden layers.", lower_bound=1)
flags.DEFINE_integer("hidden_width", 128, "Units per hidden layer.", lower_bound=1)
flags.DEFINE_string("activation", "relu", f"One of {', '.join(activations.ACTIVATIONS)}.")
flags.DEFINE_list("norms", "batch,none", f"Networks to compare, of {', '.join(mlp.NORMS)}.")
flags.DEFINE_string("norm_position", "before_activation", f"One of {', '.join(mlp.NORM_POSITIONS)}.")
flags.DEFINE_float("epsilon", 1e-5, "Batch normalization's epsilon, inside the square root.")
flags.DEFINE_list("initializers", "he_normal", "Of the kernels; several are compared.")
flags.DEFINE_string(
    "scaled_layers", "hidden", f"Kernels that init_scale multiplies: {' or '.join(mlp.SCALED_LAYERS)}."
)
flags.DEFINE_bool("frozen_baseline", True, "Also train BN networks whose hidden weights stay as drawn.")
# grid
flags.DEFINE_string("seeds", "5", "Initialization seeds: a count, a range 0:5 or a list 0,1,2.")
flags.DEFINE_string("init_scales", "1e-4:1e4:17", "A list, or low:high:count for log spacing.")
flags.DEFINE_string("learning_rates", "0.1", "A list, or low:high:count for log spacing.")
# training
flags.DEFINE_string("optimizer", "sgd", f"One of {', '.join(training.OPTIMIZERS)}.")
flags.DEFINE_float("momentum", 0.9, "The optimizer's momentum (adam's b1).")
flags.DEFINE_float("weight_decay", 0.0, "On weight matrices only.")
flags.DEFINE_integer("steps", 300, "Optimizer steps.")
flags.DEFINE_integer("batch_size", 128, "Examples per step.")
flags.DEFINE_integer("eval_every", None, "Steps between evaluations. Default: only after the last.")
flags.DEFINE_integer("data_seed", 0, "Draws the order of the data, shared by all runs.")
# output
flags.DEFINE_float("threshold", 0.8, "Fraction of the best median accuracy that counts as 'trains'.")
flags.DEFINE_string("out", "results/init_robustness", "Output folder.")
flags.DEFINE_bool("overwrite", False, "Replace results of another configuration, once these are complete.")
flags.DEFINE_list(
    "allow_changed", "", f"What may differ from results that are continued, of {', '.join(store.CHANGES)}."
)
flags.DEFINE_float("checkpoint_minutes", 5.0, "Most minutes of work that may be lost.", lower_bound=0.0)
flags.DEFINE_bool("status", False, "Only say what of the results is done.")
flags.DEFINE_string("plan", None, "No longer taken: --width sets the width.")
flags.DEFINE_integer("width", None, "Cells vmapped together on one device. Default: by size.", lower_bound=1)
flags.DEFINE_integer(
    "segment", None, "Most steps in one call of the program. Default: by size.", lower_bound=1
)
flags.DEFINE_bool(
    "measure_width",
    False,
    "Only measure which width is fastest for these networks, and print a --width= for this machine.",
)
common.define_distributed()
flags.adopt_module_key_flags(common)  # so that --helpshort shows them
flags.DEFINE_integer("devices", None, "Local devices to use. Default: all.", lower_bound=1)

SCRIPT = "init_robustness"
THRESHOLDS = (0.7, 0.8, 0.9, 0.95)
NORM_NAMES = {"batch": "BN", "none": "no BN"}


class Job(NamedTuple):
    """What the flags ask for, checked: all that `bnjax.sweep` needs."""

    models: dict[str, bnjax.Model]
    ds: bnjax.Dataset
    config: bnjax.TrainConfig
    axes: dict[str, list[float]]
    hyper: bnjax.Hyperparams
    data_args: dict[str, Any]
    devices: list[jax.Device]


@common.interruptible()
def main(argv: list[str]) -> None:
    """Flags -> sweep -> table, figure, stored result."""
    common.prepare_process()
    path = Path(FLAGS.out).expanduser() / common.RESULTS
    try:
        if FLAGS.status:
            print(bnjax.status(path))
            return
        common.join_others()
        job = prepare(argv, path.parent)
        if FLAGS.measure_width:
            width = measure_width.report(*job[:5], job.devices, common.console().print)
            print(common.command(SCRIPT, width=width, measure_width=None))
            return
        with contextlib.suppress(ValueError):
            if not FLAGS.overwrite and all(
                done == count for done, count in bnjax.status(path).cells.values()
            ):
                print(f"{path} is there: its cells are checked, and what is whole is not trained again.")
        results = bnjax.sweep(
            *job[:4],
            hyper=job.hyper,
            path=path,
            overwrite=FLAGS.overwrite,
            allow_changed=FLAGS.allow_changed,
            checkpoint_minutes=FLAGS.checkpoint_minutes,
            about={"data": job.data_args, "command": common.command(SCRIPT)},
            width=FLAGS.width,
            segment=FLAGS.segment,
            devices=job.devices,
        )
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        raise common.fail(str(error)) from None
    if "done" in results:
        raise common.fail(f"another process ended early; the same command trains the rest of {path}")
    if jax.process_index() == 0:
        report(results, path)


def prepare(argv: list[str], folder: Path) -> Job:
    """The job, after every check that can be made before training."""
    common.check_arguments(argv)
    if FLAGS.plan is not None:
        raise ValueError(
            f"--plan={FLAGS.plan} is no longer taken: the width is by size; --width sets another"
        )
    if not 0 < FLAGS.threshold <= 1:
        raise ValueError(f"--threshold must be in (0, 1], got {FLAGS.threshold}")
    axes = {
        "seed": common.parse_seeds("seeds", FLAGS.seeds),
        "init_scale": common.parse_floats("init_scales", FLAGS.init_scales),
        "learning_rate": common.parse_floats("learning_rates", FLAGS.learning_rates),
    }
    hyper = bnjax.Hyperparams(momentum=FLAGS.momentum, weight_decay=FLAGS.weight_decay)
    grid.check(axes, hyper)
    config = bnjax.TrainConfig(
        steps=FLAGS.steps,
        batch_size=FLAGS.batch_size,
        optimizer=FLAGS.optimizer,
        eval_every=FLAGS.eval_every,
        data_seed=FLAGS.data_seed,
    )
    models, _ = networks()
    if FLAGS.batch_size == 1 and "batch" in FLAGS.norms:
        raise ValueError(
            "--batch_size=1 with BN: a batch of one has no variance, so BN's output is its bias whatever the "
            "input, and nothing can be learned. Use at least 2, or --norms=none"
        )
    choices.check("--dataset", FLAGS.dataset, bnjax.data.NAMES)
    data_args = {
        "name": FLAGS.dataset,
        "train_examples": FLAGS.train_examples,
        "standardize": FLAGS.standardize,
    }
    common.check_writable(folder)
    others = [p.name for p in folder.iterdir() if not p.name.startswith(f".{common.RESULTS}")]
    if others and common.RESULTS not in others:
        raise ValueError(f"--out={folder} is not empty and holds no {common.RESULTS}; choose another")
    if FLAGS.overwrite and (folder / common.RESULTS / "zarr.json").exists():
        common.check_out(folder, SCRIPT, common.RESULTS)
    devices = jax.local_devices()[: FLAGS.devices]
    if FLAGS.devices is not None and FLAGS.devices > len(devices):
        raise ValueError(f"--devices must be at most the {len(devices)} that there are, got {FLAGS.devices}")
    ds = bnjax.data.load(**data_args, data_dir=FLAGS.data_dir, manual_dir=FLAGS.manual_dir)
    for model in models.values():
        training.check(model, ds, config)
    return Job(models, ds, config, axes, hyper, data_args, devices)


def networks() -> tuple[dict[str, bnjax.Model], dict[str, str]]:
    """{name: network} for the flags, and {name: name of its frozen baseline}."""
    for flag in ("norms", "initializers"):
        if not FLAGS[flag].value:
            raise ValueError(f"--{flag} is empty")
    models, baselines = {}, {}
    for initializer in FLAGS.initializers:
        suffix = f", {initializer}" if len(FLAGS.initializers) > 1 else ""
        variants = [(norm, False) for norm in FLAGS.norms]
        if "batch" in FLAGS.norms and FLAGS.frozen_baseline:
            variants.append(("batch", True))
        for norm, frozen in variants:
            name = NORM_NAMES.get(norm, norm) + (", hidden frozen" if frozen else "") + suffix
            if name in models:
                raise ValueError(f"--norms and --initializers must not repeat a name, got {name!r} twice")
            models[name] = bnjax.mlp(
                features=(FLAGS.hidden_width,) * FLAGS.depth,
                activation=FLAGS.activation,
                norm=norm,
                norm_position=FLAGS.norm_position,
                initializer=initializer,
                epsilon=FLAGS.epsilon,
                scaled_layers=FLAGS.scaled_layers,
                freeze_hidden=frozen,
            )
        if "batch" in FLAGS.norms and FLAGS.frozen_baseline:
            baselines |= {NORM_NAMES[norm] + suffix: name for norm in FLAGS.norms}
    return models, baselines


def report(results: xr.Dataset, path: Path) -> None:
    """Prints the table and writes the figure beside the results, which stand at `path`."""
    _, baselines = networks()
    chance = 1 / next(iter(results.attrs["models"].values()))["num_outputs"]
    accuracy = robustness.final_accuracy(results, chance)
    thresholds = sorted({*THRESHOLDS, FLAGS.threshold})
    summaries = robustness.summarize(accuracy, thresholds, baselines=baselines)

    console = common.console()
    console.print(table(accuracy, summaries, results))
    if accuracy.sizes["learning_rate"] > 1:
        console.print(rate_table(accuracy))

    figure = plots.robustness(
        accuracy,
        threshold=FLAGS.threshold,
        chance=chance,
        baselines=set(baselines.values()),
        title=f"{FLAGS.dataset}, {FLAGS.depth} hidden layers of {FLAGS.hidden_width}, {FLAGS.activation}, "
        f"{FLAGS.steps} steps of {FLAGS.batch_size}",
    )
    picture = common.save(figure, path.with_name("accuracy.png"), SCRIPT)
    more = 4 * accuracy.sizes["seed"]
    print(f"figure:   {picture}")
    print(f"results:  {path}   (bnjax.load_results opens it)")
    plans = {}
    for name, plan in results.attrs["plan"].items():
        plans.setdefault(_in_words(plan), []).append(name)
    for words, names in plans.items():
        print(f"plan:     {words}" + f" ({', '.join(names)})" * (len(plans) > 1))
    larger = common.command(SCRIPT, seeds=more, out=path.parent, overwrite=None)
    print(f"continue: {larger}   (only new cells are trained)")


def _in_words(plan):
    devices = plan["devices"]
    narrowed = f"; {plan['narrowed']}" if "narrowed" in plan else ""
    return f"width {plan['width']} on {devices} device{'s' * (devices > 1)}{narrowed}"


def table(accuracy: xr.DataArray, summaries: dict, results: xr.Dataset) -> Table:
    """One row per network, one column per threshold."""
    seeds = accuracy.sizes["seed"]
    best = float(accuracy.median("seed").max())
    found = Table(
        title="Robust range: decades of init_scale over which the network trains",
        caption=(
            f"A network trains at a scale if the median of {seeds} seeds ends with at least q of the best median "
            f"test accuracy, {best:.1%}; a diverged run counts as chance. The range is the longest run of scales "
            "that pass, >= where it reaches an end of the grid. In brackets: 95% bootstrap interval over seeds. "
            "vs frozen: median accuracy less that of BN with its hidden weights frozen, in percentage points, at "
            "the lower and the upper end of the range. Holes: scales that fail between ones that pass."
        ),
        caption_justify="left",
        show_lines=True,
    )
    found.add_column("network")
    found.add_column("best median\n(at scale)\ndiverged")
    for threshold in next(iter(summaries.values())):
        style = "bold" if threshold == FLAGS.threshold else ""
        found.add_column(f"decades at\nq = {threshold:.4g}", style=style)
    for name, by_threshold in summaries.items():
        medians = accuracy.sel(model=name).median("seed").max("learning_rate")
        diverged = results.diverged.sel(model=name)
        found.add_row(
            name,
            f"{float(medians.max()):.1%}\n({scale_text(float(medians.idxmax()))})\n"
            f"{int(diverged.sum())} of {diverged.size}",
            *(cell_text(summary) for summary in by_threshold.values()),
        )
    return found


def cell_text(summary: robustness.Summary) -> str:
    """Decades, interval, ends, distance to the baseline at the ends, holes: a line each."""
    found = summary.range
    lines = [decades_text(found)]
    if summary.interval:
        low, high = map(decades_text, summary.interval)
        lines[0] += f"  \\[{low}, {high}]"
    if not math.isnan(found.decades):
        lines.append(f"{scale_text(found.low)} to {scale_text(found.high)}")
        if not math.isnan(summary.above_low):
            lines.append(f"vs frozen {100 * summary.above_low:+.1f}, {100 * summary.above_high:+.1f}")
    if found.holes:
        lines.append(f"holes {', '.join(scale_text(hole) for hole in found.holes)}")
    return "\n".join(lines)


def decades_text(found: robustness.RobustRange) -> str:
    """`>=8.0`, `1.5`, or `-` for none."""
    if math.isnan(found.decades):
        return "-"
    return f"{'>=' if found.open_low or found.open_high else ''}{found.decades:.1f}"


def scale_text(scale: float) -> str:
    """A scale in as few characters as it takes: 1, 0.316, 1e-4."""
    if 0.01 <= scale < 1000:
        return f"{scale:.3g}"
    mantissa, exponent = f"{scale:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def rate_table(accuracy: xr.DataArray) -> Table:
    """The best learning rate for each scale and network."""
    rates = robustness.best_learning_rate(accuracy)
    found = Table(title="Learning rate of the best median, per init_scale")
    found.add_column("init_scale", justify="right")
    for name in rates.model.values:
        found.add_column(str(name), justify="right")
    for scale in rates.init_scale.values:
        found.add_row(scale_text(scale), *(f"{rate:.3g}" for rate in rates.sel(init_scale=scale).values))
    return found


if __name__ == "__main__":
    app.run(main)
