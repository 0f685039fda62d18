"""Sweeps in JAX: bnjax's, the matrix products alone, Flax, a loop over a jitted step, and what bnjax's is made of.

Each function makes ready (data, compilation, one run to warm up) what a measurement calls, and returns it with what
there is to know of it ({"width": 16}): `run()` does the work and returns how many cell-steps it was.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bnjax
from experiments.benchmark import processes, workloads
from experiments.benchmark.workloads import Workload

Ready = tuple[Callable[[], int], dict[str, int]]  # (run, {what: how many})
WIDTHS = (1, 2, 4, 8, 16)  # of the matrix products alone


def seconds_of(run: Callable[[], Any]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def repeated(run: Callable[[], int], seconds: float, **known: int) -> Ready:
    """The run, compiled by a first one, as often as about fills the time."""
    first = seconds_of(run)
    once = first if first > 10 * seconds + 10 else seconds_of(run)  # compilation apart, if that can change a thing
    times = max(1, round(seconds / once))
    return (lambda: sum(run() for _ in range(times))), known


def sgd(momentum: float | None = workloads.MOMENTUM) -> optax.GradientTransformation:
    """The optimizer of all."""
    return optax.sgd(workloads.LEARNING_RATE, momentum=momentum)


def bnjax_sweep(
    w: Workload, cells: int, steps: int, seconds: float, *, evaluations: int = 1, width: int | None = None
) -> Ready:
    """`bnjax.sweep` as a user calls it, on all local devices; the test split is evaluated `evaluations` times.

    Its width is the one that it chooses by size. At a given `width` there are as many cells as it takes at least.
    """
    model = bnjax.mlp(w.features, w.sizes[-1], w.activation)
    config = bnjax.TrainConfig(steps, w.batch_size, eval_every=max(1, -(-steps // evaluations)))
    ds = bnjax.Dataset(*workloads.data(w))
    hyper = bnjax.Hyperparams(learning_rate=workloads.LEARNING_RATE, momentum=workloads.MOMENTUM)
    cells, known = max(cells, (width or 1) * jax.local_device_count()), {}

    def run():
        results = bnjax.sweep(model, ds, config, {"seed": range(cells)}, hyper=hyper, width=width, progress=False)
        (plan,) = results.attrs["plan"].values()  # of the one model
        known["width"] = plan["width"]
        return cells * steps

    ready, _ = repeated(run, seconds)
    return ready, known


def on_all_devices(function: Callable, same: int = 0) -> Callable:
    """The function on each local device with its part of the first arguments, and the last `same` ones whole."""
    mesh = Mesh(np.asarray(jax.local_devices()), ("cells",))
    split, whole = PartitionSpec("cells"), PartitionSpec()

    def call(*args):
        count = len(args) - same
        specs = (split,) * count + (whole,) * same
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(*args)

    return jax.jit(call)


def put(value: Any, split: bool) -> Any:
    """The arrays on all local devices, cut along their first axis or whole on each."""
    mesh = Mesh(np.asarray(jax.local_devices()), ("cells",))
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec("cells") if split else PartitionSpec()))


# The matrix products alone


def products_of_a_step(x: jax.Array, kernels: list[jax.Array]) -> list[jax.Array]:
    """Forward, then for each layer from the last the gradients to its weights and (but for the first) its input."""
    inputs = [x]
    for kernel in kernels:
        inputs.append(inputs[-1] @ kernel)
    g, gradients = inputs.pop(), []
    for i in reversed(range(len(kernels))):
        gradients.append(inputs[i].T @ g)
        if i:
            g = g @ kernels[i].T
    return gradients


def products_loop(step: Callable, steps: int, x: jax.Array, kernels: list[jax.Array]) -> list[jax.Array]:
    """The products `steps` times, none of them left out: to the compiler each iteration has new operands."""

    def body(_, carry):
        x, kernels, _ = jax.lax.optimization_barrier(carry)
        return x, kernels, step(x, kernels)

    start = [jnp.zeros_like(kernel) for kernel in reversed(kernels)]
    return jax.lax.fori_loop(0, steps, body, (x, kernels, start))[2]


def products_at(w: Workload, steps: int, width: int) -> Callable[[], int]:
    """The products of `width` networks at once on each device; compiled."""
    devices = jax.local_device_count()
    group = () if width == 1 else (width,)
    step = products_of_a_step if width == 1 else jax.vmap(products_of_a_step)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal((devices, *group, *shape), np.float32)

    kernels = [normal(i, o) / np.float32(i**0.5) for i, o in zip(w.sizes, w.sizes[1:], strict=False)]
    x, kernels = put((normal(w.batch_size, w.sizes[0]), kernels), split=True)

    def on_a_device(x, kernels):
        x, kernels = jax.tree.map(lambda a: a[0], (x, kernels))
        return jax.tree.map(lambda a: a[None], products_loop(step, steps, x, kernels))

    program = on_all_devices(on_a_device).lower(x, kernels).compile()

    def run():
        jax.block_until_ready(program(x, kernels))
        return devices * width * steps

    return run


def products(w: Workload, cells: int, steps: int, seconds: float) -> Ready:
    """The matrix products alone at the fastest of some widths: the limit of what any of the others can reach."""
    del cells
    speeds = {}
    for width in WIDTHS:
        run = products_at(w, max(1, steps // width), width)
        run()
        speeds[width] = max(run() / seconds_of(run) for _ in range(3))
    best = max(speeds, key=speeds.get)
    return repeated(products_at(w, max(1, steps // best), best), seconds, width=best)


# The code that others write


def training_step(apply: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """(state, x, y) -> (state, loss), where the state is (params, batch_stats, opt_state).

    Args:
      apply: (params, batch_stats, x) -> (logits, new batch_stats), in training mode.
      optimizer: of the parameters.
    """

    def step(state, x, y):
        params, batch_stats, opt_state = state

        def loss_fn(params):
            logits, new = apply(params, batch_stats, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

    return step


def flax_network(w: Workload) -> tuple[Callable, Callable]:
    """(init, step) of the network in flax.linen: init is key -> state, for `training_step`."""
    import flax.linen as nn

    he_normal = nn.initializers.he_normal()
    normalization = partial(nn.BatchNorm, momentum=workloads.BN_MOMENTUM, epsilon=workloads.EPSILON)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in w.features:
                x = nn.Dense(width, use_bias=False, kernel_init=he_normal)(x)
                x = normalization(use_running_average=False)(x)
                x = getattr(nn, w.activation)(x)
            return nn.Dense(w.sizes[-1], kernel_init=he_normal)(x)

    network, optimizer = Network(), sgd()

    def init(key):
        variables = network.init(key, jnp.zeros((1, w.sizes[0])))
        return variables["params"], variables["batch_stats"], optimizer.init(variables["params"])

    def apply(params, batch_stats, x):
        logits, new = network.apply({"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    return init, training_step(apply, optimizer)


def training(init: Callable, step: Callable, same: int | None = None) -> Callable:
    """(seed, x, y, order) -> the loss of each step: of the batches in order, or always of the first `same` examples."""

    def train(seed, x, y, order):
        def one(state, chosen):
            return step(state, x[chosen], y[chosen]) if same is None else step(state, x[:same], y[:same])

        return jax.lax.scan(one, init(jax.random.key(seed)), order)[1]

    return train


def flax(w: Workload, cells: int, steps: int, seconds: float) -> Ready:
    """jit(vmap(scan)) over all cells at once."""
    x, y, *_ = map(jnp.asarray, workloads.data(w))
    order = jnp.asarray(workloads.batches(w, steps))
    program = jax.jit(jax.vmap(training(*flax_network(w)), in_axes=(0, None, None, None)))
    seeds = jnp.arange(cells)

    def run():
        program(seeds, x, y, order).block_until_ready()
        return cells * steps

    return repeated(run, seconds)


def bnjax_network(w: Workload, *, norm: str = "batch", momentum: float | None = workloads.MOMENTUM):
    """(init, step) of bnjax's own network, as `flax_network` has them; nothing is checked."""
    model = bnjax.mlp(w.features, w.sizes[-1], w.activation, norm, use_bias=False)
    optimizer = sgd(momentum)

    def init(key):
        params, batch_stats = model.init(key, (w.sizes[0],), 1.0)
        return params, batch_stats, optimizer.init(params)

    return init, training_step(partial(model.apply, train=True), optimizer)


def jax_loop(w: Workload, cells: int, steps: int, seconds: float) -> Ready:
    """A jitted step in a loop, one network after another; as many networks as about fill the time."""
    del cells
    init, step = bnjax_network(w)
    x, y, *_ = map(jnp.asarray, workloads.data(w))
    order = workloads.batches(w, steps)
    init = jax.jit(init)

    @partial(jax.jit, donate_argnums=0)
    def jitted(state, x, y, chosen):
        return step(state, x[chosen], y[chosen])

    def run():
        state = init(jax.random.key(0))
        for chosen in order:
            state, loss = jitted(state, x, y, chosen)
        loss.block_until_ready()
        return steps

    return repeated(run, seconds)


# The parts of a sweep, each beside those before it


def part(w: Workload, cells: int, steps: int, seconds: float, *, name: str, width: int) -> Ready:
    """A sweep that does no more than the part of that name and those before it, on bnjax's devices at its width."""
    if name == "products_at_width":
        return repeated(products_at(w, steps, width), seconds, width=width)
    parts = [*processes.PARTS]
    has = parts[: parts.index(name) + 1]
    norm, momentum = "batch" if "batch_norm" in has else "none", workloads.MOMENTUM if "momentum" in has else None
    network = bnjax_network(w, norm=norm, momentum=momentum)
    train = training(*network, same=None if "shuffle" in has else w.batch_size)

    def group(seeds, *data):
        if width == 1:
            return train(seeds[0], *data)[None]
        return jax.vmap(train, in_axes=(0, *[None] * len(data)))(seeds, *data)

    x, y, *_ = workloads.data(w)
    data = put((x, y, workloads.batches(w, steps)), split=False)
    chunk = width * jax.local_device_count()
    chunks = [put(np.arange(start, start + chunk), split=True) for start in range(0, cells, chunk)]
    program = on_all_devices(group, same=len(data))

    def run():
        for seeds in chunks:
            np.asarray(program(seeds, *data))
        return chunk * len(chunks) * steps

    return repeated(run, seconds)
