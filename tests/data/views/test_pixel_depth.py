"""Pixels of more than 8 bits become bytes by the stated rule, in whatever file they come."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mocov3_ds.data.views.decode import UnreadableImage, decode_rgb
from tests.data.pictures import encode_image

RAMP_HW = np.linspace(0, 1, 256)[None].repeat(8, 0)
BYTES_HW = np.arange(256, dtype=np.uint8)[None].repeat(8, 0)


def grey_of(image_bytes):
    rgb_HWC = np.asarray(decode_rgb(image_bytes)).astype(int)
    assert (rgb_HWC == rgb_HWC[:, :, :1]).all()
    return rgb_HWC[:, :, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_scan_is_as_deep_as_its_largest_pixel(kind, bits):
    deep = np.round(RAMP_HW * (2**bits - 1)).astype(np.uint16)
    got = grey_of(encode_image(Image.fromarray(deep), kind))
    assert np.abs(got - BYTES_HW).max() <= 1 and got[0, -1] == 255


@pytest.mark.parametrize("full", [1, 255, 65535])
def test_floats_are_parts_of_1_255_or_65535(full):
    got = grey_of(encode_image(Image.fromarray((RAMP_HW * full).astype(np.float32)), "TIFF"))
    np.testing.assert_array_equal(got, BYTES_HW)


def test_integers_of_32_bits_follow_the_same_rule():
    got = grey_of(encode_image(Image.fromarray(BYTES_HW.astype(np.int32) * 16), "TIFF"))
    np.testing.assert_array_equal(got, BYTES_HW)


def test_the_header_of_a_ppm_names_its_white():
    dark = b"P5\n4 1\n4095\n" + struct.pack(">4H", 0, 16, 256, 512)
    np.testing.assert_array_equal(grey_of(dark), [[0, 1, 16, 32]])


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        (np.float32([[0, np.nan]]), "floating-point pixels from nan to nan"),
        (np.float32([[-1, 1]]), "floating-point pixels from -1 to 1"),
        (np.float32([[0, 1e9]]), r"from 0 to 1e\+09: 0 to 1, 255 or 65535 can be read"),
        (np.int32([[-4, 9]]), "integer pixels from -4 to 9"),
        (np.int32([[0, 70000]]), "integer pixels from 0 to 70000: 0 to 65535 can be read"),
    ],
)
def test_pixels_without_a_range_are_refused(levels, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode_rgb(encode_image(Image.fromarray(levels), "TIFF"))


def deep_colours(levels_HWC):
    """A PNG of 16-bit colours, which Pillow cannot write."""

    def framed(chunk):
        return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))

    height, width, bands = levels_HWC.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[bands], 0, 0, 0)
    parts = b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(framed, parts))


@pytest.mark.parametrize("bands", [3, 4])
def test_deep_colours_are_read_where_the_upper_byte_holds_them(bands):
    full = np.repeat((RAMP_HW * 65535)[:, :, None], bands, 2)
    assert np.abs(grey_of(deep_colours(full)) - BYTES_HW).max() <= 1
    dim = np.repeat((RAMP_HW * 4095)[:, :, None], bands, 2)
    dim[:, :, 3:] = 65535
    with pytest.raises(UnreadableImage, match="use 12 of them or fewer"):
        decode_rgb(deep_colours(dim))
