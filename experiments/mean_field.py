"""Mean-field theory against measurement in our own networks: growing gradients, and dying signals.

    python -m experiments.mean_field

has three parts (`--parts`). growth: in networks with batch normalization at epsilon 0, the growth per layer of the
squared gradient norm, for every activation and batch size, extrapolated from two widths to infinite width, with a
z-score per point. epsilon: the init_scale below which epsilon makes the signal die, and signal and growth around it.
chaos: the growth without batch normalization, chi_1. Expect every |z| of growth and chaos below 4 (or the run fails), a
growth that falls with the batch size, for ReLU from 3.08 at 4 to 1.49 at 64, and the threshold within a percent of the
predicted one. Some 70 seconds on 2 cores, most of it compilation; `--full` has all activations, three widths and more
seeds, and takes some 10 minutes.

In the part growth, inputs are drawn as if they came from a layer below, phi(BN(Gaussian)), so that the first layer is
at the fixed point; in all parts the gradient at the output has the same size for every sample and no correlation. The
activations share their weights at each batch size, so that the z of one batch size are not independent, and at batch
sizes 6 to 9 the squared gradient has a variance but no fourth moment, so that its standard error is heavy-tailed.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from absl import app, flags
from jax.sharding import Mesh, PartitionSpec
from rich.table import Table

import bnjax
from bnjax import activations, batch_norm
from bnjax.choices import check
from bnjax.theory import mean_field
from experiments import common

FLAGS = flags.FLAGS

SCRIPT = "mean_field"
PARTS = ("growth", "epsilon", "chaos")
MOST_Z = 4.0
SMALLEST_WITH_VARIANCE = 6  # batch size; below it the squared gradient has no finite variance
THEORY_SIZES = (4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
FACTORS = (0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0, 16.0)  # of the threshold of init_scale
EPSILON_BATCH = 16
WEIGHT_STDS = {"relu": (1.0, math.sqrt(2), 2.0), "tanh": (0.8, 1.5, 2.5), "sigmoid": (1.0, 4.0, 12.0)}

flags.DEFINE_list("parts", list(PARTS), f"What to do: {', '.join(PARTS)}.")
flags.DEFINE_list(
    "activations",
    ["relu", "elu", "gelu", "softplus", "sigmoid", "tanh", "linear"],
    f"Of the part growth: {', '.join(activations.ACTIVATIONS)}.",
)
flags.DEFINE_list(
    "batch_sizes", ["4", "5", "6", "8", "12", "16", "24", "32", "64"], "Of the part growth, at least 4 each."
)
flags.DEFINE_integer("depth", 3, "Hidden layers in the part growth, at least 2.")
flags.DEFINE_integer(
    "width",
    64,
    "Smallest width in the part growth; 4 times the batch size if that is more. The next is twice that.",
)
flags.DEFINE_integer(
    "seeds", 2048, "Networks in the part growth at width 64 and batch size 16; fewer at larger ones."
)
flags.DEFINE_float("epsilon", 1e-5, "Batch normalization's, in the part epsilon.")
flags.DEFINE_list("epsilon_activations", ["relu", "tanh", "gelu", "sigmoid"], "Of the part epsilon.")
flags.DEFINE_integer("epsilon_depth", 8, "Hidden layers in the part epsilon, at least 4.")
flags.DEFINE_integer(
    "epsilon_width", 128, "Larger width in the parts epsilon and chaos, at least 64; the other is half."
)
flags.DEFINE_integer(
    "epsilon_seeds", 64, "Networks in the parts epsilon and chaos (there 4 times as many), at least 16."
)
flags.DEFINE_bool("full", False, "All activations, three widths, 4 times the seeds.")
flags.DEFINE_string("out", "results/mean_field", "Output folder.")


def over_seeds(function, seeds: int, *arguments):
    """function(seed, *arguments) for seeds 0, 1, ..., spread over the devices; float64 arrays [seeds, ...]."""
    devices = np.array(jax.devices())
    padded = -(-seeds // len(devices)) * len(devices)

    def run(seeds, *arguments):
        return jax.lax.map(lambda seed: function(seed, *arguments), seeds)

    split, same = PartitionSpec("seed"), PartitionSpec()
    specs = (split, *(same for _ in arguments))
    mesh = Mesh(devices, ("seed",))
    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False))
    found = program(jnp.arange(padded), *arguments)
    return jax.tree.map(lambda leaf: np.asarray(leaf, float)[:seeds], found)


def orthonormal(rows: int, columns: int) -> np.ndarray:
    """A matrix [rows, columns] with orthonormal rows, none of them special."""
    square = np.random.default_rng(0).normal(size=(columns, rows))
    return np.linalg.qr(square)[0].T.astype(np.float32)


def squared_gradients(model, params, stats, x, cotangent, depth):
    """Squared norms of the gradient of sum(outputs * cotangent) to each pre-activation [L], and the layers shown."""
    names = [f"hidden_{i}/preactivation" for i in range(depth)]
    zeros = {name: jnp.zeros((len(x), cotangent.shape[1])) for name in names}

    def objective(offsets):
        outputs, shown = model.layers(params, stats, x, offsets, train=True)
        return (outputs * cotangent).sum(), shown

    gradients, shown = jax.grad(objective, has_aux=True)(zeros)
    return jnp.stack([(gradients[name] ** 2).sum() for name in names]), shown


# Growth at epsilon 0.


def measure_growth(names, batch_size: int, width: int, seeds: int) -> np.ndarray:
    """Growth per layer [seeds, activations], the mean over neighbouring layers."""
    depth = FLAGS.depth
    models = [bnjax.mlp((width,) * depth, width, name, "batch", epsilon=0.0) for name in names]

    def one(seed, cotangent):
        key = functools.reduce(jax.random.fold_in, (batch_size, width), jax.random.key(seed))
        params, stats = models[0].init(key, (width,), 1.0)
        below = jax.random.normal(jax.random.fold_in(key, depth + 1), (batch_size, width))
        below = batch_norm.normalize(below, 0.0)
        found = []
        for name, model in zip(names, models, strict=True):
            x = activations.get(name)(below)
            squares, _ = squared_gradients(model, params, stats, x, cotangent, depth)
            found.append((squares[:-1] / squares[1:]).mean())
        return jnp.stack(found)

    return over_seeds(one, seeds, orthonormal(batch_size, width))


def extrapolate(widths, means, errors):
    """A line in 1 / width through means [W, A]: its value at infinite width and that one's standard error, [A].

    Weighted by 1 / errors^2.
    """
    line = np.stack([np.ones(len(widths)), 1 / np.asarray(widths, float)], 1)
    values, deviations = [], []
    for mean, error in zip(means.T, errors.T, strict=True):
        covariance = np.linalg.inv((line / error[:, None] ** 2).T @ line)
        values.append((covariance @ line.T @ (mean / error**2))[0])
        deviations.append(math.sqrt(covariance[0, 0]))
    return np.array(values), np.array(deviations)


def median_and_error(values):
    """The median of values [S, A] over seeds, and half the interval of order statistics that covers it with 68%."""
    ordered, count = np.sort(values, 0), len(values)
    low = max(0, math.floor(count / 2 - math.sqrt(count) / 2))
    high = min(count - 1, math.ceil(count / 2 + math.sqrt(count) / 2))
    return np.median(values, 0), (ordered[high] - ordered[low]) / 2


def growth_part(names, batch_sizes) -> xr.Dataset:
    """Theory and measurement, activation x batch size."""
    doublings = 3 if FLAGS.full else 2
    seeds = FLAGS.seeds * (4 if FLAGS.full else 1)
    jobs = []
    for batch_size in batch_sizes:
        widths = [max(FLAGS.width, 4 * batch_size) * 2**i for i in range(doublings)]
        jobs += [(batch_size, w) for w in (widths if batch_size >= SMALLEST_WITH_VARIANCE else widths[-1:])]

    def measure(batch_size, width):
        count = max(16, math.ceil(seeds * 64 / width * min(1, 16 / batch_size)))
        return measure_growth(names, batch_size, width, count)

    found = {}
    for (batch_size, width), runs in zip(jobs, side_by_side(measure, jobs, "growth"), strict=True):
        found.setdefault(batch_size, {})[width] = runs
    columns = {name: [] for name in ("measured", "error", "width", "seeds")}
    slopes = []
    for by_width in found.values():
        widths = list(by_width)
        if len(widths) > 1:
            means, errors = means_and_errors(by_width.values())
            measured, error = extrapolate(widths, means, errors)
            slopes.append(means[0] / measured - 1)
        else:
            measured, error = median_and_error(by_width[widths[0]])
            slopes.append(np.full(len(names), np.nan))
        columns["measured"].append(measured)
        columns["error"].append(error)
        columns["width"].append(widths[0])
        columns["seeds"].append(len(by_width[widths[0]]))
    theory = [[mean_field.gradient_growth(name, B) for B in batch_sizes] for name in names]
    curve = [[mean_field.gradient_growth(name, B) for B in THEORY_SIZES] for name in names]
    both = ("activation", "batch_size")
    results = xr.Dataset(
        {
            "theory": (both, np.array(theory)),
            "measured": (both, np.array(columns["measured"]).T),
            "error": (both, np.array(columns["error"]).T),
            "bias_at_smallest_width": (both, np.array(slopes).T),
            "smallest_width": ("batch_size", columns["width"]),
            "seeds_at_smallest_width": ("batch_size", columns["seeds"]),
            "theory_curve": (("activation", "theory_batch_size"), np.array(curve)),
            "theory_infinite_batch": ("activation", [mean_field.gradient_growth(name) for name in names]),
        },
        {
            "activation": np.array(names, object),
            "batch_size": batch_sizes,
            "theory_batch_size": list(THEORY_SIZES),
        },
    )
    z = (results.measured - results.theory) / results.error
    results["z"] = z.where(results.batch_size >= SMALLEST_WITH_VARIANCE)
    return results


def growth_table(results: xr.Dataset) -> Table:
    """Activation x batch size: theory, measured +- standard error, z."""
    table = Table(
        title="Growth per layer of the squared gradient norm, epsilon 0: theory / measured / z",
        show_lines=True,
    )
    table.add_column("batch size")
    for name in results.activation.values:
        table.add_column(str(name), justify="right")
    for B in results.batch_size.values:
        cells = []
        for name in results.activation.values:
            point = results.sel(activation=name, batch_size=B)
            z = f"z = {float(point.z):+.1f}" if np.isfinite(point.z) else "median, no z"
            cells.append(
                f"{float(point.theory):.4f}\n{float(point.measured):.4f} ± {float(point.error):.4f}\n{z}"
            )
        table.add_row(str(B), *cells)
    infinite = [f"{float(value):.4f}" for value in results.theory_infinite_batch]
    table.add_row("infinite", *infinite)
    return table


# The threshold that epsilon makes.


def measure_signals(name: str, init_scales, batch_size: int, width: int) -> dict[str, np.ndarray]:
    """Of the last layer the variance of BN's output, of the deep half the growth, [seeds, init_scales]; a threshold."""
    depth = FLAGS.epsilon_depth
    model = bnjax.mlp((width,) * depth, width, name, "batch", epsilon=FLAGS.epsilon)

    def one(seed, init_scales, x, cotangent):
        key = jax.random.fold_in(jax.random.key(seed), width)

        def at(init_scale):
            params, stats = model.init(key, (width,), init_scale)
            squares, shown = squared_gradients(model, params, stats, x, cotangent, depth)
            return jnp.stack([shown[f"hidden_{i}/norm"].var(0).mean() for i in range(depth)]), squares

        return jax.vmap(at)(init_scales)

    x = orthonormal(batch_size, width)
    arguments = (jnp.asarray(init_scales, jnp.float32), x * np.float32(math.sqrt(width)), x)
    variance, squares = over_seeds(one, FLAGS.epsilon_seeds, *arguments)
    # Far below the threshold V is multiplied by (init_scale / threshold)^2 in each layer.
    dying, middle = FACTORS.index(0.5), depth // 2
    per_layer = (variance[:, dying, -1] / variance[:, dying, middle]) ** (1 / (depth - 1 - middle))
    return {
        "variance": variance[..., -1],
        "growth": (squares[..., :-1] / squares[..., 1:])[..., middle:].mean(-1),
        "threshold": (init_scales[dying] / np.sqrt(per_layer))[:, None],
    }


def epsilon_part() -> xr.Dataset:
    """Signal in the last layer, growth in the deep half and the measured threshold, activation x init_scale."""
    depth, batch_size = FLAGS.epsilon_depth, EPSILON_BATCH
    widths = [FLAGS.epsilon_width // 2, FLAGS.epsilon_width]
    theory = {}
    for name in FLAGS.epsilon_activations:
        threshold = mean_field.epsilon_threshold(name, FLAGS.epsilon, batch_size).dead_unstable / math.sqrt(2)
        init_scales = np.array(FACTORS) * threshold
        signals = [
            mean_field.signal_by_layer(name, depth, batch_size, FLAGS.epsilon, math.sqrt(2) * init_scale)
            for init_scale in init_scales
        ]
        theory[name] = {
            "init_scale": init_scales,
            "variance": [signal.normalized_variance[-1] for signal in signals],
            "growth": [signal.growth[depth // 2 : -1].mean() for signal in signals],
            "threshold": [threshold],
        }
    jobs = [(name, theory[name]["init_scale"], batch_size, width) for name in theory for width in widths]
    found = side_by_side(measure_signals, jobs, "epsilon")
    results = xr.Dataset(
        {"init_scale": (("activation", "factor"), [theory[name]["init_scale"] for name in theory])},
        {"activation": np.array(FLAGS.epsilon_activations, object), "factor": list(FACTORS)},
        {"batch_size": batch_size, "depth": depth},
    )
    for what in ("variance", "growth", "threshold"):
        pairs = [
            extrapolate(widths, *means_and_errors([runs[what] for runs in found[2 * i : 2 * i + 2]]))
            for i in range(len(theory))
        ]
        columns = {
            f"{what}_theory": np.array([theory[name][what] for name in theory]),
            what: np.array([value for value, _ in pairs]),
            f"{what}_error": np.array([error for _, error in pairs]),
        }
        for column, values in columns.items():
            one = what == "threshold"
            results[column] = ("activation", values[:, 0]) if one else (("activation", "factor"), values)
    return results


def means_and_errors(runs):
    """Means and standard errors [W, ...] over seeds, the first axis of each of W arrays."""
    means = [values.mean(0) for values in runs]
    return np.stack(means), np.stack([values.std(0, ddof=1) / math.sqrt(len(values)) for values in runs])


def epsilon_tables(results: xr.Dataset) -> list[Table]:
    """The thresholds, and signal and growth below and above them."""
    first = Table(title=f"init_scale below which the signal dies, epsilon {FLAGS.epsilon:g}")
    for column in ("activation", "theory", "measured", "deviation"):
        first.add_column(column, justify="left" if column == "activation" else "right")
    for name in results.activation.values:
        theory, measured, error = (
            float(results.sel(activation=name)[f"threshold{end}"]) for end in ("_theory", "", "_error")
        )
        first.add_row(
            str(name),
            f"{theory:.4g}",
            f"{measured:.4g} ± {error:.1g}",
            f"({100 * (measured / theory - 1):+.2f} ± {100 * error / theory:.2f})%",
        )
    second = Table(
        title=f"Around it: variance of BN's output in layer {results.attrs['depth']}, and growth per layer of the "
        f"squared gradient norm in the deep half; batch size {results.attrs['batch_size']}"
    )
    columns = (
        "activation",
        "init_scale",
        "/ threshold",
        "variance: theory",
        "measured",
        "growth: theory",
        "measured",
    )
    for column in columns:
        second.add_column(column, justify="left" if column == "activation" else "right")
    for name in results.activation.values:
        for factor in results.factor.values:
            point = results.sel(activation=name, factor=factor)
            second.add_row(
                str(name),
                f"{float(point.init_scale):.3g}",
                f"{factor:g}",
                f"{float(point.variance_theory):.3g}",
                f"{float(point.variance):.3g} ± {float(point.variance_error):.1g}",
                f"{float(point.growth_theory):.3f}",
                f"{float(point.growth):.3f} ± {float(point.growth_error):.3f}",
                end_section=factor == results.factor.values[-1],
            )
    return [first, second]


# Without batch normalization.


def measure_chi(name: str, weight_stds, sizes, width: int, seeds: int, depth: int = 5) -> np.ndarray:
    """Growth per layer [seeds, weight_stds] of the squared gradient norm; `sizes` are the inputs' mean squares."""
    model = bnjax.mlp((width,) * depth, width, name, "none", initializer="lecun_normal")

    def one(seed, weight_stds, sizes, x):
        def at(pair):
            weight_std, size = pair
            key = jax.random.fold_in(jax.random.key(seed), width)
            params, stats = model.init(key, (width,), weight_std)
            inputs = x * jnp.sqrt(size * width)
            squares, _ = squared_gradients(model, params, stats, inputs, x, depth)
            return (squares[1:-1] / squares[2:]).mean()

        return jax.vmap(at)((weight_stds, sizes))

    arguments = (jnp.asarray(values, jnp.float32) for values in (weight_stds, sizes))
    return over_seeds(one, seeds, *arguments, orthonormal(8, width))


def chaos_part() -> xr.Dataset:
    """chi_1 in theory and measured, one case per activation and weight_std."""
    widths = [FLAGS.epsilon_width // 2, FLAGS.epsilon_width]
    theory, jobs = [], []
    for name, weight_stds in WEIGHT_STDS.items():
        found = [mean_field.order_chaos(name, weight_std) for weight_std in weight_stds]
        # Inputs at the fixed point; 1e-6 is near a fixed point of 0, and chi_1 of ReLU is the same for all sizes.
        sizes = [1.0 if math.isinf(fixed.variance) else max(fixed.variance, 1e-6) for fixed in found]
        sizes = np.array(sizes) / np.array(weight_stds) ** 2
        theory += found
        jobs += [(name, weight_stds, sizes, width, 4 * FLAGS.epsilon_seeds) for width in widths]
    runs = side_by_side(measure_chi, jobs, "chaos")
    pairs = [extrapolate(widths, *means_and_errors(runs[i : i + 2])) for i in range(0, len(runs), 2)]
    cases = [(name, weight_std) for name, weight_stds in WEIGHT_STDS.items() for weight_std in weight_stds]
    columns = {
        "activation": np.array([name for name, _ in cases], object),
        "weight_std": np.array([weight_std for _, weight_std in cases]),
        "phase": np.array([found.phase for found in theory], object),
        "theory": np.array([found.chi_1 for found in theory]),
        "xi_grad": np.array([found.xi_grad for found in theory]),
        "measured": np.concatenate([value for value, _ in pairs]),
        "error": np.concatenate([error for _, error in pairs]),
    }
    columns["z"] = (columns["measured"] - columns["theory"]) / columns["error"]
    return xr.Dataset({name: ("case", values) for name, values in columns.items()})


def chaos_table(results: xr.Dataset) -> Table:
    """Theory, measurement, phase."""
    table = Table(title="Without batch normalization: chi_1, growth per layer of the squared gradient norm")
    for column in ("activation", "weight_std", "phase", "theory", "measured", "z", "layers per factor e"):
        table.add_column(column, justify="left" if column in ("activation", "phase") else "right")
    for case in range(results.sizes["case"]):
        point = results.isel(case=case)
        table.add_row(
            str(point.activation.item()),
            f"{float(point.weight_std):.4g}",
            str(point.phase.item()),
            f"{float(point.theory):.4f}",
            f"{float(point.measured):.4f} ± {float(point.error):.4f}",
            f"{float(point.z):+.1f}",
            f"{float(point.xi_grad):.3g}",
        )
    return table


def z_values(part: xr.Dataset) -> np.ndarray:
    """|z| [N] of all points of a part that have one, in growth those at which a variance exists; NaN is kept."""
    z = part.z
    if "batch_size" in part.dims:
        z = z.sel(batch_size=part.batch_size >= SMALLEST_WITH_VARIANCE)
    return np.abs(z.values.reshape(-1))


def growth_answer(results: xr.Dataset) -> str:
    """How gradients grow in infinite and finite batches, in words."""
    infinite = results.theory_infinite_batch
    name, value = infinite.idxmax("activation").item(), float(infinite.max())
    if value <= 1 + mean_field.TOLERANCE:
        smallest = results.theory.isel(batch_size=0)
        name, value = smallest.idxmax("activation").item(), float(smallest.max())
        return (
            "With batch normalization and no epsilon, in an infinite batch gradients keep their size with "
            f"{', '.join(map(str, results.activation.values))}; at batch size {int(smallest.batch_size)} with {name} "
            f"the squared norm grows {value:.3f} times per layer."
        )
    which = f"of these activations most with {name}" if infinite.size > 1 else f"with {name}"
    return (
        "With batch normalization and no epsilon, gradients grow towards the input whatever the weights' size; "
        f"{which}, in an infinite batch {value:.3f} times per layer in the squared norm.\n"
        f"A factor of a million takes {mean_field.depth_at_ratio(value, 1e6):.0f} layers of it."
    )


def side_by_side(measure, jobs, what: str) -> list:
    """[measure(*job), ...], two at a time since most of the time is compilation."""
    return common.in_threads(lambda job: measure(*job), jobs, f"{what:8}", 2)


def check_flags() -> tuple[list[str], list[int]]:
    """The part growth's activations and batch sizes.

    Raises:
      ValueError: naming the flag whose value is not allowed.
    """
    for part in FLAGS.parts:
        check("part in --parts", part, PARTS)
    names = list(activations.ACTIVATIONS) if FLAGS.full else FLAGS.activations
    for flag, given in (("activations", names), ("epsilon_activations", FLAGS.epsilon_activations)):
        if not given or len(set(given)) < len(given):
            raise ValueError(f"--{flag} takes at least one name, each of them once, got {','.join(given)!r}")
        for name in given:
            check(f"activation in --{flag}", name, activations.ACTIVATIONS)
    try:
        batch_sizes = sorted({int(text) for text in FLAGS.batch_sizes})
    except ValueError:
        batch_sizes = []
    if not FLAGS.parts:
        raise ValueError(f"--parts takes at least one of {', '.join(PARTS)}")
    if not batch_sizes or batch_sizes[0] < 4 or batch_sizes[-1] > 4096:
        raise ValueError(
            f"--batch_sizes takes integers from 4 to 4096, got {','.join(FLAGS.batch_sizes)!r}: at 3 or below the "
            "expected squared gradient is infinite (Theorem 8 of Yang et al. 2019 needs B >= 4)"
        )
    if not 1e-12 <= FLAGS.epsilon <= 1:
        raise ValueError(f"--epsilon must be in [1e-12, 1], got {FLAGS.epsilon}")
    least = {
        "depth": 2,
        "width": 16,
        "seeds": 16,
        "epsilon_depth": 4,
        "epsilon_width": 64,
        "epsilon_seeds": 16,
    }
    for flag, value in least.items():
        if FLAGS[flag].value < value:
            raise ValueError(f"--{flag} must be at least {value}, got {FLAGS[flag].value}")
    return names, batch_sizes


@common.interruptible()
def main(argv: list[str]) -> None:
    """Flags -> measurements -> tables, figures."""
    common.prepare_process()
    folder = Path(FLAGS.out).expanduser()
    try:
        common.check_arguments(argv)
        names, batch_sizes = check_flags()
        drawn = [part + ".png" for part in FLAGS.parts if part in ("growth", "epsilon")]
        common.check_out(folder, SCRIPT, common.RESULTS, *drawn)
        from bnjax import plots
    except (ValueError, OSError, ImportError) as error:
        raise common.fail(str(error)) from None
    parts = {}
    if "growth" in FLAGS.parts:
        parts["growth"] = growth_part(names, batch_sizes)
    if "epsilon" in FLAGS.parts:
        parts["epsilon"] = epsilon_part()
    if "chaos" in FLAGS.parts:
        parts["chaos"] = chaos_part()

    console = common.console()
    figures = []
    if "growth" in parts:
        figure = plots.mean_field_growth(parts["growth"])
        figures.append(common.save(figure, folder / "growth.png", SCRIPT))
        console.print(growth_table(parts["growth"]))
    if "epsilon" in parts:
        title = f"epsilon {FLAGS.epsilon:g}, layer {FLAGS.epsilon_depth}, batch size {EPSILON_BATCH}"
        figure = plots.epsilon_threshold(parts["epsilon"], title=title)
        figures.append(common.save(figure, folder / "epsilon.png", SCRIPT))
        for table in epsilon_tables(parts["epsilon"]):
            console.print(table)
    if "chaos" in parts:
        console.print(chaos_table(parts["chaos"]))
    merged = xr.merge(
        [
            part.rename({name: f"{key}_{name}" for name in (*part.data_vars, *part.dims)})
            for key, part in parts.items()
        ],
        combine_attrs="drop",
    )
    path = common.save(merged, folder / common.RESULTS, SCRIPT)
    far = []
    for key in ("growth", "chaos"):
        if key in parts:
            z = z_values(parts[key])
            if z.size:
                within = ", ".join(f"{100 * (z < k).mean():.0f}% within {k}" for k in (1, 2))
                print(
                    f"{key}: {z.size} points with a z, {within} standard errors, the largest |z| is {z.max():.1f}."
                )
            far += [key] if not (z < MOST_Z).all() else []  # NaN is none of the values below it
    if "growth" in parts:
        print(growth_answer(parts["growth"]))
    if "epsilon" in parts:
        off = np.abs(parts["epsilon"].threshold / parts["epsilon"].threshold_theory - 1)
        print(f"Measured and predicted thresholds differ by {100 * float(off.max()):.2f}% at most.")
    print(f"Figures: {', '.join(map(str, figures)) or 'none'}; results: {path}")
    if far:
        raise common.fail(
            f"theory and measurement differ by {MOST_Z:g} standard errors or more, or not by a finite number of them: "
            f"{', '.join(far)}"
        )


if __name__ == "__main__":
    app.run(main)
