"""Batch normalization and its derivative as the textbook has them, in numpy's longest floats; none of it is bnjax's."""

from typing import NamedTuple

import numpy as np


class Reference(NamedTuple):
    """All that a training step should give. Statistics have size 1 on the axes they are taken over."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray  # biased
    count: int  # valid entries
    dx: np.ndarray | None = None  # 0 where masked
    dscale: np.ndarray | None = None
    dbias: np.ndarray | None = None


def train(x, scale, bias, *, epsilon=1e-5, axis=-1, mask=None, cotangent=None) -> Reference:
    """A training step, x taken as exact; with a cotangent of y, the derivatives too.

    A feature without variance has x_hat = 0, and a derivative of 0 if epsilon is 0 as well.
    """
    features = {a % x.ndim for a in np.atleast_1d(axis)}
    reduced = tuple(a for a in range(x.ndim) if a not in features)

    def wide(parameter):  # [C] -> the rank of x
        return np.expand_dims(np.asarray(parameter, np.longdouble), reduced)

    valid = np.ones((1,) * x.ndim, bool) if mask is None else mask
    valid = np.broadcast_to(valid, tuple(1 if a in features else n for a, n in enumerate(x.shape)))
    count = int(valid.sum())

    def mean_of(values):
        return values.sum(reduced, keepdims=True, where=np.broadcast_to(valid, x.shape)) / max(count, 1)

    x = np.where(valid, x.astype(np.longdouble), 0)
    mean = mean_of(x)
    centred = np.where(valid, x - mean, 0)
    var = mean_of(centred**2)
    inv_sigma = np.where(var + epsilon > 0, 1 / np.sqrt(np.where(var + epsilon > 0, var + epsilon, 1)), 0)
    x_hat = centred * inv_sigma
    y = x_hat * wide(scale) + wide(bias)
    if cotangent is None:
        return Reference(y, mean, var, count)
    g = np.where(valid, cotangent.astype(np.longdouble), 0)
    dx = wide(scale) * inv_sigma * (g - mean_of(g) - x_hat * mean_of(g * x_hat))
    return Reference(y, mean, var, count, np.where(valid, dx, 0), (g * x_hat).sum(reduced), g.sum(reduced))


def averages(means, variances, counts, *, momentum, debias, unbiased) -> tuple[np.ndarray, np.ndarray]:
    """The running mean and variance [C] after batches with these statistics, [T, C], and sizes [T].

    Args:
      means: the batches' means.
      variances: their biased variances.
      counts: their sizes.
      momentum: weight of the old value; None for the plain average over all batches.
      debias: no trace is left of the start, mean 0 and variance 1.
      unbiased: variances are taken times n / (n - 1).
    """
    means, variances, counts = (np.asarray(a, np.longdouble) for a in (means, variances, counts))
    if unbiased:
        variances = variances * (counts / (counts - 1))[:, None]
    if momentum is None:
        return means.mean(0), variances.mean(0)
    steps = len(means)
    weights = (1 - momentum) * np.longdouble(momentum) ** np.arange(steps - 1, -1, -1)
    if debias:
        return weights @ means / weights.sum(), weights @ variances / weights.sum()
    return weights @ means, weights @ variances + np.longdouble(momentum) ** steps
