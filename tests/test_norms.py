"""Every norm of the table: its definition in float64, its derivative, its range; parity with Flax and PyTorch."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnjax
from bnjax import norms
from bnjax.norms.weight_standardized import gain_of
from bnjax.theory import mean_field

GOLDEN = np.load(Path(__file__).parent / "golden" / "torch_norms.npz")
SHAPES = {"dense": (6, 8), "images": (4, 3, 5, 8)}


def over(axes):
    """(x - mean, deviation) over these axes, naively."""
    return lambda x: (x - x.mean(axes, keepdims=True), x.std(axes, keepdims=True))


def by_groups(x, count):
    apart = x.reshape(*x.shape[:-1], count, -1)
    centred, deviation = over((*range(1, x.ndim - 1), x.ndim))(apart)
    return (centred / deviation).reshape(x.shape)


def features(x):
    return tuple(range(1, x.ndim))


def rest(x):
    return tuple(range(x.ndim - 1))


def quotient(pair):
    return pair[0] / pair[1]


def spread(x, of):
    centred = x - x.mean(rest(x))
    return centred / of(jnp.abs(centred))


# Each with epsilon 0, and its definition.
CASES = {
    "batch": (norms.batch(epsilon=0.0), lambda x: quotient(over(rest(x))(x))),
    "layer": (norms.layer(epsilon=0.0), lambda x: quotient(over(features(x))(x))),
    "layer of each position": (norms.layer(epsilon=0.0, per_position=True), lambda x: quotient(over((-1,))(x))),
    "group": (norms.group(group_size=4, epsilon=0.0), lambda x: by_groups(x, 2)),
    "rms": (norms.rms(epsilon=0.0), lambda x: x / jnp.sqrt((x**2).mean(features(x), keepdims=True))),
    "l1": (norms.lp(1, epsilon=0.0), lambda x: spread(x, lambda a: a.mean(rest(x)))),
    "l2": (norms.lp(2, epsilon=0.0), lambda x: quotient(over(rest(x))(x))),
    "linf": (norms.lp(math.inf, gain=2.0, epsilon=0.0), lambda x: 2 * spread(x, lambda a: a.max(rest(x)))),
    "weight": (norms.weight(), lambda x: x / jnp.sqrt((x**2).sum(rest(x)))),
    "weight_standardized": (
        norms.weight_standardized(gain=1.5, epsilon=0.0),
        lambda x: 1.5 * quotient(over(rest(x))(x)) / math.sqrt(math.prod(x.shape[:-1])),
    ),
}
REMOVE_MEAN = [name for name in CASES if name not in ("rms", "weight")]


def function(norm, shape, **options):
    """What it makes of activations, or of a kernel, of that shape, at its initial parameters."""
    params, stats = norm.init(shape)
    if norm.kernel is not None:
        return lambda x: norm.kernel(params, x)
    return lambda x: norm.apply(params, stats, x, train=True, **options)[0]


def pulled(f, x, cotangent):
    """Values, and the gradient of <cotangent, values>; one program, where one operation at a time takes long."""

    def both(x, cotangent):
        y, back = jax.vjp(f, x)
        return y, back(cotangent)[0]

    return jax.jit(both)(x, cotangent)


def compare(name, x, cotangent, rtol):
    """Values and gradients in float32 against the definition and its derivative by JAX in float64.

    Differences are relative to the largest entry.
    """
    norm, definition = CASES[name]
    y, dx = pulled(function(norm, x.shape), x, cotangent)
    with jax.enable_x64(True):
        expected, slope = pulled(definition, np.float64(x), np.float64(cotangent))
    for found, right in ((y, expected), (dx, slope)):
        right = np.asarray(right)
        assert np.abs(np.float64(found) - right).max() <= rtol * np.abs(right).max()


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=shape)), np.float32(rng.normal(size=shape))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_definition_and_derivative(name, shape):
    """Some 30 roundings of 6e-8 each."""
    compare(name, *draw(shape), rtol=2e-6)


@pytest.mark.parametrize("magnitude", [1e-30, pytest.param(1e30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_magnitudes(name, magnitude):
    x, cotangent = draw((6, 8))
    compare(name, x * np.float32(magnitude), cotangent * np.float32(min(1, magnitude)), rtol=2e-6)


@pytest.mark.parametrize("name", REMOVE_MEAN)
def test_mean_a_million_times_the_deviation(name):
    """As exact as the mean is: x has 24 bits, of which 20 are the mean's, and the definition gets the rounded x."""
    x, cotangent = draw((16, 8))
    compare(name, np.float32(1e6) + x, cotangent, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("batch", "l2", "layer of each position")])
def test_types_and_transformations(name, x64):
    """float16 stays float16, float64 float64; `vmap` and second derivatives agree with one at a time in float64."""
    norm, definition = CASES[name]
    x = np.random.default_rng(1).normal(size=(3, 6, 8))
    of = function(norm, x.shape[1:])
    assert jax.eval_shape(of, x[0].astype(np.float16)).dtype == np.float16
    found = jax.jit(jax.vmap(of))(x)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.stack([*map(jax.jit(definition), x)]), rtol=1e-12, atol=1e-12)

    def twice(f):
        return jax.grad(lambda v: (jax.grad(lambda u: (f(u) ** 3).sum())(v) ** 2).sum())

    # Compiled, l-infinity's definition has NaN there.
    np.testing.assert_allclose(jax.jit(twice(of))(x[0]), twice(definition)(x[0]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [name for name, (norm, _) in CASES.items() if norm.apply is not None])
def test_masked_positions_have_no_influence(name):
    """Each norm over the valid positions only: those of a batch, or those of an example."""
    norm, _ = CASES[name]
    x, other = draw((4, 6, 8))
    mask = np.arange(6)[:, None] < 4
    of = jax.jit(function(norm, x.shape, mask=mask))
    found = of(x)
    np.testing.assert_allclose(found[:, :4], jax.jit(function(norm, x.shape))(x[:, :4]), rtol=1e-5, atol=1e-5)
    changed = np.where(mask, x, np.nan)
    np.testing.assert_array_equal(of(changed)[:, 4:], 0)
    np.testing.assert_array_equal(of(changed)[:, :4], found[:, :4])
    slope = jax.jit(jax.grad(lambda x: (of(x) * other)[:, :4].sum()))(x)
    np.testing.assert_array_equal(slope[:, 4:], 0)


@pytest.mark.parametrize("name", ["batch", "l1", "linf"])
def test_running_statistics_are_used_in_evaluation(name):
    norm = norms.get(name, momentum=0.0, epsilon=0.0)
    x, _ = draw((9, 8))
    params, stats = norm.init((8, 8))
    y, moved = norm.apply(params, stats, x, train=True)
    evaluated, same = norm.apply(params, moved, x, train=False)
    np.testing.assert_allclose(evaluated, y, rtol=1e-5, atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), same, moved))
    half = norms.get(name, momentum=0.5).apply(params, stats, x, train=True)[1]
    for old, new, between in zip(*map(jax.tree.leaves, (stats, moved, half)), strict=True):
        if np.ndim(old):
            np.testing.assert_allclose(between, (old + new) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["batch", "l1", "linf"])
def test_a_batch_of_one_gives_the_bias_and_no_gradient(name):
    norm = norms.get(name)
    params, stats = norm.init((8, 8))
    y, _ = norm.apply(params, stats, jnp.ones((1, 8)), train=True)
    np.testing.assert_array_equal(y, 0)
    slope = jax.grad(lambda x: norm.apply(params, stats, x, train=True)[0].sum())(jnp.ones((1, 8)))
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("name", ["layer", "rms", "group", "l1", "linf", "weight", "weight_standardized"])
def test_what_is_constant_gives_zero_and_no_nan(name):
    """Where epsilon is 0 as well: there is nothing to be scaled."""
    options = {} if name == "weight" else {"epsilon": 0.0}
    of = function(norms.get(name, **options), (4, 16))
    for x in (jnp.zeros((4, 16)),):
        np.testing.assert_array_equal(of(x), 0)
        assert np.isfinite(jax.grad(lambda x: of(x).sum())(x)).all()


@pytest.mark.parametrize("name", ["l1", "linf", "rms", "batch"])
def test_the_gradient_at_zero_is_that_of_epsilon(name):
    """Where x is far below epsilon: 1 / epsilon of the projected cotangent, 1 / sqrt(epsilon) for BN and RMSNorm."""
    _, cotangent = draw((6, 8))
    of = function(norms.get(name, epsilon=1e-4), (6, 8))
    _, slope = pulled(of, np.zeros((6, 8), np.float32), 1e-6 * cotangent)
    centred = cotangent - cotangent.mean(0) if name != "rms" else cotangent
    np.testing.assert_allclose(slope, 1e-6 * centred * (1e4 if name[0] == "l" else 1e2), rtol=1e-4, atol=1e-7)


def test_masked_batches_without_a_spread_leave_the_statistics():
    norm, x = norms.lp(1, momentum=0.5), draw((6, 8))[0]
    params, stats = norm.init((8, 8))
    _, none = norm.apply(params, stats, x, train=True, mask=np.zeros((6, 1), bool))
    jax.tree.map(np.testing.assert_array_equal, none, stats)
    _, one = norm.apply(params, stats, x, train=True, mask=np.arange(6)[:, None] == 2)
    np.testing.assert_array_equal(one["spread"], 1)
    np.testing.assert_allclose(one["mean"], x[2] / 2, rtol=1e-6)


def test_floor_of_weight_standardization():
    """Far below it a unit's length is its own over sqrt(epsilon), times the gain; far above the gain."""
    kernel = draw((6, 8))[0]
    centred = kernel - kernel.mean(0)
    of = jax.jit(function(norms.weight_standardized(gain=1.5, epsilon=1e-4), (6, 8)))
    np.testing.assert_allclose(of(1e-6 * kernel), 1.5e-4 * centred, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(jnp.linalg.norm(of(kernel), axis=0), 1.5, rtol=1e-5)


def test_bfloat16_is_rounded_once():
    """The error of rounding the result: at most 2^-9 of it, and twice that where x itself was rounded."""
    x = jnp.asarray(draw((6, 64))[0], jnp.bfloat16)
    params = {"scale": jnp.full(64, 1.3), "bias": jnp.full(64, 0.7)}
    for norm in (norms.layer(), norms.group(group_size=8), norms.rms(use_bias=True)):
        exact = norm.apply(params, {}, x.astype(jnp.float32), train=True)[0]
        found = norm.apply(params, {}, x, train=True)[0]
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_config_is_what_json_holds():
    for name in norms.NORMS:
        options = {} if name == "weight" else {"epsilon": np.float32(1e-3)}
        assert json.loads(json.dumps(norms.get(name, **options).config))["norm"] == name
    assert json.loads(json.dumps(bnjax.mlp((8, 8), norm="rms", epsilon=jnp.array([0.5, 0.25])).config))
    assert repr(norms.rms()) == "Norm(norm='rms', epsilon=1e-05)"


def test_a_scale_and_a_bias_are_applied():
    x, _ = draw((6, 8))
    for name, (norm, _) in CASES.items():
        params, stats = norm.init((6, 8))
        plain = norm.kernel(params, x) if norm.kernel else norm.apply(params, stats, x, train=True)[0]
        params = params._asdict() if hasattr(params, "_asdict") else params
        moved = {"scale": params["scale"] * 3} | ({"bias": params["bias"] + 1} if "bias" in params else {})
        moved = bnjax.BatchNormParams(**moved) if name == "batch" else moved
        found = norm.kernel(moved, x) if norm.kernel else norm.apply(moved, stats, x, train=True)[0]
        np.testing.assert_allclose(found, 3 * plain + ("bias" in params), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "module", "norm"),
    [
        ("dense", nn.LayerNorm(epsilon=1e-5), norms.layer()),
        ("images", nn.LayerNorm(epsilon=1e-5, reduction_axes=(1, 2, 3)), norms.layer()),
        ("images", nn.LayerNorm(epsilon=1e-5), norms.layer(per_position=True)),
        ("dense", nn.GroupNorm(num_groups=2, epsilon=1e-5), norms.group(num_groups=2)),
        ("images", nn.GroupNorm(num_groups=None, group_size=4, epsilon=1e-5), norms.group(group_size=4)),
        ("dense", nn.RMSNorm(epsilon=1e-5), norms.rms()),
    ],
)
def test_flax(name, module, norm):
    x, cotangent = draw(SHAPES[name])

    def theirs(x):
        return module.apply(module.init(jax.random.key(0), x), x)

    for ours, right in zip(*(pulled(f, x, cotangent) for f in (function(norm, x.shape), theirs)), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "norm"),
    [
        ("layer", norms.layer()),
        ("layer_images", norms.layer()),
        ("group", norms.group(num_groups=2)),
        ("group_images", norms.group(num_groups=4)),
        ("rms", norms.rms()),
        ("instance_images", norms.group(group_size=1)),
    ],
)
def test_torch(x64, case, norm):
    x, cotangent, *right = (GOLDEN[f"{case}/{what}"] for what in ("x", "cotangent", "y", "dx"))
    for ours, theirs in zip(pulled(function(norm, x.shape), x, cotangent), right, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_torch_weight_norm(x64):
    """PyTorch's g is set to 1, where ours starts."""
    kernel, x, w, slope = (GOLDEN[f"weight/{what}"] for what in ("kernel", "x", "w", "dkernel"))
    of = function(norms.weight(), kernel.shape)
    np.testing.assert_allclose(of(kernel), w, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(lambda v: ((x @ of(v)) ** 2).sum())(kernel), slope, rtol=1e-10, atol=1e-10)


def test_growth_is_the_theory_of_that_norm():
    """With the options of the norm; l1's output is 1 / sqrt(2 / pi) times a Gaussian's, which sigmoid sees."""
    growth = mean_field.gradient_growth
    assert norms.batch().growth("relu", 64, 32) == growth("relu", 32)
    assert norms.layer().growth("tanh", None, 32) == growth("tanh", norm="layer")
    assert norms.group(group_size=8).growth("relu", None, 32) == growth("relu", norm="group", num_features=8)
    assert norms.rms().growth("gelu", 64) == growth("gelu", norm="rms", num_features=64)
    assert norms.weight().growth("relu") == pytest.approx(0.5)
    assert norms.weight(data_dependent=True).growth("relu") == pytest.approx(math.pi / (math.pi - 1))
    assert norms.weight_standardized().growth("relu") == pytest.approx(math.pi / (math.pi - 1))
    assert norms.none().growth("tanh") == growth("tanh", norm="none")
    assert norms.group(num_groups=4).growth("relu") is None
    assert norms.lp(2).growth("relu", None, 16) == pytest.approx(growth("relu", 16), rel=1e-6)
    l1 = growth("sigmoid", 16, norm="l1", scale=math.sqrt(math.pi / 2))
    assert norms.lp(1).growth("sigmoid", None, 16) == pytest.approx(l1)
    assert growth("relu", norm=norms.group(group_size=8)) == growth("relu", norm="group", num_features=8)


def test_gain_of_weight_standardization():
    assert gain_of("relu") == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=1e-12)
    assert gain_of("linear") == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: norms.get("layr"), r"unknown norm 'layr' \(did you mean 'layer'\?\); allowed: batch, none, layer"),
        (lambda: norms.get("layer", momentum=0.9), r"norm 'layer' takes epsilon, per_position; got \['momentum'\]"),
        (lambda: norms.get("l1", p=2), r"norm 'l1' takes gain, momentum, epsilon; got \['p'\]"),
        (lambda: norms.get(norms.rms(), epsilon=0.1), "epsilon must be given to the norm itself, .*rms"),
        (lambda: norms.get(norms.rms()._replace(kernel=lambda p, k: k)), "has both functions"),
        (lambda: norms.group(group_size=4, num_groups=2), "at most one of group_size and num_groups: got 4 and 2"),
        (lambda: norms.group(num_groups=0), "num_groups must be a positive integer, got 0"),
        (lambda: norms.group(group_size=3).init((5, 8)), "group_size=3 does not divide the 8 features"),
        (lambda: norms.group(num_groups=16).init((5, 8)), "num_groups=16 does not divide the 8 features"),
        (lambda: norms.layer(epsilon=-1.0), "epsilon must be >= 0"),
        (lambda: norms.lp(3), "p must be 1, 2 or infinity, got 3"),
        (lambda: norms.lp(1, gain=0.0), "gain must be above 0"),
        (lambda: norms.lp(1, momentum=1.5), "momentum .* got 1.5"),
        (lambda: norms.none(momentum=5.0), r"momentum .* must be None or in \[0, 1\], got 5.0"),
        (lambda: norms.get(norms.rms()._replace(prepare=lambda p, s, x: (p, s))), "prepare is for norms of kernels"),
        (lambda: norms.weight_standardized(gain=-1.0), "gain must be above 0"),
        (lambda: norms.weight_standardized(gain="rlu"), "unknown activation 'rlu'"),
        (lambda: function(norms.layer(), (4, 1))(jnp.ones((4, 1))), "a single entry to standardize per example"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
