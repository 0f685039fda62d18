"""What a finished sweep says: over how many decades of init_scale does a network still train?

The robust range at a threshold q is the longest contiguous run of the grid's scales at which the median
seed's final test accuracy is at least q times the best such median over all networks and scales. Its
length is log10(highest / lowest scale) decades; it is a lower bound where the range touches an end of
the grid. A diverged run counts as chance. With several learning rates, a scale counts with the learning
rate of the best median there (chosen on the test split, for every network alike).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float


class RobustRange(NamedTuple):
    """The longest contiguous run of scales that pass."""

    decades: float  # log10(high / low): 0 for one scale, NaN for none
    low: float  # lowest scale of the run, NaN for none
    high: float  # highest scale
    open_low: bool  # the run touches the grid's lowest scale,
    open_high: bool  # or its highest: then `decades` is a lower bound
    holes: tuple[float, ...]  # scales that fail between the lowest and the highest that pass


class Summary(NamedTuple):
    """A network's robust range at one threshold, with its uncertainty and what qualifies it."""

    range: RobustRange
    interval: tuple[RobustRange, RobustRange] | None  # 95%, bootstrap over seeds; None with one seed
    above_low: float  # median accuracy above the baseline's at the range's lowest scale, a fraction
    above_high: float  # and at its highest; NaN without a baseline or a range


def final_accuracy(results: xr.Dataset, chance: float) -> xr.DataArray:
    """Test accuracy after the last step, `chance` where the run diverged, scales ascending.

    Args:
      results: from `bnjax.sweep` over models, "seed", "init_scale" and maybe "learning_rate".
      chance: the accuracy of guessing, a fraction.

    Returns:
      Array of dimensions (model, init_scale, learning_rate, seed).

    Raises:
      ValueError: if `results` has other dimensions, or lacks one.
    """
    # Results that earlier versions stored have the accuracy of a diverged run's last finite state.
    accuracy = results.test_accuracy.isel(step=-1, drop=True).where(~results.diverged, chance)
    if "learning_rate" not in accuracy.dims:
        accuracy = accuracy.expand_dims(learning_rate=[results.attrs["hyper"]["learning_rate"]])
    wanted = ("model", "init_scale", "learning_rate", "seed")
    if set(accuracy.dims) != set(wanted):
        raise ValueError(f"robustness needs the dimensions {wanted}, got {results.test_accuracy.dims}")
    return accuracy.transpose(*wanted).sortby("init_scale")


def best_learning_rate(accuracy: xr.DataArray) -> xr.DataArray:
    """The learning rate with the highest median accuracy over seeds, for each network and scale.

    Args:
      accuracy: from `final_accuracy`.

    Returns:
      Array of dimensions (model, init_scale).
    """
    return accuracy.median("seed").idxmax("learning_rate")


def robust_range(passes: Bool[np.ndarray, " scales"], scales: Float[np.ndarray, " scales"]) -> RobustRange:
    """The longest contiguous run of scales that pass; of equally long ones the first.

    Args:
      passes: whether the network trains at each scale.
      scales: in ascending order.

    Returns:
      `RobustRange`, its lengths in decades (factors of 10), its ends as scales.
    """
    # A rise of the padded indicator starts a run, a fall ends it.
    edges = np.diff(np.concatenate([[0], passes.astype(int), [0]]))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    if len(starts) == 0:
        return RobustRange(np.nan, np.nan, np.nan, False, False, ())
    decades = np.log10(scales[stops] / scales[starts])
    longest = int(decades.argmax())
    low, high = starts[longest], stops[longest]
    between = slice(starts[0], stops[-1] + 1)
    return RobustRange(
        decades=float(decades[longest]),
        low=float(scales[low]),
        high=float(scales[high]),
        open_low=bool(low == 0),
        open_high=bool(high == len(scales) - 1),
        holes=tuple(float(s) for s in scales[between][~passes[between]]),
    )


def summarize(
    accuracy: xr.DataArray,
    thresholds: Sequence[float],
    *,
    baselines: Mapping[str, str] = MappingProxyType({}),
    resamples: int = 1000,
) -> dict[str, dict[float, Summary]]:
    """The robust range of each network at each threshold.

    The interval is the 2.5th to the 97.5th percentile over `resamples` draws of the seeds with
    replacement (Efron 1979), the same seeds for all networks and scales; the reference (the best median)
    is drawn anew with them. With n seeds it knows no more than n runs can say.

    Args:
      accuracy: from `final_accuracy`.
      thresholds: fractions of the best median, in (0, 1].
      baselines: {network: the network that the ends of its range are compared to}.
      resamples: number of bootstrap draws.

    Returns:
      {network: {threshold: Summary}}.

    Raises:
      ValueError: if a threshold is outside (0, 1], or a baseline is no network of `accuracy`.
    """
    for threshold in thresholds:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    models = [str(m) for m in accuracy.model.values]
    for baseline in baselines.values():
        if baseline not in models:
            raise ValueError(f"a baseline must be one of {models}, got {baseline!r}")
    scales = accuracy.init_scale.values
    medians = _medians(accuracy.values)
    draws = np.random.default_rng(0).integers(
        accuracy.sizes["seed"], size=(resamples, accuracy.sizes["seed"])
    )
    drawn_medians = [_medians(accuracy.values[..., seeds]) for seeds in draws]

    def above_baseline(m, scale):
        if models[m] not in baselines or np.isnan(scale):
            return float("nan")
        (at,) = np.flatnonzero(scales == scale)
        return float(medians[m, at] - medians[models.index(baselines[models[m]]), at])

    def summary(m, threshold):
        found = robust_range(medians[m] >= threshold * medians.max(), scales)
        interval = None
        if accuracy.sizes["seed"] > 1:
            ranges = [robust_range(drawn[m] >= threshold * drawn.max(), scales) for drawn in drawn_medians]
            ranges.sort(key=lambda r: (np.nan_to_num(r.decades, nan=-1.0), r.open_low or r.open_high))
            interval = ranges[int(0.025 * resamples)], ranges[int(np.ceil(0.975 * resamples)) - 1]
        return Summary(found, interval, above_baseline(m, found.low), above_baseline(m, found.high))

    return {name: {q: summary(m, q) for q in thresholds} for m, name in enumerate(models)}


def _medians(accuracy):
    """[model, scale, rate, seed] -> [model, scale]: the median over seeds at the best learning rate."""
    return np.median(accuracy, axis=-1).max(axis=-1)
