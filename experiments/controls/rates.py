"""Does BN allow higher learning rates, and is it faster?"""

import math

import numpy as np
import xarray as xr

from bnjax import plots
from experiments.controls.common import (
    BN,
    TRAINS,
    Control,
    Finding,
    Setup,
    at,
    final,
    networks,
    number,
    percent,
    rates_and_scales,
    run,
    spread,
)


def measure(setup: Setup) -> xr.Dataset:
    """BN and no BN: dimensions (model, learning_rate, init_scale, seed)."""
    models, probe = networks(setup, {BN: {}, "no BN": {"norm": "none"}})
    axes = rates_and_scales(setup, "rates")
    return run(setup, models, setup.images, setup.config, axes, probe=probe)


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


def judge(results: xr.Dataset) -> list[Finding]:
    """Ratios of the highest learning rates; steps to a loss that both reach."""
    accuracy = final(results).test_accuracy
    level = training_level(accuracy)
    highest = highest_rates(accuracy.median("seed"), level)
    seeds = highest_rates(accuracy, level)
    ratio = highest.sel(model=BN) / highest.sel(model="no BN")
    both = ratio.dropna("init_scale")
    texts = {m: spread(at(seeds.sel(model=m), 1), number) for m in (BN, "no BN")}
    works = {m: int(highest.sel(model=m).notnull().sum()) for m in (BN, "no BN")}
    at_one, middle = float(at(ratio, 1)), float(both.median()) if both.size else math.nan

    losses = results.train_loss.isel(step=-1).median("seed")
    target = 1.1 * float(losses.min(("learning_rate", "init_scale")).max())
    steps = steps_to(results, target)

    def best(model, scale=None):
        """Over learning rates, and scales unless one is given: that of the fewest steps in the median."""
        one = steps.sel(model=model)
        one = one if scale is None else at(one, scale)
        dims = [d for d in one.dims if d != "seed"]
        flat = one.stack(cell=dims)
        return flat.isel(cell=int(np.argmin(flat.median("seed").values)))

    counts = {(m, where): best(m, where) for m in (BN, "no BN") for where in (1, None)}
    medians = {key: float(value.median()) for key, value in counts.items()}
    return [
        Finding(
            "BN allows much higher learning rates: ten times as high, or more.",
            f"highest that trains (to {percent(level)} test accuracy) at init scale 1: BN {texts[BN]}, no BN "
            f"{texts['no BN']}, "
            f"ratio {number(at_one)}; median ratio over the {both.size} scales where both train: "
            f"{number(middle)}; BN trains at "
            f"{works[BN]} of {highest.sizes['init_scale']} scales, no BN at {works['no BN']}",
            {"tenfold at init scale 1": at_one >= 9.9, "tenfold in the median over scales": middle >= 9.9},
        ),
        Finding(
            "BN converges faster: fewer steps to the same training loss, each with its best learning rate.",
            f"steps to a loss of {target:.3g} nats: at init scale 1 BN {spread(counts[BN, 1], number)}, no "
            f"BN "
            f"{spread(counts['no BN', 1], number)}; with the init scale chosen, too: BN "
            f"{spread(counts[BN, None], number)}, "
            f"no BN {spread(counts['no BN', None], number)}",
            {
                "at init scale 1, by a fifth or more": medians[BN, 1] <= 0.8 * medians["no BN", 1],
                "with the best init scale for each, by a fifth or more": medians[BN, None]
                <= 0.8 * medians["no BN", None],
            },
        ),
    ]


def draw(results: xr.Dataset):
    """Maps of accuracy, and what of them trains."""
    accuracy = final(results).test_accuracy
    level = training_level(accuracy)
    return plots.maps(
        100 * accuracy.median("seed"),
        "final test accuracy (%), median over seeds",
        level=100 * level,
        title=f"Which learning rates train (dots: {percent(level)} test accuracy or more)",
    )


CONTROL = Control(
    "Higher learning rates, faster convergence?",
    "Both are said of BN. Each network is trained on a map of learning rates and init scales; a rate "
    "trains if the "
    f"median test accuracy ends at {TRAINS:.0%} of the best of all, or above.",
    measure,
    judge,
    draw,
)
