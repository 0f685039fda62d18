"""Networks as users write them, without a line about bnjax, and what is to be read off each."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

IMAGE = (8, 8, 1)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.gelu(nn.BatchNorm(use_running_average=not train)(nn.Conv(6, (3, 3))(x)))
        return nn.Dense(10)(x.mean((1, 2)))


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train)(x)

        y = nn.relu(norm(nn.Conv(self.features, (3, 3), use_bias=False)(x)))
        y = norm(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm(nn.Conv(self.features, (1, 1), use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = Block(4)(nn.Conv(4, (3, 3))(x), train)
        x = nn.remat(Block, static_argnums=(2,))(6)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


class Transformer(nn.Module):
    """One block, with an embedding of positions in the top module."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6)(x[..., 0])
        x = x + self.param("pos", nn.initializers.normal(0.02), x.shape[1:])
        attention = nn.MultiHeadDotProductAttention(2, deterministic=not train, dropout_rate=0.1)
        x = x + attention(nn.LayerNorm()(x))
        h = nn.Dropout(0.1, deterministic=not train)(nn.silu(nn.Dense(12)(nn.LayerNorm()(x))))
        x = x + nn.Dense(6)(h)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class NNX(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 10, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.layers[1](self.dropout(nnx.tanh(self.layers[0](x))))


class Equinox(eqx.Module):
    layers: list
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        keys = jax.random.split(key)
        self.layers = [eqx.nn.Linear(64, 6, key=keys[0]), eqx.nn.Linear(6, 10, key=keys[1])]
        self.norm = eqx.nn.BatchNorm(6, axis_name="batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x, state, *, key=None):
        h, state = self.norm(self.layers[0](x.ravel()), state)
        return self.layers[1](self.dropout(jax.nn.relu(h), key=key)), state


def plain_init(key, input_shape):
    keys = jax.random.split(key, 3)
    return {
        "W1": jax.random.normal(keys[0], (64, 6)) / 8,
        "gain": jnp.ones((1, 6)),
        "blocks": [{"w": jax.random.normal(keys[1], (6, 6)) / 3, "b": jnp.zeros(6)}],
        "W2": jax.random.normal(keys[2], (6, 10)) / 3,
    }


def plain_apply(params, x):
    h = x.reshape(len(x), -1) @ params["W1"]
    h = params["gain"] * (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)
    h = jnp.tanh(h)
    for block in params["blocks"]:
        h = h + jax.nn.softplus(h @ block["w"] + block["b"])
    return h @ params["W2"]


class Expected(NamedTuple):
    """A network, and what is to be read off it."""

    network: Any
    parts: str
    readout: str
    behind_batch_norm: tuple[str, ...]  # the kernels whose scale the outputs do not depend on
    biases: dict[str, str]  # {part: the parameter that it adds last}


NETWORKS = {
    "linen CNN": Expected(
        CNN(),
        "Conv_0/kernel Conv_0/norm Conv_0/activation Conv_1/kernel Conv_1/norm Conv_1/activation Dense_0/kernel",
        "Dense_0/kernel",
        ("Conv_0/kernel", "Conv_1/kernel"),
        {"Conv_1/kernel": "Conv_1/bias", "Conv_0/norm": "BatchNorm_0/bias", "Dense_0/kernel": "Dense_0/bias"},
    ),
    "linen ResNet": Expected(
        ResNet(),
        "Conv_0/kernel Block_0/Conv_0/kernel Block_0/Conv_0/norm Block_0/Conv_0/activation Block_0/Conv_1/kernel "
        "Block_0/Conv_1/norm Block_0/Conv_1/activation CheckpointBlock_0/Conv_0/kernel "
        "CheckpointBlock_0/Conv_0/norm CheckpointBlock_0/Conv_0/activation CheckpointBlock_0/Conv_1/kernel "
        "CheckpointBlock_0/Conv_1/norm CheckpointBlock_0/Conv_2/kernel CheckpointBlock_0/Conv_2/norm "
        "CheckpointBlock_0/Conv_2/activation Dense_0/kernel",
        "Dense_0/kernel",
        (
            *("Block_0/Conv_0/kernel", "Block_0/Conv_1/kernel", "CheckpointBlock_0/Conv_0/kernel"),
            *("CheckpointBlock_0/Conv_1/kernel", "CheckpointBlock_0/Conv_2/kernel"),
        ),
        {
            "Conv_0/kernel": "Conv_0/bias",
            "Block_0/Conv_1/norm": "Block_0/BatchNorm_1/bias",
            "CheckpointBlock_0/Conv_0/norm": "CheckpointBlock_0/BatchNorm_0/bias",
        },
    ),
    "linen Transformer": Expected(
        Transformer(),
        "Dense_0/kernel Dense_0/norm MultiHeadDotProductAttention_0/query/kernel "
        "MultiHeadDotProductAttention_0/key/kernel MultiHeadDotProductAttention_0/value/kernel "
        "MultiHeadDotProductAttention_0/key/softmax MultiHeadDotProductAttention_0/out/kernel "
        "MultiHeadDotProductAttention_0/out/norm Dense_1/kernel Dense_1/activation Dense_2/kernel Dense_2/norm "
        "Dense_3/kernel",
        "Dense_3/kernel",
        (),
        {
            "Dense_0/norm": "LayerNorm_0/bias",
            "MultiHeadDotProductAttention_0/value/kernel": "MultiHeadDotProductAttention_0/value/bias",
            "MultiHeadDotProductAttention_0/out/norm": "LayerNorm_1/bias",
            "Dense_1/kernel": "Dense_1/bias",
        },
    ),
    "NNX CNN": Expected(
        NNX(rngs=nnx.Rngs(0)),
        "conv/kernel conv/norm conv/activation layers/0/kernel layers/0/activation layers/1/kernel",
        "layers/1/kernel",
        ("conv/kernel",),
        {"conv/norm": "norm/bias", "layers/0/kernel": "layers/0/bias"},
    ),
    "Equinox MLP": Expected(
        eqx.nn.make_with_state(Equinox)(jax.random.key(0)),
        "layers/0/weight layers/0/norm layers/0/activation layers/1/weight",
        "layers/1/weight",
        ("layers/0/weight",),
        {"layers/0/weight": "layers/0/bias", "layers/0/norm": "norm/bias", "layers/1/weight": "layers/1/bias"},
    ),
    "plain JAX": Expected(
        (plain_init, plain_apply),
        "W1 W1/norm W1/activation blocks/0/w blocks/0/w/activation W2",
        "W2",
        ("W1",),
        {"blocks/0/w": "blocks/0/b"},
    ),
}
