"""Deviations from the laws in one step."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
import xarray as xr

from bnjax.probes import Derivatives
from experiments.scale_laws.common import representable
from experiments.scale_laws.networks import Problem

LAWS = ["outputs", "gradient to the layer's input", "a x gradient to W", "gradients to all other parameters"]


def scaled_sets(hidden: Sequence[str]) -> dict[str, list[str]]:
    """The layers to scale: each hidden layer alone, and all."""
    return {name: [name] for name in hidden} | ({"all": [*hidden]} if len(hidden) > 1 else {})


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, Euclidean norms: 0 if and only if they agree bitwise, inf for a NaN."""
    if np.array_equal(found, expected) and np.array_equal(np.signbit(found), np.signbit(expected)):
        return 0.0
    found, expected, tiny = np.float64(found), np.float64(expected), np.finfo(float).tiny
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), tiny))
    return math.inf if math.isnan(ratio) else max(ratio, tiny)


def to_input(d: Derivatives, layer: str) -> np.ndarray:
    """The gradient to a hidden layer's input."""
    i = int(layer.removeprefix("hidden_"))
    return d.to_intermediates[f"hidden_{i - 1}/activation"] if i else d.to_input


def law_deviations(found: Derivatives, expected: Derivatives, names: Sequence[str], a: float = 1.0) -> list[float]:
    """Of each of LAWS, where the kernels of the named layers were multiplied by a; the largest over these layers."""

    def others(params):
        """All as one vector: in a linear network those of BN's bias are 0 but for rounding."""
        rest = params | {name: params[name] | {"kernel": ()} for name in names} | {"epsilon": ()}
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(rest)])

    def kernel(d, name, a=1.0):
        return a * np.float64(d.to_params[name]["kernel"])

    return [
        deviation(found.outputs, expected.outputs),
        max(deviation(to_input(found, name), to_input(expected, name)) for name in names),
        max(deviation(kernel(found, name, a), kernel(expected, name)) for name in names),
        deviation(others(found.to_params), others(expected.to_params)),
    ]


def crossings(found: Derivatives, expected: Derivatives) -> int:
    """The number of activations above 0 in one and not in the other: samples on two sides of a kink."""
    both = {name: (found.intermediates[name], other) for name, other in expected.intermediates.items()}
    return sum(int(((a > 0) != (b > 0)).sum()) for name, (a, b) in both.items() if name.endswith("/activation"))


def measure_laws(run: Callable, p: Problem, factors: Sequence[float] | np.ndarray) -> xr.Dataset:
    """Under (W -> a W, epsilon -> a^2 epsilon), in each set of layers.

    `deviation` [scaled, law, factor], NaN where float32 has no normal number for a^2 epsilon; `crossed`
    [scaled, factor], how many samples cross 0.
    """
    sets, expected = scaled_sets(p.hidden), run(p)
    found = np.full((len(sets), len(LAWS), len(factors)), np.nan)
    crossed = np.zeros((len(sets), len(factors)), int)
    for i, names in enumerate(sets.values()):
        for j, a in enumerate(factors):
            if representable(p.epsilon[0], a):
                d = run(p.scaled(names, a))
                found[i, :, j] = law_deviations(d, expected, names, float(p.x.dtype.type(a)))
                crossed[i, j] = crossings(d, expected)
    variables = {"deviation": (("scaled", "law", "factor"), found), "crossed": (("scaled", "factor"), crossed)}
    return xr.Dataset(variables, {"scaled": [*sets], "law": LAWS, "factor": list(factors)})


def rounding_errors(run: Callable, p: Problem) -> list[float]:
    """[laws] deviation of float32 from float64, at a = 1: what one evaluation in float32 rounds."""
    with jax.enable_x64(True):
        exact = run(p.cast(np.float64))
    return law_deviations(run(p), exact, p.hidden)
