"""Why is a network with batch normalization (BN) robust to its initialization? Seven controls, trained on whole grids.

    python -m experiments.why_robust                        # all of them
    python -m experiments.why_robust --controls=dip,norms   # some

    frozen      features or a readout on random ones: which of them trains at extreme init scales?
    detached    is it enough to normalize forward, without the gradient through the batch statistics?
    evaluation  do running statistics fail where training does not?
    norms       how weights grow, what that does to their learning rate, and what weight decay does
    dip         the dip in accuracy near the smallest scale whose signals survive, and where training ends below it
    rates       does BN allow higher learning rates, and is it faster?
    depth       how deep a network still trains

Each states a claim, measures it, and says whether the figures support it; the table at the end has them all. Networks
are small (64 units a layer, Fashion-MNIST at 7 x 7 pixels, and XOR in 49 dimensions), so that grids are affordable.
All of it takes 2 minutes on 2 cores; --full, with more of everything, some 15 times as long. Expect:
features are learned near 1, a readout does the work from 10 up; running statistics fail in short training;
the dip is an overshoot of the first steps; training ends where it takes longer than the run to escape from zero.
"""

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.markup import escape
from rich.table import Table

import bnjax
from bnjax import choices
from bnjax.data import synthetic
from bnjax.sweeps import grid
from experiments import common
from experiments.controls import depth, detached, dip, evaluation, frozen, norms, rates
from experiments.controls.common import MOMENTUM, Finding, Setup, verdict

FLAGS = flags.FLAGS

# {flag: (default, with --full, what it is)}
GRID = {
    "train_examples": (None, None, "Use only the first of the training examples. Default: all."),
    "steps": (200, 1000, "Optimizer steps, but in the controls of frozen weights and of depth."),
    "frozen_steps": (300, 1000, "Optimizer steps of the control of frozen weights: XOR takes longer."),
    "depth_steps": (150, 1000, "Optimizer steps of the control of depth."),
    "seeds": ("3", "10", "Initialization seeds: a count, a range 0:5 or a list 0,1,2."),
    "init_scales": ("1e-4:1e4:9", "1e-4:1e4:17", "A list, or low:high:count for log spacing."),
    "dip_scales": ("1e-12:10:27", "1e-16:1e4:81", "init_scales in the control of the dip."),
    "dip_epsilons": (
        "1e-7,1e-5,1e-3",
        "1e-8,1e-7,1e-6,1e-5,1e-4,1e-3",
        "Values of BN's epsilon in the control of the dip.",
    ),
    "dip_rates": ("0.01,0.1", "0.003,0.01,0.03,0.1,0.3", "Learning rates in the control of the dip."),
    "dip_depths": ("6", "1,2,4,6,10", "Further numbers of hidden layers in the control of the dip."),
    "detached_rates": (
        "0.01,0.1",
        "0.001,0.003,0.01,0.03,0.1,0.3",
        "Learning rates to choose from in the control of detached statistics.",
    ),
    "rates": ("0.01:10:7", "1e-4:100:25", "Learning rates of the map in the control of rates."),
    "depths": (
        "5,10,20,40",
        "3,5,7,10,14,20,28,40,56,80",
        "Numbers of hidden layers in the control of depth.",
    ),
    "depth_rates": (
        "0.01,0.1,0.3",
        "0.0003,0.001,0.003,0.01,0.03,0.1,0.3",
        "Learning rates to choose from in the control of depth.",
    ),
}


def _define_grid():
    for name, (quick, full, text) in GRID.items():
        define = flags.DEFINE_integer if isinstance(quick, int) or quick is None else flags.DEFINE_string
        given = "" if quick is None else f" Default: {quick}; with --full, {full}."
        define(name, None, text + given)


flags.DEFINE_list("controls", "frozen,detached,evaluation,norms,dip,rates,depth", "Which to run.")
flags.DEFINE_bool("full", False, "More seeds, scales, rates and steps, and contrasts of depth.")
flags.DEFINE_string("dataset", "fashion_mnist_mini", f"Of {', '.join(bnjax.data.NAMES)}.")
flags.DEFINE_string("data_dir", None, "Where prepared data sets are kept. Default: the user's cache folder.")
flags.DEFINE_string("manual_dir", None, "Folder with a data set's original archives, instead of a download.")
flags.DEFINE_integer("pool", 4, "Images are averaged over squares of this many pixels a side.", lower_bound=1)
flags.DEFINE_integer(
    "layers", 3, "Number of hidden layers, but where depth is what is varied.", lower_bound=1
)
flags.DEFINE_integer("hidden_width", 64, "Units per hidden layer.", lower_bound=1)
flags.DEFINE_float("epsilon", 1e-5, "Batch normalization's epsilon, but where it is varied.")
flags.DEFINE_integer("batch_size", 128, "Examples per step.", lower_bound=2)
flags.DEFINE_integer("depth_batch_size", 128, "Examples per step of the control of depth.", lower_bound=4)
flags.DEFINE_float("learning_rate", 0.1, "Of SGD with momentum 0.9, but where it is varied.")
flags.DEFINE_float("norms_rate", 0.5, "Learning rate of the control of norms, which has no momentum.")
flags.DEFINE_float("weight_decay", 0.2, "Of the control of norms.")
flags.DEFINE_string("out", "results/why_robust", "Output folder.")
_define_grid()

SCRIPT = "why_robust"
TEST_EXAMPLES = 1000  # the first of the test split
MOST_LAYERS = 1000
# Of the time that all controls take together.
SHARES = {"frozen": 11, "detached": 20, "evaluation": 9, "norms": 11, "dip": 25, "rates": 7, "depth": 17}


CONTROLS = {
    "frozen": frozen.CONTROL,
    "detached": detached.CONTROL,
    "evaluation": evaluation.CONTROL,
    "norms": norms.CONTROL,
    "dip": dip.CONTROL,
    "rates": rates.CONTROL,
    "depth": depth.CONTROL,
}


def prepare(argv: list[str], folder: Path) -> Setup:
    """Every check that can be made before training, and the data."""
    common.check_arguments(argv)
    if not FLAGS.controls:
        raise ValueError(f"--controls is empty; allowed: {', '.join(CONTROLS)}")
    for name in FLAGS.controls:
        choices.check("control in --controls", name, CONTROLS)
    if len({*FLAGS.controls}) < len(FLAGS.controls):
        raise ValueError(f"--controls names one twice: {','.join(FLAGS.controls)}")
    texts = {name: FLAGS[name].value for name in GRID}
    texts = {name: (GRID[name][FLAGS.full] if value is None else value) for name, value in texts.items()}
    seeds = common.parse_seeds("seeds", texts["seeds"])
    values = {name: texts[name] for name in ("depth_steps", "frozen_steps")}
    for name in (
        "init_scales",
        "dip_scales",
        "dip_epsilons",
        "dip_rates",
        "detached_rates",
        "rates",
        "depth_rates",
    ):
        values[name] = sorted(common.parse_floats(name, texts[name]))
    for name in ("depths", "dip_depths"):
        values[name] = parse_depths(name, texts[name])
    if values["depths"][0] < 2:
        raise ValueError(f"--depths must be at least 2, got {texts['depths']}")
    for name in ("init_scales", "dip_scales"):
        if len(values[name]) < 3 or not values[name][0] < 1 < values[name][-1]:
            raise ValueError(f"--{name} needs at least 3 values, on both sides of 1, got {texts[name]!r}")
    for name in (
        "dip_epsilons",
        "dip_rates",
        "detached_rates",
        "rates",
        "depth_rates",
        "init_scales",
        "dip_scales",
    ):
        axis = "init_scale" if name.endswith("scales") else "learning_rate"  # an epsilon's range is the same
        try:
            grid.check({axis: values[name], "seed": seeds}, bnjax.Hyperparams())
        except ValueError as error:
            raise ValueError(f"--{name} or --seeds: {error}") from None
    for name in ("epsilon", "learning_rate", "norms_rate", "weight_decay"):
        if not 0 < FLAGS[name].value < math.inf:
            raise ValueError(f"--{name} must be above 0 and finite, got {FLAGS[name].value}")
    if FLAGS.norms_rate * FLAGS.weight_decay >= 1:
        raise ValueError(
            f"--norms_rate={FLAGS.norms_rate} times --weight_decay={FLAGS.weight_decay} must be below 1: "
            f"such a step "
            "would turn weights around"
        )
    for flag in ("steps", "depth_steps", "frozen_steps"):
        if texts[flag] < 2:
            raise ValueError(f"--{flag} must be at least 2, got {texts[flag]}")
    config = bnjax.TrainConfig(
        steps=texts["steps"], batch_size=FLAGS.batch_size, eval_every=max(1, texts["steps"] // 10)
    )
    choices.check("--dataset", FLAGS.dataset, bnjax.data.NAMES)
    common.check_out(
        folder, SCRIPT, *(f"{name}.{kind}" for name in FLAGS.controls for kind in ("zarr", "png"))
    )
    ds = bnjax.data.load(
        FLAGS.dataset,
        data_dir=FLAGS.data_dir,
        manual_dir=FLAGS.manual_dir,
        train_examples=texts["train_examples"],
    )
    for flag in ("batch_size", "depth_batch_size"):
        if FLAGS[flag].value > len(ds.train_x):
            raise ValueError(
                f"--{flag} must be at most the {len(ds.train_x)} training examples, got {FLAGS[flag].value}"
            )
    images = bnjax.data.standardize(
        ds._replace(
            train_x=pooled(ds.train_x),
            test_x=pooled(ds.test_x[:TEST_EXAMPLES]),
            test_y=ds.test_y[:TEST_EXAMPLES],
        )
    )
    xor = synthetic.sparse_parity(
        dimensions=images.train_x.shape[1],
        train_examples=len(images.train_x),
        test_examples=len(images.test_x),
    )
    network = {
        "features": (FLAGS.hidden_width,) * FLAGS.layers,
        "num_outputs": 10,
        "epsilon": FLAGS.epsilon,
    }
    hyper = bnjax.Hyperparams(learning_rate=FLAGS.learning_rate, momentum=MOMENTUM)
    return Setup(
        images,
        xor,
        seeds,
        values["init_scales"],
        values,
        network,
        config,
        hyper,
        norms_rate=FLAGS.norms_rate,
        weight_decay=FLAGS.weight_decay,
        depth_batch_size=FLAGS.depth_batch_size,
        full=FLAGS.full,
    )


def parse_depths(flag: str, text: str) -> list[int]:
    """`5,10,20`, ascending and without repetition."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1 or found[-1] > MOST_LAYERS:
        raise ValueError(f"--{flag} takes numbers of layers '5,10,20' from 1 to {MOST_LAYERS}, got {text!r}")
    return found


def pooled(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [N, D]: the means over squares of --pool pixels a side."""
    n, height, width, channels = images.shape
    side = FLAGS.pool
    if height % side or width % side:
        raise ValueError(f"--pool must divide the images' {height} x {width} pixels, got {side}")
    squares = np.asarray(images).reshape(n, height // side, side, width // side, side, channels)
    return squares.mean((2, 4)).reshape(n, -1)


@common.interruptible()
def main(argv: list[str]) -> None:
    """Flags -> controls -> findings, table, figures, stored results."""
    common.prepare_process()
    folder = Path(FLAGS.out).expanduser()
    try:
        setup = prepare(argv, folder)
    except (ValueError, OSError, ImportError) as error:
        raise common.fail(str(error)) from None
    console = common.console()
    findings = {}
    start = time.monotonic()
    for i, name in enumerate(FLAGS.controls):
        control = CONTROLS[name]
        results = control.measure(setup)
        results.attrs["control"] = name
        common.save(results, folder / f"{name}.zarr", SCRIPT)
        common.save(control.draw(results), folder / f"{name}.png", SCRIPT)
        findings[name] = control.judge(results)
        console.rule(f"{name}: {control.question}", align="left")
        console.print(control.explanation, highlight=False)
        for one in findings[name]:
            console.print(f"  [bold]Claim:[/bold] {one.claim}", highlight=False)
            console.print(f"  Measured: {escape(one.measured)}", highlight=False)
            console.print(f"  [bold]Verdict: {verdict(one)}[/bold]", highlight=False)
        print(time_left(i + 1, start), file=sys.stderr, flush=True)
    console.print(table(findings, len(setup.seeds)))
    print(
        f"results and figures: {folder}/<control>.zarr (bnjax.load_results opens it), {folder}/<control>.png"
    )
    print(f"{time.monotonic() - start:.0f} s in all")


def time_left(done: int, start: float) -> str:
    """From the shares that the controls usually take."""
    total, before = (sum(SHARES[name] for name in names) for names in (FLAGS.controls, FLAGS.controls[:done]))
    seconds = time.monotonic() - start
    left = seconds * (total - before) / before
    return f"control {done} of {len(FLAGS.controls)} done: {seconds:.0f} s so far, some {left:.0f} s left"


def table(findings: Mapping[str, list[Finding]], seeds: int) -> Table:
    """Every claim with its figures and its verdict."""
    found = Table(
        title="Why is BN robust to its initialization? Claims against measurements",
        caption=f"Figures are medians over {seeds} seeds, lowest and highest in brackets. Verdicts are computed.",
        caption_justify="left",
        show_lines=True,
    )
    for column, ratio in (("control", None), ("claim", 3), ("measured", 6), ("verdict", 2)):
        found.add_column(column, ratio=ratio)
    for name, several in findings.items():
        for one in several:
            found.add_row(name, one.claim, escape(one.measured), verdict(one))
    return found


if __name__ == "__main__":
    app.run(main)
