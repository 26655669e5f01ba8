"""What is drawn for a view: the reference's distributions, pure randomness, the same in C++."""

import ctypes
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import transforms as tv

from mocov3_ds.data.views import native
from mocov3_ds.data.views.draw import box_filter, draw_views
from mocov3_ds.data.views.spec import ASPECT_RATIOS, PARAMETERS, PLAIN_PARAMS, Column, ViewSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SPEC = ViewSpec()
NATIVE = Path(native.__file__).parent


def test_a_view_depends_on_seed_epoch_and_sample_alone():
    samples = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (7, 3, 1_281_166), (2**40, 0, 2**33)]

    def one(key):
        boxes, flips, params = draw_views(SPEC, *key, 375, 500)
        return boxes, flips, params.tolist()

    alone = [one(key) for key in samples]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, samples * 20)) == alone * 20
    assert len({str(view) for view in alone}) == len(samples)


def test_the_two_views_differ():
    boxes, _, params = draw_views(SPEC, 0, 0, 0, 375, 500)
    assert boxes[0] != boxes[1] and not np.array_equal(params[0], params[1])


def test_draws_stay_what_they_are():
    """A run resumed with a later version must see the same views: these numbers never change."""
    boxes, flips, params = draw_views(SPEC, 17, 4, 1234, 375, 500)
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
        boxes, flips, params = draw_views(quiet, 0, 0, sample, 375, 500)
        assert (boxes, flips) == draw_views(SPEC, 0, 0, sample, 375, 500)[:2]
        np.testing.assert_array_equal(params, [PLAIN_PARAMS] * 2)


def ks(a, b):
    """Two-sample Kolmogorov-Smirnov distance."""
    a, b = np.sort(a), np.sort(b)
    grid = np.concatenate([a, b])
    cdf = (np.searchsorted(x, grid, "right") / len(x) for x in (a, b))
    return np.abs(next(cdf) - next(cdf)).max()


def ks_bound(n, m):
    """Distance that equal distributions exceed once in 10,000 times."""
    return 2.23 * math.sqrt((n + m) / (n * m))


WIDE = ViewSpec(aspect=(0.4, 1.9))


@pytest.mark.parametrize(
    ("height", "width", "spec"),
    [(375, 500, SPEC), (300, 900, SPEC), (900, 280, SPEC), (32, 32, SPEC), (375, 500, WIDE)],
)
def test_boxes_are_distributed_as_torchvisions(height, width, spec):
    count = 6000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    scale, ratio = [spec.crop_min, spec.crop_max], list(spec.aspect)
    theirs = np.array(
        [tv.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)], float
    )
    drawn = [draw_views(spec, 0, 0, i, height, width)[0] for i in range(count // 2)]
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
    expected = tv.RandomResizedCrop.get_params(image, [1.0, 1.0], list(ASPECT_RATIOS))
    assert draw_views(whole, 0, 0, 0, height, width)[0] == [expected] * 2


def test_jitter_and_flags_are_distributed_as_specified():
    count = 12000
    drawn = [draw_views(SPEC, 5, 0, i, 224, 224) for i in range(count)]
    params_NVP = np.stack([params for _, _, params in drawn]).astype(float)
    assert params_NVP.shape == (count, 2, PARAMETERS)
    shares = {
        "jitter": ((params_NVP[..., Column.ORDER] >= 0).mean(0), (0.8, 0.8)),
        "grey": (params_NVP[..., Column.GREY].mean(0), (0.2, 0.2)),
        "blur": ((params_NVP[..., Column.BOX_RADIUS] >= 0).mean(0), (1.0, 0.1)),
        "solarise": (params_NVP[..., Column.SOLARISE].mean(0), (0.0, 0.2)),
        "flip": (np.array([flips for _, flips, _ in drawn]).mean(0), (0.5, 0.5)),
    }
    for name, (got, wanted) in shares.items():
        for share, p in zip(got, wanted, strict=True):
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / count), name
    jittered_NP = params_NVP[params_NVP[..., Column.ORDER] >= 0]
    orders = np.bincount(jittered_NP[:, Column.ORDER].astype(int), minlength=24)
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
        if column == Column.HUE:
            reference = np.trunc(reference * 255)
        mine = jittered_NP[:, column]
        mine = np.where(mine > 127, mine - 256, mine) if column == Column.HUE else mine
        assert ks(mine, reference) < ks_bound(len(mine), count), column


def test_blur_widths_are_uniform():
    weights = np.array([draw_views(SPEC, 0, 0, i, 9, 9)[2][0, 6:9] for i in range(6000)], float)
    sigmas = np.random.default_rng(0).uniform(0.1, 2.0, 6000)
    reach = weights[:, 0] + weights[:, 2] / weights[:, 1]  # Pillow's radius, monotone in sigma
    boxes = np.array([box_filter(s) for s in sigmas], float)
    assert ks(reach, boxes[:, 0] + boxes[:, 2] / boxes[:, 1]) < ks_bound(6000, 6000)


def test_draws_are_independent_across_neighbours():
    """Correlation of the first factor between neighbouring samples, epochs, seeds and views."""

    def factors(seed, epoch):
        every = ViewSpec(jitter_p=1.0)
        return np.array(
            [draw_views(every, seed, epoch, i, 64, 64)[2][:, 0] for i in range(3000)], float
        )

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


# ------------------------------------------------------------------------------ the same in C++


@pytest.fixture(scope="module")
def draw_in_cpp(tmp_path_factory):
    """The draws of the C++ code, built with the options of the extension."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    root, library = Path(__file__).parents[3], tmp_path_factory.mktemp("draw") / "draw.so"
    (extension,) = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"][
        "ext-modules"
    ]
    sources = [Path(__file__).parent / "draw_native.cpp", NATIVE / "draw.cpp"]
    options = [*extension["extra-compile-args"], "-shared", "-fPIC", f"-I{NATIVE}"]
    subprocess.run(["g++", *options, *sources, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).draw_views

    def draw_both(spec, seed, epoch, sample, height, width):
        boxes, flips = (ctypes.c_int * 4 * 2)(), (ctypes.c_bool * 2)()
        params = np.empty((2, PARAMETERS), np.float32)
        key = (ctypes.c_uint64(number) for number in (seed, epoch, sample))
        address = ctypes.c_void_p(params.ctypes.data)
        packed = ctypes.byref(native.pack_spec(spec))
        function(packed, *key, height, width, boxes, flips, address)
        return [tuple(box) for box in boxes], list(flips), params

    return draw_both


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        ViewSpec(crop_min=1.0),  # the central fallback
        ViewSpec(hue=0.5, blur_sigma=(0.0, 16.0), blur_p=(1.0, 1.0), solarise_p=(0.5, 0.5)),
        ViewSpec(hue=0.0, aspect=(0.5, 3.7), solarise_threshold=77, solarise_p=(0.5, 0.5)),
        ViewSpec(crop_min=0.5, aspect=(1 / 16, 0.1)),
    ],
)
def test_the_extension_draws_the_same_bits(spec, draw_in_cpp):
    rng = np.random.default_rng(3)
    for _ in range(1500):
        height, width = (int(x) for x in np.exp(rng.uniform(0, 8, 2)))
        seed, epoch, sample = (int(x) for x in rng.integers(0, 2**62, 3) >> rng.integers(0, 62, 3))
        boxes, flips, params = draw_views(spec, seed, epoch, sample, height, width)
        cpp_boxes, cpp_flips, cpp_params = draw_in_cpp(spec, seed, epoch, sample, height, width)
        assert (cpp_boxes, cpp_flips) == (boxes, flips)
        assert cpp_params.tobytes() == params.tobytes()


def test_seeds_beyond_64_bits_wrap_alike(draw_in_cpp):
    key = (2**64 + 5, 2**70, 2**63)
    assert draw_in_cpp(SPEC, *key, 30, 40)[:2] == draw_views(SPEC, *key, 30, 40)[:2]
