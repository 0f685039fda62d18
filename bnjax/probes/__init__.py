"""Measurements of one network, layer by layer: pure functions, to be jitted and vmapped like any other.

A layer is named as the model names it: a weight matrix by its path in `params` without a last `kernel` (`hidden_0`,
`output`), an intermediate as `Model.layers` shows it (`hidden_0/preactivation`).

    kernels, weights                  weight matrices, of any `bnjax.Model`
    signals, gradients, flow          its intermediates, and the gradients to them and to the matrices: their norms
    derivatives                       the gradients themselves
    first_step                        what one step does to each weight matrix
    singular_values                   of the Jacobian between two intermediates, over the whole batch
    spread, stable_rank, angle        of arrays

They take whatever `bnjax.as_model` does. Where a model has no `layers` of its own, its intermediates are read off its
trace (`bnjax.tracing`). With N examples in the batch, an intermediate is [N, ...], and its U units are the entries of
one example (in an image, each position of each channel).
"""

from bnjax.probes.arrays import angle, spread, stable_rank
from bnjax.probes.backward import (
    LARGEST_JACOBIAN,
    Derivatives,
    FirstStep,
    Gradients,
    derivatives,
    first_step,
    gradients,
    singular_values,
)
from bnjax.probes.forward import Signal, signals
from bnjax.probes.reading import kernels
from bnjax.probes.runs import flow, shapes, weights

__all__ = [
    "LARGEST_JACOBIAN",
    "Derivatives",
    "FirstStep",
    "Gradients",
    "Signal",
    "angle",
    "derivatives",
    "first_step",
    "flow",
    "gradients",
    "kernels",
    "shapes",
    "signals",
    "singular_values",
    "spread",
    "stable_rank",
    "weights",
]
