"""To and from PyTorch's state dicts, as NumPy arrays: of a BN layer, and of a whole mlp. PyTorch is not imported.

    BN layer    weight, bias, running_mean, running_var, num_batches_tracked, as `torch.nn.BatchNorm1d` has it
    mlp         a `torch.nn.Sequential` of nothing but Linear, BatchNorm1d and activation for each hidden layer (in
                the order of `norm_position`; two modules where norm="none"), and a last Linear. The activation
                (Identity for "linear", GELU(approximate="tanh") for "gelu") counts, but has no entries.

        torch.nn.Sequential(                        bnjax.mlp(features=(64,), num_outputs=10)
            torch.nn.Linear(784, 64, bias=False),   0.weight [64, 784] = hidden_0/kernel transposed
            torch.nn.BatchNorm1d(64),               1.weight, 1.bias = scale, bias; 1.running_mean, ...
            torch.nn.ReLU(),
            torch.nn.Linear(64, 10),                3.weight, 3.bias
        )

Its inputs are [N, D]: where examples are images, flatten them as the mlp does, in the order of their axes.

Conventions: kernels are transposed. PyTorch's momentum is the weight of the NEW value (`momentum_to_torch`).
Its running variances average the batches' unbiased variances, ours the biased ones. Stored values are carried
over as they are, so that evaluation gives the same outputs; `batch_norm.apply(..., unbiased=True)`
continues PyTorch's average as PyTorch would.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax.interop import entries
from bnjax.types import BatchNormParams, BatchStats, Model, PyTree

BATCH_NORM_NAMES = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}


def momentum_to_torch(momentum: float | None) -> float | None:
    """`1 - momentum`, the weight of the new value. None, the average over all batches, is the same in both."""
    return None if momentum is None else 1 - momentum


def momentum_from_torch(momentum: float | None) -> float | None:
    """`1 - momentum`, the weight of the old value; None for None."""
    return momentum_to_torch(momentum)


def to_torch(params: BatchNormParams, stats: BatchStats) -> dict[str, np.ndarray]:
    """The state dict of a `torch.nn.BatchNorm1d` (or 2d, 3d).

    Load it with `layer.load_state_dict({name: torch.from_numpy(value) for name, value in result.items()})`.

    Args:
      params: scale and bias, [C]; None for one that is not used. Where only the scale is not, it becomes
        a weight of ones, for PyTorch has no bias without a weight.
      stats: running mean and variance [C], count [].

    Returns:
      Copies: "weight" and "bias" (without what is not used), "running_mean", "running_var" and, in int64,
      "num_batches_tracked". bfloat16 becomes float32, as NumPy has no bfloat16 that PyTorch would read.
    """
    scale, bias = params
    if scale is None and bias is not None:
        scale = jnp.ones_like(bias)
    values = {"scale": scale, "bias": bias, **stats._asdict()}
    return {
        theirs: _to_numpy(ours, values[ours]) for ours, theirs in BATCH_NORM_NAMES.items() if values[ours] is not None
    }


def from_torch(state_dict: Mapping[str, Any]) -> tuple[BatchNormParams, BatchStats]:
    """The parameters and statistics in the state dict of a `torch.nn.BatchNorm1d` (or 2d, 3d).

    Args:
      state_dict: as `to_torch` returns it; its values may be PyTorch's tensors on the CPU.

    Returns:
      Parameters [C] (None for one that is not there) and statistics [C], [C] and [], of the dtypes given (float64
      only with x64 on, as everywhere in JAX).

    Raises:
      ValueError: for a missing or unexpected entry, or one of another shape than [C].
    """
    shape = np.shape(state_dict.get("running_mean", state_dict.get("running_var")))
    used = [name for name in ("weight", "bias") if name in state_dict]
    expected = {**dict.fromkeys([*used, "running_mean", "running_var"], shape), "num_batches_tracked": ()}
    entries.check("the state dict of a PyTorch BatchNorm", state_dict, expected)
    scale, bias, mean, var, count = (
        _from_numpy(ours, state_dict[theirs]) if theirs in state_dict else None
        for ours, theirs in BATCH_NORM_NAMES.items()
    )
    return BatchNormParams(scale, bias), BatchStats(mean, var, count)


def mlp_to_torch(model: Model, params: PyTree, batch_stats: PyTree) -> dict[str, np.ndarray]:
    """The state dict of the `torch.nn.Sequential` that computes what the mlp does.

    Args:
      model: from `bnjax.mlp`.
      params: of `model`, or a gradient with respect to them.
      batch_stats: of `model`. A frozen kernel becomes a weight as any other.

    Returns:
      Copies, by the names at the top of this module; dtypes as in `to_torch`.

    Raises:
      ValueError: if the parameters or statistics are not those of `model`.
    """
    given = entries.checked(model, params, batch_stats)
    return {_torch_name(model, name): _to_numpy(name, value) for name, value in given.items()}


def mlp_from_torch(model: Model, state_dict: Mapping[str, Any]) -> tuple[PyTree, PyTree]:
    """The parameters and statistics of an mlp in the state dict of a `torch.nn.Sequential`.

    Args:
      model: from `bnjax.mlp`, of the same layers. It has a bias in its hidden layers (`use_bias=True`) if the
        PyTorch network has.
      state_dict: as `mlp_to_torch` returns it; its values may be PyTorch's tensors on the CPU.

    Returns:
      `(params, batch_stats)` as `model.apply` takes them, of the dtypes given (float64 only with x64 on).

    Raises:
      ValueError: if `state_dict` does not fit `model`; the message lists what is missing, unexpected or ill-shaped.
    """
    fan_in = (np.shape(state_dict.get("0.weight")) or (1,))[-1]
    shapes = entries.shapes(model, fan_in)
    expected = {_torch_name(model, name): shape[::-1] for name, shape in shapes.items()}
    entries.check("the state dict of a PyTorch network", state_dict, expected)
    return entries.build(model, fan_in, lambda name: _from_numpy(name, state_dict[_torch_name(model, name)]))


def _torch_name(model, name):
    """The name in a Sequential of an entry of an mlp."""
    layer, part, leaf = entries.dense_and_norm(model, name)
    modules = 2 if model.config["norm"] == "none" else 3  # of a hidden layer
    if part == "dense":
        return f"{modules * layer}.{'weight' if leaf == 'kernel' else leaf}"
    place = 1 if model.config["norm_position"] == "before_activation" else 2
    return f"{modules * layer + place}.{BATCH_NORM_NAMES[leaf]}"


def _to_numpy(name, value):
    """A copy that PyTorch can read and write, with its type for a count and its order of axes for a kernel."""
    value = np.asarray(value)
    if name.endswith("count"):
        return np.array(value, np.int64)
    dtype = np.float32 if value.dtype == jnp.bfloat16 else value.dtype
    return np.array(value.T if name.endswith("kernel") else value, dtype, order="C")


def _from_numpy(name, value):
    value = np.asarray(value)
    if name.endswith("count"):
        return jnp.asarray(np.minimum(value, np.iinfo(np.int32).max), jnp.int32)
    return jnp.asarray(value.T if name.endswith("kernel") else value)
