"""The sweeps that are measured: many networks of one kind, each with its own initialization, on the same data.

hidden layers without bias, batch normalization (with running statistics) before the activation, an output layer
with bias; He normal kernels; SGD with momentum on mini-batches in the order of a new shuffle each epoch.
"""

from types import MappingProxyType
from typing import NamedTuple

import numpy as np

EXAMPLES, TEST_EXAMPLES = 10_000, 1_000
LEARNING_RATE, MOMENTUM = 0.1, 0.9  # the optimizer's
BN_MOMENTUM, EPSILON = 0.9, 1e-5  # the weight of the OLD running statistics


class Workload(NamedTuple):
    """One kind of network, and how much of it is trained in one measurement."""

    sizes: tuple[int, ...]  # input, hidden layers, outputs
    batch_size: int
    activation: str
    cells_per_core: int
    steps: int
    aim: float  # the share of the matrix products' speed that a sweep should reach

    @property
    def features(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return self.sizes[1:-1]


# Cells and steps: two to four seconds a measurement of bnjax on two cores.
ALL = MappingProxyType(
    {
        "784-128x3-10": Workload((784, 128, 128, 128, 10), 128, "relu", 16, 200, 0.75),
        "64-128x4-10": Workload((64, 128, 128, 128, 128, 10), 64, "relu", 16, 600, 0.75),
        "64-32x3-10": Workload((64, 32, 32, 32, 10), 32, "relu", 64, 1600, 0.60),
        "784-512x3-10": Workload((784, 512, 512, 512, 10), 256, "relu", 4, 80, 0.75),
        "784-100x3-10-sigmoid": Workload((784, 100, 100, 100, 10), 60, "sigmoid", 16, 400, 0.60),
    }
)
SMALLEST = "64-32x3-10"


def data(workload: Workload) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """train_x, train_y, test_x, test_y: random, the same at each call."""
    rng = np.random.default_rng(0)

    def split(examples):
        x = rng.standard_normal((examples, workload.sizes[0]), np.float32)
        return x, rng.integers(workload.sizes[-1], size=examples, dtype=np.int32)

    return *split(EXAMPLES), *split(TEST_EXAMPLES)


def batches(workload: Workload, steps: int) -> np.ndarray:
    """[steps, batch_size] int32: the examples of each mini-batch, a new shuffle each epoch."""
    rng = np.random.default_rng(1)
    an_epoch = EXAMPLES // workload.batch_size
    epochs = [rng.permutation(EXAMPLES) for _ in range(-(-steps // an_epoch))]
    whole = np.stack(epochs)[:, : an_epoch * workload.batch_size]
    return whole.reshape(-1, workload.batch_size)[:steps].astype(np.int32)
