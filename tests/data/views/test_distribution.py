"""Statistics of finished views against the usual pipeline: what a wrong operation would shift.

Kolmogorov-Smirnov distances of image statistics between ours and the reference's own random draws.
A blur with a true Gaussian in place of Pillow's three boxes, which looks the same to the eye, must
be caught; so the test has power where a mistake was once made.
"""

import io
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tvf

from mocov3_ds.data.views import reference as reference_views
from mocov3_ds.data.views.crops import make_crops
from mocov3_ds.data.views.spec import PARAMETERS, ViewSpec
from tests.data.pictures import detailed_picture, encode_image

SPEC = ViewSpec()
SIZE = 96
EPOCHS = 30


def statistics_of(view_CHW):
    """Numbers of a uint8 view that colour, blur and solarisation move."""
    x = view_CHW.astype(np.float64)
    luma = x.mean(0)
    spread = x.max(0) - x.min(0)
    laplacian = 4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1]
    laplacian = laplacian - luma[1:-1, :-2] - luma[1:-1, 2:]
    spectrum = np.abs(np.fft.rfft2(luma - luma.mean())) ** 2
    y, x_ = np.ogrid[: spectrum.shape[0], : spectrum.shape[1]]
    radius = np.hypot(np.minimum(y, len(luma) - y), x_) / len(luma)
    power = spectrum.sum() + 1e-9
    bands = [spectrum[(radius >= a) & (radius < b)].sum() / power for a, b in BANDS]
    return [
        *x.mean((1, 2)),
        *x.std((1, 2)),
        luma.std(),
        spread.mean(),
        np.log(np.abs(laplacian).mean() + 1e-3),
        *np.log(np.array(bands) + 1e-9),
        (x == 0).mean(),
        (x == 255).mean(),
    ]


BANDS = ((0.05, 0.15), (0.15, 0.3), (0.3, 0.45), (0.45, 0.6), (0.6, 0.75))


def ks(a, b):
    """Two-sample Kolmogorov-Smirnov distance of each column, the largest."""
    distances = []
    for x, y in zip(np.sort(a, 0).T, np.sort(b, 0).T, strict=True):
        grid = np.concatenate([x, y])
        cdf = [np.searchsorted(s, grid, "right") / len(s) for s in (x, y)]
        distances.append(np.abs(cdf[0] - cdf[1]).max())
    return max(distances)


def bound(count):
    """Distance that one of 20 columns of equal distributions exceeds once in 500 times."""
    return math.sqrt(-math.log(1e-4 / 2) / 2) * math.sqrt(2 / count)


def ours(images, epochs):
    crops, rows = np.empty((2, 3, SIZE, SIZE), np.uint8), np.empty((2, PARAMETERS), np.float32)
    found = [[], []]
    for epoch in range(epochs):
        for sample, data in enumerate(images):
            make_crops(data, SPEC, 11, epoch, sample, crops, rows, augment=True)
            for view in (0, 1):
                found[view].append(statistics_of(crops[view]))
    return np.array(found)


def reference(images, epochs, seed):
    random.seed(seed)
    torch.manual_seed(seed)
    both = [reference_views.view_transform(SPEC, v, SIZE, normalised=False) for v in (0, 1)]
    found = [[], []]
    for _ in range(epochs):
        for data in images:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            for view in (0, 1):
                pixels = np.asarray(both[view](image)).transpose(2, 0, 1)
                found[view].append(statistics_of(pixels))
    return np.array(found)


@pytest.fixture(scope="module")
def images():
    return [encode_image(detailed_picture(150, 180, seed), quality=95) for seed in range(60)]


@pytest.fixture(scope="module")
def references(images):
    return reference(images, EPOCHS, seed=1)


@pytest.mark.slow
def test_views_are_distributed_as_the_references(images, references):
    got = ours(images, EPOCHS)
    for view in (0, 1):
        assert ks(got[view], references[view]) < bound(len(got[view]))


@pytest.mark.slow
def test_the_test_passes_the_reference_with_another_seed(images, references):
    other = reference(images, EPOCHS, seed=2)
    for view in (0, 1):
        assert ks(other[view], references[view]) < bound(len(other[view]))


@pytest.mark.slow
def test_the_test_catches_a_true_gaussian(images, references, monkeypatch):
    def gaussian(self, image):
        sigma = random.uniform(*self.sigma)
        taps = 2 * math.ceil(3 * sigma) + 1
        return tvf.gaussian_blur(image, [taps, taps], [sigma, sigma])

    monkeypatch.setattr(reference_views.PillowBlur, "__call__", gaussian)
    wrong = reference(images, EPOCHS, seed=2)
    assert ks(wrong[0], references[0]) > bound(len(wrong[0]))
