"""The colour work of the views: Pillow's arithmetic to the last bit, however it is computed."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tvf

from mocov3_ds.data.views import draw, native, photometric, reference
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.photometric import make_views, normalise_crops
from mocov3_ds.data.views.spec import ORDERS, PLAIN_PARAMS, Column, ViewSpec

SPEC = ViewSpec()
UNIT = {
    "mean": (0.0, 0.0, 0.0),
    "std": (1 / 255,) * 3,
    "dtype": torch.float32,
}  # pixels as they are


@pytest.fixture(autouse=True, params=["native", "torch"])
def implementation(request, monkeypatch):
    """Each test of a result runs with each writing of the colour work on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(native, "is_built", lambda: False)
    elif not native.is_built():
        pytest.skip("the extension is not built")
    return request.param


def crops(count, size=48, seed=0):
    """Noise, flat and near-black crops, and smooth ones: rounding differs between them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    smooth = 255 * np.stack([x, y, (x + y) / 2])
    kinds = [
        rng.integers(0, 256, (3, size, size)),
        np.broadcast_to(rng.integers(0, 256, (3, 1, 1)), (3, size, size)),
        rng.integers(0, 5, (3, size, size)),
        smooth,
    ]
    return torch.from_numpy(np.stack([kinds[i % 4] for i in range(count)]).astype(np.uint8))


def image_of(crop_CHW):
    return Image.fromarray(crop_CHW.permute(1, 2, 0).contiguous().numpy())


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def rows(**columns):
    """Parameter rows with some columns (given in capitals' names) set per row."""
    count = len(next(iter(columns.values())))
    table = torch.tensor([PLAIN_PARAMS] * count)
    for name, values in columns.items():
        table[:, Column[name.upper()]] = torch.tensor(values, dtype=torch.float32)
    return table


def blur_rows(sigmas):
    boxes = [draw.box_filter(s) for s in sigmas]
    radius, weight, edge = zip(*boxes, strict=True)
    return rows(box_radius=radius, box_weight=weight, box_edge=edge)


def ours(crops_BCHW, params_BP):
    return make_views(crops_BCHW, params_BP, **UNIT).round().to(torch.uint8)


# -------------------------------------------------------------------------------- operations


FACTORS = torch.tensor([0.0, 0.6, 0.7731, 0.99, 1.0, 1.0101, 1.2345, 1.4, 2.0])


@pytest.mark.parametrize(
    ("column", "adjust"),
    [
        (Column.BRIGHTNESS, tvf.adjust_brightness),
        (Column.CONTRAST, tvf.adjust_contrast),
        (Column.SATURATION, tvf.adjust_saturation),
    ],
)
def test_enhancers_equal_pillow_bit_for_bit(column, adjust):
    for crop in crops(4):
        x_RCHW = crop.float().expand(len(FACTORS), -1, -1, -1)
        got_RCHW = photometric.JITTER_OPERATIONS[column](x_RCHW, FACTORS.view(-1, 1, 1, 1))
        for got, factor in zip(got_RCHW, FACTORS.tolist(), strict=True):
            assert torch.equal(got.to(torch.uint8), pixels_of(adjust(image_of(crop), factor)))


@pytest.mark.parametrize(
    ("column", "adjust"),
    [
        (Column.BRIGHTNESS, tvf.adjust_brightness),
        (Column.CONTRAST, tvf.adjust_contrast),
        (Column.SATURATION, tvf.adjust_saturation),
    ],
)
def test_wide_factors_in_a_row_equal_pillow_bit_for_bit(column, adjust):
    order = next(i for i, o in enumerate(ORDERS) if (o[0], o[3]) == (column, Column.HUE))
    params = rows(order=[order] * len(FACTORS))
    params[:, column] = FACTORS
    for crop in crops(4):
        got_RCHW = ours(crop.expand(len(FACTORS), -1, -1, -1), params)
        for got, factor in zip(got_RCHW, FACTORS.tolist(), strict=True):
            expected = tvf.adjust_hue(adjust(image_of(crop), factor), 0.0)
            assert torch.equal(got, pixels_of(expected))


def hue_of_all(colours_N3, factors):
    """Pillow's and our turn of a list of colours (N must be a square number)."""
    side = math.isqrt(len(colours_N3))
    plane_CHW = torch.from_numpy(colours_N3.reshape(side, side, 3)).permute(2, 0, 1)
    params = rows(hue=[int(f * 255) & 255 for f in factors], order=[0] * len(factors))
    got_BCHW = ours(plane_CHW.expand(len(factors), -1, -1, -1), params)
    image = image_of(plane_CHW)
    return got_BCHW, torch.stack([pixels_of(tvf.adjust_hue(image, f)) for f in factors])


def test_hue_equals_pillow_bit_for_bit_on_a_lattice_of_colours():
    levels = np.array([0, 1, 2, 3, 50, 51, 85, 127, 128, 170, 200, 253, 254, 255])
    lattice = np.array([*product(levels, repeat=3)], np.uint8)
    colours = np.concatenate([lattice, lattice[: 53**2 - len(lattice)]])
    got, expected = hue_of_all(colours, [-0.5, -0.1, -0.03, 0.0, 0.01, 0.0999, 0.5])
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_hue_equals_pillow_bit_for_bit_on_every_colour():
    index = np.arange(1 << 24, dtype=np.uint32)
    colours = np.stack([index >> 16, index >> 8 & 255, index & 255], -1).astype(np.uint8)
    got, expected = hue_of_all(colours, [0.07])
    assert torch.equal(got, expected)


def test_grey_equals_pillow_bit_for_bit():
    x_BCHW = crops(4)
    for got, crop in zip(ours(x_BCHW, rows(grey=[1] * 4)), x_BCHW, strict=True):
        assert torch.equal(got, pixels_of(tvf.to_grayscale(image_of(crop), 3)))


def test_solarise_equals_pillow_bit_for_bit():
    x_BCHW = crops(4)
    for got, crop in zip(ours(x_BCHW, rows(solarise=[1] * 4)), x_BCHW, strict=True):
        assert torch.equal(got, pixels_of(ImageOps.solarize(image_of(crop))))


@pytest.mark.parametrize("size", [1, 2, 5, 48])
def test_blur_equals_pillow_bit_for_bit(size):
    sigmas = [0.1, 0.3, 0.5, 0.77, 1.0, 1.2247, 1.3, 1.6, 1.99, 2.0, 3.7, 8.0]
    x_BCHW = crops(4, size).repeat_interleave(len(sigmas), 0)
    got_BCHW = ours(x_BCHW, blur_rows(sigmas * 4))
    for got, crop, sigma in zip(got_BCHW, x_BCHW, sigmas * 4, strict=True):
        expected = image_of(crop).filter(ImageFilter.GaussianBlur(sigma))
        assert torch.equal(got, pixels_of(expected)), sigma


def test_box_weights_are_pillows_for_many_sigmas():
    """An impulse shows the weights: twelve bits of them per pass would not pass unnoticed."""
    crop = torch.zeros(3, 15, 15, dtype=torch.uint8)
    crop[:, 7, 7] = 255
    sigmas = np.random.default_rng(1).uniform(0.1, 2.0, 300).tolist()
    got_BCHW = ours(crop.expand(300, -1, -1, -1), blur_rows(sigmas))
    for got, sigma in zip(got_BCHW, sigmas, strict=True):
        assert torch.equal(got, pixels_of(image_of(crop).filter(ImageFilter.GaussianBlur(sigma))))


@pytest.fixture
def remembered_sigmas(monkeypatch):
    """The reference blurs by the width that was drawn, not by one with the same box filter."""
    plain, drawn = draw.box_filter, {}

    def remember(sigma):
        box = plain(sigma)
        drawn[tuple(map(float, box))] = sigma
        return box

    monkeypatch.setattr(draw, "box_filter", remember)
    monkeypatch.setattr(reference, "find_sigma", lambda params: drawn[tuple(params[6:9])])


@pytest.mark.usefixtures("remembered_sigmas")
@pytest.mark.parametrize("view", [0, 1])
def test_drawn_chains_equal_pillow_bit_for_bit(view):
    x_BCHW = crops(96, 40)
    drawn = [draw_views(SPEC, 3, 1, i, 300, 400)[2][view] for i in range(96)]
    params = torch.from_numpy(np.stack(drawn))
    for got, crop, row in zip(ours(x_BCHW, params), x_BCHW, params, strict=True):
        view = reference.make_drawn_view(image_of(crop), (0, 0, 40, 40), False, row.tolist(), 40)
        assert torch.equal(got, pixels_of(view))


def test_normalisation_is_torchvisions():
    x_BCHW = crops(4)
    expected = torch.stack([tvf.normalize(x / 255, SPEC.mean, SPEC.std) for x in x_BCHW])
    got = make_views(x_BCHW, rows(grey=[0] * 4), SPEC.mean, SPEC.std, torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert torch.equal(got, normalise_crops(x_BCHW, SPEC.mean, SPEC.std, torch.float32))
    low = make_views(x_BCHW, rows(grey=[0] * 4), SPEC.mean, SPEC.std, torch.bfloat16)
    assert torch.equal(low, got.bfloat16())


def test_a_row_does_not_depend_on_its_place_in_the_batch():
    x_BCHW = crops(24, 16, seed=5)
    params = torch.from_numpy(
        np.stack([draw_views(SPEC, 0, 0, i, 90, 90)[2][1] for i in range(24)])
    )
    whole = make_views(x_BCHW, params, SPEC.mean, SPEC.std, torch.float32)
    places = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    moved = make_views(x_BCHW[places], params[places], SPEC.mean, SPEC.std, torch.float32)
    assert torch.equal(moved, whole[places])
    normalisation = photometric.scale_and_shift(SPEC.mean, SPEC.std)
    inputs = (x_BCHW, params, *normalisation, torch.empty_like(whole))
    one_by_one = photometric.make_views_torch(*inputs, cached_values=1)
    assert torch.equal(one_by_one, whole)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_channels_without_colours_are_grey_images_of_their_own(channels):
    spec = without_colours(channels)
    planes = crops(2 * channels, 40).flatten(0, 1)[: 2 * channels]
    x_BCHW = planes.view(-1, channels, 40, 40).repeat(24, 1, 1, 1)
    params = torch.from_numpy(
        np.stack([draw_views(spec, 3, 1, i, 300, 400)[2][i % 2] for i in range(len(x_BCHW))])
    )
    unit = {"mean": (0.0,) * channels, "std": (1 / 255,) * channels, "dtype": torch.float32}
    got_BCHW = make_views(x_BCHW, params, **unit).round().to(torch.uint8)
    for got_CHW, crop_CHW, row in zip(got_BCHW, x_BCHW, params.tolist(), strict=True):
        for got_HW, crop_HW in zip(got_CHW, crop_CHW, strict=True):
            grey = Image.fromarray(crop_HW.numpy())
            view = reference.make_drawn_view(grey, (0, 0, 40, 40), False, row, 40)
            assert np.array_equal(np.asarray(view), got_HW.numpy())
    augmented = x_BCHW.clone()
    photometric.augment_crops(augmented.numpy(), params.numpy())
    assert torch.equal(augmented, got_BCHW)


def without_colours(channels):
    return ViewSpec(
        mean=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)[:channels],
        std=(0.6, 0.5, 0.4, 0.3, 0.2, 0.1)[:channels],
        saturation=0.0,
        hue=0.0,
        grey_p=0.0,
        blur_sigma=(0.1, 4.0),
        solarise_p=(0.3, 0.5),
        solarise_threshold=100,
    )


@pytest.mark.parametrize("channels", [1, 6])
def test_each_channel_has_its_own_mean_and_deviation(channels):
    spec = without_colours(channels)
    x_BCHW = crops(6).flatten(0, 1).view(-1, channels, 48, 48)
    for dtype in (torch.float32, torch.bfloat16):
        got = make_views(x_BCHW, rows(order=[-1] * len(x_BCHW)), spec.mean, spec.std, dtype)
        for c in range(channels):
            expected = x_BCHW[:, c].float() * np.float32(1 / (255 * spec.std[c]))
            expected += np.float32(-spec.mean[c] / spec.std[c])
            assert torch.equal(got[:, c], expected.to(dtype))


def test_a_jitter_without_hue_leaves_the_hue_alone():
    """As torchvision's does, whose turn by 0 goes through rounded HSV."""
    x_BCHW = crops(8)
    plain = ViewSpec(hue=0.0, jitter_p=1.0, brightness=0.0, contrast=0.0, saturation=0.0)
    params = torch.from_numpy(np.stack([draw_views(plain, 0, 0, i, 9, 9)[2][1] for i in range(8)]))
    params[:, Column.GREY] = params[:, Column.SOLARISE] = 0
    params[:, Column.BOX_RADIUS] = -1
    assert torch.equal(ours(x_BCHW, params), x_BCHW)
    params[:, Column.HUE] = 0
    assert not torch.equal(ours(x_BCHW, params), x_BCHW)


def test_solarisation_begins_at_its_threshold():
    x_BCHW = crops(4)
    for threshold in (1, 77, 128, 255):
        got_BCHW = ours(x_BCHW, rows(solarise=[threshold / 128] * 4))
        for got, crop in zip(got_BCHW, x_BCHW, strict=True):
            assert torch.equal(got, pixels_of(ImageOps.solarize(image_of(crop), threshold)))


def test_the_crops_are_not_changed():
    x_BCHW = crops(4)
    before = x_BCHW.clone()
    make_views(x_BCHW, rows(grey=[1] * 4), SPEC.mean, SPEC.std, torch.float32)
    assert torch.equal(x_BCHW, before)


def test_augment_is_photometric_without_its_normalisation():
    x_BCHW = crops(32, 24)
    params = torch.from_numpy(
        np.stack([draw_views(SPEC, 1, 0, i, 90, 90)[2][1] for i in range(32)])
    )
    expected = ours(x_BCHW, params)
    photometric.augment_crops(x_BCHW.numpy(), params.numpy())
    assert torch.equal(x_BCHW, expected)


def test_augment_takes_any_strides_and_touches_nothing_else():
    pool = torch.zeros(2, 5, 3, 16, 16, dtype=torch.uint8)
    pool[:, 3] = crops(2, 16)
    params = rows(solarise=[1, 0], grey=[0, 1])
    expected = ours(pool[:, 3], params)
    photometric.augment_crops(pool.numpy()[:, 3], params.numpy())
    assert torch.equal(pool[:, 3], expected)
    assert not pool[:, [0, 1, 2, 4]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_can_go_into_a_given_tensor(dtype):
    x_BCHW = crops(8, 16)
    params = torch.from_numpy(np.stack([draw_views(SPEC, 0, 0, i, 90, 90)[2][1] for i in range(8)]))
    out = torch.full(x_BCHW.shape, float("nan"), dtype=dtype)
    got = make_views(x_BCHW, params, SPEC.mean, SPEC.std, dtype, out)
    assert got.data_ptr() == out.data_ptr()
    assert torch.equal(out, make_views(x_BCHW, params, SPEC.mean, SPEC.std, dtype))
