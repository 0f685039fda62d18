"""The networks whose scale laws are measured, and their derivatives to all that has a name."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import activations, batch_norm
from bnjax.types import BatchNormParams, PyTree
from experiments import common
from experiments.scale_laws.common import Settings

NUM_CLASSES = 10

# (params, x, offsets, epsilon [L]) -> (outputs, {name: array}), as a `Model`'s layers in training
Layers = Callable[[PyTree, jax.Array, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, dict]]


class Problem(NamedTuple):
    """A network's parameters, a batch, and a loss that is linear in the outputs: sum(cotangent * outputs)."""

    params: PyTree
    x: np.ndarray  # [N, D]
    cotangent: np.ndarray  # [N, K]
    teacher: np.ndarray  # [D, K] in training, the class of a sample x is the largest entry of x @ teacher
    seed: int  # of the batches of training


class Derivatives(NamedTuple):
    """Outputs [N, K], intermediates by name, and the gradients to parameters, intermediates and input, epsilon [L]."""

    outputs: jax.Array
    shown: dict[str, jax.Array]
    to_params: PyTree
    to_shown: dict[str, jax.Array]  # to "input" as well
    to_epsilon: jax.Array


def hidden(depth: int) -> list[str]:
    """The names of the hidden layers."""
    return [f"hidden_{i}" for i in range(depth)]


def cast(tree: PyTree, dtype: type) -> PyTree:
    """All arrays as numpy's, of that type."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, int) else np.asarray(leaf, dtype), tree)


def problem(settings: Settings, seed: int) -> Problem:
    """He-normal kernels, batch normalization's scale and bias away from 1 and 0, and a normal batch; float32."""
    depth, width, batch_size = settings.depth, settings.width, settings.batch_size
    params, _ = bnjax.mlp((width,) * depth, NUM_CLASSES).init(jax.random.key(seed), (width,), 1.0)
    rng = np.random.default_rng(seed)
    for name in hidden(depth):
        params[name]["norm"] = BatchNormParams(rng.uniform(0.5, 1.5, width), rng.normal(0, 0.3, width))
    x = rng.normal(size=(batch_size, width))
    cotangent = rng.normal(size=(batch_size, NUM_CLASSES)) / batch_size
    return cast(Problem(params, x, cotangent, rng.normal(size=(width, NUM_CLASSES)), seed), np.float32)


def mlp_layers(settings: Settings, activation: str = "", norm: str = "batch", epsilon: float = 0.0) -> Layers:
    """Those of `bnjax.mlp`, whose one epsilon is a number: the argument of the layers is not used."""
    features, activation = (settings.width,) * settings.depth, activation or settings.activation
    model = bnjax.mlp(features, NUM_CLASSES, activation, norm, epsilon=epsilon, use_bias=False)
    # Running statistics are not used in training: their shapes are enough.
    _, shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), features[:1], 1.0))
    stats = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return lambda params, x, offsets, epsilon: model.layers(params, stats, x, offsets, train=True)


def layers_of_epsilon(settings: Settings) -> Layers:
    """The same network with an epsilon for each layer, which may be traced and differentiated in."""
    phi = activations.get(settings.activation)

    def layers(params, x, offsets, epsilon):
        shown = {}

        def show(name, value):
            shown[name] = value + offsets[name] if name in offsets else value
            return shown[name]

        for i, name in enumerate(hidden(len(epsilon))):
            x = show(f"{name}/preactivation", x @ params[name]["kernel"])
            _, stats = batch_norm.init(x.shape[-1])
            x, _ = batch_norm.apply(params[name]["norm"], stats, x, train=True, epsilon=epsilon[i])
            x = show(f"{name}/activation", phi(show(f"{name}/norm", x)))
        return show("output", x @ params["output"]["kernel"] + params["output"]["bias"]), shown

    return layers


def derivatives(layers: Layers, params, x, cotangent, epsilon) -> Derivatives:
    """Of the linear loss, to parameters, intermediates, input and epsilon."""
    _, shapes = jax.eval_shape(lambda: layers(params, x, {}, epsilon))
    offsets = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}

    def loss(params, offsets, x, epsilon):
        outputs, shown = layers(params, x, offsets, epsilon)
        return (outputs * cotangent).sum(), (outputs, shown)

    grads, (outputs, shown) = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(params, offsets, x, epsilon)
    to_params, to_shown, to_input, to_epsilon = grads
    return Derivatives(outputs, shown, to_params, {"input": to_input, **to_shown}, to_epsilon)


def program(layers: Layers) -> Callable[[Problem, np.ndarray], Derivatives]:
    """(problem, epsilon [L]) -> `Derivatives` as numpy arrays; one compiled program for every a and epsilon."""
    run = jax.jit(partial(derivatives, layers))
    return lambda p, epsilon: jax.tree.map(np.asarray, run(p.params, p.x, p.cotangent, epsilon.astype(p.x.dtype)))


def scaled(p: Problem, names: Sequence[str], a: float) -> Problem:
    """The kernels of the named layers times a."""
    a = p.x.dtype.type(a)
    changed = {name: p.params[name] | {"kernel": a * p.params[name]["kernel"]} for name in names}
    return p._replace(params=p.params | changed)


def of_layers(epsilon: float, depth: int, names: Sequence[str] = (), a: float = 1.0) -> np.ndarray:
    """a^2 epsilon in the named layers, epsilon in the others: [L]."""
    return np.array([epsilon * a * a if name in names else epsilon for name in hidden(depth)])


def over_seeds(settings: Settings, jobs: Callable[[Problem], Sequence[Callable[[], xr.Dataset]]]) -> xr.Dataset:
    """The parts that the jobs of each seed's problem measure, merged; as many at a time as there are devices."""

    def run(job):
        with jax.default_matmul_precision("highest"):  # a setting of the thread
            return job()

    every = [jobs(problem(settings, seed)) for seed in settings.seeds]
    parts = iter(common.in_threads(run, [job for one in every for job in one], "measuring", jax.local_device_count()))
    merged = [xr.merge(itertools.islice(parts, len(one)), "no_conflicts", "outer") for one in every]
    return xr.concat(merged, xr.Variable("seed", list(settings.seeds)), join="exact")
