"""Measurements of one network, layer by layer: pure functions, to be jitted and vmapped like any other.

A layer is named as the model names it: a weight matrix by its path in `params` without a last `kernel` (`hidden_0`,
`output`), an intermediate as `Model.layers` shows it (`hidden_0/preactivation`).

    kernels, weights                  weight matrices, of any `bnjax.Model`
    signals, gradients, flow          its intermediates, and the gradients to them and to the matrices: their norms
    derivatives                       the gradients themselves
    first_step                        what one step does to each weight matrix
    singular_values                   of the Jacobian between two intermediates, over the whole batch
    spread, stable_rank, angle        of arrays

They take whatever `bnjax.as_model` does. Where a model has no `layers` of its own, its intermediates are read off its
trace (`bnjax.tracing`). With N examples in the batch, an intermediate is [N, ...], and its U units are the entries of
one example (in an image, each position of each channel).
"""

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.sparse import linalg

from bnjax import choices, compilation, tracing
from bnjax.losses import cross_entropy
from bnjax.networks import as_model
from bnjax.tables import ByLayer
from bnjax.types import RANGES, Array, Dataset, Hyperparams, Model, Probe, PyTree, Snapshot, bound, range_of, with_extra

# Of a Jacobian that `singular_values` forms: 32 MB in float32, and some seconds for its singular values.
LARGEST_JACOBIAN = 2**23


class Signal(NamedTuple):
    """An intermediate X [N, U] over a batch; scalars."""

    mean: jax.Array  # of all entries
    spread: jax.Array  # the root of the mean over units of their variance over the batch
    dead: jax.Array  # fraction of units with one value for all examples, such as a ReLU that is always 0
    saturated: jax.Array  # fraction of entries whose slope is next to 0; NaN if X is no elementwise function
    stable_rank: jax.Array  # of X less its mean over the batch: the number of directions it spreads in


class Gradients(NamedTuple):
    """Norms of gradients by name; scalars."""

    intermediates: ByLayer
    weights: ByLayer

    def __repr__(self) -> str:
        """Two tables."""
        return f"gradients to intermediates\n{self.intermediates}\n\ngradients to weights\n{self.weights}"


def shapes(
    probe: Probe, model: Model, ds: Dataset, extra: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, jax.ShapeDtypeStruct]:
    """{quantity: the shape and type of what the probe measures}, without measuring.

    Raises:
      ValueError: if one is neither a scalar nor one figure a layer.
    """

    def measured(ds, hyper):
        state = bound(model, hyper.extra).init(jax.random.key(0), ds.train_x.shape[1:], hyper.init_scale)
        found = probe.measure(Snapshot(*state, *state, ds, hyper))
        return {name: jnp.asarray(value) for name, value in found.items()}

    hyper = {name: jax.ShapeDtypeStruct((), range_of(name).dtype) for name in (*RANGES, *extra)}
    found = jax.eval_shape(measured, ds, Hyperparams.from_named(hyper))
    for quantity, value in found.items():
        if value.shape not in ((), (len(probe.layers),)):
            raise ValueError(
                f"the probe's {quantity!r} must be a scalar or one figure for each of its layers "
                f"{tuple(probe.layers)}, got shape {value.shape}"
            )
    return found


def kernels(params: PyTree, batch_stats: PyTree = (), among: Collection[str] | None = None) -> dict[str, Any]:
    """The weight matrices by name, in natural order (`hidden_2` before `hidden_10`).

    Args:
      params: of a network.
      batch_stats: of the network; frozen matrices stand there.
      among: the paths of the network's kernels. None: all arrays of rank 2 and above, as is right for an mlp.
    """
    found = {}
    for tree in (params, batch_stats):
        for path, value in jax.tree_util.tree_leaves_with_path(tree):
            name = tracing.name_of(path)
            if jnp.ndim(value) >= 2 if among is None else name in among:
                found[name.removesuffix("/kernel")] = value
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _form(model, input_shape):
    """((params, batch_stats), `Reading`, a batch), arrays as shapes."""
    state = jax.eval_shape(lambda: model.init(jax.random.key(0), tuple(input_shape), 1.0))
    return state, *tracing.read_examples(model.apply, *state, input_shape)


def _with_kernels(params, batch_stats, values):
    """Both trees with other weight matrices: `values` by name."""

    def replaced(path, value):
        return values.get(tracing.name_of(path).removesuffix("/kernel"), value)

    return (jax.tree_util.tree_map_with_path(replaced, tree) for tree in (params, batch_stats))


def weights(
    model: Any,
    input_shape: tuple[int, ...],
    *,
    batch_size: int | None = None,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> Probe:
    """A probe of each weight matrix W along training.

    weight_norm: |W|, the Frobenius norm. angle: between W and the initial W, in degrees.
    effective_learning_rate: learning_rate / |W|^2, the step size that counts where a norm hides |W|: there
    the angle a step turns W by does not depend on |W| and the learning rate otherwise (van Laarhoven 2017, section 3).
    gradient_norm, if there is a `batch_size`: |dL/dW| in training mode.

    Args:
      model: the network.
      input_shape: of one example.
      batch_size: the gradient is that of the first so many training examples. None: not measured.
      loss: of outputs [N, K] and labels [N], a scalar; by default the mean cross-entropy.
      extra: what the network takes as `Hyperparams.extra`; of a run its own values are used.

    Raises:
      ValueError: for a model without weight matrices, or a `batch_size` below 1; when it measures, for one above the
        number of training examples.
    """
    _check_batch_size(batch_size)
    model = as_model(model)
    state, reading, _ = _form(bound(model, extra), input_shape)
    paths = reading.kernels
    names = tuple(kernels(*state, paths))
    if not names:
        raise ValueError("the model has no weight matrices: no product of x with a parameter")

    def measure(snapshot: Snapshot):
        state = (snapshot.params, snapshot.batch_stats)
        now = kernels(*state, paths)
        start = kernels(snapshot.initial_params, snapshot.initial_batch_stats, paths)
        norms = jnp.stack([_norm(now[name]) for name in names])
        angles = jnp.stack([angle(now[name], start[name]) for name in names])
        rate = snapshot.hyper.learning_rate / norms / norms
        measured = {"weight_norm": norms, "angle": angles, "effective_learning_rate": rate}
        if batch_size is None:
            return measured
        x, y = _first_examples(snapshot, batch_size)

        def loss_of(matrices):
            outputs, _ = bound(model, snapshot.hyper.extra).apply(*_with_kernels(*state, matrices), x, train=True)
            return with_extra(loss, snapshot.hyper.extra)(outputs, y)

        to_weights = jax.grad(loss_of)(now)
        return measured | {"gradient_norm": jnp.stack([_norm(to_weights[name]) for name in names])}

    return Probe(measure, names)


def flow(
    model: Any,
    input_shape: tuple[int, ...],
    *,
    batch_size: int = 128,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> Probe:
    """A probe of each intermediate along training: what `signals` has, and gradient_norm, that of the loss to it.

    Both in training mode, on the first training examples.

    Args:
      model: the network.
      input_shape: of one example.
      batch_size: the number of examples.
      loss: of outputs [N, K] and labels [N], a scalar; by default the mean cross-entropy.
      extra: what the network takes as `Hyperparams.extra`; of a run its own values are used.

    Raises:
      ValueError: for a `batch_size` below 1; when it measures, for one above the number of training examples.
    """
    _check_batch_size(batch_size)
    model = as_model(model)
    state, _, x = _form(bound(model, extra), input_shape)
    names = tuple(_shapes(bound(model, extra), *state, x, True))

    def measure(snapshot: Snapshot):
        x, y = _first_examples(snapshot, batch_size)
        network, extra = (model, snapshot.params, snapshot.batch_stats, x), snapshot.hyper.extra
        found = signals(*network, extra=extra)
        own_loss = with_extra(loss, extra)
        norms = gradients(*network, lambda outputs: own_loss(outputs, y), extra=extra).intermediates
        measured = {
            quantity: jnp.stack([getattr(found[name], quantity) for name in names]) for quantity in Signal._fields
        }
        return measured | {"gradient_norm": jnp.stack([norms[name] for name in names])}

    return Probe(measure, names)


def _check_batch_size(batch_size):
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _first_examples(snapshot, batch_size):
    x, y = snapshot.ds.train_x, snapshot.ds.train_y
    if batch_size > len(x):
        raise ValueError(f"a probe's batch_size must be at most the {len(x)} training examples, got {batch_size}")
    return jnp.asarray(x[:batch_size]), jnp.asarray(y[:batch_size])


def signals(
    model: Any,
    params: PyTree,
    batch_stats: PyTree,
    x: Array,
    *,
    train: bool = True,
    saturation: float = 0.01,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> ByLayer:
    """The signals of a batch in every named intermediate.

    An entry is saturated if its derivative by the same entry of the intermediate named just before it is below
    `saturation` in magnitude: for an activation, |phi'(z)|, whose largest value is 1/4 for sigmoid and 1 for tanh
    and ReLU (for which it is the fraction of entries that are 0). Whether an intermediate is an elementwise function
    of the one before is found by comparing its derivatives in two directions; if not, or if it does not depend on it
    at all, it is NaN. The cost of L intermediates: L times two derivatives of the network along a direction.

    The stable rank |X|_F^2 / |X|_2^2 of the centred X (Rudelson & Vershynin 2007) is at most min(N - 1, U), 1 if all
    examples lie on a line, and 0 if they are one point.

    Args:
      model: the network.
      params: of the network.
      batch_stats: of the network.
      x: the batch, [N, ...].
      train: with the batch's own statistics, or else the running ones.
      saturation: see above.
      extra: what the network takes as `Hyperparams.extra`.

    Returns:
      {name of the intermediate: `Signal`}, in the order of the model; it prints as a table.

    Raises:
      ValueError: for an x that the network does not take.
    """
    model, x = as_model(model), jnp.asarray(x)
    extra = {name: jnp.asarray(value, jnp.float32) for name, value in extra.items()}
    offsets = _offsets(bound(model, extra), params, batch_stats, x, train)
    given, options = (params, batch_stats, x, offsets, extra), (train, float(saturation))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
        return _signals(model.apply, model.layers, *options, *given)
    return _compiled_signals(model.apply, model.layers, *options)(*given)


@functools.lru_cache(maxsize=16)
def _compiled_signals(*options):
    """Compiled whole: eagerly, each operation would be compiled by itself."""
    return jax.jit(functools.partial(_signals, *options), compiler_options=compilation.options())


def _signals(apply, layers, train, saturation, params, batch_stats, x, offsets, extra):
    layers = with_extra(layers or tracing.layers(apply), extra)

    def show(offsets):
        return layers(params, batch_stats, x, offsets, train=train)[1]

    shown, saturated = _saturated(show, offsets, saturation)
    found = {}
    # One loop for all of a shape: a deep network compiles in a fraction of the time.
    for names in _by_shape(shown):
        described = jax.vmap(_describe)(jnp.stack([shown[name] for name in names]))
        for i, name in enumerate(names):
            mean, spread_, dead, rank = (values[i] for values in described)
            found[name] = Signal(mean, spread_, dead, saturated[name], rank)
    return ByLayer((name, found[name]) for name in offsets)


def _describe(x):
    """All that `Signal` says, but for `saturated`."""
    dead = (x == x[:1]).all(0).mean()
    return _mean(x), spread(x), dead, stable_rank(_centred(x))


def _by_shape(arrays):
    """The names of the arrays that have one shape and dtype, group by group."""
    groups = {}
    for name, array in arrays.items():
        groups.setdefault((array.shape, array.dtype), []).append(name)
    return groups.values()


def _saturated(show, offsets, saturation):
    """What is shown, and {name: fraction of entries with a slope below `saturation`, or NaN}.

    By derivatives along the offsets.
    """
    names = list(offsets)
    before = dict(zip(names[1:], names, strict=False))
    _, reached = tracing.dependent(lambda *values: show(dict(zip(names, values, strict=True))), *offsets.values())
    like = {
        name: offsets[name]
        for i, name in enumerate(names[1:])
        if offsets[before[name]].shape == offsets[name].shape and i in reached[name]
    }
    shown, push = jax.linearize(show, offsets)
    # One draw for all, which are moved one at a time: that of each took most of the compilation.
    drawn = jax.random.rademacher(jax.random.key(0), (max(o.size for o in offsets.values()),), jnp.int8)
    signs = {name: drawn[: o.size].reshape(o.shape).astype(o.dtype) for name, o in offsets.items()}
    both = {name: jnp.stack([jnp.ones_like(sign), sign]) for name, sign in signs.items()}

    def fractions(k):
        """Along the k-th intermediate, in all that come after another of their shape."""
        along = ByLayer((name, jnp.where(k == i, both[name], 0)) for i, name in enumerate(names))
        pushed = jax.vmap(push)(along)
        found = {}
        for group in _by_shape(like):
            slope, tested, sign = (
                jnp.stack([values(name) for name in group])
                for values in (lambda n: pushed[n][0], lambda n: pushed[n][1], lambda n: signs[before[n]])
            )
            axes = tuple(range(1, slope.ndim))
            error = jnp.abs(tested - sign * slope).max(axes)
            elementwise = error <= 1e-3 * jnp.abs(slope).max(axes)
            small = (jnp.abs(slope) < saturation).mean(axes, dtype=jnp.float32)
            found |= dict(zip(group, jnp.where(elementwise, small, jnp.nan), strict=True))
        return found

    # One at a time: compiled once, in place of once for each.
    table = jax.lax.map(fractions, jnp.arange(len(names)))  # {of: [along]}
    unknown = jnp.float32(jnp.nan)
    return shown, {name: table[name][i - 1] if name in table else unknown for i, name in enumerate(names)}


def gradients(
    model: Any,
    params: PyTree,
    batch_stats: PyTree,
    x: Array,
    loss: Callable[[jax.Array], jax.Array],
    *,
    train: bool = True,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> Gradients:
    """The Frobenius norms of the gradient to every named intermediate, and to every weight matrix.

    The norms lose nothing to squares that over- or underflow. The gradients themselves have float32's range: a norm
    of exactly 0 says that all entries are too small for it (or that there is no path), infinity that one is too large.

    Args:
      model: the network.
      params: of the network.
      batch_stats: of the network; frozen weight matrices stand there.
      x: the batch, [N, ...].
      loss: a scalar function of the outputs. `lambda outputs: (outputs * c).sum()` gives the gradients for a
        fixed cotangent c, whatever the outputs.
      train: with the batch's own statistics, or else the running ones.
      extra: what the network takes as `Hyperparams.extra`.

    Returns:
      `Gradients`.

    Raises:
      ValueError: for an x that the network does not take.
    """
    model = bound(as_model(model), extra)
    offsets = _offsets(model, params, batch_stats, x, train)
    matrices = kernels(params, batch_stats, tracing.read(model.apply, params, batch_stats, x, train=train).kernels)

    def loss_of(offsets, matrices):
        state = _with_kernels(params, batch_stats, matrices)
        return loss(_layers(model)(*state, x, offsets, train=train)[0])

    to_offsets, to_matrices = jax.grad(loss_of, (0, 1))(offsets, matrices)
    return Gradients(
        ByLayer((name, _norm(to_offsets[name])) for name in offsets),
        ByLayer((name, _norm(to_matrices[name])) for name in matrices),
    )


class Derivatives(NamedTuple):
    """Outputs, intermediates by name, and the gradients of a loss to all of a network, as arrays."""

    outputs: jax.Array
    intermediates: dict[str, jax.Array]
    to_intermediates: dict[str, jax.Array]
    to_params: PyTree
    to_input: jax.Array  # of tokens, it has no numbers


def derivatives(
    model: Any,
    params: PyTree,
    batch_stats: PyTree,
    x: Array,
    loss: Callable[[jax.Array], jax.Array],
    *,
    train: bool = True,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> Derivatives:
    """The gradients of which `gradients` takes norms, to all parameters and to the input as well.

    Args:
      model: the network.
      params: of the network.
      batch_stats: of the network.
      x: the batch, [N, ...].
      loss: a scalar function of the outputs.
      train: with the batch's own statistics, or else the running ones.
      extra: what the network takes as `Hyperparams.extra`.

    Returns:
      `Derivatives`.

    Raises:
      ValueError: for an x that the network does not take.
    """
    model = bound(as_model(model), extra)
    offsets = dict(_offsets(model, params, batch_stats, x, train))

    def loss_of(params, offsets, x):
        outputs, shown = _layers(model)(params, batch_stats, x, offsets, train=train)
        return loss(outputs), (outputs, dict(shown))

    found, (outputs, shown) = jax.grad(loss_of, (0, 1, 2), has_aux=True, allow_int=True)(params, offsets, x)
    to_params, to_intermediates, to_input = found
    return Derivatives(outputs, shown, to_intermediates, to_params, to_input)


class FirstStep(NamedTuple):
    """What one step W_1 = W_0 - learning_rate g does to a weight matrix."""

    norm_before: jax.Array  # |W_0|
    gradient_norm: jax.Array  # |g|
    norm_after: jax.Array  # |W_1|
    radial_cosine: jax.Array  # of the angle between W_0 and g: 0 behind a norm, whose outputs do not depend on |W|
    rank_before: jax.Array  # the stable rank of W_0
    rank_after: jax.Array  # and of W_1


def first_step(
    model: Any,
    params: PyTree,
    batch_stats: PyTree,
    x: Array,
    y: Array,
    learning_rate: float | int | Array,
    *,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
) -> ByLayer:
    """What a step of SGD without momentum does to each weight matrix.

    Args:
      model: the network.
      params: of the network.
      batch_stats: of the network.
      x: the batch, [N, ...].
      y: its labels or targets.
      learning_rate: of the step.
      loss: of outputs [N, K] and y, a scalar.

    Returns:
      {weight matrix: `FirstStep`}.
    """
    model = as_model(model)
    paths = tracing.read(model.apply, params, batch_stats, x, train=True).kernels
    slopes = jax.grad(lambda params: loss(model.apply(params, batch_stats, x, train=True)[0], y))(params)
    to = kernels(slopes, among=paths)

    def one(before, gradient):
        after = before - learning_rate * gradient
        sizes = [jnp.linalg.norm(matrix) for matrix in (before, gradient, after)]
        cosine = (before / sizes[0] * gradient / sizes[1]).sum()
        return FirstStep(*sizes, cosine, stable_rank(before), stable_rank(after))

    return ByLayer((name, one(matrix, to[name])) for name, matrix in kernels(params, among=paths).items())


def singular_values(
    model: Any,
    params: PyTree,
    batch_stats: PyTree,
    x: Array,
    source: str | None,
    target: str,
    *,
    num: int | None = None,
    train: bool = True,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> jax.Array:
    """The singular values of the Jacobian d target / d source over the whole batch, descending.

    Both are taken as vectors of all N U entries, because batch normalization couples the examples. They are the factors
    by which a perturbation of the batch grows forward, and its gradient backward.

    Args:
      model: the network.
      params: of the network.
      batch_stats: of the network.
      x: the batch, [N, ...].
      source: the name of an intermediate, or None for x itself.
      target: the name of an intermediate after it.
      num: only the so many largest, by LOBPCG (Knyazev 2001) from products with the Jacobian and its transpose,
        which is not formed. 5 * num must be less than the number of entries of the smaller of the two. Less exact
        than the dense ones: a relative error of 1.4e-5 was seen in float32 where the largest are nearly equal.
      train: with the batch's own statistics, or else the running ones.
      extra: what the network takes as `Hyperparams.extra`.

    Returns:
      [min(entries of source, entries of target)], or [num].

    Raises:
      ValueError: for an x that the network does not take; names that it does not have; a target before the source;
        without `num`, a Jacobian of more than 2^23 entries; a `num` out of range.
    """
    model = bound(as_model(model), extra)
    shapes = _shapes(model, params, batch_stats, x, train)
    names = list(shapes)
    choices.check("target", target, names)
    if source is not None:
        choices.check("source", source, names)
        if names.index(target) < names.index(source):
            raise ValueError(f"target {target!r} comes before source {source!r}; the order is {', '.join(names)}")
    at = jnp.asarray(x) if source is None else jnp.zeros(shapes[source].shape, shapes[source].dtype)
    columns, rows = at.size, shapes[target].size

    def function(vector):
        moved = vector.reshape(at.shape)
        batch, offsets = (moved, {}) if source is None else (jnp.asarray(x), {source: moved})
        return _layers(model)(params, batch_stats, batch, offsets, train=train)[1][target].ravel()

    if num is None:
        if rows * columns > LARGEST_JACOBIAN:
            raise ValueError(
                f"the Jacobian from {source or 'x'} to {target} is {rows} x {columns}, more than "
                f"{LARGEST_JACOBIAN} entries; use fewer examples, or num for the largest singular values alone"
            )
        jacobian = (jax.jacfwd if columns <= rows else jax.jacrev)(function)(at.ravel())
        return _svdvals(jacobian)
    if not 0 < 5 * num < min(rows, columns):
        raise ValueError(f"num must be at least 1 and 5 num less than {min(rows, columns)}, got {num}")
    _, push = jax.linearize(function, at.ravel())
    pull = jax.linear_transpose(push, at.ravel())
    start = jax.random.normal(jax.random.key(0), (min(rows, columns), num), at.dtype)
    forward, backward = (push, lambda v: pull(v)[0]) if columns <= rows else (lambda v: pull(v)[0], push)
    # J^T J would square what is near the ends of the range: in units of what J makes of a vector.
    unit = _unit(forward(start[:, 0] / _norm(start[:, 0])))

    @jax.vmap
    def squared(vector):
        return backward(forward(vector) / unit) / unit

    values, _, _ = linalg.lobpcg_standard(lambda block: squared(block.T).T, start)
    return unit * jnp.sqrt(jnp.maximum(values, 0))


def _layers(model):
    """The model's own, or that of its trace."""
    return model.layers or tracing.layers(model.apply)


def _offsets(model, params, batch_stats, x, train):
    """A zero offset for every named intermediate, in the model's order."""
    shapes = _shapes(model, params, batch_stats, x, train)
    return ByLayer((name, jnp.zeros(shape.shape, shape.dtype)) for name, shape in shapes.items())


def _shapes(model, params, batch_stats, x, train):
    """{name of an intermediate: its shape and dtype}, in the model's order."""
    order = []

    def shown(params, batch_stats, x):
        _, values = _layers(model)(params, batch_stats, x, {}, train=train)
        order.extend(values)  # JAX sorts the keys of a dictionary
        return values

    if not x.shape or x.shape[0] < 1:
        raise ValueError(f"x must be a batch [N, ...] of at least one example, got shape {x.shape}")
    try:
        found = jax.eval_shape(shown, params, batch_stats, x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the model does not take x of shape {tuple(x.shape)}: {error}") from error
    return {name: found[name] for name in order}


def spread(x: Array) -> jax.Array:
    """The root of the mean over units of their variance over the batch, |X - mean|_F / sqrt(N U); for X [N, ...]."""
    return _norm(_centred(x)) / math.sqrt(x.size)


def stable_rank(x: Array) -> jax.Array:
    """|X|_F^2 / |X|_2^2, from 1 to the rank of X: how many directions carry its energy; 0 for X = 0.

    Args:
      x: [N, ...], taken as N rows.
    """
    x = jnp.asarray(x).reshape(len(x), -1)
    norm = _norm(x)
    x = x / norm
    gram = jnp.matmul(*((x, x.T) if x.shape[0] <= x.shape[1] else (x.T, x)), precision="highest")
    return jnp.where(norm == 0, 0, 1 / _eigvalsh(gram)[-1])  # of a matrix of trace 1


def angle(a: jax.Array, b: jax.Array) -> jax.Array:
    """The angle between two arrays as vectors, in degrees: 2 atan2(|a' - b'|, |a' + b'|) of their unit vectors.

    Right for small angles, too, where the arc cosine has half the digits (Kahan 2006, "How futile are mindless
    assessments of roundoff in floating-point computation?", section 12). NaN if one of them is 0.
    """
    a, b = a / _norm(a), b / _norm(b)
    return jnp.degrees(2 * jnp.arctan2(_norm(a - b), _norm(a + b)))


# One matrix at a time, under vmap too: LAPACK on a batch may wait for ever, see `bnjax.initializers`.
_eigvalsh = jax.custom_batching.sequential_vmap(lambda matrix: jnp.linalg.eigvalsh(matrix))
_svd = jax.custom_batching.sequential_vmap(lambda matrix: jnp.linalg.svd(matrix, compute_uv=False))


def _svdvals(matrix):
    unit = _unit(matrix)
    return unit * _svd(matrix / unit)


def _mean(x):
    unit = _unit(x)
    return unit * jnp.mean(x / unit)


def _centred(x):
    """Less its mean over the batch; exactly 0 in a unit that is constant."""
    x = x - x[:1]
    unit = _unit(x)
    return x - unit * (x / unit).mean(0)


def _norm(x):
    """The Euclidean norm of all entries; of entries near the ends of float32's range, too."""
    unit = _unit(x)
    return unit * jnp.linalg.norm((x / unit).ravel())


def _unit(x):
    """The largest magnitude, to be divided by; 1 if that cannot be."""
    largest = jnp.abs(x).max()
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
