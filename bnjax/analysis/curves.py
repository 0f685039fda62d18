"""Limits of measured points: networks of infinite width, and laws of growth."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Growth(NamedTuple):
    """By which law curves grow, [N] each; NaN in the other law's numbers, and for a curve that is not above 0."""

    power: np.ndarray  # p, if it is t^p
    time_to_e: np.ndarray  # if it is exponential, in which each curve grows by a factor e


def at_infinite_width(widths: Sequence[int], *runs: np.ndarray) -> np.ndarray:
    """The limit of a mean over random networks as their width goes to infinity: a straight line in 1 / width.

    Args:
      widths: at least one.
      *runs: for each of them what was measured in networks of that width, [seeds, ...].

    Returns:
      [2, ...]: the value at infinite width, and its standard error, of a line through the means over seeds, weighted
      by 1 / errors^2. Of one width alone the median, which needs no variance, and half the interval of order
      statistics that covers it with 68%.
    """
    if len(widths) == 1:
        ordered, count = np.sort(runs[0], 0), len(runs[0])
        half = math.sqrt(count) / 2
        low, high = max(0, math.floor(count / 2 - half)), min(count - 1, math.ceil(count / 2 + half))
        return np.stack([np.median(runs[0], 0), (ordered[high] - ordered[low]) / 2])
    means = np.stack([values.mean(0) for values in runs])
    errors = np.stack([values.std(0, ddof=1) / math.sqrt(len(values)) for values in runs])
    line = np.stack([np.ones(len(widths)), 1 / np.asarray(widths, float)], 1)
    found = []
    for mean, error in zip(*(values.reshape(len(widths), -1).T for values in (means, errors)), strict=True):
        covariance = np.linalg.inv((line / error[:, None] ** 2).T @ line)
        found.append(((covariance @ line.T @ (mean / error**2))[0], math.sqrt(covariance[0, 0])))
    return np.array(found).T.reshape(2, *means.shape[1:])


def growth(curves: np.ndarray, times: np.ndarray) -> Growth:
    """Fits growth as a power of time or exponential growth: whichever fits their logarithms better, all together.

    Args:
      curves: [N, T].
      times: [T], above 0.

    Returns:
      `Growth`, by least squares.
    """
    found = Growth(*np.full((2, len(curves)), np.nan))
    used = (curves > 0).all(1)
    if used.any():
        logs = np.log(curves[used]).T
        fits = [np.polyfit(time, logs, 1, full=True)[:2] for time in (np.log(times), times.astype(float))]
        law = int(fits[1][1].sum() < fits[0][1].sum())
        slopes = fits[law][0][0]
        found[law][used] = 1 / slopes if law else slopes
    return found
