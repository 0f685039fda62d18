"""Convolutions as products: equal to XLA's, with their derivatives, alone and in the programs of networks."""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from bnjax import convolution
from bnjax.convolution import as_product, gains, on_cpu

# Relative to the largest entry of an array. Each is a sum of at most some hundred products, which are rounded by 1e-16
# and 6e-8. In bfloat16 it is by 4e-3, and the gradient of the input is a sum of rounded terms, one for each
# position of the kernel.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}

NHWC = ("NHWC", "HWIO", "NHWC")
CASES = {  # shapes of input and kernel, and the other arguments of `conv`
    "3x3": ((2, 7, 6, 3), (3, 3, 3, 4)),
    "features first": ((2, 3, 7, 6), (4, 3, 3, 2), (2, 1), "VALID", ("NCHW", "OIHW", "NCHW")),
    "odd orders": ((7, 3, 2, 6), (3, 4, 3, 2), (1, 2), "SAME", ("HCNW", "IOHW", "CWHN")),
    "1x1": ((2, 5, 5, 3), (1, 1, 3, 4)),
    "1x1, stride 2": ((2, 5, 5, 3), (1, 1, 3, 4), (2, 2)),
    "negative padding": ((2, 9, 8, 3), (3, 3, 3, 4), (1, 2), [(-1, 2), (-2, -1)]),
    "dilated kernel": ((2, 9, 8, 3), (3, 2, 3, 4), (1, 1), "SAME", NHWC, {"rhs_dilation": (2, 3)}),
    "dilated input": ((2, 5, 4, 3), (3, 3, 3, 4), (1, 1), [(2, 1), (0, 3)], NHWC, {"lhs_dilation": (2, 3)}),
    "groups": ((2, 6, 6, 6), (3, 3, 2, 9), (1, 1), "SAME", NHWC, {"feature_group_count": 3}),
    "depthwise": ((2, 6, 6, 4), (3, 3, 1, 4), (2, 2), "SAME", NHWC, {"feature_group_count": 4}),
    "batch groups": ((4, 6, 6, 2), (3, 3, 2, 6), (1, 1), "SAME", NHWC, {"batch_group_count": 2}),
    "1 dimension": ((2, 9, 3), (4, 3, 5), (2,), "SAME", ("NHC", "HIO", "NHC")),
    "3 dimensions": ((2, 3, 4, 5, 2), (2, 2, 3, 2, 3), (1, 2, 1), "SAME", ("NHWDC", "HWDIO", "NHWDC")),
    "no dimension": ((2, 3), (3, 4), (), [], ("NC", "IO", "NC")),
    "empty output": ((2, 2, 6, 3), (3, 3, 3, 4), (1, 1), "VALID"),
    "wide sums": ((2, 6, 6, 3), (3, 3, 3, 4), (1, 1), "SAME", NHWC, {"preferred_element_type": jnp.float64}),
}


def conv(lhs, rhs, strides=(1, 1), padding="SAME", order=NHWC, others=None):
    return lax.conv_general_dilated(
        lhs, rhs, strides, padding, dimension_numbers=order, precision="highest", **(others or {})
    )


def product(lhs, rhs, *arguments):
    return as_product(lhs, rhs, **params_of(lhs, rhs, *arguments))


def params_of(lhs, rhs, *arguments):
    (eqn,) = jax.make_jaxpr(lambda lhs, rhs: conv(lhs, rhs, *arguments))(lhs, rhs).eqns
    return eqn.params


def draw(shape, dtype="float64", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(found, expected, dtype="float64"):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= TOLERANCE[dtype] * np.abs(b).max(initial=0)


def with_gradients(function, lhs, rhs, *arguments):
    """The output, and the gradients of a sum of it with weights."""
    y, pull = jax.vjp(lambda *operands: function(*operands, *arguments), lhs, rhs)
    return y, pull(jnp.sin(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))


def assert_same(lhs, rhs, *arguments, dtype="float64"):
    """Of `conv` and `product`, in one program, which compiles faster than two."""

    def both(lhs, rhs):
        return [with_gradients(f, lhs, rhs, *arguments) for f in (product, conv)]

    assert_close(*jax.jit(both)(lhs, rhs), dtype)


def in_dtypes():
    """All cases in float64; in the other dtypes all but a few are slow."""
    for name, dtype in itertools.product(CASES, TOLERANCE):
        quick = dtype == "float64" or name in ("groups", "wide sums")
        yield pytest.param(CASES[name], dtype, id=f"{name}, {dtype}", marks=[] if quick else pytest.mark.slow)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "dtype"), list(in_dtypes()))
def test_output_and_gradients_are_those_of_the_primitive(case, dtype):
    lhs, rhs, *arguments = case
    assert_same(draw(lhs, dtype), draw(rhs, dtype, 1), *arguments, dtype=dtype)


@st.composite
def convolutions(draw_from):
    def integers(least, most, n):
        return draw_from(st.tuples(*[st.integers(least, most)] * n))

    rank = draw_from(st.integers(0, 3))
    n, groups, c, o = integers(1, 3, 4)
    space, window = integers(1, 6, rank), integers(1, 3, rank)
    lhs_dilation, rhs_dilation = integers(1, 3, rank), integers(1, 3, rank)
    padding = list(zip(integers(-2, 3, rank), integers(-2, 3, rank), strict=True))
    order = ["".join(draw_from(st.permutations(f"{two}{'HWD'[:rank]}"))) for two in ("NC", "IO", "NC")]
    letters = [letter for letter in order[1] if letter in "HWD"]  # JAX's order of what has one entry for each
    dilated = [(s - 1) * d + 1 for s, d in zip(space, lhs_dilation, strict=True)]
    # A crop of more than there is, is an error of the primitive's.
    assume(all(s + min(a, 0) + min(b, 0) >= 0 for s, (a, b) in zip(dilated, padding, strict=True)))
    sizes = dict(zip(letters, space, strict=True)) | {"N": n, "C": groups * c}
    lhs = tuple(sizes[letter] for letter in order[0])
    sizes = dict(zip(letters, window, strict=True)) | {"I": c, "O": groups * o}
    rhs = tuple(sizes[letter] for letter in order[1])
    dilations = {"lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation, "feature_group_count": groups}
    return lhs, rhs, integers(1, 3, rank), padding, tuple(order), dilations


def check_any(case):
    lhs, rhs, *arguments = case
    with jax.enable_x64(True):
        assert_same(draw(lhs), draw(rhs, seed=1), *arguments)


test_any_convolution = settings(max_examples=6, deadline=None)(given(convolutions())(check_any))
test_many_convolutions = pytest.mark.slow(settings(max_examples=100, deadline=None)(given(convolutions())(check_any)))


@pytest.mark.usefixtures("x64")
def test_second_derivatives_and_vmap():
    """A Hessian times a vector, of a loss that is not quadratic; over each operand and both."""
    lhs, rhs, *arguments = CASES["groups"]
    lhs, rhs = draw((2, *lhs)), draw((2, *rhs), seed=1)

    def curvature(function, lhs, rhs):
        def gradient(lhs, rhs):
            return with_gradients(function, lhs, rhs, *arguments)[1]

        return jax.jvp(gradient, (lhs, rhs), (jnp.cos(lhs), jnp.cos(rhs)))

    def results(function):
        def squared(*operands):
            return function(*operands) ** 2

        return (
            jax.vmap(functools.partial(curvature, squared))(lhs, rhs),
            jax.vmap(lambda lhs: with_gradients(function, lhs, rhs[0], *arguments))(lhs),
            jax.vmap(lambda rhs: with_gradients(function, lhs[0], rhs, *arguments))(rhs),
        )

    assert_close(*jax.jit(lambda: (results(product), results(conv)))())


@pytest.mark.usefixtures("x64")
def test_a_convolution_of_single_entries_is_a_product_alone():
    lhs, rhs = draw((2, 5, 5, 3)), draw((1, 1, 3, 4))
    program = str(jax.make_jaxpr(product)(lhs, rhs))
    assert "dot_general" in program
    assert "concatenate" not in program


def test_gains_but_for_patches_that_take_too_much_memory():
    def gain(lhs, rhs, *arguments):
        lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (lhs, rhs))
        return gains(lhs, rhs, params_of(lhs, rhs, *arguments))

    assert gain((128, 28, 28, 8), (3, 3, 8, 16))
    assert gain((128, 32, 32, 64), (3, 3, 64, 64))  # 0.3 GB
    assert gain((128, 14, 14, 32), (3, 3, 1, 32), (1, 1), "SAME", NHWC, {"feature_group_count": 32})
    assert not gain((128, 32, 32, 64), (11, 11, 64, 64))  # 4 GB
    assert gain((128, 32, 32, 64), (11, 11, 64, 64), (4, 4))  # a sixteenth
    assert not gain(*CASES["batch groups"])


class Network(nn.Module):
    """With all that is in the way: batch statistics, checkpoint, groups."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), use_bias=False, param_dtype=x.dtype)(x)  # a bias would have no gradient
        x = nn.relu(nn.BatchNorm(use_running_average=not train, param_dtype=x.dtype)(x))
        x = nn.remat(nn.Conv)(8, (3, 3), strides=2, feature_group_count=2, param_dtype=x.dtype)(x)
        x = jnp.tanh(x).mean((1, 2))
        return nn.Dense(3, param_dtype=x.dtype)(x)


def compare(functions, *args):
    """Our function, without a convolution, and the one it was made from."""
    ours, theirs = (jax.jit(f).lower(*args) for f in functions)
    assert "stablehlo.convolution" not in ours.as_text()
    assert "stablehlo.convolution" in theirs.as_text()
    assert_close(ours.compile()(*args), theirs.compile()(*args))


@pytest.mark.usefixtures("x64")
def test_a_flax_network():
    """Outputs, statistics and gradients, in training and evaluation, of two networks under vmap."""
    network, x = Network(), draw((4, 8, 8, 1))

    def apply(variables, x, train):
        return network.apply(variables, x, train, mutable=["batch_stats"] if train else [])

    def trained(apply, variables):
        def loss(params):
            outputs, new = apply(variables | {"params": params}, x)
            return jnp.sum(jnp.sin(outputs)), (outputs, new)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    def results(apply, variables):
        evaluated = apply(variables, x, train=False)
        return trained(functools.partial(apply, train=True), variables), evaluated

    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, False))
    variables = jax.tree.map(lambda leaf: draw((2, *leaf.shape)) ** 2, shapes)  # variances are positive
    compare([jax.vmap(functools.partial(results, f)) for f in (on_cpu(apply), apply)], variables)


def looped(w, x):
    return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(conv(x, w)), x)


def scanned(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(conv(x, w)), x.sum()), x, jnp.stack([w, 2 * w]))


def stopped(w, x):
    """Convolutions in the condition, too."""
    w, x = lax.stop_gradient((w, x))
    return lax.while_loop(lambda x: conv(x, w).sum() < 10, lambda x: x + conv(x, w) ** 2, x)


def chosen(w, x):
    return lax.cond(x[0, 0, 0, 0] > 0, lambda: conv(x, w), lambda: lax.switch(1, [jnp.sin, jnp.cos], x))


def checkpointed(w, x):
    return jax.checkpoint(lambda x: jax.jit(conv)(jnp.sin(conv(x, w)), w))(x)


def averaged(w, x):
    """With a collective over an axis of a vmap outside."""
    return conv(x, lax.pmean(w, "networks"))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("function", [looped, scanned, chosen, checkpointed, averaged, stopped])
def test_convolutions_inside_of_other_programs(function):
    w, x = draw((2, 3, 3, 2, 2)), draw((2, 1, 5, 5, 2), seed=1)

    def over_networks(function):
        def first(w, x):
            return jax.tree.leaves(function(w, x))[0]

        return jax.vmap(functools.partial(with_gradients, first), axis_name="networks")

    compare([over_networks(f) for f in (on_cpu(function), function)], w, x)


@pytest.mark.usefixtures("x64")
def test_functions_with_derivatives_of_their_own_keep_them():
    w, x = draw((3, 3, 2, 2)), draw((1, 5, 5, 2), seed=1)
    ours = jax.custom_vjp(lambda x, w: conv(x, w))
    ours.defvjp(lambda x, w: (conv(x, w), (x, w)), lambda operands, _: jax.tree.map(jnp.ones_like, operands))

    @jax.custom_jvp
    def own(x):
        return jnp.sum(conv(x, w))

    own.defjvp(lambda x, t: (own(*x), jnp.sum(t[0]) * 7))

    def function(w, x):
        return own(ours(conv(x, w), w))

    found = jax.grad(on_cpu(function), (0, 1))(w, x)
    assert_close(found, jax.grad(function, (0, 1))(w, x))
    assert jax.jit(on_cpu(function)).lower(w, x).as_text().count("stablehlo.convolution") == 2  # of 3


def test_what_has_no_convolution_that_gains_is_left_as_it_is(monkeypatch):
    def dense(w, x):
        return {"y": jnp.tanh(x @ w), "x": x}, jax.jit(jnp.sum)(w)

    def text(function, *args):
        return jax.jit(function).lower(*args).as_text()

    args = jnp.ones((2, 3)), jnp.ones((4, 2))
    assert text(on_cpu(dense), *args) == text(dense, *args)
    monkeypatch.setattr(convolution, "PATCHES_BYTES", 0)
    args = draw((3, 3, 2, 2), "float32"), draw((1, 5, 5, 2), "float32")
    assert text(on_cpu(looped), *args) == text(looped, *args)


@pytest.mark.slow
def test_training_in_a_loop_is_faster():
    """Some 8 times; once it is not, this module can go."""

    def train(convolve, w, x):
        def step(_, state):
            gradients = jax.grad(lambda w, x: jnp.sum(convolve(x, w) ** 2), (0, 1))(*state)
            return jax.tree.map(lambda a, g: a - 1e-6 * g, state, gradients)

        return lax.fori_loop(0, 2, step, (w, x))

    args = draw((3, 3, 8, 16), "float32"), draw((64, 28, 28, 8), "float32")
    programs = [jax.jit(functools.partial(train, f)).lower(*args).compile() for f in (on_cpu(conv), conv)]
    seconds = [[], []]
    for _ in range(3):  # in turn, for the load of the machine
        for program, taken in zip(programs, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            taken.append(time.perf_counter() - start)
    assert 2 * min(seconds[0]) < min(seconds[1])
