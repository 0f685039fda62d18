"""The law over training: SGD on W and on a W, side by side, and how what rounds grows from step to step."""

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
from experiments.scaling.laws import deviation, labels, representable, scaled_sets
from experiments.scaling.networks import Layers, Problem, cast, hidden, of_layers, scaled

DECAYS = {"none": 0.0, "weight_decay / a^2": 0.02}  # {what is done for a: the weight decay at a = 1}
MOMENTUM = 0.9  # the optimizer's


class Hyper(NamedTuple):
    """What a trajectory is trained with; traced, so that all run in one program."""

    learning_rate: jax.Array | float
    momentum: jax.Array | float
    weight_decay: jax.Array | float


class Trajectories(NamedTuple):
    """Runs at W -> a W, epsilon -> a^2 epsilon, learning rate -> a^2 times it, weight decay -> 1 / a^2 times it."""

    # [factors, recorded] of W / a from W at a = 1; the largest over the layers. NaN: not run
    deviation: np.ndarray
    crossed: np.ndarray  # [factors, recorded] how many activations of that step's batch are on two sides of 0
    norm: np.ndarray  # [recorded] |W| over |W| at the start, at a = 1
    first_step: float  # |W after one step - W| / |W| at a = 1, the largest over the layers


class Growth(NamedTuple):
    """How a deviation grows from step to step, fitted between two steps."""

    kind: str  # "power", "exponential", or "" where there are too few steps to tell
    rate: np.ndarray  # [factors] the power of the step, or e-folds a step
    start: int
    end: int


def optimizer(hyper: Hyper, trained: PyTree) -> optax.GradientTransformation:
    """SGD with momentum and weight decay where `trained` is True; the rest is frozen.

    `trained` is traced, which optax's own masks are not: one program, whichever layers are trained.
    """

    def freeze(updates, _):
        return jax.tree.map(lambda update, on: jnp.where(on, update, 0), updates, trained)

    sgd = optax.sgd(hyper.learning_rate, momentum=hyper.momentum)
    return optax.chain(optax.add_decayed_weights(hyper.weight_decay), sgd, optax.stateless(freeze))


def trainer(layers: Layers, batch_size: int, seed: int) -> Callable:
    """Returns `train(problem, names, epsilon [L], hyper, recorded)`, one compiled program whatever these are.

    It trains the kernels of the named layers, and yields after each of the recorded steps the parameters, and
    where the activations of the last batch were above 0, [L, N, C]. Each step has a new batch of normal
    inputs; the loss is the cross-entropy with the teacher's class.
    """
    key = jax.random.key(seed)

    def loss(params, teacher, epsilon, step):
        shape = (batch_size, teacher.shape[0])
        x = jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32).astype(teacher.dtype)
        outputs, shown = layers(params, x, {}, epsilon)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, (x @ teacher).argmax(-1))
        return losses.mean(), jnp.stack([shown[f"{name}/activation"] > 0 for name in hidden(len(epsilon))])

    @jax.jit
    def advance(state, trained, teacher, epsilon, hyper, first, last):
        def one_step(step, state):
            params, opt_state, _ = state
            grads, positive = jax.grad(loss, has_aux=True)(params, teacher, epsilon, step)
            updates, opt_state = optimizer(hyper, trained).update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, positive

        return jax.lax.fori_loop(first, last, one_step, state)

    def train(p: Problem, names, epsilon, hyper: Hyper, recorded) -> Iterator[tuple[PyTree, jax.Array]]:
        dtype = p.x.dtype.type
        hyper, epsilon = Hyper(*map(dtype, hyper)), epsilon.astype(dtype)
        trained = jax.tree.map(lambda _: np.False_, p.params)
        trained |= {name: trained[name] | {"kernel": np.True_} for name in names}
        width = p.params["hidden_0"]["kernel"].shape[1]
        params = jax.tree.map(jnp.asarray, p.params)
        positive = jnp.zeros((len(epsilon), batch_size, width), bool)
        state = (params, optimizer(hyper, trained).init(params), positive)
        for first, last in itertools.pairwise([0, *(int(step) for step in recorded)]):
            state = advance(state, trained, p.teacher, epsilon, hyper, first, last)
            yield state[0], state[2]

    return train


def trajectories(
    train: Callable, p: Problem, names, epsilon: float, factors, hyper: Hyper, recorded
) -> Trajectories:
    """Of the named layers, run side by side. What float32 has no normal number for is not run."""
    depth = len(p.params) - 1
    factors = [float(p.x.dtype.type(a)) for a in factors]

    def start(a):
        rates = {"learning_rate": hyper.learning_rate * a * a, "weight_decay": hyper.weight_decay / (a * a)}
        start, epsilons = scaled(p, names, a), of_layers(epsilon, depth, names, a)
        return train(start, names, epsilons, hyper._replace(**rates), recorded)

    def possible(a):
        values = (hyper.learning_rate, a), (hyper.weight_decay, 1 / a), (epsilon, a)
        return all(representable(*value) for value in values)

    def kernels(params):
        return {name: np.float64(params[name]["kernel"]) for name in names}

    def size(kernels):
        return math.sqrt(sum(float(np.square(kernel).sum()) for kernel in kernels.values()))

    run = [j for j, a in enumerate(factors) if possible(a)]
    found = np.full((len(factors), len(recorded)), np.nan)
    crossed = np.zeros((len(factors), len(recorded)), int)
    norm, first_step = np.zeros(len(recorded)), math.nan
    initial = kernels(p.params)
    together = zip(start(1.0), *(start(factors[j]) for j in run), strict=True)
    for t, ((params, positive), *others) in enumerate(together):
        expected = kernels(params)
        norm[t] = size(expected) / size(initial)
        if t == 0:
            first_step = max(deviation(expected[name], initial[name]) for name in names)
        for j, (scaled_params, scaled_positive) in zip(run, others, strict=True):
            new = kernels(scaled_params)
            found[j, t] = max(deviation(new[name] / factors[j], expected[name]) for name in names)
            crossed[j, t] = (np.asarray(positive) != np.asarray(scaled_positive)).sum()
    return Trajectories(found, crossed, norm, first_step)


def growth(curves: np.ndarray, ended: np.ndarray, steps: np.ndarray) -> Growth:
    """A power of the step or an exponential, whichever fits the logarithms better by least squares.

    Args:
      curves: [factors, recorded] deviations.
      ended: [recorded] True where they are no longer small, or samples have crossed a kink.
      steps: [recorded].

    Returns:
      `Growth` over the last two thirds of the steps before the first that has ended.
    """
    count = int(np.argmax(ended)) if ended.any() else len(steps)
    inside = np.flatnonzero(steps[:count] > steps[max(count - 1, 0)] / 3)
    curves = curves[(curves > 0).all(1)]
    if len(inside) < 8 or not len(curves):
        return Growth("", np.array([]), 0, 0)
    logs = np.log(curves[:, inside]).T
    times = {"power": np.log(steps[inside]), "exponential": steps[inside].astype(float)}
    fits = {kind: np.polyfit(t, logs, 1, full=True)[:2] for kind, t in times.items()}
    kind = min(fits, key=lambda name: fits[name][1].sum())
    return Growth(kind, fits[kind][0][0], int(steps[inside[0]]), int(steps[inside[-1]]))


def growth_of(at: xr.Dataset, kinked: bool) -> tuple[Growth, int | None]:
    """Of a row of `rounded`, while below 1e-2 and, if kinked, before a sample crosses; and at which index one does."""
    crossed = at.trajectory_crossed.values.any(0) & kinked
    ended = (at.trajectory.values > 1e-2).any(0) | crossed
    fit = growth(at.trajectory.values, ended, at.step.values)
    return fit, int(np.argmax(crossed)) if crossed.any() else None


def each_decay(train: Callable, p: Problem, names, epsilon, factors, learning_rate, recorded) -> Trajectories:
    """`trajectories`, without weight decay and with it: each field [decay, ...]."""
    found = [
        trajectories(train, p, names, epsilon, factors, Hyper(learning_rate, MOMENTUM, decay), recorded)
        for decay in DECAYS.values()
    ]
    return Trajectories(*map(np.array, zip(*found, strict=True)))


def bitwise(
    train: Callable, p: Problem, which: str, epsilon: float, K: int, rate: float, steps: int
) -> xr.Dataset:
    """The largest deviation along the trajectories of one of `scaled_sets`, for ten a = 2^k up to |k| = K."""
    exponents = np.unique([sign * k for k in (1, K // 4, K // 2, 3 * K // 4, K) for sign in (-1, 1) if k])
    names = scaled_sets(len(p.params) - 1)[which]
    found = each_decay(train, p, names, epsilon, 2.0**exponents, rate, np.unique([1, steps]))
    coords = {"decay": labels(DECAYS), "sampled_exponent": exponents}
    largest = {"trajectory_power_of_two": (("decay", "sampled_exponent"), found.deviation.max(2))}
    return xr.Dataset(largest, coords).expand_dims(epsilon=[epsilon], scaled=labels([which]))


def without_norm(train: Callable, p: Problem, rate: float, steps: int) -> xr.Dataset:
    """The same of a network without batch normalization, at a = 2."""
    found = each_decay(train, p, hidden(len(p.params) - 1), 0.0, [2.0], rate, np.unique([1, steps]))
    variables = {"trajectory_without": found.deviation[:, 0], "trajectory_without_norm": found.norm}
    coords = {"decay": labels(DECAYS), "few": np.unique([1, steps])}
    return xr.Dataset({name: (("decay", "few"), values) for name, values in variables.items()}, coords)


def rounded(train: Callable, p: Problem, trained: str, factors, rate: float, steps: int) -> xr.Dataset:
    """Step by step, all hidden layers: how rounding grows; and for a = 3 in float64. `trained`: the activation."""
    recorded = np.unique(np.linspace(1, steps, min(steps, 300)).round().astype(int))
    names = hidden(len(p.params) - 1)
    found = each_decay(train, p, names, 0.0, factors, rate, recorded)
    with jax.enable_x64(True):
        double = each_decay(train, cast(p, np.float64), names, 0.0, [3.0], rate, recorded).deviation[:, 0]
    variables = {
        "trajectory": (("decay", "factor", "step"), found.deviation),
        "trajectory_crossed": (("decay", "factor", "step"), found.crossed),
        "trajectory_norm": (("decay", "step"), found.norm),
        "trajectory_first_step": (("decay",), found.first_step),
        "trajectory_float64": (("decay", "step"), double),
    }
    coords = {"decay": labels(DECAYS), "factor": list(factors), "step": recorded}
    return xr.Dataset(variables, coords).expand_dims(trained=labels([trained]))
