"""Deviations from the laws in one step."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
import xarray as xr

from experiments.scale_laws.common import labels, representable
from experiments.scale_laws.networks import Derivatives, Problem, cast, hidden, of_layers, scaled

LAWS = "outputs", "gradient to the layer's input", "a x gradient to W", "gradients to all other parameters"


def scaled_sets(depth: int) -> dict[str, list[str]]:
    """What is scaled: each hidden layer alone, and all."""
    return {name: [name] for name in hidden(depth)} | ({"all": hidden(depth)} if depth > 1 else {})


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, Euclidean norms: 0 if and only if they agree bitwise, inf for a NaN."""
    if np.array_equal(found, expected) and np.array_equal(np.signbit(found), np.signbit(expected)):
        return 0.0
    found, expected, tiny = np.float64(found), np.float64(expected), np.finfo(float).tiny
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), tiny))
    return math.inf if math.isnan(ratio) else max(ratio, tiny)


def input_of(layer: str) -> str:
    """What `Derivatives.to_shown` calls the input of a hidden layer."""
    i = int(layer.removeprefix("hidden_"))
    return f"hidden_{i - 1}/activation" if i else "input"


def law_deviations(found: Derivatives, expected: Derivatives, names: Sequence[str], a: float = 1.0) -> list[float]:
    """Of each of LAWS, where the kernels of the named layers were multiplied by a; the largest over these layers."""

    def others(params):
        """All as one vector: in a linear network those of BN's bias are 0 but for rounding."""
        rest = params | {name: params[name] | {"kernel": ()} for name in names}
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(rest)])

    def kernel(d, name, a=1.0):
        return a * np.float64(d.to_params[name]["kernel"])

    return [
        deviation(found.outputs, expected.outputs),
        max(deviation(found.to_shown[name], expected.to_shown[name]) for name in map(input_of, names)),
        max(deviation(kernel(found, name, a), kernel(expected, name)) for name in names),
        deviation(others(found.to_params), others(expected.to_params)),
    ]


def crossings(found: Derivatives, expected: Derivatives) -> int:
    """How many activations are above 0 in one and not in the other: samples on two sides of a kink."""
    names = [name for name in found.shown if name.endswith("/activation")]
    return sum(int(((found.shown[name] > 0) != (expected.shown[name] > 0)).sum()) for name in names)


def measure_laws(run: Callable, p: Problem, epsilon: float, factors: Sequence[float] | np.ndarray) -> xr.Dataset:
    """Under (W -> a W, epsilon -> a^2 epsilon), in each set of layers.

    `deviation` [epsilon, scaled, law, factor], NaN where float32 has no normal number for a^2 epsilon; `crossed`
    [epsilon, scaled, factor], how many samples cross 0.
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
    variables = {"deviation": (("scaled", "law", "factor"), found), "crossed": (("scaled", "factor"), crossed)}
    coords = {"scaled": labels(sets), "law": labels(LAWS), "factor": list(factors)}
    return xr.Dataset(variables, coords).expand_dims(epsilon=[epsilon])


def rounding_errors(run: Callable, p: Problem, epsilon: float) -> list[float]:
    """[laws] deviation of float32 from float64, at a = 1: what one evaluation in float32 rounds."""
    depth = len(p.params) - 1
    with jax.enable_x64(True):
        exact = run(cast(p, np.float64), of_layers(epsilon, depth))
    return law_deviations(run(p, of_layers(epsilon, depth)), exact, hidden(depth))
