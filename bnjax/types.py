"""The data that flows through bnjax: NamedTuples and Protocols, and what is allowed in them.

Axis letters, here and everywhere: N batch, C features, E evaluations, K classes.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
PyTree = Any


class BatchNormParams(NamedTuple):
    """The learnable parameters of batch normalization: `y = scale * x_hat + bias`. None: not used."""

    scale: jax.Array | None  # [C]
    bias: jax.Array | None  # [C]


class BatchStats(NamedTuple):
    """Running statistics, and the number of training batches they have seen."""

    mean: jax.Array  # [C]
    var: jax.Array  # [C]
    count: jax.Array  # [] int32


@runtime_checkable
class InitFn(Protocol):
    """Draws a network's parameters and its initial batch statistics."""

    def __call__(
        self, key: jax.Array, input_shape: tuple[int, ...], init_scale: jax.Array | float
    ) -> tuple[PyTree, PyTree]:
        """`input_shape` is one example's, without N. Returns `(params, batch_stats)`."""


@runtime_checkable
class ApplyFn(Protocol):
    """Maps a batch to outputs, and batch statistics to the updated ones."""

    def __call__(self, params: PyTree, batch_stats: PyTree, x: jax.Array, *, train: bool) -> tuple[jax.Array, PyTree]:
        """`x` [N, ...] -> (outputs [N, K], batch_stats); unchanged if not `train`."""


@runtime_checkable
class LayersFn(Protocol):
    """Like `ApplyFn`, but shows every named intermediate, each with an offset added to it."""

    def __call__(
        self, params: PyTree, batch_stats: PyTree, x: jax.Array, offsets: Mapping[str, jax.Array], *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The gradient with respect to a zero offset is the gradient to that intermediate."""


class Model(NamedTuple):
    """A network as a value. `init` and `apply` are all that training needs.

    Stored results know a network by what it computes; `config`, which JSON must hold, says in words what it is.
    """

    init: InitFn
    apply: ApplyFn
    layers: LayersFn | None = None
    config: Mapping[str, Any] = {}
    prepare: Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, PyTree]] | None = None
    """(params, batch_stats, x) -> (params, batch_stats), once, before the first step, with the first batch."""

    def __repr__(self) -> str:
        """In its own words."""
        return f"Model({', '.join(f'{name}={value!r}' for name, value in self.config.items())})"


class Norm(NamedTuple):
    """A normalization as a value (`bnjax.norms`). It acts on activations (`apply`), kernels (`kernel`) or on neither.

    init: (shape of a kernel [..., fan_in, C]) -> (params, stats). Of norms of activations only C counts.
    apply: (params, stats, x, *, train, mask=None) -> (y, stats), x and y [N, ..., C]; the structure, shapes and types
        of `stats` stay. mask, [N, ..., 1] or what broadcasts to it: True for valid positions.
    kernel: (params, kernel) -> the kernel by which the layer multiplies.
    prepare: of a norm of kernels: (params, stats, x) -> (params, stats), once, before the first step; x [N, ..., C] is
        what the layer gives for the first batch, without its bias, which then starts at minus its mean.
    growth: (activation, num_features, batch_size) -> the growth per layer of the squared gradient norm, with epsilon
        taken as 0 (`bnjax.theory.mean_field.gradient_growth`); None for what it does not know.
    config: the norm in words, as JSON holds them; "norm" is its name.
    """

    init: Callable[[tuple[int, ...]], tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[jax.Array, PyTree]] | None = None
    kernel: Callable[[PyTree, jax.Array], jax.Array] | None = None
    prepare: Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, PyTree]] | None = None
    growth: Callable[..., float | None] | None = None
    config: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        """In its own words."""
        return f"Norm({', '.join(f'{name}={value!r}' for name, value in self.config.items())})"


def takes_extra(function: Callable) -> bool:
    """True if it has an argument `extra`."""
    return "extra" in inspect.signature(function).parameters


def with_extra(function: Callable, extra: Mapping[str, Any]) -> Callable:
    """The function with that `extra`, if it takes it; an empty one leaves a default of its own."""
    argument = inspect.signature(function).parameters.get("extra")
    if argument is None or (not extra and argument.default is not argument.empty):
        return function
    return functools.partial(function, extra=extra)


class Watched(dict):
    """An `extra` that knows which of its names were read, and says what is asked for and not there."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name):
        if name not in self:
            raise ValueError(f"extra[{name!r}] is asked for; Hyperparams.extra has {[*self.keys()]}")
        self.read.add(name)
        return super().__getitem__(name)

    def __iter__(self):  # so that dict(extra) reads one by one
        return iter(self.keys())

    def get(self, name, default=None):
        """As of a dict."""
        return self[name] if name in [*self] else default

    def items(self):
        """As of a dict."""
        return [(name, self[name]) for name in self]

    def values(self):
        """As of a dict."""
        return [self[name] for name in self]


jax.tree_util.register_pytree_node(Watched, lambda w: (w.values(), (*w,)), lambda n, v: dict(zip(n, v, strict=True)))


def some_of(names: Iterable[str]) -> Watched:
    """An `extra` of those names, where its values decide nothing: the type is that of a run."""
    return Watched(dict.fromkeys(names, np.float32(0.5)))


def taking_extra(function: Callable, takes: bool) -> Callable:
    """A function with an argument `extra`, or where it is not taken one without."""
    if takes:
        return function

    def without(*args, **options):
        return function(*args, **options, extra={})

    return without


def bound(model: Model, extra: Mapping[str, Any]) -> Model:
    """The model with that `extra` in all its functions that take it."""
    functions = {name: getattr(model, name) for name in ("init", "apply", "layers", "prepare")}
    return model._replace(**{name: one and with_extra(one, extra) for name, one in functions.items()})


class Dataset(NamedTuple):
    """A data set in memory, as the network sees it."""

    train_x: Array  # [N, ...] float32, or int32 for networks that take tokens
    train_y: Array  # [N] int32, 0 <= label < K; or targets [N, K] float32, for a loss that takes them
    test_x: Array  # [M, ...]
    test_y: Array  # [M], or [M, K]

    def __repr__(self) -> str:
        """Shapes and types."""

        def form(a):
            return f"{' x '.join(map(str, a.shape)):24} {a.dtype}" if hasattr(a, "shape") else repr(a)

        return "\n  ".join(["Dataset", *(f"{name:8} {form(a)}" for name, a in self._asdict().items())])


class Hyperparams(NamedTuple):
    """The values that can be swept without recompiling: one scalar each (or [cells], under vmap).

    seed: draws the initialization (0 <= seed < 2^31). The order of the data has its own: `TrainConfig.data_seed`.
    init_scale: multiplies the standard deviation of the initial weights (> 0).
    learning_rate: the optimizer's step size (> 0).
    momentum: the OPTIMIZER's momentum, in [0, 1): the decay of sgd's and rmsprop's velocity, and
        adam's b1. Not batch normalization's `momentum`, the weight of the old running statistics.
    weight_decay: the coefficient of decay, on weight matrices only (>= 0).
    extra: scalars of one's own by name, such as {"gain": 2.0}. A network's init and apply, a loss, and a `__call__` of
        Flax or Equinox get them, traced, as `extra=`, if their signature has it; each may be an axis of a sweep.
    """

    seed: jax.Array | int = 0
    init_scale: jax.Array | float = 1.0
    learning_rate: jax.Array | float = 0.1
    momentum: jax.Array | float = 0.9
    weight_decay: jax.Array | float = 0.0
    extra: Mapping[str, jax.Array | float] = {}

    def named(self) -> dict[str, Any]:
        """All of them by name, those in `extra` too."""
        *fields, extra = self
        return dict(zip(RANGES, fields, strict=True)) | dict(extra)

    @classmethod
    def from_named(cls, values: Mapping[str, Any]) -> "Hyperparams":
        """The inverse."""
        fields = {name: value for name, value in values.items() if name in RANGES}
        return cls(**fields, extra={name: value for name, value in values.items() if name not in RANGES})


class Range(NamedTuple):
    """The allowed values of a hyperparameter."""

    dtype: np.dtype  # in the compiled program
    low: float
    closed: bool  # whether `low` itself is allowed
    bound: float  # not allowed itself
    words: str


RANGES = MappingProxyType(
    {
        "seed": Range(np.dtype("uint32"), 0, True, 2**31, "a whole number in [0, 2^31)"),
        "init_scale": Range(np.dtype("float32"), 0, False, math.inf, "positive and finite in float32"),
        "learning_rate": Range(np.dtype("float32"), 0, False, math.inf, "positive and finite in float32"),
        "momentum": Range(np.dtype("float32"), 0, True, 1, "in [0, 1) (the optimizer's)"),
        "weight_decay": Range(np.dtype("float32"), 0, True, math.inf, "zero or positive, and finite in float32"),
    }
)


EXTRA = Range(np.dtype("float32"), -math.inf, False, math.inf, "a finite number in float32")


def range_of(name: str) -> Range:
    """Of a hyperparameter, or one of `Hyperparams.extra`."""
    return RANGES.get(name, EXTRA)


def check_values(hyper: Hyperparams) -> None:
    """Raises ValueError for a name in `extra` that is none, or for a value out of range that is not traced."""
    for name in hyper.extra:
        if not isinstance(name, str) or not name.isidentifier() or name in RANGES:
            raise ValueError(f"extra takes names that no hyperparameter has, as Python's variables have; got {name!r}")
    for name, value in hyper.named().items():
        if not isinstance(value, jax.core.Tracer):
            check_value(name, value)


def check_value(name: str, value: Any) -> None:
    """Raises ValueError unless it is allowed for the hyperparameter of that name. It must not be traced."""
    allowed, number = range_of(name), np.asarray(value)
    whole = allowed.dtype.kind == "u"
    kinds = (jnp.integer,) if whole else (jnp.integer, jnp.floating)
    if number.ndim == 0 and any(jnp.issubdtype(number.dtype, kind) for kind in kinds):
        with np.errstate(over="ignore", under="ignore"):
            used = number.astype(np.float64 if whole else allowed.dtype)  # what the program sees
        if (used > allowed.low or (allowed.closed and used == allowed.low)) and used < allowed.bound:
            return
    raise ValueError(f"{name} must be {allowed.words}, got {value!r}")


class Snapshot(NamedTuple):
    """One training run at one moment, as a probe sees it."""

    params: PyTree
    batch_stats: PyTree
    initial_params: PyTree  # before the first step
    initial_batch_stats: PyTree
    ds: Dataset
    hyper: Hyperparams


class Probe(NamedTuple):
    """A measurement before the first step of a run and at each of its evaluations."""

    measure: Callable[[Snapshot], Mapping[str, jax.Array]]  # {quantity: [] or [layers]}, float32
    layers: Sequence[str] = ()  # their names


class History(NamedTuple):
    """The results of one training run.

    From the step on at which it diverged, its losses are infinite and its accuracies those of guessing, 1/K. Where
    targets are floats, accuracies are NaN.
    """

    train_loss: jax.Array  # [E] mean over the mini-batches since the previous evaluation
    train_accuracy: jax.Array  # [E] likewise, a fraction
    test_loss: jax.Array  # [E] mean over the test split, running statistics
    test_accuracy: jax.Array  # [E] a fraction
    diverged: jax.Array  # [] bool
    diverged_step: jax.Array  # [] int32: the first step whose loss is not finite, else -1
