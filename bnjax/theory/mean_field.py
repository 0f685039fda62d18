"""Mean-field theory: how signals and gradients grow from layer to layer in infinitely wide random networks.

With batch normalization, a layer is z = W phi(scale BN(z_below) + bias), W_ij ~ N(0, weight_std^2 / fan_in). The
width is infinite, the batch of size B is not, so that a neuron's pre-activations over the batch are Gaussian with a
covariance that every sample shares in the same way: V (I - 1 1^T / B) once their mean is subtracted. Then

    BN(z) = rho sqrt(B) n,   rho^2 = t / (t + 1),   t = (V / epsilon) (s / B),   s ~ chi^2 with B - 1 degrees,

n uniform on the unit sphere orthogonal to 1, independent of s. All that a layer does to signals and gradients is
in two functions of rho; psi(z) = phi(scale z + bias), the samples a and b differ, z = rho sqrt(B) n:

    spread(rho) = E[(psi(z_a) - psi(z_b))^2] / 2
    slope(rho)  = (1 - 1/B) E[psi'(z_a)^2] + E[psi'(z_a) psi'(z_b)] / B
                  - (2 rho^2 - rho^4) E[(n_a psi'(z_a) - n_b psi'(z_b))^2] / 2

    V of the next layer = weight_std^2 E_s[spread]
    growth = E|gradient to this layer's z|^2 / E|gradient to the next one's|^2
           = weight_std^2 E_s[slope / (V s/B + epsilon)]

by the closed-form Jacobian of BN (`bnjax.jacobian`), weights independent of the gradient that passes them, and
gradients that all samples share alike (Yang et al. 2019, "A Mean Field Theory of Batch Normalization", section 4;
Theorem 8 is the case of ReLU at epsilon 0). An infinite batch has s/B = 1, psi's variance for spread and E[psi'^2] for
slope. Both functions need the joint distribution of two samples at most, so each is an integral over two angles: all is
quadrature in float64 on the host, nothing is sampled.

`weight_std` is the standard deviation times sqrt(fan_in): sqrt(2) init_scale for He's initializers, init_scale for
LeCun's. Activations are names (`bnjax.activations`) or elementwise JAX functions, smooth but for some kinks, which are
found.
"""

import functools
import itertools
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import activations

Activation = str | Callable[..., Any]

TOLERANCE = 1e-8  # relative, of every integral: from one number of nodes to twice that
_CUT = 12.0  # standard deviations; the normal density beyond is below 1e-31
_PARTS = 6  # panels of [-_CUT, _CUT] at least
_CHUNK = 8192  # nodes evaluated in one call
_SMALLEST_RHO = 1e-7  # stands for the limit of spread / rho^2 at 0, where it has lost no more than 7 digits


class Signal(NamedTuple):
    """What a batch-normalized layer sees, and what it does to the gradient. Numbers, or one per layer."""

    variance: float | np.ndarray  # V, of a pre-activation over the samples of the batch
    normalized_variance: float | np.ndarray  # of BN's output before scale and bias: 1 at epsilon 0
    growth: float | np.ndarray  # of the squared gradient norm, from the next layer's z to this one's


class EpsilonThreshold(NamedTuple):
    """Two values of weight_std, each proportional to sqrt(epsilon)."""

    alive: float  # below it no signal survives in depth: V = 0 is the only fixed point
    dead_unstable: float  # above it V = 0 is unstable: every signal survives


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


def gradient_growth(
    activation: Activation,
    batch_size: Real | None = None,
    epsilon: Real = 0.0,
    weight_std: Real = 1.0,
    *,
    scale: Real = 1.0,
    bias: Real = 0.0,
    start: Real | None = None,
) -> float:
    """Growth per layer, towards the input, of the squared gradient norm in a deep batch-normalized network.

    At epsilon 0, where `weight_std` cancels, with `spread` and `slope` at rho = 1 (module docstring):

        growth = B / (B - 3) slope / spread,    E[psi'(u)^2] / Var psi(u) for an infinite batch, u ~ N(0, 1),

    which is at least 1. B / (B - 3) is E[B / s]. At epsilon > 0 it is the growth at the signal's fixed point,
    `signal_fixed_point`; with ReLU and an infinite batch min(weight_std^2 / (2 epsilon), pi / (pi - 1)). Closed
    forms are used for ReLU at epsilon 0 (Yang et al. 2019, Theorem 8) and for linear, (B - 2) / (B - 3).

    Args:
      activation: phi, a name or an elementwise JAX function.
      batch_size: B, at least 4, also at epsilon > 0, where the growth is finite for 2 and 3: they are not
        implemented. None: infinite.
      epsilon: batch normalization's, inside the square root.
      weight_std: standard deviation of the weights times sqrt(fan_in), above 0.
      scale: batch normalization's, the same for all features, not 0.
      bias: batch normalization's, the same for all features.
      start: V of the first layer, where epsilon > 0. None: weight_std^2, that of inputs with unit variance.

    Returns:
      A factor without unit; of the norm itself it is the square root.

    Raises:
      ValueError: for an unknown name; a function that is not elementwise, not finite on the quadrature's range,
        constant there, has a derivative that does not fit it (a jump), or whose integrals do not converge;
        batch_size below 4 or not an integer; a value out of range.
    """
    B = _check(batch_size, epsilon, weight_std, start)
    if epsilon == 0 and scale == 1 and bias == 0:
        if activation == "linear":
            return 1.0 if B is None else (B - 2) / (B - 3)
        if activation == "relu":
            return math.pi / (math.pi - 1) if B is None else _relu_growth(B)
    return signal_fixed_point(
        activation, batch_size, epsilon, weight_std, scale=scale, bias=bias, start=start
    ).growth


def _relu_growth(B: int) -> float:
    """Yang et al. 2019, Theorem 8, by the arc-cosine kernels of Cho & Saul 2009."""
    c = -1 / (B - 1)
    kernel = (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi
    both_active = (math.pi - math.acos(c)) / (2 * math.pi)
    slope = (1 - 1 / B) / 2 + both_active / B - (1 - kernel) / (2 * B)
    return B / (B - 3) * slope / ((1 - kernel) / 2)


def signal_fixed_point(
    activation: Activation,
    batch_size: Real | None = None,
    epsilon: Real = 0.0,
    weight_std: Real = 1.0,
    *,
    scale: Real = 1.0,
    bias: Real = 0.0,
    start: Real | None = None,
) -> Signal:
    """The signal in the deep layers, V = weight_std^2 E_s[spread(rho)], as reached from `start`.

    At epsilon > 0 there may be several fixed points: V = 0, and for an activation such as gelu, which is
    steeper away from 0, a stable one beside a stable 0. Which one a network reaches depends on where it starts.

    Args:
      activation: as for `gradient_growth`, and so are all other arguments.
      batch_size: B, or None.
      epsilon: batch normalization's.
      weight_std: of the weights, times sqrt(fan_in).
      scale: batch normalization's.
      bias: batch normalization's.
      start: V of the first layer.

    Returns:
      `Signal` of three floats.

    Raises:
      ValueError: as `gradient_growth`; also if the recursion does not settle.
    """
    B = _check(batch_size, epsilon, weight_std, start)
    psi = _function(activation, B, scale, bias)
    if epsilon == 0:
        return Signal(*(float(value) for value in _layers_without_epsilon(psi, B, weight_std)))
    layer = _layer(psi, B)
    gain = weight_std**2 / epsilon
    t = _settle(layer, gain, (weight_std**2 if start is None else start) / epsilon)
    _, growth, normalized = layer(np.array([t]))
    return Signal(float(epsilon * t), float(normalized[0]), float(gain * growth[0]))


def signal_by_layer(
    activation: Activation,
    depth: Real,
    batch_size: Real | None = None,
    epsilon: Real = 0.0,
    weight_std: Real = 1.0,
    *,
    scale: Real = 1.0,
    bias: Real = 0.0,
    start: Real | None = None,
) -> Signal:
    """The signal in each of the first `depth` layers: what a network sees that is too shallow for its fixed point.

    Args:
      activation: as for `gradient_growth`, and so are all other arguments.
      depth: L, the number of layers, at least 1.
      batch_size: B, or None.
      epsilon: batch normalization's.
      weight_std: of the weights, times sqrt(fan_in).
      scale: batch normalization's.
      bias: batch normalization's.
      start: V of the first layer, whose samples are uncorrelated. None: weight_std^2.

    Returns:
      `Signal` of three arrays [L]. growth[l] is from layer l + 1 to layer l.

    Raises:
      ValueError: as `gradient_growth`, and for a depth below 1.
    """
    B = _check(batch_size, epsilon, weight_std, start)
    if not math.isfinite(depth) or depth != int(depth) or depth < 1:
        raise ValueError(f"depth must be an integer >= 1, got {depth}")
    psi = _function(activation, B, scale, bias)
    V = float(weight_std**2 if start is None else start)
    if epsilon == 0:
        fixed, normalized, growth = _layers_without_epsilon(psi, B, weight_std)
        variance = np.r_[V, np.full(int(depth) - 1, fixed)]
        # Only the layer's own V divides its gradient.
        return Signal(variance, np.full(int(depth), normalized), growth * fixed / variance)
    layer = _layer(psi, B)
    gain = weight_std**2 / epsilon
    found, t = [], V / epsilon
    for _ in range(int(depth)):
        spread, growth, normalized = (float(value[0]) for value in layer(np.array([t])))
        found.append((epsilon * t, normalized, gain * growth))
        t = gain * t * spread
    return Signal(*np.array(found).T)


def epsilon_threshold(
    activation: Activation,
    epsilon: Real,
    batch_size: Real | None = None,
    *,
    scale: Real = 1.0,
    bias: Real = 0.0,
) -> EpsilonThreshold:
    """The weight_std below which batch normalization's epsilon makes the signal of a deep network die out.

    A small V is multiplied by weight_std^2 / epsilon times spread(rho) / rho^2 at rho -> 0 in each layer, so V = 0 is
    unstable for

        weight_std^2 > epsilon / psi'(0)^2,

    and for ReLU, whose slope jumps at 0, for weight_std^2 > epsilon 2 pi / (pi - 1) in an infinite batch. A fixed point
    V > 0 exists for weight_std^2 > epsilon min_t t / E_s[spread], t = V / epsilon. That is the same value unless
    psi is steeper away from 0 (gelu, by 0.3% of weight_std): between the two, small signals die, large ones survive.

    Args:
      activation: phi, a name or an elementwise JAX function.
      epsilon: batch normalization's, above 0.
      batch_size: B, at least 4. None: infinite.
      scale: batch normalization's, not 0.
      bias: batch normalization's.

    Returns:
      `EpsilonThreshold`; divide by sqrt(2) for the init_scale of He's initializers.

    Raises:
      ValueError: as `gradient_growth`, and for epsilon 0, at which there is no threshold.
    """
    B = _check(batch_size, epsilon, 1.0, None)
    if epsilon == 0:
        raise ValueError("epsilon must be above 0: at epsilon 0 there is no threshold")
    psi = _function(activation, B, scale, bias)
    layer = _layer(psi, B)
    t = np.r_[0, np.geomspace(1e-9, 1e9, 1801)]
    spread = layer(t)[0]
    # Not from the interpolant, whose error would decide whether it is 0; E[s / B] = (B - 1) / B.
    spread[0] = _ratios(psi, B, np.zeros(1))[0, 0] * (1 if B is None else (B - 1) / B)
    top = int(spread.argmax())
    best = spread[top]
    if top > 0:  # at t = 1e9 it is on its way to 0
        near = np.geomspace(t[top - 1] or 1e-10, t[top + 1], 401)
        best = layer(near)[0].max()
    if best <= spread[0] * (1 + TOLERANCE):
        best = spread[0]
    with np.errstate(divide="ignore"):
        alive, dead = np.sqrt(epsilon / np.array([best, spread[0]]))
    return EpsilonThreshold(float(alive), float(dead))


def order_chaos(activation: Activation, weight_std: Real, bias_std: Real = 0.0) -> OrderChaos:
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
      ValueError: as `gradient_growth`.
    """
    _check(None, 0.0, weight_std, None)
    if not 0 <= bias_std < math.inf:
        raise ValueError(f"bias_std must be >= 0 and finite, got {bias_std}")
    phi = _Function(_evaluator(activation), 1.0, 0.0, None)
    weight_var, bias_var = float(weight_std) ** 2, float(bias_std) ** 2
    variance, q, growth_of_q = _length_fixed_point(phi, weight_var, bias_var)
    phi = _with_breaks(phi, _CUT * math.sqrt(max(q, 1.0)))
    next_q = weight_var * float(_expect(phi, q, lambda u, p, d: p * p)) + bias_var
    chi_1 = weight_var * float(_expect(phi, q, lambda u, p, d: d * d))

    if math.isinf(variance):
        earlier = weight_var * float(_expect(phi, q / 100, lambda u, p, d: d * d))
        if abs(chi_1 - earlier) > 0.01 * chi_1:
            raise ValueError(
                "the activation makes signals blow up faster than exponentially: there is no deep limit"
            )

    def correlate(c):
        product, slopes = _converge(lambda n: _correlated(phi, q, c, n))
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
        correlation = low
        chi_c = correlate(low)[1]
    phase = "critical" if abs(chi_1 - 1) < near else "ordered" if chi_1 < 1 else "chaotic"
    return OrderChaos(
        variance,
        chi_1,
        correlation,
        chi_c,
        depth_scale(growth_of_q) if growth_of_q > 0 else 0.0,
        depth_scale(chi_c) if chi_c > 0 else 0.0,
        depth_scale(chi_1) if chi_1 > 0 else 0.0,
        phase,
    )


def depth_scale(growth: Real) -> float:
    """Layers in which the squared gradient norm changes by a factor e: 1 / |ln growth|, infinite at growth 1.

    Args:
      growth: per layer, of the squared norm (`gradient_growth`, chi_1).

    Raises:
      ValueError: unless growth is above 0 and finite.
    """
    if not 0 < growth < math.inf:
        raise ValueError(f"growth must be above 0 and finite, got {growth}")
    rate = abs(math.log(growth))
    return 1 / rate if rate > 1e-7 else math.inf


def depth_at_ratio(growth: Real, ratio: Real) -> float:
    """The depth L over which the squared gradient norm changes by the factor `ratio`: growth^L = ratio or 1 / ratio.

    L = ln(ratio) depth_scale(growth) is exact in the mean-field limit. At which ratio training stops is NOT a
    theorem: it depends on the task, the optimizer and the number of steps. Without batch normalization, the rule of
    thumb of Schoenholz et al. 2017 is some 6 depth scales xi_c; the same number of gradient's depth scales is a
    ratio of e^6 = 403. What float32 can hold ends at a ratio of some 1e76 for squared norms.

    Args:
      growth: per layer, of the squared norm.
      ratio: above 1.

    Returns:
      A number of layers; infinite at growth 1.

    Raises:
      ValueError: for a growth that is not positive and finite or a ratio that is not above 1 and finite.
    """
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio must be above 1 and finite, got {ratio}")
    return math.log(ratio) * depth_scale(growth)


# One layer as a function of the signal.


def _layers_without_epsilon(psi, B, weight_std):
    """(V, 1, growth) at epsilon 0, which forgets V."""
    spread, slope = (float(value[0]) for value in _moments(psi, B, np.ones(1)))
    return weight_std**2 * spread, 1.0, (1 if B is None else B / (B - 3)) * slope / spread


def _layer(psi, B):
    """A function of t = V / epsilon [M], 0 included, that gives three arrays [M].

    They are E_s[spread] / t, E_s[slope epsilon / (V s/B + epsilon)] and E_s[rho^2]: the next t is
    weight_std^2 / epsilon t times the first, the growth is weight_std^2 / epsilon times the second.
    """
    table = _table(lambda rho: _ratios(psi, B, rho), _edges_of_rho(psi.breaks, B))
    if B is None:
        s, weights = np.ones(1), np.ones(1)  # s / B, no average
    else:
        root = math.sqrt(B - 1)
        roots, weights = _panels(np.array([max(0.0, root - _CUT), root + _CUT]), 256)
        weights = weights * np.exp((B - 2) * (np.log(roots / root)) - (roots**2 - root**2) / 2)
        s, weights = roots**2 / B, weights / weights.sum()

    def layer(t):
        shrink = 1 / (1 + np.outer(t, s))  # epsilon / (V s/B + epsilon)
        rho_squared = np.outer(t, s) * shrink
        ratio, slope = table(np.sqrt(rho_squared))
        # Interpolated values may be below 0 by rounding.
        ratio, slope = np.maximum(ratio, 0), np.maximum(slope, 0)
        return (ratio * s * shrink) @ weights, (slope * shrink) @ weights, rho_squared @ weights

    return layer


def _ratios(psi, B, rho):
    """Both [2, M]: spread / rho^2 and slope; spread vanishes like rho^2."""
    rho = np.maximum(rho, _SMALLEST_RHO)
    spread, slope = _moments(psi, B, rho)
    return np.stack([spread / rho**2, slope])


def _edges_of_rho(breaks, B):
    """Edges [E] of [0, 1], between which the moments are analytic functions of rho.

    In a finite batch BN's outputs are bounded: |z_a| <= rho sqrt(B - 1) reaches a kink at some rho, and the ellipse
    that holds (z_a, z_b), z_a^2 + z_b^2 + (z_a + z_b)^2 / (B - 2) <= B rho^2, a pair of kinks at another; there the
    moments go on with (rho - edge)^((B - 1) / 2), which polynomials fit well unless B is small.
    """
    if B is None:
        return np.array([0.0, 1.0])
    inner = np.abs(breaks) / math.sqrt(B - 1)
    if B <= 12:
        one, other = breaks[:, None], breaks
        pairs = np.sqrt((one**2 + other**2 + (one + other) ** 2 / (B - 2)) / B)
        inner = np.r_[inner, pairs.reshape(-1)]
    inner = np.sort(inner)
    inner = inner[(inner > 1e-6) & (inner < 1 - 1e-6)]
    return np.r_[0.0, inner[np.diff(inner, prepend=0.0) > 1e-6], 1.0]


def _table(function, edges):
    """An interpolant of function: rho [M] -> [2, M] on [0, 1], which is analytic between `edges`.

    To the right of an edge it goes on in powers of sqrt(rho - edge).
    """
    pieces = [
        _interpolant(function, low, high, 2 if low > 0 else 1) for low, high in itertools.pairwise(edges)
    ]

    def table(rho):
        found = np.empty((2, *rho.shape))
        index = np.searchsorted(edges[1:-1], rho)
        for i, piece in enumerate(pieces):
            found[:, index == i] = piece(rho[index == i])
        return found

    return table


def _interpolant(function, low, high, power):
    """On [low, high], by Chebyshev polynomials of x, rho = low + (high - low) x^power, of the degree it needs."""
    degree = 8

    def points(degree):
        return (1 - np.cos(np.pi * np.arange(degree + 1) / degree)) / 2

    def at(x):
        return function(low + (high - low) * x**power)

    values = at(points(degree))
    while degree < 512:
        fit = np.polynomial.chebyshev.chebfit(2 * points(degree) - 1, values.T, degree)
        degree *= 2
        finer = np.empty((2, degree + 1))
        finer[:, ::2], finer[:, 1::2] = values, at(points(degree)[1::2])
        off = np.abs(np.polynomial.chebyshev.chebval(2 * points(degree)[1::2] - 1, fit) - finer[:, 1::2])
        values = finer
        if (off.max(1) <= 100 * TOLERANCE * np.abs(values).max(1)).all():
            fit = np.polynomial.chebyshev.chebfit(2 * points(degree) - 1, values.T, degree)
            return lambda rho: np.polynomial.chebyshev.chebval(
                2 * ((rho - low) / (high - low)) ** (1 / power) - 1, fit
            )
    raise ValueError("the activation's moments do not converge as functions of the signal's size")


def _settle(layer, gain, start):
    """The t that the recursion t -> gain E_s[spread] reaches from `start`.

    Where it is increasing, that is the next fixed point in the direction of the first step, found by bisection: near a
    threshold the recursion itself is slow.
    """

    def step(t):
        return gain * t * layer(t)[0]

    grid = np.geomspace(1e-9, 1e9, 1801)
    top = max(float(step(grid).max()), start) * 2
    grid = np.geomspace(min(1e-9, top / 10), top, 2001)
    after = step(grid)
    if (np.diff(after) < -TOLERANCE * after[1:]).any():  # it may swing over the fixed point
        t = start
        for _ in range(20_000):
            t, previous = float(step(np.array([t]))[0]), t
            if abs(t - previous) <= 1e-12 * previous or t < 1e-100:
                return t if t >= 1e-100 else 0.0
        raise ValueError(
            f"the signal's recursion does not settle: V / epsilon is {previous:.6g}, then {t:.6g}"
        )
    grows = float(step(np.array([start]))[0]) > start
    ahead = grid > start if grows else grid < start
    passed = np.flatnonzero(ahead & ((after <= grid) if grows else (after >= grid)))
    if len(passed) == 0:
        return 0.0
    turn = grid[passed[0] if grows else passed[-1]]
    low, high = (
        (max(start, turn * (grid[0] / grid[1])), turn)
        if grows
        else (turn, min(start, turn * (grid[1] / grid[0])))
    )
    for _ in range(60):
        middle = math.sqrt(low * high)
        if float(step(np.array([middle]))[0]) > middle:
            low = middle
        else:
            high = middle
    return high


# Integrals.


def _moments(psi, B, rho):
    """`spread` and `slope` of the module's docstring at each rho [M], both [M]."""
    nodes = _normal_moments if B is None else _sphere_moments
    return _converge(
        lambda n: np.concatenate(
            [nodes(psi, B, part, n) for part in np.array_split(rho, -(-len(rho) // 8))], 1
        )
    )


def _converge(integral):
    """integral(n) for as many nodes as it takes until doubling them changes nothing."""
    n = 12
    previous = integral(n)
    while n < 192:
        n *= 2
        found = integral(n)
        if (np.abs(found - previous) <= TOLERANCE * np.abs(found) + 1e-14 * np.abs(found).max()).all():
            return found
        previous = found
    raise ValueError(
        f"the activation's integrals do not converge: they change by more than {TOLERANCE:g} even at {n} nodes a panel"
    )


def _panels(edges, n):
    """Nodes and weights on the last axis [..., E n - n] of n-point quadrature between neighbouring edges [..., E].

    Gauss-Legendre nodes, crowded quadratically at the edges, where square roots may end.
    """
    x, w = np.polynomial.legendre.leggauss(n)
    fraction, weight = (2 + 3 * x - x**3) / 4, 0.75 * (1 - x**2) * w
    width = np.diff(edges)
    width = width[..., None]
    nodes = edges[..., :-1, None] + width * fraction
    weights = width * weight
    return nodes.reshape(*edges.shape[:-1], -1), weights.reshape(*edges.shape[:-1], -1)


def _edges(inner, limit, parts):
    """`inner` [..., K] within [-limit, limit] and the edges of equal parts, in order; no panel is empty everywhere."""
    inner = np.clip(inner, -limit, limit)
    equal = np.broadcast_to(np.linspace(-limit, limit, parts + 1), (*inner.shape[:-1], parts + 1))
    edges = np.sort(np.concatenate([equal, inner], -1), -1)
    filled = (np.diff(edges) > 0).reshape(-1, edges.shape[-1] - 1).any(0)
    return edges[..., np.r_[True, filled]]


def _normal_moments(psi, B, rho, n):
    """[2, M]: Var psi(rho u), E[psi'(rho u)^2], u ~ N(0, 1)."""
    del B
    _, integrands = _normal_integrands(psi, rho, n)
    return integrands.sum(2)


def _normal_integrands(psi, rho, n):
    """Nodes u [M, N] and what to sum over them, [2, M, N], for `_normal_moments`."""
    u, weights = _panels(_edges(psi.breaks / rho[:, None], _CUT, _PARTS), n)
    weights = weights * np.exp(-(u**2) / 2)
    weights /= weights.sum(1, keepdims=True)
    value, slope = _evaluate(psi, rho[:, None] * u)
    value = value - (weights * value).sum(1, keepdims=True)
    value = value - (weights * value).sum(1, keepdims=True)
    return u, np.stack([weights * value**2, weights * slope**2])


def _sphere_moments(psi, B, rho, n):
    """[2, M]: spread and slope for n uniform on the unit sphere orthogonal to 1, in B - 1 dimensions.

    n_a = k sin(theta), n_b = k (c sin(theta) + sqrt(1 - c^2) cos(theta) sin(eta)), k^2 = 1 - 1/B, c = -1 / (B - 1),
    of density cos(theta)^(B - 3) cos(eta)^(B - 4).
    """
    c, radius = -1 / (B - 1), math.sqrt(B - 1)
    shift = math.asin(-c)
    limit = math.asin(min(1.0, _CUT / radius))
    parts = 2 * math.ceil(min(1.0, radius / _CUT) * _PARTS / 2)
    kinks = psi.breaks / (rho[:, None] * radius)  # [M, K]
    # z_a or an end of z_b's range on a kink
    ends = np.arccos(np.clip(np.concatenate([kinks, -kinks], 1), -1, 1))
    signs = np.sign(np.arange(ends.shape[1]) - kinks.shape[1] + 0.5)
    inner = np.concatenate([np.arcsin(np.clip(kinks, -1, 1)), ends + signs * shift, -ends + signs * shift], 1)
    theta, outer = _panels(_edges(inner, limit, parts), n)  # [M, T]
    outer = outer * np.cos(theta) ** (B - 3)
    a, across = np.sin(theta)[:, :, None], math.cos(shift) * np.cos(theta)[:, :, None]
    eta, weights = _panels(
        _edges(np.arcsin(np.clip((kinks[:, None] - c * a) / across, -1, 1)), limit, parts), n
    )
    weights = outer[:, :, None] * weights * np.cos(eta) ** (B - 4)  # [M, T, H]
    weights /= weights.sum((1, 2), keepdims=True)
    b = c * a + across * np.sin(eta)
    z = radius * rho[:, None, None]
    value_a, slope_a = _evaluate(psi, z * a)
    value_b, slope_b = _evaluate(psi, z * b)
    single, pair, spread, radial = (
        (weights * integrand).sum((1, 2))
        for integrand in (
            slope_a**2,
            slope_a * slope_b,
            (value_a - value_b) ** 2 / 2,
            (1 - 1 / B) * (a * slope_a - b * slope_b) ** 2 / 2,
        )
    )
    slope = (1 - 1 / B) * single + pair / B - (2 * rho**2 - rho**4) * radial
    return np.stack([spread, slope])


def _expect(phi, q, integrand):
    """E[integrand(u, phi(sqrt(q) u), phi'(sqrt(q) u))], u ~ N(0, 1)."""

    def integral(n):
        u, weights = _panels(_edges(phi.breaks / math.sqrt(q), _CUT, _PARTS), n)
        weights = weights * np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
        return (weights * integrand(u, *_evaluate(phi, math.sqrt(q) * u))).sum()

    return _converge(integral)


def _correlated(phi, q, c, n):
    """E[phi phi], E[phi' phi'] at sqrt(q) times two standard normal variables with correlation c."""
    kinks, rest = phi.breaks / math.sqrt(q), math.sqrt(1 - c * c)
    a, outer = _panels(_edges(kinks, _CUT, _PARTS), n)
    w, weights = _panels(_edges((kinks - c * a[:, None]) / rest, _CUT, _PARTS), n)
    weights = (outer * np.exp(-(a**2) / 2))[:, None] * weights * np.exp(-(w**2) / 2) / (2 * math.pi)
    value_a, slope_a = _evaluate(phi, math.sqrt(q) * a)
    value_b, slope_b = _evaluate(phi, math.sqrt(q) * (c * a[:, None] + rest * w))
    return np.array(
        [(weights * pair).sum() for pair in (value_a[:, None] * value_b, slope_a[:, None] * slope_b)]
    )


def _length_fixed_point(phi, weight_var, bias_var):
    """q*, a q at which to take its limits if q* is 0 or infinite, and dq'/dq there.

    Newton's steps, which are as long as the recursion's own or change q by a quarter at most.
    """
    nothing, tiny, huge = 1e-10, 1e-16, 1e14

    def step(q):
        squares = _expect(phi, q, lambda u, p, d: p * p)
        derivative = _expect(phi, q, lambda u, p, d: p * d * u) / math.sqrt(q)
        return weight_var * float(squares) + bias_var, weight_var * float(derivative)

    q, covered = weight_var + bias_var, 0.0
    for _ in range(1000):
        if q > covered:
            covered = 100 * q
            phi = _with_breaks(phi, _CUT * math.sqrt(covered))
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


# The activation as a function of float64 numbers on the host.


class _Function(NamedTuple):
    """psi(z) = phi(scale z + bias)."""

    evaluator: Callable[..., Any]
    scale: float
    bias: float
    breaks: np.ndarray | None  # [K], where psi or a derivative of it jumps, ascending


def _function(activation, B, scale, bias):
    """psi, checked on the range of BN's outputs."""
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    if not math.isfinite(bias):
        raise ValueError(f"bias must be finite, got {bias}")
    psi = _Function(_evaluator(activation), float(scale), float(bias), None)
    psi = _with_breaks(psi, _CUT if B is None else min(_CUT, math.sqrt(B - 1)))
    # At rho = 1 only, where BN's outputs range furthest: a small signal may well stay on one side of all kinks.
    one = np.ones(1)
    if B is None:
        u, integrands = _normal_integrands(psi, one, 48)
        if ((integrands * (np.abs(u) > _CUT - 2)).sum(2) > TOLERANCE * integrands.sum(2)).any():
            raise ValueError("the activation grows too fast for its variance under a normal distribution")
    spread, slope = _moments(psi, B, one)
    if spread <= 1e-24 * slope:
        raise ValueError("the activation is constant on the quadrature's range: its growth is not defined")
    return psi


def _evaluator(activation):
    """A compiled z -> (phi(z), phi'(z)) for z [_CHUNK]."""
    phi = activations.get(activation) if isinstance(activation, str) else activation
    try:
        return _compiled(phi)
    except TypeError:  # not hashable
        return _compiled.__wrapped__(phi)


@functools.lru_cache(maxsize=64)
def _compiled(phi):
    return jax.jit(lambda z: jax.jvp(phi, (z,), (jnp.ones_like(z),)))


def _evaluate(psi, z):
    """psi(z) and psi'(z), float64 arrays of z's shape.

    Raises:
      ValueError: if they are no such arrays, or not finite.
    """
    flat = (psi.scale * z + psi.bias).reshape(-1)
    padded = np.resize(flat, (-(-flat.size // _CHUNK), _CHUNK))
    cpu = jax.local_devices(backend="cpu")[0]
    try:
        with jax.enable_x64(True), jax.default_device(cpu):
            found = [psi.evaluator(jnp.asarray(part)) for part in padded]
    except Exception as error:
        raise ValueError(f"the activation must be an elementwise JAX function: {error}") from error
    if any(np.shape(part) != (_CHUNK,) or part.dtype.kind != "f" for pair in found for part in pair):
        raise ValueError(
            "the activation must be an elementwise JAX function: its output has another shape or type"
        )
    value, slope = (np.concatenate(part)[: flat.size].astype(float) for part in zip(*found, strict=True))
    bad = ~(np.isfinite(value) & np.isfinite(slope))
    if bad.any():
        raise ValueError(
            f"the activation or its derivative is not finite at {flat[bad][0]:.6g}, within the quadrature's range "
            f"[{flat.min():.4g}, {flat.max():.4g}]"
        )
    return value.reshape(z.shape), psi.scale * slope.reshape(z.shape)


def _with_breaks(psi, limit):
    """Finds what breaks psi on [-limit, limit]: panels that no polynomial fits are divided down to rounding.

    Raises:
      ValueError: if psi is not elementwise, not smooth in pieces, jumps, or has a derivative that is not its own.
    """
    _check_elementwise(psi, limit)
    x, _ = np.polynomial.legendre.leggauss(8)
    parts = 7  # odd, so that a kink in the middle stays there
    children = ((x + 1)[None, :] / 2 + np.arange(parts)[:, None]) / parts * 2 - 1  # in units of the parent
    vandermonde = np.polynomial.legendre.legvander(x, 7)
    to_children = np.polynomial.legendre.legvander(children.reshape(-1), 7) @ np.linalg.inv(vandermonde)
    derivative = np.polynomial.legendre.legval(x, np.polynomial.legendre.legder(np.eye(8))).T @ np.linalg.inv(
        vandermonde
    )

    edges = np.linspace(-limit, limit, 62)  # an odd number of panels, so that 0 lies within one
    left, width = edges[:-1], edges[1] - edges[0]
    value, slope = _evaluate(psi, left[:, None] + width * (x + 1) / 2)  # [panel, node]
    size_of_value, size_of_slope = np.abs(value).max(), 0.0
    rough = []  # (centre, width)
    while len(left) and width > 1e-14 * limit:
        if len(left) > 4096:
            raise ValueError("the activation is not smooth between a few kinks: it cannot be integrated")
        density = np.exp(-((left + width / 2) ** 2) / 4)  # what lies far out must not hide a kink
        size_of_slope = max(size_of_slope, float((density * np.abs(slope).max(1)).max()))
        size = np.abs(slope).max(1, keepdims=True) + 1e-6 * size_of_slope
        inner = left[:, None] + width / parts * np.arange(parts)
        value_in, slope_in = _evaluate(psi, inner[:, :, None] + width / parts * (x + 1) / 2)
        off = np.abs((slope @ to_children.T).reshape(slope_in.shape) - slope_in).max((1, 2), keepdims=True)[
            :, 0
        ]
        smooth = (off <= 1e-7 * size)[:, 0]
        noise = 1e-13 * size_of_value / width
        wrong = smooth & (
            np.abs(value @ derivative.T * (2 / width) - slope).max(1) > 1e-5 * size[:, 0] + 100 * noise
        )
        if wrong.any():
            raise ValueError(
                "the activation's derivative does not fit it (a jump, a rule of its own, "
                "or arithmetic coarser than float64) near "
                f"{psi.scale * left[wrong][0] + psi.bias:.4g}"
            )
        if width < 1e-2 * limit:
            rough += [(start + width / 2, width) for start in left[~smooth]]
        left, slope = inner[~smooth].reshape(-1), slope_in[~smooth].reshape(-1, len(x))
        value, width = value_in[~smooth].reshape(-1, len(x)), width / parts
    breaks = []
    for centre, size in reversed(rough):  # the narrowest first
        if all(abs(centre - found) > 64 * size for found in breaks):
            breaks.append(centre)
    breaks = np.sort(np.array(breaks, float))
    at_zero = np.abs(psi.scale * breaks + psi.bias) < 1e-10 * abs(psi.scale) * limit
    breaks[at_zero] = -psi.bias / psi.scale  # exactly, since signals may be tiny
    if len(breaks) > 64:
        raise ValueError(f"the activation has {len(breaks)} kinks or steep places: it cannot be integrated")
    if len(breaks):
        step = 1e-9 * limit
        sides, slopes = _evaluate(psi, breaks[:, None] + step * np.array([-1, 1]))
        jump = np.abs(np.diff(sides)[:, 0]) > 1e-6 * size_of_value + 10 * step * np.abs(slopes).max(1)
        if jump.any():
            raise ValueError(f"the activation jumps at {psi.scale * breaks[jump][0] + psi.bias:.4g}")
    return psi._replace(breaks=breaks)


def _check_elementwise(psi, limit):
    """Raises ValueError if psi's values depend on what else is evaluated, or where."""
    rng = np.random.default_rng(0)
    z = rng.uniform(-limit, limit, _CHUNK)
    order, kept = rng.permutation(_CHUNK), rng.random(_CHUNK) < 0.5
    among_others = np.where(kept, z[order], rng.uniform(-limit, limit, _CHUNK))
    for alone, beside in zip(_evaluate(psi, z), _evaluate(psi, among_others), strict=True):
        if not np.allclose(alone[order][kept], beside[kept], rtol=1e-6, atol=1e-9 * np.abs(alone).max()):
            raise ValueError("the activation is not elementwise: its values depend on the other entries")


def _check(batch_size, epsilon, weight_std, start):
    """Checks what all functions take; returns batch_size as int or None."""
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be >= 0 and finite, got {epsilon}")
    if not 0 < weight_std < math.inf:
        raise ValueError(f"weight_std must be above 0 and finite, got {weight_std}")
    if start is not None and not 0 < start < math.inf:
        raise ValueError(f"start must be above 0 and finite, got {start}")
    if batch_size is None:
        return None
    if isinstance(batch_size, bool) or not math.isfinite(batch_size) or batch_size != int(batch_size):
        raise ValueError(f"batch_size must be an integer or None, got {batch_size}")
    if batch_size > 1e9:
        raise ValueError(f"batch_size must be at most 1e9, got {batch_size}; None is an infinite batch")
    if batch_size <= 3:
        why = (
            "at 3 or below and epsilon 0 the expected squared gradient is infinite (Theorem 8 of Yang et al. 2019 "
            "needs B >= 4)"
            if epsilon == 0
            else "at epsilon above 0 the growth is finite for 2 and 3, too, but this quadrature is for 4 or more"
        )
        raise ValueError(f"batch_size must be at least 4, got {batch_size}: {why}")
    return int(batch_size)
