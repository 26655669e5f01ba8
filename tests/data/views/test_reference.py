"""The reference pipeline: views of the usual loader, and drawn views that training's must equal."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mocov3_ds.data import manifest
from mocov3_ds.data.views import decode, reference
from mocov3_ds.data.views.crops import make_crops
from mocov3_ds.data.views.draw import box_filter, draw_views
from mocov3_ds.data.views.spec import PARAMETERS, PLAIN_PARAMS, Column, ViewSpec
from tests.data.pictures import encode_image, picture
from tests.data.sets import make_set

SPEC = ViewSpec()


@pytest.fixture
def shards(tmp_path):
    url = str(tmp_path / "set")
    make_set(url, [5, 3], lambda number: encode_image(picture(60 + number, 90, seed=number)))
    return manifest.load(url)


def test_samples_are_the_stored_bytes_in_order(shards):
    images = list(reference.read_samples(shards))
    assert [Image.open(io.BytesIO(data)).height for data in images] == [*range(60, 68)]


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.parametrize("second_set", [False, True])
def test_the_loader_delivers_normalised_views_of_every_sample(shards, second_set):
    loader = reference.make_loader(shards, SPEC, 32, 4, 0, second_set)
    batches = list(loader)
    assert len(batches) == 2
    for first, second in batches:
        assert first.shape == second.shape == (4, 3, 32, 32)
        assert first.dtype == torch.float32 and not torch.equal(first, second)
        assert -3 < first.min() < 0 < first.max() < 3


def test_a_sigma_is_found_for_any_box_filter():
    params = list(PLAIN_PARAMS)
    for sigma in np.random.default_rng(0).uniform(0.0, 8.0, 300):
        params[Column.BOX_RADIUS : Column.BOX_EDGE + 1] = box_filter(sigma)
        assert [*box_filter(reference.find_sigma(params))] == params[6:9]


@pytest.mark.skipif(decode.current_decoder() == "simplejpeg", reason="its pixels differ a little")
def test_a_drawn_view_is_the_one_that_training_gets():
    data = encode_image(picture(120, 90))
    image = decode.decode_rgb(data)
    crops, rows = np.zeros((2, 3, 40, 40), np.uint8), np.zeros((2, PARAMETERS), np.float32)
    for sample in range(30):
        make_crops(data, SPEC, 5, 2, sample, crops, rows, augment=True)
        boxes, flips, params = draw_views(SPEC, 5, 2, sample, 120, 90)
        for crop, *drawn in zip(crops, boxes, flips, params.tolist(), strict=True):
            view = reference.make_drawn_view(image, *drawn, 40)
            np.testing.assert_array_equal(np.asarray(view).transpose(2, 0, 1), crop)
