"""Integrals of activations and their derivatives over Gaussian pre-activations: quadrature in float64 on the host.

Activations are names (`bnjax.activations`) or elementwise JAX functions, smooth but for some kinks, which are found.
Between kinks there are panels of Gauss-Legendre nodes, twice as many until that changes nothing.
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
CUT = 12.0  # standard deviations; the normal density beyond is below 1e-31
PARTS = 6  # panels of [-CUT, CUT] at least
_CHUNK = 8192  # nodes evaluated in one call


class Function(NamedTuple):
    """psi(z) = phi(scale z + bias)."""

    evaluator: Callable[..., Any]
    scale: float
    bias: float
    breaks: np.ndarray | None  # [K], where psi or a derivative of it jumps, ascending


# Integrals.


def moments(psi: Function, B: int | None, rho: np.ndarray) -> np.ndarray:
    """[2, M]: `spread` and `slope` of batch normalization (`bnjax.theory.mean_field`) at each rho [M]."""

    def integral(rho, n):
        return _normal_integrands(psi, rho, n)[1].sum(2) if B is None else _sphere_moments(psi, B, rho, n)

    parts = np.array_split(rho, -(-len(rho) // 8))
    return converge(lambda n: np.concatenate([integral(part, n) for part in parts], 1))


def converge(integral: Callable[[int], Any]) -> Any:
    """integral(n) for as many nodes n a panel as it takes until doubling them changes nothing.

    Raises:
      ValueError: if it still changes at the largest number.
    """
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


def panels(edges: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on the last axis [..., E n - n] of n-point quadrature between neighbouring edges [..., E].

    Gauss-Legendre nodes, crowded quadratically at the edges, where square roots may end.
    """
    x, w = _legendre(n)
    fraction, weight = (2 + 3 * x - x**3) / 4, 0.75 * (1 - x**2) * w
    width = np.diff(edges)[..., None]
    nodes = edges[..., :-1, None] + width * fraction
    return nodes.reshape(*edges.shape[:-1], -1), (width * weight).reshape(*edges.shape[:-1], -1)


_legendre = functools.cache(np.polynomial.legendre.leggauss)  # 3 ms at 96 nodes, two thirds of an integral's time


def gaussian(kinks: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes u and weights, both [..., N], for integrals over exp(-u^2 / 2) between `kinks` [..., K]."""
    u, weights = panels(_edges(kinks, CUT, PARTS), n)
    return u, weights * np.exp(-(u**2) / 2)


def expect(psi: Function, q: float, integrands: Callable[..., Any]) -> Any:
    """E[integrands(u, psi(sqrt(q) u), psi'(sqrt(q) u))], u ~ N(0, 1): a number, or an array if they have more axes.

    Their last axis is u's.
    """

    def integral(n):
        u, weights = gaussian(psi.breaks / math.sqrt(q), n)
        return (weights / math.sqrt(2 * math.pi) * integrands(u, *evaluate(psi, math.sqrt(q) * u))).sum(-1)

    return converge(integral)


def expect_on_sphere(psi: Function, dimensions: int, integrands: Callable[..., Any]) -> Any:
    """As `expect` with q = 1, but u is one coordinate of a vector that is uniform on a sphere.

    u = radius sin(theta), of density cos(theta)^(dimensions - 2), where radius^2 = dimensions, so that E[u^2] = 1.
    """
    radius = math.sqrt(dimensions)
    limit = math.asin(min(1.0, CUT / radius))
    parts = 2 * math.ceil(min(1.0, radius / CUT) * PARTS / 2)
    edges = _edges(np.arcsin(np.clip(psi.breaks / radius, -1, 1)), limit, parts)

    def integral(n):
        theta, weights = panels(edges, n)
        weights = weights * np.cos(theta) ** (dimensions - 2)
        u = radius * np.sin(theta)
        return (weights / weights.sum() * integrands(u, *evaluate(psi, u))).sum(-1)

    return converge(integral)


def _edges(inner, limit, parts):
    """`inner` [..., K] within [-limit, limit] and the edges of equal parts, in order; no panel is empty everywhere."""
    inner = np.clip(inner, -limit, limit)
    equal = np.broadcast_to(np.linspace(-limit, limit, parts + 1), (*inner.shape[:-1], parts + 1))
    edges = np.sort(np.concatenate([equal, inner], -1), -1)
    filled = (np.diff(edges) > 0).reshape(-1, edges.shape[-1] - 1).any(0)
    return edges[..., np.r_[True, filled]]


def _normal_integrands(psi, rho, n):
    """Nodes u [M, N] and what to sum over them, [2, M, N], for Var psi(rho u) and E[psi'(rho u)^2], u ~ N(0, 1)."""
    u, weights = gaussian(psi.breaks / rho[:, None], n)
    weights /= weights.sum(1, keepdims=True)
    value, slope = evaluate(psi, rho[:, None] * u)
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
    limit = math.asin(min(1.0, CUT / radius))
    parts = 2 * math.ceil(min(1.0, radius / CUT) * PARTS / 2)
    kinks = psi.breaks / (rho[:, None] * radius)  # [M, K]
    # z_a or an end of z_b's range on a kink
    ends = np.arccos(np.clip(np.concatenate([kinks, -kinks], 1), -1, 1))
    signs = np.sign(np.arange(ends.shape[1]) - kinks.shape[1] + 0.5)
    inner = np.concatenate([np.arcsin(np.clip(kinks, -1, 1)), ends + signs * shift, -ends + signs * shift], 1)
    theta, outer = panels(_edges(inner, limit, parts), n)  # [M, T]
    outer = outer * np.cos(theta) ** (B - 3)
    a, across = np.sin(theta)[:, :, None], math.cos(shift) * np.cos(theta)[:, :, None]
    eta, weights = panels(_edges(np.arcsin(np.clip((kinks[:, None] - c * a) / across, -1, 1)), limit, parts), n)
    weights = outer[:, :, None] * weights * np.cos(eta) ** (B - 4)  # [M, T, H]
    weights /= weights.sum((1, 2), keepdims=True)
    b = c * a + across * np.sin(eta)
    z = radius * rho[:, None, None]
    value_a, slope_a = evaluate(psi, z * a)
    value_b, slope_b = evaluate(psi, z * b)
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


def interpolant(function: Callable, edges: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """An interpolant of function: rho [M] -> [2, M] on [0, 1], which is analytic between `edges`.

    To the right of an edge it goes on in powers of sqrt(rho - edge).
    """
    pieces = [_piece(function, low, high, 2 if low > 0 else 1) for low, high in itertools.pairwise(edges)]

    def table(rho):
        found = np.empty((2, *rho.shape))
        index = np.searchsorted(edges[1:-1], rho)
        for i, piece in enumerate(pieces):
            found[:, index == i] = piece(rho[index == i])
        return found

    return table


def _piece(function, low, high, power):
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
            return lambda rho: np.polynomial.chebyshev.chebval(2 * ((rho - low) / (high - low)) ** (1 / power) - 1, fit)
    raise ValueError("the activation's moments do not converge as functions of the signal's size")


# The activation as a function of float64 numbers on the host.


def kept(make: Callable) -> Callable:
    """The same function, which keeps what it made of its latest arguments, if they can be hashed."""
    keeping = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make)
    def call(*arguments):
        try:
            hash(arguments)
        except TypeError:
            return make(*arguments)
        return keeping(*arguments)

    return call


@kept
def _compiled(activation):
    """A function z -> (phi(z), phi'(z)) of z [_CHUNK]."""
    phi = activations.get(activation) if isinstance(activation, str) else activation
    return jax.jit(lambda z: jax.jvp(phi, (z,), (jnp.ones_like(z),)))


def function(activation: Activation, scale: Real = 1.0, bias: Real = 0.0) -> Function:
    """The function psi, its kinks not yet found."""
    return Function(_compiled(activation), float(scale), float(bias), None)


@kept
def on_batch(activation: Activation, B: int | None, scale: Real, bias: Real) -> Function:
    """The function psi and its kinks, checked on the range of batch normalization's outputs.

    Raises:
      ValueError: if it has no finite `moments` there, or no growth.
    """
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    if not math.isfinite(bias):
        raise ValueError(f"bias must be finite, got {bias}")
    limit = CUT if B is None else min(CUT, math.sqrt(B - 1))
    psi = with_breaks(function(activation, scale, bias), limit)
    # At rho = 1 only, where BN's outputs range furthest: a small signal may well stay on one side of all kinks.
    one = np.ones(1)
    if B is None:
        u, integrands = _normal_integrands(psi, one, 48)
        if ((integrands * (np.abs(u) > CUT - 2)).sum(2) > TOLERANCE * integrands.sum(2)).any():
            raise ValueError("the activation grows too fast for its variance under a normal distribution")
    spread, slope = moments(psi, B, one)
    if spread <= 1e-24 * slope:
        raise ValueError("the activation is constant on the quadrature's range: its growth is not defined")
    return psi


def evaluate(psi: Function, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
        raise ValueError("the activation must be an elementwise JAX function: its output has another shape or type")
    value, slope = (np.concatenate(part)[: flat.size].astype(float) for part in zip(*found, strict=True))
    bad = ~(np.isfinite(value) & np.isfinite(slope))
    if bad.any():
        raise ValueError(
            f"the activation or its derivative is not finite at {flat[bad][0]:.6g}, within the quadrature's range "
            f"[{flat.min():.4g}, {flat.max():.4g}]"
        )
    return value.reshape(z.shape), psi.scale * slope.reshape(z.shape)


def with_breaks(psi: Function, limit: float) -> Function:
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
    slopes = np.polynomial.legendre.legval(x, np.polynomial.legendre.legder(np.eye(8))).T
    derivative = slopes @ np.linalg.inv(vandermonde)
    edges = np.linspace(-limit, limit, 62)  # an odd number of panels, so that 0 lies within one
    left, width = edges[:-1], edges[1] - edges[0]
    value, slope = evaluate(psi, left[:, None] + width * (x + 1) / 2)  # [panel, node]
    size_of_value, size_of_slope = np.abs(value).max(), 0.0
    rough = []  # (centre, width)
    while len(left) and width > 1e-14 * limit:
        if len(left) > 4096:
            raise ValueError("the activation is not smooth between a few kinks: it cannot be integrated")
        density = np.exp(-((left + width / 2) ** 2) / 4)  # what lies far out must not hide a kink
        size_of_slope = max(size_of_slope, float((density * np.abs(slope).max(1)).max()))
        size = np.abs(slope).max(1, keepdims=True) + 1e-6 * size_of_slope
        inner = left[:, None] + width / parts * np.arange(parts)
        value_in, slope_in = evaluate(psi, inner[:, :, None] + width / parts * (x + 1) / 2)
        off = np.abs((slope @ to_children.T).reshape(slope_in.shape) - slope_in).max((1, 2), keepdims=True)[:, 0]
        smooth = (off <= 1e-7 * size)[:, 0]
        noise = 1e-13 * size_of_value / width
        wrong = smooth & (np.abs(value @ derivative.T * (2 / width) - slope).max(1) > 1e-5 * size[:, 0] + 100 * noise)
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
        sides, slopes = evaluate(psi, breaks[:, None] + step * np.array([-1, 1]))
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
    for alone, beside in zip(evaluate(psi, z), evaluate(psi, among_others), strict=True):
        if not np.allclose(alone[order][kept], beside[kept], rtol=1e-6, atol=1e-9 * np.abs(alone).max()):
            raise ValueError("the activation is not elementwise: its values depend on the other entries")
