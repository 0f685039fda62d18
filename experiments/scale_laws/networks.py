"""The networks whose scale laws are measured, and their derivatives to all that has a name."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import xarray as xr

import bnjax
from bnjax import probes
from bnjax.types import BatchNormParams, PyTree
from experiments import common
from experiments.scale_laws.common import Settings

NUM_CLASSES = 10


class Problem(NamedTuple):
    """A network's parameters, a batch, and a loss that is linear in the outputs: sum(cotangent * outputs)."""

    params: PyTree
    batch_stats: PyTree  # not used in training
    x: np.ndarray  # [N, D]
    cotangent: np.ndarray  # [N, K]
    teacher: np.ndarray  # [D, K] in training, the class of a sample x is the largest entry of x @ teacher
    epsilon: np.ndarray  # [L] in float64; of the networks that have none of their own
    seed: int  # of the batches of training

    @property
    def hidden(self) -> list[str]:
        """The names of the hidden layers."""
        return [f"hidden_{i}" for i in range(len(self.epsilon))]

    def cast(self, dtype: type) -> "Problem":
        """All arrays but epsilon as numpy's, of that type."""
        return Problem(*jax.tree.map(lambda leaf: np.asarray(leaf, dtype), self[:5]), *self[5:])

    def at(self, epsilon: float) -> "Problem":
        """With this epsilon in all layers."""
        return self._replace(epsilon=np.full(len(self.epsilon), epsilon))

    def scaled(self, names: Sequence[str], a: float) -> "Problem":
        """The kernels of the named layers times a, their epsilon times a^2."""
        factor = self.x.dtype.type(a)
        changed = {name: self.params[name] | {"kernel": factor * self.params[name]["kernel"]} for name in names}
        epsilon = np.where([name in names for name in self.hidden], self.epsilon * a * a, self.epsilon)
        return self._replace(params=self.params | changed, epsilon=epsilon)


def problem(settings: Settings, seed: int) -> Problem:
    """He-normal kernels, batch normalization's scale and bias away from 1 and 0, and a normal batch; float32."""
    width, batch_size = settings.width, settings.batch_size
    params, stats = bnjax.mlp((width,) * settings.depth, NUM_CLASSES).init(jax.random.key(seed), (width,), 1.0)
    rng = np.random.default_rng(seed)
    for name in settings.hidden:
        params[name]["norm"] = BatchNormParams(rng.uniform(0.5, 1.5, width), rng.normal(0, 0.3, width))
    x = rng.normal(size=(batch_size, width))
    cotangent, teacher = rng.normal(size=(batch_size, NUM_CLASSES)) / batch_size, rng.normal(size=(width, NUM_CLASSES))
    return Problem(params, stats, x, cotangent, teacher, np.zeros(settings.depth), seed).cast(np.float32)


def network(
    settings: Settings, activation: str = "", norm: str = "batch", epsilon: float | int | None = 0
) -> bnjax.Model:
    """A network of that epsilon, a constant; None: of those in its parameters, one for each hidden layer."""
    features, activation = (settings.width,) * settings.depth, activation or settings.activation
    make = partial(bnjax.mlp, features, NUM_CLASSES, activation, norm, use_bias=False)

    def layers(params, batch_stats, x, offsets, *, train):
        model = make(epsilon=params["epsilon"] if epsilon is None else float(epsilon))
        return model.layers(params, batch_stats, x, offsets, train=train)

    return make()._replace(layers=layers)


def derivatives(model: bnjax.Model, p: Problem) -> probes.Derivatives:
    """Of the linear loss; epsilon counts as a parameter."""
    params = p.params | {"epsilon": p.epsilon}
    return probes.derivatives(model, params, p.batch_stats, p.x, lambda outputs: (outputs * p.cotangent).sum())


def program(model: bnjax.Model) -> Callable[[Problem], probes.Derivatives]:
    """Problem -> `derivatives` as numpy arrays; one compiled program for every a and epsilon."""
    run = jax.jit(partial(derivatives, model))
    return lambda p: jax.tree.map(np.asarray, run(p._replace(epsilon=p.epsilon.astype(p.x.dtype), seed=0)))


def over_seeds(settings: Settings, jobs: Callable[[Problem], Sequence[Callable[[], xr.Dataset]]]) -> xr.Dataset:
    """The parts that the jobs of each seed's problem measure, merged; as many at a time as there are devices."""

    def run(job):
        with jax.default_matmul_precision("highest"):  # a setting of the thread
            return job()

    every = [jobs(problem(settings, seed)) for seed in settings.seeds]
    parts = iter(common.in_threads(run, [*itertools.chain(*every)], "measuring", jax.local_device_count()))
    merged = [xr.merge(itertools.islice(parts, len(one)), "no_conflicts", "outer") for one in every]
    return xr.concat(merged, xr.Variable("seed", list(settings.seeds)), join="exact")
