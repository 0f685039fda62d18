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
All of it takes about a minute and a half on 2 cores; --full, with more of everything, some 15 times as long. Expect:
features are learned from about 1e-3 to 1, a readout does the work above 10; running statistics fail in short training;
the dip is an overshoot of the first steps; training ends where it takes longer than the run to escape from zero.
"""

import concurrent.futures
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from absl import app, flags
from rich.markup import escape
from rich.table import Table

import bnjax
from bnjax import batch_norm, choices, initializers, plots, probes
from bnjax.data import synthetic
from bnjax.sweeps import grid, robustness, store
from bnjax.theory import mean_field
from experiments import common

FLAGS = flags.FLAGS

# {flag: (default, with --full, what it is)}
GRID = {
    "train_examples": (None, None, "Use only the first of the training examples. Default: all."),
    "steps": (200, 1000, "Optimizer steps."),
    "frozen_steps": (300, 1000, "Optimizer steps of the control of frozen weights: XOR takes longer."),
    "depth_steps": (150, 1000, "Optimizer steps of the control of depth."),
    "seeds": ("3", "10", "Initialization seeds: a count, a range 0:5 or a list 0,1,2."),
    "init_scales": ("1e-4:1e4:9", "1e-4:1e4:17", "A list, or low:high:count for log spacing."),
    "dip_scales": ("1e-12:10:27", "1e-16:1e4:81", "init_scales of the control of the dip."),
    "dip_epsilons": ("1e-7,1e-5,1e-3", "1e-8,1e-7,1e-6,1e-5,1e-4,1e-3", "Values of BN's epsilon there."),
    "dip_rates": ("0.01,0.1", "0.003,0.01,0.03,0.1,0.3", "Learning rates there."),
    "dip_depths": ("2,6", "1,2,4,6,10", "Further numbers of hidden layers there."),
    "detached_rates": ("0.01,0.1", "0.001,0.003,0.01,0.03,0.1,0.3", "Learning rates to choose from there."),
    "rates": ("0.01:10:7", "1e-4:100:25", "Learning rates of the map of rates and init_scales."),
    "depths": ("5,10,20,60", "3,5,7,10,14,20,28,40,56,80", "Numbers of hidden layers to train."),
    "depth_rates": (
        "0.001,0.01,0.1",
        "0.0003,0.001,0.003,0.01,0.03,0.1,0.3",
        "Learning rates to choose from there.",
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
flags.DEFINE_float("weight_decay", 0.2, "There.")
flags.DEFINE_string("out", "results/why_robust", "Output folder.")
_define_grid()

SCRIPT = "why_robust"
TEST_EXAMPLES = 1000  # the first of the test split
STATISTICS_EXAMPLES = 2000  # over which statistics are recomputed
MOMENTUM = 0.9  # the optimizer's
CHANCE = {"images": 0.1, "xor": 0.5}
TRAINS = 0.8  # of the best median accuracy
BN = "BN"
ADAM_RATE = 0.003
MOST_LAYERS = 1000
# Of the time that all controls take together.
SHARES = {"frozen": 13, "detached": 22, "evaluation": 10, "norms": 8, "dip": 36, "rates": 4, "depth": 7}


class Setup(NamedTuple):
    """What the flags ask for, checked."""

    images: bnjax.Dataset
    xor: bnjax.Dataset  # of the same shapes, so that one program serves both
    seeds: list[int]
    init_scales: list[float]
    values: dict[str, Any]  # {flag of GRID: its parsed value}
    network: dict[str, Any]  # what `bnjax.mlp` is given
    side_by_side: bool  # whether two controls run at a time
    config: bnjax.TrainConfig
    hyper: bnjax.Hyperparams


class Finding(NamedTuple):
    """A claim, what was measured, and the statements that the claim stands or falls with."""

    claim: str
    measured: str
    tests: Mapping[str, bool]  # {statement: whether the figures bear it out}


class Control(NamedTuple):
    """One question: the runs that it takes, what they say, how they look."""

    question: str
    explanation: str
    measure: Callable[[Setup], xr.Dataset]
    judge: Callable[[xr.Dataset], list[Finding]]
    draw: Callable[[xr.Dataset], Any]


def verdict(finding: Finding) -> str:
    """Supported if every statement holds, not supported if none does, else partly, and which."""
    failed = [text for text, holds in finding.tests.items() if not holds]
    if not failed:
        return "supported"
    if len(failed) == len(finding.tests):
        return "not supported"
    return f"partly supported; not so: {'; '.join(failed)}"


# Networks and runs


@functools.cache  # the same objects for all controls that train the same network, so that it is compiled once
def _network(inputs: int, **given) -> tuple[bnjax.Model, bnjax.Probe]:
    model = bnjax.mlp(**given)
    return model, probes.weights(model, (inputs,))


def networks(
    setup: Setup, changes: Mapping[str, Mapping]
) -> tuple[dict[str, bnjax.Model], dict[str, bnjax.Probe]]:
    """{name: model} and {name: probe of its weights}, by what `bnjax.mlp` is given beside the flags."""
    inputs = setup.images.train_x.shape[-1]
    made = {name: _network(inputs, **(setup.network | change)) for name, change in changes.items()}
    return {name: one[0] for name, one in made.items()}, {name: one[1] for name, one in made.items()}


def run(setup: Setup, models, ds: bnjax.Dataset, config: bnjax.TrainConfig, axes, *, hyper=None, probe=None):
    """`bnjax.sweep`, without its progress where two controls run at a time."""
    hyper = setup.hyper if hyper is None else hyper
    return bnjax.sweep(models, ds, config, axes, hyper=hyper, probe=probe, progress=not setup.side_by_side)


def rates_and_scales(
    setup: Setup, rates: str | None = None, scales: list[float] | None = None
) -> dict[str, list]:
    """The axes of a sweep: learning rates (of that flag), init scales, seeds."""
    axes = {"init_scale": scales or setup.init_scales, "seed": setup.seeds}
    return axes if rates is None else {"learning_rate": setup.values[rates]} | axes


def gradients(model: bnjax.Model, params, batch_stats, x, y):
    """The gradient of the loss of a batch with respect to `params`."""

    def loss(params):
        logits, _ = model.apply(params, batch_stats, x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return jax.grad(loss)(params)


def first_step(
    models: Mapping[str, bnjax.Model],
    ds: bnjax.Dataset,
    batch_size: int,
    learning_rate: float,
    seeds: list[int],
    scales: list[float],
    ranks: bool = True,
) -> xr.Dataset:
    """What one step of SGD does to each hidden weight matrix, in float64.

    Returns:
      Data set of dimensions (model, init_scale, seed, layer): norm_before |W_0|, first_gradient_norm |g|, norm_after
      |W_1| of W_1 = W_0 - learning_rate g, radial_cosine of the angle between W_0 and g, and with `ranks` the
      stable ranks rank_before of W_0 and rank_after of W_1.
    """
    layers = []

    def one_layer(before, gradient):
        after = before - learning_rate * gradient
        norms = [jnp.linalg.norm(matrix) for matrix in (before, gradient, after)]
        return {
            "norm_before": norms[0],
            "first_gradient_norm": norms[1],
            "norm_after": norms[2],
            "radial_cosine": (before / norms[0] * gradient / norms[1]).sum(),
            **(
                {"rank_before": probes.stable_rank(before), "rank_after": probes.stable_rank(after)}
                if ranks
                else {}
            ),
        }

    def measure(model, seed, scale, ds):
        params, stats = model.init(jax.random.key(seed), ds.train_x.shape[1:], jnp.float32(scale))
        params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
        before = probes.kernels(params)
        slopes = probes.kernels(gradients(model, params, stats, ds.train_x, ds.train_y))
        layers[:] = [name for name in before if name != "output"]
        found = [one_layer(before[name], slopes[name]) for name in layers]
        return jax.tree.map(lambda *a: jnp.stack(a), *found)

    def all_models(seeds, scales, ds):
        found = [
            jax.vmap(lambda a, m=m: jax.vmap(lambda s: measure(m, s, a, ds))(seeds))(scales)
            for m in models.values()
        ]
        return jax.tree.map(lambda *a: jnp.stack(a), *found)

    with jax.enable_x64(True):
        double = jax.tree.map(
            lambda a: a[:batch_size].astype("float64" if a.dtype.kind == "f" else a.dtype), ds
        )
        found = jax.jit(all_models)(np.asarray(seeds, np.uint32), np.asarray(scales), double)
        found = jax.tree.map(np.asarray, found)
    dims = ("model", "init_scale", "seed", "layer")
    coords = {"model": np.asarray(list(models), object), "init_scale": scales, "seed": seeds}
    coords["layer"] = np.asarray(layers, object)
    return xr.Dataset({name: (dims, value) for name, value in found.items()}, coords)


# What the controls have in common when they judge


def threshold(epsilon):
    """The init_scale below which a ReLU network's signals die out at initialization (He's initializer).

    One layer of small signals multiplies their variance by init_scale^2 (1 - 1/pi) / epsilon.
    """
    return np.sqrt(epsilon * mean_field.gradient_growth("relu"))


def final(results: xr.Dataset, chance: float = 0.1) -> xr.Dataset:
    """The last evaluation; the accuracy of a run that diverged is that of guessing."""
    last = results.drop_dims("probe_step", errors="ignore").isel(step=-1, drop=True)
    names = ("train_accuracy", "test_accuracy")
    return last.assign({name: last[name].where(~last.diverged, chance) for name in names})


def hidden(values: xr.DataArray) -> xr.DataArray:
    """Of its layers the hidden ones."""
    return values.sel(layer=[name for name in values.layer.values if name != "output"])


def at(values: xr.DataArray, scale: float) -> xr.DataArray:
    """At the init_scale of the grid that is nearest to this one."""
    nearest = int(np.abs(np.log(values.init_scale.values / scale)).argmin())
    return values.isel(init_scale=nearest)


def spread(values: xr.DataArray, text: Callable[[float], str]) -> str:
    """`median [lowest, highest]` over seeds."""
    values = np.asarray(values, float).ravel()
    return f"{text(np.median(values))} [{text(values.min())}, {text(values.max())}]"


def percent(value: float) -> str:
    """A fraction as 81.4%."""
    return f"{100 * value:.1f}%"


def points(value: float) -> str:
    """A difference of fractions as +3.2 points."""
    return f"{100 * value:+.1f}"


def number(value: float) -> str:
    """Two or three digits, 1e-4 for 0.0001."""
    if value == 0 or not math.isfinite(value) or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def slope(x, y) -> float:
    """Of the straight line through log10 y over log10 x, by least squares; NaN for fewer than two points."""
    x, y = np.log10(np.asarray(x, float)), np.log10(np.asarray(y, float))
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 and np.isfinite(y).all() else math.nan


def rank_correlation(x, y) -> float:
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(np.asarray(values).ravel())) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1]) if len(ranks[0]) > 1 else math.nan


# a. Frozen: features or a readout?


def measure_frozen(setup: Setup) -> xr.Dataset:
    """Both tasks, with hidden weights trained and frozen: dimensions (task, model, init_scale, seed)."""
    models, probe = networks(setup, {"trained": {}, "frozen": {"freeze_hidden": True}})
    config = dataclasses.replace(setup.config, steps=setup.values["frozen_steps"], eval_every=None)
    found = [
        run(setup, models, ds, config, rates_and_scales(setup), probe=probe)
        for ds in (setup.images, setup.xor)
    ]
    return xr.concat(
        found, xr.Variable("task", np.asarray(["images", "xor"], object)), combine_attrs="override"
    )


def judge_frozen(results: xr.Dataset) -> list[Finding]:
    """At scale 1, at the largest scale, at the smallest."""
    accuracy = xr.concat(
        [final(results.sel(task=task), CHANCE[task]).test_accuracy for task in results.task.values], "task"
    )
    gain = accuracy.sel(model="trained") - accuracy.sel(
        model="frozen"
    )  # the same draw of weights, seed by seed
    angle = hidden(results.angle.sel(model="trained")).isel(probe_step=-1).median("layer")
    low, high = float(results.init_scale.min()), float(results.init_scale.max())

    def measured(scale):
        parts = []
        for task in ("xor", "images"):
            one = at(accuracy.sel(task=task), scale)
            trained, frozen = (spread(one.sel(model=m), percent) for m in ("trained", "frozen"))
            parts.append(f"{task}: trained {trained}, frozen {frozen}")
        turned = spread(at(angle.sel(task="xor"), scale), lambda a: f"{a:.2g}")
        return f"at {number(scale)}: {'; '.join(parts)}; hidden weights turned by {turned} degrees (xor)"

    learned = gain.sel(task="xor").median("seed")
    scales = learned.init_scale.values[learned.values > 0.1]
    where = f"{number(scales.min())} to {number(scales.max())}" if len(scales) else "no scale"

    def median(values):
        return float(values.median("seed"))

    frozen = (
        accuracy.sel(model="frozen").median("seed").max("init_scale")
    )  # the best readout on random features
    above = {
        task: median(at(accuracy.sel(task=task, model="trained"), low)) - float(frozen.sel(task=task))
        for task in CHANCE
    }
    one = at(accuracy.sel(task="xor"), 1).median("seed")
    return [
        Finding(
            "At init scale 1 a BN network learns features that random ones cannot replace.",
            f"{measured(1)}; more than 10 points above frozen on XOR at {where}",
            {
                "above 90% on XOR": bool(one.sel(model="trained") > 0.9),
                "frozen below 70%": bool(one.sel(model="frozen") < 0.7),
            },
        ),
        Finding(
            f"At init scale {number(high)} no features are learned: a readout on random ones does the work.",
            measured(high),
            {
                "hidden weights turn by less than 5 degrees": median(at(angle, high).max("task")) < 5,
                "within 3 points of frozen on images": abs(median(at(gain.sel(task="images"), high))) < 0.03,
                "within 3 points of frozen on XOR": abs(median(at(gain.sel(task="xor"), high))) < 0.03,
            },
        ),
        Finding(
            f"At init scale {number(low)} useful features are learned.",
            f"{measured(low)}; frozen at its best scale: xor {percent(float(frozen.sel(task='xor')))}, "
            f"images {percent(float(frozen.sel(task='images')))}",
            {
                "hidden weights turn by more than 45 degrees": median(at(angle, low).min("task")) > 45,
                "more than 10 points above the best frozen network on XOR": above["xor"] > 0.1,
                "above the best frozen network on images": above["images"] > 0,
            },
        ),
    ]


def draw_frozen(results: xr.Dataset):
    """Accuracy on both tasks, and the angles."""
    shown = []
    for task in results.task.values:
        accuracy = 100 * final(results.sel(task=task), CHANCE[task]).test_accuracy
        series = {f"hidden weights {m}": accuracy.sel(model=m) for m in ("trained", "frozen")}
        level = {"chance": 100 * CHANCE[task]}
        title = {"images": "Fashion-MNIST", "xor": "XOR of two of the inputs"}.get(task, task)
        shown.append(plots.Panel(title, "final test accuracy (%)", series, levels=level))
    angle = results.angle.sel(model="trained", task="xor").isel(probe_step=-1)
    series = {str(layer): angle.sel(layer=layer) for layer in angle.layer.values}
    shown.append(plots.Panel("How far weights turned (XOR)", "angle to the start (degrees)", series))
    return plots.panels(shown, title="Features or a readout on random features?")


# b. Detached: is it enough to normalize forward?

DETACHED = {BN: (), "mean detached": ("mean",), "var detached": ("var",), "both detached": ("mean", "var")}


def measure_detached(setup: Setup) -> xr.Dataset:
    """Dimensions (model, learning_rate, init_scale, seed), and the first gradient's radial part at scale 1."""
    models, probe = networks(
        setup, {name: {"detach": names} if names else {} for name, names in DETACHED.items()}
    )
    axes = rates_and_scales(setup, "detached_rates")
    results = run(setup, models, setup.images, setup.config, axes, probe=probe)
    start = first_step(models, setup.images, setup.config.batch_size, 0.1, setup.seeds, [1.0], ranks=False)
    return results.assign(first_radial_cosine=hidden(start.radial_cosine).isel(init_scale=0, drop=True))


def judge_detached(results: xr.Dataset) -> list[Finding]:
    """Ranges of scales at the best learning rate; orthogonality; growth of the weights."""
    accuracy = robustness.final_accuracy(results, CHANCE["images"])
    summaries = robustness.summarize(accuracy, [TRAINS])
    ranges = {name: one[TRAINS].range.decades for name, one in summaries.items()}
    best = {name: accuracy.sel(model=name).median("seed").max() for name in DETACHED}
    best = {name: float(value) for name, value in best.items()}

    def text(name):
        one = accuracy.sel(model=name)
        rate = one.median("seed").max("init_scale").idxmax("learning_rate")
        return (
            f"{name}: {ranges[name]:.3g} decades, best {percent(best[name])}, at scale 1 "
            f"{spread(at(one.sel(learning_rate=rate), 1), percent)}"
        )

    cosine = np.abs(results.first_radial_cosine)
    largest = {name: float(cosine.sel(model=name).max()) for name in DETACHED}
    norms = hidden(results.weight_norm)
    grown = np.log10(norms.isel(probe_step=-1) / norms.isel(probe_step=0))
    rate = float(results.learning_rate.max())
    grown = at(grown.sel(learning_rate=rate), 1).median("layer")
    growth = "; ".join(
        f"{name} {spread(grown.sel(model=name), lambda v: f'{10**v:.3g}')}" for name in DETACHED
    )
    others = [name for name in DETACHED if name != BN]
    variance = [name for name in others if "var" in DETACHED[name]]
    return [
        Finding(
            f"Normalizing forward is enough: without the gradient through the statistics it trains as well "
            f"(at least {TRAINS:.0%} of the best accuracy, at the best learning rate for each scale).",
            "; ".join(text(name) for name in DETACHED),
            {
                f"{name}: as many decades (less 0.5), best within 3 points": not (
                    math.isnan(ranges[name])
                    or ranges[name] < ranges[BN] - 0.51
                    or best[name] < best[BN] - 0.03
                )
                for name in others
            },
        ),
        Finding(
            "What the gradient through the variance is good for: it takes away the part along W, so that "
            "a step can only make W longer and the output does not depend on its length.",
            f"largest |cosine| of W and dL/dW at scale 1: "
            f"{'; '.join(f'{name} {number(value)}' for name, value in largest.items())}; growth of |W| in "
            f"the run at "
            f"scale 1, learning rate {number(rate)}: {growth}",
            {
                "orthogonal in BN (below 1e-3)": largest[BN] < 1e-3,
                **{f"not so with {name} (above 1e-2)": largest[name] > 1e-2 for name in variance},
            },
        ),
    ]


def draw_detached(results: xr.Dataset):
    """Accuracy at the best rate, accuracy at the largest rate, growth of the weights there."""
    accuracy = 100 * robustness.final_accuracy(results, CHANCE["images"])
    best = accuracy.isel(learning_rate=accuracy.median("seed").argmax("learning_rate"))
    rate = float(results.learning_rate.max())
    norms = hidden(results.weight_norm).sel(learning_rate=rate)
    growth = (norms.isel(probe_step=-1) / norms.isel(probe_step=0)).median("layer")
    shown = [
        plots.Panel("Best learning rate for each scale", "final test accuracy (%)", by_model(best)),
        plots.Panel(
            f"Learning rate {number(rate)}",
            "final test accuracy (%)",
            by_model(accuracy.sel(learning_rate=rate)),
        ),
        plots.Panel(
            f"Growth of |W|, learning rate {number(rate)}",
            "|W| at the end / at the start",
            by_model(growth),
            yscale="log",
        ),
    ]
    return plots.panels(shown, title="Batch statistics detached from the gradient")


def by_model(values: xr.DataArray) -> dict[str, xr.DataArray]:
    """{name: its values}."""
    return {str(name): values.sel(model=name) for name in values.model.values}


# c. Evaluation: running statistics


def measure_evaluation(setup: Setup) -> xr.Dataset:
    """Dimensions (model, init_scale, seed, probe_step): accuracy with running, batch and recomputed statistics."""
    models, probe = {}, {}
    for momentum in (0.9, 0.99):
        name = f"momentum {momentum}"
        model = models[name] = bnjax.mlp(**(setup.network | {"momentum": momentum}))
        # With momentum 0 the running statistics are those of the last batch, here of many examples.
        latest = bnjax.mlp(**(setup.network | {"momentum": 0.0}))

        def measure(snapshot, model=model, latest=latest):
            params, stats, ds = snapshot.params, snapshot.batch_stats, snapshot.ds
            _, anew = latest.apply(params, stats, ds.train_x[:STATISTICS_EXAMPLES], train=True)
            found = {
                "running": model.apply(params, stats, ds.test_x, train=False)[0],
                "batch": model.apply(params, stats, ds.test_x, train=True)[0],
                "recomputed": model.apply(params, anew, ds.test_x, train=False)[0],
            }
            return {
                name: (logits.argmax(-1) == ds.test_y).mean(dtype=jnp.float32)
                for name, logits in found.items()
            }

        probe[name] = bnjax.Probe(measure)
    axes = rates_and_scales(setup)
    return run(setup, models, setup.images, setup.config, axes, probe=probe)


def judge_evaluation(results: xr.Dataset) -> list[Finding]:
    """Early and at the end, for each momentum."""
    found = []
    steps = results.probe_step.values
    early = int(steps[1:][np.abs(steps[1:] - steps[-1] / 10).argmin()])
    gap = results.recomputed - results.running
    for name in results.model.values:
        for step in dict.fromkeys((early, int(steps[-1]))):
            one = gap.sel(model=name, probe_step=step)
            medians = one.median("seed")
            worst = float(medians.idxmax("init_scale"))
            failing = medians.init_scale.values[medians.values > 0.05]
            parts = [
                f"{kind} {spread(results[kind].sel(model=name, probe_step=step, init_scale=worst), percent)}"
                for kind in ("running", "recomputed", "batch")
            ]
            at_one = spread(at(one, 1), points)
            found.append(
                Finding(
                    f"Running statistics ({name}) fail in evaluation after {step} steps: they cost more than "
                    f"5 points.",
                    f"worst at scale {number(worst)}: {', '.join(parts)}; at scale 1 they cost {at_one} "
                    f"points; "
                    f"they cost more than 5 points at {len(failing)} of {len(medians)} scales",
                    {
                        "at some scale": bool(len(failing)),
                        "at scale 1": bool(at(medians, 1) > 0.05),
                        "at most scales": len(failing) > len(medians) / 2,
                    },
                )
            )
    restored = np.abs(results.recomputed - results.batch).isel(probe_step=slice(1, None)).median("seed")
    found.append(
        Finding(
            "The failure is one of evaluation only: statistics taken anew over training data, at the same "
            "weights, "
            "restore what batch statistics give.",
            f"recomputed and batch statistics differ by at most {percent(float(restored.max()))} at any "
            f"scale, momentum "
            f"and step (medians over seeds), by {percent(float(restored.median()))} in the median",
            {
                "within 5 points everywhere": bool(restored.max() < 0.05),
                "within 2 points in the median": bool(restored.median() < 0.02),
            },
        )
    )
    return found


def draw_evaluation(results: xr.Dataset):
    """Momentum by early and late."""
    steps = results.probe_step.values
    early = int(steps[1:][np.abs(steps[1:] - steps[-1] / 10).argmin()])
    shown = []
    for name in results.model.values:
        for step in dict.fromkeys((early, int(steps[-1]))):
            one = 100 * results[["running", "batch", "recomputed"]].sel(model=name, probe_step=step)
            labels = {
                "running": "running",
                "batch": "of the test batch",
                "recomputed": "taken anew over training data",
            }
            series = {labels[kind]: one[kind] for kind in labels}
            shown.append(
                plots.Panel(f"{name}, {step} steps", "test accuracy (%)", series, levels={"chance": 10})
            )
    return plots.panels(shown, title="Which statistics evaluation uses", columns=2)


# d. Norms of the weights


def measure_norms(setup: Setup) -> xr.Dataset:
    """The first step in float64, and SGD without momentum: dimensions (weight_decay, init_scale, seed)."""
    models, _ = networks(setup, {BN: {}})
    model, inputs = models[BN], setup.images.train_x.shape[1:]
    weights = probes.weights(model, inputs)

    size = setup.config.batch_size
    batches = min(4, len(setup.images.train_x) // size)

    def measure(snapshot):
        def squares(batch):
            slopes = probes.kernels(gradients(model, snapshot.params, snapshot.batch_stats, *batch))
            return jnp.stack([(slopes[name] ** 2).sum() for name in weights.layers])

        first = [a[: batches * size].reshape(batches, size, *a.shape[1:]) for a in snapshot.ds[:2]]
        norms = jnp.sqrt(jax.lax.map(squares, tuple(first)).mean(0))
        return {**weights.measure(snapshot), "gradient_norm": norms}

    # Gradients vary from step to step: the mean at equilibrium needs many evaluations.
    config = dataclasses.replace(setup.config, eval_every=max(1, setup.config.steps // 60))
    axes = {"weight_decay": [0.0, FLAGS.weight_decay]} | rates_and_scales(setup)
    hyper = bnjax.Hyperparams(learning_rate=FLAGS.norms_rate, momentum=0.0)
    probe = bnjax.Probe(measure, weights.layers)
    results = run(setup, model, setup.images, config, axes, hyper=hyper, probe=probe)
    fine = np.geomspace(min(setup.init_scales), max(setup.init_scales), 4 * len(setup.init_scales) - 3)
    rate = setup.hyper.learning_rate
    first = first_step(
        models, setup.images, setup.config.batch_size, rate, setup.seeds, [float(s) for s in fine]
    )
    first = first.isel(model=0, drop=True).rename(init_scale="first_scale", layer="hidden_layer")
    return results.merge(first, combine_attrs="override").assign_attrs(
        results.attrs | {"first_rate": rate, "epsilon": setup.network["epsilon"]}
    )


def judge_norms(results: xr.Dataset) -> list[Finding]:
    """The law of the first step, its peak, the effective learning rate, the equilibrium."""
    rate = results.attrs["first_rate"]
    limit = float(threshold(results.attrs["epsilon"]))
    predicted = np.sqrt(results.norm_before**2 + (rate * results.first_gradient_norm) ** 2)
    error = np.abs(results.norm_after / predicted - 1).max("hidden_layer")
    above = error.first_scale.values >= 10 * limit
    growth = (results.norm_after / results.norm_before).max("hidden_layer")
    peak = growth.idxmax("first_scale")
    rank = (
        results[["rank_before", "rank_after"]].mean("hidden_layer").sel(first_scale=limit, method="nearest")
    )
    return [
        Finding(
            "The first step makes W longer by the law |W1|^2 = |W0|^2 + lr^2 |g|^2: g is orthogonal to W.",
            f"largest relative error of |W1| at scales above ten thresholds: "
            f"{spread(error.isel(first_scale=above).max('first_scale'), number)}; at any scale: "
            f"{spread(error.max('first_scale'), number)} (epsilon lets a part along W through)",
            {
                "within 1% above ten thresholds": bool(error.isel(first_scale=above).max() < 0.01),
                "within 1% at every scale": bool(error.max() < 0.01),
            },
        ),
        Finding(
            "The first step overshoots at small scales, most near the threshold where signals die, and "
            "leaves little of W "
            "but its first gradient, which has a low rank.",
            f"|W1| / |W0| is largest, {spread(growth.max('first_scale'), number)}, at init scale "
            f"{spread(peak, number)}; threshold {number(limit)}; at scale 1 it is "
            f"{spread(growth.sel(first_scale=1, method='nearest'), number)}. Stable rank |W|^2 / |W|_2^2 "
            f"there, mean of "
            f"hidden layers: {spread(rank.rank_before, number)} before, {spread(rank.rank_after, number)} "
            f"after the step",
            {
                "the peak is within a factor of 3 of the threshold": bool(
                    (np.abs(np.log(peak / limit)) < math.log(3)).all()
                ),
                "there |W| grows more than tenfold": bool((growth.max("first_scale") > 10).all()),
                "there the stable rank falls below a third": bool(
                    (rank.rank_after < rank.rank_before / 3).all()
                ),
            },
        ),
        *judge_rates_of_weights(results),
        judge_equilibrium(results),
    ]


def judge_rates_of_weights(results: xr.Dataset) -> list[Finding]:
    """How far the effective learning rate forgets the init scale, without weight decay."""
    effective = np.log10(hidden(results.effective_learning_rate).sel(weight_decay=0)).median("layer")
    scales = results.init_scale.values
    small, large = scales <= 1, scales >= 1

    def decades(values, chosen):
        values = values.isel(init_scale=chosen)
        return values.max("init_scale") - values.min("init_scale")

    start, end = effective.isel(probe_step=0), effective.isel(probe_step=-1)
    return [
        Finding(
            "Without weight decay too-small weights grow until their effective learning rate lr/|W|^2 fits "
            "(learning rates tune themselves); too-large ones cannot shrink and stay frozen.",
            f"decades that lr/|W|^2 spans over init scales up to 1: at the start "
            f"{spread(decades(start, small), number)}, "
            f"at the end {spread(decades(end, small), number)}; from 1 up: "
            f"{spread(decades(start, large), number)} and "
            f"{spread(decades(end, large), number)}",
            {
                "below 1 at most half of the decades is left": bool(
                    decades(end, small).median() <= decades(start, small).median() / 2
                ),
                "above 1 at least three quarters are left": bool(
                    decades(end, large).median() >= 0.75 * decades(start, large).median()
                ),
            },
        )
    ]


def equilibrium(learning_rate, weight_decay, invariant_gradient):
    """|W| at which a step's growth and decay cancel, and the angle of a step, in radians.

    With g orthogonal to W, |W'|^2 = (1 - lr wd)^2 |W|^2 + lr^2 |g|^2 and |g| = |g~| / |W|, so that |W'| = |W| at
    |W|^4 = lr |g~|^2 / (2 wd - lr wd^2) (van Laarhoven 2017, with the term of second order), where a step turns W
    by lr |g| / |W| = sqrt(2 lr wd - lr^2 wd^2), whatever the task.
    """
    product = learning_rate * weight_decay
    norm = (learning_rate**2 * invariant_gradient**2 / (product * (2 - product))) ** 0.25
    return norm, math.sqrt(product * (2 - product))


def judge_equilibrium(results: xr.Dataset) -> Finding:
    """The last third of the run with weight decay, against the formula."""
    rate = results.attrs["hyper"]["learning_rate"]
    decay = float(results.weight_decay.max())
    late = results.sel(weight_decay=decay).isel(
        probe_step=slice(-max(1, results.sizes["probe_step"] // 3), None)
    )
    norm, slopes = hidden(late.weight_norm), hidden(late.gradient_norm)
    invariant = np.sqrt(((norm * slopes) ** 2).mean("probe_step"))
    expected, turn = equilibrium(rate, decay, invariant)
    ratio = (norm**4).mean("probe_step") ** 0.25 / expected
    turned = np.sqrt(((rate * slopes / norm) ** 2).mean("probe_step"))
    forgotten = np.log10(norm.isel(probe_step=-1).median("layer"))
    left = forgotten.max("init_scale") - forgotten.min("init_scale")
    started = np.log10(results.init_scale.max() / results.init_scale.min())
    medians, by_seed = ratio.median(("layer", "seed")), ratio.median(("layer", "init_scale"))
    return Finding(
        "With weight decay |W| forgets its initialization, from both sides, and settles where |W|^4 = lr "
        "|g~|^2 / (2 wd).",
        f"lr {number(rate)}, wd {number(decay)}: |W| over init scales spans {spread(left, number)} decades "
        f"at the end, "
        f"{float(started):.3g} at the start; measured / predicted |W|: {spread(by_seed, number)}, "
        f"by scale from {number(float(medians.min()))} to {number(float(medians.max()))}; a step turns W by "
        f"{spread(turned.median(('layer', 'init_scale')), number)} rad, predicted {turn:.3g}",
        {
            "a tenth of the decades is left": bool((left <= started / 10).all()),
            "within 10% of the formula in the median": abs(float(by_seed.median()) - 1) < 0.1,
            "within 30% at every scale": bool((np.abs(medians - 1) < 0.3).all()),
        },
    )


def draw_norms(results: xr.Dataset):
    """Growth in the first step; effective rates before and after; approach to equilibrium."""
    rate = results.attrs["first_rate"]
    first = results.rename(first_scale="x").median("seed")
    first = first.isel(hidden_layer=first.sizes["hidden_layer"] // 2)
    law = np.sqrt(first.norm_before**2 + (rate * first.first_gradient_norm) ** 2)
    ratio = {"measured": first.norm_after / first.norm_before, "law": law / first.norm_before}
    ratio = {name: value.rename(x="init_scale") for name, value in ratio.items()}
    marks = {"threshold": float(threshold(results.attrs["epsilon"]))}
    effective = hidden(results.effective_learning_rate).sel(weight_decay=0).median("layer")
    series = {
        f"step {int(step)}": effective.sel(probe_step=step, drop=True)
        for step in results.probe_step.values[[0, min(5, len(results.probe_step) - 1), -1]]
    }
    shown = [
        plots.Panel(
            "First step, a middle layer", "|W1| / |W0|", ratio, yscale="log", marks=marks, dashed=["law"]
        ),
        plots.Panel(
            "No weight decay", "effective learning rate lr / |W|^2", series, yscale="log", marks=marks
        ),
    ]
    decayed = hidden(results.weight_norm).isel(weight_decay=-1).median("layer")
    scales = results.init_scale.values[:: -(-len(results.init_scale) // 6)]
    series = {f"init scale {number(s)}": decayed.sel(init_scale=s, drop=True) for s in scales}
    shown.append(
        plots.Panel(
            f"Weight decay {number(float(results.weight_decay.max()))}",
            "|W|",
            series,
            xlabel="step",
            xscale="linear",
            yscale="log",
        )
    )
    return plots.panels(shown, title="Norms of the weights and their learning rates")


# The dip, and where training ends


def measure_dip(setup: Setup) -> xr.Dataset:
    """Dimensions (epsilon, learning_rate, init_scale, seed); further depths at the flags' epsilon; Adam."""
    scales, epsilons = setup.values["dip_scales"], setup.values["dip_epsilons"]
    models, probe = networks(setup, {number(e): {"epsilon": e} for e in epsilons})
    axes = rates_and_scales(setup, "dip_rates", scales)
    results = run(setup, models, setup.images, setup.config, axes, probe=probe)
    results = results.rename(model="epsilon").assign_coords(epsilon=epsilons)

    width, *_ = base = setup.network["features"]
    depths = [d for d in setup.values["dip_depths"] if d != len(base)]
    axes = rates_and_scales(setup, None, scales)
    if depths:
        models = {str(d): bnjax.mlp(**(setup.network | {"features": (width,) * d})) for d in depths}
        deeper = final(run(setup, models, setup.images, setup.config, axes)).train_accuracy
        results = results.assign(depth_accuracy=deeper.rename(model="depth").assign_coords(depth=depths))

    # Adam where the dip is deepest, at the smallest epsilon.
    smallest = min(epsilons)
    near = [s for s in scales if s >= threshold(smallest) / 100]
    axes = axes | {"init_scale": near or scales}
    hyper = setup.hyper._replace(learning_rate=ADAM_RATE)
    adam = dataclasses.replace(setup.config, optimizer="adam")
    other = final(
        run(setup, models_of(setup, smallest), setup.images, adam, axes, hyper=hyper)
    ).train_accuracy
    other = other.isel(model=0, drop=True).reindex(init_scale=scales)
    attrs = {"layers": len(base), "epsilon": setup.network["epsilon"], "rate": setup.hyper.learning_rate}
    return results.assign(adam_accuracy=other).assign_attrs(attrs)


def models_of(setup: Setup, epsilon: float) -> dict[str, bnjax.Model]:
    """The network with this epsilon."""
    return networks(setup, {number(epsilon): {"epsilon": epsilon}})[0]


def dip(values: xr.DataArray, epsilon: float) -> xr.Dataset:
    """The lowest value within a decade of the threshold.

    Returns:
      scale: its init_scale; depth: by how much the highest values below and above that scale both exceed it.
    """
    limit = float(threshold(epsilon))
    scales = values.init_scale
    near = values.where((scales > limit / 10) & (scales < limit * 10))
    place, lowest = near.idxmin("init_scale"), near.min("init_scale")
    sides = [values.where(side).max("init_scale") - lowest for side in (scales < place, scales > place)]
    return xr.Dataset({"scale": place, "depth": np.minimum(*sides)})


def end_of_training(accuracy: xr.DataArray) -> xr.DataArray:
    """The lowest init_scale from which every one up to 0.1 trains at all: to twice the accuracy of guessing.

    Infinite where none does; the grid's lowest where all do.
    """
    accuracy = accuracy.sel(init_scale=accuracy.init_scale[accuracy.init_scale <= 0.1])
    accuracy = accuracy.sortby("init_scale", ascending=False)
    works = (accuracy >= 2 * CHANCE["images"]).cumprod("init_scale").astype(bool)
    return accuracy.init_scale.where(works, math.inf).min("init_scale")


def predicted_end(depth: int, epsilon: float, learning_rate: float, steps: int, factor: float = 1.0) -> float:
    """Where the time to escape from zero weights is the length of the run.

    Far below the threshold each of L layers multiplies signals, and gradients, by a / sqrt(epsilon) at weights of
    size a, so that the gradient to one is g = c (a / sqrt(epsilon))^(L-1) / sqrt(epsilon), with a factor c of the task
    that the theory leaves open. a' = a + lr g grows from a_0 to anything in
    T = epsilon^(L/2) / (c lr (L-2) a_0^(L-2)) steps (Saxe et al. 2014 have it for deep linear networks), so that

        a_0 = (epsilon^(L/2) / (c lr (L-2) T))^(1/(L-2)),    lr: 1 / (1 - momentum) times the learning rate

    for L >= 3. For L = 2 growth is exponential, at the rate c lr / epsilon; for L = 1 g does not depend on a. Then 0.
    """
    if depth < 3:
        return 0.0
    rate = factor * learning_rate / (1 - MOMENTUM)
    return (epsilon ** (depth / 2) / (rate * (depth - 2) * steps)) ** (1 / (depth - 2))


def ends(results: xr.Dataset) -> tuple[list[tuple[str, int, float, float]], float]:
    """Measured and predicted ends of training.

    Returns:
      [(what, depth, measured, predicted)], and the factor c that was fitted, one for all of them: the median.
    """
    steps = results.attrs["config"]["steps"]
    layers, epsilon, rate = (results.attrs[name] for name in ("layers", "epsilon", "rate"))
    lowest = float(results.init_scale.min())
    measured = end_of_training(final(results).train_accuracy.median("seed"))
    cells = [
        (
            f"epsilon {number(e)}, lr {number(r)}",
            layers,
            float(measured.sel(epsilon=e, learning_rate=r)),
            (layers, e, r, steps),
        )
        for e in map(float, results.epsilon.values)
        for r in map(float, results.learning_rate.values)
    ]
    if "depth_accuracy" in results:
        deeper = end_of_training(results.depth_accuracy.median("seed"))
        cells += [
            (f"{d} layers", d, float(deeper.sel(depth=d)), (d, epsilon, rate, steps))
            for d in map(int, deeper.depth.values)
        ]
    factors = [
        (predicted_end(*arguments) / end) ** (depth - 2)
        for _, depth, end, arguments in cells
        if depth > 2 and lowest < end < math.inf
    ]
    factor = float(np.median(factors)) if factors else math.nan
    return [
        (text, depth, end, predicted_end(*arguments, factor)) for text, depth, end, arguments in cells
    ], factor


def near_rate(results: xr.Dataset) -> float:
    """Of the learning rates of the dip that nearest to the one of the other controls."""
    return min(
        map(float, results.learning_rate.values), key=lambda r: abs(math.log(r / results.attrs["rate"]))
    )


def judge_dip(results: xr.Dataset) -> list[Finding]:
    """Where the dip is and what makes it; where training ends."""
    last = final(results)
    epsilons = [float(e) for e in results.epsilon.values]
    rates = [float(r) for r in results.learning_rate.values]
    rate = near_rate(results)
    effective = np.log10(hidden(results.effective_learning_rate).isel(probe_step=-1).mean("layer"))
    both = xr.Dataset({"accuracy": last.train_accuracy, "effective": effective})
    middle = both.median("seed")

    def dips(name, of=both, rate=rate):
        return {e: dip(of[name].sel(learning_rate=rate, epsilon=e), e) for e in epsilons}

    by_seed, accuracy, slowest = dips("accuracy"), dips("accuracy", middle), dips("effective", middle)
    exponents = [slope(epsilons, [float(one[e].scale) for e in epsilons]) for one in (accuracy, slowest)]
    places = "; ".join(
        f"epsilon {number(e)} (threshold {number(float(threshold(e)))}): lowest accuracy at "
        f"{spread(by_seed[e].scale, number)}, {spread(by_seed[e].depth, points)} points below both sides; "
        f"lowest lr/|W|^2 at "
        f"{number(float(slowest[e].scale))}, {number(10 ** float(effective_at(middle, e, rate, slowest)))}"
        for e in epsilons
    )

    scales = results.init_scale.values
    pooled = [
        middle.sel(epsilon=e, learning_rate=rate).isel(
            init_scale=(scales >= threshold(e) / 2) & (scales <= 0.5)
        )
        for e in epsilons
    ]
    correlation = rank_correlation(*(np.concatenate([one[name].values for one in pooled]) for name in both))
    smallest = min(epsilons)
    adam, sgd = dip(results.adam_accuracy, smallest).depth, by_seed[smallest].depth
    slow, fast = min(rates), max(rates)
    by_rate = {r: dips("accuracy", middle, r) for r in (slow, fast)}
    depth = {r: {e: float(one.depth) for e, one in by_rate[r].items()} for r in by_rate}
    cells = [(r / e, float(one.depth)) for r in rates for e, one in dips("accuracy", middle, r).items()]
    ordered = [np.asarray(values) for values in zip(*cells, strict=True)]
    return [
        Finding(
            "Training accuracy dips near the threshold where signals die at initialization, with the "
            "effective learning "
            "rate lr/|W|^2: both places move with sqrt(epsilon).",
            f"{places}; place of the lowest accuracy ~ epsilon^{exponents[0]:.2f}, of the lowest lr/|W|^2 ~ "
            f"epsilon^{exponents[1]:.2f}",
            {
                "the accuracy's exponent is within 0.15 of 0.5": abs(exponents[0] - 0.5) < 0.15,
                "that of lr/|W|^2 is within 0.15 of 0.5": abs(exponents[1] - 0.5) < 0.15,
                **{
                    f"deeper than 3 points at epsilon {number(e)}": float(one.depth) > 0.03
                    for e, one in accuracy.items()
                },
            },
        ),
        Finding(
            "The dip is an overshoot: the first gradients, ~ 1/sigma, make W so long that its lr/|W|^2 is "
            "too small to learn.",
            f"rank correlation of accuracy and final lr/|W|^2 from half the threshold to scale 0.5, all "
            f"values of epsilon: "
            f"{correlation:.2f}; with Adam, whose first step is as long whatever the gradient, epsilon "
            f"{number(smallest)}: "
            f"{spread(adam, points)} points deep, with SGD {spread(sgd, points)}",
            {
                "rank correlation above 0.8": correlation > 0.8,
                "less than half as deep with Adam": float(adam.median()) < float(sgd.median()) / 2,
            },
        ),
        Finding(
            f"The dip gets shallower, by a third or more, with a learning rate of {number(slow)} instead of "
            f"{number(fast)}.",
            "; ".join(
                f"epsilon {number(e)}: {points(depth[slow][e])} and {points(depth[fast][e])} points"
                for e in epsilons
            )
            + " below both sides (medians over seeds). At the threshold the first step is ~ lr/epsilon times "
            "as long as W, an overshoot for any usual rate unless epsilon is large; rank correlation of depth and "
            f"lr/epsilon over all learning rates and values of epsilon: {rank_correlation(*ordered):.2f}",
            {f"at epsilon {number(e)}": depth[slow][e] < depth[fast][e] * 2 / 3 for e in epsilons},
        ),
        judge_end(results),
    ]


def effective_at(
    middle: xr.Dataset, epsilon: float, rate: float, places: Mapping[float, xr.Dataset]
) -> xr.DataArray:
    """log10 of the lowest effective learning rate of the dip."""
    return at(middle.effective.sel(epsilon=epsilon, learning_rate=rate), float(places[epsilon].scale))


def judge_end(results: xr.Dataset) -> Finding:
    """The lowest scale that trains, by epsilon, learning rate and depth, against `predicted_end`."""
    cells, factor = ends(results)
    lowest = float(results.init_scale.min())
    held = [(end, predicted) for _, depth, end, predicted in cells if depth > 2 and lowest < end < math.inf]
    ratios = [abs(math.log10(end / predicted)) for end, predicted in held]
    span = math.log10(max(held)[0] / min(held)[0]) if held else 0.0

    def text(name, depth, end, predicted):
        measured = f"below the grid's {number(end)}" if end <= lowest else number(end)
        return f"{name}: {measured} ({f'theory {number(predicted)}' if depth > 2 else 'theory: no end'})"

    below = final(results).train_accuracy.sel(learning_rate=near_rate(results)).median("seed")
    below = below.where((below.init_scale < threshold(below.epsilon) / 10) & (below >= 2 * CHANCE["images"]))
    return Finding(
        "Training ends far below the threshold, where the time to escape from zero is longer than the run.",
        f"lowest init scale that trains, {results.attrs['layers']} hidden layers unless stated: "
        f"{'; '.join(text(*cell) for cell in cells)} (epsilon {number(results.attrs['epsilon'])} with other "
        f"depths); one factor "
        f"of the theory was fitted, {number(factor)}; over {span:.1f} decades the largest deviation is a "
        f"factor "
        f"{number(10 ** max(ratios, default=math.nan))}. In between, a decade and more below the threshold, "
        f"accuracy goes up and "
        f"down from {percent(float(below.min()))} to {percent(float(below.max()))}: how far the steps that "
        f"escape overshoot depends "
        "on where they start",
        {
            "the theory fits all within a factor of 5": bool(held) and max(ratios) < math.log10(5),
            "no end in the grid for fewer than 3 layers": all(
                end <= lowest for _, d, end, _ in cells if d < 3
            ),
        },
    )


def draw_dip(results: xr.Dataset):
    """Accuracy and effective rates over scales, by epsilon, learning rate, depth, optimizer; ends against theory."""
    last = final(results)
    rate, accuracy = near_rate(results), 100 * last.train_accuracy
    ylabel = "final training accuracy (%)"
    effective = hidden(results.effective_learning_rate).isel(probe_step=-1).median("layer")
    effective = effective.where(last.train_accuracy.median("seed") >= 2 * CHANCE["images"])
    epsilons = [float(e) for e in results.epsilon.values]
    limits = {f"threshold, {number(e)}": float(threshold(e)) for e in epsilons}
    nearest = min(epsilons, key=lambda e: abs(math.log(e / results.attrs["epsilon"])))
    one, smallest = {"threshold": float(threshold(nearest))}, min(epsilons)

    def by_epsilon(values):
        return {f"epsilon {number(e)}": values.sel(epsilon=e, learning_rate=rate) for e in epsilons}

    by_rate = {
        f"learning rate {number(float(r))}": accuracy.sel(epsilon=nearest, learning_rate=r)
        for r in accuracy.learning_rate.values
    }
    depths = {f"{results.attrs['layers']} hidden layers": accuracy.sel(epsilon=nearest, learning_rate=rate)}
    if "depth_accuracy" in results:
        depths |= {
            f"{int(d)} hidden layers": 100 * results.depth_accuracy.sel(depth=d) for d in results.depth.values
        }
    optimizers = {
        f"SGD, learning rate {number(rate)}": accuracy.sel(epsilon=smallest, learning_rate=rate),
        f"Adam, learning rate {ADAM_RATE:g}": 100 * results.adam_accuracy,
    }
    lowest = float(results.init_scale.min())
    held = sorted(
        (predicted, end)
        for _, depth, end, predicted in ends(results)[0]
        if depth > 2 and lowest < end < math.inf
    )
    theory = [predicted for predicted, _ in held]
    against = {
        "measured": xr.DataArray([end for _, end in held], {"theory": theory}, ["theory"]),
        "equal": xr.DataArray(theory, {"theory": theory}, ["theory"]),
    }
    shown = [
        plots.Panel(
            f"SGD, learning rate {number(rate)}", ylabel, by_epsilon(accuracy), marks=limits, paired=True
        ),
        plots.Panel(
            "At the end",
            "effective learning rate lr / |W|^2",
            by_epsilon(effective),
            yscale="log",
            marks=limits,
            paired=True,
        ),
        plots.Panel(f"Learning rates, epsilon {number(nearest)}", ylabel, by_rate, marks=one),
        plots.Panel(f"Depths, epsilon {number(nearest)}", ylabel, depths, marks=one),
        plots.Panel(
            f"Optimizers, epsilon {number(smallest)}",
            ylabel,
            optimizers,
            marks={"threshold": float(threshold(smallest))},
        ),
        plots.Panel(
            "Where training ends",
            "lowest init_scale that trains",
            against,
            xlabel="theory: time to escape = steps",
            yscale="log",
            dashed=["equal"],
            unconnected=["measured"],
        ),
    ]
    return plots.panels(
        shown, title="The dip near the threshold (dotted), and the end of training", columns=3
    )


# e. Learning rates


def measure_rates(setup: Setup) -> xr.Dataset:
    """BN and no BN: dimensions (model, learning_rate, init_scale, seed)."""
    models, probe = networks(setup, {BN: {}, "no BN": {"norm": "none"}})
    axes = rates_and_scales(setup, "rates")
    return run(setup, models, setup.images, setup.config, axes, probe=probe)


def highest_rates(accuracy: xr.DataArray, level: float) -> xr.DataArray:
    """The highest learning rate that reaches the accuracy `level`, NaN where none does."""
    return accuracy.learning_rate.where(accuracy >= level).max("learning_rate")


def steps_to(results: xr.Dataset, loss: float) -> xr.DataArray:
    """Steps until the training loss is down to `loss`, interpolated between evaluations; infinite where it never is."""

    def cross(curve, steps):
        first = (curve <= loss).argmax(-1)[..., None]  # the first evaluation at the loss or below
        before = np.maximum(first - 1, 0)
        high, low = (np.log(np.take_along_axis(curve, index, -1)) for index in (before, first))
        part = np.where(high > low, (high - math.log(loss)) / np.where(high > low, high - low, 1), 1)
        found = (steps[before] + part * (steps[first] - steps[before]))[..., 0]
        return np.where((curve <= loss).any(-1), found, math.inf)

    found = xr.apply_ufunc(cross, results.train_loss, results.step, input_core_dims=[["step"], ["step"]])
    return found.where(~results.diverged, math.inf)


def judge_rates(results: xr.Dataset) -> list[Finding]:
    """Ratios of the highest learning rates; steps to a loss that both reach."""
    accuracy = final(results).test_accuracy
    level = TRAINS * float(accuracy.median("seed").max())
    highest = highest_rates(accuracy.median("seed"), level)
    seeds = highest_rates(accuracy, level)
    ratio = highest.sel(model=BN) / highest.sel(model="no BN")
    both = ratio.dropna("init_scale")
    texts = {m: spread(at(seeds.sel(model=m), 1), number) for m in (BN, "no BN")}
    works = {m: int(highest.sel(model=m).notnull().sum()) for m in (BN, "no BN")}
    at_one, middle = float(at(ratio, 1)), float(both.median()) if both.size else math.nan

    losses = results.train_loss.isel(step=-1).where(~results.diverged, math.inf).median("seed")
    target = 1.1 * float(losses.min(("learning_rate", "init_scale")).max())
    steps = steps_to(results, target)

    def best(model, scale=None):
        """Over learning rates, and scales unless one is given: that of the fewest steps in the median."""
        one = steps.sel(model=model)
        one = one if scale is None else at(one, scale)
        dims = [d for d in one.dims if d != "seed"]
        flat = one.stack(cell=dims)
        return flat.isel(cell=int(np.argmin(flat.median("seed").values)))

    counts = {(m, where): best(m, where) for m in (BN, "no BN") for where in (1, None)}
    medians = {key: float(value.median()) for key, value in counts.items()}
    return [
        Finding(
            "BN allows much higher learning rates: ten times as high, or more.",
            f"highest that trains (to {percent(level)} test accuracy) at init scale 1: BN {texts[BN]}, no BN "
            f"{texts['no BN']}, "
            f"ratio {number(at_one)}; median ratio over the {both.size} scales where both train: "
            f"{number(middle)}; BN trains at "
            f"{works[BN]} of {highest.sizes['init_scale']} scales, no BN at {works['no BN']}",
            {"tenfold at init scale 1": at_one >= 9.9, "tenfold in the median over scales": middle >= 9.9},
        ),
        Finding(
            "BN converges faster: fewer steps to the same training loss, each with its best learning rate.",
            f"steps to a loss of {target:.3g} nats: at init scale 1 BN {spread(counts[BN, 1], number)}, no "
            f"BN "
            f"{spread(counts['no BN', 1], number)}; with the init scale chosen, too: BN "
            f"{spread(counts[BN, None], number)}, "
            f"no BN {spread(counts['no BN', None], number)}",
            {
                "at init scale 1, by a fifth or more": medians[BN, 1] <= 0.8 * medians["no BN", 1],
                "with the best init scale for each, by a fifth or more": medians[BN, None]
                <= 0.8 * medians["no BN", None],
            },
        ),
    ]


def draw_rates(results: xr.Dataset):
    """Maps of accuracy."""
    return plots.maps(
        100 * final(results).test_accuracy.median("seed"), "final test accuracy (%), median over seeds"
    )


# f. Depth


def deep_network(depth: int, width: int, outputs: int, epsilon: float, activation=jax.nn.relu) -> bnjax.Model:
    """`bnjax.mlp` with BN for many layers: from the second on they are scanned, so that compiling is quick."""

    def init(key, input_shape, init_scale=1.0):
        first, second, third = jax.random.split(key, 3)

        def draw(key, fan_in):
            norm, stats = batch_norm.init(width)
            kernel = initializers.he_normal(key, (fan_in, width), init_scale)
            return {"kernel": kernel, "norm": norm}, stats

        bottom, bottom_stats = draw(first, math.prod(input_shape))
        above, above_stats = jax.vmap(lambda key: draw(key, width))(jax.random.split(second, depth - 1))
        output = {"kernel": initializers.he_normal(third, (width, outputs)), "bias": jnp.zeros(outputs)}
        params = {"first": bottom, "hidden": above, "output": output}
        return params, {"first": bottom_stats, "hidden": above_stats}

    def apply(params, batch_stats, x, *, train):
        def layer(x, both):
            one, stats = both
            y, stats = batch_norm.apply(
                one["norm"], stats, x @ one["kernel"], train=train, momentum=0.9, epsilon=epsilon
            )
            return activation(y), stats

        x, first = layer(x.reshape(len(x), -1), (params["first"], batch_stats["first"]))
        x, rest = jax.lax.scan(layer, x, (params["hidden"], batch_stats["hidden"]))
        return x @ params["output"]["kernel"] + params["output"]["bias"], {"first": first, "hidden": rest}

    config = {"model": "deep_network", "depth": depth, "features": [width] * depth, "num_outputs": outputs}
    return bnjax.Model(init, apply, config=config | {"epsilon": epsilon, "activation": activation.__name__})


def identity(x):
    """For linear networks."""
    return x


def measure_depth(setup: Setup) -> xr.Dataset:
    """Dimensions (variant, depth, learning_rate, seed), and the gradient's growth at the start (variant, seed)."""
    depths, width = setup.values["depths"], setup.network["features"][0]
    size = FLAGS.depth_batch_size
    variants = {f"ReLU, batch {size}": (jax.nn.relu, size)}
    if FLAGS.full:
        variants |= {"ReLU, batch 8": (jax.nn.relu, 8), f"linear, batch {size}": (identity, size)}
    axes = {"learning_rate": setup.values["depth_rates"], "seed": setup.seeds}
    found, growth = [], []
    for activation, batch in variants.values():
        models = {
            str(d): deep_network(d, width, setup.network["num_outputs"], setup.network["epsilon"], activation)
            for d in depths
        }
        config = bnjax.TrainConfig(steps=setup.values["depth_steps"], batch_size=batch)
        results = run(setup, models, setup.images, config, axes)
        found.append(results.rename(model="depth").assign_coords(depth=depths))
        growth.append(gradient_growth(models[str(depths[-1])], setup.images, batch, setup.seeds))
    variant = xr.Variable("variant", np.asarray(list(variants), object))
    results = xr.concat(found, variant, combine_attrs="override")
    theory = [
        mean_field.gradient_growth("relu" if activation is jax.nn.relu else "linear", batch)
        for activation, batch in variants.values()
    ]
    return results.assign(growth=(("variant", "seed"), np.asarray(growth)), theory=("variant", theory))


def gradient_growth(model: bnjax.Model, ds: bnjax.Dataset, batch_size: int, seeds: list[int]) -> np.ndarray:
    """By which factor the squared gradient to a layer's weights grows from layer to layer downward, at the start.

    Returns:
      One figure a seed: from the slope of its logarithm over the layers but the first and the last quarter.
    """

    def logs(seed, ds):
        params, stats = model.init(jax.random.key(seed), ds.train_x.shape[1:], 1.0)
        slopes = gradients(model, params, stats, ds.train_x[:batch_size], ds.train_y[:batch_size])["hidden"][
            "kernel"
        ]
        return jnp.log((slopes**2).sum((1, 2)))

    found = np.asarray(jax.jit(jax.vmap(logs, in_axes=(0, None)))(np.asarray(seeds, np.uint32), ds))
    cut = found.shape[1] // 4
    middle = found[:, cut : found.shape[1] - cut]
    if middle.shape[1] < 2:
        return np.full(len(seeds), np.nan)
    return np.exp([-np.polyfit(np.arange(middle.shape[1]), row, 1)[0] for row in middle])


def deepest(accuracy: xr.DataArray) -> xr.DataArray:
    """The depth up to which every one trains: to TRAINS of the accuracy of the least deep one; 0 for none.

    Args:
      accuracy: over depth, ascending, and maybe more.
    """
    works = (accuracy >= TRAINS * accuracy.isel(depth=0)).cumprod("depth").astype(bool)
    return accuracy.depth.where(works, 0).max("depth")


def judge_depth(results: xr.Dataset) -> list[Finding]:
    """How deep, in units of the mean-field depth scale; and that scale against the measured growth."""
    accuracy = final(results).train_accuracy
    rates = accuracy.median("seed").fillna(0).argmax("learning_rate")
    best = accuracy.isel(learning_rate=rates)
    found = []
    for variant in results.variant.values:
        one = best.sel(variant=variant)
        theory = float(results.theory.sel(variant=variant))
        scale = mean_field.depth_scale(theory)
        by_seed = deepest(one)
        reach = float(deepest(one.median("seed")))
        some = float(one.depth.where(one.median("seed") >= 2 * CHANCE["images"]).max())
        curve = "; ".join(f"{int(d)}: {spread(one.sel(depth=d), percent)}" for d in one.depth.values)
        growth = results.growth.sel(variant=variant)
        found.append(
            Finding(
                f"Depth is what BN does not cure ({variant}): gradients grow by {theory:.3f} a layer "
                f"(squared; mean "
                f"field), and training stops within 20 of the depth scales of that, {scale:.3g} layers.",
                f"training accuracy after {results.attrs['config']['steps']} steps, best learning rate, by "
                f"depth {curve}; "
                f"trains well (to {TRAINS:.0%} of the least deep) up to {spread(by_seed, number)} layers = "
                f"{reach / scale:.2g} depth scales, at all (twice guessing) up to {some:.0f} = "
                f"{some / scale:.2g}; growth "
                f"measured at the start, {int(one.depth[-1])} layers: {spread(growth, lambda v: f'{v:.3f}')}",
                {
                    "the deepest does not train well": reach < float(one.depth.max()),
                    "the last that trains at all is no deeper": some
                    < min(20 * scale, float(one.depth.max())),
                    "measured growth within 10% of mean field": bool(
                        abs(float(growth.median()) / theory - 1) < 0.1
                    ),
                },
            )
        )
    return found


def draw_depth(results: xr.Dataset):
    """Accuracy over depth, by learning rate and at the best."""
    accuracy = 100 * final(results).train_accuracy
    shown = []
    for variant in results.variant.values:
        one = accuracy.sel(variant=variant)
        series = {
            f"learning rate {number(float(r))}": one.sel(learning_rate=r) for r in one.learning_rate.values
        }
        scale = mean_field.depth_scale(float(results.theory.sel(variant=variant)))
        marks = {f"{k} depth scales": k * scale for k in (2, 6, 12)} if math.isfinite(scale) else {}
        shown.append(
            plots.Panel(
                str(variant),
                "final training accuracy (%)",
                series,
                xlabel="number of hidden layers",
                xscale="linear",
                marks=marks,
                levels={"chance": 10},
            )
        )
    return plots.panels(shown, title="How deep BN networks still train")


CONTROLS = {
    "frozen": Control(
        "Features or a readout?",
        "A network can reach a fair accuracy without learning features: a linear readout on top of random "
        "hidden layers "
        "will do for images. So each network is trained beside one whose hidden weights stay as drawn "
        "(frozen), also on XOR: "
        "the label is the sign of the product of two of 49 inputs, which random features of this width "
        "cannot tell. The angle "
        "says how far a weight matrix turned; 90 degrees: nothing of the initial draw is left.",
        measure_frozen,
        judge_frozen,
        draw_frozen,
    ),
    "detached": Control(
        "Is it enough to normalize forward?",
        "The batch's mean and variance depend on the weights, and the gradient goes through them, too. Here "
        "it is "
        "cut: the forward pass is the same, but the statistics are constants to the gradient (detached). "
        "BN's output does not "
        "change when W is multiplied by a factor, so the true gradient has no part along W. With the "
        "variance detached it "
        "has one: it follows a change of length that the next forward pass undoes, again and again.",
        measure_detached,
        judge_detached,
        draw_detached,
    ),
    "evaluation": Control(
        "Do running statistics fail?",
        "Training normalizes by the batch's statistics, evaluation by running averages of them, which begin "
        "at mean 0 and "
        "variance 1 and forget that by a factor of BN's momentum a step (0.9 or 0.99; not the optimizer's "
        "momentum). Compared "
        "with statistics of the test batch, and with statistics taken anew over training data at the same "
        "weights.",
        measure_evaluation,
        judge_evaluation,
        draw_evaluation,
    ),
    "norms": Control(
        "How do weights' lengths change, and what does it do?",
        "Behind BN only the direction of W counts, so a step's effect depends on lr/|W|^2, the effective "
        "learning rate. As the "
        "gradient is orthogonal to W, each step of SGD makes W longer; only weight decay makes it shorter.",
        measure_norms,
        judge_norms,
        draw_norms,
    ),
    "dip": Control(
        "Why is there a dip, and where does training end?",
        "Below the threshold init_scale* = sqrt(epsilon pi/(pi-1)) epsilon outweighs the variance of the "
        "signals, which die out "
        "layer by layer at initialization. Training works far below it, though, with a dip in accuracy near "
        "it.",
        measure_dip,
        judge_dip,
        draw_dip,
    ),
    "rates": Control(
        "Higher learning rates, faster convergence?",
        "Both are said of BN. Each network is trained on a map of learning rates and init scales; a rate "
        "trains if the "
        f"median test accuracy ends at {TRAINS:.0%} of the best of all, or above.",
        measure_rates,
        judge_rates,
        draw_rates,
    ),
    "depth": Control(
        "How deep?",
        "Going back, BN multiplies the squared gradient by a factor above 1 in each layer, pi/(pi-1) for "
        "ReLU and a large batch, "
        "whatever the init scale. The depth scale is the number of layers in which it grows by e.",
        measure_depth,
        judge_depth,
        draw_depth,
    ),
}


def prepare(argv: list[str], folder: Path) -> Setup:
    """Every check that can be made before training, and the data."""
    common.check_arguments(argv)
    if not FLAGS.controls:
        raise ValueError(f"--controls is empty; allowed: {', '.join(CONTROLS)}")
    for name in FLAGS.controls:
        choices.check("control", name, CONTROLS)
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
    choices.check("dataset", FLAGS.dataset, bnjax.data.NAMES)
    common.check_writable(folder)
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
    side_by_side = len(FLAGS.controls) > 1 and not FLAGS.full
    return Setup(images, xor, seeds, values["init_scales"], values, network, side_by_side, config, hyper)


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
    for i, (name, results) in enumerate(measured(setup)):
        control = CONTROLS[name]
        results.attrs |= {"command": common.command(SCRIPT), "control": name}
        path = folder / f"{name}.zarr"
        store.save(results, path, overwrite=True)
        control.draw(results).savefig(path.with_suffix(".png"))
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


def measured(setup: Setup) -> Iterator[tuple[str, xr.Dataset]]:
    """Each control's results, in order; two controls at a time, if so set up: one compiles while the other trains."""
    with concurrent.futures.ThreadPoolExecutor(2 if setup.side_by_side else 1) as pool:
        started = {name: pool.submit(CONTROLS[name].measure, setup) for name in FLAGS.controls}
        for name, one in started.items():
            yield name, one.result()


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
