"""Does BN allow higher learning rates, and is it faster?"""

import dataclasses
import math

import numpy as np
import xarray as xr

import bnjax
from bnjax import plots
from bnjax.findings import Check, Finding, number
from experiments.claim import Claim
from experiments.common import parse_floats
from experiments.settings import check_axis, setting
from experiments.why_robust import common
from experiments.why_robust.common import BN, FULL, TINY, TRAINS, at, final, grid_step, networks, run

NETWORKS = {BN: {}, "no BN": {"norm": "none"}}


@dataclasses.dataclass(frozen=True)
class Settings(common.Settings):
    """A map of learning rates and init scales."""

    rates: tuple[float, ...] = setting(
        tuple(parse_floats("", "0.01:10:7")), "Learning rates of the map in the control of rates."
    )

    def __post_init__(self):
        super().__post_init__()
        check_axis(self, "rates", "learning_rate")


def measure(settings: Settings, ds: bnjax.Dataset) -> xr.Dataset:
    """BN and no BN: dimensions (model, learning_rate, init_scale, seed)."""
    models, probe = networks(settings, ds, NETWORKS)
    return run(settings, models, ds, {"learning_rate": sorted(settings.rates)}, probe=probe)


def training_level(accuracy: xr.DataArray) -> float:
    """The median accuracy from which a cell of the map trains."""
    return TRAINS * float(accuracy.median("seed").max())


def highest_rates(accuracy: xr.DataArray, level: float) -> xr.DataArray:
    """The highest learning rate that reaches the accuracy `level`, NaN where none does."""
    return accuracy.learning_rate.where(accuracy >= level).max("learning_rate")


def steps_to(results: xr.Dataset, loss: float) -> xr.DataArray:
    """Steps until the training loss is down to `loss`, interpolated between evaluations.

    Infinite where it never is, and where the run diverges after that.
    """

    def cross(curve, steps):
        curve = np.minimum(curve, np.finfo(np.float32).max)  # of two infinite losses there is no difference
        first = (curve <= loss).argmax(-1)[..., None]  # the first evaluation at the loss or below
        before = np.maximum(first - 1, 0)
        high, low = (np.log(np.take_along_axis(curve, index, -1)) for index in (before, first))
        part = np.where(high > low, (high - math.log(loss)) / np.where(high > low, high - low, 1), 1)
        found = (steps[before] + part * (steps[first] - steps[before]))[..., 0]
        return np.where((curve <= loss).any(-1), found, math.inf)

    found = xr.apply_ufunc(cross, results.train_loss, results.step, input_core_dims=[["step"], ["step"]])
    return found.where(~results.diverged, math.inf)


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """Ratios of the highest learning rates; steps to a loss that both reach."""
    accuracy = final(results).test_accuracy
    level = training_level(accuracy)
    highest, by_seed = highest_rates(accuracy.median("seed"), level), at(highest_rates(accuracy, level), 1)
    decades = np.log10(highest.sel(model=BN) / highest.sel(model="no BN"))
    both = decades.dropna("init_scale")
    step = grid_step(results.learning_rate)
    middle = float(both.median()) if both.size else math.nan
    tenfold = {
        "at init scale 1": float(at(decades, 1)),
        f"in the median over the {both.size} scales where both": middle,
    }

    losses = results.train_loss.isel(step=-1).median("seed")
    target = 1.1 * float(losses.min(("learning_rate", "init_scale")).max())
    steps = steps_to(results, target)

    def fewest(model, scale=None):
        """[seeds] over learning rates, and scales unless one is given: that of the fewest steps in the median."""
        one = steps.sel(model=model) if scale is None else at(steps.sel(model=model), scale)
        flat = one.stack(cell=[d for d in one.dims if d != "seed"])
        return flat.isel(cell=int(np.argmin(flat.median("seed").values))).values

    faster, counts = [], []
    for where, scale in {"at init scale 1": 1, "with the best init scale for each": None}.items():
        mine, other = fewest(BN, scale), fewest("no BN", scale)
        ratio = mine / np.median(other) if np.isfinite(np.median(other)) else np.where(np.isfinite(mine), 0, math.inf)
        faster.append(Check(f"{where}, a fifth fewer steps or less (BN over no BN)", ratio, below=0.8))
        counts += [Check(f"steps {where}, {name}", values) for name, values in ((BN, mine), ("no BN", other))]
    return [
        Finding(
            "BN allows much higher learning rates: ten times as high, or more.",
            checks=[
                *(
                    Check(f"tenfold {t}", v, unit="decades", above=math.log10(9.9), step=step)
                    for t, v in tenfold.items()
                ),
                *(Check(f"highest rate that trains at scale 1, {m}", by_seed.sel(model=m).values) for m in NETWORKS),
                *(
                    Check(f"scales at which some rate trains, {m}", int(highest.sel(model=m).notnull().sum()))
                    for m in NETWORKS
                ),
                Check("test accuracy from which a rate trains", level, unit="%"),
            ],
            note=f"Of {highest.sizes['init_scale']} scales; the rates are {number(step)} decades apart.",
        ),
        Finding(
            "BN converges faster: fewer steps to the same training loss, each with its best learning rate.",
            checks=[*faster, *counts, Check("the loss", target, unit="nats")],
        ),
    ]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Maps of accuracy, and what of them trains."""
    accuracy = final(results).test_accuracy
    level = training_level(accuracy)
    return plots.maps(
        100 * accuracy.median("seed"),
        "final test accuracy (%), median over seeds",
        level=100 * level,
        title=f"Learning rates that train (dots: {number(level, '%')} test accuracy or more)",
    )


CLAIM = Claim(
    name="rates",
    question="Higher learning rates, faster convergence?",
    source="",
    explanation="Both are said of BN. Each network is trained on a map of learning rates and init scales; a rate "
    f"trains if the median test accuracy ends at {TRAINS:.0%} of the best of all, or above.",
    settings=Settings,
    quick=Settings(),
    full=Settings(**FULL, rates=tuple(parse_floats("", "1e-4:100:25"))),
    tiny=Settings(**TINY, rates=(0.1, 1.0)),
    measure=measure,
    judge=judge,
    figure=figure,
    share=7,
)
