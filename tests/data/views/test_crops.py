"""One call from bytes to two crops and their rows: the same as its three parts, on any decoder."""

import numpy as np
import pytest

from mocov3_ds.data.views import decode, photometric
from mocov3_ds.data.views.crops import make_crops
from mocov3_ds.data.views.decode import UnreadableImage
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.spec import PARAMETERS, ViewSpec
from tests.data.pictures import encode_image, picture

SPEC = ViewSpec()


@pytest.fixture(autouse=True, params=["native", "simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    monkeypatch.setenv("MOCOV3_DS_DECODER", request.param)
    absent = decode.explain_absence(request.param)
    if absent:
        pytest.skip(f"{request.param}: {absent}")
    yield request.param


def parts(data, sample, size):
    height, width = decode.read_size(data)
    boxes, flips, rows = draw_views(SPEC, 5, 2, sample, height, width)
    crops = np.zeros((2, 3, size, size), np.uint8)
    decode.cut_crops(data, boxes, flips, crops)
    return crops, rows


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("augment", [False, True])
def test_a_pair_is_its_parts(kind, mode, augment):
    data = encode_image(picture(120, 90).convert(mode), kind)
    crops, rows = np.zeros((2, 3, 40, 40), np.uint8), np.zeros((2, PARAMETERS), np.float32)
    for sample in range(8):
        expected, expected_rows = parts(data, sample, 40)
        if augment:
            photometric.augment_crops(expected, expected_rows)
        make_crops(data, SPEC, 5, 2, sample, crops, rows, augment=augment)
        np.testing.assert_array_equal(crops, expected)
        np.testing.assert_array_equal(rows, expected_rows)


def test_a_pair_fits_into_strided_buffers():
    data = encode_image(picture())
    ring = np.zeros((2, 7, 3, 24, 24), np.uint8)
    rows = np.zeros((2, 7, PARAMETERS), np.float32)
    make_crops(data, SPEC, 5, 2, 3, ring[:, 4], rows[:, 4], augment=True)
    crops, expected_rows = parts(data, 3, 24)
    photometric.augment_crops(crops, expected_rows)
    np.testing.assert_array_equal(ring[:, 4], crops)
    np.testing.assert_array_equal(rows[:, 4], expected_rows)
    others = [0, 1, 2, 3, 5, 6]
    assert not ring[:, others].any() and not rows[:, others].any()


@pytest.mark.parametrize("data", [b"", b"text", encode_image(picture())[:900]])
def test_unreadable_bytes_say_why(data):
    crops, rows = np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, PARAMETERS), np.float32)
    with pytest.raises(UnreadableImage, match=r"empty file|not an image|truncated"):
        make_crops(data, SPEC, 0, 0, 0, crops, rows)
