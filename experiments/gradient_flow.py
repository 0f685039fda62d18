"""Do large initial weights make the gradient explode, with batch normalization (BN) or without? Layer by layer.

    python -m experiments.gradient_flow

takes the gradients of networks at initialization, on one batch of Fashion-MNIST, over 12 decades of init_scale: for
each activation, with BN and without, for two depths and 5 seeds. It prints how each layer's gradients change with the
scale (the slope of log |gradient| against log init_scale), all signals of one network layer by layer, and how its
gradients and weights move in a short training. Expect, from 30 times the scale at which BN's epsilon stops mattering:
with BN slope -1 for the weights' gradient and 0 for what passes from layer to layer; without BN, for ReLU, the number
of other scaled layers; for tanh and sigmoid a gradient that grows, then ends as exactly 0. A minute on 2 cores.

The gradient is that of <c, outputs>, c a fixed random cotangent, so that it shows the network alone: the
gradient of a cross-entropy to the outputs itself changes with their size, and is 0 where the softmax saturates
(--loss=cross_entropy).
"""

import functools
import itertools
import math
import queue
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from absl import app, flags
from rich.table import Table

import bnjax
from bnjax import activations, batch_norm, choices, probes
from bnjax.models import mlp
from bnjax.sweeps import grid, provenance
from bnjax.theory import mean_field
from bnjax.types import PyTree
from experiments import common

FLAGS = flags.FLAGS

flags.DEFINE_list("activations", "relu,tanh,sigmoid", f"Of {', '.join(activations.ACTIVATIONS)}.")
flags.DEFINE_list("norms", "batch,none", f"Of {', '.join(mlp.NORMS)}.")
flags.DEFINE_list("depths", "3,6", "Numbers of hidden layers.")
flags.DEFINE_integer("hidden_width", 128, "Units per hidden layer.", lower_bound=1)
flags.DEFINE_float("epsilon", 1e-5, "Batch normalization's, inside the square root.")
flags.DEFINE_string("init_scales", "1e-4:1e8:25", "A list, or low:high:count for log spacing.")
flags.DEFINE_string("seeds", "5", "Initialization seeds: a count, a range 0:5 or a list 0,1,2.")
flags.DEFINE_integer("batch_size", 128, "Examples, the first of the training split.", lower_bound=1)
flags.DEFINE_enum("loss", "cotangent", ["cotangent", "cross_entropy"], "What the gradient is of; see above.")
flags.DEFINE_string(
    "shown_scales", "0.1,1,10", "Of the figure by layer, the table by layer and the training."
)
flags.DEFINE_integer("jacobian_examples", 6, "The batch of the layers' Jacobians.", lower_bound=1)
flags.DEFINE_list("steps", "0,1,10,100", "Of training, at which gradients and weights are shown.")
flags.DEFINE_float("learning_rate", 0.1, "Of the training, SGD with momentum 0.9.")
flags.DEFINE_string("out", "results/gradient_flow", "Output folder.")

SCRIPT = "gradient_flow"
NORM_NAMES = {"batch": "BN", "none": "no BN"}
HOMOGENEOUS = ("relu", "leaky_relu", "linear")  # phi(a z) = a phi(z)
ABOVE = 30  # times the threshold: where the fit begins
FLAT = 0.05  # the largest slope that counts as 0, and the largest distance from a power law
AXES = ("activation", "norm", "depth")
PARTS = ("preactivation", "norm", "activation")
SMALL, MIDDLE, LARGE = 1e-2, 3, 1e2  # slopes without BN are up to SMALL, and from MIDDLE to LARGE


class Job(NamedTuple):
    """What the flags ask for, checked."""

    depths: list[int]
    scales: np.ndarray
    seeds: list[int]
    shown: list[float]
    steps: list[int]
    ds: bnjax.Dataset
    thresholds: dict[str, float]


def network(activation: str, norm: str, depth: int) -> bnjax.Model:
    """The network that the flags describe."""
    return bnjax.mlp((FLAGS.hidden_width,) * depth, 10, activation, norm, epsilon=FLAGS.epsilon)


def loss_function(y: jax.Array):
    """The scalar function of the outputs whose gradient is taken."""
    if FLAGS.loss == "cross_entropy":
        return lambda outputs: optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()
    cotangent = jax.random.normal(jax.random.key(0), (len(y), 10)) / len(y)
    return lambda outputs: (outputs * cotangent).sum()


def initializer(norm: str, depth: int, input_shape: tuple[int, ...]) -> Callable[[float, np.ndarray], Any]:
    """(scale, seeds) -> the states of all seeds' networks: the same for all activations."""
    model = network(FLAGS.activations[0], norm, depth)

    def init(scale, seeds):
        return jax.vmap(lambda seed: model.init(jax.random.key(seed), input_shape, scale))(seeds)

    return jax.jit(init)


def initializers(job: Job, depths: list[int]) -> dict[tuple[str, int], Callable[[float, np.ndarray], Any]]:
    """`initializer` by (norm, depth)."""
    shape = job.ds.train_x.shape[1:]
    return {(norm, depth): initializer(norm, depth, shape) for norm in FLAGS.norms for depth in depths}


def gradient_flow(model: bnjax.Model, x: jax.Array, y: jax.Array, params: PyTree, batch_stats: PyTree):
    """({name of an intermediate: (spread, gradient norm)}, {weight matrix: gradient norm}), of hidden layers."""
    found = probes.gradients(model, params, batch_stats, x, loss_function(y))
    shown = model.layers(params, batch_stats, x, {}, train=True)[1]
    names = [name for name in shown if name != "output"]
    spreads = jax.vmap(probes.spread)(jnp.stack([shown[name] for name in names]))
    return {n: (spreads[i], found.intermediates[n]) for i, n in enumerate(names)}, found.weights


def measure(job: Job) -> xr.Dataset:
    """Spreads and gradient norms of all networks; NaN where a network has no such layer."""
    x, y = (jnp.asarray(a[: FLAGS.batch_size]) for a in job.ds[:2])
    coords = coordinates(job)
    shape = tuple(len(values) for values in coords.values())
    texts = {"weight_gradient": "norm of the gradient to the weights"}
    for part in PARTS:
        texts[f"{part}_gradient"] = f"norm of the gradient to the {part}"
        texts[f"{part}_spread"] = f"spread of the {part} over the batch"
    data = {name: np.full(shape, np.nan, np.float32) for name in texts}

    inits = initializers(job, job.depths)

    def one(names):
        run = jax.jit(jax.vmap(functools.partial(gradient_flow, network(*names), x, y)))
        found = [run(*inits[names[1:]](scale, np.asarray(job.seeds))) for scale in job.scales]
        return jax.tree.map(lambda *scales: np.stack(scales), *found)  # [scales, seeds]

    indices = list(np.ndindex(shape[:3]))
    networks = [tuple(coords[axis][i] for axis, i in zip(AXES, index, strict=True)) for index in indices]
    found = on_all_devices(one, networks, "gradients at initialization")
    for index, (shown, weights) in zip(indices, found, strict=True):
        for i, layer in enumerate(coords["layer"]):
            if layer in weights:
                data["weight_gradient"][*index, ..., i] = weights[layer]
            for part in PARTS:
                if f"{layer}/{part}" in shown:
                    spread, gradient = shown[f"{layer}/{part}"]
                    data[f"{part}_spread"][*index, ..., i] = spread
                    data[f"{part}_gradient"][*index, ..., i] = gradient
    variables = {name: (tuple(coords), values, {"long_name": texts[name]}) for name, values in data.items()}
    return xr.Dataset(variables, coords)


def coordinates(job: Job) -> dict[str, np.ndarray]:
    """The labels of the results' dimensions."""
    layers = [*(f"hidden_{i}" for i in range(max(job.depths))), "output"]
    return {
        "activation": np.asarray(FLAGS.activations, object),
        "norm": np.asarray(FLAGS.norms, object),
        "depth": np.asarray(job.depths),
        "init_scale": job.scales,
        "seed": np.asarray(job.seeds),
        "layer": np.asarray(layers, object),
    }


def on_all_devices(function: Callable[[Any], Any], arguments: list[Any], description: str) -> list[Any]:
    """[function(argument)] as numpy arrays, one at a time on each device; with a progress bar on standard error."""
    devices = jax.local_devices()
    free = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def run(argument):
        device = free.get()
        try:
            with jax.default_device(device):
                return jax.tree.map(np.asarray, function(argument))
        finally:
            free.put(device)

    return common.in_threads(run, arguments, description, len(devices))


def measure_signals(job: Job) -> xr.Dataset:
    """What `probes.signals` has of the networks of the first depth at the shown scales, part by part."""
    x = jnp.asarray(job.ds.train_x[: FLAGS.batch_size])
    depth = job.depths[0]
    coords = coordinates(job) | {"shown_scale": np.asarray(job.shown)}
    dims = ("activation", "norm", "shown_scale", "seed", "layer")
    shape = tuple(len(coords[name]) for name in dims)
    fields = probes.Signal._fields
    data = {f"{part}_{name}": np.full(shape, np.nan, np.float32) for part in PARTS for name in fields}

    inits = initializers(job, [depth])

    def one(names):
        model = network(*names, depth)
        run = jax.jit(lambda states: jax.lax.map(lambda state: probes.signals(model, *state, x), states))
        found = [run(inits[names[1], depth](scale, np.asarray(job.seeds))) for scale in job.shown]
        return jax.tree.map(lambda *scales: np.stack(scales), *found)

    indices = list(np.ndindex(shape[:2]))
    networks = [(coords["activation"][a], coords["norm"][n]) for a, n in indices]
    for index, signals in zip(
        indices, on_all_devices(one, networks, "signals at initialization"), strict=True
    ):
        for i in range(depth):
            for part in PARTS:
                if f"hidden_{i}/{part}" in signals:
                    for name in fields:
                        data[f"{part}_{name}"][*index, ..., i] = getattr(signals[f"hidden_{i}/{part}"], name)
    names = {f"shown_{name}": (dims, values) for name, values in data.items()}
    return xr.Dataset(names, {name: coords[name] for name in dims})


def layer_jacobians(job: Job, norm: str, depth: int) -> list[np.ndarray]:
    """The singular values of each hidden layer's Jacobian, from its input to its activation, at init_scale 1."""
    model = network(FLAGS.activations[0], norm, depth)
    x = jnp.asarray(job.ds.train_x[: FLAGS.jacobian_examples])
    state = model.init(jax.random.key(job.seeds[0]), x.shape[1:], 1.0)
    names = [None, *(f"hidden_{i}/activation" for i in range(depth))]
    return [
        np.asarray(jax.jit(lambda *state, p=pair: probes.singular_values(model, *state, x, *p))(*state))
        for pair in itertools.pairwise(names)
    ]


def train(job: Job) -> xr.Dataset:
    """The first activation and depth, trained at the shown scales, with a probe of the weights."""
    models = {norm: network(FLAGS.activations[0], norm, job.depths[0]) for norm in FLAGS.norms}
    probe = {
        norm: probes.weights(model, job.ds.train_x.shape[1:], batch_size=FLAGS.batch_size)
        for norm, model in models.items()
    }
    ds = job.ds._replace(
        test_x=job.ds.test_x[:256], test_y=job.ds.test_y[:256]
    )  # its accuracy is not the point
    every = math.gcd(*job.steps)
    config = bnjax.TrainConfig(steps=max(job.steps), batch_size=FLAGS.batch_size, eval_every=every)
    axes = {"init_scale": job.shown, "seed": job.seeds[:3]}
    hyper = bnjax.Hyperparams(learning_rate=FLAGS.learning_rate)
    return bnjax.sweep(models, ds, config, axes, hyper=hyper, probe=probe).sel(probe_step=job.steps)


def slopes(values: xr.DataArray) -> xr.DataArray:
    """The slope of log10 values against log10 init_scale by least squares; of those that are finite and not 0."""
    y = np.log10(values.where((values > 0) & np.isfinite(values)).astype(float))
    x = np.log10(values.init_scale).where(y.notnull())
    x, y = x - x.mean("init_scale"), y - y.mean("init_scale")
    return (x * y).sum("init_scale", min_count=2) / (x * x).sum("init_scale", min_count=2)


def theory(norm: str, quantity: str, layer: int, depth: int) -> int:
    """The power of init_scale; without BN, of an activation for which phi(a z) = a phi(z). `layer` from 0."""
    if norm == "batch":
        return {"weight": -1, "preactivation": -1, "norm": 0, "activation": 0}[quantity]
    return depth - 1 if quantity == "weight" else depth - 1 - layer


class Fit(NamedTuple):
    """The slopes of one quantity in all hidden layers of one network."""

    lowest: float  # over layers, mean over seeds
    highest: float
    deviation: float  # the largest standard deviation over seeds
    error: float  # the largest distance of a seed's slope from the theory; NaN if there is none


def has_law(names: Mapping[str, Any]) -> bool:
    """Whether `theory` holds: with BN outputs stay, whatever the loss; without, it must be linear in them."""
    return names["norm"] == "batch" or (names["activation"] in HOMOGENEOUS and FLAGS.loss == "cotangent")


def in_range(results: xr.Dataset, names: Mapping[str, Any]) -> xr.Dataset:
    """One network's hidden layers; NaN at scales at which a signal leaves float32's range."""
    one = results.sel(names).isel(layer=slice(0, int(names["depth"])))
    return one.where(np.isfinite(one.activation_spread).all(["layer", "seed"]))


def fit(results: xr.Dataset, names: Mapping[str, Any], quantity: str, scales: np.ndarray) -> Fit:
    """The slopes of one network over the given scales."""
    one = in_range(results, names).sel(init_scale=scales)
    found = slopes(one[f"{quantity}_gradient"])
    depth = int(names["depth"])
    expected = [theory(names["norm"], quantity, i, depth) for i in range(depth)]
    error = float(abs(found - xr.DataArray(expected, dims="layer")).max()) if has_law(names) else math.nan
    means = found.mean("seed")
    return Fit(float(means.min()), float(means.max()), float(found.std("seed").max()), error)


@common.interruptible()
def main(argv: list[str]) -> None:
    """Flags -> measurements -> tables, figures, stored results, the answer."""
    common.prepare_process()
    folder = Path(FLAGS.out).expanduser()
    try:
        job = prepare(argv, folder)
    except (ValueError, OSError, ImportError) as error:
        raise common.fail(str(error)) from None
    results = measure(job)
    signals = measure_signals(job)
    trained = train(job)
    merged = xr.merge([results, signals, training_part(trained)], compat="no_conflicts", join="outer")
    merged.attrs = description(job)
    path = common.save(merged, folder / common.RESULTS, SCRIPT)
    paths = figures(results, job, folder)
    console = common.console()
    console.print(signals_table(signals))
    console.print(layers_table(results, signals, job))
    console.print(training_table(trained, job))
    console.print(slopes_table(results, job))
    if "none" in FLAGS.norms:
        console.print(unnormalized_table(results, job))
    print(answer(results, job))
    print(f"figures:  {', '.join(map(str, paths))}")
    print(f"results:  {path}   (bnjax.load_results opens it)")


def prepare(argv: list[str], folder: Path) -> Job:
    """The job, after every check that can be made before any work."""
    common.check_arguments(argv)
    from bnjax import plots  # noqa: F401  before any work is done

    for flag in ("activations", "norms", "depths", "steps"):
        values = FLAGS[flag].value
        if not values or len({*values}) < len(values):
            raise ValueError(f"--{flag} must name at least one, and none twice, got {','.join(values)!r}")
    for name in FLAGS.activations:
        choices.check("activation in --activations", name, activations.ACTIVATIONS, activations.ALIASES)
    for name in FLAGS.norms:
        choices.check("norm in --norms", name, mlp.NORMS)
    depths, steps = integers("depths", least=1), integers("steps", least=0)
    if max(steps) == 0:
        raise ValueError(f"--steps must have one above 0, got {','.join(FLAGS.steps)}")
    try:
        batch_norm.check_epsilon(FLAGS.epsilon)
    except ValueError as error:
        raise ValueError(f"--epsilon: {error}") from None
    scales, shown = (
        sorted(
            grid.check({"init_scale": common.parse_floats(flag, FLAGS[flag].value)}, bnjax.Hyperparams())[
                "init_scale"
            ]
        )
        for flag in ("init_scales", "shown_scales")
    )
    seeds = common.parse_seeds("seeds", FLAGS.seeds)
    grid.check({"seed": seeds, "learning_rate": [FLAGS.learning_rate]}, bnjax.Hyperparams())
    absent = [float(scale) for scale in shown if not np.isclose(scale, scales, rtol=1e-3).any()]
    if absent:
        raise ValueError(f"--shown_scales must be among --init_scales={FLAGS.init_scales}, got {absent}")
    shown = [float(min(scales, key=lambda s, t=scale: abs(s - t))) for scale in shown]
    common.check_out(folder, SCRIPT, common.RESULTS, "layers.png", "scales.png")
    thresholds = {name: threshold(name) for name in FLAGS.activations}
    if "batch" in FLAGS.norms:
        if FLAGS.batch_size < 3 or FLAGS.jacobian_examples < 3:
            raise ValueError(
                "--batch_size and --jacobian_examples must be at least 3 with BN, which passes no gradient "
                f"through 2 examples; got {FLAGS.batch_size} and {FLAGS.jacobian_examples}"
            )
        for name, value in thresholds.items():
            if sum(scale >= ABOVE * value for scale in scales) < 2:
                raise ValueError(
                    f"--init_scales must have 2 values from {ABOVE * value:.3g} upward, {ABOVE} times the scale "
                    f"where epsilon matters for {name}, got {FLAGS.init_scales}"
                )
    elif len(scales) < 2:
        raise ValueError(f"--init_scales must have 2 values at least, got {FLAGS.init_scales}")
    ds = bnjax.data.load("fashion_mnist_mini")
    for flag in ("batch_size", "jacobian_examples"):
        if FLAGS[flag].value > len(ds.train_x):
            raise ValueError(f"--{flag} must be at most {len(ds.train_x)}, got {FLAGS[flag].value}")
    entries = FLAGS.jacobian_examples**2 * FLAGS.hidden_width * max(FLAGS.hidden_width, ds.train_x[0].size)
    if entries > probes.LARGEST_JACOBIAN:
        raise ValueError(
            f"--jacobian_examples={FLAGS.jacobian_examples} with --hidden_width={FLAGS.hidden_width} makes "
            f"Jacobians of {entries} entries, more than {probes.LARGEST_JACOBIAN}"
        )
    return Job(depths, np.asarray(scales), seeds, shown, steps, ds, thresholds)


def integers(flag: str, least: int) -> list[int]:
    """A flag's list, ascending."""
    try:
        values = sorted(int(text) for text in FLAGS[flag].value)
    except ValueError:
        values = [least - 1]
    if values[0] < least:
        raise ValueError(
            f"--{flag} must be whole numbers of at least {least}, got {','.join(FLAGS[flag].value)!r}"
        )
    common.check_size(flag, values[-1])
    return values


def threshold(activation: str) -> float:
    """The init_scale below which epsilon kills the signals of a deep network; He's weights, a large batch."""
    if FLAGS.epsilon == 0:
        return 0.0
    return mean_field.epsilon_threshold(activation, FLAGS.epsilon).dead_unstable / math.sqrt(2)


def description(job: Job) -> dict[str, Any]:
    """The attributes of the stored results."""
    return {
        "models": {
            f"{activation}, {norm}, {depth}": dict(network(activation, norm, depth).config)
            for activation, norm, depth in itertools.product(FLAGS.activations, FLAGS.norms, job.depths)
        },
        "thresholds": job.thresholds,
        "batch_size": FLAGS.batch_size,
        "loss": FLAGS.loss,
        "versions": provenance.versions(),
    }


def training_part(trained: xr.Dataset) -> xr.Dataset:
    """What is stored of the training, by names of its own."""
    names = {name: f"training_{name}" for name in trained.data_vars}
    dims = {"model": "norm", "init_scale": "shown_scale", "seed": "training_seed"}
    return trained.rename(names | {k: v for k, v in dims.items() if k in trained.dims}).drop_attrs()


def figures(results: xr.Dataset, job: Job, folder: Path) -> list[Path]:
    """The two figures: by layer at the shown scales, and over all scales unless all gradients there are 0."""
    from bnjax import plots

    first, depth = FLAGS.activations[0], job.depths[-1]
    one = results.sel(activation=first, depth=depth)
    shown = one.sel(init_scale=job.shown).isel(layer=slice(0, depth))
    title = f"{first}, {depth} hidden layers of {FLAGS.hidden_width}, at initialization"
    layers = plots.flow_by_layer(
        {
            "forward: spread of W x\nover the batch": shown.preactivation_spread,
            "backward: norm of the gradient\nto the layer's output phi(...)": shown.activation_gradient,
            "norm of the gradient\nto the layer's weights W": shown.weight_gradient,
        },
        names=NORM_NAMES,
        title=title,
    )
    paths = [common.save(layers, folder / "layers.png", SCRIPT)]
    gradients = results.weight_gradient.sel(depth=depth).isel(layer=slice(0, depth))
    finite = np.isfinite(results.activation_spread.sel(depth=depth).isel(layer=slice(0, depth))).all("layer")
    gradients = gradients.where(finite)
    if not (gradients.median("seed", skipna=False).sel(init_scale=slice(1e-4, 1e4)) > 0).any():
        return paths
    powers = {
        norm: (
            theory(norm, "weight", 0, depth),
            [a for a in FLAGS.activations if has_law({"activation": a, "norm": norm})],
        )
        for norm in FLAGS.norms
    }
    by_scale = plots.gradient_by_scale(
        gradients,
        names=NORM_NAMES,
        powers=powers,
        starts={name: ABOVE * value for name, value in job.thresholds.items()},
        title=f"{depth} hidden layers of {FLAGS.hidden_width}, at initialization",
    )
    return [*paths, common.save(by_scale, folder / "scales.png", SCRIPT)]


def combinations(job: Job, norm: str) -> Iterator[dict[str, Any]]:
    """The networks with that norm, by the names of the results' dimensions."""
    if norm in FLAGS.norms:
        for activation, depth in itertools.product(FLAGS.activations, job.depths):
            yield {"activation": activation, "norm": norm, "depth": depth}


def fitted_scales(job: Job, names: Mapping[str, Any]) -> np.ndarray:
    """With BN those from 30 times the threshold upward, else all."""
    start = ABOVE * job.thresholds[names["activation"]] if names["norm"] == "batch" else 0
    return job.scales[job.scales >= start]


def slopes_table(results: xr.Dataset, job: Job) -> Table:
    """One row per network that has a law."""
    table = Table(
        title="Slopes of log |gradient| against log init_scale, all hidden layers scaled",
        caption=(
            "Lowest and highest of the hidden layers (means over seeds); in brackets the theory's. Threshold: the "
            f"init_scale where epsilon = {FLAGS.epsilon:g} matters; the fit with BN begins at {ABOVE} times that. "
            "Error: the largest distance from the theory of any layer, quantity and seed; beside it the largest "
            f"standard deviation over {len(job.seeds)} seeds. -: no 2 scales with gradients all finite, not 0."
        ),
        caption_justify="left",
    )
    for column in (
        "network",
        "depth",
        "threshold",
        "scales (decades)",
        "to W",
        "to W x",
        "to BN(W x)",
        "to phi(...)",
    ):
        table.add_column(column)
    table.add_column("error (seeds' std)", justify="right")
    for names in law_networks(job):
        scales = used_scales(results, job, names)
        threshold_text = f"{job.thresholds[names['activation']]:.2g}" if names["norm"] == "batch" else "-"
        network_texts = (
            f"{names['activation']}, {NORM_NAMES[names['norm']]}",
            str(names["depth"]),
            threshold_text,
        )
        if len(scales) < 2:
            table.add_row(*network_texts, *["-"] * 6)
            continue
        fits = {q: fit(results, names, q, scales) for q in quantities(names["norm"])}
        table.add_row(
            *network_texts,
            f"{scales[0]:.3g} to {scales[-1]:.3g} ({np.log10(scales[-1] / scales[0]):.1f})",
            *(slope_text(fits.get(q), names, q) for q in ("weight", *PARTS)),
            f"{max(f.error for f in fits.values()):.1e} ({max(f.deviation for f in fits.values()):.0e})",
        )
    return table


def law_networks(job: Job) -> Iterator[dict[str, Any]]:
    """Those whose gradients are powers of the scale."""
    for norm in NORM_NAMES:
        yield from (names for names in combinations(job, norm) if has_law(names))


def quantities(norm: str) -> tuple[str, ...]:
    """What has a gradient in a network with that norm."""
    return ("weight", *PARTS) if norm == "batch" else ("weight", "preactivation", "activation")


def used_scales(results: xr.Dataset, job: Job, names: Mapping[str, Any]) -> np.ndarray:
    """Those of the fit at which everything is finite and not 0."""
    one = in_range(results, names).sel(init_scale=fitted_scales(job, names)).weight_gradient
    return one.init_scale.values[((one > 0) & np.isfinite(one)).all(["seed", "layer"]).values]


def slope_text(found: Fit | None, names: Mapping[str, Any], quantity: str) -> str:
    """`-1.00 (-1)`, or `0.00 to 2.00 (0 to 2)`."""
    if found is None:
        return "-"
    depth = names["depth"]
    expected = sorted({theory(names["norm"], quantity, i, depth) for i in range(depth)})
    ends = [f"{value:.2f}".replace("-0.00", "0.00") for value in (found.lowest, found.highest)]
    known = [str(expected[0]), str(expected[-1])]
    measured, known = (" to ".join(dict.fromkeys(texts)) for texts in (ends, known))
    return f"{measured} ({known})"


def unnormalized_table(results: xr.Dataset, job: Job) -> Table:
    """Without BN, whatever the activation: where the gradient to the first and the last hidden layer's weights goes."""
    table = Table(
        title="Without BN: the norm of the gradient to the weights of one hidden layer, over all scales",
        caption=(
            "Medians over seeds. Slopes of its logarithm against that of init_scale. 0: exactly 0 in float32 for all "
            "seeds from that scale upward, though all signals are finite. Not finite: beyond float32's range."
        ),
        caption_justify="left",
    )
    for column in (
        "activation",
        "depth",
        "layer",
        f"slope up to {SMALL:g}",
        f"slope {MIDDLE:g} to {LARGE:g}",
    ):
        table.add_column(column)
    for column in ("at 1", "largest (at scale)", "0 from", "not finite from"):
        table.add_column(column, justify="right")
    for names in combinations(job, "none"):
        for layer in dict.fromkeys((0, names["depth"] - 1)):
            facts = unnormalized(results, names, layer)
            table.add_row(
                names["activation"],
                str(names["depth"]),
                f"hidden_{layer}",
                *(figure(facts[name]) for name in ("small", "large")),
                f"{facts['one']:.1e}",
                f"{facts['largest']:.1e} ({facts['at']:.3g})",
                *("-" if math.isinf(facts[name]) else f"{facts[name]:.3g}" for name in ("zero", "infinite")),
            )
    return table


def unnormalized(results: xr.Dataset, names: Mapping[str, Any], layer: int) -> dict[str, float]:
    """What `unnormalized_table` shows of one network."""
    finite = in_range(results, names).weight_gradient.isel(layer=layer)
    scales = finite.init_scale.values
    median = finite.median("seed", skipna=False)
    known = median.where(np.isfinite(median), -1)

    def slope(low, high):
        part = median.where((median.init_scale >= low) & (median.init_scale <= high), drop=True)
        return float(slopes(part)) if (part > 0).sum() > 1 else math.nan

    def first(condition):
        """The smallest scale from which on it holds, as far as numbers are finite; infinity if there is none."""
        holds = np.logical_and.accumulate((condition | (known < 0).values)[::-1])[::-1] & condition
        return float(scales[holds].min()) if holds.any() else math.inf

    positive = known.values > 0
    local = np.diff(np.log(known.values[positive])) / np.diff(np.log(scales[positive]))
    zero = ((finite == 0).all("seed")).values
    return {
        "small": slope(0, SMALL),
        "large": slope(MIDDLE, LARGE),
        "change": float(np.ptp(local)) if local.size else 0.0,  # of the slope, over all scales
        "one": float(median.sel(init_scale=1, method="nearest")),
        "largest": float(known.max()),
        "at": float(scales[known.values.argmax()]),
        "zero": first(zero),
        "infinite": first((known < 0).values),
    }


def signals_table(signals: xr.Dataset) -> Table:
    """Saturated entries, dead units and stable rank in the last hidden layer, by scale."""
    scales = signals.shown_scale.values
    table = Table(
        title="The activations of the last hidden layer, by init_scale: saturated entries, dead units, stable rank",
        caption="Means over seeds. Saturated: |phi'| < 0.01. Dead: one value for all examples of the batch.",
        caption_justify="left",
    )
    table.add_column("network")
    for scale in scales:
        table.add_column(f"init_scale {scale:g}", justify="right")
    for activation, norm in itertools.product(signals.activation.values, signals.norm.values):
        one = signals.sel(activation=activation, norm=norm).mean("seed")
        one = one.isel(layer=int(one.shown_activation_spread.isel(shown_scale=0).notnull().sum()) - 1)
        cells = (
            f"{100 * float(c.shown_activation_saturated):.0f}%, {100 * float(c.shown_activation_dead):.0f}%, "
            f"{float(c.shown_activation_stable_rank):.1f}"
            for c in (one.sel(shown_scale=scale) for scale in scales)
        )
        table.add_row(f"{activation}, {NORM_NAMES[norm]}", *cells)
    return table


def layers_table(results: xr.Dataset, signals: xr.Dataset, job: Job) -> Table:
    """All that is measured of the first activation and depth at the shown scale nearest 1, layer by layer."""
    activation, depth = FLAGS.activations[0], job.depths[0]
    scale = min(job.shown, key=lambda s: abs(math.log(s)))
    table = Table(
        title=f"{activation}, {depth} hidden layers, init_scale {scale:g}, layer by layer",
        caption=(
            "Means over seeds. Spread: root mean square over units of the standard deviation over the batch. J: the "
            f"Jacobian from the layer's input to its activation at init_scale 1, of {FLAGS.jacobian_examples} "
            "examples: its largest singular value, and the median of those above 1e-4 of that (their share)."
        ),
        caption_justify="left",
    )
    for column in ("network", "layer"):
        table.add_column(column)
    for column in (
        "W x: mean",
        "spread",
        "phi: saturated",
        "dead",
        "stable rank",
        "gradient to W",
        "to W x",
        "J: largest",
        "median (share)",
    ):
        table.add_column(column, justify="right")
    for norm in FLAGS.norms:
        jacobians = layer_jacobians(job, norm, depth)
        names = {"activation": activation, "norm": norm}
        for i in range(depth):
            s = signals.sel(names).sel(shown_scale=scale).isel(layer=i).mean("seed")
            g = results.sel(names).sel(depth=depth, init_scale=scale).isel(layer=i).mean("seed")
            above = jacobians[i][jacobians[i] > 1e-4 * jacobians[i][0]]
            table.add_row(
                NORM_NAMES[norm],
                f"hidden_{i}",
                f"{float(s.shown_preactivation_mean):.2g}",
                f"{float(s.shown_preactivation_spread):.3g}",
                f"{100 * float(s.shown_activation_saturated):.0f}%",
                f"{100 * float(s.shown_activation_dead):.0f}%",
                f"{float(s.shown_activation_stable_rank):.1f}",
                f"{float(g.weight_gradient):.2e}",
                f"{float(g.preactivation_gradient):.2e}",
                f"{jacobians[i][0]:.2f}",
                f"{np.median(above):.2f} ({len(above) / len(jacobians[i]):.0%})" if len(above) else "-",
                end_section=i == depth - 1,
            )
    return table


def training_table(trained: xr.Dataset, job: Job) -> Table:
    """First and last hidden layer along training, medians over seeds."""
    depth = job.depths[0]
    ends = list(dict.fromkeys((0, depth - 1)))
    table = Table(
        title=f"{FLAGS.activations[0]}, {depth} hidden layers, along training: SGD, learning rate "
        f"{FLAGS.learning_rate:g}, momentum 0.9, cross-entropy",
        caption=(
            f"{' / '.join(f'hidden_{i}' for i in ends)}; medians over {trained.sizes['seed']} seeds. |dL/dW|: of the "
            f"first {FLAGS.batch_size} examples. Angle: between W and its start, in degrees. lr / |W|^2: the effective "
            "learning rate behind a norm. The figures of a run that diverged may be infinite, or NaN, which medians "
            "leave out."
        ),
        caption_justify="left",
    )
    for column in ("network", "init_scale", "step", "|dL/dW|", "|W|", "angle", "lr / |W|^2", "diverged"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for norm, scale in itertools.product(FLAGS.norms, job.shown):
        one = trained.sel(model=norm, init_scale=scale)
        for step in job.steps:
            now = (
                one.sel(probe_step=step).astype(float).median("seed")
            )  # the sum of two may be beyond float32

            def both(name, form, now=now):
                return " / ".join(format(float(now[name].sel(layer=f"hidden_{i}")), form) for i in ends)

            table.add_row(
                NORM_NAMES[norm],
                f"{scale:g}",
                str(step),
                both("gradient_norm", ".1e"),
                both("weight_norm", ".3g"),
                both("angle", ".2g"),
                both("effective_learning_rate", ".1e"),
                f"{int((one.diverged & (one.diverged_step <= step)).sum())} of {one.sizes['seed']}",
                end_section=step == job.steps[-1],
            )
    return table


def figure(slope: float) -> str:
    """`1.00`, without the sign of a 0; `-` for NaN."""
    return "-" if math.isnan(slope) else f"{slope:.2f}".replace("-0.00", "0.00")


def grows(lowest: float, highest: float) -> str:
    """Whether it grows with the scale in all layers (yes), in none (no) or in some, by its slopes."""
    return "yes" if lowest > FLAT else "no" if highest <= FLAT else "in part"


def answer(results: xr.Dataset, job: Job) -> str:
    """In words, with the figures of this run."""
    lines = [
        "Backward, the gradient is multiplied by all the weights that follow: will large ones not make it explode?"
    ]
    if "batch" in FLAGS.norms:
        lines += answer_with_norm(results, job)
    lines += [answer_without_norm(results, job, names) for names in combinations(job, "none")]
    return "\n".join(lines)


def answer_with_norm(results: xr.Dataset, job: Job) -> list[str]:
    """Of all networks with BN together: by scale, and by depth."""
    scales = [(names, used_scales(results, job, names)) for names in combinations(job, "batch")]
    scales = [(names, used) for names, used in scales if len(used) > 1]
    if not scales:
        return ["With BN there are no 2 scales at which all gradients are finite and not 0: no slope."]
    decades = min(np.log10(used[-1] / used[0]) for _, used in scales)

    def ends(quantity):
        fits = [fit(results, names, quantity, used) for names, used in scales]
        return min(f.lowest for f in fits), max(f.highest for f in fits)

    def text(low, high):
        return f"{low:.3f} to {high:.3f}".replace("-0.000", "0.000")

    passing, own = ends("activation"), ends("weight")
    why = ": BN divides by what the weights multiply with" if max(map(abs, passing)) <= FLAT else ""
    effect = (
        ": it shrinks as they grow" if own[1] < -FLAT else ": it grows with them" if own[0] > FLAT else ""
    )
    lines = [
        f"With BN, {grows(*passing)}: over {decades:.1f} decades of init_scale and more, in all networks and "
        f"layers, the gradient that passes from layer to layer has slope {text(*passing)}{why}. The gradient to the "
        f"weights themselves has slope {text(*own)}{effect}."
    ]
    factors = {
        names["activation"]: growth_per_layer(results, names, used)
        for names, used in scales
        if names["depth"] == job.depths[-1] > 1
    }
    if factors:
        growing = all(factor > 1 for factor in factors.values())
        lines.append(
            f'That "{grows(*passing)}" is about init_scale. From layer to layer, towards the input, the gradient '
            f"{'still grows' if growing else 'changes'} with depth: its squared norm by a factor per layer of "
            + "; ".join(f"{name} {factor:.3f}{growth_text(name)}" for name, factor in factors.items())
            + f" ({job.depths[-1]} layers of {FLAGS.hidden_width}, medians over these scales and seeds)."
        )
    return lines


def growth_per_layer(results: xr.Dataset, names: Mapping[str, Any], scales: np.ndarray) -> float:
    """The factor of the squared norm of the gradient to phi(...), per layer towards the input; median."""
    one = in_range(results, names).activation_gradient.sel(init_scale=scales).astype(float)
    ratio = one.isel(layer=0) / one.isel(layer=-1)
    return float((ratio ** (2 / (names["depth"] - 1))).median())


def growth_text(activation: str) -> str:
    """The theory's factor, where there is one."""
    if FLAGS.batch_size < 4:
        return ""
    return f" (infinitely wide: {mean_field.gradient_growth(activation, FLAGS.batch_size):.3f})"


def answer_without_norm(results: xr.Dataset, job: Job, names: Mapping[str, Any]) -> str:
    """Of one network without BN."""
    facts = unnormalized(results, names, 0)
    text = (
        f"{names['activation']} without BN, {names['depth']} layers, gradient to the first layer's weights: "
    )
    if not has_law(names):
        small, large = facts["small"], facts["large"]
        several = "no single power: " if facts["change"] > FLAT else ""
        text += (
            f"{several}slope {figure(small)} at small scales, {figure(large)} from {MIDDLE:g} to "
            f"{LARGE:g}, largest ({facts['largest']:.1e}) at {facts['at']:.3g}"
        )
        return text + (f", exactly 0 from {facts['zero']:.3g}." if math.isfinite(facts["zero"]) else ".")
    scales = used_scales(results, job, names)
    if len(scales) < 2:
        return text + "no slope, as there are no 2 scales at which all gradients are finite and not 0."
    weights = fit(results, names, "weight", scales)
    law = "as the power" if weights.error <= FLAT else "though as no power, slope"
    others = names["depth"] - 1
    scaled = f"{others} other layer{'s are' if others > 1 else ' is'}" if others else "no other layer is"
    text += (
        f"{grows(weights.lowest, weights.highest)}, {law} {figure(weights.lowest)} to {figure(weights.highest)} of "
        f"init_scale in all layers ({scaled} scaled)"
    )
    return text + (
        f"; beyond float32 from {facts['infinite']:.3g}." if math.isfinite(facts["infinite"]) else "."
    )


if __name__ == "__main__":
    app.run(main)
