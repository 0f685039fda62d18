"""The field's weight initializers by name, times `init_scale`.

Each draws with zero mean from the distribution of its `jax.nn.initializers` namesake, for a kernel of
shape [fan_in, fan_out], and multiplies the draw by `init_scale`, a factor of its STANDARD DEVIATION
(`jax.nn.initializers.variance_scaling(scale)` multiplies the variance). `init_scale` may be traced, so
that a whole grid of scales runs in one compiled program, and one key gives the same draw at every scale.

| name | standard deviation at `init_scale` 1 | source |
|---|---|---|
| `random_normal` | 1 | |
| `uniform` | 1: U(-sqrt 3, sqrt 3) | |
| `glorot_uniform`, `glorot_normal` | sqrt(2 / (fan_in + fan_out)) | Glorot & Bengio 2010 |
| `he_uniform`, `he_normal` | sqrt(2 / fan_in) | He et al. 2015 |
| `lecun_normal` | sqrt(1 / fan_in) | LeCun et al. 1998 |
| `orthogonal` | orthonormal rows or columns: sqrt(1 / max(fan_in, fan_out)) | Saxe et al. 2014 |
| `torch_default` | sqrt(1 / (3 fan_in)): U(-a, a), a = sqrt(1 / fan_in) | PyTorch's layers |
| `lsuv` | that of `orthogonal`, until the first batch sets another | Mishkin & Matas 2016 |

PyTorch draws biases from that interval, too; here they start at 0. With `lsuv` each kernel is divided, before the first
step, by the deviation of what its layer gives for the first batch, over batch and units (`Model.prepare`): `init_scale`
then has no effect.

The `_normal` ones but `random_normal` are truncated at two standard deviations, as jax.nn's are.
"""

import math
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.nn import initializers as jax_initializers
from jaxtyping import Array, Float, Key

from bnjax.choices import choose


@runtime_checkable
class Initializer(Protocol):
    """Draws one kernel."""

    def __call__(
        self, key: Key[Array, ""], shape: tuple[int, ...], init_scale: Float[Array, ""] | float = 1.0, dtype=jnp.float32
    ) -> Float[Array, "..."]:
        """An array of `shape` [..., fan_in, fan_out], `init_scale` times the standard draw."""


def _scaled(draw) -> Initializer:
    def initializer(key, shape, init_scale=1.0, dtype=jnp.float32):
        return jnp.asarray(init_scale, dtype) * draw(key, shape, dtype)

    return initializer


def _centred_uniform(key, shape, dtype):
    bound = math.sqrt(3)
    return jax_initializers.uniform(2 * bound)(key, shape, dtype) - bound


def _orthogonal(key, shape, dtype):
    # One matrix at a time, even under vmap: LAPACK's QR of a batch waits for threads of the pool it runs
    # on itself, and with one XLA device per core it waits for ever (seen with jaxlib 0.10.2).
    @jax.custom_batching.sequential_vmap
    def draw(key):
        return jax_initializers.orthogonal()(key, shape, dtype)

    return draw(key)


def _torch_default(key, shape, dtype):
    return jax_initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


random_normal = _scaled(jax_initializers.normal(1.0))
uniform = _scaled(_centred_uniform)
glorot_uniform = _scaled(jax_initializers.glorot_uniform())
glorot_normal = _scaled(jax_initializers.glorot_normal())
he_uniform = _scaled(jax_initializers.he_uniform())
he_normal = _scaled(jax_initializers.he_normal())
lecun_normal = _scaled(jax_initializers.lecun_normal())
orthogonal = _scaled(_orthogonal)
torch_default = _scaled(_torch_default)

INITIALIZERS = MappingProxyType(
    {
        "random_normal": random_normal,
        "glorot_uniform": glorot_uniform,
        "glorot_normal": glorot_normal,
        "he_uniform": he_uniform,
        "he_normal": he_normal,
        "lecun_normal": lecun_normal,
        "orthogonal": orthogonal,
        "uniform": uniform,
        "torch_default": torch_default,
        "lsuv": orthogonal,
    }
)
PREPARED = ("lsuv",)  # whose kernels the first batch rescales


def get(name: str) -> Initializer:
    """The initializer of that name.

    Raises:
      ValueError: for an unknown name; it lists the known ones.
    """
    return choose("initializer", name, INITIALIZERS)
