"""The computation of a network, read off its trace: products, norms, nonlinearities, whoever wrote it and with what.

`apply` is traced to a jaxpr (JAX's list of primitive operations), which is followed from the inputs to the outputs:

    product        a `dot_general` or convolution of something that depends on x with a parameter, or with one that went
                   only through casts, transposes, reshapes, slices and elementwise maps. The parameter is its kernel;
                   so are several that were put side by side or multiplied before.
    readout        a product from which the outputs are reached without another one.
    norm           a value divided by a reduction of itself (or times the rsqrt of one), or by running statistics.
    nonlinearity   an elementwise function between two products that is not affine; a chain of them counts once.

A product has the name of its kernel (`Block_1/Conv_0/kernel`; a second use `[1]`). What follows the product is
`Block_1/Conv_0/norm`, `.../activation` and, for attention, `.../softmax`: of all products that reach it without another
one, the last is meant; `input`, if there is none. Products and norms include the biases and scales right after them.

`layers` evaluates the trace with an offset added to each of these. What cannot be shown is named in `Reading.not_seen`:
parameters that are looked up (embeddings), and products in a loop or in a function with a derivative rule of its own.
The kernels of such products are kernels as any other.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bnjax import convolution
from bnjax.dataflow import CALLS, Value, Walk, bodies_of
from bnjax.types import ApplyFn, LayersFn, PyTree, with_extra


class Part(NamedTuple):
    """A product, norm or nonlinearity."""

    name: str
    kind: str
    kernels: tuple[str, ...]  # the parameters that are a product's kernel
    readout: bool
    where: tuple[int, ...] | None
    """The numbers of the equations that enclose it, of its own, and of its output; None: not shown."""


class Reading(NamedTuple):
    """The computation of a network."""

    parts: tuple[Part, ...]  # in the order in which they are computed
    not_seen: Mapping[str, str]  # {parameter: why}

    @property
    def kernels(self) -> tuple[str, ...]:
        """The parameters that are multiplied with something that depends on x."""
        return tuple(dict.fromkeys(kernel for part in self.parts for kernel in part.kernels))

    @property
    def readouts(self) -> tuple[str, ...]:
        """The kernels from whose products the outputs are reached without another product."""
        return tuple(dict.fromkeys(kernel for part in self.parts if part.readout for kernel in part.kernels))


def name_of(path: tuple) -> str:
    """Of a leaf of a tree, such as `Dense_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: PyTree) -> list[str]:
    """Of all its leaves."""
    return [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def read(apply: ApplyFn, params: PyTree, batch_stats: PyTree, x: Any, *, train: bool = True) -> Reading:
    """Reads a network; nothing is computed, so that arrays may be `jax.ShapeDtypeStruct`s.

    Args:
      apply: the network's.
      params: its parameters, by whose paths things are named.
      batch_stats: its state. An array there that is multiplied like a kernel counts as one (a frozen kernel).
      x: a batch [N, ...], N at least 2.
      train: in training or in evaluation.

    Returns:
      `Reading`.

    Raises:
      ValueError: if the outputs are not one array.
    """
    run = functools.partial(apply, train=train)
    closed, (outputs, _) = jax.make_jaxpr(run, return_shape=True)(params, batch_stats, x)
    if len(jax.tree.leaves(outputs)) != 1:
        raise ValueError(f"a network's outputs must be one array [N, K] of floats; for N = 2 it gives {outputs}")
    return _read(closed, params, batch_stats)


def read_examples(
    apply: ApplyFn, params: PyTree, batch_stats: PyTree, input_shape: tuple[int, ...]
) -> tuple[Reading, jax.ShapeDtypeStruct]:
    """(`read` in evaluation, the form of a batch of two examples of the first type that the network takes).

    The types are float32, and int32 (tokens). In training a network may need larger batches.

    Raises:
      ValueError: if it takes neither.
    """
    errors = {}
    for dtype in (jnp.float32, jnp.int32):
        x = jax.ShapeDtypeStruct((2, *input_shape), dtype)
        try:
            return read(apply, params, batch_stats, x, train=False), x
        except (TypeError, ValueError) as error:
            errors[dtype.__name__] = error
    told = "; ".join(f"{name}: {error}" for name, error in errors.items())
    raise ValueError(f"the network does not take examples of shape {tuple(input_shape)}: {told}") from errors["float32"]


def layers(apply: ApplyFn) -> LayersFn:
    """The function that shows what `apply` computes, each part with an offset added (see the top of this module)."""

    def shown(params, batch_stats, x, offsets, *, train, extra=MappingProxyType({})):
        run = functools.partial(with_extra(apply, extra), train=train)
        closed = jax.make_jaxpr(run)(params, batch_stats, x)
        parts = [part for part in _read(closed, params, batch_stats).parts if part.where]
        unknown = set(offsets) - {part.name for part in parts}
        if unknown:
            raise ValueError(f"unknown offsets {sorted(unknown)}; allowed: {', '.join(part.name for part in parts)}")
        tree: dict = {}
        for part in parts:
            *enclosing, last = part.where
            functools.reduce(lambda node, i: node.setdefault(i, {}), enclosing, tree)[last] = part.name
        leaves = jax.tree.leaves((params, batch_stats, x))
        outs, found = _evaluate(closed.jaxpr, closed.consts, leaves, tree, dict(offsets))
        return outs[0], {part.name: found[part.name] for part in parts}

    return shown


def dependent(function: Callable, *args: Any) -> tuple[PyTree, PyTree]:
    """(the forms of the function's outputs, for each the numbers of the arguments that it depends on: a frozenset)."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    given = [Value(frozenset({i})) for i, tree in enumerate(args) for _ in jax.tree.leaves(tree)]
    outs = Walk().through(closed.jaxpr, closed.consts, given, ())
    return shape, jax.tree.unflatten(jax.tree.structure(shape), [value.origins for value in outs])


def _read(closed, params, batch_stats) -> Reading:
    """Of a trace of (params, batch_stats, x)."""
    given = [
        Value(carried={name_of(path): (np.size(leaf), np.ndim(leaf))}, parametric=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch_stats):
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        frozen = {name_of(path): (np.size(leaf), np.ndim(leaf))} if floating and np.ndim(leaf) > 1 else {}
        given.append(Value(carried=frozen, state=floating))
    given += [Value(frozenset({"x"}))] * (len(closed.jaxpr.invars) - len(given))
    walk = Walk()
    outputs, *_ = walk.through(closed.jaxpr, closed.consts, given, ()) or [Value()]
    found = list(_parts(walk.products, outputs))
    not_seen = dict(walk.not_seen)
    for part, why in found:
        not_seen |= dict.fromkeys(part.kernels if why else (), why)
    return Reading(tuple(part for part, _ in found), not_seen)


def _parts(products, outputs) -> Iterator[tuple[Part, str]]:
    """Each with the reason why it cannot be shown, if there is one."""
    path = _before([outputs], lambda one: one.inputs)  # of the signal
    used = _before([outputs], lambda one: one.inputs + one.statistics)
    onward, users = {}, {}
    for one in used:
        for before in dict.fromkeys(one.inputs + one.statistics):
            users.setdefault(before, []).append(one)
    for one in path:
        for before in dict.fromkeys(one.inputs):
            onward.setdefault(before, []).append(one)
    shown = [one for one in used if one.kind == "product"]
    between = _before([before for one in shown for before in one.inputs], lambda one: one.inputs)

    @functools.cache
    def last_of_its_chain(value):
        rest = [one for one in onward.get(value, ()) if not (one.bent and one.base is value.base)]
        return not onward.get(value) or any(one.base is not value.base or last_of_its_chain(one) for one in rest)

    def with_bias_and_scale(value):
        transposed, end = value.transposed, value
        while len(users.get(value, ())) == 1:
            (after,) = users[value]
            if after.kind or (after.hidden and not value.hidden) or (after.transposed and not transposed):
                break
            if not (after.learned or after.reshaped):
                break
            value = after
            if after.learned or after.transposed:
                end = value
        return end

    counts: dict[str, int] = {}
    for value in sorted(used, key=lambda one: one.number):
        kernels = tuple(value.carried) if value.kind == "product" else ()
        if kernels:
            kind, name, end = value.kind, kernels[0], with_bias_and_scale(value)
        elif value.kind == "norm" and value in path:
            kind, end = "norm", with_bias_and_scale(value)
        elif value.bent and value in path & between and value.products and last_of_its_chain(value):
            kind, end = "nonlinearity", value
        else:
            continue
        if not kernels:
            if end.hidden:
                continue
            latest = max((products[place] for place in value.products), key=lambda one: one.number, default=None)
            stem = next(iter(latest.carried)).removesuffix("/kernel").removesuffix("/weight") if latest else "input"
            name = f"{stem}/{'norm' if kind == 'norm' else 'softmax' if value.bend == 'softmax' else 'activation'}"
        count = counts[name] = counts.get(name, -1) + 1
        readout = bool(kernels) and bool(value.products & outputs.products)
        where = None if end.hidden else end.where
        yield Part(name + f"[{count}]" * bool(count), kind, kernels, readout, where), end.hidden


def _before(values, inputs) -> set[Value]:
    """These, and all that they come from."""
    found, todo = set(values), list(values)
    while todo:
        todo += (new := {*inputs(todo.pop())} - found)
        found |= new
    return found


def _evaluate(jaxpr, consts, args, tree, offsets) -> tuple[list, dict[str, jax.Array]]:
    """(the outputs, {name: value}) of a trace, with offsets added. `tree` has the names by place (`Part.where`)."""
    known = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
    shown, unnamed = {}, jaxpr.debug_info.with_unknown_names()

    def value(atom):
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        here = tree.get(i, {})
        if here and eqn.primitive.name in CALLS:
            call = functools.partial(_evaluate, *bodies_of(eqn)[0], tree=here)
            if "policy" in eqn.params:  # of jax.checkpoint
                call = jax.checkpoint(call, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
            found, inside = call([value(atom) for atom in eqn.invars], offsets=offsets)
            shown |= inside
        else:
            if jax.default_backend() == "cpu":
                eqn = convolution.replaced_equation(eqn)
            variables = dict.fromkeys(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
            one = jaxpr.replace(constvars=[], invars=[*variables], outvars=eqn.outvars, eqns=[eqn], debug_info=unnamed)
            found = jax.core.eval_jaxpr(one, [], *map(value, variables))
            for output, name in here.items():
                found[output] = shown[name] = found[output] + offsets.get(name, 0)
        known |= zip(eqn.outvars, found, strict=True)
    return [value(atom) for atom in jaxpr.outvars], shown
