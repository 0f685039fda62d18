"""Makes torch_norms.npz with PyTorch, in float64: `python tests/golden/make_torch_norms.py`.

For each case the input x, the module's output y, and the gradient of sum(y * cotangent) with respect to x. PyTorch has
images as NCHW; here they are NHWC.
"""

from pathlib import Path

import numpy as np
import torch

CASES = {
    "layer": (torch.nn.LayerNorm(12, eps=1e-5), (6, 12)),
    "layer_images": (torch.nn.LayerNorm([8, 3, 4], eps=1e-5), (5, 3, 4, 8)),
    "group": (torch.nn.GroupNorm(2, 8, eps=1e-5), (6, 8)),
    "group_images": (torch.nn.GroupNorm(4, 8, eps=1e-5), (5, 3, 4, 8)),
    "rms": (torch.nn.RMSNorm(12, eps=1e-5), (6, 12)),
    "instance_images": (torch.nn.InstanceNorm2d(8, eps=1e-5), (5, 3, 4, 8)),
}


def main():
    rng, found = np.random.default_rng(0), {"torch": np.array(torch.__version__)}
    for name, (module, shape) in CASES.items():
        x, cotangent = rng.normal(1, 2, shape), rng.normal(size=shape)
        to_torch = (0, 3, 1, 2) if len(shape) == 4 else (0, 1)
        back = (0, 2, 3, 1) if len(shape) == 4 else (0, 1)
        given = torch.tensor(x.transpose(to_torch), dtype=torch.float64, requires_grad=True)
        y = module.double()(given)
        (y * torch.tensor(cotangent.transpose(to_torch).copy())).sum().backward()
        arrays = {"x": x, "cotangent": cotangent, "y": y.detach().numpy().transpose(back)}
        arrays["dx"] = given.grad.numpy().transpose(back)
        found |= {f"{name}/{key}": value for key, value in arrays.items()}
    kernel, x = rng.normal(size=(4, 3)), rng.normal(size=(6, 4))
    module = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3, bias=False).double())
    with torch.no_grad():
        module.parametrizations.weight.original0.fill_(1.0)  # g
        module.parametrizations.weight.original1.copy_(torch.tensor(kernel.T))  # v
    module(torch.tensor(x)).square().sum().backward()
    gradient = module.parametrizations.weight.original1.grad.numpy().T
    found |= {"weight/kernel": kernel, "weight/x": x, "weight/w": module.weight.detach().numpy().T}
    found["weight/dkernel"] = gradient
    np.savez_compressed(Path(__file__).with_name("torch_norms.npz"), **found)


if __name__ == "__main__":
    main()
