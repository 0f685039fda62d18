"""Shared by the conversions: the entries of an mlp by name, and dictionaries held to what is expected.

An entry's name is its path in `{"params": ..., "batch_stats": ...}`, such as `params/hidden_0/norm/scale`.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.types import Model, PyTree


def template(model: Model, fan_in: int) -> dict[str, PyTree]:
    """`{"params": ..., "batch_stats": ...}` of an mlp with shapes in the place of arrays.

    Args:
      model: from `bnjax.mlp`.
      fan_in: the number of inputs.

    Raises:
      ValueError: if `model` is not an mlp, or has another norm than batch normalization or none.
    """
    if model.config.get("model") != "mlp":
        raise ValueError(f"model must come from bnjax.mlp, got one with config {dict(model.config)}")
    if model.config["norm"] not in ("batch", "none"):
        raise ValueError(f"only batch normalization and no norm are converted; the model has {model.config['norm']!r}")
    init = partial(model.init, input_shape=(fan_in,), init_scale=1.0)
    params, batch_stats = jax.eval_shape(init, jax.random.key(0))
    return {"params": params, "batch_stats": batch_stats}


def shapes(model: Model, fan_in: int) -> dict[str, tuple[int, ...]]:
    """The shapes of an mlp's entries by name. Args and errors are those of `template`."""
    return {name: entry.shape for name, entry in _named(template(model, fan_in)).items()}


def checked(model: Model, params: PyTree, batch_stats: PyTree) -> dict[str, Any]:
    """The entries of an mlp by name.

    Raises:
      ValueError: if they do not fit `model`.
    """
    tree = {"params": params, "batch_stats": batch_stats}
    given = _named(tree)
    kernels = (v for name, v in given.items() if name.endswith(("hidden_0/kernel", "output/kernel")))
    fan_in = (np.shape(next(kernels, None)) or (1,))[0]
    check("params and batch_stats of an mlp", given, shapes(model, fan_in))
    return given


def build(model: Model, fan_in: int, read: Callable[[str], Any]) -> tuple[PyTree, PyTree]:
    """`(params, batch_stats)` of an mlp, each entry being `read(name)`."""
    tree = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(read(_name(path))), template(model, fan_in))
    return tree["params"], tree["batch_stats"]


def dense_and_norm(model: Model, name: str) -> tuple[int, str, str]:
    """An entry's layer (the output layer being the last), "dense" or "norm", and its name therein."""
    _, layer, *rest = name.split("/")
    index = len(model.config["features"]) if layer == "output" else int(layer.removeprefix("hidden_"))
    return index, "norm" if len(rest) == 2 else "dense", rest[-1]


def check(what: str, given: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a ValueError that lists all entries that are missing, not expected, or of another shape.

    Args:
      what: the dictionary, for the message.
      given: arrays by name.
      expected: shapes by name.
    """
    wrong = [*_differences(given, expected)]
    if wrong:
        raise ValueError(f"wrong entries in {what}: {'; '.join(wrong)}")


def _differences(given, expected) -> Iterator[str]:
    missing = [name for name in expected if name not in given]
    unexpected = [str(name) for name in given if name not in expected]
    if missing:
        yield f"missing {', '.join(missing)}"
    if unexpected:
        yield f"unexpected {', '.join(unexpected)}"
    for name, shape in expected.items():
        if name in given and np.shape(given[name]) != shape:
            yield f"{name} has shape {tuple(np.shape(given[name]))}, expected {tuple(shape)}"


def _named(tree):
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")
