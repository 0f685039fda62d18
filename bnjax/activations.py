"""Activation functions by name: jax.nn's, and the identity.

| name | phi(z) | phi(0) | phi'(0) |
|---|---|---|---|
| `relu` | max(z, 0) | 0 | a kink |
| `leaky_relu` | z if z > 0, else 0.01 z | 0 | a kink |
| `elu` | z if z > 0, else exp(z) - 1 | 0 | 1 |
| `silu` | z / (1 + exp(-z)) | 0 | 1/2 |
| `gelu` | z P(u < z), u standard normal; by its usual approximation with tanh | 0 | 1/2 |
| `softplus` | log(1 + exp(z)) | log 2 | 1/2 |
| `sigmoid` | 1 / (1 + exp(-z)) | 1/2 | 1/4 |
| `tanh` | tanh(z) | 0 | 1 |
| `linear` | z | 0 | 1 |
"""

from collections.abc import Callable
from types import MappingProxyType

import jax
import jax.numpy as jnp

from bnjax.choices import choose

ACTIVATIONS = MappingProxyType(
    {
        "relu": jax.nn.relu,
        "leaky_relu": jax.nn.leaky_relu,
        "elu": jax.nn.elu,
        "silu": jax.nn.silu,
        "gelu": jax.nn.gelu,
        "softplus": jax.nn.softplus,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
        "linear": lambda z: z,
    }
)

HOMOGENEOUS = ("relu", "leaky_relu", "linear")  # phi(a z) = a phi(z) for a > 0

ALIASES = MappingProxyType({"swish": "silu", "identity": "linear", "logistic": "sigmoid"})  # others' names


def get(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of that name.

    Raises:
      ValueError: for an unknown name, or a function; it lists the known names.
    """
    return choose("activation", name, ACTIVATIONS, ALIASES)
