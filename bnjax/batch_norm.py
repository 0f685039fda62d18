"""Batch normalization as pure functions, with its derivative in closed form.

One feature, N samples, `sigma = sqrt(var + epsilon)` with the batch's biased variance:

    x_hat = (x - mean) / sigma                              y = scale * x_hat + bias
    d x_hat / d x = (I - 1 1^T / N - x_hat x_hat^T / N) / sigma

The Jacobian (Ioffe & Szegedy 2015, section 3, rearranged) is symmetric, so the forward and the
reverse derivative are the same operator. `normalize` therefore needs ONE `jax.custom_jvp` rule that
is linear in the tangent: forward mode uses it as it is, reverse mode transposes it, `vmap` batches it,
and second derivatives differentiate it again. What reverse mode keeps from the forward pass is
`x_hat` and `scale / sigma`.

The statistics, in at least float32, are taken in two passes over x (E[x^2] - E[x]^2 has no correct digit
left in float32 once mean / std passes about 3e3):

1. sum x and sum |x|. They give a centre near the mean, and as a unit a power of two near mean |x|.
2. sum d and sum d^2 of d = (x - centre) / unit. The mean of d is what rounding left in the centre, so that
   E[d^2] - E[d]^2 cancels next to nothing (the corrected two-pass algorithm: Chan, Golub & LeVeque 1983,
   "Algorithms for computing the sample variance"). Dividing by a power of two is exact, and no square
   of d overflows or vanishes, whatever the magnitude of x.

Devices then combine counts, means and centred sums of squares (Chan, Golub & LeVeque 1979).
docs/batch_norm.md has the error that is left, measured, beside other libraries'.

Where libraries differ:

    momentum      the weight of the OLD running value here, in Flax, Keras and Haiku (decay_rate); of the NEW
                  one in PyTorch. None: the average over all batches, as in PyTorch.
    running var   averages the batches' biased variances here, in Flax, Keras, Haiku and Equinox; their unbiased ones
                  (N / (N - 1) times that) in PyTorch and here with `unbiased`.
    start         a plain moving average starts at mean 0, var 1 here, in Flax, Keras and PyTorch; `debias` removes
                  that start's trace, as Haiku does.
    batch of one  output = bias and a zero gradient here, in Flax and in Keras; an error in PyTorch. The running
                  variance, of which one sample says nothing, is left as it is here only.
    mask          Flax and Keras have one too; here, masked entries may be NaN, and a batch without a valid entry
                  leaves the statistics as they are.
    axis_name     as in Flax and Equinox; here, the numbers of valid entries may differ.
"""

import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Num

from bnjax.types import Array, BatchNormParams, BatchStats


def init(
    num_features: int, dtype=jnp.float32, *, use_scale: bool = True, use_bias: bool = True
) -> tuple[BatchNormParams, BatchStats]:
    """Scale 1, bias 0, running mean 0 and variance 1: the identity, up to epsilon.

    Args:
      num_features: C, at least 1.
      dtype: of the parameters. The statistics have it too, but float32 at least; the count of batches is int32.
      use_scale: False for no scale (the parameter is None).
      use_bias: False for no bias.

    Returns:
      `BatchNormParams` with arrays [C], and `BatchStats` with arrays [C], [C] and [].

    Raises:
      TypeError: if `dtype` is not floating point.
      ValueError: if `num_features` is below 1.
    """
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, got {num_features}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating point, got {jnp.dtype(dtype)}")
    scale = jnp.ones(num_features, dtype) if use_scale else None
    bias = jnp.zeros(num_features, dtype) if use_bias else None
    mean = jnp.zeros(num_features, _statistics_dtype(dtype))
    return BatchNormParams(scale, bias), BatchStats(mean, jnp.ones_like(mean), count=jnp.int32(0))


def apply(
    params: BatchNormParams,
    stats: BatchStats,
    x: Num[Array, "..."],
    *,
    train: bool,
    momentum: float | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    axis: int | Sequence[int] = -1,
    mask: Bool[Array, "..."] | None = None,
    axis_name: str | Sequence[str] | None = None,
    debias: bool = False,
    unbiased: bool = False,
    detach: Sequence[str] = (),
) -> tuple[Float[jax.Array, "..."], BatchStats]:
    """Normalizes a batch; in training by its own statistics, in evaluation by the running ones.

    training:    y = scale * (x - batch mean) / sqrt(batch var + epsilon) + bias
                 running <- running + w * (batch - running)
    evaluation:  y = scale * (x - running mean) / sqrt(running var + epsilon) + bias

    The weight w of the t-th batch is `1 - momentum`; with `debias` it is
    `(1 - momentum) / (1 - momentum^t)`, which leaves no trace of the initial mean 0 and variance 1
    (the bias correction of Adam, Kingma & Ba 2015, applied as the average is taken); with
    `momentum=None` it is 1 / t, the plain average over all batches.

    A batch of one valid entry has no variance: it updates the running mean, and counts with the running
    variance as its own (so that, should it come first, the initial 1 stays in the average). A batch without a
    valid entry leaves all statistics as they were. A NaN or an infinity makes its own feature NaN, and no other.

    Statistics are stored in their own type, which limits evaluation, not training: the mean of inputs at
    mean / std = r is rounded to r * 6e-8 standard deviations in float32; a variance beyond its range is stored as
    the largest number, one below it (spreads under 1e-22) as 0; an average moves only while a batch
    changes it by half a unit in the last place, w * |batch - running| > 3e-8 |running|: with
    `momentum=None` and batch means that vary by 1% that is for some 300,000 batches. `init` with float64 goes on.

    Args:
      params: scale and bias, [C]; None for one that is not used.
      stats: running mean and variance [C], count []. No gradient flows
        through the returned ones; their types and shapes are those given.
      x: [N, ..., C], or with the features on `axis`. In evaluation, or with `axis_name`, also [C].
      train: Python bool.
      momentum: weight of the old running value, in [0, 1], or None; a Python number, not a traced one. Not the
        optimizer's momentum. While weights still change fast, evaluation lags behind training by the batches
        that the average remembers: all of them with None, which suits fixed weights.
      epsilon: added to the variance, >= 0.
      axis: the feature axis, or axes in ascending order (then the shape of params and stats is theirs): -1 for
        [N, C] and images as NHWC, 1 for NCHW. Statistics are taken over all others.
      mask: True for valid entries; broadcasts against `x`, with size 1 on the feature axes. Masked
        entries may hold anything and influence nothing; their output is the bias.
      axis_name: name(s) of mapped axes (of `jax.vmap`, `jax.pmap` or `jax.shard_map`) over which batch
        statistics are shared, each entry counting once, however many are valid where.
      debias: see above. Static, as `momentum` is.
      unbiased: average N / (N - 1) times the batch variances, N counting valid entries, in the running
        variance. By default it averages the very variances that training divides by, so that evaluation
        agrees with training; the unbiased ones estimate the variance of the population, and are PyTorch's.
      detach: which of the batch statistics, "mean" and "var", are constants to the derivative: what is left
        of the Jacobian is `(scale / sigma) (I - [1 1^T / N] - [x_hat x_hat^T / N])` without the first bracket, the
        second or both. For asking what the derivative through the statistics is good for.

    Returns:
      y, of the shape and dtype of x, and the updated statistics. In evaluation they are returned unchanged.

    Raises:
      TypeError: if x or a statistic is not floating point, mask or `train` is not boolean, or `momentum` is traced.
      ValueError: if shapes do not fit, `momentum`, `epsilon` or `axis` is out of range, or `detach` has other names.
    """
    check_detach(detach)
    if not isinstance(train, bool | np.bool_):
        raise TypeError(f"train must be True or False, got {train!r}")
    x, epsilon, features, reduced, mask = _check(x, epsilon, axis, mask, pooled=not train or axis_name is not None)
    if isinstance(momentum, jax.core.Tracer):
        raise TypeError("momentum must be a Python number or None, got a traced value")
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be None or in [0, 1], got {momentum}")
    shape = tuple(x.shape[a] for a in features)
    for name, value in (*params._asdict().items(), ("mean", stats.mean), ("var", stats.var)):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, but x {x.shape} has features {shape} on axis {axis}")

    for name, value in (("mean", stats.mean), ("var", stats.var)):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"the running {name} must be floating point, got {value.dtype}")
    if jnp.shape(stats.count) != ():
        raise ValueError(f"count must be a scalar, got shape {jnp.shape(stats.count)}")

    scale, bias = (p if p is None else jnp.expand_dims(p, reduced) for p in params)
    if train:
        y, batch = _transform(x, scale, bias, epsilon, mask, reduced, axis_name, tuple(detach))
        stats = _update(stats, batch, momentum, debias, unbiased)
    else:
        mean, var = (jnp.expand_dims(s, reduced) for s in (stats.mean, stats.var))
        centred = x - mean
        if mask is not None:
            centred = jnp.where(mask, centred, 0)
        y = _affine(centred * reciprocal_sqrt(var + epsilon), scale, bias)
    return y.astype(x.dtype), stats


def normalize(
    x: Num[Array, "..."],
    epsilon: ArrayLike = 1e-5,
    axis: int | Sequence[int] = -1,
    mask: Bool[Array, "..."] | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> Float[jax.Array, "..."]:
    """`(x - mean) / sqrt(var + epsilon)` for each feature, by the batch's mean and biased variance.

    Its first derivative is the closed form at the top of this module, in forward and reverse mode; it
    can be differentiated again, and with respect to `epsilon` too. A feature without variance gives 0,
    with a zero derivative if epsilon is 0 as well.

    Args:
      x: [N, ..., C], or with the features on `axis`.
      epsilon: added to the variance, >= 0.
      axis: the feature axis or axes; statistics are taken over all others.
      mask: True for valid entries, broadcastable against `x`; size 1 on the feature axes.
      axis_name: name(s) of mapped axes over which the statistics are shared.

    Returns:
      Array of the shape and dtype of x; 0 where masked.

    Raises:
      TypeError: if x is not floating point, or mask is not boolean.
      ValueError: if `axis` or `epsilon` is out of range, `mask` does not broadcast, or x has no axis but features.
    """
    x, epsilon, _, reduced, mask = _check(x, epsilon, axis, mask, pooled=axis_name is not None)
    return _transform(x, None, None, epsilon, mask, reduced, axis_name)[0].astype(x.dtype)


def standardize(
    x: Num[Array, "..."],
    epsilon: ArrayLike = 1e-5,
    axis: int | Sequence[int] = -1,
    mask: Bool[Array, "..."] | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> tuple[Float[jax.Array, "..."], Float[jax.Array, "..."]]:
    """`normalize`, and 1 / sigma: the two things that the Jacobian is made of.

    Args and errors are those of `normalize`.

    Returns:
      x_hat, of the shape of x, and `1 / sqrt(var + epsilon)`, with size 1 on all but the feature axes (0 for
      a feature whose variance and epsilon are both 0, and for a batch of one). Both in at least float32.
    """
    x, epsilon, _, reduced, mask = _check(x, epsilon, axis, mask, pooled=axis_name is not None)
    x_hat, batch = _transform(x, None, None, epsilon, mask, reduced, axis_name)
    return x_hat, batch.inv_sigma


class _Standardized(NamedTuple):
    """A batch in its own units, all in at least float32; [1, C] stands for size 1 on all but the feature axes."""

    x_hat: jax.Array  # [N, ..., C], 0 where masked
    mean: jax.Array  # [1, C]
    var: jax.Array  # [1, C], biased; at most the largest number
    count: jax.Array  # [] valid entries
    inv_sigma: jax.Array  # [1, C] 1 / sqrt(var + epsilon), or 0 where the derivative of x_hat is


def _statistics(x, epsilon, mask, reduced, axis_name) -> _Standardized:
    """The two passes that the module's docstring describes."""
    x = x.astype(_statistics_dtype(x.dtype))
    epsilon = jnp.asarray(epsilon, x.dtype)
    sample = _one_sample(x, mask, reduced)
    if mask is not None:
        x = jnp.where(mask, x, 0)
    mean_of, count = _averager(x, mask, reduced)

    # First pass. Where the mean is the sample but for rounding, the sample is as good a centre, and it makes
    # a constant feature exactly 0. It is the centre, too, where the sum leaves the range of the format.
    centre = mean_of(x)
    apart = jnp.abs(centre - sample) > 2**-20 * jnp.abs(sample)
    centre = jnp.where(apart & jnp.isfinite(centre), centre, sample)
    magnitude = mean_of(jnp.abs(x))
    if axis_name is not None:
        magnitude = lax.pmax(magnitude, axis_name)
    unit = power_of_two(jnp.maximum(magnitude, jnp.sqrt(epsilon)))
    per_unit = 1 / unit  # exact

    # Second pass.
    x = (x - centre) * per_unit
    if mask is not None:
        x = jnp.where(mask, x, 0)
    mean = mean_of(x)
    var = jnp.maximum(mean_of(jnp.square(x)) - jnp.square(mean), 0)
    origin, offset = centre, mean
    if axis_name is not None:
        # All means as seen from one of the centres, then Chan's formula.
        origin = lax.pmax(jnp.where(count > 0, centre, -jnp.inf), axis_name)
        origin = jnp.where(jnp.isneginf(origin), 0, origin)
        shift = (centre - origin) * per_unit
        local_count, local_mean = count, mean + shift
        count = lax.psum(local_count, axis_name)
        mean = lax.psum(local_count * local_mean, axis_name) / jnp.maximum(count, 1)
        squares = local_count * (var + jnp.square(local_mean - mean))
        var = lax.psum(squares, axis_name) / jnp.maximum(count, 1)
        offset = mean - shift

    # Where no variance is left in these units, the feature is constant, or epsilon outweighs it by far. The
    # divisions come last: XLA computes them once, and again for every element what comes after them.
    root = jnp.sqrt(epsilon)
    none_left = var == 0  # a NaN goes on
    sigma = jnp.sqrt(var + epsilon * per_unit * per_unit)
    sigma = jnp.where(none_left, jnp.maximum(root * per_unit, 1), sigma)
    factor = 1 / sigma
    sigma = jnp.where(none_left, jnp.where(root > 0, root, jnp.inf), sigma * unit)
    inv_sigma = 1 / jnp.where(count == 1, jnp.inf, sigma)  # one sample: x_hat is 0 whatever it is
    x_hat = (x - offset) * factor
    if mask is not None:
        x_hat = jnp.where(mask, x_hat, 0)
    var = jnp.minimum(var * unit * unit, jnp.finfo(x.dtype).max)
    return _Standardized(x_hat, origin + unit * mean, var, count, inv_sigma)


def _transform(x, scale, bias, epsilon, mask, reduced, axis_name, detach=()):
    """Returns y = scale * x_hat + bias, and `_Standardized`. Scale and bias are [1, C] or None."""
    # An epsilon that is a number has no derivative for the backward pass to keep anything of.
    traced, number = (epsilon, None) if isinstance(epsilon, jax.core.Tracer) else (None, float(epsilon))
    return _differentiable(x, scale, bias, traced, mask, reduced, axis_name, number, detach)


@partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7, 8))
def _differentiable(x, scale, bias, epsilon, mask, reduced, axis_name, number, detach):
    batch = _statistics(x, number if epsilon is None else epsilon, mask, reduced, axis_name)
    return _affine(batch.x_hat, scale, bias), batch


def _affine(x_hat, scale, bias):
    if scale is not None:
        x_hat = x_hat * scale.astype(x_hat.dtype)
    if bias is not None:
        x_hat = x_hat + bias.astype(x_hat.dtype)
    return x_hat


@_differentiable.defjvp
def _differentiable_jvp(reduced, axis_name, number, detach, primals, tangents):
    x, scale, bias, epsilon, mask = primals
    dx, dscale, dbias, depsilon, _ = tangents
    # The function itself again, so that a second derivative finds this rule again.
    y, batch = _differentiable(x, scale, bias, epsilon, mask, reduced, axis_name, number, detach)
    x_hat, _, _, count, inv_sigma = batch
    dx = dx.astype(x_hat.dtype)
    if mask is not None:
        dx = jnp.where(mask, dx, 0)
    mean_of, _ = _averager(x_hat, mask, reduced, axis_name)  # counts in the precision of x_hat
    none = jnp.zeros_like(inv_sigma)
    dmean = none if "mean" in detach else mean_of(dx)
    covariance = none if "var" in detach else mean_of(x_hat * dx)  # = d(var) / (2 sigma)
    dsigma = covariance if depsilon is None else covariance + 0.5 * inv_sigma * depsilon

    # Three terms, each a [1, C] times what has N: their transpose sums the cotangent, and the cotangent times
    # x_hat, once each for the gradients to x, scale and bias alike, and keeps nothing else of the size of x.
    def tangent(slope, dscale, dbias):
        shift = -(slope * dmean)
        shift = (shift if mask is None else jnp.where(mask, shift, 0)) + dbias
        return slope * dx + x_hat * (dscale - slope * dsigma) + shift

    dx_hat = tangent(inv_sigma, 0, 0)
    slope = inv_sigma if scale is None else scale.astype(x_hat.dtype) * inv_sigma
    dy = tangent(slope, *(0 if t is None else t.astype(x_hat.dtype) for t in (dscale, dbias)))

    # 2 sigma covariance; a feature without variance has x_hat = 0 and so no covariance to scale.
    dvar = 2 * covariance * jnp.where(inv_sigma > 0, 1 / jnp.where(inv_sigma > 0, inv_sigma, 1), 0)
    dbatch = _Standardized(dx_hat, dmean, dvar, jnp.zeros_like(count), -inv_sigma * (inv_sigma * dsigma))
    return (y, batch), (dy, dbatch)


def _update(stats, batch, momentum, debias, unbiased):
    """The running statistics after one more batch."""
    mean, var, count = batch.mean, batch.var, batch.count
    if unbiased:
        var = var * (count / jnp.maximum(count - 1, 1))
    var = jnp.minimum(var, jnp.finfo(stats.var.dtype).max)
    batches = jnp.minimum(stats.count, jnp.iinfo(jnp.int32).max - 1) + 1
    t = batches.astype(stats.mean.dtype)
    if momentum is None or (debias and momentum == 1):
        weight = 1 / t
    elif debias and momentum > 0:
        weight = jnp.where(t > 1, (1 - momentum) / -jnp.expm1(t * math.log(momentum)), 1)
    else:
        weight = jnp.asarray(1 - momentum, t.dtype)

    def average(old, new, enough):
        new = new.reshape(old.shape).astype(old.dtype)
        moved = jnp.where(weight == 1, new, old + weight * (new - old))  # not what rounding leaves of the old
        return jnp.where(enough & (weight > 0), moved, old)

    updated = BatchStats(
        mean=average(stats.mean, mean, count > 0),
        var=average(stats.var, var, count > 1),
        count=jnp.where(count > 0, batches, stats.count),
    )
    return lax.stop_gradient(updated)


def _averager(x, mask, reduced, axis_name=None):
    """A function that takes the mean over the valid entries of an array like x, and their number."""
    size = math.prod(x.shape[a] for a in reduced)
    count = jnp.asarray(size, x.dtype) if mask is None else mask.sum(dtype=x.dtype)
    if axis_name is not None:
        count = lax.psum(count, axis_name)
    # A plain number where it is known, which the backward pass need not keep.
    divisor = max(size, 1) if mask is None and axis_name is None else jnp.maximum(count, 1)

    def mean_of(values):
        total = values.sum(reduced, keepdims=True)
        if axis_name is not None:
            total = lax.psum(total, axis_name)
        return total / divisor

    return mean_of, count


def _one_sample(x, mask, reduced):
    """A valid sample of each feature; 0 if there is none."""
    if mask is not None:
        sample = jnp.where(mask, x, -jnp.inf).max(reduced, keepdims=True, initial=-jnp.inf)
        return jnp.where(jnp.isneginf(sample), 0, sample)
    if x.size == 0:
        return jnp.zeros(_ones_at(x, reduced), x.dtype)
    return lax.slice(x, (0,) * x.ndim, _ones_at(x, reduced))


def power_of_two(magnitude):
    """The largest power of two that is at most `magnitude`, exactly, and its inverse a normal number."""
    info = jnp.finfo(magnitude.dtype)
    integers = jnp.dtype(f"int{info.bits}")
    exponent_bits = lax.bitcast_convert_type(magnitude, integers) & (-1 << info.nmant)
    power = lax.bitcast_convert_type(exponent_bits, magnitude.dtype)
    return jnp.clip(power, info.tiny, 1 / info.tiny)


def _statistics_dtype(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def reciprocal_sqrt(variance):
    """1 / sqrt(variance), and 0 at 0: a feature without variance has nothing to be scaled."""
    positive = variance != 0  # a NaN stays a NaN
    return jnp.where(positive, 1 / jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def _ones_at(x, axes):
    """The shape of x with size 1 on the given axes."""
    return tuple(1 if a in axes else size for a, size in enumerate(x.shape))


def _split_axes(x, axis):
    """The feature axes, as non-negative numbers in the order given, and all other axes."""
    axes = tuple(axis) if isinstance(axis, Sequence) else (operator.index(axis),)
    features = tuple(a + x.ndim if a < 0 else a for a in axes)
    if not all(0 <= a < x.ndim for a in features) or len(set(features)) != len(features):
        raise ValueError(f"axis must name distinct axes of x {x.shape}, got {axis}")
    if list(features) != sorted(features):
        raise ValueError(f"axis must be in ascending order, got {axis}")
    return features, tuple(a for a in range(x.ndim) if a not in features)


def check_epsilon(epsilon: ArrayLike) -> None:
    """Raises ValueError unless epsilon is one number, >= 0 and finite; a traced one is taken on trust."""
    if jnp.shape(epsilon) != ():
        raise ValueError(f"epsilon must be a scalar, got shape {jnp.shape(epsilon)}")
    if not isinstance(epsilon, jax.core.Tracer) and not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be >= 0 and finite, got {epsilon}")


def check_detach(detach: Sequence[str]) -> None:
    """Raises ValueError unless `detach` is a sequence of "mean" and "var"."""
    if isinstance(detach, str) or not set(detach) <= {"mean", "var"}:
        raise ValueError(f"detach must be a sequence of 'mean' and 'var', got {detach!r}")


def _check(x, epsilon, axis, mask, pooled):
    """The inputs in canonical form: x a jax array, axes split, mask with the rank of x and size 1 on the features."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point, got {x.dtype}")
    check_epsilon(epsilon)
    features, reduced = _split_axes(x, axis)
    if not reduced and not pooled:
        raise ValueError(f"x {x.shape} must have an axis besides its feature axis {axis} to take statistics over")
    if mask is not None:
        if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
            raise TypeError(f"mask must be boolean, got {jnp.result_type(mask)}")
        shape = _ones_at(x, features)
        try:
            mask = jnp.broadcast_to(mask, shape)
        except ValueError:
            raise ValueError(
                f"mask {jnp.shape(mask)} must broadcast to {shape} (size 1 where x {x.shape} has features)"
            ) from None
    return x, epsilon, features, reduced, mask
