"""Makes torch_batch_norm.npz: what PyTorch's batch normalization gives, for tests/test_oracles.py.

PyTorch is no requirement of this project, nor of its tests, so its results are stored. To make them again, in
an environment of its own:

    pip install torch==2.13.0 numpy==2.4.6 expecttest==0.3.0
    python tests/golden/make_torch_batch_norm.py

The stored file was made by these versions (CPU build of torch, Python 3.11.7); it holds their numbers, as JSON in
`meta`, beside the list of its cases. All draws are seeded: the same versions on the same kind of CPU give the
same bytes. The arrays of a case have the case's name and a slash before their own.

    layers   nn.BatchNorm1d, 2d and 3d in both modes: output, running statistics after it, the gradient of
             sum(weights * sin(output)) with respect to input, weight and bias, and in float64 its
             Hessian-vector product, by double backward.
    running  Running statistics after each of 50 steps, with momentum 0.1 and None, and the batches' own
             means and biased variances.
    opinfo   PyTorch's own sample inputs of nn.functional.batch_norm: output, running statistics after it, and
             the gradient of sum(cos(output)).
"""

import json
import platform
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.testing._internal.common_methods_invocations import op_db

PATH = Path(__file__).with_name("torch_batch_norm.npz")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LAYERS = (  # name, layer, shape, epsilon, whether it has weight and bias
    ("NC", torch.nn.BatchNorm1d, (8, 3), 1e-5, True),
    ("NCHW", torch.nn.BatchNorm2d, (3, 3, 4, 2), 0.1, False),
    ("NCDHW", torch.nn.BatchNorm3d, (2, 3, 2, 3, 2), 1e-5, True),
)
STEPS = 50
RUNNING = (  # the same 48 numbers a step, shared out differently
    ("NCL", torch.nn.BatchNorm1d, (4, 3, 4)),
    ("NCHW", torch.nn.BatchNorm2d, (4, 3, 2, 2)),
    ("NCDHW", torch.nn.BatchNorm3d, (2, 3, 2, 2, 2)),
)


def draw(shape, mean=0.0, std=1.0):
    """Normal numbers that float32 holds exactly, as float64."""
    return (mean + std * torch.randn(shape)).double()


def layers(arrays):
    for name, layer_type, shape, epsilon, affine in LAYERS:
        offset = torch.linspace(-2, 1, 3).reshape(1, 3, *[1] * (len(shape) - 2))
        inputs = {"x": draw(shape, offset, 1.5), "weights": draw(shape), "dx": draw(shape)}
        inputs |= {"mean": draw(3), "var": (draw(3).square() + 0.25).float().double()}
        names = ["x"]
        if affine:
            inputs |= {key: draw(3) for key in ("scale", "bias", "dscale", "dbias")}
            names += ["scale", "bias"]
        for key, value in inputs.items():
            arrays[f"{name}/{key}"] = value.float()
        for mode in ("train", "eval"):
            for dtype_name, dtype in DTYPES.items():
                values = {key: value.to(dtype) for key, value in inputs.items()}
                layer = layer_type(3, eps=epsilon, affine=affine, dtype=dtype).train(mode == "train")
                layer.running_mean.copy_(values["mean"])
                layer.running_var.copy_(values["var"])
                leaves = [values["x"].requires_grad_()]
                if affine:
                    layer.weight.data.copy_(values["scale"])
                    layer.bias.data.copy_(values["bias"])
                    leaves += [layer.weight, layer.bias]
                y = layer(leaves[0])
                loss = (values["weights"] * y.sin()).sum()
                gradients = torch.autograd.grad(loss, leaves, create_graph=True)
                results = {"y": y, "mean": layer.running_mean, "var": layer.running_var}
                results |= {f"grad_{key}": g for key, g in zip(names, gradients, strict=True)}
                if dtype == torch.float64:
                    slope = sum((g * values[f"d{key}"]).sum() for key, g in zip(names, gradients, strict=True))
                    products = torch.autograd.grad(slope, leaves)
                    results |= {f"hvp_{key}": p for key, p in zip(names, products, strict=True)}
                for key, value in results.items():
                    arrays[f"{name}/{mode}/{dtype_name}/{key}"] = value
    return [{"name": name, "epsilon": epsilon, "affine": affine} for name, _, _, epsilon, affine in LAYERS]


def running(arrays):
    # Statistics that drift, so that the order of the batches matters.
    time = torch.linspace(0, 1, STEPS)[:, None]
    batches = draw((STEPS, 48), torch.sin(7 * time), 1 + 2 * time)
    arrays["running/batches"] = batches.float()
    cases = []
    for name, layer_type, shape in RUNNING:
        for dtype_name, dtype in DTYPES.items():
            xs = batches.to(dtype).reshape(STEPS, *shape)
            axes = [a + 1 for a in range(len(shape)) if a != 1]
            var, mean = torch.var_mean(xs, axes, correction=0)
            arrays[f"running/{name}/{dtype_name}/batch_mean"] = mean
            arrays[f"running/{name}/{dtype_name}/batch_var"] = var
            for momentum in (0.1, None):
                layer = layer_type(3, momentum=momentum, dtype=dtype).train()
                history = []
                for x in xs:
                    layer(x)
                    history.append(torch.stack([layer.running_mean, layer.running_var]))
                arrays[f"running/{name}/{dtype_name}/{momentum}"] = torch.stack(history)
        cases.append({"name": name, "shape": shape})
    return cases


def opinfo(arrays):
    (op,) = (op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name)
    cases = []
    for dtype_name, dtype in DTYPES.items():
        torch.manual_seed(0)
        for i, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=False)):
            values = dict(zip(("mean", "var", "scale", "bias"), sample.args, strict=True))
            values = {"x": sample.input, **{key: value for key, value in values.items() if value is not None}}
            values = {key: value.detach().clone() for key, value in values.items()}
            name = f"opinfo{i}/{dtype_name}"
            for key, value in values.items():
                arrays[f"{name}/{key}"] = value.clone()  # the call overwrites its running statistics
            names = [key for key in ("x", "scale", "bias") if key in values]
            leaves = [values[key].requires_grad_() for key in names]
            y = functional.batch_norm(
                values["x"], *(values.get(key) for key in ("mean", "var", "scale", "bias")), **sample.kwargs
            )
            gradients = torch.autograd.grad(y.cos().sum(), leaves)
            results = {"y": y, **{f"grad_{key}": g for key, g in zip(names, gradients, strict=True)}}
            results |= {f"after_{key}": values[key] for key in ("mean", "var") if key in values}
            for key, value in results.items():
                arrays[f"{name}/{key}"] = value
            cases.append({"name": name, "dtype": dtype_name, **sample.kwargs})
    return cases


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the order of sums, and so the last bits, could depend on it
    arrays = {}
    meta = {"layers": layers(arrays), "running": running(arrays), "opinfo": opinfo(arrays)}
    meta["versions"] = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    arrays = {key: value.detach().numpy() for key, value in arrays.items()}
    np.savez_compressed(PATH, meta=np.array(json.dumps(meta)), **arrays)
    print(f"{len(arrays)} arrays, {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
