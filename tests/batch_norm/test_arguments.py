"""Arguments of the layer: axes, epsilon, modes; and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import compiled, draw, normalize, textbook

from bnjax import batch_norm
from bnjax.types import BatchStats


@pytest.mark.parametrize("axis", [-1, 1, (1, 3), (2,)])
def test_any_feature_axis(axis):
    """Against numpy in float64; float32 rounds 6e-8, and some tens of roundings make 1e-5 ample."""
    x = np.asarray(draw((4, 5, 6, 3), mean=3.0))
    features = {a % 4 for a in ((axis,) if isinstance(axis, int) else axis)}
    reduced = tuple(a for a in range(4) if a not in features)
    exact = x.astype(np.float64)
    mean, var = exact.mean(reduced, keepdims=True), exact.var(reduced, keepdims=True)
    actual = normalize(x, axis=axis)
    np.testing.assert_allclose(actual, (exact - mean) / np.sqrt(var + 1e-5), atol=1e-5)


def test_epsilon_of_any_type(x64):
    x = draw((8, 3)).astype(np.float32)
    types = (0, 1, np.float64(1e-3), np.float32(1e-3))

    def of(normalize, epsilon, x):
        return jax.grad(lambda x: (normalize(x, epsilon) ** 3).sum())(x)

    @compiled
    def gradients(x):
        """Compiled once for all."""
        return [
            [of(f, e, x) for f, e in ((batch_norm.normalize, epsilon), (textbook, float(epsilon)))] for epsilon in types
        ]

    pairs = gradients(x)
    pairs.append((of(batch_norm.normalize, jnp.int32(1), x), pairs[1][1]))
    for found, expected in pairs:
        assert found.dtype == x.dtype
        np.testing.assert_allclose(found, expected, atol=1e-5)


PARAMS, STATS = batch_norm.init(3)


@pytest.mark.parametrize(
    ("call", "error_type", "words"),
    [
        (lambda: batch_norm.init(0), ValueError, "num_features must be at least 1, got 0"),
        (lambda: batch_norm.normalize(np.ones((4, 3), np.int32)), TypeError, "floating point, got int32"),
        (
            lambda: batch_norm.normalize(np.ones((4, 3), np.float32), -1.0),
            ValueError,
            "epsilon must be >= 0 and finite, got -1.0",
        ),
        (lambda: batch_norm.normalize(np.ones((4, 3), np.float32), axis=2), ValueError, r"axis .* \(4, 3\), got 2"),
        (
            lambda: batch_norm.normalize(np.ones((4, 3), np.float32), mask=np.ones((5, 1), bool)),
            ValueError,
            r"mask \(5, 1\) must broadcast to \(4, 1\)",
        ),
        (
            lambda: batch_norm.apply(PARAMS, STATS, np.ones((4, 2), np.float32), train=True),
            ValueError,
            r"scale has shape \(3,\), but x \(4, 2\)",
        ),
        (
            lambda: batch_norm.apply(
                PARAMS,
                BatchStats(np.ones(1, np.float32), np.ones(3, np.float32), 0),
                np.ones((4, 3), np.float32),
                train=True,
            ),
            ValueError,
            r"mean has shape \(1,\)",
        ),
        (lambda: batch_norm.normalize(np.ones((4, 3), np.float32), np.nan), ValueError, "epsilon must be >= 0"),
        (lambda: batch_norm.normalize(np.ones((4, 3), np.float32), axis=(0, 0)), ValueError, "axis must name distinct"),
        (lambda: batch_norm.normalize(np.ones((4, 3), np.float32), axis=(1, 0)), ValueError, "ascending"),
        (lambda: batch_norm.normalize(np.ones(3, np.float32)), ValueError, r"x \(3,\) must have an axis besides"),
        (lambda: batch_norm.apply(PARAMS, STATS, np.ones(3, np.float32), train=True), ValueError, "an axis besides"),
        (lambda: batch_norm.apply(PARAMS, STATS, jnp.float32(3), train=False), ValueError, "axis must name"),
        (
            lambda: batch_norm.normalize(np.ones((4, 3), np.float32), mask=np.ones((4, 3), bool)),
            ValueError,
            r"mask \(4, 3\) must broadcast to \(4, 1\)",
        ),
        (
            lambda: batch_norm.normalize(np.ones((4, 3), np.float32), mask=np.ones(4, bool)),
            ValueError,
            r"mask \(4,\) must broadcast to \(4, 1\)",
        ),
        (lambda: batch_norm.init(3, "int32"), TypeError, "dtype must be floating point, got int32"),
        (
            lambda: batch_norm.normalize(np.ones((4, 3), np.float32), np.ones(3, np.float32)),
            ValueError,
            r"epsilon must be a scalar",
        ),
        (
            lambda: jax.jit(batch_norm.normalize)(np.ones((4, 3), np.float32), np.ones((4, 1), np.float32)),
            ValueError,
            r"epsilon must be a scalar, got shape \(4, 1\)",
        ),
        (
            lambda: batch_norm.apply(
                PARAMS, STATS._replace(count=np.ones(3, int)), np.ones((4, 3), np.float32), train=True
            ),
            ValueError,
            "count must be a scalar",
        ),
        (
            lambda: batch_norm.apply(
                PARAMS, STATS._replace(var=np.ones(3, np.int32)), np.ones((4, 3), np.float32), train=True
            ),
            TypeError,
            "the running var must be floating point, got int32",
        ),
        (
            lambda: batch_norm.apply(PARAMS, STATS, np.ones((4, 3), np.float32), train=True, momentum=np.nan),
            ValueError,
            "momentum must be None or in",
        ),
        (
            lambda: batch_norm.apply(PARAMS, STATS, np.ones((4, 3), np.float32), train=True, momentum=1.5),
            ValueError,
            "momentum must be None or in",
        ),
    ],
)
def test_bad_input(call, error_type, words):
    """At trace time: under jit too, before anything is computed."""
    for run in (call, lambda: jax.eval_shape(call)):
        with pytest.raises(error_type, match=words):
            run()


def test_train_is_true_or_false():
    with pytest.raises(TypeError, match="train must be True or False, got 'eval'"):
        batch_norm.apply.__wrapped__(PARAMS, STATS, np.ones((4, 3), np.float32), train="eval")


def test_a_traced_momentum_is_refused():
    def layer(momentum):
        return batch_norm.apply.__wrapped__(PARAMS, STATS, np.ones((4, 3), np.float32), train=True, momentum=momentum)

    with pytest.raises(TypeError, match="momentum must be a Python number or None, got a traced value"):
        jax.jit(layer)(0.9)


def test_a_mask_must_be_boolean():
    with pytest.raises(Exception, match=r"bool|Bool"):  # the annotations are checked first in the tests
        batch_norm.normalize(np.ones((4, 3), np.float32), mask=np.ones((4, 1), np.float32))
    with pytest.raises(TypeError, match="mask must be boolean, got float32"):
        batch_norm._check(np.ones((4, 3), np.float32), 0.0, -1, np.ones((4, 1), np.float32), False)


def test_a_single_example_in_evaluation():
    y, _ = batch_norm.apply(PARAMS, STATS, jnp.array([1.0, 2.0, 3.0]), train=False)
    np.testing.assert_allclose(y, np.array([1, 2, 3]) / np.sqrt(1 + 1e-5), rtol=1e-6)
