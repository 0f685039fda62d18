"""Running statistics: averages, what they forget, what leaves them, and their types."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import apply, compiled, draw

from bnjax import batch_norm
from bnjax.types import BatchNormParams


class TestRunningStatistics:
    batches = tuple(np.asarray(draw((8, 3), seed=s, mean=s, std=1 + s)) for s in range(5))

    def run(self, **options):
        params, stats = batch_norm.init(3)
        for x in self.batches:
            _, stats = apply(params, stats, x, train=True, **options)
        return stats

    def test_plain_moving_average_of_biased_variances(self):
        stats = self.run(momentum=0.9)
        mean, var = np.zeros(3), np.ones(3)
        for x in self.batches:
            mean = 0.9 * mean + 0.1 * x.mean(0)
            var = 0.9 * var + 0.1 * x.var(0)
        np.testing.assert_allclose(stats.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(stats.var, var, rtol=1e-5)
        assert stats.count == 5

    def test_debiased_average_forgets_the_initial_values(self):
        stats = self.run(momentum=0.9, debias=True)
        weights = 0.9 ** np.arange(4, -1, -1)
        weights /= weights.sum()
        np.testing.assert_allclose(stats.mean, weights @ [x.mean(0) for x in self.batches], rtol=1e-5)
        np.testing.assert_allclose(stats.var, weights @ [x.var(0) for x in self.batches], rtol=1e-5)

    @pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 1.0, "debias": True}])
    def test_cumulative_average(self, options):
        stats = self.run(**options)
        np.testing.assert_allclose(stats.mean, np.mean([x.mean(0) for x in self.batches], 0), rtol=1e-5)
        np.testing.assert_allclose(stats.var, np.mean([x.var(0) for x in self.batches], 0), rtol=1e-5)

    def test_momentum_zero_keeps_the_last_batch_and_one_the_first_values(self):
        for debias in (False, True):
            last = self.run(momentum=0.0, debias=debias)
            np.testing.assert_allclose(last.var, self.batches[-1].var(0), rtol=1e-5)
        assert (self.run(momentum=1.0).var == 1).all()

    def test_unbiased_variances(self):
        for options, weights in (
            ({"momentum": None}, np.full(5, 0.2)),
            ({"momentum": 0.9, "debias": True}, 0.9 ** np.arange(4, -1, -1.0)),
        ):
            stats = self.run(unbiased=True, **options)
            expected = weights / weights.sum() @ [x.var(0, ddof=1) for x in self.batches]
            np.testing.assert_allclose(stats.var, expected, rtol=1e-5)

    def test_very_long_averages(self):
        """300,000 batches of four, and the count can't overflow.

        A float32 average of t terms rounds t times: sqrt(t / 3) roundings of 6e-8, some 2e-5, at random.
        """
        params, stats = batch_norm.init(3)
        x = np.random.default_rng(0).normal(5.0, 1.0, size=(3000, 4, 3)).astype(np.float32)
        means, variances = x.astype(np.float64).mean(1), x.astype(np.float64).var(1)

        @partial(jax.jit, static_argnames=("momentum", "debias"))
        def run(stats, momentum, debias):
            def step(stats, i):
                return batch_norm.apply(
                    params, stats, jnp.asarray(x)[i % 3000], train=True, momentum=momentum, debias=debias
                )[::-1]

            return jax.lax.scan(lambda s, i: (step(s, i)[0], None), stats, jnp.arange(300_000))[0]

        found = run(stats, None, False)
        np.testing.assert_allclose(found.mean, means.mean(0), rtol=1e-4)
        np.testing.assert_allclose(found.var, variances.mean(0), rtol=1e-4)
        assert found.count == 300_000
        weights = 0.999 ** np.arange(2999, -1, -1.0)
        found = run(stats, 0.999, True)  # 0.999^300,000 = 0: the last 3,000 batches, over and over
        np.testing.assert_allclose(found.var, weights @ variances / weights.sum(), rtol=1e-4)
        last = found._replace(count=jnp.int32(np.iinfo(np.int32).max))
        assert apply(params, last, x[0], train=True)[1].count == last.count

    @pytest.mark.parametrize("std", [1e-2, 1e-4, 1e-8, 1e-15])
    @pytest.mark.parametrize(
        "options",
        [{"momentum": 0.0}, {"momentum": None}, *({"momentum": m, "debias": True} for m in (0.5, 0.9, 0.999))],
    )
    def test_nothing_is_left_of_what_has_no_weight(self, options, std):
        """The first batch's variance, however small beside the initial 1."""
        params, stats = batch_norm.init(3)
        x = (std * self.batches[0]).astype(np.float32)
        _, after = apply(params, stats, x, train=True, **options)
        np.testing.assert_allclose(after.var, x.astype(np.float64).var(0), rtol=1e-5)
        y, _ = apply(params, after, x, train=False, epsilon=0.0)
        np.testing.assert_allclose(np.asarray(y, np.float64).std(0), 1, rtol=1e-5)

    def test_momentum_zero_forgets_and_one_keeps_whatever_there_was(self):
        params, stats = batch_norm.init(3)
        x = self.batches[0]
        for before in (1e8, np.nan):
            _, spoilt = apply(params, stats, x + np.float32(before), train=True, momentum=0.0)
            _, after = apply(params, spoilt, x, train=True, momentum=0.0)
            np.testing.assert_allclose(after.mean, x.mean(0), rtol=1e-5)
            np.testing.assert_allclose(after.var, x.var(0), rtol=1e-5)
            _, kept = apply(params, stats, x + np.float32(before), train=True, momentum=1.0)
            assert (kept.mean == 0).all()
            assert (kept.var == 1).all()

    @pytest.mark.parametrize("with_x64", [False, True])
    def test_a_huge_variance_passes(self, with_x64):
        """It is the largest number for once, also unbiased, also of float64 inputs, and decays as any other."""
        with jax.enable_x64(with_x64):
            params, stats = batch_norm.init(3, "float32")
            huge = (1e25 * self.batches[0].astype(float)).astype(jnp.result_type(float))
            for x in (huge, *self.batches):
                _, stats = apply(params, stats, x, train=True, momentum=0.0, unbiased=True)
                assert np.isfinite(stats.var).all()
            np.testing.assert_allclose(stats.var, self.batches[-1].var(0, ddof=1), rtol=1e-5)

    @pytest.mark.parametrize("options", [{}, {"momentum": None}, {"unbiased": True}])
    def test_a_batch_of_one_has_a_mean_and_no_variance(self, options):
        params = BatchNormParams(np.full(3, 2.0, np.float32), np.full(3, -0.5, np.float32))
        stats = self.run()
        x = np.array([[1.0, -7.0, 1e6]], np.float32)
        layer = partial(apply, params, stats, train=True, **options)
        y, after = layer(x)
        assert (y == -0.5).all()
        assert (
            compiled(jax.jacrev(lambda x: batch_norm.apply(params, stats, x, train=True, **options)[0]))(x) == 0
        ).all()
        weight = 1 / 6 if "momentum" in options else 0.01
        np.testing.assert_allclose(after.mean, stats.mean + weight * (x[0] - stats.mean), rtol=1e-5)
        assert (after.var == stats.var).all()
        mask = np.array([[False], [True]])
        masked = layer(np.concatenate([x * np.nan, x]), mask=mask)
        assert (masked[0] == -0.5).all()
        assert all((a == b).all() for a, b in zip(masked[1], after, strict=True))

    def test_an_empty_batch_leaves_them(self):
        params, stats = batch_norm.init(3)[0], self.run()
        for train in (True, False):
            y, after = apply(params, stats, np.zeros((0, 3), np.float32), train=train)
            assert y.shape == (0, 3)
            assert all((a == b).all() for a, b in zip(after, stats, strict=True))
        gradient = compiled(jax.grad(lambda x: batch_norm.normalize(x).sum()))(np.zeros((0, 3), np.float32))
        assert gradient.shape == (0, 3)

    def test_evaluation_uses_them_and_leaves_them(self):
        params = BatchNormParams(np.float32([1.0, -2.0, 0.5]), np.float32([0.0, 1.0, 2.0]))
        stats = self.run()
        x = self.batches[0]
        y, _ = apply(params, stats, x, train=False, epsilon=0.1)
        expected = params.scale * (x - stats.mean) / np.sqrt(stats.var + 0.1) + params.bias
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)

        def left(x):
            assert batch_norm.apply(params, stats, x, train=False)[1] is stats

        jax.eval_shape(left, x)

    def test_evaluation_before_training_is_the_identity_up_to_epsilon(self):
        x = self.batches[1]
        y, _ = apply(*batch_norm.init(3), x, train=False)
        np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)

    def test_no_gradient_flows_into_them(self):
        params, stats = batch_norm.init(3)

        def total(x, stats):
            _, new = batch_norm.apply(params, stats, x, train=True)
            return new.mean.sum() + new.var.sum()

        gradients = compiled(jax.grad(total, argnums=(0, 1), allow_int=True))(self.batches[2], stats)
        assert all((g == 0).all() for g in (gradients[0], gradients[1].mean, gradients[1].var))

    @pytest.mark.parametrize(
        ("data", "param", "with_x64"),
        [(d, p, False) for d in ("float16", "float32") for p in ("bfloat16", "float32")]
        + [(d, p, True) for d in ("float16", "float32", "float64") for p in ("bfloat16", "float32", "float64")],
    )
    def test_structure_and_dtypes_stay_the_same_in_a_scan(self, data, param, with_x64):
        with jax.enable_x64(with_x64):
            params, stats = batch_norm.init(3, param)
            assert params.scale.dtype == param
            assert stats.mean.dtype == stats.var.dtype == ("float64" if param == "float64" else "float32")

            def step(stats, x):
                y, stats = batch_norm.apply(params, stats, x, train=True, momentum=None)
                return stats, (y, batch_norm.apply(params, stats, x, train=False)[0])

            final, ys = jax.eval_shape(lambda xs: jax.lax.scan(step, stats, xs), jax.ShapeDtypeStruct((5, 8, 3), data))
            assert [s.dtype for s in final] == [s.dtype for s in stats]
            assert all(y.dtype == data for y in ys)

    def test_gradient_in_evaluation_mode(self):
        params = BatchNormParams(np.float32([2.0, -1.0, 0.0]), np.ones(3, np.float32))
        stats = self.run()
        x = self.batches[0]
        gradient = compiled(jax.grad(lambda x: batch_norm.apply(params, stats, x, train=False, epsilon=0.1)[0].sum()))(
            x
        )
        expected = params.scale / np.sqrt(stats.var + 0.1)
        np.testing.assert_allclose(gradient, np.broadcast_to(expected, (8, 3)), rtol=1e-6)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_stays_in_its_feature(self, value):
        params, stats = batch_norm.init(3)
        x = self.batches[0].copy()
        x[4, 1] = value

        @compiled
        @jax.value_and_grad
        def loss(x):
            return (batch_norm.apply(params, stats, x, train=True)[0] ** 3).sum(0)[np.array([0, 2])].sum()

        (clean, clean_gradient), (found, gradient) = loss(self.batches[0]), loss(x)
        assert found == clean
        assert (gradient[:, [0, 2]] == clean_gradient[:, [0, 2]]).all()
        y, after = apply(params, stats, x, train=True)
        assert np.isnan(y[:, 1]).all()
        for statistic in after[:2]:
            assert (np.isfinite(statistic) == [True, False, True]).all()

    @pytest.mark.parametrize(("use_scale", "use_bias"), [(False, True), (True, False), (False, False)])
    def test_without_scale_or_bias(self, use_scale, use_bias):
        params, stats = batch_norm.init(3, use_scale=use_scale, use_bias=use_bias)
        full = BatchNormParams(np.full(3, 2.0, np.float32), np.full(3, 0.5, np.float32))
        params = BatchNormParams(full.scale if use_scale else None, full.bias if use_bias else None)
        ones_and_zeros = BatchNormParams(
            full.scale if use_scale else np.ones(3, np.float32), full.bias if use_bias else np.zeros(3, np.float32)
        )
        assert len(jax.tree.leaves(batch_norm.init(3, use_scale=use_scale, use_bias=use_bias)[0])) == (
            use_scale + use_bias
        )
        for train in (True, False):
            y, after = apply(params, stats, self.batches[0], train=train)
            expected, _ = apply(ones_and_zeros, stats, self.batches[0], train=train)
            assert (y == expected).all()
            assert jax.tree.structure(after) == jax.tree.structure(stats)
