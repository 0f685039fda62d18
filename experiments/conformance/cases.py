"""The rows of the table: what batch normalization should do, each a function from an implementation to an error.

Expected values come from `reference`, in numpy. An error is the norm of a difference, relative to the norm of what
is expected. Where a row is a convention of ours and no mathematical fact it is marked as `convention`, and another
finite answer is no failure. What a library documents otherwise (`Implementation.debias`, `.unbiased`) is expected of
it.
"""

import contextlib
import functools
import importlib
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.conformance import layers, reference
from experiments.conformance.layers import DEVICES, Layer, NotOffered, Options

SEMANTICS, NUMERICS, EDGES, ONNX = "Semantics", "Numerics", "Edge cases", "ONNX backend node cases"
ROUNDING = 1e-5  # some tens of roundings of float32
GRADIENT = 1e-4
EXACT = 0.0
MOST_BATCHES = 2**31 - 1  # that an int32 counts


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
    except NotOffered as error:
        return Result("not offered", str(error))
    except Wrong as error:
        return Result("fail", str(error))
    except Exception as error:  # whatever a library raises is what is seen
        return Result("fail", f"raises {type(error).__name__}")
    if found <= case.tolerance:
        return Result("pass", number(found))
    return Result("other" if case.convention and math.isfinite(found) else "fail", number(found))


def number(value: float) -> str:
    """`3e-7`, `0`, `NaN`, `Inf`; a count as it is."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf"
    if value == 0 or isinstance(value, int):
        return str(int(value))
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


# Inputs.


def draw(shape, mean=0.0, std=1.0, seed=0) -> np.ndarray:
    """Normal float32 numbers."""
    return (mean + std * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def parameters(shape) -> tuple[np.ndarray, np.ndarray]:
    """A scale and a bias that are neither 1 nor 0."""
    size = math.prod(shape)
    scale, bias = np.linspace(0.5, 2, size, dtype=np.float32), np.linspace(-1, 1, size, dtype=np.float32)
    return scale.reshape(shape), bias.reshape(shape)


def far_from_zero(ratio, batch=512):
    """Batches of mean/std = ratio."""
    return draw((batch, 3), mean=ratio)


def outlier_first(ratio):
    """The same, but for a first sample far from the others."""
    x = far_from_zero(ratio, 65_536)
    x[0] += 1000
    return x


def in_each_decade():
    """A feature for each power of ten from 1e-30 to 1e30."""
    return (draw((64, 61)) * 10.0 ** np.arange(-30, 31)).astype(np.float32)


def mask_of(n, *invalid) -> np.ndarray:
    """[n, 1], False at the given places."""
    mask = np.ones((n, 1), bool)
    mask[list(invalid)] = False
    return mask


FIRST_MASKED = mask_of(512, 0)
SOME_MASKED = mask_of(64, 2, 4, 7, 60)
STORED = np.full(3, 3, np.float32), np.full(3, 4, np.float32)  # a running mean and variance
ONE = draw((1, 3))
NOTHING_VALID = np.zeros((64, 1), bool)
BATCHES = draw((5, 16, 3), mean=np.arange(5).reshape(5, 1, 1), std=2.0)
SMALL_BATCHES = (1e-4 * BATCHES).astype(np.float32)
MANY_BATCHES = draw((10_000, 8, 2), mean=2.0)


# What is measured.


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


def worst(*errors) -> float:
    """The largest; NaN if one is."""
    return float(np.max(errors))


def worst_feature(actual, expected) -> float:
    """The largest of the features' own errors, features last."""
    return worst(*(error(a, e) for a, e in zip(np.asarray(actual).T, expected.T, strict=True)))


def filled(x, mask, value):
    """The array x with `value` wherever it is masked."""
    return np.where(mask, x, np.float32(value))


def train(name, x, *, mask=None, epsilon=1e-5, axis=-1, momentum=0.5, **options):
    """A training step from a running mean 0 and variance 1: (y, moments, dx, dscale, dbias), and as they should be."""
    layer = make(name, x, epsilon=epsilon, axis=axis, momentum=momentum, **options)
    scale, bias = parameters(Options(x.shape, axis=axis).features)
    use_scale, use_bias = options.get("use_scale", True), options.get("use_bias", True)
    g = cotangent(x, mask)
    params = (scale if use_scale else None, bias if use_bias else None)
    y, stats, dx, dparams = layer.train(
        params, layer.stored(np.zeros_like(scale), np.ones_like(scale)), x, mask, g
    )
    scale, bias = (scale if use_scale else np.ones_like(scale)), (bias if use_bias else np.zeros_like(bias))
    expected = reference.train(x, scale, bias, epsilon=epsilon, axis=axis, mask=mask, cotangent=g)
    return (y, layer.moments(stats), dx, *dparams), expected


def cotangent(x, mask=None):
    """A random one; 0 where masked."""
    g = draw(x.shape, seed=1)
    return g if mask is None else filled(g, mask, 0)


def output(name, x, *, mask=None, compare=error, **options) -> float:
    """Error of a training step's output, over valid entries."""
    (y, *_), expected = train(name, x, mask=mask, **options)
    if mask is None:
        return compare(y, expected.y)
    return compare(np.where(mask, y, 0), np.where(mask, expected.y, 0))


def gradient(name, x, *, compare=error, **options) -> float:
    """The largest error of a training step's derivatives, to x, scale and bias, for a random cotangent."""
    (_, _, dx, dscale, dbias), expected = train(name, x, **options)
    errors = [compare(dx, expected.dx)]
    errors += [error(dscale, expected.dscale)] if dscale is not None else []
    errors += [error(dbias, expected.dbias)] if dbias is not None else []
    return worst(*errors)


def both(name, x, **options) -> float:
    """The larger of the two."""
    return worst(output(name, x, **options), gradient(name, x, **options))


def statistics(name, x, **options) -> float:
    """The larger error of the running mean and variance after one step at momentum 0.5."""
    (_, moments, *_), expected = train(name, x, **options)
    return worst(*map(error, moments, after_one_step(name, expected)))


def after_one_step(name, batch: reference.Reference):
    """The running statistics after one step at momentum 0.5 from mean 0 and variance 1, by its own convention."""
    unbias = batch.count / (batch.count - 1) if layers.ALL[name].unbiased else 1
    return batch.mean / 2, (1 + unbias * batch.var) / 2


def running(name, xs, *, momentum=0.9, unbiased=None) -> float:
    """The larger error of the running mean and variance after the batches xs [T, N, C]."""
    layer = make(name, xs[0], momentum=momentum, unbiased=unbiased)
    stats = layer.steps(parameters(xs.shape[2:]), layer.start(), xs)
    implementation = layers.ALL[name]
    exact = xs.astype(np.float64)  # 1e-16: enough to judge float32 by
    expected = reference.averages(
        exact.mean(1),
        exact.var(1),
        np.full(len(xs), xs.shape[1]),
        momentum=momentum,
        debias=implementation.debias,
        unbiased=implementation.unbiased if unbiased is None else unbiased,
    )
    return worst(*map(error, layer.moments(stats), expected))


def step_from(name, x, before, *, count=10**6, mask=None, momentum=0.5):
    """The output of one training step, and the running mean and variance after it, from those given."""
    layer = make(name, x, momentum=momentum)
    stats = layer.stored(*before, count=count)
    y, stats, *_ = layer.train(parameters(x.shape[-1:]), stats, x, mask, cotangent(x))
    return y, layer.moments(stats)


def unchanged(name, x, **options) -> float:
    """How far a training step moves the running statistics away from 3 and 4."""
    y, moments = step_from(name, x, STORED, **options)
    if y.shape != x.shape:
        raise Wrong(f"shape {y.shape}")
    return worst(*map(error, moments, STORED))


def counter_at_its_end(name, momentum) -> float:
    """Error of the running statistics after one batch more than an int32 counts, from 3 and 4."""
    x = draw((64, 3))
    _, moments = step_from(name, x, STORED, momentum=momentum, count=MOST_BATCHES)
    exact = x.astype(np.longdouble)
    batch = exact.mean(0), exact.var(0) * (64 / 63 if layers.ALL[name].unbiased else 1)
    weight = 1 / MOST_BATCHES if momentum is None else 1 - momentum
    return worst(
        *map(error, moments, (old + weight * (new - old) for old, new in zip(STORED, batch, strict=True)))
    )


def shared(name, xs, part, masks=None) -> float:
    """Error of the "output", "gradient" or "statistics" where each of xs [D, N, C] or [D, C] is on a device.

    What is expected is the result on the whole batch, on one device.
    """
    layer = make(name, xs[0], axis_name=DEVICES, momentum=0.5)
    whole = xs.reshape(-1, xs.shape[-1])
    mask = np.ones_like(whole[:, :1], bool) if masks is None else masks.reshape(-1, 1)
    params, g = parameters(xs.shape[-1:]), cotangent(xs, masks)
    expected = reference.train(whole, *params, mask=mask, cotangent=g.reshape(whole.shape))
    stats = layer.stored(np.zeros_like(params[0]), np.ones_like(params[0]))
    ys, stats, dxs, dparams = layer.devices(params, stats, xs, masks, g)
    if part == "output":
        return error(np.where(mask, np.reshape(ys, whole.shape), 0), np.where(mask, expected.y, 0))
    if part == "gradient":
        return worst(*map(error, (dxs, *dparams), (expected.dx, expected.dscale, expected.dbias)))
    moments = after_one_step(name, expected)
    devices = [layer.moments(jax.tree.map(lambda leaf, d=d: leaf[d], stats)) for d in range(len(xs))]
    return worst(*(error(a, e) for device in devices for a, e in zip(device, moments, strict=True)))


def evaluate(name, x, mean, var):
    """Evaluation with these running statistics, [C] each, or None for the start: (y, dx), and what they should be."""
    layer = make(name, x, momentum=0.5)
    scale, bias = parameters(x.shape[-1:])
    stats = layer.start() if mean is None else layer.stored(np.float32(mean), np.float32(var))
    mean, var = (np.zeros(3), np.ones(3)) if mean is None else (mean, var)
    y, dx = layer.evaluate((scale, bias), stats, x, cotangent(x))
    inv_sigma = 1 / np.sqrt(np.float32(var).astype(np.longdouble) + 1e-5)
    expected = (x.astype(np.longdouble) - np.float32(mean)) * inv_sigma * scale + bias
    return (y, dx), (expected, cotangent(x) * scale * inv_sigma)


def evaluation(name, x, mean=None, var=None) -> float:
    """Error of the output."""
    (y, _), (expected, _) = evaluate(name, x, mean, var)
    return error(y, expected)


def evaluation_of_its_own_batch(name, x) -> float:
    """The same, with the statistics of x itself."""
    exact = x.astype(np.float64)
    return evaluation(name, x, exact.mean(0), exact.var(0))


def evaluation_gradient(name) -> float:
    """Error of the derivative to x, scale / sqrt(var + epsilon)."""
    (_, dx), (_, expected) = evaluate(name, draw((64, 3)), *STORED)
    return error(dx, expected)


def broadcast_masks(name) -> float:
    """Masks of three shapes over images."""
    x = draw((4, 5, 6, 3), mean=2.0)
    rng = np.random.default_rng(3)
    shapes = ((4, 1, 1, 1), (1, 5, 1, 1), (4, 5, 6, 1))
    masks = [rng.permutation(math.prod(s)).reshape(s) % 3 > 0 for s in shapes]
    return worst(*(output(name, x, mask=mask) for mask in masks))


def state_types(name, dtype) -> float:
    """0 if five steps leave every type and the structure of the statistics as they were, float32 at least."""
    xs = BATCHES.astype(dtype)
    layer = make(name, xs[0])
    before = layer.start()
    after = layer.steps(parameters((3,)), before, xs)
    types = [jax.tree.map(lambda leaf: str(leaf.dtype).removeprefix("torch."), s) for s in (before, after)]
    low = {"float16", "bfloat16"} & {*jax.tree.leaves(types)}
    if low:
        raise Wrong(low.pop())
    if types[0] != types[1]:
        raise Wrong("types change")
    return 0.0


def output_type(name, dtype) -> float:
    """0 if output and gradient have the input's type, in training and in evaluation."""
    x = draw((64, 3)).astype(dtype)
    (y, _, dx, *_), _ = train(name, x)
    for array in (y, dx, *evaluate(name, x, None, None)[0]):
        if array.dtype != x.dtype:
            raise Wrong(str(array.dtype))
    return 0.0


def constant_feature(name, values) -> float:
    """The largest distance from the bias, of three features with these values."""
    _, bias = parameters((3,))
    inputs = (np.tile(np.float32(values), (n, 1)) for n in (64, 512))
    return worst(*(np.abs(np.asarray(train(name, x)[0][0]) - bias).max() for x in inputs))


def powers_of_two(name) -> float:
    """For how many k from -60 to 60 the output of BN(2^k W u) is not bitwise that of BN(W u), epsilon being 0."""
    x = draw((64, 16), seed=2) @ draw((16, 3))
    layer = make(name, x, epsilon=0.0, momentum=0.5)
    params, stats, g = parameters((3,)), layer.start(), cotangent(x)
    outputs = [np.asarray(layer.train(params, stats, np.ldexp(x, k), None, g)[0]) for k in range(-60, 61)]
    return sum(not np.array_equal(y, outputs[60]) for y in outputs)


def stored_variance_saturates(name) -> float:
    """The running variance of inputs of 1e30, whose variance is no float32, relative to the largest one."""
    (_, (_, var), *_), _ = train(name, np.float32(1e30) * draw((64, 3)))
    return error(var, np.full(3, np.longdouble(np.finfo(np.float32).max) / 2))


def batch_of_one_statistic(name, which) -> float:
    """Error of the running mean (0) or variance (1) after a batch of one; the variance as it was."""
    (_, moments, *_), _ = train(name, ONE)
    return error(moments[which], (ONE[0] / 2, np.ones(3))[which])


def no_information(name, x, **options) -> float:
    """Distance from the bias, and from a zero gradient, of constant features or nothing valid."""
    layer = make(name, x, epsilon=options.get("epsilon", 1e-5), momentum=0.5)
    params, mask = parameters((3,)), options.get("mask")
    y, _, dx, (dscale, _) = layer.train(params, layer.start(), x, mask, cotangent(x))
    return worst(
        error(y, np.tile(params[1], (len(x), 1))), *(error(d, np.zeros(d.shape)) for d in (dx, dscale))
    )


def confined(name, value) -> float:
    """How far `value` somewhere in feature 1 moves output, derivatives and statistics of features 0 and 2."""
    clean, bad = draw((64, 3)), draw((64, 3))
    bad[3, 1] = value
    with np.errstate(invalid="ignore"):
        actual, expected = (jax.tree.leaves(train(name, x)[0]) for x in (bad, clean))
    pairs = zip(actual, expected, strict=True)
    return worst(*(error(np.asarray(a)[..., ::2], np.asarray(e)[..., ::2]) for a, e in pairs))


def onnx_cases() -> dict:
    """{name: test case} of the operator BatchNormalization; none where the package is not installed."""
    package = "onnx.backend.test.case.node"
    for module in ("batch_normalization", "batchnorm"):  # the latter in older versions
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{package}.{module}")
    node_cases = getattr(sys.modules.get(package), "_NodeTestCases", [])
    return {
        case.name.removeprefix("test_"): case
        for case in node_cases
        if any(node.op_type == "BatchNormalization" for node in case.model.graph.node)
    }


def onnx_node(name, case) -> float:
    """The largest error of a node case's outputs; the running variance by the implementation's own convention."""
    (node,) = case.model.graph.node
    attributes = {a.name: a.i if a.name == "training_mode" else a.f for a in node.attribute}
    ((x, scale, bias, mean, var), outputs), *_ = case.data_sets
    momentum = attributes.get("momentum", 0.9)
    layer = make(name, x, axis=1, epsilon=attributes.get("epsilon", 1e-5), momentum=momentum)
    stats = layer.stored(mean, var)
    if not attributes.get("training_mode", 0):
        return error(layer.evaluate((scale, bias), stats, x, cotangent(x))[0], *outputs)
    y, stats, *_ = layer.train((scale, bias), stats, x, None, cotangent(x))
    expected_y, expected_mean, expected_var = outputs
    if layers.ALL[name].unbiased:
        n = x.size / x.shape[1]
        expected_var = momentum * var + (expected_var - momentum * var) * n / (n - 1)
    return worst(*map(error, (y, *layer.moments(stats)), (expected_y, expected_mean, expected_var)))


# The table.


class Measure(NamedTuple):
    """What is measured of a training step."""

    measure: Callable[..., float]
    tolerance: float


MEASURES = {
    "output": Measure(output, ROUNDING),
    "gradient": Measure(gradient, GRADIENT),
    "statistics": Measure(statistics, ROUNDING),
}
PARTS = tuple(MEASURES)


def rows() -> list[Case]:
    """All of it; those of ONNX only where its package is installed."""
    p = functools.partial
    x, images = draw((64, 3), mean=2.0), draw((4, 5, 6, 3), mean=2.0)
    nan_masked = filled(x, SOME_MASKED, np.nan)
    devices = draw((4, 16, 3), mean=np.arange(4).reshape(4, 1, 1))
    unequal = np.arange(16)[None, :, None] < np.array([16, 9, 3, 1])[:, None, None]
    one_empty = np.arange(16)[None, :, None] < np.array([16, 0, 3, 1])[:, None, None]
    f64 = far_from_zero(1e4, 64).astype(np.float64)
    f16, bf16 = draw((64, 3), std=300.0).astype(np.float16), draw((64, 3), mean=100.0).astype(jnp.bfloat16)

    semantics, numerics, edge = p(Case, SEMANTICS), p(Case, NUMERICS), p(Case, EDGES)
    found = [
        semantics("axis: [N, C]", p(both, x=x)),
        semantics("axis: images [N, H, W, C]", p(both, x=images)),
        semantics("axis: images [N, C, H, W]", p(both, x=images, axis=1)),
        semantics("axis: several feature axes", p(both, x=images, axis=(1, 3))),
        semantics("epsilon 0.3, inside the root", p(both, x=x, epsilon=0.3)),
        semantics("without scale", p(both, x=x, use_scale=False)),
        semantics("without bias", p(both, x=x, use_bias=False)),
        semantics("without scale and bias", p(both, x=x, use_scale=False, use_bias=False)),
        semantics("momentum 0.9: running statistics after 5 batches", p(running, xs=BATCHES)),
        semantics(
            "momentum 0.99: running statistics after 1 batch", p(running, xs=BATCHES[:1], momentum=0.99)
        ),
        semantics("momentum None: average over 5 batches", p(running, xs=BATCHES, momentum=None)),
        semantics("momentum None: average over 10,000 batches", p(running, xs=MANY_BATCHES, momentum=None)),
        semantics("biased running variance, by option or default", p(running, xs=BATCHES, unbiased=False)),
        semantics("unbiased running variance, by option or default", p(running, xs=BATCHES, unbiased=True)),
        semantics(
            "evaluation by the running statistics", p(evaluation, x=x, mean=[3, 2, 1], var=[4, 1, 0.1])
        ),
        semantics("mask: output", p(output, x=x, mask=SOME_MASKED)),
        semantics("mask: gradient", p(gradient, x=x, mask=SOME_MASKED)),
        semantics("mask: statistics", p(statistics, x=x, mask=SOME_MASKED)),
        semantics("mask [N, 1, 1, 1], [1, H, 1, 1], [N, H, W, 1] on images", broadcast_masks),
        semantics("NaN in masked entries: output", p(output, x=nan_masked, mask=SOME_MASKED)),
        semantics("NaN in masked entries: gradient", p(gradient, x=nan_masked, mask=SOME_MASKED)),
        semantics("NaN in masked entries: statistics", p(statistics, x=nan_masked, mask=SOME_MASKED)),
        *(semantics(f"axis_name: {part}", p(shared, xs=devices, part=part)) for part in PARTS),
        *(semantics(f"axis_name over single examples: {part}", p(shared, xs=x, part=part)) for part in PARTS),
        *(
            semantics(
                f"axis_name, unequal numbers of valid examples: {part}",
                p(shared, xs=devices, masks=unequal, part=part),
            )
            for part in PARTS
        ),
        *(
            semantics(
                f"types of the state after steps in lax.scan: {dtype}, x64 {'on' if x64 else 'off'}",
                p(state_types, dtype=dtype),
                x64=x64,
            )
            for dtype, x64 in (("float32", False), ("bfloat16", False), ("float32", True), ("float64", True))
        ),
        *(
            numerics(f"mean/std 1e{k}, N = {n:,}: {part}", p(measure, x=far_from_zero(10.0**k, n)), tolerance)
            for part, (measure, tolerance) in MEASURES.items()
            for n in (512, 65_536)
            for k in (2, 4, 6)
        ),
        *(
            numerics(f"mean/std 1e{k}, {which}: {part}", p(measure, **inputs), tolerance)
            for which, k, inputs in (
                ("first sample 1,000 std away", 4, {"x": outlier_first(1e4)}),
                ("first sample 1,000 std away", 6, {"x": outlier_first(1e6)}),
                ("first sample masked", 4, {"x": far_from_zero(1e4), "mask": FIRST_MASKED}),
                ("first sample masked", 6, {"x": far_from_zero(1e6), "mask": FIRST_MASKED}),
            )
            for part, (measure, tolerance) in MEASURES.items()
            if part != "statistics"
        ),
        *(
            numerics(f"axis_name, {which}: {part}", p(shared, xs=xs, part=part), MEASURES[part].tolerance)
            for which, xs in (
                ("mean/std 1e4", draw((4, 16, 3), mean=1e4)),
                ("mean/std 1e6", draw((4, 16, 3), mean=1e6)),
            )
            for part in PARTS
        ),
        *(
            numerics(
                f"constant features {text}: distance from the bias", p(constant_feature, values=values), EXACT
            )
            for text, values in (("0.1, 7, 1,000", [0.1, 7, 1e3]), ("1e-30, -3e7, 1e30", [1e-30, -3e7, 1e30]))
        ),
        numerics("float16, std 300: output", p(output, x=f16), 2**-10),
        numerics("float16, std 300: evaluation", p(evaluation_of_its_own_batch, x=f16), 2**-10),
        numerics("float16, std 300: statistics", p(statistics, x=f16)),
        numerics("float16: type of output and gradient", p(output_type, dtype="float16"), EXACT),
        numerics("bfloat16, mean 100: output", p(output, x=bf16), 2**-7),
        numerics("bfloat16, mean 100: evaluation", p(evaluation_of_its_own_batch, x=bf16), 2**-7),
        numerics("bfloat16, mean 100: statistics", p(statistics, x=bf16)),
        numerics("bfloat16: type of output and gradient", p(output_type, dtype="bfloat16"), EXACT),
        numerics(
            "float64, x64 on: type of output and gradient", p(output_type, dtype="float64"), EXACT, x64=True
        ),
        numerics("float64, x64 on, mean/std 1e4: output", p(output, x=f64), 1e-10, x64=True),
        numerics("inputs near 1e30: output", p(output, x=np.float32(1e30) * x)),
        numerics("inputs near 1e30: gradient", p(gradient, x=np.float32(1e30) * x), GRADIENT),
        numerics(
            "inputs near 1e-30: output, without scale and bias",
            p(output, x=np.float32(1e-30) * x, use_scale=False, use_bias=False),
        ),
        numerics(
            "inputs near 1e-30: gradient, without scale and bias",
            p(gradient, x=np.float32(1e-30) * x, use_scale=False, use_bias=False),
            GRADIENT,
        ),
        *(
            numerics(
                f"1e-30 to 1e30 at epsilon 0, the worst feature: {part}",
                p(measure, x=in_each_decade(), epsilon=0.0, compare=worst_feature),
                tolerance,
            )
            for part, (measure, tolerance) in MEASURES.items()
            if part != "statistics"
        ),
        numerics("inputs near 1e30: stored variance saturates", stored_variance_saturates, convention=True),
        numerics("W -> 2^k W, k = -60 to 60, epsilon 0: outputs that change, of 121", powers_of_two, EXACT),
        edge("evaluation before training: mean 0, variance 1", p(evaluation, x=x), convention=True),
        edge("batch of one: output is the bias", p(output, x=ONE), EXACT),
        edge("batch of one: gradient to x is 0", p(gradient, x=ONE)),
        edge("batch of one: running mean", p(batch_of_one_statistic, which=0)),
        edge("batch of one: running variance as it was", p(batch_of_one_statistic, which=1), convention=True),
        edge("empty batch: empty output, running statistics as they were", p(unchanged, x=ONE[:0]), EXACT),
        edge("fully masked: running statistics as they were", p(unchanged, x=x, mask=NOTHING_VALID), EXACT),
        edge(
            "fully masked, NaN: output the bias, no gradient",
            p(no_information, x=np.full_like(x, np.nan), mask=NOTHING_VALID),
            EXACT,
            convention=True,
        ),
        *(
            edge(
                f"axis_name, one device fully masked: {part}",
                p(shared, xs=devices, masks=one_empty, part=part),
            )
            for part in PARTS
        ),
        edge("NaN in one feature: the others", p(confined, value=np.nan)),
        edge("Inf in one feature: the others", p(confined, value=np.inf)),
        edge("momentum 0: the last batch's statistics", p(running, xs=BATCHES, momentum=0.0)),
        edge("momentum 0, std 1e-4: the last batch's statistics", p(running, xs=SMALL_BATCHES, momentum=0.0)),
        edge(
            "momentum None, std 1e-4: the first batch's statistics",
            p(running, xs=SMALL_BATCHES[:1], momentum=None),
        ),
        edge("momentum 1: running statistics as they were", p(unchanged, x=x, momentum=1.0), EXACT),
        edge("momentum 0.99: 10,000 batches", p(running, xs=MANY_BATCHES, momentum=0.99)),
        edge("momentum 0.5: the count at batch 2^31 does no harm", p(counter_at_its_end, momentum=0.5)),
        edge("momentum None: the count at batch 2^31 does no harm", p(counter_at_its_end, momentum=None)),
        edge("evaluation: gradient scale / sqrt(var + epsilon)", evaluation_gradient),
        edge(
            "zero variance, epsilon 0: output the bias, no gradient",
            p(no_information, x=np.tile(np.array([0, 0.1, -3e7], np.float32), (64, 1)), epsilon=0.0),
            EXACT,
            convention=True,
        ),
    ]
    return found + [Case(ONNX, name, p(onnx_node, case=case)) for name, case in onnx_cases().items()]
