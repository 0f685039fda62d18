"""The Jacobian of training-mode batch normalization in closed form: dense, its spectrum, the operator.

For one feature with the samples x [N], `sigma = sqrt(var + epsilon)` with the biased variance, and
`x_hat = (x - mean) / sigma`,

    J = dy / dx = (scale / sigma) (I - 1 1^T / N - x_hat x_hat^T / N)

(Ioffe & Szegedy 2015, section 3, rearranged). It is symmetric, so the forward and the reverse derivative
are one operator, and its eigenvectors are known:

    1        eigenvalue 0: adding a constant to all samples changes nothing
    x_hat    (scale / sigma) epsilon / (var + epsilon): nor does scaling them, up to epsilon
    others   scale / sigma, N - 2 times

Features do not mix: each has a Jacobian of its own. With a mask, N is the number of valid samples, I and 1
are restricted to them, and each masked sample adds an eigenvalue 0.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Num

from bnjax import batch_norm
from bnjax.types import Array


def matvec(
    x: Num[Array, "n c"],
    scale: Num[Array, " c"] | float,
    dx: Num[Array, "n c"],
    epsilon: ArrayLike = 1e-5,
    mask: Bool[Array, "n 1"] | None = None,
) -> Float[jax.Array, "n c"]:
    """J dx for every feature, without forming J: O(N C) time and memory. J being symmetric, also the VJP.

    Args:
      x: the batch, [N, C].
      scale: batch normalization's, [C] or one for all.
      dx: a tangent to x, or a cotangent to y, [N, C].
      epsilon: added to the variance, >= 0.
      mask: True for valid samples, [N, 1].

    Returns:
      [N, C], y-units per x-unit times dx.

    Raises:
      TypeError: if x is not floating point.
      ValueError: if x has not two axes, or epsilon or mask do not fit.
    """
    _check(x, dx)
    _, tangent = jax.jvp(lambda x: batch_norm.normalize(x, epsilon, mask=mask), (x,), (dx,))
    return scale * tangent


def dense(
    x: Num[Array, "n c"],
    scale: Num[Array, " c"] | float = 1.0,
    epsilon: ArrayLike = 1e-5,
    mask: Bool[Array, "n 1"] | None = None,
) -> Float[jax.Array, "c n n"]:
    """J for every feature, [C, N, N], symmetric: `J[c, i, j] = dy[i, c] / dx[j, c]`.

    Args:
      x: the batch, [N, C].
      scale: batch normalization's, [C] or one for all.
      epsilon: added to the variance, >= 0.
      mask: True for valid samples, [N, 1].

    Raises:
      TypeError: if x is not floating point.
      ValueError: if x has not two axes, or epsilon or mask do not fit.
    """
    _check(x)
    x_hat, valid, count, factor, _ = _parts(x, scale, epsilon, mask)
    outer = jnp.einsum("ic,jc->cij", x_hat, x_hat)
    projector = jnp.diag(valid) - (valid[:, None] * valid[None, :] + outer) / count
    return factor[:, None, None] * projector


def spectrum(
    x: Num[Array, "n c"],
    scale: Num[Array, " c"] | float = 1.0,
    epsilon: ArrayLike = 1e-5,
    mask: Bool[Array, "n 1"] | None = None,
) -> Float[jax.Array, "c n"]:
    """The eigenvalues of J for every feature, [C, N], ascending.

    Args:
      x: the batch, [N, C].
      scale: batch normalization's, [C] or one for all.
      epsilon: added to the variance, >= 0.
      mask: True for valid samples, [N, 1].

    Raises:
      TypeError: if x is not floating point.
      ValueError: if x has not two axes, or epsilon or mask do not fit.
    """
    _check(x)
    _, valid, _, factor, shrink = _parts(x, scale, epsilon, mask)
    zeros = len(x) - valid.sum() + 1  # the constant vector, and every masked sample
    k = jnp.arange(len(x))
    factor, shrink = factor[:, None], shrink[:, None]
    by_size = jnp.where(k < zeros, 0, jnp.where(k == zeros, factor * shrink, factor))
    return jnp.where(factor < 0, by_size[:, ::-1], by_size)


def _parts(x, scale, epsilon, mask):
    """x_hat [N, C], validity [N] as 0 or 1, their number, scale / sigma [C], epsilon / (var + epsilon) [C]."""
    x_hat, inv_sigma = batch_norm.standardize(x, epsilon, mask=mask)
    valid = jnp.ones(len(x), x_hat.dtype) if mask is None else mask[:, 0].astype(x_hat.dtype)
    inv_sigma = inv_sigma[0]
    return x_hat, valid, jnp.maximum(valid.sum(), 1), scale * inv_sigma, epsilon * inv_sigma**2


def _check(*arrays):
    for x in arrays:
        if x.ndim != 2:
            raise ValueError(f"x and dx must be [N, C], got {x.shape}")
