"""Statistics shared over devices and over processes, against one device with the whole batch."""

import functools
import socket

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from processes import end_as_python, end_of, start

from bnjax import batch_norm
from bnjax.types import BatchNormParams

SIZE, FEATURES, EPSILON = 24, 3, 1e-3
SCALE, BIAS = np.array([2.0, -1.0, 0.5], np.float32), np.array([0.1, 0.0, -1.0], np.float32)


def problem():
    """A batch at a mean of 100 standard deviations, weights for its outputs, and which samples are valid.

    With 4 devices of 6 samples: 4, none, 1 and 6 are.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(100.0, 1.0, size=(SIZE, FEATURES)).astype(np.float32)
    weights = rng.normal(size=(SIZE, FEATURES)).astype(np.float32)
    mask = np.array([1, 1, 0, 1, 1, 0] + 6 * [0] + [0, 0, 1, 0, 0, 0] + 6 * [1], bool)[:, None]
    return np.where(mask, x, np.nan), weights, mask


def expected():
    """In float64: output, running mean and variance after one batch at momentum 0, gradients to x, scale, bias."""
    x, g, mask = problem()
    valid = mask[:, 0]
    x, g_valid = x[valid].astype(np.float64), g[valid].astype(np.float64)
    sigma = np.sqrt(x.var(0) + EPSILON)
    x_hat = (x - x.mean(0)) / sigma
    y, gradient = np.tile(BIAS.astype(np.float64), (SIZE, 1)), np.zeros((SIZE, FEATURES))
    y[valid] += SCALE * x_hat
    gradient[valid] = SCALE / sigma * (g_valid - g_valid.mean(0) - x_hat * (x_hat * g_valid).mean(0))
    return {
        "y": y,
        "mean": x.mean(0),
        "var": x.var(0),
        "dx": gradient,
        "dscale": (g_valid * x_hat).sum(0),
        "dbias": g.astype(np.float64).sum(0),
    }


def compute(path):
    """What each device does with its part of the batch, gathered and saved."""
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    split = NamedSharding(mesh, P("devices"))
    x, weights, mask = (jax.make_array_from_callback(a.shape, split, lambda i, a=a: a[i]) for a in problem())

    def layer(params, stats, x, mask):
        return batch_norm.apply(
            params, stats, x, train=True, momentum=0.0, epsilon=EPSILON, mask=mask, axis_name="devices"
        )

    synced = jax.shard_map(
        layer, mesh=mesh, in_specs=(P(), P(), P("devices"), P("devices")), out_specs=(P("devices"), P())
    )

    @jax.jit
    def run(params, stats, x, mask, weights):
        def loss(params, x):
            y, new = synced(params, stats, x, mask)
            return (weights * y).sum(), (y, new)

        (dparams, dx), (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return {"y": y, "mean": new.mean, "var": new.var, "dx": dx, "dscale": dparams[0], "dbias": dparams[1]}

    found = run(BatchNormParams(SCALE, BIAS), batch_norm.init(FEATURES)[1], x, mask, weights)
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(found)
    if jax.process_index() == 0:
        np.savez(path, devices=jax.device_count(), **{name: np.asarray(a) for name, a in whole.items()})
    multihost_utils.sync_global_devices("saved")


def share(process, processes, devices_each, port, path):
    """One process, with devices of its own."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices_each)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    compute(path)


@pytest.mark.parametrize(("processes", "devices_each"), [(1, 4), (2, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_shared_statistics_are_those_of_the_whole_batch(processes, devices_each, tmp_path):
    """1e-5: some ten roundings of float32, at 1 / sigma and weights near 1."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    path = tmp_path / "found.npz"
    logs = [tmp_path / f"{process}.log" for process in range(processes)]
    options = {"processes": processes, "devices_each": devices_each, "port": port, "path": path}
    work = functools.partial(end_as_python, share)
    children = [start(work, log, process=process, **options) for process, log in enumerate(logs)]
    for child, log in zip(children, logs, strict=True):
        assert end_of(child, 240) == 0, log.read_text()[-3000:]
    found = np.load(path)
    assert found["devices"] == processes * devices_each
    for name, value in expected().items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
