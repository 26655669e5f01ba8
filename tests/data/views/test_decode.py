"""Decoding: torchvision's pixels, odd files, and a reason for each unreadable one.

Each test runs with each decoder that is there; simplejpeg with torch's resize has a tolerance.
"""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from mocov3_ds.data.views import decode, native
from mocov3_ds.data.views.decode import UnreadableImage, centre_crop, cut_crops, read_size
from tests.data.pictures import crops_by_torchvision, decode_image, encode_image, picture

DECODERS = ("native", "simplejpeg", "pillow")
BOXES = [(5, 20, 90, 110), (0, 0, 97, 131)]


@pytest.fixture(autouse=True, params=DECODERS)
def decoder(request, monkeypatch):
    monkeypatch.setenv("MOCOV3_DS_DECODER", request.param)
    absent = decode.explain_absence(request.param)
    if absent:
        pytest.skip(f"{request.param}: {absent}")
    yield request.param


def assert_pixels(got, expected):
    if decode.current_decoder() == "simplejpeg":
        gap = np.abs(got.astype(int) - expected)
        assert gap.max() <= 2 and gap.mean() < 0.1, (gap.max(), gap.mean())
    else:
        np.testing.assert_array_equal(got, expected)


def crops_of(data, boxes=BOXES, flips=(False, True), size=64):
    out = np.zeros((2, 3, size, size), np.uint8)
    cut_crops(data, boxes, flips, out)
    return out


def reference_crops(image, boxes=BOXES, flips=(False, True), size=64):
    return crops_by_torchvision(image, boxes, flips, size)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [32, 224])
def test_two_crops_are_torchvisions(subsampling, size):
    data = encode_image(picture(), quality=90, subsampling=subsampling)
    assert_pixels(crops_of(data, size=size), reference_crops(decode_image(data), size=size))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_plain_jpegs_do_not_need_pillow(decoder, mode, progressive, monkeypatch):
    data = encode_image(picture().convert(mode), progressive=progressive)
    expected = reference_crops(decode_image(data))
    if decoder != "pillow":
        monkeypatch.delattr(decode, "decode_rgb")
    assert_pixels(crops_of(data), expected)


def test_views_share_no_pixels_with_their_neighbours_in_a_batch():
    data = encode_image(picture())
    batch = np.zeros((2, 5, 3, 16, 16), np.uint8)
    cut_crops(data, BOXES, [True, False], batch[:, 3])  # strided, as the ring of buffers is
    np.testing.assert_array_equal(batch[:, 3], crops_of(data, flips=[True, False], size=16))
    assert not batch[:, [0, 1, 2, 4]].any()


def test_size_is_height_and_width():
    assert read_size(encode_image(picture(40, 70))) == (40, 70)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_modes_become_rgb_as_pillow_converts_them(mode):
    data = encode_image(picture().convert(mode))
    assert_pixels(crops_of(data), reference_crops(decode_image(data)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1"])
def test_png_modes_become_rgb(mode):
    image = picture().convert(mode)
    data = encode_image(image, "PNG")  # also the PNG that ImageNet names .JPEG: contents decide
    assert_pixels(crops_of(data), reference_crops(image.convert("RGB")))


def test_palette_with_transparency_keeps_its_colours():
    image = picture().convert("P")
    data = encode_image(image, "PNG", transparency=bytes(range(256)))
    assert_pixels(crops_of(data), reference_crops(image.convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped():
    deep = (np.mgrid[:97, :131][1] * 500).astype(np.uint16)
    data = encode_image(Image.fromarray(deep), "PNG")
    expected = Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    assert_pixels(crops_of(data), reference_crops(expected))


def test_exif_rotation_is_ignored_as_the_reference_does():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode_image(picture(), exif=exif)
    assert read_size(data) == (97, 131)
    assert_pixels(crops_of(data), reference_crops(decode_image(data)))


@pytest.mark.parametrize(("height", "width"), [(97, 131), (131, 97), (40, 300), (64, 64)])
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 37), (64, 64)])
def test_centre_crop_is_torchvisions(height, width, size, resize):
    data = encode_image(picture(height, width))
    image = tv.resize(decode_image(data), resize, InterpolationMode.BILINEAR)
    expected = np.asarray(tv.center_crop(image, [size, size])).transpose(2, 0, 1)
    np.testing.assert_array_equal(centre_crop(data, size, resize), expected)


def test_centre_crop_larger_than_the_image_is_an_error():
    with pytest.raises(ValueError, match="224 pixels needs resize >= 224 x 224, got 200"):
        centre_crop(encode_image(picture()), 224, 200)


def bomb():
    """A PNG header that promises 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return png(b"IHDR" + header, b"IDAT")


def png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(framed, chunks))


def framed(chunk):
    return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))


def unreadable():
    whole = encode_image(picture())
    return {
        "empty file": b"",
        "not an image": b"<html>404 not found</html>" * 40,
        "damaged header|not an image": whole[:20],
        "truncated JPEG": whole[: len(whole) // 2],
        "truncated JPEG data": whole[:-1],
        "truncated PNG|damaged PNG": encode_image(picture(), "PNG")[:2000],
        "too many pixels: at most": bomb(),
    }


@pytest.mark.parametrize("reason", unreadable())
def test_unreadable_images_say_why(reason):
    with pytest.raises(UnreadableImage, match=reason):
        crops_of(unreadable()[reason])
    with pytest.raises(UnreadableImage, match=reason):
        centre_crop(unreadable()[reason], 32, 37)


def test_images_just_too_large_are_refused():
    with pytest.raises(UnreadableImage, match="too many pixels: 131 x 97, at most 12706"):
        read_size(encode_image(picture()), max_pixels=97 * 131 - 1)
    assert read_size(encode_image(picture()), max_pixels=97 * 131) == (97, 131)


def test_a_photograph_of_108_million_pixels_is_read():
    header = struct.pack(">IIBBBBB", 12_000, 9_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(9_000 * 12_001), 1)
    assert read_size(png(b"IHDR" + header, b"IDAT" + rows)) == (9_000, 12_000)


def test_a_png_may_hold_megabytes_of_text():
    text = b"tEXt" + b"prompt\0" + bytes(2 << 20)
    image = encode_image(picture(), "PNG")
    header = image[:33]
    with_text = header + framed(b"zTXt" + b"prompt\0\0" + zlib.compress(text)) + image[33:]
    assert_pixels(crops_of(with_text), crops_of(image))


def with_scans(count, side):
    """A progressive JPEG whose last scan comes many times again; each takes a few bytes."""
    data = encode_image(Image.new("RGB", (side, side)), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (count - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded():
    with pytest.raises(UnreadableImage, match="too many scans: 20000 of 256 x 256 pixels, at most"):
        crops_of(with_scans(20_000, 256))
    with pytest.raises(UnreadableImage, match="too many scans"):
        centre_crop(with_scans(20_000, 256), 32, 37)
    boxes = [(0, 0, 64, 64)] * 2
    assert_pixels(crops_of(with_scans(40, 64), boxes), crops_of(with_scans(32, 64), boxes))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("shape", [(60_000, 1), (1, 60_000)])
def test_a_strip_costs_no_more_than_its_crop(kind, shape):
    grey = np.linspace(0, 255, 60_000).astype(np.uint8).reshape(shape)
    crop = centre_crop(encode_image(Image.fromarray(grey), kind, quality=100), 32, 64)
    assert abs(int(crop.min()) - 127) <= 2 and abs(int(crop.max()) - 127) <= 2
    small = Image.fromarray(grey[:90, :90])  # the same rule where the whole could be resized
    whole = centre_crop(encode_image(small, "PNG"), 32, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "MAX_PIXELS", small.width * small.height)
        assert np.abs(centre_crop(encode_image(small, "PNG"), 32, 64) - whole.astype(int)).max() < 2


def test_a_large_image_of_decimal_text_is_refused():
    with pytest.raises(UnreadableImage, match="1048576 are read of a PPM in decimal text"):
        read_size(b"P3\n1025 1024\n255\n" + b"0 " * 9)


def test_a_program_is_never_started_for_a_postscript_file():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(UnreadableImage, match="not an image"):
        read_size(data)


# --------------------------------------------------------------------------------- the decoders


@pytest.mark.parametrize("name", ["native", "simplejpeg"])
def test_a_decoder_that_is_forced_but_absent_is_refused_with_its_reason(name):
    with pytest.raises(ValueError, match=f"DECODER={name} cannot run: it is away; unset"):
        decode.choose_decoder(name, lambda _: "it is away")


def test_an_unknown_decoder_is_refused(monkeypatch):
    monkeypatch.setenv("MOCOV3_DS_DECODER", "fastest")
    with pytest.raises(ValueError, match="fastest is none of native, simplejpeg, pillow"):
        decode.current_decoder()


def test_the_decoder_that_the_environment_names_runs(decoder):
    assert decode.current_decoder() == decode.describe_decoder() == decoder


def test_the_next_decoder_runs_and_the_log_says_why():
    absent = {"native": "no compiler", "simplejpeg": "not installed", "pillow": ""}
    description = "pillow; not native: no compiler; not simplejpeg: not installed"
    assert decode.choose_decoder("", absent.__getitem__) == ("pillow", description)


def test_a_library_from_other_sources_is_no_missing_library(monkeypatch):
    """It would not do to train slowly for weeks because a file is old."""

    def refuse():
        raise ValueError("built from other C++ sources")

    monkeypatch.setattr(native, "jpeg_library", refuse)
    with pytest.raises(ValueError, match="other C"):
        decode.explain_absence("native")
