"""The range of initialization scales over which a network trains, with batch normalization and without.

    python -m experiments.init_robustness

trains BN, no BN, and BN with frozen hidden weights (5 seeds x 17 scales each) on 10,000 images of
Fashion-MNIST, in about a minute on 2 cores. Expect, at 80% of the best accuracy: BN over all 8 decades,
no BN over 1.5. Above a scale of 100 BN is no better than its frozen baseline: what trains is a readout.
"""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags

import bnjax
from bnjax import activations, choices, initializers, models, norms, training
from bnjax.models import build
from bnjax.sweeps import grid, store
from experiments import common
from experiments.init_robustness import measure_width
from experiments.init_robustness.report import SCRIPT, report

FLAGS = flags.FLAGS

# data
flags.DEFINE_string("dataset", "fashion_mnist_mini", "fashion_mnist_mini, fashion_mnist, mnist or cifar10.")
flags.DEFINE_string("data_dir", None, "Where prepared data sets are kept. Default: the user's cache folder.")
flags.DEFINE_string("manual_dir", None, "Folder with a data set's original archives, instead of a download.")
flags.DEFINE_integer("train_examples", None, "Use only this many training examples, the first ones. Default: all.")
flags.DEFINE_string(
    "standardize",
    "dataset",
    "Of the inputs: 'dataset', one mean and deviation for all entries, or 'feature', one for each.",
)
# network
flags.DEFINE_string("model", "mlp", f"Family of networks, one of {', '.join(models.MODELS)}.")
flags.DEFINE_integer("depth", 3, "Number of hidden layers, or residual blocks.", lower_bound=1)
flags.DEFINE_integer("hidden_width", 128, "Units, or channels, per hidden layer.", lower_bound=1)
flags.DEFINE_string("activation", "relu", f"One of {', '.join(activations.ACTIVATIONS)}.")
flags.DEFINE_list("norms", "batch,none", f"Networks to compare, of {', '.join(norms.NORMS)}.")
flags.DEFINE_string("norm_position", "before_activation", f"One of {', '.join(build.NORM_POSITIONS)}.")
flags.DEFINE_float("epsilon", 1e-5, "Batch normalization's epsilon, inside the square root.")
flags.DEFINE_list("initializers", "he_normal", f"To compare, of {', '.join(initializers.INITIALIZERS)}.")
flags.DEFINE_string(
    "scaled_layers", "hidden", f"Kernels that init_scale multiplies: {' or '.join(build.SCALED_LAYERS)}."
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
flags.DEFINE_bool("overwrite", False, "Replace results of another configuration when the new ones are complete.")
flags.DEFINE_list(
    "allow_changed", "", f"Differences to accept when resuming stored results, of {', '.join(store.CHANGES)}."
)
flags.DEFINE_float("checkpoint_minutes", 5.0, "Save at least this often, in minutes.", lower_bound=0.0)
flags.DEFINE_bool("status", False, "Only print how much of the results is done; train nothing.")
flags.DEFINE_string("plan", None, "Removed: --width sets the width.")
flags.DEFINE_integer(
    "width",
    None,
    "Networks (cells of the grid) trained together by vmap on one device. Default: by their size.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "segment",
    None,
    "Most steps in one call of the compiled program. Default: by the size of the networks.",
    lower_bound=1,
)
flags.DEFINE_bool(
    "measure_width",
    False,
    "Only measure which width is fastest for these networks, and print a --width= for this machine.",
)
common.define_distributed()
flags.adopt_module_key_flags(common)  # so that --helpshort shows them
flags.DEFINE_integer("devices", None, "Local devices to use. Default: all.", lower_bound=1)

NORM_NAMES = common.NORM_NAMES | {"none": "no BN"}
# What else tells runs apart: named in a figure's title where it is not the default.
NAMED_FLAGS = ("train_examples", "standardize", "epsilon", "scaled_layers", "weight_decay", "data_seed")


class Job(NamedTuple):
    """The flags' request, checked: all that `bnjax.sweep` needs."""

    models: dict[str, bnjax.Model]
    ds: bnjax.Dataset
    config: bnjax.TrainConfig
    axes: dict[str, list[float]]
    hyper: bnjax.Hyperparams
    data_args: dict[str, Any]
    devices: list[jax.Device]


@common.interruptible()
def main(argv: list[str]) -> None:
    """Flags -> sweep -> table, figures, stored result."""
    common.prepare_process()
    path = Path(FLAGS.out).expanduser() / common.RESULTS
    try:
        if FLAGS.status:
            print(bnjax.status(path))
            return
        common.join_others()
        job = prepare(argv, path.parent)
        if FLAGS.measure_width:
            width = measure_width.report(*job[:5], job.devices)
            print(common.command(SCRIPT, width=width, measure_width=None))
            return
        with contextlib.suppress(ValueError):
            if not FLAGS.overwrite and all(done == count for done, count in bnjax.status(path).cells.values()):
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
        report(results, path, networks()[1], FLAGS.threshold, title())


def prepare(argv: list[str], folder: Path) -> Job:
    """The job, after every check that can be made before training."""
    common.check_arguments(argv)
    if FLAGS.plan is not None:
        raise ValueError(f"--plan={FLAGS.plan} is no longer taken: the width is by size; --width sets another")
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
    compared, _ = networks()
    if FLAGS.batch_size == 1 and "batch" in FLAGS.norms:
        raise ValueError(
            "--batch_size=1 with BN: a batch of one has no variance, so BN's output is its bias whatever the "
            "input, and nothing can be learned. Use at least 2, or --norms=none"
        )
    choices.check("--dataset", FLAGS.dataset, bnjax.data.NAMES)
    data_args = {"name": FLAGS.dataset, "train_examples": FLAGS.train_examples, "standardize": FLAGS.standardize}
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
    for model in compared.values():
        training.check(model, ds, config)
    return Job(compared, ds, config, axes, hyper, data_args, devices)


def networks() -> tuple[dict[str, bnjax.Model], dict[str, str]]:
    """{name: network} for the flags, and {name: name of its frozen baseline}."""
    for flag in ("norms", "initializers"):
        if not FLAGS[flag].value:
            raise ValueError(f"--{flag} is empty")
    choices.check("model", FLAGS.model, models.MODELS)
    found, baselines = {}, {}
    for initializer in FLAGS.initializers:
        suffix = f", {initializer}" if len(FLAGS.initializers) > 1 else ""
        variants = [(norm, False) for norm in FLAGS.norms]
        if "batch" in FLAGS.norms and FLAGS.frozen_baseline:
            variants.append(("batch", True))
        for norm, frozen in variants:
            name = NORM_NAMES.get(norm, norm) + (", hidden frozen" if frozen else "") + suffix
            if name in found:
                raise ValueError(f"--norms and --initializers must not repeat a name, got {name!r} twice")
            # Of the other norms, epsilon is something else.
            options = {"epsilon": FLAGS.epsilon} if norm in ("batch", "none") else {}
            found[name] = models.make(
                FLAGS.model,
                FLAGS.depth,
                FLAGS.hidden_width,
                activation=FLAGS.activation,
                norm=norm,
                norm_position=FLAGS.norm_position,
                initializer=initializer,
                **options,
                scaled_layers=FLAGS.scaled_layers,
                freeze_hidden=frozen,
            )
        if "batch" in FLAGS.norms and FLAGS.frozen_baseline:
            baselines |= {NORM_NAMES[norm] + suffix: name for norm in FLAGS.norms}
    return found, baselines


def title() -> str:
    """The title that tells the figures of this run from those of others: data, networks, training."""
    rates = sorted(common.parse_floats("learning_rates", FLAGS.learning_rates))
    rate = f"{rates[0]:.3g}"
    if len(rates) > 1:
        rate += f" to {rates[-1]:.3g} (best of {len(rates)} per scale)"
    normed = [NORM_NAMES[norm] for norm in FLAGS.norms if norm != "none"]
    normed = [f"{' and '.join(normed)} {FLAGS.norm_position.replace('_', ' ')}"] if normed else []
    layers = "block" if FLAGS.model == "residual" else "hidden layer"
    parts = [
        FLAGS.dataset,
        *([FLAGS.model] if FLAGS.model != "mlp" else []),
        f"{FLAGS.depth} {layers}{'s' * (FLAGS.depth > 1)} of {FLAGS.hidden_width}",
        FLAGS.activation,
        *normed,
        *FLAGS.initializers,
        FLAGS.optimizer,
        f"learning rate {rate}",
        f"momentum {FLAGS.momentum:g}",
        f"{FLAGS.steps} steps of batch {FLAGS.batch_size}",
        *(f"{name} {FLAGS[name].value}" for name in NAMED_FLAGS if FLAGS[name].value != FLAGS[name].default),
    ]
    return ", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)  # lines break between them


if __name__ == "__main__":
    app.run(main)
