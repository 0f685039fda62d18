"""The rows of the table: what batch normalization should do, each a function from an implementation to an error.

Expected values come from `reference`, in numpy. An error is the norm of a difference, relative to the norm of what
is expected. Where a row is a convention of ours and no mathematical fact it is marked as `convention`, and another
finite answer is no failure. What a library documents otherwise (`Implementation.debias`, `.unbiased`) is expected of
it.
"""

import contextlib
import functools
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bn_conformance import layers, reference
from experiments.bn_conformance.layers import DEVICES, Layer, NotOffered, Options

SEMANTICS, NUMERICS, EDGES, ONNX = "Semantics", "Numerics", "Edge cases", "ONNX backend node cases"
ROUNDING = 1e-5  # some tens of roundings of float32
GRADIENT = 1e-4  # of gradients in NUMERICS
EXACT = 0.0
BOTH = "output gradient"  # parts of a training step
PARTS = f"{BOTH} statistics"  # the last are "mean" and "variance"


class Wrong(Exception):
    """A result that no number describes."""


class Case(NamedTuple):
    """One row."""

    group: str
    name: str
    measure: Callable[[str], float]  # from a name in `layers.ALL` to an error; NaN is a failure
    tolerance: float = ROUNDING
    convention: bool = False
    x64: bool = False


class Result(NamedTuple):
    """One cell."""

    status: str  # "pass", "fail", "other" (a convention of its own), "not offered"
    text: str  # the error seen


def run(case: Case, name: str) -> Result:
    """Measures one implementation on one row."""
    try:
        with jax.enable_x64(case.x64):
            found = case.measure(name)
    except NotOffered:
        return Result("not offered", "-")
    except Wrong as error:
        return Result("fail", str(error))
    except Exception as error:  # whatever a library raises is what is seen
        return Result("fail", f"raises {type(error).__name__}")
    if found <= case.tolerance:
        return Result("pass", number(found))
    return Result("other" if case.convention and math.isfinite(found) else "fail", number(found))


def number(value: float | int) -> str:
    """An error to one digit, `3e-7`; `0`, `NaN`, `Inf`; a count as it is."""
    if value == 0 or isinstance(value, int) or not math.isfinite(value):
        return f"{value:.0f}".replace("nan", "NaN").replace("inf", "Inf")
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


# Inputs.


def draw(shape, mean=0.0, std=1.0, seed=0) -> np.ndarray:
    """Normal float32 numbers."""
    return (mean + std * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def parameters(shape) -> tuple[np.ndarray, np.ndarray]:
    """A scale and a bias that are neither 1 nor 0."""
    return tuple(np.linspace(*ends, math.prod(shape), dtype=np.float32).reshape(shape) for ends in ((0.5, 2), (-1, 1)))


def cotangent(x, mask=None):
    """A random one; 0 where masked."""
    return np.where(True if mask is None else mask, draw(x.shape, seed=1), np.float32(0))


def mask_of(n, *invalid) -> np.ndarray:
    """[n, 1], False at the given places."""
    return ~np.isin(np.arange(n), invalid)[:, None]


X, ONE = draw((64, 3), mean=2.0), draw((1, 3))
SOME_MASKED = mask_of(64, 2, 4, 7, 60)
ON_DEVICES = draw((4, 16, 3), mean=np.arange(4).reshape(4, 1, 1))
BATCHES = draw((5, 16, 3), mean=np.arange(5).reshape(5, 1, 1), std=2.0)
MANY_BATCHES = draw((10_000, 8, 2), mean=2.0)
PLAIN = {"use_scale": False, "use_bias": False}
STORED = {"before": (3, 4)}  # the running mean and variance of each feature


# Measurements.


def make(name, x, **options) -> Layer:
    """A layer for inputs like x."""
    return layers.layer(name, Options(x.shape, x.dtype.name, **options), jax.config.jax_enable_x64)


def error(actual, expected) -> float:
    """The norm of the difference, relative to that of `expected` where that is not 0."""
    actual, expected = (np.asarray(a).astype(np.longdouble) for a in (actual, expected))
    if actual.size != expected.size:
        raise Wrong(f"shape {actual.shape}")
    difference = np.linalg.norm((actual.reshape(expected.shape) - expected).ravel())
    return float(difference / (np.linalg.norm(expected.ravel()) or 1))


def worst(actual, expected, compare=error) -> float:
    """The largest error of several arrays; NaN if one is."""
    return float(np.max([compare(a, e) for a, e in zip(actual, expected, strict=True)]))


def worst_feature(actual, expected) -> float:
    """The largest of the features' own errors, features last."""
    return worst(actual.T, expected.T)


class Step(NamedTuple):
    """The results of a training step; of all devices, samples by features [N, C]."""

    y: np.ndarray
    dx: np.ndarray
    dparams: tuple  # to scale and bias; None of what is not used
    moments: list[tuple]  # the running mean and variance, on each device


def step(name, x, *, mask=None, g=None, before=(0, 1), count=10**6, on_devices=False, **options):
    """A training step by the implementation of that name, as it should be, and which samples are valid [N].

    The running mean and variance `before` it are of `count` batches. The cotangent g is a random one unless given.
    `on_devices`: each of x [D, ...] is on a device; what is expected is the result on the whole batch, on one.
    """
    options = {"epsilon": 1e-5, "axis": -1, "momentum": 0.5} | options
    layer = make(name, x[0] if on_devices else x, axis_name=DEVICES if on_devices else None, **options)
    whole = Options(x.shape, axis=options["axis"])
    scale, bias = parameters(whole.features)
    params = scale if options.get("use_scale", True) else None, bias if options.get("use_bias", True) else None
    stats = layer.stored(*(np.full_like(scale, value) for value in before), count)
    g = cotangent(x, mask) if g is None else g
    y, stats, dx, dparams = (layer.devices if on_devices else layer.train)(params, stats, x, mask, g)
    states = [jax.tree.map(lambda leaf, d=d: leaf[d], stats) for d in range(len(x))] if on_devices else [stats]

    def flat(array):
        return np.moveaxis(np.asarray(array), whole.axes, range(-len(whole.axes), 0)).reshape(-1, scale.size)

    valid = flat(np.broadcast_to(True if mask is None else mask, x.shape))[:, 0]
    used = (default if p is None else p.ravel() for p, default in zip(params, (1, 0), strict=True))
    expected = reference.train(flat(x), *used, flat(g), valid, options["epsilon"])
    return Step(flat(y), flat(dx), dparams, [layer.moments(state) for state in states]), expected, valid


def errors(name, x, parts=BOTH, *, compare=error, before=(0, 1), count=10**6, momentum=0.5, **options) -> float:
    """The largest error of these parts of a training step; of the output, over valid entries."""
    found, expected, valid = step(name, x, before=before, count=count, momentum=momentum, **options)
    measured = []
    if "output" in parts:
        measured += [compare(found.y[valid], expected.y)]
    if "gradient" in parts:
        dparams = zip(found.dparams, expected.dparams, strict=True)
        measured += [compare(found.dx, expected.dx), *(error(a, e) for a, e in dparams if a is not None)]
    after = averages(name, [expected.statistics], before, count, momentum)
    for i, part in enumerate(("mean", "variance")):
        if part in parts or "statistics" in parts:
            measured += [error(moments[i], after[i]) for moments in found.moments]
    return float(np.max(measured))


def averages(name, batches, before, count, momentum, unbiased=None):
    """The running mean and variance after these batches, by the implementation's own convention."""
    own = layers.ALL[name]
    convention = {"debias": own.debias, "unbiased": own.unbiased if unbiased is None else unbiased}
    return reference.averages(batches, before, count, momentum=momentum, **convention)


def running(name, xs, *, momentum=0.9, unbiased=None) -> float:
    """The larger error of the running mean and variance after the batches xs [T, N, C]."""
    layer = make(name, xs[0], momentum=momentum, unbiased=unbiased)
    stats = layer.steps(parameters(xs.shape[2:]), layer.start(), xs)
    exact = xs.astype(np.float64)  # 1e-16: enough to judge float32 by
    batches = zip(exact.mean(1), exact.var(1), itertools.repeat(xs.shape[1]))
    return worst(layer.moments(stats), averages(name, batches, (0, 1), 0, momentum, unbiased))


def evaluation(name, x, moments=None, which=0) -> float:
    """Error of the output (0) or the derivative (1) with this running mean and variance, [C] each; None: at the start.

    The derivative is scale / sqrt(var + epsilon).
    """
    layer = make(name, x, momentum=0.5)
    scale, bias = parameters(x.shape[-1:])
    mean, var = (np.zeros(3), np.ones(3)) if moments is None else map(np.float32, moments)
    stats = layer.start() if moments is None else layer.stored(mean, var, 10**6)
    inv_sigma = 1 / np.sqrt(var.astype(np.longdouble) + 1e-5)
    expected = (x.astype(np.longdouble) - mean) * inv_sigma * scale + bias, cotangent(x) * scale * inv_sigma
    return error(layer.evaluate((scale, bias), stats, x, cotangent(x))[which], expected[which])


def broadcast_masks(name, x) -> float:
    """Masks of three shapes over images [4, 5, 6, C]."""
    rng = np.random.default_rng(3)
    shapes = ((4, 1, 1, 1), (1, 5, 1, 1), (4, 5, 6, 1))
    masks = [rng.permutation(math.prod(s)).reshape(s) % 3 > 0 for s in shapes]
    return float(np.max([errors(name, x, "output", mask=mask) for mask in masks]))


def state_types(name, dtype) -> float:
    """0 if five steps leave every type and the structure of the statistics as they were, float32 at least."""
    xs = BATCHES.astype(dtype)
    layer = make(name, xs[0])
    states = layer.start(), layer.steps(parameters((3,)), layer.start(), xs)
    types = [jax.tree.map(lambda leaf: str(leaf.dtype).removeprefix("torch."), state) for state in states]
    low = {"float16", "bfloat16"} & {*jax.tree.leaves(types)}
    if low or types[0] != types[1]:
        raise Wrong(low.pop() if low else "types change")
    return 0.0


def output_type(name, dtype) -> float:
    """0 if output and gradient have the input's type, in training and in evaluation."""
    x = draw((64, 3)).astype(dtype)
    found, layer = step(name, x)[0], make(name, x, momentum=0.5)
    evaluated = layer.evaluate(parameters((3,)), layer.start(), x, cotangent(x))
    for array in (found.y, found.dx, *evaluated):
        if array.dtype != x.dtype:
            raise Wrong(str(array.dtype))
    return 0.0


def constant_feature(name, values) -> float:
    """The largest distance from the bias, of three features with these values."""
    inputs = (np.tile(np.float32(values), (n, 1)) for n in (64, 512))
    return float(np.max([np.abs(step(name, x)[0].y - parameters((3,))[1]).max() for x in inputs]))


def powers_of_two(name) -> float | int:
    """For how many k from -60 to 60 the output of BN(2^k W u) is not bitwise that of BN(W u), epsilon being 0."""
    x = draw((64, 16), seed=2) @ draw((16, 3))
    outputs = [step(name, np.ldexp(x, k), epsilon=0.0)[0].y for k in range(-60, 61)]
    return sum(not np.array_equal(y, outputs[60]) for y in outputs)


def no_information(name, x, **options) -> float:
    """Distance from the bias, and from a zero gradient, of constant features or nothing valid."""
    found = step(name, x, g=cotangent(x), **options)[0]
    expected = np.tile(parameters((3,))[1], (len(x), 1)), np.zeros(x.shape), np.zeros(3)
    return worst((found.y, found.dx, found.dparams[0]), expected)


def confined(name, value) -> float:
    """The largest change of features 0 and 2, derivatives and statistics too, by `value` somewhere in feature 1."""
    clean, bad = draw((64, 3)), draw((64, 3))
    bad[3, 1] = value
    with np.errstate(invalid="ignore"):
        found = [[np.asarray(a)[..., ::2] for a in jax.tree.leaves(step(name, x)[0])] for x in (bad, clean)]
    return worst(*found)


def onnx_cases() -> dict:
    """{name: test case} of the operator BatchNormalization; none where the package is not installed."""
    package = "onnx.backend.test.case.node"
    for module in ("batch_normalization", "batchnorm"):  # the latter in older versions
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{package}.{module}")
    found = getattr(sys.modules.get(package), "_NodeTestCases", [])
    found = [case for case in found if "BatchNormalization" in (node.op_type for node in case.model.graph.node)]
    return {case.name.removeprefix("test_"): case for case in found}


def onnx_node(name, case) -> float:
    """The largest error of a node case's outputs; the running variance by the implementation's own convention."""
    (node,) = case.model.graph.node
    attributes = {a.name: a.i if a.name == "training_mode" else a.f for a in node.attribute}
    ((x, scale, bias, mean, var), outputs), *_ = case.data_sets
    momentum = attributes.get("momentum", 0.9)
    layer = make(name, x, axis=1, epsilon=attributes.get("epsilon", 1e-5), momentum=momentum)
    stats = layer.stored(mean, var, 10**6)
    if not attributes.get("training_mode", 0):
        return error(layer.evaluate((scale, bias), stats, x, cotangent(x))[0], *outputs)
    y, stats, *_ = layer.train((scale, bias), stats, x, None, cotangent(x))
    expected_y, expected_mean, expected_var = outputs
    if layers.ALL[name].unbiased:
        n = x.size / x.shape[1]
        expected_var = momentum * var + (expected_var - momentum * var) * n / (n - 1)
    return worst((y, *layer.moments(stats)), (expected_y, expected_mean, expected_var))


# The table.


def row(group, name, measure=errors, *, tolerance=ROUNDING, convention=False, x64=False, **given) -> Case:
    """A row, with what is given to its measure."""
    return Case(group, name, functools.partial(measure, **given), tolerance, convention, x64)


def each(group, name, parts=PARTS, after="", **given) -> Iterator[Case]:
    """A row for each of these parts of a training step; in its name what comes `after` it."""
    for part in parts.split():
        tolerance = GRADIENT if group == NUMERICS and part == "gradient" else ROUNDING
        yield row(group, f"{name}: {part}{after}", tolerance=tolerance, parts=part, **given)


def rows() -> list[Case]:
    """All of it; those of ONNX only where its package is installed."""
    return [
        *semantics(functools.partial(row, SEMANTICS), functools.partial(each, SEMANTICS)),
        *numerics(functools.partial(row, NUMERICS), functools.partial(each, NUMERICS)),
        *edges(functools.partial(row, EDGES), functools.partial(each, EDGES)),
        *(row(ONNX, name, onnx_node, case=case) for name, case in onnx_cases().items()),
    ]


def semantics(row, each) -> Iterator[Case]:
    """The meaning of each option."""
    images, devices = draw((4, 5, 6, 3), mean=2.0), {"x": ON_DEVICES, "on_devices": True}
    unequal = np.arange(16)[None, :, None] < np.array([16, 9, 3, 1])[:, None, None]
    yield row("axis: [N, C]", x=X)
    yield row("axis: images [N, H, W, C]", x=images)
    yield row("axis: images [N, C, H, W]", x=images, axis=1)
    yield row("axis: several feature axes", x=images, axis=(1, 3))
    yield row("epsilon 0.3, inside the root", x=X, epsilon=0.3)
    yield row("without scale", x=X, use_scale=False)
    yield row("without bias", x=X, use_bias=False)
    yield row("without scale and bias", x=X, **PLAIN)
    yield row("momentum 0.9: running statistics after 5 batches", running, xs=BATCHES)
    yield row("momentum 0.99: running statistics after 1 batch", running, xs=BATCHES[:1], momentum=0.99)
    yield row("momentum None: average over 5 batches", running, xs=BATCHES, momentum=None)
    yield row("momentum None: average over 10,000 batches", running, xs=MANY_BATCHES, momentum=None)
    yield row("biased running variance, by option or default", running, xs=BATCHES, unbiased=False)
    yield row("unbiased running variance, by option or default", running, xs=BATCHES, unbiased=True)
    yield row("evaluation by the running statistics", evaluation, x=X, moments=([3, 2, 1], [4, 1, 0.1]))
    yield from each("mask", x=X, mask=SOME_MASKED)
    yield row("mask [N, 1, 1, 1], [1, H, 1, 1], [N, H, W, 1] on images", broadcast_masks, x=images)
    yield from each("NaN in masked entries", x=np.where(SOME_MASKED, X, np.float32(np.nan)), mask=SOME_MASKED)
    yield from each("axis_name", **devices)
    yield from each("axis_name over single examples", x=X, on_devices=True)
    yield from each("axis_name, unequal numbers of valid examples", mask=unequal, **devices)
    for dtype, x64 in (("float32", False), ("bfloat16", False), ("float32", True), ("float64", True)):
        name = f"types of the state after steps in lax.scan: {dtype}, x64 {'on' if x64 else 'off'}"
        yield row(name, state_types, dtype=dtype, x64=x64)


def numerics(row, each) -> Iterator[Case]:
    """Errors far from zero and from one, and in other types."""
    for part, n, k in itertools.product(PARTS.split(), (512, 65_536), (2, 4, 6)):
        yield from each(f"mean/std 1e{k}, N = {n:,}", part, x=draw((n, 3), mean=10.0**k))
    for k in (4, 6):
        outlier = draw((65_536, 3), mean=10.0**k)
        outlier[0] += 1000
        yield from each(f"mean/std 1e{k}, first sample 1,000 std away", BOTH, x=outlier)
    for k in (4, 6):
        far = {"x": draw((512, 3), mean=10.0**k), "mask": mask_of(512, 0)}
        yield from each(f"mean/std 1e{k}, first sample masked", BOTH, **far)
    for k in (4, 6):
        yield from each(f"axis_name, mean/std 1e{k}", x=draw((4, 16, 3), mean=10.0**k), on_devices=True)
    for text, values in (("0.1, 7, 1,000", [0.1, 7, 1e3]), ("1e-30, -3e7, 1e30", [1e-30, -3e7, 1e30])):
        name = f"constant features {text}: distance from the bias"
        yield row(name, constant_feature, values=values, tolerance=EXACT)
    half, bhalf = draw((64, 3), std=300.0).astype(np.float16), draw((64, 3), mean=100.0).astype(jnp.bfloat16)
    for name, x, tolerance in (("float16, std 300", half, 2**-10), ("bfloat16, mean 100", bhalf, 2**-7)):
        moments = x.astype(np.float64).mean(0), x.astype(np.float64).var(0)
        yield row(f"{name}: output", x=x, parts="output", tolerance=tolerance)
        yield row(f"{name}: evaluation", evaluation, x=x, moments=moments, tolerance=tolerance)
        yield row(f"{name}: statistics", x=x, parts="statistics")
        yield row(f"{x.dtype}: type of output and gradient", output_type, dtype=x.dtype.name, tolerance=EXACT)
    f64 = draw((64, 3), mean=1e4).astype(np.float64)
    name = "float64, x64 on: type of output and gradient"
    yield row(name, output_type, dtype="float64", tolerance=EXACT, x64=True)
    yield row("float64, x64 on, mean/std 1e4: output", x=f64, parts="output", tolerance=1e-10, x64=True)
    yield from each("inputs near 1e30", BOTH, x=np.float32(1e30) * X)
    yield from each("inputs near 1e-30", BOTH, after=", without scale and bias", x=np.float32(1e-30) * X, **PLAIN)
    decades = (draw((64, 61)) * 10.0 ** np.arange(-30, 31)).astype(np.float32)  # a feature for each
    name = "1e-30 to 1e30 at epsilon 0, the worst feature"
    yield from each(name, BOTH, x=decades, epsilon=0.0, compare=worst_feature)
    name, huge = "inputs near 1e30: stored variance saturates", np.float32(1e30) * draw((64, 3))
    yield row(name, x=huge, parts="variance", convention=True)
    name = "W -> 2^k W, k = -60 to 60, epsilon 0: outputs that change, of 121"
    yield row(name, powers_of_two, tolerance=EXACT)


def edges(row, each) -> Iterator[Case]:
    """No variance, no batch, nothing valid, nothing finite, no momentum."""
    nothing, exact = np.zeros((64, 1), bool), {"tolerance": EXACT}
    one_empty = np.arange(16)[None, :, None] < np.array([16, 0, 3, 1])[:, None, None]
    yield row("evaluation before training: mean 0, variance 1", evaluation, x=X, convention=True)
    yield row("batch of one: output is the bias", x=ONE, parts="output", **exact)
    yield row("batch of one: gradient to x is 0", x=ONE, parts="gradient")
    yield row("batch of one: running mean", x=ONE, parts="mean")
    yield row("batch of one: running variance as it was", x=ONE, parts="variance", convention=True)
    name = "empty batch: empty output, running statistics as they were"
    yield row(name, x=ONE[:0], parts="output statistics", **STORED, **exact)
    name = "fully masked: running statistics as they were"
    yield row(name, x=X, mask=nothing, parts="statistics", **STORED, **exact)
    name, nan = "fully masked, NaN: output the bias, no gradient", np.full_like(X, np.nan)
    yield row(name, no_information, x=nan, mask=nothing, convention=True, **exact)
    yield from each("axis_name, one device fully masked", x=ON_DEVICES, mask=one_empty, on_devices=True)
    yield row("NaN in one feature: the others", confined, value=np.nan)
    yield row("Inf in one feature: the others", confined, value=np.inf)
    yield row("momentum 0: the last batch's statistics", running, xs=BATCHES, momentum=0.0)
    small = (1e-4 * BATCHES).astype(np.float32)
    yield row("momentum 0, std 1e-4: the last batch's statistics", running, xs=small, momentum=0.0)
    yield row("momentum None, std 1e-4: the first batch's statistics", running, xs=small[:1], momentum=None)
    name = "momentum 1: running statistics as they were"
    yield row(name, x=X, momentum=1.0, parts="statistics", **STORED, **exact)
    yield row("momentum 0.99: 10,000 batches", running, xs=MANY_BATCHES, momentum=0.99)
    for momentum in (0.5, None):
        last = {"x": draw((64, 3)), "parts": "statistics", "count": 2**31 - 1}  # the most that an int32 counts
        yield row(f"momentum {momentum}: the count at batch 2^31 does no harm", momentum=momentum, **last, **STORED)
    name = "evaluation: gradient scale / sqrt(var + epsilon)"
    yield row(name, evaluation, x=draw((64, 3)), moments=([3] * 3, [4] * 3), which=1)
    name, constant = "zero variance, epsilon 0: output the bias, no gradient", np.float32([[0, 0.1, -3e7]] * 64)
    yield row(name, no_information, x=constant, epsilon=0.0, convention=True, **exact)
