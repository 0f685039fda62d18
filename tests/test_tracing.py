"""What is read off a trace, in cases made for it: each with what is to be found."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bnjax import tracing

W = jax.ShapeDtypeStruct((4, 4), jnp.float32)
V = jax.ShapeDtypeStruct((4,), jnp.float32)
X = jax.ShapeDtypeStruct((3, 4), jnp.float32)


def read(function, params, x=X, state=None):
    """Of a function (params, x), or (params, state, x)."""

    def apply(params, batch_stats, x, *, train):
        return (function(params, x) if state is None else function(params, batch_stats, x)), batch_stats

    return tracing.read(apply, params, {} if state is None else state, x)


def names(function, params, *args):
    return " ".join(part.name for part in read(function, params, *args).parts)


@jax.custom_vjp
def linear(x, w):
    return x @ w


linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, 7 * (saved[0].T @ g)))


@jax.custom_vjp
def two_layers(x, w):
    return jnp.tanh(x @ w) @ w.T


two_layers.defvjp(lambda x, w: (two_layers(x, w), None), lambda _, g: (g, jnp.zeros((4, 4))))


@pytest.mark.parametrize(
    ("function", "params", "expected"),
    [
        # Products: either side, through maps and views of the parameter, batched, convolutions.
        (lambda p, x: x @ p["a"], {"a": W}, "a"),
        (lambda p, x: (p["a"] @ x.T).T, {"a": W}, "a"),
        (lambda p, x: jax.vmap(lambda x: p["a"] @ x)(x), {"a": W}, "a"),
        (lambda p, x: x @ jnp.tanh(2 * p["a"].astype(jnp.bfloat16)).T.reshape(4, 4), {"a": W}, "a"),
        (lambda p, x: x @ (p["g"] * p["a"] / jnp.linalg.norm(p["a"], axis=0)), {"a": W, "g": V}, "a"),  # weight norm
        (lambda p, x: x @ p["a"][1], {"a": jax.ShapeDtypeStruct((2, 4, 4), jnp.float32)}, "a"),
        (lambda p, x: x @ p["a"] @ p["a"], {"a": W}, "a a[1]"),
        (lambda p, x: jnp.einsum("ni,nj,ij->n", x, x, p["a"])[:, None], {"a": W}, "a"),
        (lambda p, x: x @ p["v"][:, None], {"v": V}, "v"),
        # Elementwise parameters are none; nor are products of x with itself.
        (lambda p, x: x * p["v"] + p["a"][:3], {"a": W, "v": V}, ""),
        (lambda p, x: x @ x.T, {}, ""),
        # Nonlinearities: between products, chains count once, gates and residuals.
        (lambda p, x: jnp.log1p(x**2) @ p["a"], {"a": W}, "a"),
        (lambda p, x: jax.nn.relu(x @ p["a"]), {"a": W}, "a"),
        (lambda p, x: jax.nn.gelu(x @ p["a"]) @ p["b"], {"a": W, "b": W}, "a a/activation b"),
        (lambda p, x: jnp.tanh(jax.nn.relu(x @ p["a"]) * 2 + 1) @ p["b"], {"a": W, "b": W}, "a a/activation b"),
        (lambda p, x: jax.nn.selu(x @ p["a"]) @ p["b"], {"a": W, "b": W}, "a a/activation b"),
        (lambda p, x: jax.nn.mish(x @ p["a"]) @ p["b"], {"a": W, "b": W}, "a a/activation b"),
        (lambda p, x: jnp.where(x @ p["a"] > 1, x @ p["a"], 0) @ p["b"], {"a": W, "b": W}, "a a[1] b"),
        (
            lambda p, x: (x @ p["a"] * jax.nn.sigmoid(x @ p["b"])) @ p["c"],
            {"a": W, "b": W, "c": W},
            "a b b/activation c",
        ),
        (lambda p, x: (x + jax.nn.relu(x @ p["a"])) @ p["b"], {"a": W, "b": W}, "a a/activation b"),
        (
            lambda p, x: jnp.maximum(x @ p["a"], x @ p["b"]) @ p["c"],  # maxout
            {"a": W, "b": W, "c": W},
            "a b b/activation c",
        ),
        # Norms, over whatever axes, by whatever formula, before and after nonlinearities; not a mean alone.
        (lambda p, x: (x @ p["a"] - (x @ p["a"]).mean(0)) @ p["b"], {"a": W, "b": W}, "a a[1] b"),
        (lambda p, x: rms(x @ p["a"]) * p["v"], {"a": W, "v": V}, "a a/norm"),
        (lambda p, x: standardized(jax.nn.relu(x @ p["a"])) @ p["b"], {"a": W, "b": W}, "a a/activation a/norm b"),
        (lambda p, x: jax.nn.relu(standardized(x @ p["a"])) @ p["b"], {"a": W, "b": W}, "a a/norm a/activation b"),
        (lambda p, x: standardized(x) @ p["a"], {"a": W}, "input/norm a"),
        (lambda p, x: jax.nn.standardize(x @ p["a"]) @ p["b"], {"a": W, "b": W}, "a a/norm b"),
        (lambda p, x: grouped(x @ p["a"]) @ p["b"], {"a": W, "b": W}, "a a/norm b"),
        (lambda p, x: scaled_by_l1(x @ p["a"]) @ p["b"], {"a": W, "b": W}, "a a/norm b"),
        (lambda p, x: (x @ p["a"]).mean(0, keepdims=True) * x @ p["b"], {"a": W, "b": W}, "a b"),
        # Attention without projections.
        (lambda p, x: jax.nn.softmax((x @ p["a"]) @ x.T) @ x @ p["b"], {"a": W, "b": W}, "a a/softmax b"),
        # Calls: written out, or taken whole.
        (lambda p, x: jax.jit(lambda x: jax.nn.silu(x @ p["a"]))(x) @ p["b"], {"a": W, "b": W}, "a a/activation b"),
        (
            lambda p, x: jax.checkpoint(lambda x: jnp.tanh(x @ p["a"] + p["v"]))(x) @ p["b"],
            {"a": W, "b": W, "v": V},
            "a a/activation b",
        ),
        (lambda p, x: jnp.tanh(linear(x, p["a"]) + p["v"]) @ p["b"], {"a": W, "b": W, "v": V}, "a a/activation b"),
        # The kernel on the left, twice: no part is taken for what follows the other.
        (lambda p, x: (p["b"] @ (p["a"] @ x.T)).T, {"a": W, "b": W}, "a b"),
    ],
)
def test_parts(function, params, expected):
    assert names(function, params) == expected
    assert read(function, params).not_seen == {}


def rms(x):
    return x * lax.rsqrt((x * x).mean(1, keepdims=True) + 1e-6)


def standardized(x):
    return (x - x.mean(0)) / jnp.sqrt(jnp.mean(x**2, 0) - x.mean(0) ** 2 + 1e-5)


def grouped(x):
    g = x.reshape(3, 2, 2)
    return ((g - g.mean(2, keepdims=True)) / g.std(2, keepdims=True)).reshape(3, 4)


def scaled_by_l1(x):
    x = x - x.mean(0)
    return x / jnp.abs(x).mean(0)


def test_readouts_are_the_last_products():
    """All of them, if there are several; not what is only elementwise after one."""

    def function(p, x):
        h = jnp.tanh(x @ p["a"])
        return jax.nn.softmax(h @ p["b"] + x @ p["c"] * p["v"])

    reading = read(function, {"a": W, "b": W, "c": W, "v": V})
    assert reading.kernels == ("a", "b", "c")
    assert reading.readouts == ("b", "c")


def test_a_readout_with_a_rule_of_its_own():
    reading = read(lambda p, x: linear(jnp.tanh(x @ p["a"]), p["b"]), {"a": W, "b": W})
    assert reading.readouts == ("b",)


def test_kernels_that_are_made_of_several_parameters():
    """Put side by side or multiplied, each is one; a gain of the same size is none."""
    narrow = jax.ShapeDtypeStruct((4, 2), jnp.float32)

    def fused(p, x):
        return x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1)

    assert read(fused, {"q": W, "k": narrow, "v": narrow}).kernels == ("q", "k", "v")
    low = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert read(lambda p, x: x @ (p["a"] @ p["b"]), {"a": narrow, "b": low}).kernels == ("a", "b")
    row = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    assert read(lambda p, x: x[:, :1] @ (p["w"] * p["g"]), {"w": row, "g": V}).kernels == ("w",)


def test_where_the_values_of_a_product_are_shown():
    """With the bias, N first: also where the kernel is on the left, and where a form comes in between."""
    w, v, x = np.full((5, 4), 0.5, np.float32), np.arange(5, dtype=np.float32), np.ones((3, 4), np.float32)

    def left(params, stats, x, *, train):
        return jax.vmap(lambda x: params["w"] @ x + params["v"])(x), stats

    def between(params, stats, x, *, train):
        return (x @ params["w"].T)[:, None].reshape(3, 5) + params["v"], stats

    for apply in (left, between):
        outputs, shown = tracing.layers(apply)({"w": w, "v": v}, {}, x, {}, train=True)
        np.testing.assert_array_equal(shown["w"], outputs)


def test_several_outputs_are_refused():
    with pytest.raises(ValueError, match=r"outputs must be one array \[N, K\]"):
        read(lambda p, x: (x @ p["a"], x), {"a": W})


def test_order_is_that_of_the_computation():
    assert names(lambda p, x: x @ p["b"] @ p["a"], {"a": W, "b": W}) == "b a"


def test_loops_are_entered_for_kernels_but_not_shown():
    stacked = jax.ShapeDtypeStruct((5, 4, 4), jnp.float32)

    def scanned(p, x):
        x, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])
        return x @ p["readout"]

    def looped(p, x):
        return lax.fori_loop(0, 3, lambda i, h: h @ p["layers"][i], x) @ p["readout"]

    def chosen(p, x):
        return lax.cond(x.sum() > 0, lambda: x @ p["layers"][0], lambda: x) @ p["readout"]

    for function, word in ((scanned, "scan"), (looped, "scan"), (chosen, "cond")):
        reading = read(function, {"layers": stacked, "readout": W})
        assert reading.kernels == ("layers", "readout")
        assert reading.readouts == ("readout",)
        assert reading.not_seen == {"layers": f"in a {word}"}
        assert [part.name for part in reading.parts if part.where] == ["readout"]


def test_a_carry_that_comes_to_depend_on_x_later():
    """In the first turn the second product is of a constant."""

    def function(p, x):
        def turn(carry, _):
            a, b = carry
            return (a @ p["a"], a + b @ p["b"]), None

        (_, b), _ = lax.scan(turn, (x, jnp.zeros_like(x)), None, length=3)
        return b @ p["readout"]

    assert set(read(function, {"a": W, "b": W, "readout": W}).kernels) == {"a", "b", "readout"}


def test_a_loop_that_takes_many_turns():
    """A line of delays: x reaches the product in the fifth turn only."""

    def function(p, x):
        def turn(carry, _):
            a, b, c, d, e, f = carry
            return (a, a, b, c, d, f + e @ p["w"]), None

        zero = jnp.zeros_like(x)
        (*_, f), _ = jax.lax.scan(turn, (x, zero, zero, zero, zero, zero), None, length=9)
        return f @ p["readout"]

    reading = read(function, {"w": W, "readout": W})
    assert reading.kernels == ("w", "readout")
    assert reading.readouts == ("readout",)


def test_not_seen():
    def function(p, x):
        h = p["table"][x[:, 0].astype(jnp.int32)]  # an embedding, tied to the readout
        h = two_layers(h, p["own"])
        return jax.pure_callback(lambda h, w: h, h, h, p["opaque"]) @ p["table"].T

    reading = read(function, {"table": jax.ShapeDtypeStruct((9, 4), jnp.float32), "own": W, "opaque": W})
    assert reading.not_seen == {
        "table": "looked up, as an embedding",
        "own": "in a function with a derivative rule of its own",
        "opaque": "an operand of pure_callback",
    }
    assert reading.readouts == ("table",)


def test_frozen_kernels_and_running_statistics():
    def function(p, s, x):
        h = (x @ s["frozen"] - s["mean"]) * lax.rsqrt(s["var"] + 1e-5) * p["v"]
        return jnp.tanh(h) @ p["a"]

    state = {"frozen": W, "mean": V, "var": V}
    assert names(function, {"a": W, "v": V}, X, state) == "frozen frozen/norm frozen/activation a"


def test_the_rules_of_functions_are_kept():
    """The rule of `linear` says 7 times too much, on purpose: through `layers`, too."""
    w, x = np.eye(4, dtype=np.float32), np.ones((3, 4), np.float32)
    show = tracing.layers(lambda params, stats, x, *, train: (jnp.tanh(linear(x, params["w"])) @ params["b"], stats))

    def total(w, offset):
        outputs, shown = show({"w": w, "b": w}, {}, x, {"w": offset}, train=True)
        assert [*shown] == ["w", "w/activation", "b"]
        return outputs.sum()

    def by_hand(w):
        return (jnp.tanh(linear(x, w)) @ w).sum()

    to_w, to_offset = jax.jit(jax.grad(total, (0, 1)))(w, jnp.zeros((3, 4)))
    np.testing.assert_allclose(to_w, jax.grad(by_hand)(w), rtol=1e-6)
    np.testing.assert_allclose(to_offset, np.full((3, 4), 1 / np.cosh(1) ** 2), rtol=1e-5)


@jax.custom_jvp
def twice(x):
    """The same values as two outputs, of which one is used."""
    y = (x - x.mean(0)) / x.std(0)
    return y, y


@twice.defjvp
def _(primals, tangents):
    return jax.jvp(twice.__wrapped__, primals, tangents)


def test_an_output_that_is_another_too():
    def apply(params, stats, x, *, train):
        return twice(x @ params["a"])[0] @ params["b"], stats

    w, x = np.eye(4, dtype=np.float32), np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)

    def total(offset):
        outputs, shown = tracing.layers(apply)({"a": w, "b": w}, {}, x, {"a/norm": offset}, train=True)
        assert [*shown] == ["a", "a/norm", "b"]
        return outputs.sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros((3, 4))), 1)


def test_offsets_within_remat():
    """The offset acts inside of the checkpointed function; its value comes out."""
    w, x = np.eye(4, dtype=np.float32), np.ones((3, 4), np.float32)

    def apply(params, stats, x, *, train):
        return jax.checkpoint(lambda x: jnp.tanh(x @ params["a"]))(x) @ params["b"], stats

    show, params = tracing.layers(apply), {"a": w, "b": w}
    outputs, shown = show(params, {}, x, {"a": jnp.full((3, 4), 0.5)}, train=True)
    np.testing.assert_allclose(shown["a"], 1.5)
    np.testing.assert_allclose(outputs, np.tanh(1.5), rtol=1e-6)
    with pytest.raises(ValueError, match=r"unknown offsets \['c'\]; allowed: a, a/activation, b"):
        show(params, {}, x, {"c": 0.0}, train=True)


def test_dependent():
    def function(a, b, key):
        noise = jax.random.normal(key, (2,))
        return {"sum": a + b, "noise": noise, "both": lax.fori_loop(0, 2, lambda i, c: c + noise[0], b), "none": 1.0}

    _, found = tracing.dependent(function, 1.0, 2.0, jax.random.key(0))
    assert found == {"sum": frozenset({0, 1}), "noise": frozenset({2}), "both": frozenset({1, 2}), "none": frozenset()}


def test_reading_computes_nothing():
    def apply(params, stats, x, *, train):
        return jax.pure_callback(partial(pytest.fail, "was called"), x) @ params, stats

    tracing.read(apply, W, {}, X)
