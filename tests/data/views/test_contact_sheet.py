"""The sheet of views: ours and Pillow's tiles side by side, equal, for any kind of stored image."""

import io

import numpy as np
import pytest
from PIL import Image

from mocov3_ds.data.manifest import load
from mocov3_ds.data.views import decode, layers
from mocov3_ds.data.views.contact_sheet import draw_contact_sheet
from mocov3_ds.data.views.spec import ViewSpec
from tests.data.pictures import encode_image, picture
from tests.data.sets import make_set

GREYLESS = {"saturation": 0.0, "hue": 0.0, "grey_p": 0.0}


@pytest.fixture
def shards(tmp_path):
    def image(number):
        kind = "PNG" if number % 3 == 2 else "JPEG"
        return encode_image(picture(60 + number, 90, seed=number), kind)

    make_set(str(tmp_path / "set"), [4, 3], image)
    return str(tmp_path / "set")


def array_bytes(number, channels):
    pixels = np.random.default_rng(number).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def spec_of(channels, **changes):
    without_colours = {} if channels == 3 else GREYLESS
    return ViewSpec(
        mean=(0.5,) * channels, std=(0.25,) * channels, **{**without_colours, **changes}
    )


def tiles(path, rows, size, columns, channels=3):
    height, width = size
    wide = layers.strip_width(channels, width) + 4
    sheet = np.asarray(Image.open(path).convert("RGB"))
    assert sheet.shape == (18 + rows * (height + 4), columns * wide, 3)
    cut = sheet[18:].reshape(rows, height + 4, columns, wide, 3)
    return cut[:, :height, :, : wide - 4].transpose(0, 2, 1, 3, 4).astype(int)


def test_ours_are_the_same_draws_by_pillow(shards, tmp_path):
    out = tmp_path / "sheets" / "views.png"
    largest = draw_contact_sheet(shards, out, rows=5, size=(32, 32), seed=1, epochs=[2, 0])
    if decode.current_decoder() != "simplejpeg":
        assert largest == 0
    shown = tiles(out, 5, (32, 32), 1 + 2 * 4 + 2)
    for view in range(1, 9, 2):
        assert np.abs(shown[:, view] - shown[:, view + 1]).max() <= largest
    assert len({shown[:, view].tobytes() for view in range(1, 9, 2)}) == 4


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_channels_and_forms(tmp_path, channels):
    """Each channel has its place in the strip, and is what Pillow draws of it alone."""
    url = str(tmp_path / "set")
    make_set(url, [3], lambda number: array_bytes(number, channels))
    out, size = tmp_path / "views.png", (24, 36)
    spec = spec_of(channels)
    largest = draw_contact_sheet(url, out, rows=2, size=size, seed=1, epochs=[0], spec=spec)
    assert largest == 0
    shown = tiles(out, 2, size, 7 if channels == 1 else 5, channels)
    assert np.array_equal(shown[:, 1], shown[:, 2]) and np.array_equal(shown[:, 3], shown[:, 4])
    with_gaps = shown[:, 1, :, :, 0]
    parts = [with_gaps[:, :, n * 37 : n * 37 + 36].tobytes() for n in range(channels)]
    assert len({*parts}) == channels


def test_functions_of_a_user(tmp_path):
    """What is shown is what they returned, with the normalisation undone where there was one."""
    url = str(tmp_path / "set")
    make_set(url, [2], lambda number: array_bytes(number, 4))

    def corner(image, rng):
        return image[:8, :8]

    def floats(image, rng):
        return (image[:8, :8].transpose(2, 0, 1) / 255 - 0.5) / 0.25

    out, spec = tmp_path / "views.png", spec_of(4, functions=(corner, floats))
    told = draw_contact_sheet(url, out, rows=2, size=(8, 8), seed=0, epochs=[0], spec=spec)
    assert told is None
    shown = tiles(out, 2, (8, 8), 3, 4)
    manifest = load(url)
    for row, number in enumerate(range(manifest.samples)):
        pixels_HWC = np.load(io.BytesIO(array_bytes(number, 4)))[:8, :8]
        for channel in range(4):
            place = slice(9 * channel, 9 * channel + 8)
            for view in (1, 2):
                assert np.array_equal(shown[row, view, :, place, 0], pixels_HWC[:, :, channel])


def test_a_difference_is_told(shards, tmp_path):
    plain = ViewSpec(jitter_p=0.0, grey_p=0.0, blur_p=(1.0, 1.0), blur_sigma=(2.0, 2.0))
    out = tmp_path / "views.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mocov3_ds.data.views.reference.find_sigma", lambda _: 0.5)
        sizes = {"rows": 2, "size": (32, 32), "seed": 0, "epochs": [0]}
        assert draw_contact_sheet(shards, out, **sizes, spec=plain) > 10


@pytest.mark.parametrize(("rows", "epochs"), [(0, [0]), (1, [])])
def test_nothing_to_show_is_refused(shards, tmp_path, rows, epochs):
    with pytest.raises(ValueError, match=f"{rows} rows of 7 samples in {len(epochs)} epochs"):
        out = tmp_path / "x.png"
        draw_contact_sheet(shards, out, rows=rows, size=(32, 32), seed=0, epochs=epochs)
