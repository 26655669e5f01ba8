"""Evaluation sees each sample once, on any ranks and threads."""

import threading

import numpy as np
import pytest

from mocov3_ds.data.evaluation_batches import evaluation_batches
from mocov3_ds.data.views import decode
from tests.data.loading import damage
from tests.data.sets import picture


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("world_size, batch", [(1, 100), (1, 7), (3, 5), (4, 64)])
def test_evaluation_sees_each_sample_once(small, world_size, batch, threads):
    seen = []
    for rank in range(world_size):
        for crops_BCHW, labels_B, ids_B in evaluation_batches(
            small,
            image_size=8,
            batch=batch,
            rank=rank,
            world_size=world_size,
            threads=threads,
        ):
            assert 0 < len(ids_B) <= batch
            seen += ids_B.tolist()
            assert labels_B.tolist() == [i % 10 for i in ids_B.tolist()]
            for crop_CHW, sample_id in zip(crops_BCHW.numpy(), ids_B.tolist(), strict=True):
                expected = decode.centre_crop(picture(sample_id), 8, 9)
                np.testing.assert_array_equal(crop_CHW, expected)
    assert sorted(seen) == list(range(52))


def test_evaluation_of_a_subset_and_with_bad_samples(writable):
    options = {"image_size": 8, "batch": 8, "threads": 2}
    some = [
        ids.tolist()
        for rank in range(2)
        for _, _, ids in evaluation_batches(writable, rank=rank, world_size=2, limit=13, **options)
    ]
    assert sorted(i for ids in some for i in ids) == [i * 52 // 13 for i in range(13)]
    damage(writable, 4)
    whole = {"rank": 0, "world_size": 1, **options}
    with pytest.raises(ValueError, match=r"img4\.jpg in t-000\.tar"):
        list(evaluation_batches(writable, **whole))
    found = [
        i for _, _, ids in evaluation_batches(writable, bad_sample_budget=1, **whole) for i in ids
    ]
    assert sorted(map(int, found)) == [i for i in range(52) if i != 4]


def test_an_abandoned_evaluation_ends_its_threads(small):
    before = threading.active_count()
    batches = evaluation_batches(small, image_size=8, batch=4, rank=0, world_size=1, threads=3)
    next(batches)
    batches.close()
    assert threading.active_count() == before
