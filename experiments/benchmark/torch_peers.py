"""Sweeps in PyTorch.

As in `jax_peers`, each function returns a run that is ready to be measured, and what there is to know of it.
"""

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state
from torch.nn.functional import cross_entropy

from experiments.benchmark import workloads
from experiments.benchmark.workloads import Workload

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def network(w: Workload) -> nn.Sequential:
    """The layers that `bnjax.interop.torch` describes, He normal."""
    layers = []
    for fan_in, width in zip(w.sizes, w.features, strict=False):
        norm = nn.BatchNorm1d(width, eps=workloads.EPSILON, momentum=1 - workloads.BN_MOMENTUM)
        layers += [nn.Linear(fan_in, width, bias=False), norm, ACTIVATIONS[w.activation]()]
    layers.append(nn.Linear(*w.sizes[-2:]))
    nn.init.zeros_(layers[-1].bias)
    for layer in layers[::3]:
        nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(*layers)


def optimizer(parameters) -> torch.optim.SGD:
    """SGD with momentum, in its fastest form on a CPU."""
    return torch.optim.SGD(parameters, lr=workloads.LEARNING_RATE, momentum=workloads.MOMENTUM, fused=True)


def eager_step(net: nn.Module, sgd: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One step of one network; the loss before it."""
    sgd.zero_grad()
    loss = cross_entropy(net(x), y)
    loss.backward()
    sgd.step()
    return loss.detach()


def eager(w: Workload, cells: int, steps: int, seconds: float) -> tuple[Callable[[], int], dict[str, int]]:
    """One network after another, with one thread; as many networks as about fill the time."""
    del cells
    torch.set_num_threads(1)
    x, y, order = tensors(w, steps)

    def run(order=order):
        net = network(w)
        sgd = optimizer(net.parameters())
        for chosen in order:
            eager_step(net, sgd, x[chosen], y[chosen])
        return len(order)

    run(order[: max(1, steps // 10)])  # warms up
    start = time.perf_counter()
    run()
    networks = max(1, round(seconds / (time.perf_counter() - start)))
    return (lambda: sum(run() for _ in range(networks))), {}


def vmap_step(w: Workload) -> Callable[[dict, dict, dict, torch.Tensor, torch.Tensor], torch.Tensor]:
    """`step(params, velocity, buffers, x, y)` of all networks at once, in place; returns the losses [cells]."""
    with torch.device("meta"):
        skeleton = network(w)

    def loss_fn(params, buffers, x, y):
        return cross_entropy(functional_call(skeleton, (params, buffers), (x,)), y)

    gradients = torch.vmap(grad_and_value(loss_fn), in_dims=(0, 0, None, None))

    @torch.no_grad()
    def step(params, velocity, buffers, x, y):
        grads, losses = gradients(params, buffers, x, y)  # and new running statistics in the buffers
        velocities, weights = list(velocity.values()), list(params.values())
        torch._foreach_mul_(velocities, workloads.MOMENTUM)
        torch._foreach_add_(velocities, [grads[name] for name in velocity])
        torch._foreach_add_(weights, velocities, alpha=-workloads.LEARNING_RATE)
        return losses

    return step


def stacked(nets: list[nn.Module]) -> tuple[dict, dict, dict]:
    """(params, velocity, buffers) of several networks, each entry with a leading axis [cells]."""
    params, buffers = stack_module_state(nets)
    params = {name: value.detach() for name, value in params.items()}
    return params, {name: torch.zeros_like(value) for name, value in params.items()}, buffers


def vmap(w: Workload, cells: int, steps: int, seconds: float) -> tuple[Callable[[], int], dict[str, int]]:
    """`torch.func.vmap` over all cells; as many steps, up to those asked for, as about fill the time.

    A run goes on where the last one ended: the few steps need not pay for the initialization.
    """
    x, y, order = tensors(w, steps)
    step = vmap_step(w)
    state = stacked([network(w) for _ in range(cells)])

    def run(order=order):
        for chosen in order:
            step(*state, x[chosen], y[chosen])
        return cells * len(order)

    run(order[:1])
    start = time.perf_counter()
    run(order[:3])
    a_step = (time.perf_counter() - start) / min(3, steps)
    few = max(1, min(steps, round(seconds / a_step)))
    return (lambda: run(order[:few])), {"steps": few}


def tensors(w: Workload, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y and the order of the examples, [steps, batch_size]."""
    x, y, *_ = workloads.data(w)
    return torch.from_numpy(x), torch.from_numpy(y).long(), torch.from_numpy(workloads.batches(w, steps))
