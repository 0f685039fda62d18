"""Measurements of one network, layer by layer: pure functions, to be jitted and vmapped like any other.

A layer is named as the model names it: a weight matrix by its path in `params` without a last `kernel` (`hidden_0`,
`output`), an intermediate as `Model.layers` shows it (`hidden_0/preactivation`).
"""

import re

import jax
import jax.numpy as jnp

from bnjax.types import Model, Probe, PyTree, Snapshot


def kernels(params: PyTree, batch_stats: PyTree = ()) -> dict[str, jax.Array]:
    """The weight matrices by name: arrays of rank 2 and above, in natural order (`hidden_2` before `hidden_10`).

    Args:
      params: of a network.
      batch_stats: of the network; frozen matrices stand there.
    """
    found = {}
    for tree in (params, batch_stats):
        for path, value in jax.tree_util.tree_leaves_with_path(tree):
            if jnp.ndim(value) >= 2:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                found[name.removesuffix("/kernel")] = value
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def weights(model: Model, input_shape: tuple[int, ...]) -> Probe:
    """A probe of each weight matrix W along training.

    weight_norm: |W|, the Frobenius norm. angle: between W and the initial W, in degrees.
    effective_learning_rate: learning_rate / |W|^2, the step size that counts where a norm hides |W|: there
    the angle a step turns W by does not depend on |W| and the learning rate otherwise (van Laarhoven 2017, section 3).

    Args:
      model: the network.
      input_shape: of one example.
    """
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tuple(input_shape), 1.0))
    names = tuple(kernels(*shapes))

    def measure(snapshot: Snapshot):
        now = kernels(snapshot.params, snapshot.batch_stats)
        start = kernels(snapshot.initial_params, snapshot.initial_batch_stats)
        norms = jnp.stack([_norm(now[name]) for name in names])
        angles = jnp.stack([angle(now[name], start[name]) for name in names])
        rate = snapshot.hyper.learning_rate / norms / norms
        return {"weight_norm": norms, "angle": angles, "effective_learning_rate": rate}

    return Probe(measure, names)


def angle(a: jax.Array, b: jax.Array) -> jax.Array:
    """The angle between two arrays as vectors, in degrees: 2 atan2(|a' - b'|, |a' + b'|) of their unit vectors.

    Right for small angles, too, where the arc cosine has half the digits (Kahan 2006, "How futile are mindless
    assessments of roundoff in floating-point computation?", section 12).
    """
    a, b = a / _norm(a), b / _norm(b)
    return jnp.degrees(2 * jnp.arctan2(_norm(a - b), _norm(a + b)))


def _norm(x):
    """The Euclidean norm of all entries; of entries near the ends of float32's range, too."""
    largest = jnp.abs(x).max()
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return unit * jnp.linalg.norm((x / unit).ravel())
