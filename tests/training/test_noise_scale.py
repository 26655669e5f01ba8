"""The noise scale of known noise, and the draw of the pieces."""

import math

import numpy as np
import pytest

from mocov3_ds.training.noise_scale import draw_pieces, noise_of_pieces

SIZES = np.array([3, 3, 2, 4, 3, 3, 2, 4])


def estimate(gradients_GW: np.ndarray) -> tuple[float, float]:
    """Trace and gradient square of one batch of per-image gradients, pieces one after another."""
    ends = np.cumsum(SIZES)
    means = [part.mean(axis=0) for part in np.split(gradients_GW, ends[:-1])]
    squares = np.array([float((mean**2).sum()) for mean in means])
    whole = float((gradients_GW.mean(axis=0) ** 2).sum())
    return noise_of_pieces(squares, SIZES, whole)


def test_known_noise_is_found_on_average() -> None:
    random = np.random.default_rng(0)
    true_W, deviation_W = random.normal(size=40), random.uniform(0.5, 3.0, size=40)
    noise = random.normal(size=(1000, SIZES.sum(), 40)) * deviation_W
    found = np.array([estimate(true_W + batch) for batch in noise])
    trace, square = (deviation_W**2).sum(), (true_W**2).sum()
    error = found.std(axis=0) / math.sqrt(len(found))  # 4 of them: one test in 16,000 fails
    assert np.all(np.abs(found.mean(axis=0) - [trace, square]) < 4 * error)
    assert error[0] / trace < 0.02


def test_no_noise_and_nothing_but_noise() -> None:
    alike = noise_of_pieces(np.full(8, 2.5), SIZES, 2.5)
    assert (alike.trace, alike.gradient_square, alike.batch) == (0.0, 2.5, 0.0)
    hidden = noise_of_pieces(np.full(8, 2.0), SIZES, 0.01)
    assert hidden.gradient_square < 0 and math.isnan(hidden.batch)
    batch = noise_of_pieces(np.full(8, 2.0), SIZES, 1.0)
    assert batch.batch == pytest.approx(batch.trace / batch.gradient_square)


def test_pieces_belong_to_the_samples() -> None:
    ids = np.arange(100, 150)
    pieces = draw_pieces(ids, 8)
    assert sorted(np.bincount(pieces).tolist()) == [6] * 6 + [7] * 2
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(draw_pieces(ids[order], 8), pieces[order])
    assert not np.array_equal(np.sort(pieces), pieces)  # neighbours are spread
