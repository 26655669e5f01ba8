"""Channels of an image: made of what is stored, or refused; crops of other channels and forms."""

import io

import numpy as np
import pytest
from PIL import Image

from mocov3_ds.data.views import decode, layers
from mocov3_ds.data.views.decode import UnreadableImage
from tests.data.pictures import encode_image, picture


@pytest.fixture(autouse=True, params=["native", "pillow"])
def decoder(request, monkeypatch):
    monkeypatch.setenv("MOCOV3_DS_DECODER", request.param)
    if absent := decode.explain_absence(request.param):
        pytest.skip(f"{request.param}: {absent}")
    return request.param


def stored_array(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def pixels_of(data, channels):
    """(C, H, W)"""
    return layers.stack_layers(decode.decode_layers(data, channels))


def rgba(height=40, width=60):
    image = picture(height, width)
    image.putalpha(picture(height, width, seed=1).convert("L"))
    return image


ARRAY = np.random.default_rng(0).integers(0, 256, (40, 60, 6), dtype=np.uint8)


def as_greys(planes_CHW):
    return [Image.fromarray(x) for x in planes_CHW]


STORED = {
    "grey JPEG": (encode_image(picture(40, 60).convert("L")), 1),
    "colour JPEG": (encode_image(picture(40, 60)), 1),
    "RGBA PNG": (encode_image(rgba(), "PNG"), 4),
    "RGBA TIFF": (encode_image(rgba(), "TIFF"), 4),
    "grey with alpha": (encode_image(rgba().convert("LA"), "PNG"), 2),
    "CMYK TIFF": (encode_image(picture(40, 60).convert("CMYK"), "TIFF"), 4),
    "array": (stored_array(ARRAY), 6),
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("size", [(20, 30), (33, 7), (40, 60), (64, 80)])
def test_crops_are_pillows_channel_by_channel(kind, size):
    data, channels = STORED[kind]
    if kind == "array":
        greys = as_greys(ARRAY.transpose(2, 0, 1))
    else:
        image = Image.open(io.BytesIO(data))
        greys = [*(image.convert("L") if channels == 1 else image).split()]
    boxes, flips = [(0, 0, 40, 60), (5, 7, 31, 22)], [False, True]
    crops_VCHW = np.zeros((2, channels, *size), np.uint8)
    decode.cut_crops(data, boxes, flips, crops_VCHW)
    for crop_CHW, (y, x, height, width), flip in zip(crops_VCHW, boxes, flips, strict=True):
        for crop_HW, grey in zip(crop_CHW, greys, strict=True):
            cut = grey.crop((x, y, x + width, y + height))
            expected = np.asarray(cut.resize(size[::-1], Image.Resampling.BILINEAR))
            assert np.array_equal(crop_HW, expected[:, ::-1] if flip else expected)


def test_tall_crops_of_grey_images_are_pillows(decoder):
    """Newer Pillows weigh their rows first, which the library does in another order, too."""
    for mode in ("L", "RGB"):
        data = encode_image(picture(300, 40).convert(mode))
        crops_VCHW = np.zeros((2, 1, 20, 30), np.uint8)
        decode.cut_crops(data, [(0, 0, 300, 40), (2, 1, 290, 35)], [False, True], crops_VCHW)
        grey = Image.open(io.BytesIO(data)).convert("L")
        expected = np.asarray(grey.resize((30, 20), Image.Resampling.BILINEAR))
        assert np.array_equal(crops_VCHW[0, 0], expected)
        cut = grey.crop((1, 2, 36, 292)).resize((30, 20), Image.Resampling.BILINEAR)
        assert np.array_equal(crops_VCHW[1, 0], np.asarray(cut)[:, ::-1])


@pytest.mark.parametrize("stored", [(97, 131), (131, 97), (64, 64), (30, 200)])
def test_a_centre_crop_covers_its_form(stored):
    data, (tall, wide) = encode_image(picture(*stored)), (35, 49)
    crop_CHW = decode.centre_crop(data, (tall, wide))
    scale = max(40 / stored[0], 56 / stored[1])
    height, width = (int(side * scale + 1e-9) for side in stored)
    assert (height == 40 and width >= 56) or (height >= 40 and width == 56)
    resized = Image.open(io.BytesIO(data)).resize((width, height), Image.Resampling.BILINEAR)
    top, left = round((height - tall) / 2), round((width - wide) / 2)
    expected = np.asarray(resized.crop((left, top, left + wide, top + tall)))
    assert np.array_equal(crop_CHW.transpose(1, 2, 0), expected)
    grey = decode.centre_crop(data, (tall, wide), channels=1)
    assert grey.shape == (1, tall, wide)


@pytest.mark.parametrize(
    ("data", "channels", "words"),
    [
        (STORED["RGBA PNG"][0], 5, r"4 channels \(RGBA\) where 5 are wanted"),
        (encode_image(picture(9, 9)), 4, r"3 channels \(RGB\) where 4 are wanted"),
        (STORED["array"][0], 3, "6 channels where 3 are wanted"),
    ],
)
def test_what_has_other_channels_or_is_no_image_is_unreadable(data, channels, words):
    with pytest.raises(UnreadableImage, match=words):
        decode.decode_layers(data, channels)


def test_pixels_are_shown_in_rgb():
    for channels in (1, 2, 3, 6):
        shown = layers.as_picture(np.ascontiguousarray(ARRAY.transpose(2, 0, 1)[:channels]))
        expected = ARRAY[..., :3] if channels >= 3 else ARRAY[..., :1].repeat(3, 2)
        assert shown.mode == "RGB" and np.array_equal(np.asarray(shown), expected)
