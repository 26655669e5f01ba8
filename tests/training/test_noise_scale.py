"""The noise scale of known noise, and the draw of the halves."""

import math

import numpy as np
import pytest
import torch

from mocov3_ds.training.noise_scale import draw_halves, noise_of_halves

IMAGES = 12


def test_known_noise_is_found_on_average() -> None:
    random = np.random.default_rng(0)
    true_W, deviation_W = random.normal(size=40), random.uniform(0.5, 3.0, size=40)
    noise = random.normal(size=(4000, 2, IMAGES, 40)) * deviation_W
    means = torch.from_numpy((true_W + noise).mean(axis=2))
    found = np.array([noise_of_halves(first, second, IMAGES) for first, second in means])
    trace, square = (deviation_W**2).sum(), (true_W**2).sum()
    error = found.std(axis=0) / math.sqrt(len(found))  # 4 of them: one test in 16,000 fails
    assert np.all(np.abs(found.mean(axis=0) - [trace, square]) < 4 * error)
    assert error[0] / trace < 0.02 and error[1] / square < 0.02


def test_no_noise_and_nothing_but_noise() -> None:
    row = torch.tensor([1.0, -0.5, 0.5])
    alike = noise_of_halves(row, row, IMAGES)
    assert (alike.trace, alike.gradient_square, alike.batch) == (0.0, 1.5, 0.0)
    hidden = noise_of_halves(row, -row, IMAGES)
    assert hidden.trace == IMAGES / 2 * 6 and hidden.gradient_square == -1.5
    assert math.isnan(hidden.batch)
    batch = noise_of_halves(row, 2 * row, IMAGES)
    assert batch.batch == pytest.approx(batch.trace / batch.gradient_square) == 3.0


def test_halves_belong_to_the_samples_on_any_number_of_ranks() -> None:
    ids = np.arange(100, 148)
    first, second = draw_halves(ids)
    assert sorted([*first, *second]) == [*range(48)]
    assert (first // 2).tolist() == (second // 2).tolist() == [*range(24)]
    assert 4 < int((first % 2).sum()) < 20  # of two neighbours not always the same
    for ranks in (2, 3):
        parts = [draw_halves(part) for part in np.split(ids, ranks)]
        size = len(ids) // ranks
        rows = [part[0] + size * rank for rank, part in enumerate(parts)]
        np.testing.assert_array_equal(np.concatenate(rows), first)
    np.testing.assert_array_equal(draw_halves(ids[::-1])[0][::-1], 47 - first)
