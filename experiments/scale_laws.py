"""`W -> a W` in layers that batch normalization follows: exact laws, rounding, and what a fixed epsilon does.

    python -m experiments.scale_laws

In a deep network, for each hidden layer alone and for all of them at once, at epsilon 0:

    outputs                 unchanged               gradient to the layer's input   unchanged
    gradient to W           divided by a            <W, dL/dW>                      0

The same holds for (W -> a W, epsilon -> a^2 epsilon) at any epsilon. And under SGD with momentum on these kernels
alone, without weight decay or with weight_decay / a^2, (W -> a W, learning rate -> a^2 learning rate) multiplies the
whole trajectory of W by a. Expect 0, bit for bit, for every a = 2^k; for other a rounding in one step, which
training then amplifies; and nothing of the kind without batch normalization. At a fixed epsilon, W -> a W is
epsilon -> epsilon / a^2, which predicts what becomes of outputs and gradients. Takes some 40 seconds.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
import xarray as xr
from absl import app, flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bnjax
from bnjax import activations, choices
from experiments import common
from experiments.scaling import fixed_epsilon, laws, networks, trajectories
from experiments.scaling.text import grows_as, make_table, measured_range, number, power, span

FLAGS = flags.FLAGS

flags.DEFINE_integer("depth", 6, "L, the number of hidden layers.", lower_bound=1)
flags.DEFINE_integer("width", 64, "Of the hidden layers, and of the input.", lower_bound=2)
flags.DEFINE_string("activation", "relu", f"Of the hidden layers: {', '.join(activations.ACTIVATIONS)}.")
flags.DEFINE_integer("batch_size", 64, "Samples; through 2 of them BN passes no gradient.", lower_bound=3)
flags.DEFINE_string("epsilon", "1e-5,0.1", "Batch normalization's, beside 0, which is always there.")
flags.DEFINE_integer("exponent", 60, "K: bitwise laws for a = 2^k, k from -K to K.", lower_bound=1)
flags.DEFINE_string("factors", "0.01,0.1,1.4142135623730951,3,10", "Other a: 0.1,3 or low:high:count.")
flags.DEFINE_integer("steps", 300, "Of training.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.1, "At a = 1.")
flags.DEFINE_integer("seed", 0, "Draws the network and the data.", lower_bound=0)
flags.DEFINE_string("out", "results/scale_laws", "Output folder.")

SCRIPT, FIGURE = "scale_laws", "scale_laws.png"
NORMS = "batch", "none"
LARGEST_EXPONENT = 60  # float32 has room for 2^k W, a gradient's 2^-k, and a learning rate of 4^k times 0.1
LARGEST_GAP = 1e-6  # relative, between the three sides of the inner-product identity in float64
ROUNDED_GAP = 1e-14  # absolute: <W, dL/dW> is a sum of terms of order 1 that cancel, whatever is left of it
ROUNDINGS = 4  # allowed: two float32 evaluations differ by sqrt 2 times the error of one, measured 1.1 to 2


def check_flags() -> tuple[list[float], list[float]]:
    """The factors and the epsilons.

    Raises:
      ValueError: naming the flag, for a value out of range.
    """
    choices.check("--activation", FLAGS.activation, activations.ACTIVATIONS, activations.ALIASES)
    factors = common.parse_floats("factors", FLAGS.factors)
    epsilons = common.parse_floats("epsilon", FLAGS.epsilon)
    for a in factors:
        if not 2.0**-LARGEST_EXPONENT <= a <= 2.0**LARGEST_EXPONENT:
            raise ValueError(f"--factors must be in [2^-{LARGEST_EXPONENT}, 2^{LARGEST_EXPONENT}], got {a:g}")
        if math.frexp(np.float32(a))[0] == 0.5:
            raise ValueError(f"--factors are no powers of two, which --exponent is for; got {a:g}")
    for flag, values in {"epsilon": epsilons, "learning_rate": [FLAGS.learning_rate]}.items():
        if any(not value > 0 or not laws.representable(value) for value in values):
            raise ValueError(f"--{flag} must be above 0 and a normal float32 number, got {FLAGS[flag].value}")
    for flag, values in {"factors": factors, "epsilon": epsilons}.items():
        if len({*np.float32(values)}) < len(values):
            raise ValueError(f"--{flag} names a value twice: {FLAGS[flag].value}")
    if FLAGS.exponent > LARGEST_EXPONENT:
        raise ValueError(f"--exponent must be at most {LARGEST_EXPONENT}, got {FLAGS.exponent}")
    return factors, epsilons


def measurements(factors: Sequence[float], epsilons: Sequence[float]) -> list[Callable[[], xr.Dataset]]:
    """All that is measured: functions that return a part of the results each."""
    phi, K = FLAGS.activation, FLAGS.exponent
    p = networks.problem(FLAGS.depth, FLAGS.width, FLAGS.batch_size, FLAGS.seed)
    *_, whole = sets = laws.scaled_sets(FLAGS.depth)
    layers = partial(networks.mlp_layers, FLAGS.depth, FLAGS.width)
    trainer = partial(trajectories.trainer, batch_size=FLAGS.batch_size, seed=FLAGS.seed)
    both = {name: {norm: layers(name, norm) for norm in NORMS} for name in (phi, "relu", "sigmoid")}
    runs = {name: {norm: networks.program(of[norm]) for norm in NORMS} for name, of in both.items()}
    train = {name: trainer(layers(name)) for name in (phi, "tanh")}  # tanh has no kink
    traced = networks.layers_of_epsilon(phi)
    run_traced, train_traced = networks.program(traced), trainer(traced)
    exponents, rates = np.arange(-K, K + 1), (FLAGS.learning_rate, FLAGS.steps)
    jobs = [partial(laws.at_epsilon, runs[phi]["batch"], p, 0.0, exponents, factors)]
    jobs += [partial(laws.contrast, runs[name], p, name) for name in runs]
    jobs += [partial(trajectories.rounded, train[name], p, name, factors, *rates) for name in train]
    jobs += [partial(trajectories.bitwise, train[phi], p, which, 0.0, K, *rates) for which in sets]
    jobs += [partial(trajectories.without_norm, trainer(layers(phi, "none")), p, *rates)]
    for value in epsilons:
        fixed = networks.program(layers(phi, epsilon=value))
        jobs += [partial(laws.at_epsilon, run_traced, p, value, exponents, factors)]
        jobs += [partial(fixed_epsilon.measure, fixed, traced, run_traced, p, value, factors)]
        jobs += [partial(trajectories.bitwise, train_traced, p, whole, value, K, *rates)]
    return jobs


def powers_table(results: xr.Dataset) -> Table:
    """With BN and without: what grows with which power of a."""
    title = "W -> a W in one hidden layer: the power of a in a norm, a from 1/8 to 8, least .. greatest"
    table = make_table(title, "network", *laws.POWERS)
    for activation, norm in itertools.product(results.activation.values, NORMS):
        bounds = results.power.sel(activation=activation, norm=norm)
        name = f"{activation}, {'BN' if norm == 'batch' else 'no BN'}"
        table.add_row(name, *(power(bound) for bound in bounds))
    return table


def epsilon_table(results: xr.Dataset) -> Table:
    """Predicted against measured, at a fixed epsilon."""
    title = "W -> a W in all layers at a FIXED epsilon, float64: relative change, measured (to first order in epsilon)"
    missed = "missed by f(W, epsilon / a^2)", "missed to first order"
    table = make_table(title, "epsilon", "a", *fixed_epsilon.PREDICTED, *missed)
    for value, a in itertools.product(results.fixed_epsilon.values, results.factor.values):
        at = results.sel(fixed_epsilon=value, factor_at_epsilon=a)
        pairs = zip(at.measured.values, at.first_order.values, strict=True)
        changes = (f"{number(measured)} ({number(linear)})" for measured, linear in pairs)
        errors = number(at.exact_error.max()), span(at.first_order_error, "{:.0e}".format)
        table.add_row(f"{value:g}", f"{a:.4g}", *changes, *errors, end_section=a == results.factor[-1])
    return table


def growth_table(results: xr.Dataset) -> Table:
    """How rounding grows over training."""
    title = "Deviation of W(t) / a from W(t) at a = 1 over training, a no power of two: least .. greatest"
    columns = "1 step", "allowed", "last step", "in float64", "grows as", "at the first kink crossed"
    table = make_table(title, "network", "weight decay", *columns, "|W| over start")
    for activation, decay in itertools.product(results.trained.values, results.decay.values):
        at = results.sel(trained=activation, decay=decay)
        fit, step = trajectories.growth_of(at, activation in laws.KINKED)
        kink = "none crossed" if activation in laws.KINKED else "has no kink"
        if step is not None:
            around = [float(at.trajectory.isel(step=i).max()) for i in (max(step - 1, 0), step)]
            kink = f"t {at.step.values[step]}: {' -> '.join(map(number, around))}"
        # W itself is rounded twice, in a W and in the sum with the update; then there is the update's own error.
        allowed = ROUNDINGS * (2.0**-24 + float(at.trajectory_first_step) * float(results.rounding.max()))
        first, last = (span(at.trajectory.isel(step=i)) for i in (0, -1))
        double, norm = number(at.trajectory_float64[-1]), f"{float(at.trajectory_norm[-1]):.2f}"
        table.add_row(activation, decay, first, number(allowed), last, double, grows_as(fit), kink, norm)
    return table


def laws_table(results: xr.Dataset) -> Table:
    """Law x largest deviation, of one step and of training."""
    title = f"Largest deviation from each law, |found - law| / |law|: {FLAGS.activation}, {FLAGS.depth} hidden layers, "
    title += "each scaled alone and all at once"
    columns = "a = 2^k", "k", "other a", f"{ROUNDINGS} roundings", "across a kink", "without BN, a = 2"
    table = make_table(title, "law", "epsilon", *columns)
    bare = results.sel(activation=FLAGS.activation, trained=FLAGS.activation)
    of_value = {value: f"a^2 {value:g}" if value else "0" for value in results.epsilon.values}
    for value, law in itertools.product(of_value, laws.LAWS):
        at = results.sel(epsilon=value, law=law)
        exact = number(at.power_of_two.max()), measured_range(at.power_of_two, "exponent")
        uncrossed = laws.uncrossed(at, FLAGS.activation)
        across = at.other.where(at.other != uncrossed)
        rounded = span(uncrossed.max()), number(ROUNDINGS * at.rounding), span(across.max())
        without = "" if value else span(bare.without.sel(law=law))
        table.add_row(law, of_value[value], *exact, *rounded, without, end_section=law == laws.LAWS[-1])
    for decay, value in itertools.product(results.decay.values, of_value):
        at = results.sel(decay=decay, epsilon=value).trajectory_power_of_two
        law = f"W / a, {FLAGS.steps} steps" + ("" if decay == "none" else ", decay / a^2")
        exact = number(at.max()), measured_range(at, "sampled_exponent")
        last = bare.sel(decay=decay).isel(step=-1, few=-1)
        diverged = np.isinf(last.trajectory_without) and np.isfinite(last.trajectory_without_norm)
        without = "diverges" if diverged else number(last.trajectory_without)
        others = ["", "", "", ""] if value else [span(last.trajectory.max()), "", "", without]
        table.add_row(law, of_value[value], *exact, *others)
    table.add_section()
    normed, none = (np.abs(bare.cosine.sel(norm=norm)) for norm in NORMS)
    table.add_row("<W, dL/dW> / |W| |dL/dW| = 0", "0", "", "", number(normed.max()), "", "", span(none))
    return table


def prediction(results: xr.Dataset, activation: str) -> str:
    """How far first order in epsilon reaches, and f(W, epsilon / a^2).

    Where samples cross a kink: shown by the case with the least change expected, and its worst gradient.
    """
    exact = f"f(W, epsilon / a^2) misses at most {number(results.exact_error.max())} of a change, for all a."
    error = results.first_order_error
    crossed = (results.crossed_at_epsilon > 0) & (activation in laws.KINKED)
    if crossed.any():
        case = results.isel(results.first_order.max("predicted").where(crossed).argmin(...))
        case = case.isel(predicted=1 + np.argmax(case.first_order_error.values[1:]))
        # The second order alone would miss about as much as the relative change.
        if case.first_order_error > 10 * case.first_order:
            return (
                f"First order in epsilon does not predict {activation}'s gradients once samples cross the kink: "
                f"at epsilon {case.fixed_epsilon:g}, a = {case.factor_at_epsilon:.3g} ({case.crossed_at_epsilon:.0f} "
                f"crossed) the {case.predicted.item()} changes by {number(case.measured)}, not "
                f"{number(case.first_order)}. Where none crosses it misses at most "
                f"{span(error.where(~crossed).max())} of a change; {exact}"
            )
    return f"First order in epsilon misses {span(error)} of a change, by its size; {exact}"


def inner_product_gap(results: xr.Dataset, epsilon: float) -> tuple[float, float]:
    """The largest |<W, dL/dW>| of a layer, and the largest distance of its two other forms, relative to that."""
    sides = results.inner_product.sel(fixed_epsilon=epsilon).values
    size = np.abs(sides[0]).max()
    return float(size), float(np.abs(sides[1:] - sides[0]).max() / size)


def largest_gap(size: float) -> float:
    """What is allowed, relative to the size."""
    return max(LARGEST_GAP, ROUNDED_GAP / size)


def broken(results: xr.Dataset) -> list[str]:
    """What does not hold, in words: `laws.broken`, and the inner products that are apart."""
    gaps = {value: inner_product_gap(results, value) for value in results.fixed_epsilon.values}
    wrong = [
        f"at epsilon {value:g} the forms of <W, dL/dW> are {gap:.1e} apart, relative, more than {largest_gap(size):.0e}"
        for value, (size, gap) in gaps.items()
        if not gap <= largest_gap(size)
    ]
    if bits := laws.broken(results):
        wrong.insert(0, "not bitwise: " + "; ".join(bits))
    return wrong


def answer(results: xr.Dataset) -> dict[str, str]:
    """What was found, in words with its figures: {subject: sentence}."""
    found = {}
    for value in results.fixed_epsilon.values:
        size, gap = inner_product_gap(results, value)
        holds = "is" if gap <= largest_gap(size) else "IS NOT"
        found[f"inner product at epsilon {value:g}"] = (
            f"At epsilon {value:g}, <W, dL/dW> (up to {size:.1e}) {holds} -2 epsilon dL/d epsilon, and "
            f"epsilon sum_f (1 / sigma_f^2) sum_n delta_nf x_hat_nf, to {gap:.0e} of that in float64."
        )
    found["fixed epsilon"] = prediction(results, FLAGS.activation)
    powers = results.power.sel(activation=FLAGS.activation, grows=laws.POWERS[-1])
    with_norm, without = (power(powers.sel(norm=norm)) for norm in NORMS)
    found["without BN"] = (
        f"W -> a W in all hidden layers multiplies the gradients to W by a^p: with BN p = {with_norm}"
    )
    found["without BN"] += f", without p = {without} ({FLAGS.activation})."
    ratio = float((laws.uncrossed(results, FLAGS.activation) / results.rounding).max())
    where = " (where no sample crosses the kink)" if FLAGS.activation in laws.KINKED else ""
    found["rounding"] = (
        "For other a, samples cross a kink in every case, so that one step shows no rounding alone."
        if math.isnan(ratio)
        else f"For other a, one step is off by at most {ratio:.2g} times what one float32 evaluation rounds{where}."
    )
    ends = results.trajectory.isel(step=[0, -1]).max("factor")
    goes = f"goes, from step 1 to {FLAGS.steps}, from" if FLAGS.steps > 1 else "is, after the only step,"
    found["training"] = f"Over training the deviation {goes} " + "; ".join(
        f"{' to '.join(map(number, ends.sel(trained=name, decay=decay)[: FLAGS.steps]))} ({name}, decay {decay})"
        for name, decay in itertools.product(results.trained.values, results.decay.values)
    )
    found["training"] += "."
    count = sum(int(results[name].notnull().sum()) for name in laws.EXACT)
    wrong = laws.broken(results)
    found["powers of two"] = (
        "A LAW IS BROKEN: " + "; ".join(wrong)
        if wrong
        else f"For a = 2^k every law holds bitwise: all {count:,} deviations are exactly 0. The size of W in front of "
        "batch normalization is invisible forward and to all layers below; its own gradient only shrinks by 1 / a."
    )
    return found


def draw(results: xr.Dataset):
    """The figure."""
    from bnjax import plots

    return plots.scale_laws(
        results[["trajectory", "trajectory_float64"]],
        results[["measured", "first_order"]].sel(predicted="outputs"),
        exact="" if laws.broken(results) else f"a = 2^k, |k| ≤ {FLAGS.exponent}: exactly 0",
        title=f"W → aW in {FLAGS.depth} layers of {FLAGS.width} with BN; SGD, learning rate "
        f"{FLAGS.learning_rate:g} a², momentum {trajectories.MOMENTUM:g}, batch {FLAGS.batch_size}",
    )


@common.interruptible()
def main(argv: list[str]) -> None:
    """Flags -> measurements -> tables, figure, stored result."""
    common.prepare_process()
    folder = Path(FLAGS.out).expanduser()
    try:
        common.check_arguments(argv)
        factors, epsilons = check_flags()
        from bnjax import plots  # noqa: F401  before any work is done

        common.check_out(folder, SCRIPT, common.RESULTS, FIGURE)
    except (ValueError, OSError, ImportError) as error:
        raise common.fail(str(error)) from None
    jobs = measurements(factors, epsilons)
    with jax.default_matmul_precision("highest"):
        parts = [job() for job in track(jobs, "measuring", console=Console(stderr=True), transient=True)]
    results = xr.merge(parts, join="outer", compat="no_conflicts")
    results.attrs = {
        "device": jax.devices()[0].device_kind,
        "versions": {"bnjax": bnjax.__version__, "jax": jax.__version__},
        "answer": answer(results),
    }
    path = common.save(results, folder / common.RESULTS, SCRIPT)
    figure = common.save(draw(results), folder / FIGURE, SCRIPT)
    for table in powers_table, epsilon_table, growth_table, laws_table:
        common.console().print(table(results))
    print(*results.attrs["answer"].values(), sep="\n")
    print(f"Figure: {figure}. All measurements: {path}")
    if not np.isfinite(results.trajectory_norm).all():
        raise common.fail(
            f"training at a = 1 is not finite: --learning_rate={FLAGS.learning_rate} is too large"
        )
    if wrong := broken(results):
        raise common.fail("; ".join(wrong))


if __name__ == "__main__":
    app.run(main)
