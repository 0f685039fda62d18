"""Batch normalization and its derivative as the textbook has them, in numpy's longest floats; none of it is bnjax's."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

LARGEST = np.longdouble(np.finfo(np.float32).max)  # where a stored variance saturates


class Reference(NamedTuple):
    """All that a training step should give."""

    y: np.ndarray  # [valid samples, C]
    dx: np.ndarray  # [N, C]; 0 where masked
    dparams: tuple[np.ndarray, np.ndarray]  # to scale and bias, [C]
    statistics: tuple[np.ndarray, np.ndarray, int]  # mean and biased variance, [C], and the number of valid samples


def train(x, scale, bias, cotangent, valid, epsilon) -> Reference:
    """A training step, x [N, C] taken as exact; `valid` [N] says which of its rows are.

    A feature without variance has x_hat = 0, and a derivative of 0 if epsilon is 0 as well.
    """
    dx = np.zeros(x.shape, np.longdouble)
    x, g = (array[valid].astype(np.longdouble) for array in (x, cotangent))

    def mean_of(values):
        return values.sum(0) / max(len(values), 1)

    mean = mean_of(x)
    var = mean_of((x - mean) ** 2)
    inv_sigma = np.where(var + epsilon > 0, 1 / np.sqrt(np.where(var + epsilon > 0, var + epsilon, 1)), 0)
    x_hat = (x - mean) * inv_sigma
    dx[valid] = scale * inv_sigma * (g - mean_of(g) - x_hat * mean_of(g * x_hat))
    return Reference(x_hat * scale + bias, dx, ((g * x_hat).sum(0), g.sum(0)), (mean, var, len(x)))


def averages(batches: Iterable[tuple], before, count, *, momentum, debias, unbiased) -> tuple[np.ndarray, np.ndarray]:
    """The running mean and variance after batches of these statistics: (mean, biased variance, size) of each.

    Args:
      batches: none of 0 changes anything, none of 1 the variance.
      before: mean and variance before them, of `count` batches.
      count: see there.
      momentum: weight of the old value; None for the plain average over all batches.
      debias: no trace is left of the start.
      unbiased: variances are taken times n / (n - 1).
    """
    mean, var = before
    for i, (batch_mean, batch_var, n) in enumerate(batches, count + 1):
        weight = 1 / np.longdouble(i) if momentum is None else 1 - np.longdouble(momentum)
        weight = weight / (1 - np.longdouble(momentum) ** i) if debias else weight
        mean = mean + (n > 0) * weight * (batch_mean - mean)
        seen = np.minimum(batch_var * (n / max(n - 1, 1) if unbiased else 1), LARGEST)
        var = var + (n > 1) * weight * (seen - var)
    return mean, var
