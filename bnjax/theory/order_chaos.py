"""Mean-field theory of deep networks without normalization: ordered, critical or chaotic."""

import math
from numbers import Real
from typing import NamedTuple

import numpy as np

from bnjax import choices
from bnjax.theory import quadrature
from bnjax.theory.depth import depth_scale


class OrderChaos(NamedTuple):
    """The mean-field limit of a deep network without normalization."""

    variance: float  # q*, of a pre-activation; 0 or infinite if signals die out or blow up
    chi_1: float  # growth per layer of the squared gradient norm
    correlation: float  # c*, of two inputs in the deep limit
    chi_c: float  # slope of the correlation's recursion at c*
    xi_q: float  # layers per e-fold of the approach to q*
    xi_c: float  # of the approach to c*
    xi_grad: float  # of the squared gradient norm
    phase: str  # "ordered" (chi_1 < 1), "critical" or "chaotic" (chi_1 > 1)


def order_chaos(activation: quadrature.Activation, weight_std: Real, bias_std: Real = 0.0) -> OrderChaos:
    """A deep network without normalization, z = W phi(z_below) + b: ordered, critical or chaotic.

    u and w standard normal, u_2 = c u + sqrt(1 - c^2) w; Poole et al. 2016, Schoenholz et al. 2017:

        q*    = weight_std^2 E[phi(sqrt(q*) u)^2] + bias_std^2        reached from q = weight_std^2 + bias_std^2
        chi_1 = weight_std^2 E[phi'(sqrt(q*) u)^2]
        c*    = (weight_std^2 E[phi(sqrt(q*) u) phi(sqrt(q*) u_2)] + bias_std^2) / q*
        chi_c = weight_std^2 E[phi'(sqrt(q*) u) phi'(sqrt(q*) u_2)] at c*
        xi_grad = 1 / |ln chi_1|,   xi_c = 1 / |ln chi_c|,   xi_q = 1 / |ln dq'/dq|

    The correlation's recursion is convex on [0, 1] with the fixed point c = 1, which is stable if its slope there,
    chi_1 at a finite q*, is at most 1; else c* is the fixed point below 1. Where signals die out or blow up (q* = 0 or
    infinite) all is the limit, and chi_c the slope of the recursion of c, whose q grows by a factor in each layer:
    chi_1 over that factor.

    Args:
      activation: phi, a name or an elementwise JAX function.
      weight_std: sigma_w, the standard deviation of the weights times sqrt(fan_in), above 0.
      bias_std: sigma_b, the standard deviation of the biases, at least 0.

    Returns:
      `OrderChaos`. A depth scale is infinite where the approach is slower than exponential. correlation is NaN
      where every correlation is kept: phi linear, or linear at the small signals that are left, without biases.

    Raises:
      ValueError: as `bnjax.theory.mean_field.gradient_growth`.
    """
    choices.check_positive("weight_std", weight_std)
    if not 0 <= bias_std < math.inf:
        raise ValueError(f"bias_std must be >= 0 and finite, got {bias_std}")
    phi = quadrature.function(activation)
    weight_var, bias_var = float(weight_std) ** 2, float(bias_std) ** 2
    variance, q, growth_of_q = length_fixed_point(phi, weight_var, bias_var)
    phi = quadrature.with_breaks(phi, quadrature.CUT * math.sqrt(max(q, 1.0)))
    next_q = weight_var * float(quadrature.expect(phi, q, lambda u, p, d: p * p)) + bias_var
    chi_1 = weight_var * float(quadrature.expect(phi, q, lambda u, p, d: d * d))

    if math.isinf(variance):
        earlier = weight_var * float(quadrature.expect(phi, q / 100, lambda u, p, d: d * d))
        if abs(chi_1 - earlier) > 0.01 * chi_1:
            raise ValueError("the activation makes signals blow up faster than exponentially: there is no deep limit")

    def correlate(c):
        product, slopes = quadrature.converge(lambda n: _correlated(phi, q, c, n))
        return float(weight_var * product + bias_var) / next_q, float(weight_var * slopes * q / next_q)

    at_1 = chi_1 * q / next_q
    near = 1e-6
    if abs(at_1 - 1) < near and abs(correlate(0.5)[0] - 0.5) < near:
        correlation, chi_c = math.nan, 1.0
    elif at_1 <= 1 + near:
        correlation, chi_c = 1.0, at_1
    else:
        low, high = 0.0, 1.0 if abs(correlate(0.0)[0]) > 1e-12 else 0.0
        while high - low > 1e-12:
            middle = (low + high) / 2
            low, high = (middle, high) if correlate(middle)[0] > middle else (low, middle)
        correlation, chi_c = low, correlate(low)[1]
    phase = "critical" if abs(chi_1 - 1) < near else "ordered" if chi_1 < 1 else "chaotic"
    scales = (depth_scale(rate) if rate > 0 else 0.0 for rate in (growth_of_q, chi_c, chi_1))
    return OrderChaos(variance, chi_1, correlation, chi_c, *scales, phase)


def _correlated(phi, q, c, n):
    """E[phi phi], E[phi' phi'] at sqrt(q) times two standard normal variables with correlation c."""
    kinks, rest = phi.breaks / math.sqrt(q), math.sqrt(1 - c * c)
    a, outer = quadrature.gaussian(kinks, n)
    w, weights = quadrature.gaussian((kinks - c * a[:, None]) / rest, n)
    weights = outer[:, None] * weights / (2 * math.pi)
    value_a, slope_a = quadrature.evaluate(phi, math.sqrt(q) * a)
    value_b, slope_b = quadrature.evaluate(phi, math.sqrt(q) * (c * a[:, None] + rest * w))
    return np.array([(weights * pair).sum() for pair in (value_a[:, None] * value_b, slope_a[:, None] * slope_b)])


def length_fixed_point(
    phi: quadrature.Function, weight_var: float, bias_var: float, *, centered: bool = False
) -> tuple[float, float, float]:
    """The fixed point of q -> weight_var E[phi(sqrt(q) u)^2] + bias_var, reached from q = weight_var + bias_var.

    Newton's steps, which are as long as the recursion's own or change q by a quarter at most.

    Args:
      phi: the activation; its kinks are found here.
      weight_var: weight_std^2.
      bias_var: bias_std^2.
      centered: the variance of phi(sqrt(q) u) stands for its second moment.

    Returns:
      q*, a q at which to take its limits if q* is 0 or infinite, and dq'/dq there.

    Raises:
      ValueError: if the recursion does not settle.
    """
    nothing, tiny, huge = 1e-10, 1e-16, 1e14

    def step(q):
        if centered:
            near = 1e-4
            below, square, above = quadrature.moments(phi, None, np.sqrt(q * np.array([1 - near, 1, 1 + near])))[0]
            change = (above - below) / (2 * near * q)
        else:
            square = quadrature.expect(phi, q, lambda u, p, d: p * p)
            change = quadrature.expect(phi, q, lambda u, p, d: p * d * u) / math.sqrt(q)
        return weight_var * float(square) + bias_var, weight_var * float(change)

    q, covered = weight_var + bias_var, 0.0
    for _ in range(1000):
        if q > covered:
            covered = 100 * q
            phi = quadrature.with_breaks(phi, quadrature.CUT * math.sqrt(covered))
        after, derivative = step(q)
        if after < nothing:
            return 0.0, tiny, step(tiny)[1]
        if after > huge:
            return math.inf, q, derivative
        if abs(after - q) <= 1e-10 * q:
            return q, q, derivative
        away = math.inf if after > q else 0.0
        target = q + (after - q) / (1 - derivative) if derivative < 1 - 1e-9 else away
        q = min(max(target, min(after, q / 1.25)), max(after, 1.25 * q))
    raise ValueError(f"the variance's recursion does not settle: q is {q:.6g}, then {after:.6g}")
