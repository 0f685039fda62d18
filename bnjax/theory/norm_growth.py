"""Growth of the squared gradient norm per layer for norms other than batch normalization.

The network is h = W x, y = norm(h), x of the next layer = phi(y), with W_ij ~ N(0, weight_std^2 / fan_in), no biases,
epsilon 0, in the limit of infinite width. The gradient to h is J^T D W^T times that of the next layer's h, with
D = diag psi'(y), psi(y) = phi(scale y + bias), and J the norm's Jacobian; W is independent of what it multiplies, so

    growth = E|gradient to this layer's h|^2 / E|gradient to the next one's|^2 = weight_std^2 E[tr(J^T D^2 J)] / m,

m features normalized together. The size of h and weight_std cancel wherever a norm divides by the spread of h.

**Group normalization** (Wu & He 2018) of m features: h is Gaussian, so that its direction and its length are
independent, y is uniform on a sphere of radius sqrt(m) in d = m - 1 dimensions and J = (I - 1 1^T/m - y y^T/m) / sigma
with E[1 / sigma^2] = m / (d - 2) in units of 1 / E[h^2]. One coordinate y of it is one of a vector that is uniform on
the sphere of radius sqrt(d) in d dimensions, and

    growth = E[(d - y^2) psi'(y)^2] / ((d - 2) E[psi(y)^2]),                                                       (1)

exact for infinitely many groups. Linear and ReLU: (d - 1) / (d - 2). RMSNorm (Zhang & Sennrich 2019) removes no mean,
so d = m. An infinite group has y ~ N(0, 1) and E[psi'^2] / E[psi^2], which is 1 for ReLU.

**Layer normalization** (Ba et al. 2016) and RMSNorm over the whole width n are one group. Then (1)'s numerator and
denominator are of the same y and correlated, and the gradient to x is orthogonal to x, because the next norm does not
see the size of its input. Exactly, growth = n / (d - 2) E[(tr(D P D) - x^T D P D x / x^T x) / x^T x], P = J sigma,
whose expansion is (1) times 1 + c / n + O(1 / n^2) with c from moments of a Gaussian z:

    c = v(f, f) / E[f]^2 - v(f, g) / (E[f] E[g]) - (E[f g] - E[psi psi']^2 - E[z psi psi']^2) / (E[f] E[g]),       (2)
    f = psi(z)^2,  g = psi'(z)^2,  v(f, g) = Cov(f, g) - E[z f] E[z g] - E[(z^2 - 1) f] E[(z^2 - 1) g] / 2;

RMSNorm's has neither E[psi psi']^2 nor the terms with E[z f]. For ReLU c = 1 - 2 / pi, and 1 for RMSNorm, whose exact
growth with ReLU is infinite at every finite n: with probability n^2 2^-n / 2 two units or fewer are active.

**l_p batch norms** are in `bnjax.theory.lp_norms`.

**Norms of the kernel** have no Jacobian: growth = gain^2 E[phi'(sqrt(q) z)^2], where q is the variance of h.
Weight normalization (Salimans & Kingma 2016, g = 1) has rows of norm 1: it is no normalization at weight_std 1.
Initialized by its first batch it is batch normalization that differentiates neither statistic (`detached_batch`).
Weight standardization (Qiao et al. 2019) passes the variance of x over the features alone,
q' = gain^2 Var phi(sqrt(q) z).
"""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np

from bnjax import choices
from bnjax.theory import quadrature
from bnjax.theory.lp_norms import Layer, lp
from bnjax.theory.order_chaos import length_fixed_point, order_chaos
from bnjax.theory.quadrature import Activation

_POWERS = {"batch": 2, "l1": 1, "l2": 2, "linf": math.inf}  # of the spread over the batch
_NORMS = {  # the arguments that it takes, besides activation and weight_std
    **dict.fromkeys(_POWERS, ("batch_size", "scale", "bias")),
    **dict.fromkeys(("layer", "group", "rms"), ("num_features", "scale", "bias")),
    **dict.fromkeys(("weight", "weight_standardized", "none"), ()),
}
NAMES = tuple(_NORMS)
DATA_NORMS = tuple(name for name, arguments in _NORMS.items() if arguments)  # of the activations, not of the kernel


def growth(norm: Any, activation: Activation, weight_std: Real = 1.0, **options: Any) -> float:
    """Growth per layer of the squared gradient norm for a norm by name, or for a value that has its own theory.

    `bnjax.theory.mean_field.gradient_growth` is the function to call: it adds batch normalization at epsilon > 0.

    Args:
      norm: one of `NAMES`; or an object whose attribute `growth` is a function (activation, num_features, batch_size)
        -> float.
      activation: phi, a name or an elementwise JAX function.
      weight_std: standard deviation of the weights times sqrt(fan_in), above 0. It matters to "none" alone.
      **options: num_features, batch_size, scale, bias: those that the norm takes and that are not at their defaults.

    Returns:
      A factor without unit; of the norm itself it is the square root.

    Raises:
      ValueError: for an unknown norm, an option that it does not take, or values out of range.
    """
    choices.check_positive("weight_std", weight_std)
    if not isinstance(norm, str):
        return _own_growth(norm, activation, weight_std, **options)
    choices.check("norm", norm, NAMES)
    check_options(norm, options)
    if norm in DATA_NORMS:
        return layer(norm, activation, **options).growth
    if norm == "weight_standardized":
        return weight_standardized(activation)
    return order_chaos(activation, weight_std if norm == "none" else 1.0).chi_1


def check_options(norm: str, options: Iterable[str]) -> None:
    """Raises a ValueError unless the norm of that name takes all of these arguments."""
    for name in options:
        if name not in _NORMS[norm]:
            takes = ", ".join(_NORMS[norm]) or "no arguments besides activation and weight_std"
            raise ValueError(f"{name} is not an argument of norm {norm!r}, which takes {takes}")


def _own_growth(norm, activation, weight_std, num_features=None, batch_size=None, **others):
    if not hasattr(norm, "growth"):
        raise ValueError(f"norm must be one of {', '.join(NAMES)}, or have an attribute growth; got {norm!r}")
    if others or weight_std != 1:
        name = next(iter(others), "weight_std")
        raise ValueError(f"{name} is no argument of a norm's own growth(activation, num_features, batch_size)")
    found = None if norm.growth is None else norm.growth(activation, num_features, batch_size)
    if found is None:
        raise ValueError(f"norm {norm!r} has no theory: its growth is None")
    return float(found)


def layer(
    norm: str,
    activation: Activation,
    num_features: Real | None = None,
    batch_size: Real | None = None,
    *,
    scale: Real = 1.0,
    bias: Real = 0.0,
) -> Layer:
    """What a layer with a norm of the activations does to signals and gradients.

    Args:
      norm: "batch", "l1", "l2", "linf", "layer", "group" or "rms".
      activation: phi, a name or an elementwise JAX function.
      num_features: m. "group": of infinitely many groups, at least 4. "layer" and "rms": the whole width n, at least
        16, to the order 1 / n (`one_group`). None: infinite.
      batch_size: B of the norms over the batch (`lp`).
      scale: the norm's, the same for all features, not 0.
      bias: the norm's, the same for all features.

    Returns:
      `Layer`.

    Raises:
      ValueError: as `growth`.
    """
    choices.check("norm", norm, DATA_NORMS)
    if norm in _POWERS:
        return lp(activation, _POWERS[norm], batch_size, scale=scale, bias=bias)
    if norm == "group":
        return group(activation, num_features, scale=scale, bias=bias)
    return one_group(activation, num_features, centered=norm == "layer", scale=scale, bias=bias)


def group(
    activation: Activation,
    num_features: Real | None = None,
    *,
    centered: bool = True,
    scale: Real = 1.0,
    bias: Real = 0.0,
) -> Layer:
    """Group normalization with infinitely many groups, equation (1).

    Args:
      activation: phi, a name or an elementwise JAX function.
      num_features: m, at least 4; 3 if not centered. Below, the expected squared gradient is infinite; below 8 it is
        heavy-tailed. None: infinite.
      centered: the mean is removed. False: root mean square normalization of groups.
      scale: the norm's.
      bias: the norm's.

    Returns:
      `Layer`.

    Raises:
      ValueError: as `growth`.
    """
    d = _dimensions(num_features, centered, 4 if centered else 3, "the expected squared gradient is infinite")
    psi = quadrature.on_batch(activation, None if d is None else d + 1, scale, bias)
    if d is None:
        square, slope = (
            float(value) for value in quadrature.expect(psi, 1.0, lambda u, p, s: np.stack([p * p, s * s]))
        )
        return Layer(square, square, slope / square)

    square, slope = (
        float(value)
        for value in quadrature.expect_on_sphere(psi, d, lambda y, p, s: np.stack([p * p, (d - y * y) * s * s]))
    )
    return Layer(square, square, slope / ((d - 2) * square))


def one_group(
    activation: Activation,
    num_features: Real | None = None,
    *,
    centered: bool = True,
    scale: Real = 1.0,
    bias: Real = 0.0,
) -> Layer:
    """Layer normalization, or RMSNorm, of a network of finite width, to the order 1 / n: equations (1) and (2).

    Args:
      activation: phi, a name or an elementwise JAX function.
      num_features: n, the width of all layers, at least 16. None: infinite.
      centered: the mean is removed: layer normalization. False: RMSNorm.
      scale: the norm's.
      bias: the norm's.

    Returns:
      `Layer`.

    Raises:
      ValueError: as `growth`.
    """
    _dimensions(num_features, centered, 16, "this is an expansion in 1 / num_features")
    groups = group(activation, num_features, centered=centered, scale=scale, bias=bias)
    if num_features is None:
        return groups

    infinite = group(activation, None, scale=scale, bias=bias)

    def integrands(u, p, s):
        p, s = p / math.sqrt(infinite.variance), s / math.sqrt(infinite.growth * infinite.variance)  # E[f] = E[g] = 1
        f, g, second = p * p, s * s, (u * u - 1) / 2
        return np.stack([f * f, f * g, u * f, u * g, second * f, second * g, p * s, u * p * s])

    ff, fg, zf, zg, f_2, g_2, both, z_both = quadrature.expect(
        quadrature.on_batch(activation, None, scale, bias), 1.0, integrands
    )
    if not centered:  # the mean is not removed, nor what fluctuates with it
        zf = zg = both = 0.0
    v_ff = ff - 1 - zf * zf - 2 * f_2 * f_2
    v_fg = fg - 1 - zf * zg - 2 * f_2 * g_2
    c = v_ff - v_fg - (fg - both**2 - z_both**2)
    return groups._replace(growth=groups.growth * float(1 + c / num_features))


def _dimensions(num_features, centered, least, why):
    """D of the sphere, or None."""
    if num_features is None:
        return None
    choices.check_count("num_features", num_features)
    if num_features < least:
        raise ValueError(f"num_features must be at least {least}, got {num_features}: below, {why}")
    return int(num_features) - centered


def detached_batch(activation: Activation, batch_size: Real | None = None) -> float:
    """Growth for batch normalization whose mean and variance are constants to the gradient.

    So is weight normalization with data-dependent initialization, on the batch that initialized it: forward it is
    batch normalization, and J = I / sigma. With y one coordinate as in (1), d = B - 1:

        growth = B / (B - 3) E[phi'(y)^2] / spread,      E[phi'(z)^2] / Var phi(z) for an infinite batch.

    Args:
      activation: phi, a name or an elementwise JAX function.
      batch_size: B, at least 4. None: infinite.

    Raises:
      ValueError: as `growth`.
    """
    batch = lp(activation, 2, batch_size)
    if batch_size is None:
        return batch.growth
    d = int(batch_size) - 1
    psi = quadrature.on_batch(activation, d + 1, 1.0, 0.0)
    slope = quadrature.expect_on_sphere(psi, d, lambda y, value, slope: slope**2)
    return float((d + 1) / (d - 2) * slope / batch.variance)


def weight_standardized(activation: Activation, gain: Real | None = None) -> float:
    """Growth for kernels of zero mean and variance gain^2 / fan_in over their fan_in (Qiao et al. 2019).

    Args:
      activation: phi, a name or an elementwise JAX function.
      gain: None: that of Brock et al. 2021, 1 / sqrt(Var phi(z)), at q = 1, which it keeps: the growth is batch
        normalization's in an infinite batch, E[phi'^2] / Var phi. With activations that are steeper away from 0 (gelu,
        silu, softplus) q = 1 is unstable, and a deep network leaves it. Another gain: at the fixed point that
        q -> gain^2 Var phi(sqrt(q) z) reaches from gain^2.

    Raises:
      ValueError: as `growth`.
    """
    if gain is None:
        return lp(activation, 2).growth
    choices.check_positive("gain", gain)
    phi = quadrature.function(activation)
    _, q, _ = length_fixed_point(phi, float(gain) ** 2, 0.0, centered=True)
    phi = quadrature.with_breaks(phi, quadrature.CUT * math.sqrt(max(q, 1.0)))
    return float(gain) ** 2 * float(quadrature.expect(phi, q, lambda u, p, d: d * d))
