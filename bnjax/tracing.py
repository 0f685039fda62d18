"""What a network computes, read off its trace: products, norms, nonlinearities, whoever wrote it and with what.

`apply` is traced to a jaxpr (JAX's list of primitive operations), which is followed from the inputs to the outputs:

    product        a `dot_general` or convolution of something that depends on x with a parameter, or with one that went
                   only through casts, transposes, reshapes, slices and elementwise maps. The parameter is its kernel.
    readout        a product from which the outputs are reached without another one.
    norm           a value divided by a reduction of itself (or times the rsqrt of one), or by running statistics.
    nonlinearity   an elementwise function between two products that is not affine; a chain of them counts once.

A product has the name of its kernel (`Block_1/Conv_0/kernel`; a second use `[1]`). What follows the product is
`Block_1/Conv_0/norm`, `.../activation` and, for attention, `.../softmax`: of all products that reach it without another
one, the last is meant; `input`, if there is none. Products and norms include the biases and scales right after them.

`layers` evaluates the trace with an offset added to each of these. What cannot be shown is named in `Reading.not_seen`:
parameters that are looked up (embeddings), and products in a loop or in a function with a derivative rule of its own.
Kernels are found there, too.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from bnjax import convolution
from bnjax.types import ApplyFn, LayersFn, PyTree

PRODUCTS = {"dot_general", "conv_general_dilated"}
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"}  # evaluated as if written out
RULED = {"custom_jvp_call", "custom_vjp_call"}  # evaluated whole, or their derivative rules would be lost
LOOPS = {"scan", "while", "cond"}
VIEWS = set(
    "reshape transpose squeeze broadcast_in_dim convert_element_type reduce_precision copy copy_p rev slice split "
    "dynamic_slice gather concatenate pad stop_gradient optimization_barrier sharding_constraint name".split()
)
AFFINE = set("add sub add_any neg mul div select_n".split())  # in one operand, the others being constant
BENT = set(
    "max min abs sign clamp floor ceil round rem integer_pow pow square sqrt rsqrt cbrt exp exp2 expm1 log log1p "
    "logistic tanh sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc erf_inv lgamma digamma "
    "lt le gt ge eq ne and or not xor is_finite nextafter".split()
)
REDUCTIONS = PRODUCTS | set(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin psum pmax pmin".split()
)


class Part(NamedTuple):
    """A product, norm or nonlinearity."""

    name: str
    kind: str
    kernels: tuple[str, ...]  # the parameters that are a product's kernel
    readout: bool
    where: (
        tuple[int, ...] | None
    )  # of the equations that enclose it, its own, and its output; None: not shown


class Reading(NamedTuple):
    """What a network computes."""

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
    """
    closed = jax.make_jaxpr(functools.partial(apply, train=train))(params, batch_stats, x)
    return _read(closed, params, batch_stats)


def read_examples(
    apply: ApplyFn, params: PyTree, batch_stats: PyTree, input_shape: tuple[int, ...]
) -> tuple[Reading, jax.ShapeDtypeStruct]:
    """(`read` in training, the form of a batch of two examples of the first type that the network takes).

    The types are float32, and int32 (tokens).

    Raises:
      ValueError: if it takes neither.
    """
    errors = []
    for dtype in (jnp.float32, jnp.int32):
        x = jax.ShapeDtypeStruct((2, *input_shape), dtype)
        try:
            return read(apply, params, batch_stats, x), x
        except (TypeError, ValueError) as error:
            errors.append(error)
    raise ValueError(
        f"the network does not take examples of shape {tuple(input_shape)}: {errors[0]}"
    ) from errors[0]


def layers(apply: ApplyFn) -> LayersFn:
    """The function that shows what `apply` computes, each part with an offset added (see the top of this module)."""

    def shown(params, batch_stats, x, offsets, *, train):
        closed = jax.make_jaxpr(functools.partial(apply, train=train))(params, batch_stats, x)
        parts = [part for part in _read(closed, params, batch_stats).parts if part.where]
        unknown = set(offsets) - {part.name for part in parts}
        if unknown:
            raise ValueError(
                f"unknown offsets {sorted(unknown)}; allowed: {', '.join(part.name for part in parts)}"
            )
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
    given = [_Value(frozenset({i})) for i, tree in enumerate(args) for _ in jax.tree.leaves(tree)]
    outs = _Walk().through(closed.jaxpr, closed.consts, given, ())
    return shape, jax.tree.unflatten(jax.tree.structure(shape), [value.origins for value in outs])


@dataclasses.dataclass(eq=False)
class _Value:
    """A value of the trace, as far as it must be known."""

    origins: frozenset = frozenset()  # the inputs that it depends on: {"x"}, or none where x is meant
    carried: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Without x: the parameters that it is a view or map of, with their sizes."""
    parametric: bool = False  # without x: depends on parameters,
    state: bool = False  # or on the network's state
    inverse: bool = False  # it was divided by, or the rsqrt was taken
    products: frozenset = frozenset()  # the places of those that reach it without another
    root: "_Value | None" = None  # what it is an elementwise function of; None: itself
    bend: str = ""  # the last operation from there that is not affine
    bent: bool = False  # this operation is such
    learned: bool = False  # this operation adds a bias or multiplies with a scale,
    transposed: bool = (
        False  # or transposes; of a product: the kernel is the left operand, so that N comes last
    )
    sources: frozenset = frozenset()  # the roots of what it is a statistic of
    kind: str = ""  # of the part that it is
    inputs: tuple["_Value", ...] = ()  # those that depend on x,
    statistics: tuple["_Value", ...] = ()  # and those by which a norm divides
    where: tuple[int, ...] = ()  # `Part.where`
    hidden: str = ""  # why it cannot be shown
    number: int = dataclasses.field(default_factory=itertools.count().__next__)

    @property
    def moving(self) -> bool:
        return bool(self.origins)

    @property
    def base(self) -> "_Value":
        return self.root or self


class _Walk:
    """Follows a trace from the inputs to the outputs."""

    def __init__(self):
        self.products: dict[tuple[int, ...], _Value] = {}  # by place
        self.not_seen: dict[str, str] = {}

    def through(self, jaxpr, consts, args, place, hidden="") -> list[_Value]:
        """The values of the outputs."""
        known = dict(zip(jaxpr.constvars, (_Value() for _ in consts), strict=True))
        known |= zip(jaxpr.invars, args, strict=True)

        def value(atom):
            return _Value() if isinstance(atom, core.Literal) else known[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            found = self.equation(eqn, [value(atom) for atom in eqn.invars], (*place, i), hidden)
            known |= zip(eqn.outvars, found, strict=True)
        return [value(atom) for atom in jaxpr.outvars]

    def equation(self, eqn, given, place, hidden) -> list[_Value]:
        name, bodies = eqn.primitive.name, _bodies(eqn)
        if name in CALLS:
            return self.through(*bodies[0], given, place, hidden)
        if name in RULED:
            inside = "in a function with a derivative rule of its own"
            found = self.through(*bodies[0], given, place, hidden or inside)
            for i, one in enumerate(found):
                if one.where[: len(place)] == place and not hidden:
                    one.where, one.hidden = (*place, i), ""
            return found
        if name in LOOPS:
            return self.loop(eqn, bodies, given, place, hidden or f"in a {name}")
        if len(bodies) == 1 and len(bodies[0][0].invars) == len(given):
            return self.through(*bodies[0], given, place, hidden or f"in a {name}")
        found = [self.operation(eqn, given, place) for _ in eqn.outvars]
        for i, one in enumerate(found):
            one.where, one.hidden = (*place, i), hidden
        return found

    def loop(self, eqn, bodies, given, place, hidden) -> list[_Value]:
        """Of a loop or branch the products are found, but nothing is shown."""
        params = eqn.params
        if eqn.primitive.name == "cond":
            branches = [self.through(*body, given[1:], (*place, i), hidden) for i, body in enumerate(bodies)]
            return [_joined([given[0], *several]) for several in zip(*branches, strict=True)]
        if eqn.primitive.name == "while":
            given = given[params["cond_nconsts"] :]
            body, first = _bodies(params["body_jaxpr"])[0], params["body_nconsts"]
            last = len(given)
        else:
            body, first = bodies[0], params["num_consts"]
            last = first + params["num_carry"]
        carry = found = given[first:last]
        for _ in range(3):  # a turn may make what the next one starts from depend on x
            carry = [_joined(pair) for pair in zip(carry, found, strict=False)]
            found = self.through(*body, [*given[:first], *carry, *given[last:]], place, hidden)
        return [_joined([one]) for one in found]

    def operation(self, eqn, given, place) -> _Value:
        """One of the values that a single operation computes."""
        name = eqn.primitive.name
        inputs = tuple(dict.fromkeys(one for one in given if one.moving))
        fixed = [one for one in given if not one.moving]
        carried = {} if name in REDUCTIONS - PRODUCTS else _largest(fixed)
        inverse = any(one.inverse for one in given) or _inverts(eqn, given)
        if not inputs:
            parametric, state = (any(getattr(one, f) for one in given) for f in ("parametric", "state"))
            return _Value(carried=carried, parametric=parametric, state=state, inverse=inverse)
        new = _Value(
            origins=_union(one.origins for one in inputs),
            inverse=inverse,
            products=_union(one.products for one in inputs),
            sources=_union(one.sources for one in inputs),
            inputs=inputs,
        )
        if name in PRODUCTS and carried:
            new.kind, new.carried, new.products = "product", carried, frozenset({place})
            new.sources, new.inverse, new.transposed = frozenset(), False, not given[0].moving
            self.products[place] = new
        elif name == "gather" and given[0].carried and given[1].moving:
            self.not_seen |= dict.fromkeys(given[0].carried, "looked up, as an embedding")
        elif name in REDUCTIONS:
            new.sources |= {one.base for one in inputs}
        elif name in AFFINE | BENT | VIEWS:
            _elementwise(name, given, fixed, new)
            new.transposed = name == "transpose"
            new.bent &= jnp.issubdtype(
                eqn.outvars[0].aval.dtype, jnp.inexact
            )  # a comparison is shown by what it chooses
        else:
            self.not_seen |= dict.fromkeys(carried, f"an operand of {name}")
        return new


def _elementwise(name, given, fixed, new) -> None:
    """Says of what a value is an elementwise function, and whether it is a norm."""
    operands = [one for one in given if one.moving]
    if len({one.base for one in operands}) == 1:
        if _divides(name, given[0] is operands[0], fixed, "state"):  # running statistics
            new.kind, new.sources, new.inverse = "norm", frozenset(), False
            return
        new.root = operands[0].base
        new.bent = (
            name in BENT
            or (name == "mul" and len(operands) > 1)
            or (name in ("div", "gather", "dynamic_slice") and given[1].moving)
            or (name == "select_n" and given[0].moving)
        )
        new.bend = name if new.bent else max((one.bend for one in operands), default="")
        new.learned = name in AFFINE and len(operands) == 1 and any(one.parametric for one in fixed)
        return
    for value in operands:
        others = [one for one in operands if one is not value]
        if not all(value.base in one.sources for one in others):
            continue
        if name in ("add", "sub", "add_any"):  # the mean, or for softmax the largest
            new.root, new.bend, new.sources, new.inverse = value.base, value.bend, value.sources, False
            if name == "sub":
                new.inputs, new.statistics = (value,), tuple(others)
            return
        if _divides(name, given[0] is value, others, "sources"):
            new.inputs, new.statistics = (value,), tuple(others)
            new.sources, new.inverse = frozenset(), False
            if value.bend == "exp":
                new.root, new.bend, new.bent = value.base, "softmax", True
            else:
                new.kind = "norm"
            return
    new.bent, new.bend = name in BENT, name


def _divides(name, first, by, what) -> bool:
    """Whether the operation is a division by a statistic, or a product with the inverse of one."""
    by = [one for one in by if getattr(one, what)]
    return bool(by) and ((name == "div" and first) or (name == "mul" and any(one.inverse for one in by)))


def _inverts(eqn, given) -> bool:
    name = eqn.primitive.name
    denominator = name == "div" and (given[1].moving or given[1].state)
    return denominator or name == "rsqrt" or (name == "integer_pow" and eqn.params["y"] < 0)


def _largest(values) -> dict[str, int]:
    """The largest of the parameters that are carried: a gain beside a matrix is none."""
    carried = {name: size for one in values for name, size in one.carried.items()}
    return {name: size for name, size in carried.items() if size == max(carried.values())}


def _joined(values) -> _Value:
    """What may be one or the other."""
    inputs = tuple(one for one in values if one.moving)
    return _Value(
        origins=_union(one.origins for one in inputs),
        carried={} if inputs else _largest(values),
        parametric=any(one.parametric for one in values),
        state=any(one.state for one in values),
        products=_union(one.products for one in values),
        inputs=inputs,
    )


def _union(sets) -> frozenset:
    return frozenset().union(*sets)


def _bodies(eqn) -> list[tuple[core.Jaxpr, Sequence]]:
    """The traces within an equation, or in a parameter of one, with their constants."""
    params = eqn.params.values() if isinstance(eqn, core.JaxprEqn) else [eqn]
    several = (value if isinstance(value, tuple | list) else (value,) for value in params)
    found = [one for values in several for one in values if isinstance(one, core.ClosedJaxpr | core.Jaxpr)]
    return [(one.jaxpr, one.consts) if isinstance(one, core.ClosedJaxpr) else (one, ()) for one in found]


def _read(closed, params, batch_stats) -> Reading:
    """Of a trace of (params, batch_stats, x)."""
    given = [
        _Value(carried={name_of(path): leaf.size}, parametric=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch_stats):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        frozen = {name_of(path): leaf.size} if floating and leaf.ndim > 1 else {}
        given.append(_Value(carried=frozen, state=floating))
    given += [_Value(frozenset({"x"}))] * (len(closed.jaxpr.invars) - len(given))
    walk = _Walk()
    outputs, *_ = walk.through(closed.jaxpr, closed.consts, given, ()) or [_Value()]
    parts = tuple(_parts(walk.products, outputs))
    not_seen = dict(walk.not_seen)
    for product in walk.products.values():
        if product.hidden:
            not_seen |= dict.fromkeys(product.carried, product.hidden)
    return Reading(parts, not_seen)


def _parts(products, outputs) -> Iterator[Part]:
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

    def last_of_its_chain(value):
        rest = [one for one in onward.get(value, ()) if not (one.bent and one.base is value.base)]
        return not onward.get(value) or any(
            one.base is not value.base or last_of_its_chain(one) for one in rest
        )

    def with_bias_and_scale(value):
        transposed = value.transposed
        while len(users.get(value, ())) == 1:
            (after,) = users[value]
            if after.hidden != value.hidden or not (after.learned or (transposed and after.transposed)):
                break
            value = after
        return value

    names: dict[str, int] = {}
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
            latest = max(
                (products[place] for place in value.products), key=lambda one: one.number, default=None
            )
            stem = (
                next(iter(latest.carried)).removesuffix("/kernel").removesuffix("/weight")
                if latest
                else "input"
            )
            name = f"{stem}/{'norm' if kind == 'norm' else 'softmax' if value.bend == 'softmax' else 'activation'}"
        count = names[name] = names.get(name, -1) + 1
        readout = bool(kernels) and value.where[:-1] in outputs.products
        yield Part(
            name + f"[{count}]" * bool(count), kind, kernels, readout, None if end.hidden else end.where
        )


def _before(values, inputs) -> set[_Value]:
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
            call = functools.partial(_evaluate, *_bodies(eqn)[0], tree=here)
            if "policy" in eqn.params:  # of jax.checkpoint
                call = jax.checkpoint(
                    call, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"]
                )
            found, inside = call([value(atom) for atom in eqn.invars], offsets=offsets)
            shown |= inside
        else:
            if jax.default_backend() == "cpu":
                eqn = convolution.replaced_equation(eqn)
            variables = dict.fromkeys(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
            one = jaxpr.replace(
                constvars=[], invars=[*variables], outvars=eqn.outvars, eqns=[eqn], debug_info=unnamed
            )
            found = jax.core.eval_jaxpr(one, [], *map(value, variables))
            for output, name in here.items():
                found[output] = shown[name] = found[output] + offsets.get(name, 0)
        known |= zip(eqn.outvars, found, strict=True)
    return [value(atom) for atom in jaxpr.outvars], shown
