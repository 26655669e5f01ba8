"""A smooth curve through a loss: what it follows, and what is left."""

import numpy as np
import pytest

from mocov3_ds.stability.loss_trend import smooth_trend


@pytest.mark.parametrize("steps", [64, 200, 3000, 100_000])
def test_it_follows_a_falling_loss_and_leaves_the_noise(steps: int) -> None:
    u = np.arange(1, steps + 1) / steps
    random = np.random.default_rng(steps)
    for true in (3.3 + 3.1 * np.exp(-u / 0.12), 6.6 * (1 + 200 * u) ** -0.15):
        noise = 0.01 * random.standard_normal(steps)
        left = np.log(true) + noise - smooth_trend(np.log(true) + noise)
        assert np.std(left[16:] - noise[16:]) < 0.005
        early, late = left[16 : max(steps // 3, 40)], left[-steps // 3 :]
        assert np.std(early) == pytest.approx(0.01, rel=0.4)
        assert np.std(late) == pytest.approx(0.01, rel=0.4)


def test_spikes_and_new_levels_are_left() -> None:
    values = 0.01 * np.random.default_rng(0).standard_normal(400)
    quiet = smooth_trend(values)
    values[200], values[300:330] = 1.0, 0.5
    assert np.max(np.abs(smooth_trend(values) - quiet)[16:]) < 0.02
    values[200:] += 1.0  # for good
    left = values - smooth_trend(values)
    assert left[205:215].mean() - left[185:195].mean() > 0.7


@pytest.mark.parametrize("rows", [0, 1, 5, 16, 17])
def test_few_rows(rows: int) -> None:
    assert smooth_trend(np.full(rows, 2.5)) == pytest.approx(np.full(rows, 2.5))
