"""Limits of infinite width and laws of growth, of points that are known to follow them."""

import numpy as np
import pytest

from bnjax.analysis import curves


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_at_infinite_width(shape):
    """Means on a line in 1 / width are recovered, and their errors; a width alone gives the median."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1000, *shape)) * 0.1
    noise -= noise.mean(0)
    values, slopes = rng.normal(size=(2, *shape))
    found, error = curves.at_infinite_width([64, 128], *(values + slopes / width + noise for width in (64, 128)))
    assert found.shape == error.shape == shape
    np.testing.assert_allclose(found, values, rtol=1e-12)
    np.testing.assert_allclose(error, 0.1 * np.sqrt(5 / 1000), rtol=0.1)
    median, error = curves.at_infinite_width([64], values + noise)
    np.testing.assert_allclose(median, np.median(values + noise, 0))
    np.testing.assert_allclose(error, 0.1 * np.sqrt(np.pi / 2 / 1000), rtol=0.2)


def test_points_count_by_their_errors():
    """What three widths say, of which the errors of one are a thousand times as large, is what the others say."""
    rng = np.random.default_rng(1)
    noise = [scale * rng.normal(size=1000) for scale in (1e-3, 1e-3, 1.0)]
    runs = [2 + 3 / width + one for width, one in zip((64, 128, 256), noise, strict=True)]
    all_three, two = curves.at_infinite_width([64, 128, 256], *runs), curves.at_infinite_width([64, 128], *runs[:2])
    np.testing.assert_allclose(all_three[0], two[0], atol=1e-4)


def test_growth():
    """Which law, at which rate; a curve that was not measured takes no part."""
    times = np.arange(10, 100)
    power = curves.growth(1e-8 * times[None] ** 1.5, times)
    np.testing.assert_allclose(power.power, 1.5)
    np.testing.assert_array_equal(power.time_to_e, np.nan)
    rates = np.stack([1e-8 * np.exp(times / 10), np.full(90, np.nan), 1e-8 * np.exp(times / 20)])
    exponential = curves.growth(rates, times)
    np.testing.assert_allclose(exponential.time_to_e, [10, np.nan, 20])
    np.testing.assert_array_equal(exponential.power, np.nan)
    assert np.isnan(curves.growth(np.zeros((2, 90)), times)).all()
