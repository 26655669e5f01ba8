"""What is drawn for a view: the reference's distributions, pure randomness, the same in C++."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torchvision import transforms as tv

from mocov3_ds.data.views import native, photometric
from mocov3_ds.data.views.photometric import PARAMETERS, ViewSpec, draw

SPEC = ViewSpec()
PLAIN_ROW = (1.0, 1.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 0.0, 0.0)


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
    scale, ratio = [SPEC.crop_min, SPEC.crop_max], list(photometric.RATIO)
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
    expected = tv.RandomResizedCrop.get_params(image, [1.0, 1.0], list(photometric.RATIO))
    assert draw(whole, 0, 0, 0, height, width)[0] == [expected] * 2


def test_jitter_and_flags_are_distributed_as_specified():
    count = 12000
    drawn = [draw(SPEC, 5, 0, i, 224, 224) for i in range(count)]
    params_NVP = np.stack([params for _, _, params in drawn]).astype(float)
    assert params_NVP.shape == (count, 2, PARAMETERS)
    shares = {
        "jitter": ((params_NVP[..., photometric.ORDER] >= 0).mean(0), (0.8, 0.8)),
        "grey": (params_NVP[..., photometric.GREY].mean(0), (0.2, 0.2)),
        "blur": ((params_NVP[..., photometric.BOX_RADIUS] >= 0).mean(0), (1.0, 0.1)),
        "solarise": (params_NVP[..., photometric.SOLARISE].mean(0), (0.0, 0.2)),
        "flip": (np.array([flips for _, flips, _ in drawn]).mean(0), (0.5, 0.5)),
    }
    for name, (got, wanted) in shares.items():
        for share, p in zip(got, wanted, strict=True):
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / count), name
    jittered_NP = params_NVP[params_NVP[..., photometric.ORDER] >= 0]
    orders = np.bincount(jittered_NP[:, photometric.ORDER].astype(int), minlength=24)
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
        if column == photometric.HUE:
            reference = np.trunc(reference * 255)
        mine = jittered_NP[:, column]
        mine = np.where(mine > 127, mine - 256, mine) if column == photometric.HUE else mine
        assert ks(mine, reference) < ks_bound(len(mine), count), column


def test_blur_widths_are_uniform():
    weights = np.array([draw(SPEC, 0, 0, i, 9, 9)[2][0, 6:9] for i in range(6000)], float)
    sigmas = np.random.default_rng(0).uniform(0.1, 2.0, 6000)
    reach = weights[:, 0] + weights[:, 2] / weights[:, 1]  # Pillow's radius, monotone in sigma
    boxes = np.array([photometric.box_of(s) for s in sigmas], float)
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


@pytest.mark.skipif(not native.ready(), reason="the extension is not built")
@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        ViewSpec(crop_min=1.0),  # the central fallback
        ViewSpec(hue=0.5, blur_sigma=(0.0, 16.0), blur_p=(1.0, 1.0), solarise_p=(0.5, 0.5)),
    ],
)
def test_the_extension_draws_the_same_bits(spec):
    rng = np.random.default_rng(3)
    for _ in range(1500):
        height, width = (int(x) for x in np.exp(rng.uniform(0, 8, 2)))
        seed, epoch, sample = (int(x) for x in rng.integers(0, 2**62, 3) >> rng.integers(0, 62, 3))
        boxes, flips, params = draw(spec, seed, epoch, sample, height, width)
        got_boxes, got_flips, got = native.draw(spec, (seed, epoch, sample), height, width)
        assert (got_boxes, got_flips) == (boxes, flips)
        assert got.tobytes() == params.tobytes()


@pytest.mark.skipif(not native.ready(), reason="the extension is not built")
def test_seeds_beyond_64_bits_wrap_alike():
    key = (2**64 + 5, 2**70, 2**63)
    assert native.draw(SPEC, key, 30, 40)[:2] == draw(SPEC, *key, 30, 40)[:2]
