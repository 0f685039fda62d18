"""Batches with a mask, and batches in parts along a named axis: as of the valid entries, or of the whole."""

from functools import partial

import jax
import numpy as np
import pytest
from formulas import apply, compiled, distance, draw, exact, normalize

from bnjax import batch_norm
from bnjax.types import BatchNormParams, BatchStats


class TestMask:
    x = np.asarray(draw((8, 3)))
    valid = np.array([1, 1, 0, 1, 0, 1, 1, 0], bool)

    def test_equals_the_batch_of_valid_entries_alone(self):
        filled = np.where(self.valid[:, None], self.x, np.nan)
        y, stats = apply(*batch_norm.init(3), filled, train=True, mask=self.valid[:, None])
        y_alone, stats_alone = apply(*batch_norm.init(3), self.x[self.valid], train=True)
        np.testing.assert_allclose(y[self.valid], y_alone, atol=1e-6)
        assert (y[~self.valid] == 0).all()
        np.testing.assert_allclose(stats.var, stats_alone.var, rtol=1e-6)

    def test_gradients_ignore_masked_entries(self):
        filled = np.where(self.valid[:, None], self.x, np.nan)
        weights = np.asarray(draw((8, 3), seed=1))

        @compiled
        @jax.grad
        def gradient_of(x, weights, mask):
            return (batch_norm.normalize(x, mask=mask) * weights).sum()

        gradient = gradient_of(filled, weights, self.valid[:, None])
        alone = gradient_of(self.x[self.valid], weights[self.valid], None)
        np.testing.assert_allclose(gradient[self.valid], alone, atol=1e-6)
        assert (gradient[~self.valid] == 0).all()

    def test_evaluation_keeps_what_is_masked_out_of_everything(self):
        filled = np.where(self.valid[:, None], self.x, np.nan)
        params = BatchNormParams(np.float32([2.0, -1.0, 1.0]), np.float32([0.5, 0.0, 1.0]))
        _, stats = apply(params, batch_norm.init(3)[1], self.x, train=True)

        def total(x, params, mean, var, mask):
            y, _ = batch_norm.apply(params, BatchStats(mean, var, stats.count), x, train=False, mask=mask)
            return (y**2).sum(), y

        gradient = compiled(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))
        (dx, dparams, *dstats), y = gradient(filled, params, stats.mean, stats.var, self.valid[:, None])
        (ex, eparams, *estats), alone = gradient(self.x[self.valid], params, stats.mean, stats.var, None)
        np.testing.assert_allclose(y[self.valid], alone, rtol=1e-6)
        assert (y[~self.valid] == params.bias).all()
        assert (dx[~self.valid] == 0).all()
        np.testing.assert_allclose(dx[self.valid], ex, rtol=1e-5)
        np.testing.assert_allclose(dparams.scale, eparams.scale, rtol=1e-5)
        np.testing.assert_allclose(dparams.bias, eparams.bias + 3 * 2 * params.bias, rtol=1e-5)
        np.testing.assert_allclose(np.stack(dstats), np.stack(estats), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("axis", [-1, 1])
    @pytest.mark.parametrize("mask_shape", [(6, 1, 1, 1), (1, 4, 5, 1), (6, 4, 5, 1), (5, 1)])
    def test_broadcasts_over_everything_but_features(self, mask_shape, axis):
        """Images as NHWC, and as NCHW with the mask's axes moved alike."""
        x = np.asarray(draw((6, 4, 5, 3), mean=2.0))
        mask = np.random.default_rng(0).random(mask_shape) < 0.6
        valid = np.broadcast_to(mask, (6, 4, 5, 1))[..., 0]
        expected = exact(x[valid])[0]
        if axis == 1:
            x = np.moveaxis(x, -1, 1)
            mask = np.moveaxis(mask.reshape((1,) * (4 - mask.ndim) + mask.shape), -1, 1)
        y = normalize(x, axis=axis, mask=mask)
        y = np.moveaxis(y, 1, -1) if axis == 1 else np.asarray(y)
        np.testing.assert_allclose(y[valid], expected.astype(np.float64), atol=1e-5)
        assert (y[~valid] == 0).all()

    def test_nothing_valid_leaves_the_statistics(self):
        params, stats = batch_norm.init(3)
        none = np.zeros((8, 1), bool)
        y, after = apply(params, stats, self.x * np.nan, train=True, mask=none)
        assert (y == 0).all()
        assert (compiled(jax.grad(lambda x: batch_norm.normalize(x, mask=none).sum()))(self.x) == 0).all()
        jax.tree.map(np.testing.assert_array_equal, after, stats)


@compiled
def pooled(parts, epsilon, masks=None):
    """Each part [N, C] or [C] normalized with the statistics of all."""

    def one(part, mask):
        return batch_norm.normalize(part, epsilon, mask=mask, axis_name="parts")

    return jax.vmap(one, (0, None if masks is None else 0), axis_name="parts")(parts, masks)


class TestAxisName:
    """Parts of one batch, with their own numbers of valid entries, none in one: value, gradient and
    statistics as of the whole. Three roundings of float32 make 1e-6, at a mean of 100 standard deviations too.
    """

    parts = np.asarray(draw((4, 6, 3), mean=100.0), np.float32)
    weights = np.asarray(draw((4, 6, 3), seed=1), np.float32)
    masks = np.array([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)[..., None]

    def layer(self, x, mask, weights, axis_name=None):
        """The output, the updated statistics, and the gradient to x, scale and bias of sum(weights * y)."""
        params, stats = BatchNormParams(np.float32([2.0, -1.0, 0.5]), np.ones(3, np.float32)), batch_norm.init(3)[1]

        def apply(x, params):
            return batch_norm.apply(params, stats, x, train=True, mask=mask, axis_name=axis_name, unbiased=True)

        y, pullback, stats = jax.vjp(apply, x, params, has_aux=True)
        return y, stats, *pullback(weights)

    def check(self, parts_found, masked):
        mask = self.masks.reshape(24, 1) if masked else None
        filled = np.where(self.masks, self.parts, np.nan) if masked else self.parts
        whole = compiled(self.layer)(filled.reshape(24, 3), mask, self.weights.reshape(24, 3))
        y, stats, gradient, params_gradient = parts_found
        np.testing.assert_allclose(np.reshape(y, (24, 3)), whole[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.reshape(gradient, (24, 3)), whole[2], rtol=1e-5, atol=1e-6)
        for found, expected in zip(stats, whole[1], strict=True):  # the same on every device
            np.testing.assert_allclose(found, np.broadcast_to(expected, np.shape(found)), rtol=1e-6)
        for found, expected in zip(params_gradient, whole[3], strict=True):  # each device's share
            np.testing.assert_allclose(np.sum(found, 0), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("masked", [False, True])
    def test_vmap(self, masked):
        filled = np.where(self.masks, self.parts, np.nan) if masked else self.parts
        mapped = jax.vmap(
            partial(self.layer, axis_name="parts"), in_axes=(0, 0 if masked else None, 0), axis_name="parts"
        )
        self.check(compiled(mapped)(filled, self.masks if masked else None, self.weights), masked)

    def test_one_example_each(self):
        """`jax.vmap` over examples [C], as a per-example network has it."""
        np.testing.assert_allclose(pooled(self.parts[0], 1e-5), normalize(self.parts[0]), atol=1e-5)

    def test_a_constant_feature_is_exactly_zero(self):
        constant = np.full((4, 6, 3), 0.1, np.float32)
        assert (pooled(constant, 0.0, self.masks) == 0).all()

    def test_means_that_differ_by_far(self):
        """Combined from centred sums: each part's spread counts, however far apart the parts are."""
        x = self.parts + np.array([0.0, 1e4, -1e4, 0.0], np.float32)[:, None, None]
        y = pooled(x, 1e-5)
        assert distance(np.reshape(y, (24, 3)), exact(x.reshape(24, 3))[0]) < 1e-6

    @pytest.mark.parametrize("magnitude", [1e30, 1e-30])
    def test_any_magnitude(self, magnitude):
        x = (self.parts - 100) * np.float32(magnitude) * np.array([1, 1e-3, 1, 1e-6], np.float32)[:, None, None]
        y = pooled(x, 0.0)
        assert distance(np.reshape(y, (24, 3)), exact(x.reshape(24, 3), 0.0)[0]) < 1e-6
