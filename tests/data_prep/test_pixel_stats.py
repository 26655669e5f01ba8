"""Mean and deviation of the pixels of a set: exact, of the images asked for, as flags."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from data_prep.pixel_stats import measure_pixels
from tests.data.loading import damage
from tests.data.sets import make_set


def pixels_of(number, channels):
    rng = np.random.default_rng(number)
    shape = (5 + number % 4, 6 + number % 3, channels)
    return rng.integers(number, 100 + 2 * number, shape).astype(np.uint8)


def stored(number, channels=3):
    buffer = io.BytesIO()
    if channels in (1, 3):
        pixels = pixels_of(number, channels)
        Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(buffer, "PNG")
    else:
        np.save(buffer, pixels_of(number, channels))
    return buffer.getvalue()


def expected_of(numbers, channels):
    """Of each image the mean of its pixels and of their squares, then over the images."""
    images = [pixels_of(number, channels).reshape(-1, channels) / 255.0 for number in numbers]
    mean = np.mean([x.mean(0) for x in images], 0)
    return mean, np.sqrt(np.mean([(x**2).mean(0) for x in images], 0) - mean**2)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_each_image_counts_the_same(tmp_path, channels):
    shards = make_set(str(tmp_path), [30, 0, 50], lambda number: stored(number, channels))
    found = measure_pixels(shards, channels=channels, threads=3, quiet=True)
    mean, std = expected_of(range(80), channels)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.std, std, rtol=1e-10)
    assert (found.images, found.samples, found.unreadable, found.error) == (80, 80, 0, 0.0)
    assert found == measure_pixels(shards, channels=channels, threads=1, quiet=True)
    numbers = " ".join(f"{x:.4f}" for x in mean), " ".join(f"{x:.4f}" for x in std)
    assert f"--views.mean {numbers[0]} --views.std {numbers[1]}" in str(found)
    assert (f"--views.channels {channels} --views.colour_ops off" in str(found)) == (channels != 3)


def test_a_part_is_spread_evenly_and_says_how_sure_it_is(tmp_path):
    shards = make_set(str(tmp_path), [40], stored)
    found = measure_pixels(shards, images=8, quiet=True)
    mean, _ = expected_of(range(0, 40, 5), 3)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    of_each = [pixels_of(number, 3).mean((0, 1)) / 255 for number in range(0, 40, 5)]
    assert found.error == pytest.approx(float(np.std(of_each, 0).max()) / math.sqrt(8))
    assert "pixels of 8 of 40 images" in str(found)


def test_grey_images_and_unreadable_ones_are_told(tmp_path):
    shards = make_set(str(tmp_path), [9], lambda number: stored(number, 1))
    found = measure_pixels(damage(shards, 4, at=20), quiet=True)
    assert (found.images, found.unreadable) == (8, 1) and "crc32" in found.example
    assert "1 images could not be read" in str(found) and "--channels 1" in str(found)
    with pytest.raises(
        ValueError, match=r"none of 9 images .* in 6 channels: 1 channels .*where 6"
    ):
        measure_pixels(shards, channels=6, quiet=True)
