"""`W -> a W` in layers that batch normalization follows: exact laws, rounding, and what a fixed epsilon does.

    python -m experiments.scale_laws

In a deep network, for each hidden layer alone and for all of them at once, at epsilon 0:

    outputs                 unchanged               gradient to the layer's input   unchanged
    gradient to W           divided by a            <W, dL/dW>                      0

The same holds for (W -> a W, epsilon -> a^2 epsilon) at any epsilon. And under SGD with momentum on these kernels
alone, without weight decay or with weight_decay / a^2, (W -> a W, learning rate -> a^2 learning rate) multiplies the
whole trajectory of W by a. Expect 0, bit for bit, for every a = 2^k; for other a rounding in one step, which
training then amplifies; and nothing of the kind without batch normalization. At a fixed epsilon, W -> a W is
epsilon -> epsilon / a^2, which predicts what becomes of outputs and gradients. Takes some 40 seconds.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
import xarray as xr
from absl import app, flags
from rich.console import Console
from rich.table import Table

import bnjax
from bnjax import activations, batch_norm
from bnjax.sweeps import store
from bnjax.types import BatchNormParams, PyTree
from experiments import common

FLAGS = flags.FLAGS

flags.DEFINE_integer("depth", 6, "L, the number of hidden layers.", lower_bound=1)
flags.DEFINE_integer("width", 64, "Of the hidden layers, and of the input.", lower_bound=2)
flags.DEFINE_string("activation", "relu", f"Of the hidden layers: {', '.join(activations.ACTIVATIONS)}.")
flags.DEFINE_integer("batch_size", 64, "Samples; through 2 of them BN passes no gradient.", lower_bound=3)
flags.DEFINE_string("epsilon", "1e-5,0.1", "Batch normalization's, beside 0, which is always there.")
flags.DEFINE_integer("exponent", 60, "K: bitwise laws for a = 2^k, k from -K to K.", lower_bound=1)
flags.DEFINE_string("factors", "0.01,0.1,1.4142135623730951,3,10", "Other a: 0.1,3 or low:high:count.")
flags.DEFINE_integer("steps", 300, "Of training.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.1, "At a = 1.")
flags.DEFINE_float("momentum", 0.9, "The optimizer's, in [0, 1).")
flags.DEFINE_float("weight_decay", 0.02, "At a = 1, in the trajectories that have any.")
flags.DEFINE_integer("seed", 0, "Draws the network and the data.", lower_bound=0)
flags.DEFINE_string("out", "results/scale_laws", "Output folder.")

NUM_CLASSES = 10
LAWS = (
    "outputs",
    "gradient to the layer's input",
    "a x gradient to W",
    "gradients to all other parameters",
)
POWERS = (
    "outputs",
    "gradient to its input",
    "gradient to its W",
    "gradients to the other W",
    "gradients to all W, all scaled",
)
PREDICTED = ("outputs", "gradient to the first W", "gradient to the last W")
LARGEST_EXPONENT = 60  # float32 has room for 2^k W, a gradient's 2^-k, and a learning rate of 4^k times 0.1
RECORDED = 300  # steps of a trajectory at most
KINKED = ("relu", "leaky_relu")  # their derivative jumps at 0
ROUNDINGS = (
    4  # tolerance: two float32 evaluations differ by sqrt 2 times the error of one, measured 1.1 to 2 times
)

# (params, x, offsets, epsilon [L]) -> (outputs, {name: array}), as a `Model`'s layers in training
Layers = Callable[[PyTree, jax.Array, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, dict]]


class Problem(NamedTuple):
    """A network's parameters, a batch, and a loss that is linear in the outputs: sum(cotangent * outputs)."""

    params: PyTree
    x: np.ndarray  # [N, D]
    cotangent: np.ndarray  # [N, K]
    teacher: np.ndarray  # [D, K] in training, the class of a sample x is the largest entry of x @ teacher


class Derivatives(NamedTuple):
    """Outputs, intermediates, and the gradients to all that has a name."""

    outputs: jax.Array  # [N, K]
    shown: dict[str, jax.Array]  # the intermediates
    to_params: PyTree
    to_shown: dict[str, jax.Array]  # to "input" as well
    to_epsilon: jax.Array  # [L]


class Hyper(NamedTuple):
    """What a trajectory is trained with; traced, so that all run in one program."""

    learning_rate: jax.Array | float
    momentum: jax.Array | float
    weight_decay: jax.Array | float


def hidden(depth: int) -> list[str]:
    """The names of the hidden layers."""
    return [f"hidden_{i}" for i in range(depth)]


def scaled_sets(depth: int) -> dict[str, list[str]]:
    """What is scaled: each hidden layer alone, and all."""
    return {name: [name] for name in hidden(depth)} | ({"all": hidden(depth)} if depth > 1 else {})


def problem(depth: int, width: int, batch_size: int, seed: int) -> Problem:
    """He-normal kernels, batch normalization's scale and bias away from 1 and 0, and a normal batch; float32."""
    params, _ = bnjax.mlp((width,) * depth, NUM_CLASSES).init(jax.random.key(seed), (width,), 1.0)
    rng = np.random.default_rng(seed)
    for name in hidden(depth):
        params[name]["norm"] = BatchNormParams(rng.uniform(0.5, 1.5, width), rng.normal(0, 0.3, width))
    x = rng.normal(size=(batch_size, width))
    cotangent = rng.normal(size=(batch_size, NUM_CLASSES)) / batch_size
    return cast(Problem(params, x, cotangent, rng.normal(size=(width, NUM_CLASSES))), np.float32)


def cast(tree: PyTree, dtype: type) -> PyTree:
    """All arrays as numpy's, of that type."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def mlp_layers(depth: int, width: int, activation: str, norm: str = "batch", epsilon: float = 0.0) -> Layers:
    """Those of `bnjax.mlp`, whose one epsilon is a number: the argument of the layers is not used."""
    model = bnjax.mlp((width,) * depth, NUM_CLASSES, activation, norm, epsilon=epsilon, use_bias=False)
    # Running statistics are not used in training: their shapes are enough.
    _, shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), (width,), 1.0))
    stats = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return lambda params, x, offsets, epsilon: model.layers(params, stats, x, offsets, train=True)


def layers_of_epsilon(activation: str) -> Layers:
    """The same network with an epsilon for each layer, which may be traced and differentiated in."""
    phi = activations.get(activation)

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
    """(problem, epsilon [L]) -> `Derivatives`, as numpy arrays of the problem's type.

    W comes scaled and epsilon is traced: one compiled program for every a.
    """
    compiled = jax.jit(partial(derivatives, layers))

    def run(p: Problem, epsilon: np.ndarray) -> Derivatives:
        return jax.tree.map(np.asarray, compiled(p.params, p.x, p.cotangent, epsilon.astype(p.x.dtype)))

    return run


def scaled(p: Problem, names: Sequence[str], a: float) -> Problem:
    """The kernels of the named layers times a."""
    a = p.x.dtype.type(a)
    changed = {name: p.params[name] | {"kernel": a * p.params[name]["kernel"]} for name in names}
    return p._replace(params=p.params | changed)


def of_layers(epsilon: float, depth: int, names: Sequence[str] = (), a: float = 1.0) -> np.ndarray:
    """a^2 epsilon in the named layers, epsilon in the others: [L]."""
    return np.array([epsilon * a * a if name in names else epsilon for name in hidden(depth)])


def representable(value: float, a: float = 1.0) -> bool:
    """Whether `a^2 value` is 0 or a normal float32 number; what is smaller, XLA takes for 0."""
    limits = np.finfo(np.float32)
    return value == 0 or float(limits.tiny) <= value * a * a <= float(limits.max)


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, Euclidean norms: 0 if and only if they agree bitwise, inf for a NaN."""
    found, expected = np.float64(found), np.float64(expected)
    if np.array_equal(found, expected) and np.array_equal(np.signbit(found), np.signbit(expected)):
        return 0.0
    tiny = np.finfo(float).tiny
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), tiny))
    return math.inf if math.isnan(ratio) else max(ratio, tiny)


def law_deviations(
    found: Derivatives, expected: Derivatives, names: Sequence[str], a: float = 1.0
) -> list[float]:
    """Of each of LAWS, where the kernels of the named layers were multiplied by a; the largest over these layers."""

    def others(params):
        """All as one vector: in a linear network those of BN's bias are 0 but for rounding."""
        kernels = [(jax.tree_util.DictKey(name), jax.tree_util.DictKey("kernel")) for name in names]
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return np.concatenate([leaf.ravel() for path, leaf in leaves if path not in kernels])

    def kernel(d, name, a=1.0):
        return a * np.float64(d.to_params[name]["kernel"])

    inputs = [input_of(name) for name in names]
    return [
        deviation(found.outputs, expected.outputs),
        max(deviation(found.to_shown[name], expected.to_shown[name]) for name in inputs),
        max(deviation(kernel(found, name, a), kernel(expected, name)) for name in names),
        deviation(others(found.to_params), others(expected.to_params)),
    ]


def input_of(layer: str) -> str:
    """What `Derivatives.to_shown` calls the input of a hidden layer."""
    i = int(layer.removeprefix("hidden_"))
    return f"hidden_{i - 1}/activation" if i else "input"


def crossings(found: Derivatives, expected: Derivatives) -> int:
    """How many activations are above 0 in one and not in the other: samples on two sides of a kink."""
    names = [name for name in found.shown if name.endswith("/activation")]
    return sum(int(((found.shown[name] > 0) != (expected.shown[name] > 0)).sum()) for name in names)


def measure_laws(
    run: Callable, p: Problem, epsilon: float, factors: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Under (W -> a W, epsilon -> a^2 epsilon), in each set of layers: the deviations, and how many samples cross 0.

    Returns:
      [sets, laws, factors], NaN where float32 has no normal number for a^2 epsilon, and [sets, factors].
    """
    depth = len(p.params) - 1
    sets = scaled_sets(depth)
    found = np.full((len(sets), len(LAWS), len(factors)), np.nan)
    crossed = np.zeros((len(sets), len(factors)), int)
    expected = run(p, of_layers(epsilon, depth))
    for i, names in enumerate(sets.values()):
        for j, a in enumerate(factors):
            if representable(epsilon, a):
                d = run(scaled(p, names, a), of_layers(epsilon, depth, names, a))
                found[i, :, j] = law_deviations(d, expected, names, float(p.x.dtype.type(a)))
                crossed[i, j] = crossings(d, expected)
    return found, crossed


def rounding_errors(run: Callable, p: Problem, epsilon: float) -> list[float]:
    """[laws] deviation of float32 from float64, at a = 1: what one evaluation in float32 rounds."""
    depth = len(p.params) - 1
    with jax.enable_x64(True):
        exact = run(cast(p, np.float64), of_layers(epsilon, depth))
    return law_deviations(run(p, of_layers(epsilon, depth)), exact, hidden(depth))


def cosines(d: Derivatives, p: Problem) -> list[float]:
    """<W, dL/dW> / (|W| |dL/dW|) of each hidden layer."""
    found = []
    for name in hidden(len(p.params) - 1):
        W, gradient = np.float64(p.params[name]["kernel"]), np.float64(d.to_params[name]["kernel"])
        unit = max(np.linalg.norm(W) * np.linalg.norm(gradient), np.finfo(float).tiny)
        found.append(float((W * gradient).sum() / unit))
    return found


def powers_of_a(run: Callable, p: Problem) -> np.ndarray:
    """With which power of a norms grow: least and greatest log-log slope from a = 1/8 to 8, [POWERS, 2].

    One hidden layer is scaled, each in turn; in the last row all are. NaN where there is nothing to measure.
    """
    names = hidden(len(p.params) - 1)
    epsilon = of_layers(0.0, len(names))
    found = [[] for _ in POWERS]
    for members in ([name] for name in names):
        (own,) = members
        found[:4] = [[*rows, []] for rows in found[:4]]
        for a in 2.0 ** np.arange(-3, 4):
            d = run(scaled(p, members, a), epsilon)
            kernels = {name: d.to_params[name]["kernel"] for name in names}
            found[0][-1].append([d.outputs])
            found[1][-1].append([d.to_shown[input_of(own)]])
            found[2][-1].append([kernels.pop(own)])
            found[3][-1].append(list(kernels.values()))
    found[4] = [[]]
    for a in 2.0 ** np.arange(-3, 4):
        d = run(scaled(p, names, a), epsilon)
        found[4][-1].append([d.to_params[name]["kernel"] for name in names])
    bounds = np.full((len(POWERS), 2), np.nan)
    for row, of_members in enumerate(found):
        norms = np.array(
            [[[np.linalg.norm(np.float64(v)) for v in at] for at in grid] for grid in of_members]
        )
        if norms.size and (norms > 0).all():
            slopes = np.diff(np.log2(norms), axis=1)
            bounds[row] = slopes.min(), slopes.max()
    return bounds


def epsilon_response(fixed: Callable, traced: Layers, p: Problem, epsilon: float, factors) -> xr.Dataset:
    """W -> a W in all layers at a fixed epsilon, in float64: the change, and what predicts it.

    As f(a W, a^2 epsilon) = f(W, epsilon), it is the change at epsilon -> epsilon / a^2. To first order that is
    (epsilon / a^2 - epsilon) df / d epsilon. The gradient of a ReLU network is not differentiable where a sample is
    at a kink: what jumps there the first order misses.

    Args:
      fixed: the program of `bnjax.mlp` at this epsilon, by which the change is measured.
      traced: the layers by which it is predicted.
      p: the network and its batch.
      epsilon: above 0.
      factors: the a, none of them 1.

    Returns:
      [factor_at_epsilon, predicted]: `measured` and `first_order` changes over what changes, and what the
      predictions leave of the measured change: `exact_error`, `first_order_error`.
    """
    depth = len(p.params) - 1
    p = cast(p, np.float64)

    def picked(d, a=1.0):
        gradients = [a * d.to_params[name]["kernel"] for name in ("hidden_0", f"hidden_{depth - 1}")]
        return dict(zip(PREDICTED, [d.outputs, *gradients], strict=True))

    def of_epsilon(value):
        return picked(derivatives(traced, p.params, p.x, p.cotangent, value * jnp.ones(depth)))

    norm = np.linalg.norm
    rows = {"measured": [], "first_order": [], "exact_error": [], "first_order_error": []}
    with jax.enable_x64(True):
        before = picked(fixed(p, of_layers(0.0, depth)))
        at_epsilon, slope = jax.jit(lambda value: jax.jvp(of_epsilon, (value,), (1.0,)))(epsilon)
        predict = jax.jit(of_epsilon)
        for a in factors:
            after = picked(fixed(scaled(p, hidden(depth), a), of_layers(0.0, depth)), a)
            there = predict(epsilon / (a * a))
            for name in PREDICTED:
                change = after[name] - before[name]
                linear = (epsilon / (a * a) - epsilon) * slope[name]
                rows["measured"].append(norm(change) / norm(before[name]))
                rows["first_order"].append(norm(linear) / norm(before[name]))
                rows["exact_error"].append(norm(change - (there[name] - at_epsilon[name])) / norm(change))
                rows["first_order_error"].append(norm(change - linear) / norm(change))
    shape = (len(factors), len(PREDICTED))
    dims = ("factor_at_epsilon", "predicted")
    return xr.Dataset({name: (dims, np.reshape(values, shape)) for name, values in rows.items()})


def inner_products(fixed: Callable, traced: Callable, p: Problem, epsilon: float) -> np.ndarray:
    """<W, dL/dW> of each layer at a fixed epsilon, in float64.

    d/da of f(a W, a^2 epsilon) = f(W, epsilon) in one layer, at a = 1, is <W, dL/dW> + 2 epsilon dL/d epsilon = 0.
    And x_hat = (z - mean) / sigma with sigma^2 = var + epsilon has d x_hat / d epsilon = -x_hat / (2 sigma^2), so
    that, with delta the gradient to x_hat,

        <W, dL/dW> = -2 epsilon dL/d epsilon = epsilon sum_f (1 / sigma_f^2) sum_n delta_nf x_hat_nf

    Args:
      fixed: the program of `bnjax.mlp` at this epsilon.
      traced: the program of `layers_of_epsilon`.
      p: the network and its batch.
      epsilon: above 0.

    Returns:
      [3, L]: the three sides, by autodiff of `bnjax.mlp`, by autodiff in epsilon, and by the sum.
    """
    depth = len(p.params) - 1
    p = cast(p, np.float64)
    rows = []
    with jax.enable_x64(True):
        d = fixed(p, of_layers(epsilon, depth))
        to_epsilon = traced(p, of_layers(epsilon, depth)).to_epsilon
        for name, derivative in zip(hidden(depth), to_epsilon, strict=True):
            x_hat, inv_sigma = batch_norm.standardize(d.shown[f"{name}/preactivation"], epsilon)
            delta = d.to_shown[f"{name}/norm"] * p.params[name]["norm"].scale
            inner = (p.params[name]["kernel"] * d.to_params[name]["kernel"]).sum()
            rows.append([inner, -2 * epsilon * derivative, epsilon * (inv_sigma**2 * delta * x_hat).sum()])
    return np.array(rows, float).T


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


class Trajectories(NamedTuple):
    """Runs at W -> a W, epsilon -> a^2 epsilon, learning rate -> a^2 times it, weight decay -> 1 / a^2 times it."""

    deviation: (
        np.ndarray
    )  # [factors, recorded] of W / a from W at a = 1; the largest over the layers. NaN: not run
    crossed: np.ndarray  # [factors, recorded] how many activations of that step's batch are on two sides of 0
    norm: np.ndarray  # [recorded] |W| over |W| at the start, at a = 1
    first_step: float  # |W after one step - W| / |W| at a = 1, the largest over the layers


def trajectories(train: Callable, p: Problem, names, epsilon: float, factors, hyper: Hyper, recorded):
    """`Trajectories` of the named layers, run side by side. What float32 has no normal number for is not run."""
    depth = len(p.params) - 1
    factors = [float(p.x.dtype.type(a)) for a in factors]

    def start(a):
        rates = hyper._replace(
            learning_rate=hyper.learning_rate * a * a, weight_decay=hyper.weight_decay / (a * a)
        )
        return train(scaled(p, names, a), names, of_layers(epsilon, depth, names, a), rates, recorded)

    def kernels(params):
        return {name: np.float64(params[name]["kernel"]) for name in names}

    def size(kernels):
        return math.sqrt(sum(float(np.square(kernel).sum()) for kernel in kernels.values()))

    possible = [
        j
        for j, a in enumerate(factors)
        if representable(hyper.learning_rate, a)
        and representable(hyper.weight_decay, 1 / a)
        and representable(epsilon, a)
    ]
    found = np.full((len(factors), len(recorded)), np.nan)
    crossed = np.zeros((len(factors), len(recorded)), int)
    norm = np.zeros(len(recorded))
    initial = kernels(p.params)
    first_step = math.nan
    runs = zip(start(1.0), *(start(factors[j]) for j in possible), strict=True)
    for t, ((params, positive), *others) in enumerate(runs):
        expected = kernels(params)
        norm[t] = size(expected) / size(initial)
        if t == 0:
            first_step = max(deviation(expected[name], initial[name]) for name in names)
        for j, (scaled_params, scaled_positive) in zip(possible, others, strict=True):
            new = kernels(scaled_params)
            found[j, t] = max(deviation(new[name] / factors[j], expected[name]) for name in names)
            crossed[j, t] = (np.asarray(positive) != np.asarray(scaled_positive)).sum()
    return Trajectories(found, crossed, norm, first_step)


class Growth(NamedTuple):
    """How a deviation grows from step to step, fitted between two steps."""

    kind: str  # "power", "exponential", or "" where there are too few steps to tell
    rate: np.ndarray  # [factors] the power of the step, or e-folds a step
    start: int
    end: int


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


def measure_static(
    p: Problem, factors: Sequence[float], epsilons: Sequence[float], tick: Callable
) -> xr.Dataset:
    """All that needs no training."""
    network = FLAGS.depth, FLAGS.width
    exponents = np.arange(-FLAGS.exponent, FLAGS.exponent + 1)
    contrast = list(dict.fromkeys((FLAGS.activation, "relu", "sigmoid")))
    norms = ("batch", "none")
    programs = {
        (activation, norm): program(mlp_layers(*network, activation, norm))
        for activation in contrast
        for norm in norms
    }
    normed, bare = (programs[FLAGS.activation, norm] for norm in norms)
    traced_layers = layers_of_epsilon(FLAGS.activation)
    traced = program(traced_layers)
    bitwise, others, crossed, rounding = [], [], [], []
    for epsilon in (0.0, *epsilons):
        run = traced if epsilon else normed
        bitwise.append(measure_laws(run, p, epsilon, 2.0**exponents)[0])
        found, crossing = measure_laws(run, p, epsilon, factors)
        others.append(found)
        crossed.append(crossing)
        rounding.append(rounding_errors(run, p, epsilon))
        tick()
    powers = []
    for activation in contrast:
        powers.append([powers_of_a(programs[activation, norm], p) for norm in norms])
        tick()
    responses, products = [], []
    grid = np.union1d(10.0 ** np.arange(-3, 1.1, 0.25), factors)
    grid = grid[grid != 1]
    for epsilon in epsilons:
        fixed = program(mlp_layers(*network, FLAGS.activation, epsilon=epsilon))
        responses.append(epsilon_response(fixed, traced_layers, p, epsilon, grid))
        products.append(inner_products(fixed, traced, p, epsilon))
        tick()
    zero = of_layers(0.0, FLAGS.depth)
    return (
        xr.concat(responses, dim="fixed_epsilon")
        .assign(
            power_of_two=(("epsilon", "scaled", "law", "exponent"), np.array(bitwise)),
            other=(("epsilon", "scaled", "law", "factor"), np.array(others)),
            crossed=(("epsilon", "scaled", "factor"), np.array(crossed)),
            rounding=(("epsilon", "law"), np.array(rounding)),
            without=(("scaled", "law"), measure_laws(bare, p, 0.0, [2.0])[0][..., 0]),
            cosine=(("norm", "layer"), np.array([cosines(run(p, zero), p) for run in (normed, bare)])),
            power=(("activation", "norm", "grows", "bound"), np.array(powers)),
            inner_product=(("fixed_epsilon", "side", "layer"), np.array(products)),
        )
        .assign_coords(
            epsilon=[0.0, *epsilons],
            fixed_epsilon=list(epsilons),
            factor_at_epsilon=grid,
            exponent=exponents,
            factor=list(factors),
            scaled=labels(scaled_sets(FLAGS.depth)),
            law=labels(LAWS),
            predicted=labels(PREDICTED),
            activation=labels(contrast),
            norm=labels(norms),
            grows=labels(POWERS),
            bound=labels(("least", "greatest")),
            side=labels(("<W, dL/dW>", "-2 epsilon dL/d epsilon", "sum")),
            layer=labels(hidden(FLAGS.depth)),
        )
    )


def measure_training(
    p: Problem, factors: Sequence[float], epsilons: Sequence[float], tick: Callable
) -> xr.Dataset:
    """Trajectories: of all hidden layers and of each alone for a = 2^k; of all, step by step, for other a."""
    network, names = (FLAGS.depth, FLAGS.width), hidden(FLAGS.depth)
    steps = np.unique(np.geomspace(1, FLAGS.steps, RECORDED).round().astype(int))
    if FLAGS.steps <= RECORDED:
        steps = np.arange(1, FLAGS.steps + 1)
    few = np.unique(np.geomspace(1, FLAGS.steps, 5).round().astype(int))
    K = FLAGS.exponent
    exponents = np.unique([sign * k for k in (1, K // 4, K // 2, 3 * K // 4, K) for sign in (-1, 1) if k])
    hypers = [Hyper(FLAGS.learning_rate, FLAGS.momentum, decay) for decay in (0.0, FLAGS.weight_decay)]

    def run(train, members, epsilon, factors, recorded, p=p):
        return [trajectories(train, p, members, epsilon, factors, hyper, recorded) for hyper in hypers]

    trained = list(dict.fromkeys((FLAGS.activation, "tanh")))  # tanh has no kink
    curves, double, bitwise = [], [], []
    for activation in trained:
        train = trainer(mlp_layers(*network, activation), FLAGS.batch_size, FLAGS.seed)
        curves.append(run(train, names, 0.0, factors, steps))
        tick()
        with jax.enable_x64(True):
            found = run(train, names, 0.0, [3.0], steps, cast(p, np.float64))
            double.append([of_decay.deviation[0] for of_decay in found])
        tick()
        if activation == FLAGS.activation:
            for members in scaled_sets(FLAGS.depth).values():
                found = run(train, members, 0.0, 2.0**exponents, few)
                bitwise.append([of_decay.deviation.max(1) for of_decay in found])
                tick()
    train = trainer(layers_of_epsilon(FLAGS.activation), FLAGS.batch_size, FLAGS.seed)
    with_epsilon = [
        [of_decay.deviation.max(1) for of_decay in run(train, names, epsilon, 2.0**exponents, few)]
        for epsilon in epsilons
    ]
    tick()
    bare = trainer(mlp_layers(*network, FLAGS.activation, "none"), FLAGS.batch_size, FLAGS.seed)
    without = run(bare, names, 0.0, [2.0], few)
    tick()

    def stack(field):
        return np.array([[getattr(of_decay, field) for of_decay in of_network] for of_network in curves])

    return xr.Dataset(
        {
            "trajectory_power_of_two": (("scaled", "decay", "sampled_exponent"), np.array(bitwise)),
            "trajectory_with_epsilon": (
                ("fixed_epsilon", "decay", "sampled_exponent"),
                np.array(with_epsilon),
            ),
            "trajectory_without": (("decay", "few"), np.array([found.deviation[0] for found in without])),
            "trajectory_without_norm": (("decay", "few"), np.array([found.norm for found in without])),
            "trajectory": (("trained", "decay", "factor", "step"), stack("deviation")),
            "trajectory_crossed": (("trained", "decay", "factor", "step"), stack("crossed")),
            "trajectory_norm": (("trained", "decay", "step"), stack("norm")),
            "trajectory_first_step": (("trained", "decay"), stack("first_step")),
            "trajectory_float64": (("trained", "decay", "step"), np.array(double)),
        },
        coords={
            "scaled": labels(scaled_sets(FLAGS.depth)),
            "decay": labels(("none", "weight_decay / a^2")),
            "sampled_exponent": exponents,
            "trained": labels(trained),
            "factor": list(factors),
            "step": steps,
            "few": few,
            "fixed_epsilon": list(epsilons),
        },
    )


def labels(names) -> np.ndarray:
    """A coordinate of strings."""
    return np.array(list(names), object)


def broken(results: xr.Dataset) -> list[str]:
    """The laws that do not hold bitwise for some a = 2^k, and where first."""
    found = []
    for name in ("power_of_two", "trajectory_power_of_two", "trajectory_with_epsilon"):
        wrong = (results[name] != 0) & results[name].notnull()
        for index in np.argwhere(wrong.values)[:1]:
            where = ", ".join(
                f"{dim} {results[dim].values[i]}" for dim, i in zip(wrong.dims, index, strict=True)
            )
            found.append(f"{int(wrong.sum())} of {name} are not 0, the first at {where}")
    return found


def number(value: float) -> str:
    """A deviation, for a table."""
    return "0" if value == 0 else f"{value:.1e}"


def span(values: np.ndarray, form: Callable = number) -> str:
    """Least and greatest, or the one value."""
    values = np.ravel(values)[~np.isnan(np.ravel(values))]
    if not len(values):
        return "-"
    low, high = form(values.min()), form(values.max())
    return low if low == high else f"{low} .. {high}"


def measured_range(values: xr.DataArray, dim: str) -> str:
    """From which to which exponent anything was measured."""
    kept = values[dim].values[values.notnull().any([d for d in values.dims if d != dim]).values]
    return f"{kept.min()} .. {kept.max()}" if len(kept) else "-"


def clean(at: xr.Dataset) -> xr.DataArray:
    """The deviations for other a, but for those where a sample crossed a kink."""
    return at.other if FLAGS.activation not in KINKED else at.other.where(at.crossed == 0)


def laws_table(results: xr.Dataset) -> Table:
    """Law x largest deviation."""
    table = make_table(
        f"Largest deviation from each law, |found - law| / |law|: {FLAGS.activation}, {FLAGS.depth} hidden layers, "
        "each scaled alone and all at once",
        [
            "law",
            "epsilon",
            "a = 2^k",
            "k",
            "other a",
            f"{ROUNDINGS} roundings",
            "across a kink",
            "without BN, a = 2",
        ],
    )
    for epsilon in results.epsilon.values:
        at = results.sel(epsilon=epsilon)
        across = at.other.where(at.other != clean(at))
        for law in LAWS:
            table.add_row(
                law,
                f"a^2 {epsilon:g}" if epsilon else "0",
                number(float(at.power_of_two.sel(law=law).max())),
                measured_range(at.power_of_two.sel(law=law), "exponent"),
                span(clean(at).sel(law=law).max()),
                number(ROUNDINGS * float(at.rounding.sel(law=law))),
                span(across.sel(law=law).max()),
                "" if epsilon else span(at.without.sel(law=law).values),
            )
        if not epsilon:
            size = np.abs(results.cosine)
            cells = number(float(size.sel(norm="batch").max())), "", "", span(size.sel(norm="none").values)
            table.add_row("<W, dL/dW> / |W| |dL/dW| = 0", "0", "", "", *cells)
        table.add_section()
    for decay in results.decay.values:
        at = results.sel(decay=decay)
        for epsilon in results.epsilon.values:
            rows = (
                at.trajectory_with_epsilon.sel(fixed_epsilon=epsilon)
                if epsilon
                else at.trajectory_power_of_two
            )
            without = at.trajectory_without[-1]
            diverged = not np.isfinite(without) and np.isfinite(at.trajectory_without_norm[-1])
            table.add_row(
                f"W / a, {FLAGS.steps} steps" + ("" if decay == "none" else ", decay / a^2"),
                f"a^2 {epsilon:g}" if epsilon else "0",
                number(float(rows.max())),
                measured_range(rows, "sampled_exponent"),
                "" if epsilon else span(at.trajectory.sel(trained=FLAGS.activation).isel(step=-1).max()),
                "",
                "",
                "" if epsilon else "diverges" if diverged else number(float(without)),
            )
    return table


def powers_table(results: xr.Dataset) -> Table:
    """With BN and without: what grows with which power of a."""
    title = "W -> a W in one hidden layer: the power of a in a norm, a from 1/8 to 8, least .. greatest"
    table = make_table(title, ["network", *POWERS])
    for activation in results.activation.values:
        for norm, name in (("batch", "BN"), ("none", "no BN")):
            bounds = results.power.sel(activation=activation, norm=norm).values.round(3) + 0.0
            table.add_row(f"{activation}, {name}", *(span(bound, lambda v: f"{v:.3g}") for bound in bounds))
    return table


def growth_of(results: xr.Dataset, activation: str, decay: str) -> tuple[Growth, int | None]:
    """While the deviation is below 1e-2; and, of a kinked activation, before the step of the first crossing."""
    at = results.sel(trained=activation, decay=decay)
    ended = (at.trajectory.values > 1e-2).any(0)
    crossed = at.trajectory_crossed.values.any(0) & (activation in KINKED)
    step = int(np.argmax(crossed)) if crossed.any() else None
    return growth(at.trajectory.values, ended | crossed, at.step.values), step


def growth_table(results: xr.Dataset) -> Table:
    """How rounding grows over training."""
    table = make_table(
        "Deviation of W(t) / a from W(t) at a = 1 over training, a no power of two: least .. greatest",
        [
            "network",
            "weight decay",
            "1 step",
            "allowed",
            "last step",
            "in float64",
            "grows as",
            "at the first kink crossed",
            "|W| over start",
        ],
    )
    for activation, decay in itertools.product(results.trained.values, results.decay.values):
        at = results.sel(trained=activation, decay=decay)
        fit, step = growth_of(results, activation, decay)
        words = "too few steps to tell"
        if fit.kind == "power":
            words = f"t^{span(fit.rate, lambda v: f'{v:.2f}')}, t {fit.start} .. {fit.end}"
        elif fit.kind:
            words = f"x e in {span(1 / fit.rate, lambda v: f'{v:.0f}')} steps, t {fit.start} .. {fit.end}"
        kink = "none crossed" if activation in KINKED else "has no kink"
        if step is not None:
            around = [float(at.trajectory.isel(step=i).max()) for i in (max(step - 1, 0), step)]
            kink = f"t {at.step.values[step]}: {' -> '.join(map(number, around))}"
        # W itself is rounded twice, in a W and in the sum with the update; then there is the update's own error.
        allowed = ROUNDINGS * (2.0**-24 + float(at.trajectory_first_step) * float(results.rounding.max()))
        table.add_row(
            activation,
            decay,
            span(at.trajectory.isel(step=0).values),
            number(allowed),
            span(at.trajectory.isel(step=-1).values),
            number(float(at.trajectory_float64[-1])),
            words,
            kink,
            f"{float(at.trajectory_norm[-1]):.2f}",
        )
    return table


def epsilon_table(results: xr.Dataset, factors: Sequence[float]) -> Table:
    """Predicted against measured, at a fixed epsilon."""
    table = make_table(
        "W -> a W in all layers at a FIXED epsilon, float64: relative change, measured (to first order in epsilon)",
        ["epsilon", "a", *PREDICTED, "missed by f(W, epsilon / a^2)", "missed to first order"],
    )
    for epsilon in results.fixed_epsilon.values:
        for a in factors:
            at = results.sel(fixed_epsilon=epsilon, factor_at_epsilon=a)
            pairs = zip(at.measured.values, at.first_order.values, strict=True)
            table.add_row(
                f"{epsilon:g}",
                f"{a:.4g}",
                *(f"{number(measured)} ({number(linear)})" for measured, linear in pairs),
                number(float(at.exact_error.max())),
                span(at.first_order_error.values, lambda v: f"{v:.0e}"),
            )
        table.add_section()
    return table


def make_table(title: str, columns: Sequence[str]) -> Table:
    """With its words to the left and its numbers to the right."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def answer(results: xr.Dataset) -> str:
    """What was found, in words with its figures."""
    lines = []
    for epsilon in results.fixed_epsilon.values:
        sides = results.inner_product.sel(fixed_epsilon=epsilon).values
        apart = np.abs(sides[1:] - sides[0]).max() / np.abs(sides[0]).max()
        lines.append(
            f"At epsilon {epsilon:g}, <W, dL/dW> (up to {np.abs(sides[0]).max():.1e}) is -2 epsilon dL/d epsilon, and "
            f"epsilon sum_f (1 / sigma_f^2) sum_n delta_nf x_hat_nf, to {apart:.0e} of that in float64."
        )
    ratios = clean(results) / results.rounding
    lines.append(
        f"For other a, one step is off by at most {float(ratios.max()):.2g} times what one float32 evaluation rounds"
        + (" (where no sample crosses the kink)." if FLAGS.activation in KINKED else ".")
    )
    names = ("power_of_two", "trajectory_power_of_two", "trajectory_with_epsilon")
    count = sum(int(results[name].notnull().sum()) for name in names)
    wrong = broken(results)
    lines.append(
        "A LAW IS BROKEN: " + "; ".join(wrong)
        if wrong
        else f"For a = 2^k every law holds bitwise: all {count:,} deviations are exactly 0. The size of W in front of "
        "batch normalization is invisible forward and to all layers below; its own gradient only shrinks by 1 / a."
    )
    return "\n".join(lines)


def check_flags() -> tuple[list[float], list[float]]:
    """The factors and the epsilons.

    Raises:
      ValueError: naming the flag, for a value out of range.
    """
    activations.get(FLAGS.activation)
    factors = common.parse_floats("factors", FLAGS.factors)
    epsilons = common.parse_floats("epsilon", FLAGS.epsilon)
    for a in factors:
        if not 2.0**-LARGEST_EXPONENT <= a <= 2.0**LARGEST_EXPONENT:
            raise ValueError(f"--factors must be in [2^-{LARGEST_EXPONENT}, 2^{LARGEST_EXPONENT}], got {a:g}")
        if math.frexp(np.float32(a))[0] == 0.5:
            raise ValueError(f"--factors are no powers of two, which --exponent is for; got {a:g}")
    for epsilon in epsilons:
        if not epsilon > 0 or not representable(epsilon):
            raise ValueError(f"--epsilon must be above 0 and a normal float32 number, got {epsilon:g}")
    for flag, values in (("factors", factors), ("epsilon", epsilons)):
        if len({*np.float32(values)}) < len(values):
            raise ValueError(f"--{flag} names a value twice: {FLAGS[flag].value}")
    if FLAGS.exponent > LARGEST_EXPONENT:
        raise ValueError(f"--exponent must be at most {LARGEST_EXPONENT}, got {FLAGS.exponent}")
    if not FLAGS.learning_rate > 0 or not representable(FLAGS.learning_rate):
        raise ValueError(
            f"--learning_rate must be above 0 and a normal float32 number, got {FLAGS.learning_rate}"
        )
    if not 0 <= FLAGS.momentum < 1:
        raise ValueError(f"--momentum must be in [0, 1), got {FLAGS.momentum}")
    if not FLAGS.weight_decay >= 0 or not representable(FLAGS.weight_decay):
        raise ValueError(f"--weight_decay must be 0 or a normal float32 number, got {FLAGS.weight_decay}")
    return factors, epsilons


def draw(results: xr.Dataset, path: Path) -> None:
    """The figure."""
    from bnjax import plots

    plots.scale_laws(
        results[["trajectory", "trajectory_float64"]],
        results[["measured", "first_order"]].sel(predicted="outputs"),
        exact="" if broken(results) else f"a = 2^k, |k| ≤ {FLAGS.exponent}: exactly 0",
        title=f"W → aW in {FLAGS.depth} layers of {FLAGS.width} with BN; SGD, learning rate "
        f"{FLAGS.learning_rate:g} a², momentum {FLAGS.momentum:g}, batch {FLAGS.batch_size}",
    ).savefig(path)


@common.interruptible()
def main(argv: list[str]) -> None:
    """Flags -> measurements -> tables, figure, stored result."""
    common.prepare_process()
    folder = Path(FLAGS.out).expanduser()
    try:
        common.check_arguments(argv)
        factors, epsilons = check_flags()
        from bnjax import plots  # noqa: F401  before any work is done

        common.check_writable(folder)
    except (ValueError, OSError, ImportError) as error:
        raise common.fail(str(error)) from None
    p = problem(FLAGS.depth, FLAGS.width, FLAGS.batch_size, FLAGS.seed)
    total = 1 + 2 * len(epsilons) + len({FLAGS.activation, "relu", "sigmoid"})
    total += 2 * len({FLAGS.activation, "tanh"}) + len(scaled_sets(FLAGS.depth)) + 2
    with (
        jax.default_matmul_precision("highest"),
        rich.progress.Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("measuring", total=total)
        parts = [
            measure(p, factors, epsilons, lambda: progress.advance(task))
            for measure in (measure_static, measure_training)
        ]
    results = xr.merge(parts)
    results.attrs = {
        "command": common.command("scale_laws"),
        "device": jax.devices()[0].device_kind,
        "versions": {"bnjax": bnjax.__version__, "jax": jax.__version__},
    }
    store.save(results, folder / common.RESULTS, overwrite=True)
    draw(results, folder / "scale_laws.png")
    tables = (
        powers_table(results),
        epsilon_table(results, factors),
        growth_table(results),
        laws_table(results),
    )
    for table in tables:
        common.console().print(table)
    print(answer(results))
    print(f"Figure: {folder / 'scale_laws.png'}. All measurements: {folder / common.RESULTS}")
    if not np.isfinite(results.trajectory_norm).all():
        raise common.fail(
            f"training at a = 1 is not finite: --learning_rate={FLAGS.learning_rate} is too large"
        )
    if wrong := broken(results):
        raise common.fail("not bitwise: " + "; ".join(wrong))


if __name__ == "__main__":
    app.run(main)
