"""ONE training run as a pure function of its hyperparameters.

    train = make_train(model, config)       # config: what changes the compiled program
    history = train(hyper, ds)              # hyper: scalars that may be traced; ds: arrays

`train` draws the initialization, takes `config.steps` optimizer steps on mini-batches in the order of a
new shuffle each epoch (an incomplete last batch is dropped), and evaluates on the whole test split every
`config.eval_every` steps, with running statistics. It has no side effects: jit it, vmap it over `hyper`.

A run diverges at the first step whose loss, or whose updated parameters or batch statistics, are not
finite. It is then frozen at the last state whose own loss was finite, and its history goes on with that
state's figures; a probe sees that state, too. A test loss that is not finite (of a network that is infinite
from the start, or between the step that ruined it and the next one's loss, which shows it) is recorded as the
largest float32; after the last step it counts as divergence too, at step `config.steps`.

Looking at every number of the state after each step would take a quarter of the time. So a block of steps is
taken without a look, and its end is looked at: a number that is not finite stays so, in parameters and in running
averages (and must in whatever else a network keeps as its batch statistics). Where a cell has diverged, all
cells that are mapped over go back to the start of the block before, and on from there a step at a time; by the same
compiled step, so that for those that have not diverged nothing changes, to the last bit. Once all have diverged,
no more steps are taken.
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

LARGEST = float(jnp.finfo(jnp.float32).max)
BLOCK = 32  # most steps between two looks for divergence
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


class Cell(NamedTuple):
    """A network in training."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    diverged_step: jax.Array  # [] int32, -1 as long as it has not
    averages: tuple[jax.Array, jax.Array, jax.Array]
    """Training loss, accuracy and number of steps since the last evaluation."""


class RunState(NamedTuple):
    """A training run between two of its steps."""

    cell: Cell
    good: tuple[PyTree, PyTree]
    """(params, batch_stats) before the last step: where a loss that is not finite leads."""
    initial: tuple[PyTree, PyTree] | None  # (params, batch_stats) at the start, for a probe


class Recorded(NamedTuple):
    """What evaluations leave behind, [evaluations, ...] each."""

    curves: tuple[
        jax.Array, jax.Array, jax.Array, jax.Array
    ]  # the first four fields of History, maybe not finite
    measured: dict[str, jax.Array]  # by the probe


class Run(NamedTuple):
    """A training run in parts, for whoever stops in between: pure functions, each for one cell.

    start(hyper, ds) -> (RunState, {quantity: what the probe measured}).
    advance(state, hyper, ds, first, steps, evaluations) -> (RunState, Recorded): `steps` steps, of which the first is
        number `first` (it may be traced, the others not), in equal parts with an evaluation after each; or with none.
    finish(state, recorded) -> History, from all evaluations of the run.
    """

    start: Callable[[Hyperparams, Dataset], tuple[RunState, dict[str, jax.Array]]]
    advance: Callable[..., tuple[RunState, Recorded]]
    finish: Callable[[RunState, Recorded], History]


def make_train(
    model: Model, config: TrainConfig, probe: Probe | None = None
) -> Callable[[Hyperparams, Dataset], History | tuple[History, dict[str, Array]]]:
    """Returns `train(hyper, ds) -> History`, pure; see the top of this module.

    With a `probe` it is `train(hyper, ds) -> (History, {quantity: [1 + E, ...]})`: what the probe measured before
    the first step and at each of the E evaluations. It sees the run and changes nothing in it; but the program is
    another, so that with a probe and without the last bits may differ.

    `train` raises ValueError (when traced) if the batch is larger than the training split, or labels and
    examples differ in number.
    """
    start, advance, finish = make_run(model, config, probe)

    def train(hyper, ds):
        state, at_start = start(hyper, ds)
        parts = []
        for first, steps, evaluations in pieces(config):
            state, recorded = advance(state, hyper, ds, first, steps, evaluations)
            parts.append(recorded)
        recorded = jax.tree.map(lambda *values: jnp.concatenate(values), *parts)
        history = finish(state, recorded)
        if probe is None:
            return history
        return history, jax.tree.map(
            lambda first, rest: jnp.concatenate([first[None], rest]), at_start, recorded.measured
        )

    return train


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


def make_run(model: Model, config: TrainConfig, probe: Probe | None = None) -> Run:
    """The parts that `make_train` is made of, which may be called one by one."""

    def probed(state, ds, hyper):
        if probe is None:
            return {}
        measured = probe.measure(
            Snapshot(state.cell.params, state.cell.batch_stats, *state.initial, ds, hyper)
        )
        return {name: jnp.asarray(value) for name, value in measured.items()}

    def start(hyper, ds):
        _check_shapes(ds, config)
        hyper = _as_32_bit(hyper)
        drawn = model.init(jax.random.key(hyper.seed), ds.train_x.shape[1:], hyper.init_scale)
        opt_state = OPTIMIZERS[config.optimizer](hyper).init(drawn[0])
        averages = (jnp.float32(LARGEST), jnp.float32(0), jnp.int32(0))
        initial = None if probe is None else drawn
        state = RunState(Cell(*drawn, opt_state, jnp.int32(-1), averages), drawn, initial)
        return state, probed(state, ds, hyper)

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

        def one_step(cell, x, y):
            """(the cell after an optimizer step, whatever comes of it; whether its loss was finite)."""
            (loss, (accuracy, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                cell.params, cell.batch_stats, x, y
            )
            updates, opt_state = optimizer.update(grads, cell.opt_state, cell.params)
            params = optax.apply_updates(cell.params, updates)
            finite = jnp.isfinite(loss)
            averages = _add(cell.averages, loss, accuracy, finite)
            return Cell(params, batch_stats, opt_state, cell.diverged_step, averages), finite

        def block(carry, end):
            """Some steps of an epoch, and then a look: where a cell has diverged, back and on one by one."""
            step, careful_until, old, before_step, before, epoch, order = carry
            # The first step after an evaluation and the last before one by themselves, so that `before` is known.
            single = (step < careful_until) | (step == before_step) | (step == end - 1)
            most = jnp.minimum(end - 1 - step, steps_per_epoch - step % steps_per_epoch)
            stop = step + jnp.where(single, 1, jnp.clip(step, 1, jnp.minimum(BLOCK, most)))
            here = step // steps_per_epoch
            order = jax.lax.cond(here == epoch, lambda: order, lambda: order_of(here))

            def body(step, carry):
                cell, finite = carry
                cell, loss_finite = one_step(cell, *mini_batch(order, step))
                return cell, finite & loss_finite

            new, loss_finite = jax.lax.fori_loop(step, stop, body, (old, jnp.bool_(True)))
            alive = old.diverged_step < 0
            diverged = alive & ~(loss_finite & _all_finite((new.params, new.batch_stats)))
            # Settled here only by a single step with the state before it at hand.
            back = _anywhere(diverged) & (stop > before_step + 2)

            # A loss that is not finite condemns the state that it was computed in: back to the one before.
            good = _select(loss_finite, old, before)
            dead = good._replace(diverged_step=step, averages=new.averages)
            now = _select(alive, _select(diverged, dead, new), old)
            again = _select(alive, before, old)
            there = (before_step, stop, again, before_step, before)
            return *_select(back, there, (stop, careful_until, now, step, old)), here, order

        def to_evaluation(state, epoch, order, begin, end):
            """The steps from one evaluation to the next; the order of the data is that of the epoch."""
            before = state.cell._replace(params=state.good[0], batch_stats=state.good[1])
            _, _, cell, _, before, epoch, order = jax.lax.while_loop(
                lambda carry: (carry[0] < end) & _anywhere(carry[2].diverged_step < 0),
                lambda carry: block(carry, end),
                (begin, begin, state.cell, begin, before, epoch, order),
            )
            return RunState(cell, (before.params, before.batch_stats), state.initial), epoch, order

        def evaluated(carry, begin):
            state, epoch, order = to_evaluation(*carry, begin, begin + steps // evaluations)
            cell = state.cell
            loss, accuracy, _ = cell.averages
            test = _evaluate(model, cell.params, cell.batch_stats, ds.test_x, ds.test_y)
            recorded = Recorded((loss, accuracy, *test), probed(state, ds, hyper))
            state = state._replace(cell=cell._replace(averages=(loss, accuracy, jnp.int32(0))))
            return (state, epoch, order), recorded

        first = jnp.int32(first)
        epoch = first // steps_per_epoch
        carry = (state, epoch, order_of(epoch))
        if not evaluations:
            return to_evaluation(*carry, first, first + steps)[0], None
        begins = first + steps // evaluations * jnp.arange(evaluations, dtype=jnp.int32)
        (state, *_), recorded = jax.lax.scan(evaluated, carry, begins)
        return state, recorded

    def finish(state, recorded):
        curves = recorded.curves
        overflowed = (state.cell.diverged_step < 0) & ~jnp.isfinite(curves[2][-1])
        diverged_step = jnp.where(overflowed, config.steps, state.cell.diverged_step)
        curves = [jnp.where(jnp.isfinite(curve), curve, LARGEST) for curve in curves]
        return History(*curves, diverged=diverged_step >= 0, diverged_step=diverged_step)

    return Run(start, advance, finish)


def _loss_and_accuracy(logits, labels):
    """Mean cross-entropy and the fraction of labels that have the largest logit."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss.astype(jnp.float32), (logits.argmax(-1) == labels).mean(dtype=jnp.float32)


def _add(averages, loss, accuracy, counts):
    """Running means over the steps that count. Until one does, those of the segment before stand."""
    mean_loss, mean_accuracy, n = averages
    n_new = n + counts
    weight = 1 / jnp.maximum(n_new, 1).astype(jnp.float32)

    def add(mean, value):
        # w * value + (1 - w) * mean cannot overflow, and at n = 0 nothing of the old mean is left
        return jnp.where(counts, weight * value + (1 - weight) * mean, mean)

    return add(mean_loss, loss), add(mean_accuracy, accuracy), n_new


@jax.custom_batching.custom_vmap
def _anywhere(flag):
    """Whether it holds in any of the cells that are mapped over, so that what depends on it stays a branch there."""
    return flag


@_anywhere.def_vmap
def _(size, batched, flags):
    del size, batched
    return _anywhere(flags.any()), False


def _select(condition, if_true, if_false):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


def _as_32_bit(hyper):
    """So that no 64-bit scalar, where these are on, widens the optimizer's state."""
    seed, *others = hyper
    return Hyperparams(jnp.asarray(seed).astype(jnp.uint32), *(jnp.asarray(v, jnp.float32) for v in others))


def _all_finite(tree):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _evaluate(model, params, batch_stats, x, y):
    """Loss and accuracy over a whole split, in evaluation mode, a batch at a time."""
    x, y = jnp.asarray(x), jnp.asarray(y)

    def sums(x, y):
        logits, _ = model.apply(params, batch_stats, x, train=False)
        return jnp.stack(_loss_and_accuracy(logits, y)) * len(x)

    size = min(TEST_BATCH, len(x))
    whole = len(x) // size * size
    batches = (a[:whole].reshape(-1, size, *a.shape[1:]) for a in (x, y))
    total = jax.lax.map(lambda batch: sums(*batch), tuple(batches)).sum(0)
    if whole < len(x):
        total = total + sums(x[whole:], y[whole:])
    loss, accuracy = total / len(x)
    return loss, accuracy


def check(model: Model, ds: Dataset, config: TrainConfig) -> None:
    """Raises ValueError if the data does not fit itself, the batch size or the network's outputs.

    Args:
      model: the network.
      ds: concrete arrays.
      config: for the batch size.
    """
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
