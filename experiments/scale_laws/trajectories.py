"""The law over training: SGD on W and on a W, side by side."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from bnjax import losses
from bnjax.types import Model, PyTree
from experiments.scale_laws.common import Settings, representable
from experiments.scale_laws.networks import Problem
from experiments.scale_laws.one_step import deviation

DECAYS = {"none": 0.0, "weight_decay / a^2": 0.02}  # {what is done for a: the weight decay at a = 1}
MOMENTUM = 0.9  # the optimizer's


class Hyper(NamedTuple):
    """The hyperparameters of a trajectory; traced, so that all run in one program."""

    learning_rate: jax.Array | float
    momentum: jax.Array | float
    weight_decay: jax.Array | float


def sgd(hyper: Hyper, trained: PyTree, params: PyTree, velocity: PyTree, gradients: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters and velocities after a step with momentum and weight decay; the rest is frozen.

    `trained` is traced, which optax's masks are not: one program, whichever layers are trained.
    """
    rate, momentum, decay = hyper
    velocity = jax.tree.map(lambda v, g, w: (g + decay * w) + momentum * v, velocity, gradients, params)
    moved = jax.tree.map(lambda w, v, on: w + jnp.where(on, -rate * v, 0), params, velocity, trained)
    return moved, velocity


def trainer(model: Model, batch_size: int) -> Callable:
    """Returns `train(problem, names, hyper, recorded)`, one compiled program whatever these are.

    It trains the kernels of the named layers, and yields after each of the recorded steps the parameters, and
    where the activations of the last batch were above 0, [L, N, C]. Each step has a new batch of normal
    inputs; the loss is the cross-entropy with the teacher's class.
    """

    def loss(params, batch_stats, teacher, epsilon, key):
        x = jax.random.normal(key, (batch_size, teacher.shape[0]), jnp.float32).astype(teacher.dtype)
        outputs, shown = model.layers(params | {"epsilon": epsilon}, batch_stats, x, {}, train=True)
        positive = jnp.stack([shown[f"hidden_{i}/activation"] > 0 for i in range(len(epsilon))])
        return losses.cross_entropy(outputs, (x @ teacher).argmax(-1)), positive

    @jax.jit
    def advance(key, state, trained, hyper, fixed, first, last):
        def one_step(step, state):
            step_key = jax.random.fold_in(key, step)
            gradients, positive = jax.grad(loss, has_aux=True)(state[0], *fixed, step_key)
            return *sgd(hyper, trained, *state[:2], gradients), positive

        return jax.lax.fori_loop(first, last, one_step, state)

    def train(p: Problem, names, hyper: Hyper, recorded) -> Iterator[tuple[PyTree, jax.Array]]:
        dtype = p.x.dtype.type
        trained = jax.tree.map(lambda _: np.False_, p.params)
        trained |= {name: trained[name] | {"kernel": np.True_} for name in names}
        fixed = trained, Hyper(*map(dtype, hyper)), (p.batch_stats, p.teacher, p.epsilon.astype(dtype))
        params, *fixed = jax.device_put((p.params, *fixed))  # not at each call
        positive = jnp.zeros((len(p.epsilon), batch_size, p.params["hidden_0"]["kernel"].shape[1]), bool)
        key, state = jax.random.key(p.seed), (params, jax.tree.map(jnp.zeros_like, params), positive)
        for first, last in itertools.pairwise([0, *(int(step) for step in recorded)]):
            state = advance(key, state, *fixed, first, last)
            yield state[0], state[2]

    return train


def trajectories(train: Callable, p: Problem, names, factors, hyper: Hyper, recorded) -> xr.Dataset:
    """W -> a W, epsilon -> a^2 epsilon, learning rate -> a^2 times it, weight decay -> 1 / a^2 times it, side by side.

    `trajectory` [factor, step]: the deviation of W / a from W at a = 1, the largest over the named layers; NaN, as not
    run, where float32 has no normal number for a rate. `trajectory_crossed` [factor, step]: how many activations of
    that step's batch are on two sides of 0. At a = 1, `trajectory_norm` [step]: |W| over |W| at the start;
    `trajectory_first_step`: |W after one step - W| / |W|.
    """
    exact = [float(p.x.dtype.type(a)) for a in factors]

    def start(a):
        rates = {"learning_rate": hyper.learning_rate * a * a, "weight_decay": hyper.weight_decay / (a * a)}
        return train(p.scaled(names, a), names, hyper._replace(**rates), recorded)

    def kernels(params, a=1.0):
        return [np.float64(params[name]["kernel"]) / a for name in names]

    def size(kernels):
        return math.sqrt(sum(float(np.square(kernel).sum()) for kernel in kernels))

    rates = (hyper.learning_rate, 1), (hyper.weight_decay, -1), (p.epsilon[0], 1)
    run = [j for j, a in enumerate(exact) if all(representable(rate, a**power) for rate, power in rates)]
    found, crossed = np.full((len(exact), len(recorded)), np.nan), np.zeros((len(exact), len(recorded)), int)
    initial, norm, first_step = kernels(p.params), np.zeros(len(recorded)), math.nan
    for t, ((params, positive), *others) in enumerate(zip(start(1.0), *(start(exact[j]) for j in run), strict=True)):
        expected = kernels(params)
        norm[t] = size(expected) / size(initial)
        if t == 0:
            first_step = max(map(deviation, expected, initial))
        for j, (new, new_positive) in zip(run, others, strict=True):
            found[j, t] = max(map(deviation, kernels(new, exact[j]), expected))
            crossed[j, t] = (np.asarray(positive) != np.asarray(new_positive)).sum()
    curves = {"trajectory": (("factor", "step"), found), "trajectory_crossed": (("factor", "step"), crossed)}
    curves |= {"trajectory_norm": ("step", norm), "trajectory_first_step": first_step}
    return xr.Dataset(curves, {"factor": list(factors), "step": list(recorded)})


def each_decay(
    train: Callable, p: Problem, names, factors, settings: Settings, recorded, *, normed: bool = True
) -> xr.Dataset:
    """`trajectories`, without weight decay and with it.

    Raises:
      ValueError: if the learning rate is too large for a network that is `normed`.
    """
    rate = settings.learning_rate
    each = [trajectories(train, p, names, factors, Hyper(rate, MOMENTUM, w), recorded) for w in DECAYS.values()]
    found = xr.concat(each, xr.Variable("decay", [*DECAYS]))
    if normed and not np.isfinite(found.trajectory_norm).all():
        raise ValueError(f"training at a = 1 is not finite: --learning_rate={rate:g} is too large")
    return found
