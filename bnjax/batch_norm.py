"""Batch normalization as pure functions, with its derivative in closed form.

One feature, N samples, `sigma = sqrt(var + epsilon)` with the batch's biased variance:

    x_hat = (x - mean) / sigma                              y = scale * x_hat + bias
    d x_hat / d x = (I - 1 1^T / N - x_hat x_hat^T / N) / sigma

The Jacobian (Ioffe & Szegedy 2015, section 3, rearranged) is symmetric, so the forward and the
reverse derivative are the same operator. `normalize` therefore needs ONE `jax.custom_jvp` rule that
is linear in the tangent: forward mode uses it as it is, reverse mode transposes it, `vmap` batches it,
and second derivatives differentiate it again. What reverse mode keeps from the forward pass is
`x_hat` and `1 / sigma`.

The variance is taken from differences to one of the samples, in two passes: E[x^2] - E[x]^2 has no
correct digit left in float32 once mean / std passes about 3e3, differences stay right at 1e6.

Other libraries differ in conventions: `momentum` here is the weight of the OLD running value (Flax,
Keras, Haiku); PyTorch's is the weight of the new one. The running variance is the average of biased
batch variances (Flax, Keras); PyTorch stores unbiased ones.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Num

from bnjax.types import Array, BatchNormParams, BatchStats


def init(num_features: int, dtype=jnp.float32) -> tuple[BatchNormParams, BatchStats]:
    """Scale 1, bias 0, running mean 0 and variance 1: the identity, up to epsilon.

    Args:
      num_features: C, at least 1.
      dtype: of the parameters and statistics (the count of batches is int32).

    Returns:
      `BatchNormParams` with arrays [C], and `BatchStats` with arrays [C], [C] and [].

    Raises:
      ValueError: if `num_features` is below 1.
    """
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, got {num_features}")
    zeros, ones = jnp.zeros(num_features, dtype), jnp.ones(num_features, dtype)
    return BatchNormParams(scale=ones, bias=zeros), BatchStats(mean=zeros, var=ones, count=jnp.int32(0))


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
) -> tuple[Float[jax.Array, "..."], BatchStats]:
    """Normalizes a batch; in training by its own statistics, in evaluation by the running ones.

    training:    y = scale * (x - batch mean) / sqrt(batch var + epsilon) + bias
                 running <- running + w * (batch - running)
    evaluation:  y = scale * (x - running mean) / sqrt(running var + epsilon) + bias

    The weight w of the t-th batch is `1 - momentum`; with `debias` it is
    `(1 - momentum) / (1 - momentum^t)`, which leaves no trace of the initial mean 0 and variance 1
    (the bias correction of Adam, Kingma & Ba 2015, applied as the average is taken); with
    `momentum=None` it is 1 / t, the plain average over all batches.

    Args:
      params: scale and bias, [C].
      stats: running mean and variance [C], count []. No gradient flows
        through the returned ones.
      x: [N, ..., C], or with the features on `axis`.
      train: Python bool.
      momentum: weight of the old running value, in [0, 1], or None. Not the optimizer's momentum.
      epsilon: added to the variance, >= 0.
      axis: the feature axis (or axes; then the shape of params and stats is theirs).
      mask: True for valid entries; broadcasts against `x`, with size 1 on the feature axes. Masked
        entries influence nothing; their output is the bias.
      axis_name: name(s) of mapped axes over which batch statistics are shared.
      debias: see above; no effect on evaluation, since the stored value is already unbiased.

    Returns:
      y, of the shape and dtype of x, and the updated statistics. A batch without a valid entry
      leaves the statistics as they were. In evaluation they are returned unchanged.

    Raises:
      TypeError: if x is not floating point.
      ValueError: if shapes do not fit, or `momentum`, `epsilon` or `axis` is out of range.
    """
    x, epsilon, features, reduced, mask = _check(x, epsilon, axis, mask)
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be None or in [0, 1], got {momentum}")
    shape = tuple(x.shape[a] for a in features)
    for name, value in (*params._asdict().items(), ("mean", stats.mean), ("var", stats.var)):
        if value.shape != shape:
            raise ValueError(
                f"{name} has shape {value.shape}, but x {x.shape} has features {shape} on axis {axis}"
            )
    scale, bias = (jnp.expand_dims(p, reduced) for p in params)

    if train:
        x_hat, mean, var, count, _ = _standardize(x, epsilon, mask, reduced, axis_name)
        stats = _update(stats, mean, var, count, momentum, debias)
    else:
        mean, var = (jnp.expand_dims(s, reduced) for s in (stats.mean, stats.var))
        x_hat = (x - mean) * _reciprocal_sqrt(var + epsilon)
        if mask is not None:
            x_hat = jnp.where(mask, x_hat, 0)
    return (x_hat * scale + bias).astype(x.dtype), stats


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
      TypeError: if x is not floating point.
      ValueError: if `axis` or `epsilon` is out of range or `mask` does not broadcast.
    """
    x, epsilon, _, reduced, mask = _check(x, epsilon, axis, mask)
    return _standardize(x, epsilon, mask, reduced, axis_name)[0].astype(x.dtype)


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
      a feature whose variance and epsilon are both 0). Both in at least float32.
    """
    x, epsilon, _, reduced, mask = _check(x, epsilon, axis, mask)
    x_hat, _, _, _, inv_sigma = _standardize(x, epsilon, mask, reduced, axis_name)
    return x_hat, inv_sigma


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _standardize(x, epsilon, mask, reduced, axis_name):
    """Returns x_hat, mean, var, the number of valid entries, and 1 / sigma, in at least float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    shift = _one_sample(x, mask, reduced, axis_name)
    mean_of, count = _averager(x, mask, reduced, axis_name)
    x = x - shift
    if mask is not None:
        x = jnp.where(mask, x, 0)
    mean = mean_of(x)
    centred = x - mean
    if mask is not None:
        centred = jnp.where(mask, centred, 0)
    var = mean_of(jnp.square(centred))
    inv_sigma = _reciprocal_sqrt(var + epsilon)
    return centred * inv_sigma, shift + mean, var, count, inv_sigma


@_standardize.defjvp
def _standardize_jvp(reduced, axis_name, primals, tangents):
    x, epsilon, mask = primals
    dx, depsilon, _ = tangents
    # `_standardize` again, so that a second derivative finds this rule again.
    x_hat, mean, var, count, inv_sigma = _standardize(x, epsilon, mask, reduced, axis_name)
    dx = dx.astype(x_hat.dtype)
    if mask is not None:
        dx = jnp.where(mask, dx, 0)
    mean_of, _ = _averager(x_hat, mask, reduced, axis_name)  # counts in the precision of x_hat
    dmean = mean_of(dx)
    covariance = mean_of(x_hat * dx)  # = d(var) / (2 sigma)
    dlog_sigma = inv_sigma * (covariance + 0.5 * inv_sigma * depsilon)
    dx_hat = inv_sigma * (dx - dmean) - x_hat * dlog_sigma
    if mask is not None:
        dx_hat = jnp.where(mask, dx_hat, 0)
    # 2 sigma covariance; a feature without variance has x_hat = 0 and so no covariance to scale.
    dvar = 2 * covariance * jnp.where(inv_sigma > 0, 1 / jnp.where(inv_sigma > 0, inv_sigma, 1), 0)
    tangents_out = (dx_hat, dmean, dvar, jnp.zeros_like(count), -inv_sigma * dlog_sigma)
    return (x_hat, mean, var, count, inv_sigma), tangents_out


def _update(stats, mean, var, count, momentum, debias):
    """The running statistics after one more batch."""
    mean, var = (s.reshape(r.shape).astype(r.dtype) for s, r in ((mean, stats.mean), (var, stats.var)))
    batches = stats.count + 1
    t = batches.astype(mean.dtype)
    if momentum is None or (debias and momentum == 1):
        weight = 1 / t
    elif debias and momentum > 0:
        weight = (1 - momentum) / -jnp.expm1(t * math.log(momentum))
    else:
        weight = 1 - momentum
    updated = BatchStats(
        mean=stats.mean + weight * (mean - stats.mean),
        var=stats.var + weight * (var - stats.var),
        count=batches,
    )
    updated = jax.tree.map(lambda new, old: jnp.where(count > 0, new, old), updated, stats)
    return lax.stop_gradient(updated)


def _averager(x, mask, reduced, axis_name):
    """A function that takes the mean over the valid entries of an array like x, and their number."""
    size = math.prod(x.shape[a] for a in reduced)
    count = jnp.asarray(size, x.dtype) if mask is None else mask.sum(dtype=x.dtype)
    if axis_name is not None:
        count = lax.psum(count, axis_name)

    def mean_of(values):
        total = values.sum(reduced, keepdims=True)
        if axis_name is not None:
            total = lax.psum(total, axis_name)
        return total / jnp.maximum(count, 1)

    return mean_of, count


def _one_sample(x, mask, reduced, axis_name):
    """A valid sample of each feature, the same on every device: the origin that differences are taken to."""
    if x.size == 0:
        sample = jnp.full(_ones_at(x, reduced), -jnp.inf, x.dtype)
    elif mask is None:
        sample = lax.slice(x, (0,) * x.ndim, _ones_at(x, reduced))
    else:
        sample = jnp.where(mask, x, -jnp.inf).max(reduced, keepdims=True)
    if axis_name is not None:
        sample = lax.pmax(sample, axis_name)
    return jnp.where(jnp.isneginf(sample), 0, sample)


def _reciprocal_sqrt(variance):
    """1 / sqrt(variance), and 0 at 0: a feature without variance has nothing to be scaled."""
    positive = variance != 0  # a NaN stays a NaN
    return jnp.where(positive, 1 / jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def _ones_at(x, axes):
    """The shape of x with size 1 on the given axes."""
    return tuple(1 if a in axes else size for a, size in enumerate(x.shape))


def _split_axes(x, axis):
    """The feature axes, as non-negative numbers in the order given, and all other axes."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    features = tuple(a + x.ndim if a < 0 else a for a in axes)
    if not all(0 <= a < x.ndim for a in features) or len(set(features)) != len(features):
        raise ValueError(f"axis must name distinct axes of x {x.shape}, got {axis}")
    if list(features) != sorted(features):
        raise ValueError(f"axis must be in ascending order, got {axis}")
    return features, tuple(a for a in range(x.ndim) if a not in features)


def _check(x, epsilon, axis, mask):
    """The inputs in canonical form: x a jax array, axes split, mask with the rank of x and size 1 on the features."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if not isinstance(epsilon, jax.core.Tracer) and not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be >= 0 and finite, got {epsilon}")
    features, reduced = _split_axes(x, axis)
    if mask is not None:
        shape = _ones_at(x, features)
        try:
            mask = jnp.broadcast_to(mask, shape)
        except ValueError:
            raise ValueError(
                f"mask {jnp.shape(mask)} must broadcast to {shape}, x being {x.shape} with features on {axis}"
            ) from None
    epsilon = jnp.asarray(epsilon, jnp.promote_types(x.dtype, jnp.float32))
    return x, epsilon, features, reduced, mask
