"""ONE training run as a pure function of its hyperparameters.

    train = make_train(model, config)       # config: what changes the compiled program
    history = train(hyper, ds)              # hyper: scalars that may be traced; ds: arrays

`train` draws the initialization, takes `config.steps` optimizer steps on mini-batches in the order of a
new shuffle each epoch (an incomplete last batch is dropped), and evaluates on the whole test split every
`config.eval_every` steps, with running statistics. It has no side effects: jit it, vmap it over `hyper`.

A run diverges at the first step whose loss is not finite, or after the number of steps at which its test loss is not.
From there its losses are infinite and its accuracies those of guessing, 1/K, so that medians over runs need no special
case. The arithmetic goes on (to freeze the state would cost up to a tenth of the speed) until all runs of a `vmap`
have diverged; then no further step is taken. A probed run takes all its steps: what a probe measures must not
depend on the runs beside it.
"""

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bnjax import choices
from bnjax.types import Array, Dataset, History, Hyperparams, Model, Probe, PyTree, Snapshot

TEST_BATCH = 1000  # examples evaluated at once, so that memory does not grow with the test split


def _decayed(hyper):
    """Adds the gradient of `weight_decay / 2 * |W|^2` over weight matrices (biases and BN's scale excluded)."""
    return optax.add_decayed_weights(hyper.weight_decay, mask=_matrices)


def _matrices(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


OPTIMIZERS = MappingProxyType(
    {
        "sgd": lambda h: optax.chain(_decayed(h), optax.sgd(h.learning_rate, momentum=h.momentum)),
        "adam": lambda h: optax.chain(_decayed(h), optax.adam(h.learning_rate, b1=h.momentum)),
        "adamw": lambda h: optax.adamw(
            h.learning_rate, b1=h.momentum, weight_decay=h.weight_decay, mask=_matrices
        ),
        "rmsprop": lambda h: optax.chain(_decayed(h), optax.rmsprop(h.learning_rate, momentum=h.momentum)),
    }
)


def _is_integer(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class TrainConfig:
    """What is the same for every run of a grid, and fixes the compiled program.

    Attributes:
      steps: number of optimizer steps.
      batch_size: examples per step, at most the number of training examples.
      optimizer: "sgd" (with momentum), "adam", "adamw" or "rmsprop", from optax. Weight decay is added
        to the gradient, but for adamw, which decouples it. It applies to arrays of rank 2 and above.
      eval_every: steps between evaluations; None: only after the last step. There is always one there.
      data_seed: draws the order of the data, shared by all runs.

    Raises:
      ValueError: when made with an unknown optimizer or a number that is not positive.
    """

    steps: int = 300
    batch_size: int = 128
    optimizer: str = "sgd"
    eval_every: int | None = None
    data_seed: int = 0

    def __post_init__(self):
        choices.check("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("steps", "batch_size", "eval_every"):
            value = getattr(self, name)
            if value is None and name == "eval_every":
                continue
            if not _is_integer(value) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not _is_integer(self.data_seed) or not 0 <= self.data_seed < 2**31:
            raise ValueError(f"data_seed must be an integer in [0, 2^31), got {self.data_seed!r}")

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """The numbers of steps taken before each of the E evaluations."""
        every = self.eval_every or self.steps
        return (*range(every, self.steps, every), self.steps)


class RunState(NamedTuple):
    """A training run between two of its steps."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    diverged_step: jax.Array  # [] int32, -1 as long as it has not
    averages: tuple[jax.Array, jax.Array, jax.Array]
    """Training loss, accuracy and number of steps since the last evaluation."""
    initial: tuple[PyTree, PyTree] | None  # (params, batch_stats) at the start, for a probe


class Recorded(NamedTuple):
    """What evaluations leave behind, [evaluations, ...] each."""

    curves: tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # the first four fields of History
    measured: dict[str, jax.Array]  # by the probe


class Run(NamedTuple):
    """A training run in parts, for whoever stops in between: pure functions, each for one cell.

    start(hyper, ds) -> RunState.
    measure(state, hyper, ds) -> {quantity: what the probe measures}. Compiled together with `start` it may change the
        drawn network in its last bits.
    advance(state, hyper, ds, first, steps, evaluations) -> (RunState, Recorded): `steps` steps, of which the first is
        number `first` (it may be traced, the others not), in equal parts with an evaluation after each; or with none.
    """

    start: Callable[[Hyperparams, Dataset], RunState]
    measure: Callable[[RunState, Hyperparams, Dataset], dict[str, jax.Array]]
    advance: Callable[..., tuple[RunState, Recorded]]


def make_train(
    model: Model, config: TrainConfig, probe: Probe | None = None, axis_name: str | None = None
) -> Callable[[Hyperparams, Dataset], History | tuple[History, dict[str, Array]]]:
    """Returns `train(hyper, ds) -> History`, pure; see the top of this module.

    Args:
      model: the network.
      config: what is the same for all runs.
      probe: with one it is `train(hyper, ds) -> (History, {quantity: [1 + E, ...]})`: what the probe measured before
        the first step and at each of the E evaluations. It sees the run and changes nothing in it but rounding; in
        `bnjax.sweep`, on CPU, not a bit.
      axis_name: of the `vmap` around `train`, if there is one: its runs stop together. Without the name such a
        program is some 10% slower.

    `train` raises ValueError (when traced) if the batch is larger than the training split, or labels and
    examples differ in number.
    """
    start, measure, advance = make_run(model, config, probe, axis_name)

    def train(hyper, ds):
        state = start(hyper, ds)
        at_start, parts = measure(state, hyper, ds), []
        for first, steps, evaluations in pieces(config):
            state, recorded = advance(state, hyper, ds, first, steps, evaluations)
            parts.append(recorded)
        recorded = jax.tree.map(lambda *values: jnp.concatenate(values), *parts)
        history = history_of(state.diverged_step, recorded)
        if probe is None:
            return history
        return history, jax.tree.map(
            lambda first, rest: jnp.concatenate([first[None], rest]), at_start, recorded.measured
        )

    return train


def history_of(diverged_step: Array, recorded: Recorded) -> History:
    """The history of a run, from its last state's `diverged_step` and all evaluations."""
    return History(*recorded.curves, diverged=diverged_step >= 0, diverged_step=diverged_step)


def pieces(config: TrainConfig, segment: int | None = None) -> list[tuple[int, int, int]]:
    """The run in pieces (first step, steps, evaluations), none longer than `segment` steps, for `Run.advance`.

    Where a segment has room for several evaluations it holds as many as fit; a way to the next evaluation that is
    longer is cut into segments without one and the rest with it. Without `segment`: as few pieces as can be.
    """
    every = min(config.eval_every or config.steps, config.steps)
    segment = segment or config.steps
    found, first = [], 0
    while first < config.steps:
        until = (config.steps - first) // every  # whole intervals that are left
        if first % every == 0 and until and every <= segment:
            found.append((first, every * min(until, segment // every), min(until, segment // every)))
        else:
            left = min(every - first % every, config.steps - first)
            found.append((first, min(left, segment), int(left <= segment)))
        first += found[-1][1]
    return found


def make_run(
    model: Model, config: TrainConfig, probe: Probe | None = None, axis_name: str | None = None
) -> Run:
    """The parts that `make_train` is made of, which may be called one by one."""

    def measure(state, hyper, ds):
        if probe is None:
            return {}
        # The barrier keeps the compiler from working the probe's arithmetic into the run's.
        seen = jax.lax.optimization_barrier((state.params, state.batch_stats, *state.initial))
        measured = probe.measure(Snapshot(*seen, ds, _as_32_bit(hyper)))
        return {name: jnp.asarray(value) for name, value in measured.items()}

    def start(hyper, ds):
        _check_shapes(ds, config)
        hyper = _as_32_bit(hyper)
        drawn = model.init(jax.random.key(hyper.seed), ds.train_x.shape[1:], hyper.init_scale)
        opt_state = OPTIMIZERS[config.optimizer](hyper).init(drawn[0])
        initial = None if probe is None else drawn
        return RunState(*drawn, opt_state, jnp.int32(-1), _no_steps(), initial)

    def goes_on(state):
        """Whether a further step is of any use; the same in all runs of the vmap."""
        if probe is not None:
            return True
        alive = state.diverged_step < 0
        return alive if axis_name is None else jax.lax.pmax(alive.astype(jnp.int32), axis_name) > 0

    def advance(state, hyper, ds, first, steps, evaluations):
        hyper = _as_32_bit(hyper)
        optimizer = OPTIMIZERS[config.optimizer](hyper)
        num_train = len(ds.train_x)
        steps_per_epoch = num_train // config.batch_size
        data_key = jax.random.key(config.data_seed)

        def order_of(epoch):
            return jax.random.permutation(jax.random.fold_in(data_key, epoch), num_train)

        def mini_batch(order, step):
            position = step % steps_per_epoch
            chosen = jax.lax.dynamic_slice(order, (position * config.batch_size,), (config.batch_size,))
            return jnp.asarray(ds.train_x)[chosen], jnp.asarray(ds.train_y)[chosen]

        def loss_fn(params, batch_stats, x, y):
            logits, batch_stats = model.apply(params, batch_stats, x, train=True)
            loss, accuracy = _loss_and_accuracy(logits, y)
            return loss, (accuracy, batch_stats)

        def take_step(state, order, step):
            x, y = mini_batch(order, step)
            (loss, (accuracy, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, state.batch_stats, x, y
            )
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            diverged_step = _diverged_step(state.diverged_step, loss, step)
            averages = _add(state.averages, loss, accuracy)
            return RunState(params, batch_stats, opt_state, diverged_step, averages, state.initial)

        def part_of_an_epoch(carry, end):
            step, state, epoch, order = carry
            here = step // steps_per_epoch
            order = jax.lax.cond(here == epoch, lambda: order, lambda: order_of(here))
            stop = jnp.minimum(end, (here + 1) * steps_per_epoch)
            step, state = jax.lax.while_loop(
                lambda carry: (carry[0] < stop) & goes_on(carry[1]),
                lambda carry: (carry[0] + 1, take_step(carry[1], order, carry[0])),
                (step, state),
            )
            return step, state, here, order

        def take_steps(carry, begin, end):
            """The steps from one evaluation to the next; the order of the data is that of the epoch."""
            return jax.lax.while_loop(
                lambda carry: (carry[0] < end) & goes_on(carry[1]),
                lambda carry: part_of_an_epoch(carry, end),
                (begin, *carry),
            )[1:]

        def evaluated(carry, begin):
            end = begin + steps // evaluations
            state, *order = take_steps(carry, begin, end)
            loss, accuracy, _ = state.averages
            test_loss, test_accuracy, chance = _evaluate(
                model, state.params, state.batch_stats, ds.test_x, ds.test_y
            )
            now = _diverged_step(state.diverged_step, test_loss, end)
            curves = (
                *_or_guessing(state.diverged_step, loss, accuracy, chance),
                *_or_guessing(now, test_loss, test_accuracy, chance),
            )
            recorded = Recorded(curves, measure(state, hyper, ds))
            return (state._replace(diverged_step=now, averages=_no_steps()), *order), recorded

        first = jnp.int32(first)
        epoch = first // steps_per_epoch
        carry = (state, epoch, order_of(epoch))
        if not evaluations:
            return take_steps(carry, first, first + steps)[0], None
        begins = first + steps // evaluations * jnp.arange(evaluations, dtype=jnp.int32)
        (state, *_), recorded = jax.lax.scan(evaluated, carry, begins)
        return state, recorded

    return Run(start, measure, advance)


def _loss_and_accuracy(logits, labels):
    """Mean cross-entropy and the fraction of labels that have the largest logit."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss.astype(jnp.float32), (logits.argmax(-1) == labels).mean(dtype=jnp.float32)


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


def _or_guessing(diverged_step, loss, accuracy, chance):
    """The loss and accuracy, or those of a run that has diverged."""
    alive = diverged_step < 0
    return jnp.where(alive, loss, jnp.inf), jnp.where(alive, accuracy, jnp.float32(chance))


def _as_32_bit(hyper):
    """So that no 64-bit scalar, where these are on, widens the optimizer's state."""
    seed, *others = hyper
    return Hyperparams(jnp.asarray(seed).astype(jnp.uint32), *(jnp.asarray(v, jnp.float32) for v in others))


def _evaluate(model, params, batch_stats, x, y):
    """Loss and accuracy over a whole split, in evaluation mode, a batch at a time; and the accuracy of guessing."""
    x, y = jnp.asarray(x), jnp.asarray(y)

    def outputs(x):
        return model.apply(params, batch_stats, x, train=False)[0]

    def sums(x, y):
        return jnp.stack(_loss_and_accuracy(outputs(x), y)) * len(x)

    size = min(TEST_BATCH, len(x))
    whole = len(x) // size * size
    batches = (a[:whole].reshape(-1, size, *a.shape[1:]) for a in (x, y))
    total = jax.lax.map(lambda batch: sums(*batch), tuple(batches)).sum(0)
    if whole < len(x):
        total = total + sums(x[whole:], y[whole:])
    loss, accuracy = total / len(x)
    return loss, accuracy, 1 / jax.eval_shape(outputs, x[:1]).shape[-1]


def check(model: Model, ds: Dataset, config: TrainConfig) -> None:
    """Raises ValueError if the data does not fit itself, the batch size or the network's outputs."""
    _check_shapes(ds, config)
    for split in ("train", "test"):
        dtype = getattr(ds, f"{split}_x").dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{split}_x must be floating point, got {dtype}")
    if ds.train_x.shape[1:] != ds.test_x.shape[1:]:
        raise ValueError(
            f"training examples {ds.train_x.shape[1:]} and test examples {ds.test_x.shape[1:]} differ in shape"
        )

    def outputs():
        params, batch_stats = model.init(jax.random.key(0), ds.train_x.shape[1:], 1.0)
        return model.apply(params, batch_stats, jnp.asarray(ds.train_x[:2]), train=False)[0]

    num_outputs = jax.eval_shape(outputs).shape[-1]
    for split, y in (("train", ds.train_y), ("test", ds.test_y)):
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise ValueError(f"{split} labels must be integers, got {y.dtype}")
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
        raise ValueError(
            f"batch_size must be at most the {len(ds.train_x)} training examples, got {config.batch_size}"
        )
