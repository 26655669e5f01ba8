"""The bench of resized shards: what it measures of images whose change is known."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mocov3_ds.bench import resized
from mocov3_ds.bench.resized import Similarity
from tests.data.pictures import detailed_picture, encode_image


def test_psnr_is_that_of_the_formula() -> None:
    seen = Similarity()
    before = np.full((20, 20, 3), 100, np.float32)
    before[::2] = 120
    seen.add_crop(before, before + 5)
    assert str(seen) == f"{20 * np.log10(255 / 5):.1f} / 1.00"


def test_the_same_crops_are_found_in_a_smaller_image() -> None:
    """Half the size is half the detail; a crop shifted by a pixel would be far off."""
    image = detailed_picture(400, 480, seed=1)
    half = image.resize((240, 200), Image.Resampling.LANCZOS)
    whole = [Similarity() for _ in range(4)]
    smaller = [Similarity() for _ in range(4)]
    shifted = [Similarity() for _ in range(4)]
    for sample in range(12):
        resized.compare_crops(
            encode_image(image, "PNG"), encode_image(image, "PNG"), 64, sample, whole
        )
        resized.compare_crops(
            encode_image(image, "PNG"), encode_image(half, "PNG"), 64, sample, smaller
        )
        moved = half.transform((240, 200), Image.Transform.AFFINE, (1, 0, 2, 0, 1, 0))
        resized.compare_crops(
            encode_image(image, "PNG"), encode_image(moved, "PNG"), 64, sample, shifted
        )
    assert {str(seen) for seen in whole} == {"the same"}
    assert sum(seen.squares for seen in shifted) > 4 * sum(seen.squares for seen in smaller)
    large = smaller[-1]
    assert large.edges / large.original_edges == pytest.approx(1, abs=0.1)


def test_a_blur_is_less_sharp() -> None:
    image = detailed_picture(300, 300, seed=2)
    seen = [Similarity() for _ in range(4)]
    blurred = encode_image(image.filter(ImageFilter.GaussianBlur(2)), "PNG")
    resized.compare_crops(encode_image(image, "PNG"), blurred, 64, 0, seen)
    met = [s for s in seen if s.values]
    assert met
    assert all(s.edges < 0.8 * s.original_edges for s in met)
