"""Shared by the claims: gradients of many networks, and what their means say about networks of infinite width."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import activations, choices, plots, probes
from bnjax.analysis import curves
from bnjax.findings import Check, Finding
from experiments.common import on_all_devices, parse_seeds
from experiments.settings import at_least, check_axis, require, setting
from experiments.table import Table


@dataclasses.dataclass(frozen=True)
class Wide:
    """Of the networks in the parts epsilon and chaos."""

    epsilon_width: int = setting(128, "Larger width in the parts epsilon and chaos, at least 64; the other is half.")
    epsilon_seeds: tuple[int, ...] = setting(
        tuple(range(64)), "Networks in the parts epsilon and chaos (there 4 for each seed), at least 16.", parse_seeds
    )

    def __post_init__(self):
        at_least(self, epsilon_width=64)
        check_seeds(self, "epsilon_seeds")

    @property
    def widths(self) -> list[int]:
        """Two, of which the limit is taken."""
        return [self.epsilon_width // 2, self.epsilon_width]


def check_seeds(settings: Any, field: str) -> None:
    """Raises `Refused` for seeds too few for a standard error, or too large."""
    check_axis(settings, field, "seed")
    seeds = getattr(settings, field)
    require(len(seeds) >= 16, field, f"must be at least 16, got {len(seeds)}")
    require(max(seeds) < 2**29, field, f"must be below 2^29, got {max(seeds)}")


def check_activations(settings: Any, field: str) -> None:
    """Raises ValueError unless these are different names of activations."""
    names = getattr(settings, field)
    once = all(names) and len({*names}) == len(names)
    require(once, field, f"takes at least one name, each of them once, got {','.join(names)!r}")
    for name in names:
        choices.check(f"activation in --{field}", name, activations.ACTIVATIONS, activations.ALIASES)


def orthonormal(rows: int, columns: int) -> np.ndarray:
    """A matrix [rows, columns] with orthonormal rows, none of them special."""
    square = np.random.default_rng(0).normal(size=(columns, rows))
    return np.linalg.qr(square)[0].T.astype(np.float32)


def squared_gradients(model: bnjax.Model, params, stats, x, cotangent):
    """Squared norms of the gradient of sum(outputs * cotangent) to each pre-activation [L], and all intermediates."""
    found = probes.derivatives(model, params, stats, x, lambda outputs: (outputs * cotangent).sum())
    names = [f"{name}/preactivation" for name in params if name != "output"]
    return jnp.stack([(found.to_intermediates[name] ** 2).sum() for name in names]), found.intermediates


def over_seeds(function: Callable, seeds: Sequence[int], *arguments) -> Any:
    """function(seed, *arguments) for each seed, one after the other in one program; float64 arrays [seeds, ...]."""
    program = jax.jit(lambda seeds, *arguments: jax.lax.map(lambda seed: function(seed, *arguments), seeds))
    return jax.tree.map(lambda leaf: np.asarray(leaf, float), program(jnp.array(seeds), *arguments))


def limits(function: Callable, jobs: Sequence[tuple], part: str) -> list[Any]:
    """Limits of infinite width of function(width, *arguments) [seeds, ...] or a tree of these.

    For each job (widths, *arguments): value and standard error [2, ...].
    """
    each = [(width, *arguments) for widths, *arguments in jobs for width in widths]
    runs = iter(on_all_devices(lambda one: function(*one), each, part))
    return [
        jax.tree.map(partial(curves.at_infinite_width, widths), *(next(runs) for _ in widths)) for widths, *_ in jobs
    ]


def agreement(claim: str, z: xr.DataArray) -> Finding:
    """That theory and measurement agree: by the deviations of all points in standard errors; NaN is too far."""
    z = np.abs(z.values.reshape(-1))
    within = [Check(f"points within {k} of their standard errors", (z < k).mean(), unit="%") for k in (1, 2)]
    largest = Check("largest deviation, in standard errors", z.max(), below=4)
    return Finding(claim, checks=[Check("points with a standard error", z.size), *within, largest])


def points(title: str, results: xr.Dataset, columns: Sequence[tuple[str, str]], caption: str = "") -> Table:
    """A row for each point of `results`; columns: (header, form with the names of variables)."""
    each, (headers, forms) = results.to_dataframe().reset_index().to_dict("records"), zip(*columns, strict=True)
    return Table(title, headers, [[form.format(**one) for form in forms] for one in each], caption)


def panel(results: xr.Dataset, ylabel: str, names: tuple[str, str, str], **options: Any) -> plots.Panel:
    """For each activation points, their standard errors, and lines of theory; `names` are those of the variables."""
    measured, lines = {}, {}
    for activation in results.activation.values:
        value, error, line = (results[name].sel(activation=activation, drop=True) for name in names)
        measured[activation] = xr.concat([value - error, value, value + error], "seed")
        lines[f"_{activation}"] = line
    options |= {"theory": lines, "unconnected": measured}
    return plots.Panel("points: networks, lines: theory", ylabel, measured | lines, **options)
