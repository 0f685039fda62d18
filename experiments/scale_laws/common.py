"""The settings of this script's claims, and their tables."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import xarray as xr

from bnjax import activations, choices
from bnjax.findings import number
from experiments.claim import Claim
from experiments.common import parse_seeds
from experiments.settings import at_least, check_axis, require, setting
from experiments.table import Table

LARGEST_EXPONENT = 60  # float32 has room for 2^k W, a gradient's 2^-k, and a learning rate of 4^k times 0.1
KINKED = ("relu", "leaky_relu")  # their derivative jumps at 0


def representable(value: float, a: float = 1.0) -> bool:
    """True if `a^2 value` is 0 or a normal float32 number; what is smaller, XLA takes for 0."""
    limits = np.finfo(np.float32)
    return value == 0 or float(limits.tiny) <= value * a * a <= float(limits.max)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The network, its training, and what it is multiplied by."""

    depth: int = setting(6, "L, the number of hidden layers.")
    width: int = setting(64, "Of the hidden layers, and of the input.")
    activation: str = setting("relu", f"Of the hidden layers: {', '.join(activations.ACTIVATIONS)}.")
    batch_size: int = setting(64, "Samples; through 2 of them BN passes no gradient.")
    epsilon: tuple[float, ...] = setting((1e-5, 0.1), "Batch normalization's, beside 0, which is always there.")
    exponent: int = setting(60, "K: bitwise laws for a = 2^k, k from -K to K.")
    factors: tuple[float, ...] = setting((0.01, 0.1, 2**0.5, 3.0, 10.0), "Other a: 0.1,3 or low:high:count.")
    steps: int = setting(300, "Of training.")
    learning_rate: float = setting(0.1, "At a = 1.")
    seeds: tuple[int, ...] = setting((0, 1, 2), "Each draws a network and its data.", parse_seeds)

    def __post_init__(self):
        choices.check("--activation", self.activation, activations.ACTIVATIONS, activations.ALIASES)
        at_least(self, depth=1, width=2, batch_size=3, exponent=1, steps=1)
        check_axis(self, "seeds", "seed")
        K = LARGEST_EXPONENT
        require(self.exponent <= K, "exponent", f"must be at most {K}, got {self.exponent}")
        for a in self.factors:
            require(2.0**-K <= a <= 2.0**K, "factors", f"must be in [2^-{K}, 2^{K}], got {a:g}")
            other = math.frexp(np.float32(a))[0] != 0.5
            require(other, "factors", f"are no powers of two, which --exponent is for; got {a:g}")
        for field in ("epsilon", "learning_rate", "factors"):
            values = np.ravel(getattr(self, field)).tolist()
            normal = all(value > 0 and representable(value) for value in values)
            require(normal, field, f"must be above 0 and a normal float32 number, got {getattr(self, field)}")
            require(len({*np.float32(values)}) == len(values), field, f"names a value twice: {values}")

    @property
    def hidden(self) -> list[str]:
        """The names of the hidden layers."""
        return [f"hidden_{i}" for i in range(self.depth)]


claim = partial(
    Claim,
    source="Scale invariance: van Laarhoven 2017; Arora, Li & Lyu 2019 (their texts were not at hand).",
    settings=Settings,
    quick=Settings(),
    full=Settings(seeds=tuple(range(10))),
    tiny=Settings(depth=2, width=8, batch_size=8, steps=24, factors=(3.0,), epsilon=(0.1,), exponent=2, seeds=(0, 1)),
)


def by_seed(values: xr.DataArray, reduce: str = "max") -> np.ndarray:
    """[seeds]: the largest of each, but for NaN, or what else `reduce` names."""
    return getattr(values, reduce)([dim for dim in values.dims if dim != "seed"]).values


def table(title: str, rows: Sequence[str], columns: Mapping[str, xr.DataArray], caption: str = "") -> Table:
    """A row for each combination of the dimensions `rows`; in a cell the least and greatest of all others."""

    def span(values):
        values = np.ravel(values).astype(float) + 0.0  # no -0
        ends = map(number, (np.nanmin(values), np.nanmax(values))) if not np.isnan(values).all() else "-"
        return " .. ".join(dict.fromkeys(ends))

    cells, first = [], next(iter(columns.values()))
    for index in itertools.product(*(first[dim].values for dim in rows)):
        names = [f"{name:.4g}" if isinstance(name, float) else str(name) for name in index]
        at = [{dim: i for dim, i in zip(rows, index, strict=True) if dim in of.dims} for of in columns.values()]
        cells.append([*names, *(span(of.sel(where)) for of, where in zip(columns.values(), at, strict=True))])
    return Table(title, (*rows, *columns), cells, caption)
