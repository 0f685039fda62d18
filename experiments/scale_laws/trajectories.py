"""The law over training: SGD on W and on a W, side by side."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

from bnjax.types import PyTree
from experiments.scale_laws.common import Settings, labels, representable
from experiments.scale_laws.networks import Layers, Problem, hidden, of_layers, scaled
from experiments.scale_laws.one_step import deviation

DECAYS = {"none": 0.0, "weight_decay / a^2": 0.02}  # {what is done for a: the weight decay at a = 1}
MOMENTUM = 0.9  # the optimizer's


class Hyper(NamedTuple):
    """What a trajectory is trained with; traced, so that all run in one program."""

    learning_rate: jax.Array | float
    momentum: jax.Array | float
    weight_decay: jax.Array | float


def optimizer(hyper: Hyper, trained: PyTree) -> optax.GradientTransformation:
    """SGD with momentum and weight decay where `trained` is True; the rest is frozen.

    `trained` is traced, which optax's own masks are not: one program, whichever layers are trained.
    """

    def freeze(updates, _):
        return jax.tree.map(lambda update, on: jnp.where(on, update, 0), updates, trained)

    sgd = optax.sgd(hyper.learning_rate, momentum=hyper.momentum)
    return optax.chain(optax.add_decayed_weights(hyper.weight_decay), sgd, optax.stateless(freeze))


def trainer(layers: Layers, batch_size: int) -> Callable:
    """Returns `train(problem, names, epsilon [L], hyper, recorded)`, one compiled program whatever these are.

    It trains the kernels of the named layers, and yields after each of the recorded steps the parameters, and
    where the activations of the last batch were above 0, [L, N, C]. Each step has a new batch of normal
    inputs; the loss is the cross-entropy with the teacher's class.
    """

    def loss(params, teacher, epsilon, key):
        x = jax.random.normal(key, (batch_size, teacher.shape[0]), jnp.float32).astype(teacher.dtype)
        outputs, shown = layers(params, x, {}, epsilon)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, (x @ teacher).argmax(-1))
        return losses.mean(), jnp.stack([shown[f"{name}/activation"] > 0 for name in hidden(len(epsilon))])

    @jax.jit
    def advance(key, state, trained, teacher, epsilon, hyper, first, last):
        def one_step(step, state):
            params, opt_state, _ = state
            step_key = jax.random.fold_in(key, step)
            grads, positive = jax.grad(loss, has_aux=True)(params, teacher, epsilon, step_key)
            updates, opt_state = optimizer(hyper, trained).update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, positive

        return jax.lax.fori_loop(first, last, one_step, state)

    def train(p: Problem, names, epsilon, hyper: Hyper, recorded) -> Iterator[tuple[PyTree, jax.Array]]:
        dtype = p.x.dtype.type
        hyper, epsilon = Hyper(*map(dtype, hyper)), epsilon.astype(dtype)
        trained = jax.tree.map(lambda _: np.False_, p.params)
        trained |= {name: trained[name] | {"kernel": np.True_} for name in names}
        params, *fixed = jax.device_put((p.params, trained, p.teacher, epsilon, hyper))  # not at each call
        positive = jnp.zeros((len(epsilon), batch_size, p.params["hidden_0"]["kernel"].shape[1]), bool)
        key, state = jax.random.key(p.seed), (params, optimizer(hyper, trained).init(params), positive)
        for first, last in itertools.pairwise([0, *(int(step) for step in recorded)]):
            state = advance(key, state, *fixed, first, last)
            yield state[0], state[2]

    return train


def trajectories(train: Callable, p: Problem, names, epsilon: float, factors, hyper: Hyper, recorded) -> xr.Dataset:
    """W -> a W, epsilon -> a^2 epsilon, learning rate -> a^2 times it, weight decay -> 1 / a^2 times it, side by side.

    `deviation` [factor, step] of W / a from W at a = 1, the largest over the named layers; NaN, as not run, where
    float32 has no normal number for a rate. `crossed` [factor, step]: how many activations of that step's batch are on
    two sides of 0. At a = 1, `norm` [step]: |W| over |W| at the start; `first_step`: |W after one step - W| / |W|.
    """
    depth, exact = len(p.params) - 1, [float(p.x.dtype.type(a)) for a in factors]

    def start(a):
        rates = {"learning_rate": hyper.learning_rate * a * a, "weight_decay": hyper.weight_decay / (a * a)}
        return train(scaled(p, names, a), names, of_layers(epsilon, depth, names, a), hyper._replace(**rates), recorded)

    def kernels(params):
        return [np.float64(params[name]["kernel"]) for name in names]

    def size(kernels):
        return math.sqrt(sum(float(np.square(kernel).sum()) for kernel in kernels))

    rates = (hyper.learning_rate, 1), (hyper.weight_decay, -1), (epsilon, 1)
    run = [j for j, a in enumerate(exact) if all(representable(rate, a**power) for rate, power in rates)]
    found, crossed = np.full((len(exact), len(recorded)), np.nan), np.zeros((len(exact), len(recorded)), int)
    initial, norm, first_step = kernels(p.params), np.zeros(len(recorded)), math.nan
    together = zip(start(1.0), *(start(exact[j]) for j in run), strict=True)
    for t, ((params, positive), *others) in enumerate(together):
        expected = kernels(params)
        norm[t] = size(expected) / size(initial)
        if t == 0:
            first_step = max(map(deviation, expected, initial))
        for j, (new, new_positive) in zip(run, others, strict=True):
            found[j, t] = max(map(deviation, [kernel / exact[j] for kernel in kernels(new)], expected))
            crossed[j, t] = (np.asarray(positive) != np.asarray(new_positive)).sum()
    curves = {"deviation": (("factor", "step"), found), "crossed": (("factor", "step"), crossed)}
    coords = {"factor": list(factors), "step": list(recorded)}
    return xr.Dataset(curves | {"norm": ("step", norm), "first_step": first_step}, coords)


def each_decay(
    train: Callable, p: Problem, names, epsilon: float, factors, settings: Settings, recorded, *, normed: bool = True
) -> xr.Dataset:
    """`trajectories`, without weight decay and with it.

    Raises:
      ValueError: if the learning rate is too large for a network that is `normed`.
    """
    rate, rest = settings.learning_rate, (train, p, names, epsilon, factors)
    each = [trajectories(*rest, Hyper(rate, MOMENTUM, decay), recorded) for decay in DECAYS.values()]
    found = xr.concat(each, xr.Variable("decay", labels(DECAYS)))
    if normed and not np.isfinite(found.norm).all():
        raise ValueError(f"training at a = 1 is not finite: --learning_rate={rate:g} is too large")
    return found
