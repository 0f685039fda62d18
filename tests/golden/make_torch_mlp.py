"""Makes torch_mlp.npz, what PyTorch computes, in float64; `tests/interop` reads it.

    python tests/golden/make_torch_mlp.py

Made with PyTorch 2.13.0 (CPU), which nothing else here needs. An entry's name is CASE/NAME; `before/...` is a
state dict before the training batches, `after/...` its statistics after them.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

WIDTHS = (6, 5, 4, 3)  # inputs, two hidden layers, outputs
BATCHES, N = 3, 6


def scramble(module, generator):
    """Draws all parameters and statistics, so that none has its initial value."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(3)
            else:
                value.uniform_(0.5, 1.5, generator=generator)
            if name.endswith("weight") and value.ndim == 2:
                value.sub_(1)


def mlp(activation, norm, use_bias):
    """Linear, BatchNorm1d and activation in the order of `norm`, and a last Linear."""
    modules = []
    for n, m in pairwise(WIDTHS[:-1]):
        modules.append(nn.Linear(n, m, bias=use_bias))
        if norm == "before_activation":
            modules += [nn.BatchNorm1d(m), activation()]
        elif norm == "after_activation":
            modules += [activation(), nn.BatchNorm1d(m)]
        else:
            modules += [activation()]
    return nn.Sequential(*modules, nn.Linear(*WIDTHS[-2:]))


def record(module, x):
    """Evaluation, training on each batch of x [BATCHES, N, ...] in turn, and evaluation again."""
    results = {f"before/{name}": value.clone() for name, value in module.state_dict().items()}
    results["x"] = x
    results["eval_before"] = module.eval()(x[0])
    outputs = torch.stack([module.train()(batch) for batch in x])
    results["train"] = outputs
    results |= {f"after/{name}": value.clone() for name, value in module.named_buffers()}
    results["eval_after"] = module.eval()(x[0])
    if outputs.requires_grad:
        outputs.square().sum().backward()
    results |= {f"gradient/{name}": value.grad for name, value in module.named_parameters()}
    return results


def main():
    """Writes torch_mlp.npz beside this file."""
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    cases = {
        "relu_before": mlp(nn.ReLU, "before_activation", use_bias=False),
        "linear_before_bias": mlp(nn.Identity, "before_activation", use_bias=True),
        "sigmoid_after": mlp(nn.Sigmoid, "after_activation", use_bias=True),
        "gelu_after_no_bias": mlp(lambda: nn.GELU(approximate="tanh"), "after_activation", use_bias=False),
        "tanh_none": mlp(nn.Tanh, "none", use_bias=True),
        "layer": nn.BatchNorm1d(4, momentum=0.3, eps=1e-3),
        "layer_cumulative": nn.BatchNorm1d(4, momentum=None),
        "layer_no_bias": nn.BatchNorm1d(4, bias=False),
        "layer_not_affine": nn.BatchNorm1d(4, affine=False),
        "layer_images": nn.BatchNorm2d(4),
    }
    arrays = {}
    for case, module in cases.items():
        scramble(module, generator)
        is_layer = case.startswith("layer")
        example = (4, 2, 3) if case == "layer_images" else (4,) if is_layer else WIDTHS[:1]
        x = 1 + 2 * torch.randn((BATCHES, N, *example), generator=generator)
        arrays |= {f"{case}/{name}": v.detach().numpy() for name, v in record(module, x).items()}
    np.savez_compressed(Path(__file__).with_name("torch_mlp.npz"), **arrays)


if __name__ == "__main__":
    main()
