"""The laws of `W -> a W` in one step: deviations from them, and powers of a."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np
import xarray as xr

from experiments.scaling.networks import Derivatives, Problem, cast, hidden, of_layers, scaled

EXACT = "power_of_two", "trajectory_power_of_two"  # results that should be 0
KINKED = ("relu", "leaky_relu")  # their derivative jumps at 0
LAWS = "outputs", "gradient to the layer's input", "a x gradient to W", "gradients to all other parameters"
POWERS = "outputs", "gradient to its input", "gradient to its W", "gradients to the other W"
POWERS += ("gradients to all W, all scaled",)


def labels(names: Sequence[str]) -> np.ndarray:
    """A coordinate of strings."""
    return np.array(list(names), object)


def scaled_sets(depth: int) -> dict[str, list[str]]:
    """What is scaled: each hidden layer alone, and all."""
    return {name: [name] for name in hidden(depth)} | ({"all": hidden(depth)} if depth > 1 else {})


def representable(value: float, a: float = 1.0) -> bool:
    """Whether `a^2 value` is 0 or a normal float32 number; what is smaller, XLA takes for 0."""
    limits = np.finfo(np.float32)
    return value == 0 or float(limits.tiny) <= value * a * a <= float(limits.max)


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, Euclidean norms: 0 if and only if they agree bitwise, inf for a NaN."""
    found, expected = np.float64(found), np.float64(expected)
    if np.array_equal(found, expected) and np.array_equal(np.signbit(found), np.signbit(expected)):
        return 0.0
    tiny = np.finfo(float).tiny
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), tiny))
    return math.inf if math.isnan(ratio) else max(ratio, tiny)


def input_of(layer: str) -> str:
    """What `Derivatives.to_shown` calls the input of a hidden layer."""
    i = int(layer.removeprefix("hidden_"))
    return f"hidden_{i - 1}/activation" if i else "input"


def law_deviations(found: Derivatives, expected: Derivatives, names, a: float = 1.0) -> list[float]:
    """Of each of LAWS, where the kernels of the named layers were multiplied by a; the largest over these layers."""

    def others(params):
        """All as one vector: in a linear network those of BN's bias are 0 but for rounding."""
        rest = params | {name: params[name] | {"kernel": ()} for name in names}
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(rest)])

    def kernel(d, name, a=1.0):
        return a * np.float64(d.to_params[name]["kernel"])

    inputs = [input_of(name) for name in names]
    return [
        deviation(found.outputs, expected.outputs),
        max(deviation(found.to_shown[name], expected.to_shown[name]) for name in inputs),
        max(deviation(kernel(found, name, a), kernel(expected, name)) for name in names),
        deviation(others(found.to_params), others(expected.to_params)),
    ]


def crossings(found: Derivatives, expected: Derivatives) -> int:
    """How many activations are above 0 in one and not in the other: samples on two sides of a kink."""
    names = [name for name in found.shown if name.endswith("/activation")]
    return sum(int(((found.shown[name] > 0) != (expected.shown[name] > 0)).sum()) for name in names)


def measure_laws(run: Callable, p: Problem, epsilon: float, factors) -> tuple[np.ndarray, np.ndarray]:
    """Under (W -> a W, epsilon -> a^2 epsilon), in each set of layers: the deviations, and how many samples cross 0.

    Returns:
      [sets, laws, factors], NaN where float32 has no normal number for a^2 epsilon, and [sets, factors].
    """
    depth = len(p.params) - 1
    sets = scaled_sets(depth)
    found = np.full((len(sets), len(LAWS), len(factors)), np.nan)
    crossed = np.zeros((len(sets), len(factors)), int)
    expected = run(p, of_layers(epsilon, depth))
    for i, names in enumerate(sets.values()):
        for j, a in enumerate(factors):
            if representable(epsilon, a):
                d = run(scaled(p, names, a), of_layers(epsilon, depth, names, a))
                found[i, :, j] = law_deviations(d, expected, names, float(p.x.dtype.type(a)))
                crossed[i, j] = crossings(d, expected)
    return found, crossed


def rounding_errors(run: Callable, p: Problem, epsilon: float) -> list[float]:
    """[laws] deviation of float32 from float64, at a = 1: what one evaluation in float32 rounds."""
    depth = len(p.params) - 1
    with jax.enable_x64(True):
        exact = run(cast(p, np.float64), of_layers(epsilon, depth))
    return law_deviations(run(p, of_layers(epsilon, depth)), exact, hidden(depth))


def cosines(run: Callable, p: Problem) -> list[float]:
    """<W, dL/dW> / (|W| |dL/dW|) of each hidden layer, at epsilon 0."""
    depth = len(p.params) - 1
    d = run(p, of_layers(0.0, depth))
    found = []
    for name in hidden(depth):
        W, gradient = np.float64(p.params[name]["kernel"]), np.float64(d.to_params[name]["kernel"])
        unit = max(np.linalg.norm(W) * np.linalg.norm(gradient), np.finfo(float).tiny)
        found.append(float((W * gradient).sum() / unit))
    return found


def powers_of_a(run: Callable, p: Problem) -> np.ndarray:
    """With which power of a norms grow: least and greatest log-log slope from a = 1/8 to 8, [POWERS, 2].

    One hidden layer is scaled, each in turn; in the last row all are. NaN where there is nothing to measure.
    """
    names = hidden(len(p.params) - 1)

    def kernels(d, members):
        return [d.to_params[name]["kernel"] for name in members]

    def of_one(d, own):
        others = [name for name in names if name != own]
        return [d.outputs], [d.to_shown[input_of(own)]], kernels(d, [own]), kernels(d, others)

    def slopes(members, pick):
        """[slopes, arrays] for each list of arrays that is picked."""
        runs = (run(scaled(p, members, a), of_layers(0.0, len(names))) for a in 2.0 ** np.arange(-3, 4))
        lists = zip(*(pick(d) for d in runs), strict=True)
        norms = [[[np.linalg.norm(np.float64(v)) for v in values] for values in of_a] for of_a in lists]
        with np.errstate(divide="ignore", invalid="ignore"):
            return [np.diff(np.log2(of_a), axis=0) for of_a in norms]

    alone = zip(*(slopes([own], partial(of_one, own=own)) for own in names), strict=True)
    rows = [*map(np.array, alone), *slopes(names, lambda d: [kernels(d, names)])]
    usable = [row.size and np.isfinite(row).all() for row in rows]
    return np.array(
        [[row.min(), row.max()] if ok else [np.nan] * 2 for row, ok in zip(rows, usable, strict=True)]
    )


def at_epsilon(run: Callable, p: Problem, epsilon: float, exponents: np.ndarray, factors) -> xr.Dataset:
    """Of a network with batch normalization: all deviations under (W -> a W, epsilon -> a^2 epsilon)."""
    bitwise, _ = measure_laws(run, p, epsilon, 2.0**exponents)
    other, crossed = measure_laws(run, p, epsilon, factors)
    found = {
        "power_of_two": (("scaled", "law", "exponent"), bitwise),
        "other": (("scaled", "law", "factor"), other),
        "crossed": (("scaled", "factor"), crossed),
        "rounding": (("law",), rounding_errors(run, p, epsilon)),
    }
    coords = {"scaled": labels(scaled_sets(len(p.params) - 1)), "law": labels(LAWS)}
    coords |= {"exponent": exponents, "factor": list(factors)}
    return xr.Dataset(found, coords).expand_dims(epsilon=[epsilon])


def contrast(runs: Mapping[str, Callable], p: Problem, activation: str) -> xr.Dataset:
    """Networks with batch normalization and without, {norm: program}, at epsilon 0."""
    depth = len(p.params) - 1
    found = {
        "without": (("scaled", "law"), measure_laws(runs["none"], p, 0.0, [2.0])[0][..., 0]),
        "cosine": (("norm", "layer"), [cosines(run, p) for run in runs.values()]),
        "power": (("norm", "grows", "bound"), [powers_of_a(run, p) for run in runs.values()]),
    }
    coords = {
        "scaled": scaled_sets(depth),
        "law": LAWS,
        "norm": runs,
        "layer": hidden(depth),
        "grows": POWERS,
    }
    coords = {name: labels(values) for name, values in (coords | {"bound": ("least", "greatest")}).items()}
    return xr.Dataset(found, coords).expand_dims(activation=labels([activation]))


def uncrossed(at: xr.Dataset, activation: str) -> xr.DataArray:
    """The deviations for other a, but for those where a sample crossed a kink of the activation."""
    return at.other if activation not in KINKED else at.other.where(at.crossed == 0)


def broken(results: xr.Dataset) -> list[str]:
    """Which of EXACT are not 0 for some a = 2^k, and where first."""
    found = []
    for name in EXACT:
        wrong = (results[name] != 0) & results[name].notnull()
        for index in np.argwhere(wrong.values)[:1]:
            pairs = zip(wrong.dims, index, strict=True)
            where = ", ".join(f"{dim} {results[dim].values[i]}" for dim, i in pairs)
            found.append(f"{int(wrong.sum())} of {name} are not 0, the first at {where}")
    return found
