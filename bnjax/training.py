"""ONE training run as a pure function of its hyperparameters.

    train = make_train(model, config)       # config: what changes the compiled program
    history = train(hyper, ds)              # hyper: scalars that may be traced; ds: arrays

`train` draws the initialization (which `Model.prepare` may change by the first batch), takes `config.steps` optimizer
steps on mini-batches in the order of a new shuffle each epoch (an incomplete last batch is dropped), and evaluates on
the whole test split every `config.eval_every` steps, with running statistics. It has no side effects: jit it, vmap it
over `hyper`.

A run diverges at the first step whose loss is not finite, or after the number of steps at which its test loss is not.
From there its losses are infinite and its accuracies those of guessing, 1/K, so that medians over runs need no special
case. The arithmetic goes on (to freeze the state would cost up to a tenth of the speed) until all runs of a `vmap`
have diverged; then no further step is taken. A probed run takes all its steps: what a probe measures must not
depend on the runs beside it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnjax import choices, convolution, tracing
from bnjax.losses import LOSSES
from bnjax.networks import as_model
from bnjax.types import (
    Array,
    Dataset,
    History,
    Hyperparams,
    Model,
    Probe,
    PyTree,
    Snapshot,
    Watched,
    bound,
    check_values,
    range_of,
    with_extra,
)

TEST_BATCH = 1000  # examples evaluated at once, so that memory does not grow with the test split


def _decayed(hyper, kernels):
    """Adds the gradient of `weight_decay / 2 * |W|^2` over kernels (biases, embeddings and BN's scale excluded)."""
    return optax.add_decayed_weights(hyper.weight_decay, mask=kernels)


# Of the hyperparameters, and a tree that is true for kernels.
OPTIMIZERS = MappingProxyType(
    {
        "sgd": lambda h, k: optax.chain(_decayed(h, k), optax.sgd(h.learning_rate, momentum=h.momentum)),
        "adam": lambda h, k: optax.chain(_decayed(h, k), optax.adam(h.learning_rate, b1=h.momentum)),
        "adamw": lambda h, k: optax.adamw(h.learning_rate, b1=h.momentum, weight_decay=h.weight_decay, mask=k),
        "rmsprop": lambda h, k: optax.chain(_decayed(h, k), optax.rmsprop(h.learning_rate, momentum=h.momentum)),
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """The settings that are the same for every run of a grid, and fix the compiled program.

    Attributes:
      steps: number of optimizer steps.
      batch_size: examples per step, at most the number of training examples.
      optimizer: "sgd" (with momentum), "adam", "adamw" or "rmsprop", from optax. Weight decay is added
        to the gradient, but for adamw, which decouples it. It applies to kernels (`bnjax.tracing`). Or a function of
        the cell's `Hyperparams` that returns an optax transformation: with a schedule, clipping, or decay of its own.
      loss: "cross_entropy" (of labels), "squared" (of labels, or targets [N, K] of floats), or a function of outputs
        [N, K] and targets that returns a scalar, the mean over the batch.
      eval_every: steps between evaluations; None: only after the last step. There is always one there.
      data_seed: draws the order of the data, shared by all runs.

    Raises:
      ValueError: when made with an unknown optimizer or loss, or a number that is not in [1, 2^31).
    """

    steps: int = 300
    batch_size: int = 128
    optimizer: str | Callable[[Hyperparams], optax.GradientTransformation] = "sgd"
    eval_every: int | None = None
    data_seed: int = 0
    loss: str | Callable[[jax.Array, jax.Array], jax.Array] = "cross_entropy"

    def __post_init__(self):
        for name, known in {"optimizer": OPTIMIZERS, "loss": LOSSES}.items():
            if not callable(value := getattr(self, name)):
                choices.check(name, value, known)
        for name in ("steps", "batch_size", "eval_every"):
            value = getattr(self, name)
            if value is not None or name != "eval_every":
                choices.check_count(name, value)
        if not choices.is_integer(self.data_seed) or not 0 <= self.data_seed < 2**31:
            raise ValueError(f"data_seed must be an integer in [0, 2^31), got {self.data_seed!r}")

    @property
    def loss_function(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Of outputs [N, K] and targets."""
        return self.loss if callable(self.loss) else LOSSES[self.loss]

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """The numbers of steps taken before each of the E evaluations."""
        every = self.eval_every or self.steps
        return (*range(every, self.steps, every), self.steps)


class RunState(NamedTuple):
    """A training run between two of its steps."""

    step: jax.Array  # [] int32, the number of steps that are done
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    diverged_step: jax.Array  # [] int32, -1 as long as it has not
    averages: tuple[jax.Array, jax.Array, jax.Array]
    """Training loss, accuracy and number of steps since the last evaluation."""
    curves: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    """The first four fields of History, [E] each; until an evaluation, those of a run that has diverged."""
    measured: dict[str, jax.Array]  # [1 + E, ...], by the probe
    initial: tuple[PyTree, PyTree] | None  # (params, batch_stats) at the start, for a probe

    @property
    def history(self) -> History:
        """The state of the run so far."""
        return History(*self.curves, diverged=self.diverged_step >= 0, diverged_step=self.diverged_step)


def make_train(
    model: Any, config: TrainConfig, probe: Probe | None = None, axis_name: str | None = None
) -> Callable[[Hyperparams, Dataset], History | tuple[History, dict[str, Array]]]:
    """Returns `train(hyper, ds) -> History`, pure; see the top of this module.

    Args:
      model: the network, or whatever `bnjax.as_model` takes.
      config: what is the same for all runs.
      probe: with one it is `train(hyper, ds) -> (History, {quantity: [1 + E, ...]})`: what the probe measured before
        the first step and at each of the E evaluations. It sees the run and changes nothing in it but rounding; in
        `bnjax.sweep`, on CPU, not a bit.
      axis_name: of the `vmap` around `train`, if there is one: its runs stop together. Without the name such a
        program is some 10% slower.

    `train` raises ValueError (when traced) if the batch is larger than the training split, or labels and
    examples differ in number, and for hyperparameters out of range, but where these are traced themselves.
    """
    start, advance = make_run(as_model(model), config, probe, axis_name)

    def train(hyper, ds):
        state = advance(start(hyper, ds), hyper, ds, 0, config.steps)
        return state.history if probe is None else (state.history, state.measured)

    return train


def make_run(
    model: Model, config: TrainConfig, probe: Probe | None = None, axis_name: str | None = None
) -> tuple[Callable[[Hyperparams, Dataset], RunState], Callable[..., RunState]]:
    """The parts of `make_train`, for whoever stops in between: pure functions, each for one cell.

    Returns:
      start(hyper, ds) -> RunState.
      advance(state, hyper, ds, first, until) -> RunState, after the steps from number `first` (where the state is) to
        before `until`. Both may be traced: one program takes a run in whatever segments, to the same bits. (`first` is
        no part of the state for its loops: a `vmap` would batch what they go by.)
    """
    own_apply = model.apply
    if jax.default_backend() == "cpu":
        model = model._replace(apply=convolution.on_cpu(own_apply))
        if model.prepare is not None:
            model = model._replace(prepare=convolution.on_cpu(model.prepare))
    num_evaluations = len(config.eval_steps)
    every = config.eval_every or config.steps

    def optimizer_of(hyper, params, batch_stats, ds):
        if callable(config.optimizer):
            return config.optimizer(hyper)
        x = jax.ShapeDtypeStruct((2, *ds.train_x.shape[1:]), ds.train_x.dtype)
        own = with_extra(own_apply, hyper.extra)
        kernels = tracing.read(own, params, batch_stats, x, train=False).kernels
        decayed = jax.tree_util.tree_map_with_path(lambda path, _: tracing.name_of(path) in kernels, params)
        return OPTIMIZERS[config.optimizer](hyper, decayed)

    def probed(state, hyper, ds):
        if probe is None:
            return {}
        # The barrier keeps the compiler from working the probe's arithmetic into the run's.
        seen = jax.lax.optimization_barrier((state.params, state.batch_stats, *state.initial))
        measured = probe.measure(Snapshot(*seen, ds, _as_32_bit(hyper)))
        return {name: jnp.asarray(value) for name, value in measured.items()}

    def start(hyper, ds):
        _check_shapes(ds, config)
        check_values(hyper)
        hyper = _as_32_bit(hyper)
        network = bound(model, hyper.extra)
        drawn = network.init(jax.random.key(hyper.seed), ds.train_x.shape[1:], hyper.init_scale)
        if network.prepare is not None:
            order = _order_of(jax.random.key(config.data_seed), 0, len(ds.train_x))
            drawn = network.prepare(*drawn, jnp.asarray(ds.train_x)[order[: config.batch_size]])
        opt_state = optimizer_of(hyper, *drawn, ds).init(drawn[0])
        num_classes = jax.eval_shape(_outputs(network, drawn), ds.test_x[:1]).shape[-1]
        guess = 1 / num_classes if jnp.issubdtype(ds.train_y.dtype, jnp.integer) else jnp.nan
        guessing = [jnp.full(num_evaluations, value, jnp.float32) for value in (jnp.inf, guess)]
        initial = None if probe is None else drawn
        state = RunState(
            jnp.int32(0), *drawn, opt_state, jnp.int32(-1), _no_steps(), (*guessing, *guessing), {}, initial
        )
        shapes = jax.eval_shape(probed, state, hyper, ds)
        return state._replace(
            measured={name: jnp.zeros((1 + num_evaluations, *v.shape), v.dtype) for name, v in shapes.items()}
        )

    def goes_on(state):
        """True if a further step is of any use; the same in all runs of the vmap."""
        if probe is not None:
            return True
        alive = state.diverged_step < 0
        return alive if axis_name is None else jax.lax.pmax(alive.astype(jnp.int32), axis_name) > 0

    def advance(state, hyper, ds, first, until):
        hyper = _as_32_bit(hyper)
        network, loss_function = bound(model, hyper.extra), with_extra(config.loss_function, hyper.extra)
        optimizer = optimizer_of(hyper, state.params, state.batch_stats, ds)
        num_train = len(ds.train_x)
        steps_per_epoch = num_train // config.batch_size
        data_key = jax.random.key(config.data_seed)

        def order_of(epoch):
            return _order_of(data_key, epoch, num_train)

        def mini_batch(order, step):
            position = step % steps_per_epoch
            chosen = jax.lax.dynamic_slice(order, (position * config.batch_size,), (config.batch_size,))
            return jnp.asarray(ds.train_x)[chosen], jnp.asarray(ds.train_y)[chosen]

        def loss_fn(params, batch_stats, x, y):
            outputs, batch_stats = network.apply(params, batch_stats, x, train=True)
            loss, accuracy = _loss_and_accuracy(loss_function, outputs, y)
            return loss, (accuracy, batch_stats)

        def take_step(state, order, step):
            x, y = mini_batch(order, step)
            (loss, (accuracy, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, state.batch_stats, x, y
            )
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return state._replace(
                params=optax.apply_updates(state.params, updates),
                batch_stats=batch_stats,
                opt_state=opt_state,
                diverged_step=_diverged_step(state.diverged_step, loss, step),
                averages=_add(state.averages, loss, accuracy),
            )

        def evaluated(state, number, step, due):
            """The state with evaluation `number` after that step in its curves, if it is due."""

            def evaluate():
                return _evaluate(network, loss_function, state.params, state.batch_stats, ds)

            test = _row_if(due, evaluate, state.curves[2:])
            now = _diverged_step(state.diverged_step, test[0], step)
            alive, averages = (state.diverged_step < 0, now < 0), state.averages
            return state._replace(
                diverged_step=now,
                averages=jax.tree.map(lambda a, b: jnp.where(due, a, b), _no_steps(), averages),
                curves=(
                    *_put(state.curves[:2], number, averages[:2], due & alive[0]),
                    *_put(state.curves[2:], number, test, due & alive[1]),
                ),
            )

        def measured(state, row, due):
            """The state with what the probe measures in that row, if it is due."""
            found = _row_if(due, lambda: probed(state, hyper, ds), state.measured)
            return state._replace(measured=_put(state.measured, row, found, due))

        def stretch(carry):
            """The steps to the next evaluation, or to the end of the epoch or of this segment."""
            step, state, epoch, order = carry
            here, number = step // steps_per_epoch, step // every
            of_use = (here != epoch) & goes_on(state)  # a shuffle takes as long as many steps
            order = jax.lax.cond(of_use, lambda: order_of(here), lambda: order)
            evaluation = jnp.where(number + 1 < num_evaluations, (number + 1) * every, config.steps)
            stop = jnp.minimum(jnp.minimum(evaluation, (here + 1) * steps_per_epoch), until)
            # Of a probed run the first stretch has no step, so that one place measures and is compiled.
            if probe is not None:
                begins = (step == 0) & (epoch < 0)
                stop = jnp.where(begins, 0, stop)
            _, state = jax.lax.while_loop(
                lambda carry: (carry[0] < stop) & goes_on(carry[1]),
                lambda carry: (carry[0] + 1, take_step(carry[1], order, carry[0])),
                (step, state),
            )
            state = evaluated(state, number, stop, stop == evaluation)
            if probe is not None:
                row, due = jnp.where(begins, 0, number + 1), begins | (stop == evaluation)
                state = measured(state, row, due)
            return stop, state, here, order

        first, until = jnp.int32(first), jnp.int32(until)
        begin = first, state._replace(step=until), jnp.int32(-1), jnp.arange(num_train)
        return jax.lax.while_loop(lambda carry: carry[0] < until, stretch, begin)[1]

    return start, advance


def _order_of(data_key, epoch, num_train):
    """The order of the training examples in that epoch."""
    return jax.random.permutation(jax.random.fold_in(data_key, epoch), num_train)


def _row_if(due, function, like):
    """Its values if it is due, else zeros in the form of a row of those arrays."""
    return jax.lax.cond(due, function, lambda: jax.tree.map(lambda a: jnp.zeros_like(a[0]), like))


def _put(rows, number, values, where):
    """Arrays [rows, ...] with these values in one row, where so."""
    return jax.tree.map(lambda a, v: a.at[number].set(jnp.where(where, v, a[number])), rows, values)


def _loss_and_accuracy(loss_function, outputs, targets):
    """The loss, and the fraction of labels that have the largest output; NaN for targets of floats."""
    loss = loss_function(outputs, targets).astype(jnp.float32)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        return loss, jnp.float32(jnp.nan)
    return loss, (outputs.argmax(-1) == targets).mean(dtype=jnp.float32)


def _no_steps():
    return jnp.float32(0), jnp.float32(0), jnp.int32(0)


def _add(averages, loss, accuracy):
    """Running means, which cannot overflow where no loss is infinite."""
    mean_loss, mean_accuracy, n = averages
    weight = 1 / (n + 1).astype(jnp.float32)
    return weight * loss + (1 - weight) * mean_loss, weight * accuracy + (1 - weight) * mean_accuracy, n + 1


def _diverged_step(before, loss, step):
    """The first step whose loss is not finite, -1 as long as there is none."""
    return jnp.where((before < 0) & ~jnp.isfinite(loss), step, before)


def _as_32_bit(hyper):
    """So that no 64-bit scalar, where these are on, widens the optimizer's state."""
    values = {name: jnp.asarray(value).astype(range_of(name).dtype) for name, value in hyper.named().items()}
    return Hyperparams.from_named(values)


def _outputs(model, variables):
    return lambda x: model.apply(*variables, x, train=False)[0]


def _evaluate(model, loss_function, params, batch_stats, ds):
    """Loss and accuracy over the test split, in evaluation mode, a batch at a time."""
    x, y = jnp.asarray(ds.test_x), jnp.asarray(ds.test_y)
    outputs = _outputs(model, (params, batch_stats))

    def sums(x, y):
        return jnp.stack(_loss_and_accuracy(loss_function, outputs(x), y)) * len(x)

    size = min(TEST_BATCH, len(x))
    whole = len(x) // size * size
    batches = (a[:whole].reshape(-1, size, *a.shape[1:]) for a in (x, y))
    total = jax.lax.map(lambda batch: sums(*batch), tuple(batches)).sum(0)
    if whole < len(x):
        total = total + sums(x[whole:], y[whole:])
    return tuple(total / len(x))


def check(model: Model, ds: Dataset, config: TrainConfig, extra: Mapping[str, Any] = MappingProxyType({})) -> set[str]:
    """Raises ValueError if the data does not fit itself, the batch size, the network or the loss; nothing is computed.

    Or if the configuration's functions do not return a scalar loss or an optimizer, or ask for more than is in `extra`.

    Returns:
      The names in `extra` that the network, the loss or the optimizer read.
    """
    extra = Watched({name: np.float32(value) for name, value in extra.items()})  # the type of a run
    model = bound(model, extra)
    _check_shapes(ds, config)
    train, test = ds.train_x.shape[1:], ds.test_x.shape[1:]
    if train != test:
        raise ValueError(f"training examples {train} and test examples {test} differ in shape")

    def outputs_of(x):
        state = model.init(jax.random.key(0), train, 1.0)
        return _outputs(model, state)(x), state[0]

    def train_mode():  # what is read there, such as a rate of dropout
        x = jnp.zeros((config.batch_size, *train), ds.train_x.dtype)
        return model.apply(*model.init(jax.random.key(0), train, 1.0), x, train=True)[0]

    if extra:
        jax.eval_shape(train_mode)
    if model.prepare is not None:
        if config.batch_size < 2:
            raise ValueError("batch_size must be at least 2 for a network that its first batch prepares, got 1")
        if (ds.train_x == ds.train_x[:1]).all():
            raise ValueError("train_x has examples that are all the same: no network can be prepared by them")
        x = jax.ShapeDtypeStruct((config.batch_size, *train), ds.train_x.dtype)
        drawn = jax.eval_shape(lambda: model.init(jax.random.key(0), train, 1.0))
        prepared = jax.eval_shape(model.prepare, *drawn, x)
        if jax.tree.map(jnp.shape, prepared) != jax.tree.map(jnp.shape, drawn):
            raise ValueError(f"prepare must return arrays as init does; got {prepared} for {drawn}")
    outputs, params = jax.eval_shape(outputs_of, jax.ShapeDtypeStruct((2, *train), ds.train_x.dtype))
    shape = getattr(outputs, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 2 or not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"a network's outputs must be one array [N, K] of floats; for N = 2 it gives {outputs}")
    for split, x, y in (("train", ds.train_x, ds.train_y), ("test", ds.test_x, ds.test_y)):
        if not (jnp.issubdtype(x.dtype, jnp.floating) or x.dtype in (np.int32, np.int64)):
            raise ValueError(f"{split}_x must be floating point (or int32, of tokens), got {x.dtype}")
        _check_targets(split, y, shape[1], config)
    targets = jax.ShapeDtypeStruct((2, *ds.train_y.shape[1:]), ds.train_y.dtype)
    loss = jax.eval_shape(with_extra(config.loss_function, extra), outputs, targets)
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"loss must return a scalar, the mean over the batch; got {loss}")
    if callable(config.optimizer):
        found = config.optimizer(Hyperparams(extra=extra))
        if not isinstance(found, optax.GradientTransformation):
            raise ValueError(f"optimizer must return an optax transformation, got {type(found).__name__}")
        jax.eval_shape(lambda p: found.update(p, found.init(p), p), params)  # which reads what schedules take
    return extra.read


def _check_targets(split, y, num_outputs, config):
    if jnp.issubdtype(y.dtype, jnp.floating) and config.loss != "cross_entropy":
        if y.shape[1:] != (num_outputs,):
            raise ValueError(f"{split} targets must be [N, {num_outputs}], as the outputs; got {list(y.shape)}")
        return
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"{split} labels must be integers, got {y.dtype}")
    if y.ndim != 1:
        raise ValueError(f"{split} labels must be [N], got {list(y.shape)}")
    if y.min() < 0 or y.max() >= num_outputs:
        raise ValueError(
            f"{split} labels must be in [0, {num_outputs}), the network's outputs; got {y.min()} to {y.max()}"
        )


def _check_shapes(ds, config):
    for split in ("train", "test"):
        x, y = getattr(ds, f"{split}_x"), getattr(ds, f"{split}_y")
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"the {split} split has {len(x)} examples and {len(y)} labels")
    if config.batch_size > len(ds.train_x):
        raise ValueError(f"batch_size must be at most the {len(ds.train_x)} training examples, got {config.batch_size}")
