"""Batch normalization against what others make of it: ONNX, onnxruntime, Flax linen and nnx, PyTorch.

Tolerances count roundings, the errors of one operation, relative to the largest number that entered the sum:
a result made of some dozens of operations, in an order of its own, is a few of them off. Inputs are mild
(mean / std of a few), because the others, not bnjax, lose digits where they are not.
"""

import functools
import importlib
import json
import pkgutil
from pathlib import Path

import flax.linen
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import onnx.backend.test.case.node
import onnx.backend.test.loader
import onnx.reference
import onnxruntime
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from bnjax import batch_norm
from bnjax.types import BatchNormParams, BatchStats

apply = jax.jit(batch_norm.apply, static_argnames=("train", "momentum", "axis", "debias", "unbiased"))


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """The type of everything in the test, with x64 on for float64."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def assert_close(actual, expected, roundings, size=None, precision=None):
    """Equal types and shapes, and an error of so many roundings of numbers as large as `size`.

    By default, `size` is the largest number expected, and the rounding that of its type.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if precision is None:
        assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if size is None:
        size = np.abs(expected).max(initial=0)
    error = np.abs(actual.astype(np.float64) - expected).max(initial=0)
    unit = np.finfo(precision or expected.dtype).eps
    assert error <= roundings * unit * size, f"{error / unit / size:.3g} roundings of {size:.3g}"


def size_of_terms(x, scale, bias, mean, var, epsilon):
    """The largest term of scale * (x - mean) / sqrt(var + epsilon) + bias, multiplied out."""
    factor = np.max(np.abs(scale) / np.sqrt(var + epsilon))
    return factor * (np.abs(x).max() + np.abs(mean).max()) + np.abs(bias).max()


def variance_by_channel(x):
    return x.var((0, *range(2, x.ndim)))


# ONNX. Its momentum is the weight of the old value, as ours; its running variance averages biased ones.


def onnx_cases():
    """The installed package's cases: {name: ([x, scale, bias, mean, var], expected outputs, model of one node)}."""
    node_cases = onnx.backend.test.case.node
    state = np.random.get_state()  # noqa: NPY002 - the import seeds numpy's global generator
    for module in pkgutil.iter_modules(node_cases.__path__):
        if module.name.replace("_", "").startswith("batchnorm"):  # all 200 modules would take 6 s
            importlib.import_module(f"{node_cases.__name__}.{module.name}")
    np.random.set_state(state)  # noqa: NPY002

    cases = {}
    for case in node_cases._NodeTestCases:
        if case.name.startswith("test_batchnorm_") and len(case.model.graph.node) == 1:
            ((inputs, outputs),) = case.data_sets
            cases[case.name] = inputs, outputs, case.model
    for case in onnx.backend.test.loader.load_model_tests(kind="pytorch-converted"):
        if case.name.startswith("test_BatchNorm"):
            folder = Path(case.model_dir)
            model = onnx.load(folder / "model.onnx")
            x, y = (
                onnx.numpy_helper.to_array(onnx.load_tensor(folder / "test_data_set_0" / f"{name}_0.pb"))
                for name in ("input", "output")
            )
            stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
            (node,) = model.graph.node
            cases[case.name] = [x, *(stored[name] for name in node.input[1:])], [y], model
    return cases


ONNX_CASES = onnx_cases()


def test_all_known_onnx_cases_are_there():
    """A newer package may have more; fewer would mean that they are looked for in the wrong place."""
    known = {f"test_batchnorm_{name}" for name in ("example", "epsilon")}
    known |= {f"{name}_training_mode" for name in known}
    kinds = ("1d_3d_input", "2d", "2d_momentum", "3d", "3d_momentum")
    assert set(ONNX_CASES) >= known | {f"test_BatchNorm{kind}_eval" for kind in kinds}


@pytest.mark.parametrize("name", sorted(ONNX_CASES))
def test_onnx_case(name, dtype):
    """The stored outputs are float32's: 10 roundings of those. In float64 ONNX's reference, run anew, as well."""
    inputs, outputs, model = ONNX_CASES[name]
    (node,) = model.graph.node
    defaults = onnx.defs.get_schema("BatchNormalization").attributes.values()
    attributes = {a.name: onnx.helper.get_attribute_value(a.default_value) for a in defaults}
    attributes |= {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    train, epsilon = bool(attributes["training_mode"]), attributes["epsilon"]
    x, scale, bias, mean, var = inputs = [np.asarray(value, dtype) for value in inputs]
    y, stats = apply(
        BatchNormParams(scale, bias),
        BatchStats(mean, var, np.int32(0)),
        x,
        train=train,
        momentum=attributes["momentum"],
        epsilon=epsilon,
        axis=1,
    )
    actual = [y, stats.mean, stats.var] if train else [y]
    size = size_of_terms(x, scale, bias, mean, variance_by_channel(x) if train else var, epsilon)
    for a, expected in zip(actual, outputs, strict=True):
        assert_close(a, expected, 10, size, precision="float32")
    if dtype == "float64":
        reference = onnx.reference.ReferenceEvaluator(model)
        outputs = reference.run(None, dict(zip(node.input, inputs, strict=True)))
        for a, expected in zip(actual, outputs, strict=True):
            assert_close(a, expected, 10, size)


@functools.cache
def onnxruntime_session(dtype, rank, train, momentum, epsilon):
    outputs = ["y", "running_mean", "running_var"] if train else ["y"]
    inputs = ["x", "scale", "bias", "mean", "var"]
    node = onnx.helper.make_node(
        "BatchNormalization", inputs, outputs, training_mode=int(train), momentum=momentum, epsilon=epsilon
    )
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def declare(name):
        shape = [None] * (rank if name in ("x", "y") else 1)
        return onnx.helper.make_tensor_value_info(name, element, shape)

    graph = onnx.helper.make_graph([node], "batch_norm", map(declare, inputs), map(declare, outputs))
    opset = onnx.helper.make_opsetid("", 15)  # the operator's newest version, in every onnxruntime supported
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns, needlessly, that running statistics are outputs
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@hypothesis.settings(max_examples=25, deadline=None)  # compiling takes longer than any deadline
@given(
    shape_and_momentum=st.sampled_from([((7, 3), 0.9), ((5, 3, 6), 0.25), ((4, 3, 5, 2), 0.75)]),
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(-3, 3),
    ratio=st.floats(-4, 4),
    epsilon=st.sampled_from([1e-5, 1e-3, 0.5]),
)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_onnxruntime_on_random_inputs(dtype, train, shape_and_momentum, seed, spread, ratio, epsilon):
    """Standard deviations from 1e-3 to 1e3; mean / std to 4, since onnxruntime multiplies the formula out."""
    shape, momentum = shape_and_momentum  # of a few combinations, since each is compiled
    # The node's attributes are float32, in float64 too.
    epsilon, momentum = float(np.float32(epsilon)), float(np.float32(momentum))
    rng = np.random.default_rng(seed)
    std = 10.0**spread
    x = (std * (ratio + rng.normal(size=shape))).astype(dtype)
    scale, bias = rng.normal(size=(2, 3)).astype(dtype)
    mean = (std * (ratio + rng.normal(size=3))).astype(dtype)
    var = (std**2 * rng.uniform(0.5, 2, size=3)).astype(dtype)

    session = onnxruntime_session(dtype, len(shape), train, momentum, epsilon)
    expected = session.run(None, {"x": x, "scale": scale, "bias": bias, "mean": mean, "var": var})
    with jax.enable_x64(dtype == "float64"):
        y, stats = apply(
            BatchNormParams(scale, bias),
            BatchStats(mean, var, np.int32(0)),
            x,
            train=train,
            momentum=momentum,
            epsilon=epsilon,
            axis=1,
        )
    sigma2 = variance_by_channel(x) if train else var
    assert_close(y, expected[0], 20, size_of_terms(x, scale, bias, mean, sigma2, epsilon))
    if train:
        assert_close(stats.mean, expected[1], 10, np.abs(x).max() + np.abs(mean).max())
        assert_close(stats.var, expected[2], 20, sigma2.max() + var.max())


# Flax. Its momentum and its variance are ours; a mask is True for valid entries there too.

FLAX_CASES = {  # shape, axis, shape of the mask, options of their layers
    "NC": ((16, 3), -1, None, {"momentum": 0.99, "epsilon": 1e-5}),
    "NHWC, no bias": (
        (4, 5, 2, 3),
        -1,
        None,
        {"momentum": 0.9, "epsilon": 1e-3, "use_bias": False, "use_fast_variance": False},
    ),
    "NCHW, no scale, mask": ((4, 3, 5, 2), 1, (4, 1, 5, 2), {"momentum": 0.5, "epsilon": 0.1, "use_scale": False}),
    "two axes": ((6, 2, 4, 3), (1, 3), None, {"momentum": 0.0, "epsilon": 1e-5, "use_scale": False, "use_bias": False}),
}
STEPS = 20


def run_layer(layer, params, stats, batches, weights, mask):
    """20 training steps; then, in both modes, an output and its gradients. `layer` has the signature of `apply`.

    Returns: the statistics after each step, {train: (output, gradients of params and x)}.
    """

    def step(stats, x):
        _, stats = layer(params, stats, x, mask, True)
        return stats, stats

    def loss(params, x, train):
        y, _ = layer(params, stats, x, mask, train)
        y = y if mask is None else jnp.where(mask, y, 0)  # masked outputs are a matter of convention
        return (weights * jnp.sin(y)).sum(), y

    stats, history = jax.lax.scan(step, stats, batches)
    gradients = {}
    for train in (True, False):
        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, batches[-1], train)
        gradients[train] = (y, grads)
    return history, gradients


@functools.cache
def flax_inputs(case, dtype):
    """(params, stats, batches, weights, mask) of a case."""
    shape, axis, mask_shape, options = FLAX_CASES[case]
    rng = np.random.default_rng(1)
    axes = np.atleast_1d(axis) % len(shape)
    features = tuple(shape[a] for a in axes)
    offset = rng.normal(size=[n if a in axes else 1 for a, n in enumerate(shape)])
    drift = np.linspace(0.5, 2, STEPS).reshape(STEPS, *[1] * len(shape))
    batches = drift * (offset + rng.normal(size=(STEPS, *shape)))
    scale, bias, mean, var = rng.normal(size=(4, *features))
    weights = rng.normal(size=shape)
    mask = None if mask_shape is None else rng.random(mask_shape) < 0.7
    batches, scale, bias, mean, var, weights = (
        a.astype(dtype) for a in (batches, scale, bias, mean, np.square(var) + 0.1, weights)
    )
    params = (scale if options.get("use_scale", True) else None, bias if options.get("use_bias", True) else None)
    return params, (mean, var), batches, weights, mask


@functools.cache
def ours_on_flax_inputs(case, dtype):
    _, axis, _, options = FLAX_CASES[case]
    momentum, epsilon = options["momentum"], options["epsilon"]

    def layer(params, stats, x, mask, train):
        y, stats = batch_norm.apply(
            BatchNormParams(*params),
            BatchStats(*stats, jnp.int32(0)),
            x,
            train=train,
            mask=mask,
            momentum=momentum,
            epsilon=epsilon,
            axis=axis,
        )
        return y, (stats.mean, stats.var)

    return jax.jit(functools.partial(run_layer, layer))(*flax_inputs(case, dtype))


def linen_layer(case):
    _, axis, _, options = FLAX_CASES[case]
    module = flax.linen.BatchNorm(axis=axis, **options)

    def layer(params, stats, x, mask, train):
        variables = {
            "params": {k: v for k, v in zip(("scale", "bias"), params, strict=True) if v is not None},
            "batch_stats": dict(zip(("mean", "var"), stats, strict=True)),
        }
        y, updated = module.apply(variables, x, use_running_average=not train, mask=mask, mutable=["batch_stats"])
        return y, (updated["batch_stats"]["mean"], updated["batch_stats"]["var"])

    return layer


def nnx_layer(case):
    shape, axis, _, options = FLAX_CASES[case]

    def layer(params, stats, x, mask, train):
        module = nnx.BatchNorm(shape[axis], axis=axis, rngs=nnx.Rngs(0), **options)
        for name, value in zip(("scale", "bias"), params, strict=True):
            if value is not None:
                setattr(module, name, nnx.Param(value))
        module.mean, module.var = map(nnx.BatchStat, stats)
        y = module(x, use_running_average=not train, mask=mask)
        return y, (module.mean[...], module.var[...])

    return layer


@pytest.mark.parametrize(
    ("make_layer", "case"),
    [(linen_layer, case) for case in FLAX_CASES]
    + [(nnx_layer, case) for case in FLAX_CASES if case != "two axes"],  # nnx knows one number of features
    ids=lambda value: value if isinstance(value, str) else value.__name__.removesuffix("_layer"),
)
def test_flax(make_layer, case, dtype):
    inputs = flax_inputs(case, dtype)
    expected_history, expected = jax.jit(functools.partial(run_layer, make_layer(case)))(*inputs)
    history, found = ours_on_flax_inputs(case, dtype)
    for a, e in zip(history, expected_history, strict=True):
        assert_close(a, e, 20)
    for train in (True, False):
        (y, grads), (expected_y, expected_grads) = found[train], expected[train]
        assert_close(y, expected_y, 20)
        assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
        for a, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            assert_close(a, e, 40)


# PyTorch, by a golden file. Its momentum is 1 - ours; its running variance averages unbiased ones.

with np.load(Path(__file__).parent / "golden" / "torch_batch_norm.npz") as file:
    GOLDEN = dict(file)
META = json.loads(str(GOLDEN.pop("meta")))


def golden(prefix):
    """The arrays of one case, by their own names."""
    return {key.rpartition("/")[2]: a for key, a in GOLDEN.items() if key.rpartition("/")[0] == prefix}


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def test_golden_file_is_whole():
    """Shape by shape, so that no case vanishes when the file is made anew."""
    shapes = [golden(case["name"])["x"].shape for case in META["layers"]]
    assert shapes == [(8, 3), (3, 3, 4, 2), (2, 3, 2, 3, 2)]
    assert golden("running")["batches"].shape == (50, 48)
    assert [len(case["shape"]) for case in META["running"]] == [3, 4, 5]
    assert len(META["opinfo"]) == 24
    assert META["versions"].keys() >= {"torch", "numpy", "python"}


@functools.partial(jax.jit, static_argnames=("loss", "momentum", "train"))
def gradients_and_products(loss, params, stats, x, epsilon, direction, *, momentum, train):
    """(y, statistics), the gradients of loss(y) to params and x, and their derivative in a direction, if any."""

    def of_layer(params, x):
        y, after = batch_norm.apply(
            params, stats, x, train=train, momentum=momentum, epsilon=epsilon, axis=1, unbiased=True
        )
        return loss(y), (y, after)

    gradient = jax.grad(of_layer, argnums=(0, 1), has_aux=True)
    if direction is None:
        gradients, results = gradient(params, x)
        return results, gradients, None
    gradients, products, results = jax.jvp(gradient, (params, x), direction, has_aux=True)
    return results, gradients, products


@pytest.mark.parametrize("mode", ["train", "eval"])
@by_name(META["layers"])
def test_torch_layer(case, mode, dtype):
    """Derivatives are sums of up to 24 terms with some roundings each."""
    inputs = {key: value.astype(dtype) for key, value in golden(case["name"]).items()}
    expected = golden(f"{case['name']}/{mode}/{dtype}")
    params, direction = (BatchNormParams(inputs.get(f"{d}scale"), inputs.get(f"{d}bias")) for d in ("", "d"))
    weights = inputs["weights"]
    (y, stats), gradients, products = gradients_and_products(
        lambda y: (weights * jnp.sin(y)).sum(),
        params,
        BatchStats(inputs["mean"], inputs["var"], np.int32(0)),
        inputs["x"],
        case["epsilon"],
        (direction, inputs["dx"]) if dtype == "float64" else None,
        momentum=0.9,
        train=mode == "train",
    )
    assert_close(y, expected.pop("y"), 10)
    assert_close(stats.mean, expected.pop("mean"), 10)
    assert_close(stats.var, expected.pop("var"), 10)
    for order, derivatives in (("grad", gradients), ("hvp", products)):
        if derivatives is not None:
            for name, value in {**derivatives[0]._asdict(), "x": derivatives[1]}.items():
                if value is not None:
                    assert_close(value, expected.pop(f"{order}_{name}"), 40)
    assert not expected  # nothing stored is left over


@by_name(META["running"])
def test_torch_running_statistics(case, dtype):
    """Over 50 steps: at most 50 roundings more than one step has."""
    xs = golden("running")["batches"].astype(dtype).reshape(-1, *case["shape"])
    stored = golden(f"running/{case['name']}/{dtype}")
    theirs = {(momentum, True): stored[str(momentum)] for momentum in (0.1, None)}  # [T, 2, C]

    # What theirs would be by the biased variances, which PyTorch gives as well, for every batch.
    batches = np.stack([stored["batch_mean"], stored["batch_var"]], 1, dtype=np.float64)
    for momentum in (0.1, None):
        average, history = np.array([[0.0] * 3, [1.0] * 3]), []
        for t, batch in enumerate(batches, 1):
            average = average + (batch - average) * (1 / t if momentum is None else momentum)
            history.append(average)
        theirs[momentum, False] = np.stack(history).astype(dtype)

    @jax.jit
    def histories(stats, xs):
        def step(all_stats, x):
            after = []
            for stats, (momentum, unbiased) in zip(all_stats, theirs, strict=True):
                none = BatchNormParams(None, None)
                momentum = None if momentum is None else 1 - momentum
                options = {"train": True, "momentum": momentum, "unbiased": unbiased, "axis": 1}
                after.append(batch_norm.apply(none, stats, x, **options)[1])
            return after, after

        return jax.lax.scan(step, [stats] * len(theirs), xs)[1]

    found = histories(batch_norm.init(3, dtype)[1], xs)
    for stats, expected in zip(found, theirs.values(), strict=True):
        assert_close(stats.mean, expected[:, 0], 60)
        assert_close(stats.var, expected[:, 1], 60)


def sum_of_cosines(y):
    return jnp.cos(y).sum()


@by_name(META["opinfo"])
def test_torch_sample(case):
    """PyTorch's own cases: also of two samples a feature, or of none, with a momentum below 0 ...

    Outputs reach 60, and a sine of 60 has the roundings of 60, so the derivatives are as far off.
    """
    expected = golden(case["name"])
    x, mean, var, scale, bias = (expected.pop(key, None) for key in ("x", "mean", "var", "scale", "bias"))
    params = BatchNormParams(scale, bias)
    if mean is None:
        stats = BatchStats(np.zeros_like(x[0, :, 0]), np.ones_like(x[0, :, 0]), np.int32(0))
    else:
        stats = BatchStats(mean, var, np.int32(0))
    train, epsilon = case.get("training", False), case.get("eps", 1e-5)
    momentum = 1 - case.get("momentum", 0.1)
    with jax.enable_x64(case["dtype"] == "float64"):
        run = functools.partial(gradients_and_products, sum_of_cosines, params, stats, x, epsilon, None, train=train)
        if x.ndim == 1:
            # Without a channel axis, theirs returns what is empty as it is; ours takes it for a mistake.
            assert x.size == 0
            with pytest.raises(ValueError, match="axis must name"):
                run(momentum=momentum)
            return
        if momentum > 1:
            # Theirs extrapolates, to variances below 0. Outputs in training do not depend on it.
            with pytest.raises(ValueError, match=r"momentum must be None or in \[0, 1\]"):
                run(momentum=momentum)
            momentum = 0.9
            if train:
                del expected["after_mean"], expected["after_var"]
        (y, after), (gradients, grad_x), _ = run(momentum=momentum)

    sigma2 = variance_by_channel(x) if train else stats.var
    scale, bias = (1, 0) if scale is None else (scale, bias)
    # The largest terms of: d y / d x, d y / d scale, and y.
    slope = np.max(np.abs(scale) / np.sqrt(sigma2 + epsilon))
    x_hat_size = size_of_terms(x, 1, 0, stats.mean, sigma2, epsilon)
    y_size = size_of_terms(x, scale, bias, stats.mean, sigma2, epsilon)
    assert_close(y, expected.pop("y"), 10, y_size)
    assert_close(grad_x, expected.pop("grad_x"), 10, y_size * slope)
    if params.scale is not None:
        assert_close(gradients.scale, expected.pop("grad_scale"), 10, y_size * x_hat_size)
        assert_close(gradients.bias, expected.pop("grad_bias"), 10, y_size)
    if "after_mean" in expected:
        assert_close(after.mean, expected.pop("after_mean"), 10)
        assert_close(after.var, expected.pop("after_var"), 10)
    assert not expected  # nothing stored is left over
