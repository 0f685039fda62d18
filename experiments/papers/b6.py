"""B6, Bjorck et al. 2018: products of random matrices, the more factors the worse conditioned."""

import dataclasses
import functools
import math

import numpy as np
import xarray as xr

import bnjax
from bnjax import plots
from bnjax.findings import Check, Finding
from bnjax.theory import random_matrices
from experiments import common
from experiments.claim import Claim
from experiments.settings import at_least, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of wide products, and of deep ones."""

    num_factors: tuple[int, ...] = setting((1, 2, 3, 5), "Numbers of factors of the wide products.")
    width: int = setting(512, "Width of the wide products.")
    seeds: tuple[int, ...] = setting(tuple(range(60)), "Seeds of the wide products.", common.parse_seeds)
    deep_factors: int = setting(25, "Number of factors of the deep products.")
    deep_width: int = setting(10, "Width of the deep products.")
    deep_products: int = setting(200, "How many deep products.")

    def __post_init__(self):
        at_least(self, width=2, deep_factors=1, deep_width=2, deep_products=1)


def gaussian(seed: list[int], count: int, width: int) -> np.ndarray:
    """[count, width, width] of variance 1 / width."""
    return np.random.default_rng(seed).normal(size=(count, width, width)) / math.sqrt(width)


def measure(settings: Settings, ds: bnjax.Dataset | None) -> xr.Dataset:
    """Singular values of the wide products; condition numbers of the deep ones, in decades."""
    wide = [
        [
            np.linalg.svd(functools.reduce(np.matmul, gaussian([n, seed], n, settings.width)), compute_uv=False)
            for seed in settings.seeds
        ]
        for n in settings.num_factors
    ]
    decades = []
    for seed in range(settings.deep_products):
        factors = gaussian([0, seed], settings.deep_factors, settings.deep_width)
        # The smallest is 1 / |inverse|: of one matrix float64 would resolve 16 decades.
        forward, back = np.eye(settings.deep_width), np.eye(settings.deep_width)
        for factor in factors:
            forward, back = factor @ forward, back @ np.linalg.inv(factor)
        decades.append(math.log10(np.linalg.norm(forward, 2)) + math.log10(np.linalg.norm(back, 2)))
    return xr.Dataset(
        {
            "singular_value": (("num_factors", "seed", "index"), np.array(wide)),
            "condition_decades": ("product", decades),
        },
        {"num_factors": list(settings.num_factors), "seed": list(settings.seeds)},
    )


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """Wide products against the Fuss-Catalan law, deep ones against Lyapunov exponents."""
    edges, moments = [], []
    for n in settings.num_factors:
        values = results.singular_value.sel(num_factors=n)
        edge = values.max("index") / random_matrices.largest_singular_value(n)
        edges.append(Check(f"N = {n}: largest singular value over theory", edge.values, within=(0.97, 1.03)))
        ratio = (values**4).mean("index") / (values**2).mean("index") ** 2 / random_matrices.moment(n, 2)
        moments.append(Check(f"N = {n}: E s^4 / (E s^2)^2 over {n + 1}", ratio.values, within=(0.95, 1.05)))
    exponents = random_matrices.lyapunov_exponents(settings.deep_width)
    predicted = settings.deep_factors * (exponents[0] - exponents[-1]) / math.log(10)
    decades = results.condition_decades.values
    return [
        Finding(
            "Singular values of products of N Gaussian matrices follow the Fuss-Catalan law: the more factors, the "
            "larger the largest, and the heavier the tail.",
            "Bjorck et al. 2018",
            [*edges, *moments],
        ),
        Finding(
            f"A product of {settings.deep_factors} Gaussian matrices {settings.deep_width} x {settings.deep_width} is "
            "so badly conditioned that float32 cannot hold it.",
            "Bjorck et al. 2018",
            [
                Check("decades that its singular values span", decades, unit="decades", above=7),
                Check("decades over Lyapunov's prediction", decades / predicted, within=(0.9, 1.1)),
            ],
            note=f"Lyapunov exponents predict {predicted:.1f} decades.",
        ),
    ]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """The largest singular value by the number of factors."""
    largest = results.singular_value.max("index")
    edges = [random_matrices.largest_singular_value(n) for n in settings.num_factors]
    theory = largest.isel(seed=0, drop=True).copy(data=edges)
    ratio = (results.singular_value**4).mean("index") / (results.singular_value**2).mean("index") ** 2
    shape = {"xlabel": "factors", "xscale": "linear", "theory": ("theory",)}
    tail = {"measured": ratio, "theory": theory.num_factors + 1}
    shown = [
        plots.Panel("Size", "largest singular value", {"measured": largest, "theory": theory}, **shape),
        plots.Panel("Tail", "E s^4 / (E s^2)^2", tail, **shape),
    ]
    return plots.panels(shown, title=f"Products of Gaussian matrices, {settings.width} x {settings.width}")


CLAIM = Claim(
    name="B6",
    question="Are products of random matrices the worse conditioned the more factors they have?",
    source="Bjorck et al. 2018, arXiv 1806.02375 (its text was not at hand). Closed forms: Penson & Zyczkowski 2011, "
    "Newman 1986.",
    settings=Settings,
    quick=Settings(),
    full=Settings(width=1024, deep_products=2000),
    tiny=Settings(num_factors=(1, 2), width=32, seeds=(0, 1), deep_products=5),
    measure=measure,
    judge=judge,
    figure=figure,
)
