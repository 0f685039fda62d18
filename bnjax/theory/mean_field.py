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
slope. Both functions need the joint distribution of two samples at most, so each is an integral over two angles
(`bnjax.theory.quadrature`): nothing is sampled.

`weight_std` is the standard deviation times sqrt(fan_in): sqrt(2) init_scale for He's initializers, init_scale for
LeCun's.
"""

import math
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from bnjax import choices
from bnjax.theory import norm_growth, quadrature
from bnjax.theory.depth import depth_at_ratio as depth_at_ratio
from bnjax.theory.depth import depth_scale as depth_scale
from bnjax.theory.quadrature import CUT, TOLERANCE, Activation, moments

_SMALLEST_RHO = 1e-7  # stands for the limit of spread / rho^2 at 0, where it has lost no more than 7 digits


class Signal(NamedTuple):
    """The input of a batch-normalized layer, and its effect on the gradient. Numbers, or one per layer."""

    variance: float | np.ndarray  # V, of a pre-activation over the samples of the batch
    normalized_variance: float | np.ndarray  # of BN's output before scale and bias: 1 at epsilon 0
    growth: float | np.ndarray  # of the squared gradient norm, from the next layer's z to this one's


class EpsilonThreshold(NamedTuple):
    """Two values of weight_std, each proportional to sqrt(epsilon)."""

    alive: float  # below it no signal survives in depth: V = 0 is the only fixed point
    dead_unstable: float  # above it V = 0 is unstable: every signal survives


def gradient_growth(
    activation: Activation,
    batch_size: Real | None = None,
    epsilon: Real = 0.0,
    weight_std: Real = 1.0,
    *,
    scale: Real = 1.0,
    bias: Real = 0.0,
    start: Real | None = None,
    norm: Any = "batch",
    num_features: Real | None = None,
) -> float:
    """Growth per layer, towards the input, of the squared gradient norm in a deep normalized network.

    `bnjax.theory.norm_growth` has the norms other than batch normalization, at epsilon 0. What follows is batch
    normalization's. At epsilon 0, where `weight_std` cancels, with `spread` and `slope` at rho = 1 (module docstring):

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
      norm: before the activation: "batch", "layer", "group", "rms", "weight", "weight_standardized", "l1", "l2" (which
        is "batch"), "linf", "none", or an object whose attribute `growth` is a function (activation, num_features,
        batch_size) -> float. By name, l1 and linf have the constants that make their spread 1 for a Gaussian,
        weight_standardized the gain of the activation, and group infinite groups; a value of `bnjax.norms` has its own.
      num_features: normalized together: of "group", in infinitely many groups, at least 4; of "layer" and "rms" the
        width of the network, at least 16, to the order 1 / num_features. None: infinite.

    Returns:
      A factor without unit; of the norm itself it is the square root.

    Raises:
      ValueError: for an unknown name; a function that is not elementwise, not finite on the quadrature's range,
        constant there, has a derivative that does not fit it (a jump), or whose integrals do not converge;
        batch_size below 4 or not an integer; a value out of range; an argument that the norm does not take.
    """
    if not isinstance(norm, str) or norm not in ("batch", "l2"):
        defaults = {"batch_size": None, "epsilon": 0, "scale": 1, "bias": 0, "start": None, "num_features": None}
        values = (batch_size, epsilon, scale, bias, start, num_features)
        options = {name: v for (name, default), v in zip(defaults.items(), values, strict=True) if v != default}
        return norm_growth.growth(norm, activation, weight_std, **options)
    if num_features is not None:
        raise ValueError(f"num_features is not an argument of norm {norm!r}: it normalizes over the batch_size")
    B = _check(batch_size, epsilon, weight_std, start)
    if epsilon == 0 and scale == 1 and bias == 0:
        if activation == "linear":
            return 1.0 if B is None else (B - 2) / (B - 3)
        if activation == "relu":
            return math.pi / (math.pi - 1) if B is None else _relu_growth(B)
    return signal_fixed_point(activation, batch_size, epsilon, weight_std, scale=scale, bias=bias, start=start).growth


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
    if epsilon == 0:
        psi = quadrature.on_batch(activation, B, scale, bias)
        return Signal(*(float(value) for value in _layers_without_epsilon(psi, B, weight_std)))
    layer = _layer(activation, B, scale, bias)
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
    V = float(weight_std**2 if start is None else start)
    if epsilon == 0:
        psi = quadrature.on_batch(activation, B, scale, bias)
        fixed, normalized, growth = _layers_without_epsilon(psi, B, weight_std)
        variance = np.r_[V, np.full(int(depth) - 1, fixed)]
        # Only the layer's own V divides its gradient.
        return Signal(variance, np.full(int(depth), normalized), growth * fixed / variance)
    layer = _layer(activation, B, scale, bias)
    gain = weight_std**2 / epsilon
    found, t = [], V / epsilon
    for _ in range(int(depth)):
        spread, growth, normalized = (float(value[0]) for value in layer(np.array([t])))
        found.append((epsilon * t, normalized, gain * growth))
        t = gain * t * spread
    return Signal(*np.array(found).T)


def epsilon_threshold(
    activation: Activation, epsilon: Real, batch_size: Real | None = None, *, scale: Real = 1.0, bias: Real = 0.0
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
    layer = _layer(activation, B, scale, bias)
    t = np.r_[0, np.geomspace(1e-9, 1e9, 1801)]
    spread = layer(t)[0]
    spread[0] = _small_signal(
        quadrature.on_batch(activation, B, scale, bias), B
    )  # not from the interpolant, whose error would decide whether it is 0
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


def init_scale_threshold(activation: Activation, epsilon: Real, batch_size: Real | None = None) -> float:
    """The init_scale of He's initializers below which epsilon makes small signals die: `dead_unstable` / sqrt(2).

    For ReLU in an infinite batch sqrt(epsilon pi / (pi - 1)), for smooth activations sqrt(epsilon / 2) / |phi'(0)|.

    Args:
      activation: phi, a name or an elementwise JAX function.
      epsilon: batch normalization's; 0 gives 0.
      batch_size: B, at least 4. None: infinite.

    Raises:
      ValueError: as `gradient_growth`.
    """
    B = _check(batch_size, epsilon, 1.0, None)
    spread = _small_signal(quadrature.on_batch(activation, B, 1.0, 0.0), B)
    return math.sqrt(epsilon / spread) / math.sqrt(2) if spread else math.inf


# One layer as a function of the signal.


def _layers_without_epsilon(psi, B, weight_std):
    """(V, 1, growth) at epsilon 0, which forgets V."""
    spread, slope = (float(value[0]) for value in moments(psi, B, np.ones(1)))
    return weight_std**2 * spread, 1.0, (1 if B is None else B / (B - 3)) * slope / spread


@quadrature.kept
def _layer(activation, B, scale, bias):
    """A function of t = V / epsilon [M], 0 included, that gives three arrays [M].

    They are E_s[spread] / t, E_s[slope epsilon / (V s/B + epsilon)] and E_s[rho^2]: the next t is
    weight_std^2 / epsilon t times the first, the growth is weight_std^2 / epsilon times the second.
    """
    psi = quadrature.on_batch(activation, B, scale, bias)
    table = quadrature.interpolant(lambda rho: _ratios(psi, B, rho), _edges_of_rho(psi.breaks, B))
    if B is None:
        s, weights = np.ones(1), np.ones(1)  # s / B, no average
    else:
        root = math.sqrt(B - 1)
        roots, weights = quadrature.panels(np.array([max(0.0, root - CUT), root + CUT]), 256)
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


def _small_signal(psi, B):
    """E_s[spread] / t in the limit t = 0; E[s / B] = (B - 1) / B."""
    return _ratios(psi, B, np.zeros(1))[0, 0] * (1 if B is None else (B - 1) / B)


def _ratios(psi, B, rho):
    """Both [2, M]: spread / rho^2 and slope; spread vanishes like rho^2."""
    rho = np.maximum(rho, _SMALLEST_RHO)
    spread, slope = moments(psi, B, rho)
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
        raise ValueError(f"the signal's recursion does not settle: V / epsilon is {previous:.6g}, then {t:.6g}")
    grows = float(step(np.array([start]))[0]) > start
    ahead = grid > start if grows else grid < start
    passed = np.flatnonzero(ahead & ((after <= grid) if grows else (after >= grid)))
    if len(passed) == 0:
        return 0.0
    turn = grid[passed[0] if grows else passed[-1]]
    ratio = grid[0] / grid[1]
    low, high = (max(start, turn * ratio), turn) if grows else (turn, min(start, turn * (grid[1] / grid[0])))
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if float(step(np.array([middle]))[0]) > middle else (low, middle)
    return high


def _check(batch_size, epsilon, weight_std, start):
    """Checks what all functions take; returns batch_size as int or None."""
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be >= 0 and finite, got {epsilon}")
    choices.check_positive("weight_std", weight_std)
    choices.check_positive("start", 1.0 if start is None else start)
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
