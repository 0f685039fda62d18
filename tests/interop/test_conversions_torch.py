"""To and from PyTorch, against what it computed (`golden/make_torch_mlp.py`); and what does not fit, of Flax too."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import NETWORKS, close, course, identical, moved, ours

import bnjax
from bnjax import batch_norm
from bnjax.interop import flax as to_from_flax
from bnjax.interop import torch as to_from_torch

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "torch_mlp.npz")
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
        (lambda: to_from_torch.mlp_to_torch(bnjax.mlp(norm="layer"), {}, {}), "converted; the model has 'layer'"),
    ],
)
def test_errors_name_what_does_not_fit(convert, message):
    with pytest.raises(ValueError, match=message):
        convert()
