"""Conversions and modules against Flax itself, and against what PyTorch computed (`golden/make_torch_mlp.py`).

Tolerances, relative to the largest entry of an array: in float64 1e-11 (seen: 2e-15, and 4e-12 for gradients that
are 0 but for rounding); in float32 5e-6, some dozen roundings of 6e-8 (seen: 7e-7, and twice that for gradients).
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization
from flax.core import freeze
from flax.errors import ModifyScopeVariableError

import bnjax
from bnjax import activations, batch_norm
from bnjax.interop import flax as to_from_flax
from bnjax.interop import nnx as our_nnx
from bnjax.interop import torch as to_from_torch

ROOT = Path(__file__).parents[1]
GOLDEN = np.load(ROOT / "tests" / "golden" / "torch_mlp.npz")
TOLERANCE = {np.dtype("float64"): 1e-11, np.dtype("float32"): 5e-6}
NETWORKS = [
    {"activation": activation, "norm": norm, "norm_position": position, "use_bias": use_bias}
    for activation, norm, position, use_bias in [
        ("relu", "batch", "before_activation", None),
        ("sigmoid", "batch", "before_activation", True),
        ("gelu", "batch", "after_activation", None),
        ("tanh", "batch", "after_activation", False),
        ("linear", "none", "before_activation", None),
    ]
]


def close(a, b, rtol=None):
    """Two trees of the same structure, each leaf within the tolerance of its dtype relative to its largest entry."""

    def leaf(a, b):
        a, b = np.asarray(a), np.asarray(b)
        tolerance = rtol or TOLERANCE.get(a.dtype, 0)
        np.testing.assert_allclose(
            a.astype(float), b.astype(float), rtol=0, atol=tolerance * max(np.abs(b).max(initial=0), 1e-3)
        )

    jax.tree.map(leaf, a, b)


def identical(a, b):
    """Two trees of the same structure, shapes, dtypes and bits."""

    def leaf(a, b):
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(b), jnp.result_type(b))
        np.testing.assert_array_equal(a, b)

    jax.tree.map(leaf, a, b)


def moved(tree, seed=0, dtype=None):
    """No entry at its initial value; floating ones in `dtype`."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)

    def leaf(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x + 3
        return (x + 0.2 * rng.uniform(-1, 1, x.shape)).astype(dtype or x.dtype)

    return structure.unflatten([leaf(x) for x in leaves])


@partial(jax.jit, static_argnums=(0, 4))
def course(run, params, stats, x, loss=jnp.sin):
    """Each batch of x in turn: evaluation, then training with the gradients of the summed loss.

    Args:
      run: `(params, stats, x, train) -> (y, stats)`.

    Returns:
      The last statistics; of all batches, y in evaluation, y in training, gradients to params and (of floats) to x.
    """

    def step(stats, x):
        def total(params, x):
            y, new = run(params, stats, x, True)
            return loss(y).sum().astype(float), (y, new)

        arguments = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)
        gradients, (y, new) = jax.grad(total, arguments, has_aux=True)(params, x)
        return new, (run(params, stats, x, False)[0], y, *gradients)

    return jax.lax.scan(step, stats, x)


def ours(model=None, **options):
    """`model.apply`, or `batch_norm.apply` with options, as `course` runs it."""
    apply = model.apply if model else partial(batch_norm.apply, **options)
    return lambda params, stats, x, train: apply(params, stats, x, train=train)


def flaxs(module):
    """A module of Flax that takes `train` or `use_running_average`, as `course` runs it."""

    def run(params, stats, x, train):
        mode = {"train": train} if isinstance(module, Net) else {"use_running_average": not train}
        variables = {"params": params, "batch_stats": stats}
        y, new = module.apply(variables, x, mutable=["batch_stats"], **mode)
        return y, new.get("batch_stats", {})

    return run


def collections(variables):
    return variables.get("params", {}), variables.get("batch_stats", {})


def normal(*shape, seed=1, dtype=np.float32):
    return jnp.asarray(1 + 2 * np.random.default_rng(seed).normal(size=shape), dtype)


class Net(nn.Module):
    """An mlp as a user of Flax would write it, for the options of `bnjax.mlp`."""

    features: tuple
    num_outputs: int
    options: dict
    norm: type = nn.BatchNorm
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train):
        has_norm = self.options["norm"] == "batch"
        first = self.options["norm_position"] == "before_activation"
        use_bias = self.options["use_bias"]
        use_bias = not (has_norm and first) if use_bias is None else use_bias
        phi = activations.get(self.options["activation"])
        for width in self.features:
            x = nn.Dense(width, use_bias=use_bias)(x)
            for step in ("norm", "phi") if first else ("phi", "norm"):
                if step == "phi":
                    x = phi(x)
                elif has_norm:
                    x = self.norm(use_running_average=not train, momentum=self.momentum)(x)
        return nn.Dense(self.num_outputs)(x)


# To and from Flax.


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_flax_layer(x64, use_scale, use_bias):
    """Variables as Flax has them; a round trip changes nothing; equal outputs, statistics and gradients."""
    params, stats = moved(batch_norm.init(4, use_scale=use_scale, use_bias=use_bias), dtype=jnp.float64)
    variables = to_from_flax.to_flax(params, stats)
    layer = nn.BatchNorm(momentum=0.7, epsilon=1e-3, use_scale=use_scale, use_bias=use_bias)
    x = normal(3, 6, 3, 4, dtype=jnp.float64)
    init = layer.init(jax.random.key(0), x[0], use_running_average=True)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, init)
    identical((params, stats), to_from_flax.from_flax(freeze(variables), stats.count))
    found, (*outputs, to_params, to_x) = course(ours(momentum=0.7, epsilon=1e-3), params, stats, x)
    expected = course(flaxs(layer), *collections(variables), x)
    found, to_params = (collections(to_from_flax.to_flax(*pair)) for pair in [(params, found), (to_params, stats)])
    close((found[1], (*outputs, to_params[0], to_x)), expected)


def test_flax_layer_continues_a_cumulative_average_only_with_its_count():
    params, stats = moved(batch_norm.init(4))
    variables = to_from_flax.to_flax(params, stats)
    x = normal(6, 4)
    _, expected = batch_norm.apply(params, stats, x, train=True, momentum=None)
    for count, same in [(3, True), (0, False)]:
        _, after = batch_norm.apply(*to_from_flax.from_flax(variables, count), x, train=True, momentum=None)
        assert bool((after.mean == expected.mean).all()) == same


@pytest.mark.parametrize(
    ("options", "freeze_hidden"),
    [(NETWORKS[0], True)] + [pytest.param(NETWORKS[i], False, marks=pytest.mark.slow) for i in (0, 1, 2, 3, 4)],
    ids=str,
)
def test_flax_mlp(x64, options, freeze_hidden):
    """The tree of Flax's own network, a round trip, outputs in both modes, statistics, gradients."""
    model = bnjax.mlp((5, 4), 3, freeze_hidden=freeze_hidden, **options)
    params, stats = moved(model.init(jax.random.key(0), (6,), 1.0), dtype=jnp.float64)
    variables = to_from_flax.mlp_to_flax(model, params, stats)
    net = Net((5, 4), 3, options)
    x = normal(3, 7, 6, dtype=jnp.float64)
    init = net.init(jax.random.key(0), x[0], train=True)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, init)
    identical((params, stats), to_from_flax.mlp_from_flax(model, freeze(variables), count=3))

    found, (*outputs, to_params, to_x) = course(ours(model), params, stats, x)
    expected, (*expected_outputs, expected_to_params, expected_to_x) = course(flaxs(net), *collections(variables), x)
    close((*outputs, to_x), (*expected_outputs, expected_to_x))
    close(collections(to_from_flax.mlp_to_flax(model, params, found))[1], expected)
    # One gradient, not a stack of them, has the shapes of params.
    to_params, expected_to_params = jax.tree.map(lambda g: g[-1], (to_params, expected_to_params))
    to_params = to_from_flax.mlp_to_flax(model, to_params, stats)["params"]
    for i in range(2 if freeze_hidden else 0):  # kernels that ours has no gradient for
        del to_params[f"Dense_{i}"]["kernel"], expected_to_params[f"Dense_{i}"]["kernel"]
    close(to_params, expected_to_params)


def test_flax_mlp_in_float32_and_under_jit():
    model = bnjax.mlp((5, 4), 3)
    params, stats = moved(model.init(jax.random.key(0), (6,), 1.0))
    x = normal(3, 7, 6)
    variables = jax.jit(partial(to_from_flax.mlp_to_flax, model))(params, stats)
    identical(jax.jit(partial(to_from_flax.mlp_from_flax, model))(variables, 3), (params, stats))
    found, (*outputs, _, _) = course(ours(model), params, stats, x)
    expected, (*expected_outputs, _, _) = course(flaxs(Net((5, 4), 3, NETWORKS[0])), *collections(variables), x)
    close(outputs, expected_outputs)
    close(to_from_flax.mlp_to_flax(model, params, found)["batch_stats"], expected)


def test_an_mlp_without_hidden_layers():
    model = bnjax.mlp((), 3)
    params, stats = model.init(jax.random.key(0), (6,), 1.0)
    kernel = params["output"]["kernel"]
    variables = to_from_flax.mlp_to_flax(model, params, stats)
    state_dict = to_from_torch.mlp_to_torch(model, params, stats)
    identical(variables, {"params": {"Dense_0": {"kernel": kernel, "bias": jnp.zeros(3)}}})
    identical(state_dict, {"0.weight": kernel.T, "0.bias": np.zeros(3, np.float32)})
    identical(to_from_flax.mlp_from_flax(model, variables), (params, stats))
    identical(to_from_torch.mlp_from_torch(model, state_dict), (params, stats))


# To and from PyTorch.

TORCH_MLPS = {
    "relu_before": {"activation": "relu"},
    "linear_before_bias": {"activation": "linear", "use_bias": True},
    "sigmoid_after": {"activation": "sigmoid", "norm_position": "after_activation"},
    "gelu_after_no_bias": {"activation": "gelu", "norm_position": "after_activation", "use_bias": False},
    "tanh_none": {"activation": "tanh", "norm": "none"},
}
TORCH_LAYERS = {  # momentum as PyTorch has it
    "layer": {"momentum": 0.3, "epsilon": 1e-3},
    "layer_cumulative": {"momentum": None},
    "layer_no_bias": {"momentum": 0.1},
    "layer_not_affine": {"momentum": 0.1},
    "layer_images": {"momentum": 0.1, "axis": 1},
}


def golden(case, folder=None):
    prefix = f"{case}/{folder}/" if folder else f"{case}/"
    return {name.removeprefix(prefix): GOLDEN[name] for name in GOLDEN.files if name.startswith(prefix)}


@pytest.mark.parametrize("case", TORCH_LAYERS)
def test_torch_layer(x64, case):
    """Outputs in both modes, and running statistics over several steps with unbiased variances."""
    record, before = golden(case), golden(case, "before")
    options = {**TORCH_LAYERS[case], "momentum": to_from_torch.momentum_from_torch(TORCH_LAYERS[case]["momentum"])}
    params, stats = to_from_torch.from_torch(before)
    assert (params.scale is None) == (case == "layer_not_affine")
    assert (params.bias is None) == (case in ("layer_not_affine", "layer_no_bias"))
    identical(to_from_torch.to_torch(params, stats), before)
    run = ours(unbiased=True, **options)
    after, (evaluated, trained, *_) = course(run, params, stats, record["x"])
    close((evaluated[0], trained), (record["eval_before"], record["train"]))
    found, expected = to_from_torch.to_torch(params, after), {**before, **golden(case, "after")}
    assert found["num_batches_tracked"] == expected["num_batches_tracked"] == 3 + len(record["x"])
    close(found, expected)
    close(run(params, after, record["x"][0], train=False)[0], record["eval_after"])


@pytest.mark.parametrize(
    ("case", "freeze_hidden"),
    [("relu_before", True), ("gelu_after_no_bias", False)]
    + [pytest.param(case, False, marks=pytest.mark.slow) for case in TORCH_MLPS if case != "gelu_after_no_bias"],
)
def test_torch_mlp(x64, case, freeze_hidden):
    """A round trip, outputs in both modes before and after training, statistics, gradients."""
    record, before = golden(case), golden(case, "before")
    model = bnjax.mlp((5, 4), 3, freeze_hidden=freeze_hidden, **TORCH_MLPS[case])
    params, stats = to_from_torch.mlp_from_torch(model, before)
    assert ("kernel" in params["hidden_0"]) == (not freeze_hidden)
    identical(to_from_torch.mlp_to_torch(model, params, stats), before)
    running, (evaluated, trained, gradients, _) = course(ours(model), params, stats, record["x"], loss=jnp.square)
    close((evaluated[0], trained), (record["eval_before"], record["train"]))
    gradient = jax.tree.map(lambda g: g.sum(0), gradients)
    found = to_from_torch.mlp_to_torch(model, gradient, stats)
    expected = golden(case, "gradient")
    largest = max(np.abs(g).max() for g in expected.values())  # a bias before a norm has gradient 0
    hidden_kernels = [name for name, value in before.items() if value.ndim == 2][:-1]
    for name in expected:
        if not (freeze_hidden and name in hidden_kernels):
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-11 * largest)

    # PyTorch's running variances average N / (N - 1) times the batches' variances.
    found = to_from_torch.mlp_to_torch(model, params, running)
    batches, n = record["x"].shape[:2]
    for name, value in golden(case, "after").items():
        if name.endswith("running_var"):
            start = 0.9**batches * before[name]
            found[name] = start + n / (n - 1) * (found[name] - start)
        close(found[name], value)
    params, stats = to_from_torch.mlp_from_torch(model, {**before, **golden(case, "after")})
    close(model.apply(params, stats, record["x"][0], train=False)[0], record["eval_after"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["relu_before", "gelu_after_no_bias"])
def test_torch_mlp_in_float32(case):
    record = golden(case)
    before = {n: v.astype(np.float32) if v.ndim else v for n, v in golden(case, "before").items()}
    model = bnjax.mlp((5, 4), 3, **TORCH_MLPS[case])
    params, stats = to_from_torch.mlp_from_torch(model, before)
    identical(to_from_torch.mlp_to_torch(model, params, stats), before)
    x = record["x"].astype(np.float32)
    _, (evaluated, trained, *_) = course(ours(model), params, stats, x)
    close((evaluated[0], trained), (record["eval_before"], record["train"]))


@pytest.mark.parametrize("options", NETWORKS, ids=str)
@pytest.mark.parametrize("freeze_hidden", [False, True])
def test_torch_round_trip_from_our_side(options, freeze_hidden):
    model = bnjax.mlp((5, 4), 3, freeze_hidden=freeze_hidden, **options)
    params, stats = moved(model.init(jax.random.key(0), (6,), 1.0))
    state_dict = to_from_torch.mlp_to_torch(model, params, stats)
    identical(to_from_torch.mlp_from_torch(model, state_dict), (params, stats))
    for value in state_dict.values():  # as torch.from_numpy wants them
        assert type(value) is np.ndarray
        assert value.flags.writeable
        assert value.flags.c_contiguous


def test_torch_values_may_be_anything_that_numpy_reads():
    class Tensor:
        def __init__(self, value):
            self.value, self.shape = value, value.shape

        def __array__(self, dtype=None, copy=None):
            return np.asarray(self.value, dtype)

    before = golden("relu_before", "before")
    tensors = {name: Tensor(value) for name, value in before.items()}
    model = bnjax.mlp((5, 4), 3)
    converted = (to_from_torch.mlp_from_torch(model, values) for values in (tensors, before))
    identical(*converted)


def test_torch_has_no_bias_without_weight_and_no_bfloat16():
    params, stats = batch_norm.init(3, use_scale=False)
    assert (to_from_torch.to_torch(params, stats)["weight"] == 1).all()
    params, stats = batch_norm.init(3, jnp.bfloat16)
    assert to_from_torch.to_torch(params, stats)["weight"].dtype == np.float32


def test_torch_counts_beyond_int32_stay_at_its_largest():
    state_dict = {"running_mean": np.zeros(2), "running_var": np.ones(2), "num_batches_tracked": 2**40}
    assert to_from_torch.from_torch(state_dict)[1].count == 2**31 - 1


def test_momentum():
    assert to_from_torch.momentum_to_torch(0.75) == 0.25
    assert to_from_torch.momentum_from_torch(0.1) == 0.9
    assert to_from_torch.momentum_to_torch(None) is to_from_torch.momentum_from_torch(None) is None


# What does not fit.

MODEL = bnjax.mlp((5, 4), 3)


def edited(dictionary, removed=(), **added):
    return {name: value for name, value in dictionary.items() if name not in removed} | added


def flat_state():
    return to_from_torch.mlp_to_torch(MODEL, *MODEL.init(jax.random.key(0), (6,), 1.0))


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda: to_from_flax.from_flax({"params": {"scale": np.ones(3)}}), "missing batch_stats/mean"),
        (
            lambda: to_from_flax.from_flax({"batch_stats": {"mean": np.ones(3), "var": np.ones(2)}}),
            r"batch_stats/var has shape \(2,\), expected \(3,\)",
        ),
        (
            lambda: to_from_flax.from_flax(
                {"params": {"gamma": 1.0}, "batch_stats": {"mean": np.ones(3), "var": np.ones(3)}}
            ),
            "unexpected params/gamma",
        ),
        (lambda: to_from_flax.mlp_from_flax(MODEL, {"params": {}}), "missing .*params/Dense_2/kernel"),
        (
            lambda: to_from_flax.mlp_from_flax(
                bnjax.mlp((5, 4), 3, use_bias=True),
                to_from_flax.mlp_to_flax(MODEL, *MODEL.init(jax.random.key(0), (6,), 1.0)),
            ),
            "missing params/Dense_0/bias, params/Dense_1/bias",
        ),
        (
            lambda: to_from_flax.mlp_to_flax(MODEL, *bnjax.mlp((5, 3), 3).init(jax.random.key(0), (6,), 1.0)),
            r"params/hidden_1/kernel has shape \(5, 3\), expected \(5, 4\)",
        ),
        (lambda: to_from_flax.mlp_to_flax(MODEL, {}, {}), "missing .*params/hidden_0/kernel"),
        (lambda: to_from_torch.from_torch({"running_mean": np.ones(3)}), "missing running_var, num_batches"),
        (
            lambda: to_from_torch.mlp_from_torch(MODEL, edited(flat_state(), ["3.weight"], extra=np.ones(2))),
            "missing 3.weight; unexpected extra",
        ),
        (
            lambda: to_from_torch.mlp_from_torch(MODEL, edited(flat_state(), **{"3.weight": np.ones((5, 4))})),
            r"3.weight has shape \(5, 4\), expected \(4, 5\)",
        ),
        (lambda: to_from_torch.mlp_to_torch(bnjax.Model(None, None), {}, {}), "must come from bnjax.mlp"),
    ],
)
def test_errors_name_what_does_not_fit(convert, message):
    with pytest.raises(ValueError, match=message):
        convert()


# The modules, in the place of Flax's.


def slow(cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def linen_pair(**options):
    return nn.BatchNorm(**options), to_from_flax.BatchNorm(**options)


OPTIONS = {
    "default": {},
    "no_scale": {"use_scale": False, "momentum": 0.5},
    "no_bias": {"use_bias": False, "epsilon": 0.1},
    "neither": {"use_scale": False, "use_bias": False},
    "channels_first": {"axis": 1},
    "two_axes": {"axis": (-1, 1)},
    "draws": {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.uniform()},
    "bfloat16": {"dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.float16},
    "float32_result": {"dtype": jnp.float32, "use_fast_variance": False},
}
PRECISION = {"float32": 5e-6, "bfloat16": 2**-7, "float16": 2**-10}  # of the short ones: about one rounding


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("no_scale", "float32"),
        ("two_axes", "float32"),
        ("draws", "float32"),
        ("param_dtype", "bfloat16"),
        *slow((name, "float32") for name in OPTIONS if name not in ("no_scale", "two_axes", "draws")),
        *slow([("default", "int32")]),
        *slow((name, "bfloat16") for name in ("default", "neither", "bfloat16", "float32_result")),
    ],
)
def test_linen_module_is_flaxs(name, dtype):
    """Bitwise the same initial variables; the same outputs, statistics, gradients and dtypes."""
    theirs, ours = linen_pair(**OPTIONS[name])
    x = normal(2, 8, 4, 3, 5, dtype=dtype)
    found, variables = (
        jax.jit(partial(m.init, use_running_average=False))(jax.random.key(0), x[0]) for m in (ours, theirs)
    )
    identical(found, variables)  # statistics are not updated
    variables = moved(variables)
    (found, found_steps), (expected, expected_steps) = (
        course(flaxs(m), *collections(variables), x) for m in (ours, theirs)
    )
    tolerance = PRECISION[str(expected_steps[0].dtype)]
    assert jax.tree.map(jnp.result_type, found_steps) == jax.tree.map(jnp.result_type, expected_steps)
    close(found, expected, rtol=5e-6)
    close(found_steps[:2], expected_steps[:2], rtol=tolerance)
    # The gradient to x is rounded to the dtype of x.
    close(found_steps[2:], expected_steps[2:], rtol=4 * max(tolerance, PRECISION.get(dtype, 0)))


def test_linen_module_in_float64(x64):
    theirs, ours = linen_pair(param_dtype=jnp.float64, momentum=0.5)
    x = normal(3, 8, 4, dtype=jnp.float64)
    variables = moved(theirs.init(jax.random.key(0), x[0], use_running_average=True), dtype=jnp.float64)
    close(*(course(flaxs(m), *collections(variables), x) for m in (ours, theirs)))


def test_stored_statistics_may_be_narrow():
    """`force_float32_reductions=False` keeps the dtype of what is stored, but reductions are in float32."""
    theirs, ours = linen_pair(force_float32_reductions=False, param_dtype=jnp.bfloat16)
    x = normal(64, 4, dtype=jnp.bfloat16)
    variables = theirs.init(jax.random.key(0), x, use_running_average=False)
    identical(ours.init(jax.random.key(0), x, use_running_average=False), variables)
    y, new = ours.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    assert y.dtype == new["batch_stats"]["var"].dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    close(y, (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5), rtol=2**-8)


@pytest.mark.parametrize("use_fast_variance", [True, False])
def test_modules_are_right_far_from_zero(use_fast_variance):
    """At mean / std = 1e4, E[x^2] - E[x]^2 in float32 has no correct digit."""
    x = 1e4 + normal(256, 4)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    theirs, ours = linen_pair(use_running_average=False, use_fast_variance=use_fast_variance)
    variables = theirs.init(jax.random.key(0), x)

    def error(y):
        return np.abs(y - exact).max()

    y, _ = ours.apply(variables, x, mutable=["batch_stats"])
    assert error(y) < 2e-6
    assert error(our_nnx.BatchNorm(4, use_fast_variance=use_fast_variance, rngs=nnx.Rngs(0))(x)) < 2e-6
    flaxs, _ = theirs.apply(variables, x, mutable=["batch_stats"])
    assert error(flaxs) > (0.1 if use_fast_variance else 2e-5)


def train(net, variables, x, y, steps):
    """SGD as a user of Flax writes it."""
    optimizer = optax.sgd(0.1)

    @jax.jit
    def step(params, batch_stats, state):
        def loss(params):
            logits, new = net.apply({"params": params, "batch_stats": batch_stats}, x, True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), new["batch_stats"]

        (value, batch_stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), batch_stats, state, value

    params, batch_stats = variables["params"], variables["batch_stats"]
    state, values = optimizer.init(params), []
    for _ in range(steps):
        params, batch_stats, state, value = step(params, batch_stats, state)
        values.append(value)
    return {"params": params, "batch_stats": batch_stats}, np.array(values)


@pytest.mark.slow
def test_training_a_network_with_one_class_replaced(x64, blobs):
    """Same names, same initialization, and the same course of training, in float64 where rounding does not grow."""
    x, y = blobs.train_x.astype(np.float64), blobs.train_y
    nets = [Net((16, 8), 4, NETWORKS[0], norm) for norm in (nn.BatchNorm, to_from_flax.BatchNorm)]
    variables = [jax.jit(net.init, static_argnums=2)(jax.random.key(0), x, False) for net in nets]
    identical(*variables)
    start = jax.tree.map(lambda v: v.astype(jnp.float64), variables[0])
    (theirs, expected), (ours, losses) = (train(net, start, x, y, steps=30) for net in nets)
    assert losses[-1] < 0.5 * losses[0]
    close(losses, expected)
    close(ours, theirs)
    close(*(net.apply(ours, blobs.test_x, False) for net in nets))


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_linen_masks(dtype):
    theirs, ours = linen_pair(use_running_average=False)
    x = normal(8, 3, 4)
    mask = np.random.default_rng(0).uniform(size=(8, 3, 1)) < 0.6
    variables = moved(theirs.init(jax.random.key(0), x))
    expected, new = theirs.apply(variables, x, mask=jnp.asarray(mask), mutable=["batch_stats"])
    hidden = jnp.where(mask, x, jnp.nan)
    y, mine = ours.apply(variables, hidden, mask=mask.astype(dtype), mutable=["batch_stats"])
    valid = np.broadcast_to(mask, x.shape)
    close(np.asarray(y)[valid], np.asarray(expected)[valid])
    close(mine, new)
    bias = np.broadcast_to(variables["params"]["bias"], x.shape)
    np.testing.assert_array_equal(np.asarray(y)[~valid], bias[~valid])
    y = ours.apply(variables, hidden, use_running_average=None, mask=mask, mutable=["batch_stats"])[0]
    assert np.isfinite(y).all()
    # Of fewer axes than x, as it broadcasts.
    time = jnp.array([[True], [False], [True]])
    expected, new = theirs.apply(variables, x, mask=time, mutable=["batch_stats"])
    y, mine = ours.apply(variables, x, mask=time, mutable=["batch_stats"])
    close(y[:, ::2], expected[:, ::2])
    close(mine, new)


def test_a_mask_in_initialization():
    theirs, ours = linen_pair(use_running_average=False)
    x, mask = normal(8, 4), jnp.arange(8)[:, None] < 5
    expected, variables = theirs.init_with_output(jax.random.key(0), x, mask=mask)
    y, found = ours.init_with_output(jax.random.key(0), x, mask=mask)
    identical(found, variables)
    close(y[:5], expected[:5])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 4)])
def test_linen_axis_name(shape):
    """[6, 5, 4]: batches of 5; [6, 4]: single examples. The axis need not exist in initialization."""
    theirs, ours = linen_pair(use_running_average=False, axis_name="batch")
    x = normal(*shape)
    variables = theirs.init(jax.random.key(0), x[0])
    identical(ours.init(jax.random.key(0), x[0]), variables)
    variables = moved(variables)
    (y, mine), (expected, new) = (
        jax.vmap(partial(m.apply, variables, mutable=["batch_stats"]), axis_name="batch")(x) for m in (ours, theirs)
    )
    close(y, expected)
    close(mine, new)


def test_a_checkpoint_of_flaxs_module_loads():
    theirs, ours = linen_pair(use_running_average=True)
    x = normal(8, 4)
    variables = moved(theirs.init(jax.random.key(0), x))
    target = ours.init(jax.random.key(1), x)
    loaded = serialization.from_bytes(target, serialization.to_bytes(variables))
    identical(loaded, variables)
    close(ours.apply(loaded, x), theirs.apply(variables, x))


def test_statistics_must_be_mutable_in_training_as_in_flax():
    ours = to_from_flax.BatchNorm(use_running_average=False)
    variables = ours.init(jax.random.key(0), normal(8, 4))
    with pytest.raises(ModifyScopeVariableError):
        ours.apply(variables, normal(8, 4))


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"axis_name": "batch", "axis_index_groups": [[0]]}, {}, "axis_index_groups"),
        ({"momentum": None}, {}, "momentum=None"),
        ({}, {"mask": np.ones((8, 4), bool)}, r"mask \(8, 4\) must broadcast to \(8, 1\)"),
    ],
)
def test_module_errors(options, call, message):
    x = normal(8, 4)
    ours = to_from_flax.BatchNorm(use_running_average=False, **options)
    variables = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=message):
        ours.apply(variables, x, mutable=["batch_stats"], **call)
    with pytest.raises(ValueError, match=message):
        our_nnx.BatchNorm(4, rngs=nnx.Rngs(0), **options)(x, **call)


# nnx.


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("no_bias", "float32"),
        ("channels_first", "float32"),
        ("bfloat16", "bfloat16"),
        *slow((name, "float32") for name in OPTIONS if name not in ("no_bias", "channels_first", "two_axes")),
        *slow([("default", "bfloat16"), ("neither", "bfloat16")]),
    ],
)
def test_nnx_module_is_flaxs(name, dtype):
    options = OPTIONS[name]
    x = normal(2, 8, 4, 3, 4, dtype=dtype)
    theirs, ours = (cls(4, rngs=nnx.Rngs(0), **options) for cls in (nnx.BatchNorm, our_nnx.BatchNorm))
    identical(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)))
    for batch in x:
        for mode in ("train", "eval"):
            expected, y = (getattr(layer, mode)() or layer(batch) for layer in (theirs, ours))
            assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
            close(y, expected, rtol=4 * PRECISION[str(y.dtype)])  # Flax computes in that dtype, too
    # Flax averages in the dtype of its computation.
    found, expected = (nnx.to_pure_dict(nnx.state(layer)) for layer in (ours, theirs))
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, expected)
    close(found, expected, rtol=5e-6)


def test_nnx_training_a_network_with_one_class_replaced(blobs):
    """Under `nnx.jit`, with an optimizer, and in evaluation; float32, in which 10 steps stay within 2e-5."""

    class Network(nnx.Module):
        def __init__(self, norm):
            rngs = nnx.Rngs(0)
            self.hidden = nnx.Linear(12, 16, rngs=rngs)
            self.norm = norm(16, momentum=0.9, rngs=rngs)
            self.output = nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, x):
            return self.output(nnx.relu(self.norm(self.hidden(x))))

    @nnx.jit
    def step(network, optimizer):
        def loss(network):
            losses = optax.softmax_cross_entropy_with_integer_labels(network(blobs.train_x), blobs.train_y)
            return losses.mean()

        value, gradient = nnx.value_and_grad(loss)(network)
        optimizer.update(network, gradient)
        return value

    results = []
    for norm in (nnx.BatchNorm, our_nnx.BatchNorm):
        network = Network(norm)
        optimizer = nnx.Optimizer(network, optax.sgd(0.1), wrt=nnx.Param)
        losses = np.array([step(network, optimizer) for _ in range(10)])
        network.eval()
        results.append((losses, network(blobs.test_x), nnx.to_pure_dict(nnx.state(network))))
    assert results[0][0][-1] < 0.7 * results[0][0][0]
    close(*results, rtol=2e-5)


def test_nnx_masks_axis_name_and_modes():
    theirs, ours = (cls(4, rngs=nnx.Rngs(0)) for cls in (nnx.BatchNorm, our_nnx.BatchNorm))
    x, mask = normal(8, 4), jnp.arange(8)[:, None] < 5
    expected, y = (layer(x, mask=mask) for layer in (theirs, ours))
    close(y[:5], expected[:5])
    close(ours.mean[...], theirs.mean[...])
    close(ours.var[...], theirs.var[...])
    before = jnp.array(ours.var[...])
    ours(x, use_running_average=True)
    identical(before, ours.var[...])
    ours.use_running_average = None
    with pytest.raises(ValueError, match="use_running_average"):
        ours(x)

    theirs, ours = (cls(4, axis_name="batch", rngs=nnx.Rngs(0)) for cls in (nnx.BatchNorm, our_nnx.BatchNorm))
    axes = nnx.StateAxes({nnx.Param: None, nnx.BatchStat: None})

    def run(layer):
        return nnx.vmap(lambda m, x: m(x), in_axes=(axes, 0), axis_name="batch")(layer, x)

    close(run(ours), run(theirs))
    close(ours.var[...], theirs.var[...])


def test_importing_the_package_or_the_torch_module_imports_neither_flax_nor_torch():
    code = "import sys, bnjax.interop.torch; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    assert not {"flax", "torch"} & {*loaded}
