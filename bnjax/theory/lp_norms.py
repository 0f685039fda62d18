"""Growth of the squared gradient norm per layer for batch normalization by an l_p spread.

The network is `bnjax.theory.norm_growth`'s. The norms (Hoffer et al. 2018, "Norm matters"; Santurkar et al. 2018, who
divide by the norm before the mean is removed) divide the centred h by a spread over the batch of B,

    S = mean|h| / sqrt(2 / pi),   sqrt(mean h^2),   max|h| / E[max of B |z|]   for p = 1, 2, infinity,

1 for Gaussian h (for p = infinity: h not centred). J = (G - y u^T) / S, G = I - 1 1^T / B, u = the gradient of S, and

    growth = B / (B - 3) E[tr(J^T M J)] / ((B - 1) spread),   M = D G D,   spread = E[(psi(y_a) - psi(y_b))^2] / 2,

    tr(J^T M J) = (tr(M G) - 2 y^T M u + u^T u y^T M y) / S^2 at mean h^2 = 1, uniform on the sphere orthogonal to 1.

p = 2 is batch normalization. The others' expectations over whole batches are sampled, with batch normalization's
as control variates, which are known. p = 1 in an infinite batch is batch normalization's.
"""

import math
from numbers import Real
from typing import NamedTuple

import numpy as np

from bnjax import choices
from bnjax.theory import quadrature
from bnjax.theory.quadrature import Activation

LARGEST_BATCH = 4096  # that is sampled
_SAMPLED = 2**21  # pre-activations


class Layer(NamedTuple):
    """A layer of a deep network with a norm of the activations."""

    variance: float  # of the next layer's h, as the norm sees it, at weight_std 1: E[psi^2], or spread
    second_moment: float  # of the next layer's h, the mean over the batch included: E[psi^2]
    growth: float  # of the squared gradient norm
    error: float = 0.0  # standard error of growth, where it is sampled


def gaussian_spread(p: Real, batch_size: Real | None = None) -> float:
    """The constant that makes an l_p spread 1 for a Gaussian: sqrt(2 / pi), 1, or E[max of B |z|], z ~ N(0, 1).

    Args:
      p: 1, 2 or infinity.
      batch_size: B, which p = infinity needs.

    Raises:
      ValueError: for another p, or for p = infinity without a batch size.
    """
    if p not in (1, 2, math.inf):
        raise ValueError(f"p must be 1, 2 or inf, got {p}")
    if p < math.inf:
        return math.sqrt(2 / math.pi) if p == 1 else 1.0
    if batch_size is None:
        raise ValueError("norm 'linf' needs a batch_size: in an infinite batch its spread is infinite")
    choices.check_count("batch_size", batch_size)
    z, weights = quadrature.panels(np.linspace(0, quadrature.CUT, 25), 24)
    below = np.array([math.erf(value / math.sqrt(2)) for value in z])
    return float((1 - below**batch_size) @ weights)


def lp(
    activation: Activation, p: Real, batch_size: Real | None = None, *, scale: Real = 1.0, bias: Real = 0.0
) -> Layer:
    """Batch normalization by an l_p spread (module docstring).

    Args:
      activation: phi, a name or an elementwise JAX function.
      p: 1, 2 or infinity.
      batch_size: B, at least 4, and at most 4,096 unless p = 2. None: infinite, but for p = infinity.
      scale: the norm's; 1 / `gaussian_spread` for a spread without that constant.
      bias: the norm's.

    Returns:
      `Layer`. growth has the standard error `error`, below 0.2%; the sample is always the same. It is exact, its error
      0, for p = 2 and infinite batches.

    Raises:
      ValueError: as `growth`.
    """
    gaussian_spread(p, batch_size)
    B = None
    if batch_size is not None:
        choices.check_count("batch_size", batch_size)
        B = int(batch_size)
        largest = 2**31 if p == 2 else LARGEST_BATCH
        if not 4 <= B <= largest:
            raise ValueError(f"batch_size must be from 4 to {largest}, got {batch_size}")
    return _layer(activation, float(p), B, float(scale), float(bias))


@quadrature.kept
def _layer(activation, p, B, scale, bias):
    psi = quadrature.on_batch(activation, B, scale, bias)
    spread, slope = (float(value[0]) for value in quadrature.moments(psi, B, np.ones(1)))
    if B is not None and p != 2:
        return _sampled(psi, p, B, spread, slope)
    if B is None:
        square = quadrature.expect(psi, 1.0, lambda u, value, slope: value**2)
    else:
        square = quadrature.expect_on_sphere(psi, B - 1, lambda y, value, slope: value**2)
    return Layer(spread, float(square), (1 if B is None else B / (B - 3)) * slope / spread)


def _sampled(psi, p, B, spread, slope):
    """`Layer` from sampled batches; `spread` and `slope` are batch normalization's, known."""
    h = np.random.default_rng(0).normal(size=(_SAMPLED // B, B))
    h -= h.mean(1, keepdims=True)
    h /= np.sqrt((h**2).mean(1, keepdims=True))
    unit = gaussian_spread(p, B)
    if p == 1:
        S, u = np.abs(h).mean(1, keepdims=True) / unit, np.sign(h) / (B * unit)
    else:
        largest = np.abs(h).argmax(1)[:, None]
        value = np.take_along_axis(h, largest, 1)
        S, u = np.abs(value) / unit, np.zeros_like(h)
        np.put_along_axis(u, largest, np.sign(value) / unit, 1)
    u -= u.mean(1, keepdims=True)
    *found, squares = _layer_of_batches(psi, h / S, u, S[:, 0])
    found = np.stack(found)  # [2, N]
    known = np.stack(_layer_of_batches(psi, h, h / B, np.ones(len(h)))[:2])
    off = known - np.array([[spread], [slope]])
    off = off[off.std(1) > 1e-6 * known.mean(1)]  # linear: constants
    centred = off - off.mean(1, keepdims=True)
    coefficients = np.linalg.lstsq(centred.T, (found - found.mean(1, keepdims=True)).T, rcond=None)[0]
    found = found - coefficients.T @ off
    variance, through = found.mean(1)
    residual = found[1] / through - found[0] / variance
    growth = B / (B - 3) * through / variance
    error = growth * residual.std() / math.sqrt(len(h))
    return Layer(float(variance), float(squares.mean()), float(growth), float(error))


def _layer_of_batches(psi, y, u, S):
    """Var psi(y), tr(J^T M J) / (B - 1) and the mean of psi(y)^2, [N] each, of batches y [N, B]."""
    B = y.shape[1]
    value, d = quadrature.evaluate(psi, y)
    trace = (1 - 2 / B) * (d**2).sum(1) + d.sum(1) ** 2 / B**2
    dy, du = d * y, d * u
    yMu = (dy * du).sum(1) - dy.sum(1) * du.sum(1) / B
    yMy = (dy**2).sum(1) - dy.sum(1) ** 2 / B
    through = (trace - 2 * yMu + (u**2).sum(1) * yMy) / S**2 / (B - 1)
    return value.var(1, ddof=1), through, (value**2).mean(1)
