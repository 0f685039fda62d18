"""Follows a trace (jaxpr) from the inputs to the outputs: of what each value is made, and by what operations.

`bnjax.tracing` reads products, norms and nonlinearities off that.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax.extend import core

PRODUCTS = {"dot_general", "conv_general_dilated"}
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"}  # evaluated as if written out
RULED = {"custom_jvp_call", "custom_vjp_call"}  # evaluated whole, or their derivative rules would be lost
LOOPS = {"scan", "while", "cond"}
VIEWS = set(
    "reshape transpose squeeze broadcast_in_dim convert_element_type reduce_precision copy copy_p rev slice split "
    "dynamic_slice gather concatenate pad stop_gradient optimization_barrier sharding_constraint name".split()
)
RESHAPES = {"reshape", "squeeze", "transpose", "convert_element_type", "broadcast_in_dim"}
AFFINE = set("add sub add_any neg mul div select_n".split())  # in one operand, the others being constant
BENT = set(
    "max min abs sign clamp floor ceil round rem integer_pow pow square sqrt rsqrt cbrt exp exp2 expm1 log log1p "
    "logistic tanh sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc erf_inv lgamma digamma "
    "lt le gt ge eq ne and or not xor is_finite nextafter".split()
)
REDUCTIONS = PRODUCTS | set(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin psum pmax pmin".split()
)


@dataclasses.dataclass(eq=False)
class Value:
    """A value of the trace, as far as it must be known."""

    origins: frozenset = frozenset()  # the inputs that it depends on: {"x"}, or none where x is meant
    carried: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """Without x: the parameters that it is made of, with their sizes and ranks."""
    parametric: bool = False  # without x: depends on parameters,
    state: bool = False  # or on the network's state
    inverse: bool = False  # it was divided by, or the rsqrt was taken
    products: frozenset = frozenset()  # the places of those that reach it without another
    root: "Value | None" = None  # what it is an elementwise function of; None: itself
    bend: str = ""  # the last operation from there that is not affine
    bent: bool = False  # this operation is such
    learned: bool = False  # this operation adds a bias or multiplies with a scale,
    transposed: bool = False  # or transposes; of a product: its kernel is the left operand, N comes last
    reshaped: bool = False  # or has the same entries in another form
    sources: frozenset = frozenset()  # the roots of what it is a statistic of
    kind: str = ""  # of the part that it is
    inputs: tuple["Value", ...] = ()  # those that depend on x,
    statistics: tuple["Value", ...] = ()  # and those by which a norm divides
    where: tuple[int, ...] = ()  # `Part.where`
    hidden: str = ""  # why it cannot be shown
    number: int = dataclasses.field(default_factory=itertools.count().__next__)

    @property
    def moving(self) -> bool:
        """True if it depends on x."""
        return bool(self.origins)

    @property
    def base(self) -> "Value":
        """The values that it is an elementwise function of."""
        return self.root or self


class Walk:
    """Follows a trace from the inputs to the outputs."""

    def __init__(self):
        self.products: dict[tuple[int, ...], Value] = {}  # by place
        self.not_seen: dict[str, str] = {}

    def through(self, jaxpr, consts, args, place, hidden="") -> list[Value]:
        """The values of the outputs."""
        known = dict(zip(jaxpr.constvars, (Value() for _ in consts), strict=True))
        known |= zip(jaxpr.invars, args, strict=True)

        def value(atom):
            return Value() if isinstance(atom, core.Literal) else known[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            found = self.equation(eqn, [value(atom) for atom in eqn.invars], (*place, i), hidden)
            known |= zip(eqn.outvars, found, strict=True)
        return [value(atom) for atom in jaxpr.outvars]

    def equation(self, eqn, given, place, hidden) -> list[Value]:
        """The values that it computes from those given."""
        name, bodies = eqn.primitive.name, bodies_of(eqn)
        if name in CALLS:
            return self.through(*bodies[0], given, place, hidden)
        if name in RULED:
            inside = "in a function with a derivative rule of its own"
            found = self.through(*bodies[0], given, place, hidden or inside)
            return found if hidden else [self.outside(one, place, i) for i, one in enumerate(found)]
        if name in LOOPS:
            return self.loop(eqn, bodies, given, place, hidden or f"in a {name}")
        if len(bodies) == 1 and len(bodies[0][0].invars) == len(given):
            return self.through(*bodies[0], given, place, hidden or f"in a {name}")
        found = [self.operation(eqn, given, place) for _ in eqn.outvars]
        for i, one in enumerate(found):
            one.where, one.hidden = (*place, i), hidden
        return found

    def outside(self, inner, place, output) -> Value:
        """An output of the call at that place, which can be shown though what is inside cannot."""
        if inner.where[: len(place)] != place:
            return inner  # it only goes through
        one = dataclasses.replace(inner, where=(*place, output), hidden="")
        if one.kind == "product":
            self.products |= dict.fromkeys(one.products, one)
        return one

    def loop(self, eqn, bodies, given, place, hidden) -> list[Value]:
        """Of a loop or branch the products are found, but nothing is shown."""
        params = eqn.params
        if eqn.primitive.name == "cond":
            branches = [self.through(*body, given[1:], (*place, i), hidden) for i, body in enumerate(bodies)]
            return [_joined([given[0], *several]) for several in zip(*branches, strict=True)]
        if eqn.primitive.name == "while":
            given = given[params["cond_nconsts"] :]
            body, first = bodies_of(params["body_jaxpr"])[0], params["body_nconsts"]
            last = len(given)
        else:  # what has another rank in the body is sliced or stacked; its names differ between versions of JAX
            body = bodies[0]
            last = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.invars, body[0].invars, strict=True))
            carried = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, body[0].outvars, strict=True))
            first = last - carried
        carry, known = given[first:last], None
        while known != (known := [(one.origins, one.products) for one in carry]):
            # A turn may make what the next one starts from depend on x.
            found = self.through(*body, [*given[:first], *carry, *given[last:]], place, hidden)
            carry = [_joined(pair) for pair in zip(carry, found, strict=False)]
        return [_joined([one]) for one in found]

    def operation(self, eqn, given, place) -> Value:
        """One of the values that a single operation computes."""
        name = eqn.primitive.name
        inputs = tuple(dict.fromkeys(one for one in given if one.moving))
        fixed = [one for one in given if not one.moving]
        if name in PRODUCTS or name == "concatenate":
            carried = _all(fixed)
        else:
            carried = {} if name in REDUCTIONS else _largest(fixed)
        inverse = any(one.inverse for one in given) or _inverts(eqn, given)
        if not inputs:
            parametric, state = (any(getattr(one, f) for one in given) for f in ("parametric", "state"))
            return Value(carried=carried, parametric=parametric, state=state, inverse=inverse)
        new = Value(
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
            same_size = eqn.invars[0].aval.size == eqn.outvars[0].aval.size
            new.transposed, new.reshaped = name == "transpose", name in RESHAPES and same_size
            # A comparison is shown by what it chooses.
            new.bent &= jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)
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
    """True if the operation is a division by a statistic, or a product with the inverse of one."""
    by = [one for one in by if getattr(one, what)]
    return bool(by) and ((name == "div" and first) or (name == "mul" and any(one.inverse for one in by)))


def _inverts(eqn, given) -> bool:
    name = eqn.primitive.name
    denominator = name == "div" and (given[1].moving or given[1].state)
    return denominator or name == "rsqrt" or (name == "integer_pow" and eqn.params["y"] < 0)


def _all(values) -> dict[str, tuple[int, int]]:
    """All parameters that are carried."""
    return {name: form for one in values for name, form in one.carried.items()}


def _largest(values) -> dict[str, tuple[int, int]]:
    """The largest of the parameters that are carried: a gain beside a matrix is none."""
    carried = _all(values)
    return {name: form for name, form in carried.items() if form == max(carried.values())}


def _joined(values) -> Value:
    """A value that may be one or the other."""
    inputs = tuple(one for one in values if one.moving)
    return Value(
        origins=_union(one.origins for one in inputs),
        carried={} if inputs else _largest(values),
        parametric=any(one.parametric for one in values),
        state=any(one.state for one in values),
        products=_union(one.products for one in values),
        inputs=inputs,
    )


def _union(sets) -> frozenset:
    return frozenset().union(*sets)


def bodies_of(eqn) -> list[tuple[core.Jaxpr, Sequence]]:
    """The traces within an equation, or in a parameter of one, with their constants."""
    params = eqn.params.values() if isinstance(eqn, core.JaxprEqn) else [eqn]
    several = (value if isinstance(value, tuple | list) else (value,) for value in params)
    found = [one for values in several for one in values if isinstance(one, core.ClosedJaxpr | core.Jaxpr)]
    return [(one.jaxpr, one.consts) if isinstance(one, core.ClosedJaxpr) else (one, ()) for one in found]
