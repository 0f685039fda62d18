"""Signals and gradients by depth in residual networks: polynomial with a norm, faster without.

Pre-activation blocks x_{l+1} = x_l + alpha W phi(norm(x_l)), W_ij ~ N(0, weight_std^2 / n), no biases, epsilon 0, of
infinite width n, x_0 Gaussian. Independent branches add their variances and squared gradients. With Delta the variance
that a branch adds and g the norm's growth per layer of a network without skip connections
(`bnjax.theory.norm_growth`), a norm of the activations, which divides by the size of x_l, gives

    V_l = V_0 + l Delta,    Delta = alpha^2 weight_std^2 E[phi(y)^2]    (batch norms: the variance over the batch)
    E|gradient to x_l|^2 / E|gradient to x_{l+1}|^2 = 1 + g^k Delta / V_l

for branches of k layers, each W phi(norm(.)). The product from l to L is, with r = V_0 / Delta,

    Gamma(L + r + g^k) Gamma(l + r) / (Gamma(L + r) Gamma(l + r + g^k)) ~ ((L + r) / (l + r))^(g^k),

so the exponent of depth is what the growth per layer is without skip connections: 1 for layer normalization and ReLU,
pi / (pi - 1) for batch normalization. For V_l see De & Smith 2020, "Batch Normalization Biases Residual Blocks Towards
the Identity Function in Deep Networks"; for networks without a norm Yang & Schoenholz 2017, "Mean Field Residual
Networks: On the Edge of Chaos". Norms of the kernel and no norm have, with q_0 = V_l and j = 1, ..., k,

    q_j = s^2 E[phi(sqrt(q_{j-1}) z)^2],    V_{l+1} = V_l + alpha^2 q_k,
    E|gradient to x_l|^2 / E|gradient to x_{l+1}|^2 = 1 + alpha^2 prod_j s^2 E[phi'(sqrt(q_{j-1}) z)^2],

s = weight_std, 1 with weight normalization; with weight standardization s is Brock et al.'s gain and the variance
of phi stands for E[phi^2]. He's weights, ReLU and alpha = 1 double both in every block; with a bounded activation V_l
grows like l, and the gradient like exp(c sqrt(L)).

alpha = 0 is the identity: SkipInit (De & Smith 2020) and Fixup (Zhang et al. 2019) at initialization.

In a finite batch of a norm over the batch this is exact for a gradient that sums to 0 over the batch, as that which
comes through a norm behind the last block does.
"""

import math
from numbers import Real
from typing import NamedTuple

import numpy as np

from bnjax import choices
from bnjax.theory import norm_growth, quadrature


class ResidualSignal(NamedTuple):
    """A residual network of L blocks. Index l is before block l, L after the last one."""

    variance: np.ndarray  # [L + 1], of a feature of x_l: V_l; over the batch for norms over the batch
    second_moment: np.ndarray  # [L + 1], of a feature of x_l, the mean over the batch included
    growth: np.ndarray  # [L], of the squared gradient norm, from behind block l to before it
    squared_gradient: np.ndarray  # [L + 1], relative to that behind the last block


def residual_signal(
    activation: quadrature.Activation,
    depth: Real,
    *,
    norm: str = "batch",
    branch_scale: Real = 1.0,
    weight_std: Real = 1.0,
    layers_per_branch: Real = 1,
    batch_size: Real | None = None,
    num_features: Real | None = None,
    start: Real = 1.0,
) -> ResidualSignal:
    """Signal and squared gradient by block (module docstring).

    Args:
      activation: phi, a name or an elementwise JAX function.
      depth: L, the number of blocks, at least 1.
      norm: a name of `bnjax.theory.norm_growth.NAMES`, in front of each activation, or of each kernel.
      branch_scale: alpha, 0 for SkipInit and Fixup at initialization.
      weight_std: standard deviation of the weights times sqrt(fan_in), above 0; sqrt(2) for He's. Norms of the kernel
        do not see it.
      layers_per_branch: k, at least 1.
      batch_size: B, of norms over the batch. None: infinite.
      num_features: m of "group". None: infinite. (`norm_growth.one_group` is of networks without skip connections.)
      start: V_0, above 0; samples of x_0 are uncorrelated.

    Returns:
      `ResidualSignal`.

    Raises:
      ValueError: as `bnjax.theory.mean_field.gradient_growth`, and for a signal that outgrows 1e100.
    """
    choices.check("norm", norm, norm_growth.NAMES)
    for name, value in {"weight_std": weight_std, "start": start}.items():
        choices.check_positive(name, value)
    for name, value in {"depth": depth, "layers_per_branch": layers_per_branch}.items():
        choices.check_count(name, value)
    if not math.isfinite(branch_scale):
        raise ValueError(f"branch_scale must be finite, got {branch_scale}")
    if num_features is not None and norm != "group":
        raise ValueError(f"num_features is an argument of norm 'group' alone, not of {norm!r}")
    given = {"batch_size": batch_size, "num_features": num_features}
    options = {name: value for name, value in given.items() if value is not None}
    norm_growth.check_options(norm, options)
    depth, k, share = int(depth), int(layers_per_branch), float(branch_scale) ** 2
    if norm in norm_growth.DATA_NORMS:
        layer = norm_growth.layer(norm, activation, **options)
        share *= float(weight_std) ** 2
        blocks = np.arange(depth + 1)
        variance = start + blocks * share * layer.variance
        second_moment = start + blocks * share * layer.second_moment
        growth = 1 + layer.growth**k * share * layer.variance / variance[:-1]
    else:
        variance, growth = _without_norm(activation, norm, depth, k, share, float(weight_std), float(start))
        second_moment = variance
    squared_gradient = np.r_[np.cumprod(growth[::-1])[::-1], 1.0]
    return ResidualSignal(variance, second_moment, growth, squared_gradient)


def _without_norm(activation, norm, depth, k, share, weight_std, start):
    """V_l [L + 1] and the factors of the squared gradient [L], block by block."""
    centered = norm == "weight_standardized"
    phi, covered = quadrature.function(activation), 0.0
    gain = {"none": weight_std**2, "weight": 1.0}.get(norm)
    if gain is None:
        gain = 1 / norm_growth.layer("batch", activation).variance
    variance, growth = [start], []
    for _ in range(depth):
        q, slopes = variance[-1], 1.0
        for _ in range(k):
            if not q < 1e100:
                raise ValueError(f"the signal's variance is {q:.3g} in block {len(growth)}, beyond 1e100")
            if q > covered:
                covered = 100 * q
                phi = quadrature.with_breaks(phi, quadrature.CUT * math.sqrt(covered))
            square, slope = (float(value) for value in quadrature.expect(phi, q, _squares))
            if centered:
                square = float(quadrature.moments(phi, None, np.array([math.sqrt(q)]))[0, 0])
            q, slopes = gain * square, slopes * gain * slope
        variance.append(variance[-1] + share * q)
        growth.append(1 + share * slopes)
    return np.array(variance), np.array(growth)


def _squares(u, value, slope):
    return np.stack([value**2, slope**2])
