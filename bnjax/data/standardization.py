"""Inputs of mean 0 and standard deviation 1.

    x_hat = (x - mean) / std,    mean = E[x],    std = sqrt(E[(x - mean)^2])

with the expectations over the TRAINING examples: over all of their entries (`per="dataset"`), or for
each feature on its own (`per="feature"`). There is no epsilon: what is constant becomes exactly 0.
"""

from collections.abc import Iterator

import numpy as np

from bnjax import choices
from bnjax.types import Dataset

PER = ("dataset", "feature")
_CHUNK_ENTRIES = 1 << 20  # so that the float64 temporaries stay at a few MB


def standardize(ds: Dataset, per: str = "dataset") -> Dataset:
    """Standardizes inputs with the statistics of `ds`'s training examples.

    Args:
        ds: train_x [N, ...] and test_x [M, ...], real numbers of any dtype; train_y [N] and test_y [M],
            integers >= 0. M may be 0.
        per: "dataset": one mean and one standard deviation for all entries; "feature": one for each
            entry of an example. A feature that is constant over the training examples becomes 0 in
            both splits.

    Returns:
        A new `Dataset` of the same shapes: x float32, y int32. Statistics are accumulated in float64.

    Raises:
        ValueError: `per` is unknown; the shapes do not fit together; there are no training examples;
            labels are not integers >= 0; a result is not finite.
    """
    choices.check("standardization", per, PER)
    train_x, train_y, test_x, test_y = map(np.asarray, ds)
    _check_shapes(train_x, train_y, test_x, test_y)
    offset, mean, inverse_std = _statistics(train_x, per)

    def apply(name: str, x: np.ndarray) -> np.ndarray:
        out = np.empty(x.shape, np.float32)
        for rows in _chunks(x):
            # First the offset, as for the statistics, so that a constant feature is exactly 0.
            out[rows] = (x[rows].astype(np.float64) - offset - mean) * inverse_std
            if not np.isfinite(out[rows]).all():
                raise ValueError(f"{name}: the standardized inputs are not finite")
        return out

    return Dataset(
        apply("train_x", train_x), _as_labels("train_y", train_y), apply("test_x", test_x), _as_labels("test_y", test_y)
    )


def _statistics(x: np.ndarray, per: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first example(s), the mean of the differences from it, and 1/std, or 0 where std is 0.

    Differences from a valid sample are exactly 0 where the data are constant, and small where the
    data are far from zero. The second pass is over the differences from the mean.
    """
    axes = tuple(range(x.ndim)) if per == "dataset" else 0
    offset = np.asarray(x.flat[0] if per == "dataset" else x[0], np.float64)
    count = x.size if per == "dataset" else len(x)
    with np.errstate(invalid="ignore", over="ignore"):  # reported by the caller, by name
        total = sum((x[rows].astype(np.float64) - offset).sum(axis=axes) for rows in _chunks(x))
        mean = np.asarray(total / count)
        squares = sum(np.square(x[rows].astype(np.float64) - offset - mean).sum(axis=axes) for rows in _chunks(x))
        std = np.sqrt(squares / count)
    if not np.isfinite(std).all():
        raise ValueError("train_x: the standard deviation is not finite")
    return offset, mean, np.divide(1.0, std, out=np.zeros_like(mean), where=std > 0)


def _chunks(x: np.ndarray) -> Iterator[slice]:
    """Slices of examples, about `_CHUNK_ENTRIES` entries each."""
    rows = max(1, _CHUNK_ENTRIES // max(1, x[:1].size))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def _check_shapes(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> None:
    """Raises a ValueError that names the arrays which do not fit together."""
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim < 1 or y.shape != (len(x),):
            raise ValueError(f"{name}_x has shape {x.shape} and {name}_y {y.shape}; expected [N, ...] and [N]")
    if train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(f"one example is {train_x.shape[1:]} in train_x but {test_x.shape[1:]} in test_x")
    if not train_x.size:
        raise ValueError(f"train_x has shape {train_x.shape}: there are no training examples")


def _as_labels(name: str, y: np.ndarray) -> np.ndarray:
    """`y` as int32."""
    if y.dtype.kind not in "iu" or (y.size and not 0 <= y.min() <= y.max() <= np.iinfo(np.int32).max):
        raise ValueError(f"{name} must hold integers >= 0 (class numbers); its dtype is {y.dtype}")
    return y.astype(np.int32)
