"""The loader's benchmark runs on any sharded set, and its yardstick is what it says."""

import random

import pytest
import torch

from mocov3_ds.bench import loader
from mocov3_ds.data import manifest
from mocov3_ds.data.views import reference
from mocov3_ds.data.views.spec import ViewSpec
from tests.data.pictures import encode_image, picture
from tests.data.sets import make_set


@pytest.fixture
def shards(tmp_path):
    make_set(str(tmp_path), [5, 4], lambda n: encode_image(picture(50 + n, 60, n)))
    return str(tmp_path)


@pytest.mark.slow
def test_all_tables_are_printed(shards, capsys):
    options = loader.LoaderOptions(
        shards=(shards,), size=32, batch=4, images=8, rounds=1, threads=(1,)
    )
    loader.run_bench(options)
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    figures = {
        name.strip(): float(first)
        for name, first, *_ in rows
        if first.replace(".", "").strip().isdigit()
    }
    assert all(value >= 0 for value in figures.values())
    assert {loader.YARDSTICK, "Pillow: blur", "decode threads of one loader"} <= set(figures)
    assert figures[loader.YARDSTICK] > 0


def test_stages_cover_the_yardstick(shards):
    stages = loader.measure_stages(shards, loader.LoaderOptions(shards=(shards,), size=32))
    steps = len(reference.view_transform(ViewSpec(), 0, 32).transforms)
    assert sum(name.startswith("Pillow: ") for name in stages) == steps + 1  # and the decoding


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.parametrize("second_set", [False, True])
def test_the_yardstick_makes_two_normalised_views(shards, second_set):
    random.seed(0)
    torch.manual_seed(0)
    found = manifest.load(shards)
    batches = list(reference.make_loader(found, ViewSpec(), 32, 4, 0, second_set))
    assert len(batches) == 2
    for views in batches:
        for view_BCHW in views:
            assert view_BCHW.shape == (4, 3, 32, 32) and view_BCHW.dtype == torch.float32
            assert -2.2 < view_BCHW.min() < view_BCHW.max() < 2.7
    assert not torch.equal(batches[0][0], batches[0][1])
