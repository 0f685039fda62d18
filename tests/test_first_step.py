"""What one step does to weight matrices: the law of orthogonal gradients, in float64."""

import functools

import jax
import numpy as np
import pytest
import quick

import bnjax
from bnjax import probes

EPSILONS, SCALES = np.array([1e-5, 1e-14]), np.array([0.01, 1.0])


@pytest.fixture(scope="module")
def first_step(blobs):
    """(detach) -> of [epsilon, init_scale, two seeds], by layer. Each is one program, compiled once."""

    @functools.cache
    def call(detach=()):
        def at(seed, scale, epsilon, ds):
            model = bnjax.mlp((16,), 4, epsilon=epsilon, detach=detach)
            params, stats = model.init(jax.random.key(seed), (12,), scale)
            params = jax.tree.map(lambda a: a.astype(np.float64), params)
            return probes.first_step(model, params, stats, ds.train_x, ds.train_y, learning_rate=0.1)

        with jax.enable_x64(True):
            over = jax.vmap(at, (0, None, None, None))
            over = jax.vmap(jax.vmap(over, (None, 0, None, None)), (None, None, 0, None))
            ds = blobs._replace(train_x=blobs.train_x[:64].astype(np.float64), train_y=blobs.train_y[:64])
            program = jax.jit(over, compiler_options=quick.as_users())  # unoptimized, it loses digits on JAX 0.10
            return jax.tree.map(np.asarray, program(np.arange(2), SCALES, EPSILONS, ds))

    return call


def test_weights_grow_as_the_law_says(first_step):
    """|W_1|^2 = |W_0|^2 + lr^2 |g|^2 in float64, where it is the growth that counts; epsilon is the rest."""
    for i, (low, high) in enumerate(((1e-6, 1e-2), (0, 1e-9))):
        found = jax.tree.map(lambda a, i=i: a[i], first_step()["hidden_0"])
        growth = found.norm_after**2 - found.norm_before**2
        error = np.abs(growth / (0.1 * found.gradient_norm) ** 2 - 1)
        assert (growth[0] > 10 * found.norm_before[0] ** 2).all()
        # What epsilon adds is 2 <W, g> / (lr |g|^2) ~ epsilon / lr, whatever the scale.
        assert low <= error.max() < high


def test_detached_statistics_break_the_law(first_step):
    found = {"BN": first_step(), "var": first_step(("var",))}
    cosine = {name: np.abs(one["hidden_0"].radial_cosine[0, 1]) for name, one in found.items()}
    assert cosine["BN"].max() < 1e-4
    assert cosine["var"].min() > 1e-3


def test_it_is_the_step_that_sgd_takes(first_step):
    """Norms and ranks against NumPy, at scale 1."""
    model = bnjax.mlp((16,), 4)
    assert list(first_step()) == ["hidden_0", "output"]
    params, _ = model.init(jax.random.key(0), (12,), 1.0)
    matrix = np.asarray(params["hidden_0"]["kernel"], float)
    found = jax.tree.map(lambda a: a[0, 1, 0], first_step())["hidden_0"]
    assert found.norm_before == pytest.approx(np.linalg.norm(matrix), rel=1e-6)
    sizes = np.linalg.svd(matrix, compute_uv=False)
    assert found.rank_before == pytest.approx((sizes**2).sum() / sizes[0] ** 2, rel=1e-6)
