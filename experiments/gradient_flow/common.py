"""Settings, networks, and measurements of these at initialization."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import activations, choices, losses, probes
from bnjax.findings import number
from bnjax.theory.mean_field import init_scale_threshold
from experiments import common
from experiments.settings import at_least, check_axis, parse_counts, positive, require, setting
from experiments.table import Table

LOSSES = ("cotangent", "cross_entropy")
NORM_NAMES = {"batch": "BN", "none": "no BN"}
ABOVE = 30  # times the threshold of init_scale: where BN's powers begin
FLAT = 0.05  # the largest slope that counts as 0, and the largest distance from a law
parse_steps = functools.partial(parse_counts, least=0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of all claims."""

    activations: tuple[str, ...] = setting(("relu", "tanh", "sigmoid"), f"Of {', '.join(activations.ACTIVATIONS)}.")
    norms: tuple[str, ...] = setting(("batch", "none"), f"Of {', '.join(NORM_NAMES)}.")
    depths: tuple[int, ...] = setting((3, 6), "Numbers of hidden layers.")
    hidden_width: int = setting(128, "Units per hidden layer.")
    epsilon: float = setting(1e-5, "Batch normalization's, inside the square root.")
    init_scales: tuple[float, ...] = setting(
        tuple(common.parse_floats("", "1e-4:1e8:25")), "A list, or low:high:count for log spacing."
    )
    seeds: tuple[int, ...] = setting((0, 1, 2, 3, 4), "A count, a range 0:5 or a list 0,1,2.", common.parse_seeds)
    more_seeds: int = setting(15, "Seeds after the largest of --seeds, where the gradient follows no power.")
    batch_size: int = setting(128, "Examples, the first of the training split.")
    loss: str = setting("cotangent", f"The gradient is that of this scalar, of {', '.join(LOSSES)}; see above.")
    shown_scales: tuple[float, ...] = setting((0.1, 1.0, 10.0), "Of the claims signals and training.")
    jacobian_examples: int = setting(6, "The batch of the layers' Jacobians.")
    steps: tuple[int, ...] = setting((0, 1, 10, 100), "Of training, at which weights are shown.", parse_steps)
    learning_rate: float = setting(0.1, "Of the training, SGD with momentum 0.9.")

    def __post_init__(self):
        for kind, *allowed in (("activation", activations.ACTIVATIONS, activations.ALIASES), ("norm", NORM_NAMES)):
            names = getattr(self, f"{kind}s")
            words = f"must name at least one, and none twice, got {','.join(names)!r}"
            require(all(names) and len({*names}) == len(names), f"{kind}s", words)
            for name in names:
                choices.check(f"{kind} in --{kind}s", name, *allowed)
        choices.check("--loss", self.loss, LOSSES)
        least = 3 if "batch" in self.norms else 1  # BN passes no gradient through 2 examples
        at_least(self, hidden_width=1, more_seeds=0, batch_size=least, jacobian_examples=least)
        positive(self, "learning_rate")
        require(0 <= self.epsilon < math.inf, "epsilon", f"must be >= 0 and finite, got {self.epsilon}")
        for field, axis in {"seeds": "seed", "init_scales": "init_scale", "shown_scales": "init_scale"}.items():
            check_axis(self, field, axis)
        require(len(self.init_scales) > 1, "init_scales", f"must have 2 values at least, got {self.init_scales}")
        require(max(self.steps) > 0, "steps", "must have one above 0, got 0")


TINY = Settings(("relu",), depths=(2,), hidden_width=6, init_scales=(1.0, 1e3, 1e6), seeds=(0, 1), more_seeds=1,
                batch_size=16, shown_scales=(1.0, 10.0), jacobian_examples=4, steps=(0, 2))  # fmt: skip
FULL = Settings(seeds=tuple(range(20)), more_seeds=80)


def first_scale(settings: Settings, activation: str, norm: str) -> float:
    """The init_scale from which on gradients are powers: with BN, where epsilon does not matter."""
    return ABOVE * init_scale_threshold(activation, settings.epsilon) if norm == "batch" else 0.0


def model(settings: Settings, activation: str, norm: str, depth: int) -> bnjax.Model:
    """One of the networks."""
    return bnjax.mlp((settings.hidden_width,) * depth, 10, activation, norm, epsilon=settings.epsilon)


def measure(settings: Settings, ds: bnjax.Dataset, scales: Sequence[float], program: Callable) -> xr.Dataset:
    """The values of a program for all networks at these scales; NaN where a network has no such layer.

    Args:
      settings: the networks.
      ds: its first examples are the batch.
      scales: of the initial weights.
      program: (model, x, y) -> a function of (params, batch_stats) of all seeds -> {"layer/quantity": [seeds]}.
    """
    x, y = (jnp.asarray(part[: settings.batch_size]) for part in ds[:2])
    networks = {"activation": np.asarray(settings.activations, object), "norm": np.asarray(settings.norms, object)}
    networks["depth"] = np.asarray(settings.depths)
    layers = np.asarray([*(f"hidden_{i}" for i in range(max(settings.depths))), "output"], object)
    scales, seeds, data = np.sort(scales), np.asarray(settings.seeds), {}
    coords = networks | {"init_scale": scales, "seed": seeds, "layer": layers}

    def initializer(norm, depth):  # the same for all activations
        init = functools.partial(model(settings, settings.activations[0], norm, depth).init, input_shape=x.shape[1:])
        return jax.jit(lambda scale, seeds: jax.vmap(lambda seed: init(jax.random.key(seed), init_scale=scale))(seeds))

    inits = {names: initializer(*names) for names in itertools.product(settings.norms, settings.depths)}

    def one(names):
        run = jax.jit(program(model(settings, *names), x, y))
        found = [run(*inits[names[1:]](scale, seeds)) for scale in scales]
        return jax.tree.map(lambda *values: np.stack(values), *found)  # [scales, seeds]

    every = list(itertools.product(*(values.tolist() for values in networks.values())))
    for names, found in zip(every, common.on_all_devices(one, every, "at initialization"), strict=True):
        for name, values in found.items():
            layer, quantity = name.split("/")
            nothing = np.full([len(labels) for labels in coords.values()], np.nan, np.float32)
            at = dict(zip(networks, names, strict=True)) | {"layer": layer}
            data.setdefault(quantity, xr.DataArray(nothing, coords)).loc[at] = values
    return xr.Dataset(data)


def points(title: str, values: xr.Dataset, dims: Sequence[str], columns: Mapping[str, tuple[str, str]], words: str):
    """A table with a row for each point of `values` along `dims`, and columns {header: (quantity, its unit)}."""
    frame = values[[name for name, _ in columns.values()]].to_dataframe(dim_order=[*dims])
    cells = [[NORM_NAMES.get(at, at) if isinstance(at, str) else f"{at:g}" for at in index] for index in frame.index]
    for name, unit in columns.values():
        cells = [[*row, number(value, unit)] for row, value in zip(cells, frame[name], strict=True)]
    return Table(title, [*dims, *columns], cells, words)


def gradients(settings: Settings) -> Callable:
    """A program for `measure`: norms of gradients, and spreads over the batch."""

    def program(network, x, y):
        def loss(outputs):
            if settings.loss == "cross_entropy":
                return losses.cross_entropy(outputs, y)
            return (outputs * (jax.random.normal(jax.random.key(0), outputs.shape) / len(y))).sum()

        def one(params, batch_stats):
            found = probes.gradients(network, params, batch_stats, x, loss)
            shown = network.layers(params, batch_stats, x, {}, train=True)[1]
            names = [name for name in shown if name != "output"]
            spreads = jax.vmap(probes.spread)(jnp.stack([shown[name] for name in names]))
            values = {f"{name}_spread": spreads[i] for i, name in enumerate(names)}
            values |= {f"{name}_gradient": found.intermediates[name] for name in names}
            return values | {f"{name}/weight_gradient": norm for name, norm in found.weights.items()}

        return jax.vmap(one)

    return program
