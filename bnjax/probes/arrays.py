"""Spread, rank and angle of arrays, and norms that lose nothing to squares that over- or underflow."""

import math

import jax
import jax.numpy as jnp

from bnjax.types import Array


def spread(x: Array) -> jax.Array:
    """The root of the mean over units of their variance over the batch, |X - mean|_F / sqrt(N U); for X [N, ...]."""
    return norm(centred(x)) / math.sqrt(x.size)


def stable_rank(x: Array) -> jax.Array:
    """|X|_F^2 / |X|_2^2, from 1 to the rank of X: how many directions carry its energy; 0 for X = 0.

    Args:
      x: [N, ...], taken as N rows.
    """
    x = jnp.asarray(x).reshape(len(x), -1)
    size = norm(x)
    x = x / size
    gram = jnp.matmul(*((x, x.T) if x.shape[0] <= x.shape[1] else (x.T, x)), precision="highest")
    return jnp.where(size == 0, 0, 1 / _eigvalsh(gram)[-1])  # of a matrix of trace 1


def angle(a: jax.Array, b: jax.Array) -> jax.Array:
    """The angle between two arrays as vectors, in degrees: 2 atan2(|a' - b'|, |a' + b'|) of their unit vectors.

    Right for small angles, too, where the arc cosine has half the digits (Kahan 2006, "How futile are mindless
    assessments of roundoff in floating-point computation?", section 12). NaN if one of them is 0.
    """
    a, b = a / norm(a), b / norm(b)
    return jnp.degrees(2 * jnp.arctan2(norm(a - b), norm(a + b)))


# One matrix at a time, under vmap too: LAPACK on a batch may wait for ever, see `bnjax.initializers`.
_eigvalsh = jax.custom_batching.sequential_vmap(lambda matrix: jnp.linalg.eigvalsh(matrix))
_svd = jax.custom_batching.sequential_vmap(lambda matrix: jnp.linalg.svd(matrix, compute_uv=False))


def svdvals(matrix: Array) -> jax.Array:
    """Its singular values, descending."""
    unit = unit_of(matrix)
    return unit * _svd(matrix / unit)


def mean(x: Array) -> jax.Array:
    """Of all entries."""
    unit = unit_of(x)
    return unit * jnp.mean(x / unit)


def centred(x: Array) -> jax.Array:
    """Less its mean over the batch; exactly 0 in a unit that is constant."""
    x = x - x[:1]
    unit = unit_of(x)
    return x - unit * (x / unit).mean(0)


def norm(x: Array) -> jax.Array:
    """The Euclidean norm of all entries; of entries near the ends of float32's range, too."""
    unit = unit_of(x)
    return unit * jnp.linalg.norm((x / unit).ravel())


def unit_of(x: Array) -> jax.Array:
    """The largest magnitude, to be divided by; 1 if that cannot be."""
    largest = jnp.abs(x).max()
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
