"""Synthetic tasks on which features must be learned."""

import numpy as np

from bnjax.types import Dataset


def sparse_parity(
    *, dimensions: int = 49, order: int = 2, train_examples: int = 10_000, test_examples: int = 1_000, seed: int = 0
) -> Dataset:
    """The sign of a product of a few inputs: label 1 where x_1 x_2 ... x_k > 0, and 0 elsewhere.

    Inputs are independent standard normals. Of order 2 it is XOR in continuous form. No single input, and no linear
    function of all of them, says anything about the label; a network has to find the k inputs that matter. Random
    features need some dimensions^k of them instead (Yehudai & Shamir 2019, Daniely & Malach 2020).

    Args:
      dimensions: D, of an example.
      order: k, how many of the inputs matter: the first ones.
      train_examples: N.
      test_examples: M.
      seed: draws the examples.

    Returns:
      A `Dataset`: train_x [N, D] and test_x [M, D], float32 of mean 0 and variance 1; train_y [N] and test_y [M],
      int32, 0 and 1 equally likely.

    Raises:
      ValueError: if a number is below 1, or `order` above `dimensions`.
    """
    for name, value in {
        "dimensions": dimensions,
        "order": order,
        "train_examples": train_examples,
        "test_examples": test_examples,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if order > dimensions:
        raise ValueError(f"order must be at most the {dimensions} dimensions, got {order}")
    rng = np.random.default_rng(seed)

    def draw(n):
        x = rng.normal(size=(n, dimensions)).astype(np.float32)
        return x, (np.sign(x[:, :order]).prod(1) > 0).astype(np.int32)

    return Dataset(*draw(train_examples), *draw(test_examples))
