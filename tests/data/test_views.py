"""Views: Pillow's arithmetic to the last bit, the reference's distributions, pure randomness."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

from mocov3_ds.data import views
from mocov3_ds.data.views import ORDERS, PARAMETERS, ViewSpec, draw, normalise, photometric

SPEC = ViewSpec()
UNIT = {
    "mean": (0.0, 0.0, 0.0),
    "std": (1 / 255,) * 3,
    "dtype": torch.float32,
}  # pixels as they are
PLAIN_ROW = (1.0, 1.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 0.0, 0.0)


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
    table = torch.tensor([PLAIN_ROW] * count)
    for name, values in columns.items():
        table[:, getattr(views, name.upper())] = torch.tensor(values, dtype=torch.float32)
    return table


def blur_rows(sigmas):
    boxes = [views.box_of(s) for s in sigmas]
    radius, weight, edge = zip(*boxes, strict=True)
    return rows(box_radius=radius, box_weight=weight, box_edge=edge)


def ours(crops_BCHW, params_BP):
    return photometric(crops_BCHW, params_BP, **UNIT).round().to(torch.uint8)


# -------------------------------------------------------------------------------- operations


FACTORS = torch.tensor([0.0, 0.6, 0.7731, 0.99, 1.0, 1.0101, 1.2345, 1.4, 2.0])


@pytest.mark.parametrize(
    ("column", "adjust"),
    [
        (views.BRIGHTNESS, tvf.adjust_brightness),
        (views.CONTRAST, tvf.adjust_contrast),
        (views.SATURATION, tvf.adjust_saturation),
    ],
)
def test_enhancers_equal_pillow_bit_for_bit(column, adjust):
    for crop in crops(4):
        x_RCHW = crop.float().expand(len(FACTORS), -1, -1, -1)
        got_RCHW = views._JITTER_OPERATIONS[column](x_RCHW, FACTORS.view(-1, 1, 1, 1))
        for got, factor in zip(got_RCHW, FACTORS.tolist(), strict=True):
            assert torch.equal(got.to(torch.uint8), pixels_of(adjust(image_of(crop), factor)))


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


def reference_chain(crop_CHW, row):
    """The same row with Pillow and torchvision, one operation after another."""
    image, row = image_of(crop_CHW), row.tolist()
    adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation)
    if row[views.ORDER] >= 0:
        for column in ORDERS[int(row[views.ORDER])]:
            if column == views.HUE:
                turn = int(row[views.HUE])
                turn = turn - 256 if turn > 127 else turn
                image = tvf.adjust_hue(image, (turn + math.copysign(0.5, turn)) / 255)
            else:
                image = adjust[column](image, row[column])
    if row[views.GREY]:
        image = tvf.to_grayscale(image, 3)
    if row[views.BOX_RADIUS] >= 0:
        image = image.filter(ImageFilter.GaussianBlur(SIGMA_OF[tuple(row[6:9])]))
    if row[views.SOLARISE]:
        image = ImageOps.solarize(image)
    return image


SIGMA_OF = {}


@pytest.fixture
def remembered_sigmas(monkeypatch):
    plain = views.box_of

    def remember(sigma):
        box = plain(sigma)
        SIGMA_OF[tuple(map(float, box))] = sigma
        return box

    monkeypatch.setattr(views, "box_of", remember)


@pytest.mark.usefixtures("remembered_sigmas")
@pytest.mark.parametrize("view", [0, 1])
def test_drawn_chains_equal_pillow_bit_for_bit(view):
    x_BCHW = crops(96, 40)
    drawn = [draw(SPEC, 3, 1, i, 300, 400)[2][view] for i in range(96)]
    params = torch.from_numpy(np.stack(drawn))
    for got, crop, row in zip(ours(x_BCHW, params), x_BCHW, params, strict=True):
        assert torch.equal(got, pixels_of(reference_chain(crop, row)))


def test_normalisation_is_torchvisions():
    x_BCHW = crops(4)
    expected = torch.stack([tvf.normalize(x / 255, SPEC.mean, SPEC.std) for x in x_BCHW])
    got = photometric(x_BCHW, rows(grey=[0] * 4), SPEC.mean, SPEC.std, torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert torch.equal(got, normalise(x_BCHW, SPEC.mean, SPEC.std, torch.float32))
    low = photometric(x_BCHW, rows(grey=[0] * 4), SPEC.mean, SPEC.std, torch.bfloat16)
    assert torch.equal(low, got.bfloat16())


def test_a_row_does_not_depend_on_its_place_in_the_batch(monkeypatch):
    x_BCHW = crops(24, 16, seed=5)
    params = torch.from_numpy(np.stack([draw(SPEC, 0, 0, i, 90, 90)[2][1] for i in range(24)]))
    whole = photometric(x_BCHW, params, SPEC.mean, SPEC.std, torch.float32)
    places = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    moved = photometric(x_BCHW[places], params[places], SPEC.mean, SPEC.std, torch.float32)
    assert torch.equal(moved, whole[places])
    monkeypatch.setattr(views, "_CACHED_VALUES", 1)  # one row at a time
    assert torch.equal(photometric(x_BCHW, params, SPEC.mean, SPEC.std, torch.float32), whole)


def test_the_crops_are_not_changed():
    x_BCHW = crops(4)
    before = x_BCHW.clone()
    photometric(x_BCHW, rows(grey=[1] * 4), SPEC.mean, SPEC.std, torch.float32)
    assert torch.equal(x_BCHW, before)


# ------------------------------------------------------------------------------------- draws


def test_a_view_depends_on_seed_epoch_and_sample_alone():
    samples = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (7, 3, 1_281_166), (2**40, 0, 2**33)]

    def one(key):
        boxes, flips, params = draw(SPEC, *key, 375, 500)
        return boxes, flips, params.tolist()

    alone = [one(key) for key in samples]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, samples * 20)) == alone * 20
    assert len({str(view) for view in alone}) == len(samples)


def test_the_two_views_differ():
    boxes, _, params = draw(SPEC, 0, 0, 0, 375, 500)
    assert boxes[0] != boxes[1] and not np.array_equal(params[0], params[1])


def test_draws_stay_what_they_are():
    """A run resumed with a later version must see the same views: these numbers never change."""
    boxes, flips, params = draw(SPEC, 17, 4, 1234, 375, 500)
    assert boxes == [(8, 34, 307, 347), (108, 223, 218, 251)]
    assert flips == [False, False]
    expected = [
        [1.0202709436416626, 0.8351221680641174, 1.0547878742218018, 20, 22],
        [1, 0, 16442225, 167495, 0],
        [1.3820143938064575, 0.7174609899520874, 0.9153270721435547, 236, 15],
        [0, 0, 10193499, 3291858, 0],
    ]
    assert params.reshape(4, 5).tolist() == expected


def test_a_probability_moves_no_other_draw():
    quiet = ViewSpec(jitter_p=0.0, grey_p=0.0, blur_p=(0.0, 0.0), solarise_p=(0.0, 0.0))
    for sample in range(50):
        boxes, flips, params = draw(quiet, 0, 0, sample, 375, 500)
        assert (boxes, flips) == draw(SPEC, 0, 0, sample, 375, 500)[:2]
        np.testing.assert_array_equal(params, [PLAIN_ROW] * 2)


def ks(a, b):
    """Two-sample Kolmogorov-Smirnov distance."""
    a, b = np.sort(a), np.sort(b)
    grid = np.concatenate([a, b])
    cdf = (np.searchsorted(x, grid, "right") / len(x) for x in (a, b))
    return np.abs(next(cdf) - next(cdf)).max()


def ks_bound(n, m):
    """Distance that equal distributions exceed once in 10,000 times."""
    return 2.23 * math.sqrt((n + m) / (n * m))


@pytest.mark.parametrize(("height", "width"), [(375, 500), (300, 900), (900, 280), (32, 32)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    count = 6000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    scale, ratio = [SPEC.crop_min, SPEC.crop_max], list(views.RATIO)
    theirs = np.array(
        [tv.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)], float
    )
    drawn = [draw(SPEC, 0, 0, i, height, width)[0] for i in range(count // 2)]
    mine = np.array(drawn, float).reshape(-1, 4)
    for box in (theirs, mine):
        assert (box >= 0).all() and (box[:, 2:] >= 1).all()
        assert (box[:, :2] + box[:, 2:] <= (height, width)).all()
    statistics = {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "room above": lambda b: b[:, 0] / (1 + height - b[:, 2]),
        "room at the left": lambda b: b[:, 1] / (1 + width - b[:, 3]),
    }
    for name, of in statistics.items():
        assert ks(of(theirs), of(mine)) < ks_bound(count, count), name


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (3, 2000), (2000, 3)])
def test_extreme_shapes_fall_back_to_the_centre_as_torchvision_does(height, width):
    whole = ViewSpec(crop_min=1.0)  # an attempt fits only if the image has just its aspect ratio
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    expected = tv.RandomResizedCrop.get_params(image, [1.0, 1.0], list(views.RATIO))
    assert draw(whole, 0, 0, 0, height, width)[0] == [expected] * 2


def test_jitter_and_flags_are_distributed_as_specified():
    count = 12000
    drawn = [draw(SPEC, 5, 0, i, 224, 224) for i in range(count)]
    params_NVP = np.stack([params for _, _, params in drawn]).astype(float)
    assert params_NVP.shape == (count, 2, PARAMETERS)
    shares = {
        "jitter": ((params_NVP[..., views.ORDER] >= 0).mean(0), (0.8, 0.8)),
        "grey": (params_NVP[..., views.GREY].mean(0), (0.2, 0.2)),
        "blur": ((params_NVP[..., views.BOX_RADIUS] >= 0).mean(0), (1.0, 0.1)),
        "solarise": (params_NVP[..., views.SOLARISE].mean(0), (0.0, 0.2)),
        "flip": (np.array([flips for _, flips, _ in drawn]).mean(0), (0.5, 0.5)),
    }
    for name, (got, wanted) in shares.items():
        for share, p in zip(got, wanted, strict=True):
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / count), name
    jittered_NP = params_NVP[params_NVP[..., views.ORDER] >= 0]
    orders = np.bincount(jittered_NP[:, views.ORDER].astype(int), minlength=24)
    expected = len(jittered_NP) / 24
    assert (
        (orders - expected) ** 2 / expected
    ).sum() < 60  # chi-square, 23 degrees: once in 25,000
    jitter = tv.ColorJitter(0.4, 0.4, 0.2, 0.1)
    torch.manual_seed(0)
    theirs = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)[1:]
        for _ in range(count)
    ]
    for column, reference in enumerate(np.array(theirs).T):
        if column == views.HUE:
            reference = np.trunc(reference * 255)
        mine = jittered_NP[:, column]
        mine = np.where(mine > 127, mine - 256, mine) if column == views.HUE else mine
        assert ks(mine, reference) < ks_bound(len(mine), count), column


def test_blur_widths_are_uniform():
    weights = np.array([draw(SPEC, 0, 0, i, 9, 9)[2][0, 6:9] for i in range(6000)], float)
    sigmas = np.random.default_rng(0).uniform(0.1, 2.0, 6000)
    reach = weights[:, 0] + weights[:, 2] / weights[:, 1]  # Pillow's radius, monotone in sigma
    boxes = np.array([views.box_of(s) for s in sigmas], float)
    assert ks(reach, boxes[:, 0] + boxes[:, 2] / boxes[:, 1]) < ks_bound(6000, 6000)


def test_draws_are_independent_across_neighbours():
    """Correlation of the first factor between neighbouring samples, epochs, seeds and views."""

    def factors(seed, epoch):
        every = ViewSpec(jitter_p=1.0)
        return np.array([draw(every, seed, epoch, i, 64, 64)[2][:, 0] for i in range(3000)], float)

    base = factors(0, 0)
    pairs = [
        (base[:-1, 0], base[1:, 0]),
        (base[:, 0], base[:, 1]),
        (base[:, 0], factors(0, 1)[:, 0]),
        (base[:, 0], factors(1, 0)[:, 0]),
        (base[1:, 0], factors(0, 1)[:-1, 0]),
    ]
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_min": 0.0}, "0 < crop_min"),
        ({"crop_min": 0.9, "crop_max": 0.5}, "crops from 0.9 to 0.5"),
        ({"grey_p": 1.5}, r"must lie in \[0, 1\]"),
        ({"blur_p": (0.0, -0.1)}, r"must lie in \[0, 1\]"),
        ({"hue": 0.6}, "hue"),
        ({"blur_sigma": (2.0, 0.1)}, "blur sigma"),
    ],
)
def test_impossible_specifications_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ViewSpec(**settings)
