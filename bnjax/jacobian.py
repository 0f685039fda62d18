"""The Jacobian of batch normalization in closed form: dense, its spectrum, the operator, second derivatives.

For one feature with the samples x [N], `sigma = sqrt(var + epsilon)` with the biased variance, and
`x_hat = (x - mean) / sigma`, in training mode

    J = dy / dx = (scale / sigma) (I - 1 1^T / N - x_hat x_hat^T / N)

(Ioffe & Szegedy 2015, section 3, rearranged). It is symmetric, so the forward and the reverse derivative
are one operator, and its eigenvectors are known:

    1        eigenvalue 0: adding a constant to all samples changes nothing
    x_hat    (scale / sigma) epsilon / (var + epsilon): nor does scaling them, up to epsilon
    others   scale / sigma, N - 2 times

Features do not mix: each has a Jacobian of its own. With a mask, N is the number of valid samples, I and 1
are restricted to them, and each masked sample adds an eigenvalue 0. In evaluation mode J is the diagonal
scale / sqrt(running var + epsilon).

`matvec` is J as an operator, `hvp` its derivative; `block` is the Jacobian of a layer activation(BN(x W)).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Num

from bnjax import batch_norm
from bnjax.types import Array, BatchNormParams


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
    mask = _check(x, mask, scale, dx=dx)
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
    mask = _check(x, mask, scale)
    x_hat, valid, count, factor, _ = _parts(x, scale, epsilon, mask)
    return _matrix(x_hat, valid, count, factor)


def _matrix(x_hat, valid, count, factor):
    """J [C, N, N] from its `_parts`."""
    outer = jnp.einsum("ic,jc->cij", x_hat, x_hat, precision="highest")
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
    mask = _check(x, mask, scale)
    _, valid, _, factor, shrink = _parts(x, scale, epsilon, mask)
    zeros = len(x) - valid.sum() + 1  # the constant vector, and every masked sample
    k = jnp.arange(len(x))
    factor, shrink = factor[:, None], shrink[:, None]
    by_size = jnp.where(k < zeros, 0, jnp.where(k == zeros, factor * shrink, factor))
    return jnp.where(factor < 0, by_size[:, ::-1], by_size)


def parameters(
    x: Num[Array, "n c"], epsilon: ArrayLike = 1e-5, mask: Bool[Array, "n 1"] | None = None
) -> BatchNormParams:
    """The derivatives of y with respect to batch normalization's own parameters, in training mode.

        dy[i, c] / dscale[c] = x_hat[i, c]                  dy[i, c] / dbias[c] = 1

    and 0 across features. (Evaluation mode has the same with x_hat taken from the running statistics.)

    Args:
      x: the batch, [N, C].
      epsilon: added to the variance, >= 0.
      mask: True for valid samples, [N, 1]. A masked sample's y is the bias: its derivatives are 0 and 1.

    Returns:
      `BatchNormParams` with two arrays [N, C].

    Raises:
      TypeError: if x is not floating point.
      ValueError: if x has not two axes, or epsilon or mask do not fit.
    """
    mask = _check(x, mask)
    x_hat, _ = batch_norm.standardize(x, epsilon, mask=mask)
    return BatchNormParams(scale=x_hat, bias=jnp.ones_like(x_hat))


def evaluation(scale: Num[Array, " c"], var: Num[Array, " c"], epsilon: ArrayLike = 1e-5) -> Float[jax.Array, " c"]:
    """The Jacobian in evaluation mode, `scale / sqrt(var + epsilon)`: every sample has it on the diagonal.

    Args:
      scale: batch normalization's, [C].
      var: the running variance, [C].
      epsilon: added to the variance, >= 0.

    Returns:
      [C], `dy[i, c] / dx[i, c]` for each valid i; all other derivatives are 0. It is 0 for a feature whose var
      and epsilon are both 0, as in `batch_norm.apply`.

    Raises:
      ValueError: if scale and var have not the same one axis, or epsilon is out of range.
    """
    if var.ndim != 1 or scale.shape != var.shape:
        raise ValueError(f"scale and var must be [C], got {scale.shape} and {var.shape}")
    batch_norm.check_epsilon(epsilon)
    return scale * batch_norm.reciprocal_sqrt(var + epsilon)


def hvp(
    x: Num[Array, "n c"],
    cotangent: Num[Array, "n c"],
    dx: Num[Array, "n c"],
    epsilon: ArrayLike = 1e-5,
    mask: Bool[Array, "n 1"] | None = None,
) -> Float[jax.Array, "n c"]:
    """The Hessian of `<cotangent, normalize(x)>` times dx, without forming it: O(N C) time and memory.

    With m(u) the mean over the samples, a = cotangent and the operator J at scale 1, the derivative of J a
    along dx is

        H dx = -(1 / sigma) (m(x_hat dx) J a + m(x_hat a) J dx + m(a J dx) x_hat)

    (differentiate J a = (a - m(a) - x_hat m(x_hat a)) / sigma, with d x_hat = J dx and
    d(1 / sigma) = -m(x_hat dx) / sigma^2). It is symmetric in a and dx. The Hessian of a whole loss
    L(normalize(x)) is this at `cotangent = dL/dx_hat`, plus J L'' J dx.

    Args:
      x: the batch, [N, C].
      cotangent: the weights of the outputs, [N, C].
      dx: a tangent to x, [N, C].
      epsilon: added to the variance, >= 0.
      mask: True for valid samples, [N, 1].

    Returns:
      [N, C]; 0 where masked.

    Raises:
      TypeError: if x is not floating point.
      ValueError: if an array has not two axes, or epsilon or mask do not fit.
    """
    mask = _check(x, mask, cotangent=cotangent, dx=dx)
    x_hat, valid, count, inv_sigma, _ = _parts(x, 1.0, epsilon, mask)
    valid = valid[:, None] > 0
    a, dx = (jnp.where(valid, u, 0).astype(x_hat.dtype) for u in (cotangent, dx))

    def m(u):
        return u.sum(0) / count

    def J(u):
        return inv_sigma * jnp.where(valid, u - m(u) - x_hat * m(x_hat * u), 0)

    return -inv_sigma * (m(x_hat * dx) * J(a) + m(x_hat * a) * J(dx) + m(a * J(dx)) * x_hat)


class BlockJacobian(NamedTuple):
    """The derivatives of h = activation(BN(x W)), h [N, F], x [N, D], W [D, F]."""

    x: jax.Array  # [N, F, N, D]: dh[i, f] / dx[j, d]
    kernel: jax.Array  # [N, F, D]: dh[i, f] / dW[d, f]; it is 0 for the other columns of W


def block(
    x: Num[Array, "n d"],
    kernel: Num[Array, "d f"],
    scale: Num[Array, " f"] | float = 1.0,
    bias: Num[Array, " f"] | float = 0.0,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    epsilon: ArrayLike = 1e-5,
    mask: Bool[Array, "n 1"] | None = None,
) -> BlockJacobian:
    """The Jacobian of a layer h = phi(BN(x W)) in training mode, from its features' J_f.

        dh[i, f] / dx[j, d] = phi'(y[i, f]) J_f[i, j] W[d, f]
        dh[i, f] / dW[d, f] = phi'(y[i, f]) (J_f x)[i, d]

    with y = BN(x W). W scaled by a > 0 scales J_f by 1 / a at epsilon 0: the first is unchanged, the second
    divided by a. That is why a gradient passes through layers with large weights as through small ones.

    Args:
      x: the batch, [N, D].
      kernel: W, [D, F].
      scale: batch normalization's, [F] or one for all.
      bias: batch normalization's, [F] or one for all.
      activation: phi, elementwise and differentiable by JAX.
      epsilon: added to the variance, >= 0.
      mask: True for valid samples, [N, 1]. A masked sample's h is the constant phi(bias).

    Returns:
      `BlockJacobian`.

    Raises:
      TypeError: if x W is not floating point.
      ValueError: if x or kernel has not two axes, or epsilon or mask do not fit.
    """
    mask = _check(x, mask)
    if kernel.ndim != 2 or len(kernel) != x.shape[1]:
        raise ValueError(f"kernel must be [D, F], D = {x.shape[1]} as in x {x.shape}, got {kernel.shape}")
    _check_features(kernel.shape[1], scale=scale, bias=bias)
    valid = jnp.ones((len(x), 1), bool) if mask is None else mask
    x = jnp.where(valid, x, 0)
    # Centred first: BN(x W) stays as it is, and so do the digits of x far from zero.
    x = jnp.where(valid, x - x.sum(0) / jnp.maximum(valid.sum(), 1), 0)
    z = jnp.matmul(x, kernel, precision="highest")
    x_hat, valid, count, factor, _ = _parts(z, scale, epsilon, mask)
    slope = jax.vmap(jax.vmap(jax.grad(activation)))(scale * x_hat + bias)  # [N, F]
    to_x = jnp.einsum("if,fij,df->ifjd", slope, _matrix(x_hat, valid, count, factor), kernel, precision="highest")
    centred = valid[:, None] * (x - x.sum(0) / count)  # again: what rounding left
    covariance = jnp.matmul(x_hat.T, x, precision="highest") / count  # [F, D]
    to_kernel = factor[:, None] * (centred[:, None] - x_hat[:, :, None] * covariance)
    return BlockJacobian(to_x, slope[:, :, None] * to_kernel)


def _parts(x, scale, epsilon, mask):
    """x_hat [N, C], validity [N] as 0 or 1, their number, scale / sigma [C], epsilon / (var + epsilon) [C]."""
    x_hat, inv_sigma = batch_norm.standardize(x, epsilon, mask=mask)
    valid = jnp.ones(len(x), x_hat.dtype) if mask is None else mask[:, 0].astype(x_hat.dtype)
    inv_sigma = inv_sigma[0]
    return (x_hat, valid, jnp.maximum(valid.sum(), 1), scale * inv_sigma, jnp.square(jnp.sqrt(epsilon) * inv_sigma))


def _check(x, mask=None, scale=1.0, **others):
    """Raises for what does not fit x [N, C], and returns the mask as [N, 1]. `others` are to be like x."""
    if x.ndim != 2:
        raise ValueError(f"x must be [N, C], got {x.shape}")
    for name, value in others.items():
        if value.shape != x.shape:
            raise ValueError(f"{name} has shape {value.shape}, but x {x.shape}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {value.dtype}")
    _check_features(x.shape[1], scale=scale)
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape not in ((len(x), 1), (1, 1)):
        raise ValueError(f"mask {mask.shape} must be [N, 1] for x {x.shape}")
    return jnp.broadcast_to(mask, (len(x), 1))


def _check_features(num_features, **values):
    """Raises for what is neither one number nor one for each feature."""
    for name, value in values.items():
        if jnp.shape(value) not in ((), (num_features,)):
            raise ValueError(f"{name} must be a scalar or [{num_features}], got shape {jnp.shape(value)}")
