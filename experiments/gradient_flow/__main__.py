"""Do large initial weights make the gradient explode, with batch normalization (BN) or without? Layer by layer.

    python -m experiments.gradient_flow                    # all claims
    python -m experiments.gradient_flow --claims=slopes    # some

    slopes    gradients as powers of init_scale, over 12 decades; without BN also where they are exactly 0
    signals   signals, gradients and Jacobians layer by layer, at a few scales of the initial weights
    training  gradients and weights along a short training

Networks of 3 and 6 layers on one batch of Fashion-MNIST, at initialization; a minute on 2 cores. Expect, on logarithmic
axes against init_scale, from 30 times the scale at which BN's epsilon stops mattering: with BN slope -1 of the weights'
gradient and 0 of what passes from layer to layer; without BN, for ReLU, the number of other scaled layers; for tanh and
sigmoid a gradient that grows, then is exactly 0.

The gradient is that of <c, outputs>, c a fixed random cotangent, so that it shows the network alone: the gradient of a
cross-entropy to the outputs changes with their size, and is 0 where the softmax saturates (--loss=cross_entropy).
"""

from collections.abc import Sequence

from absl import app

import bnjax
from bnjax import probes
from experiments import claim, gradient_flow
from experiments.gradient_flow.common import Settings, first_scale


def data(settings: Sequence[Settings]) -> bnjax.Dataset:
    """The images; raises ValueError, naming the flag, for what they or the theory do not allow."""
    one, ds = settings[0], bnjax.data.load("fashion_mnist_mini")
    for field in ("batch_size", "jacobian_examples"):
        if getattr(one, field) > len(ds.train_x):
            raise ValueError(f"--{field} must be at most {len(ds.train_x)}, got {getattr(one, field)}")
    entries = one.jacobian_examples**2 * one.hidden_width * max(one.hidden_width, ds.train_x[0].size)
    if entries > probes.LARGEST_JACOBIAN:
        raise ValueError(
            f"--jacobian_examples={one.jacobian_examples} with --hidden_width={one.hidden_width} makes Jacobians of "
            f"{entries} entries, more than {probes.LARGEST_JACOBIAN}"
        )
    start = max(first_scale(one, name, norm) for name in one.activations for norm in one.norms)
    if sum(scale >= start for scale in one.init_scales) < 2:
        raise ValueError(f"--init_scales must have 2 values from {start:.3g} upward, where epsilon does not matter")
    return ds


main = claim.script("gradient_flow", gradient_flow.CLAIMS, data)

if __name__ == "__main__":
    app.run(main)
