"""NumPy arrays as images: any channels, scaled by the stated rule, bounded and never unpickled."""

import numpy as np
import pytest
from PIL import Image

from mocov3_ds.data.views import decode
from mocov3_ds.data.views.decode import UnreadableImage
from tests.data.views.test_layers import ARRAY, pixels_of, stored_array


def test_arrays_of_one_and_three_channels_are_images():
    colours, grey = ARRAY[..., :3], ARRAY[..., 0]
    assert np.array_equal(pixels_of(stored_array(colours), 3), colours.transpose(2, 0, 1))
    assert np.array_equal(pixels_of(stored_array(grey), 3), np.stack([grey] * 3))
    luma = np.asarray(Image.fromarray(colours).convert("L"))
    assert np.array_equal(pixels_of(stored_array(colours), 1)[0], luma)
    assert np.array_equal(pixels_of(stored_array(ARRAY), 0), ARRAY.transpose(2, 0, 1))
    assert decode.read_size(stored_array(ARRAY)) == (40, 60)


def test_arrays_of_more_than_8_bits_are_scaled():
    deep = ARRAY.astype(np.uint16) * 16
    assert np.array_equal(pixels_of(stored_array(deep), 6), ARRAY.transpose(2, 0, 1))
    floats = (ARRAY / 255).astype(np.float32)
    assert np.array_equal(pixels_of(stored_array(floats), 6), ARRAY.transpose(2, 0, 1))
    big_endian = stored_array(deep.astype(">u2"))
    assert np.array_equal(pixels_of(big_endian, 6), ARRAY.transpose(2, 0, 1))


def test_an_array_that_claims_to_be_huge_is_refused_by_its_header():
    header = stored_array(np.zeros((1, 1), np.uint8))
    huge = header.replace(b"(1, 1), }" + b" " * 10, b"(90000, 90000), }  ")
    assert b"90000" in huge
    with pytest.raises(UnreadableImage, match="90000 x 90000 pixels"):
        decode.read_size(huge)


@pytest.mark.parametrize(
    ("data", "channels", "words"),
    [
        (stored_array(np.array([{}], dtype=object), allow_pickle=True), 0, "array of object"),
        (stored_array(np.zeros(7, np.uint8)), 0, r"shape \(7,\) is no image"),
        (stored_array(np.zeros((2, 3, 4, 5), np.uint8)), 0, "is no image"),
        (stored_array(np.zeros((6, 9, 300), np.uint8)), 0, "300 channels .* last axis"),
        (stored_array(ARRAY)[:-1], 6, "truncated array"),
        (stored_array(ARRAY)[:40], 6, "damaged array"),
        (stored_array(np.full((4, 4), np.nan)), 1, "floating-point pixels"),
        (stored_array(-np.ones((4, 4), np.int32)), 1, "integer pixels from -1"),
    ],
)
def test_what_is_no_image_is_unreadable(data, channels, words):
    with pytest.raises(UnreadableImage, match=words):
        decode.decode_layers(data, channels)
