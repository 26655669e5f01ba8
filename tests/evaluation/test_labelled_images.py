"""Which samples an evaluation sees, in what order, as what pixels."""

import dataclasses
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, PILToTensor, Resize

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data import storage
from mocov3_ds.data.own_space import folder_of_images
from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.encoders.load import read_weights
from mocov3_ds.evaluation.labelled_images import (
    CentreCrop,
    RandomCrop,
    SeededTransform,
    UnreadableSample,
    choose_split_urls,
    draw_epoch_order,
    open_splits,
    read_batches,
    split_into_passes,
)
from tests.data.sets import make_set
from tests.evaluation.runs import coloured, make_run, make_splits


def test_each_sample_once_whatever_the_epoch() -> None:
    orders = [draw_epoch_order(61, 0, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(61))
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[1], draw_epoch_order(61, 0, 1))
    assert not np.array_equal(orders[1], draw_epoch_order(61, 1, 1))


def test_repeated_augmentation_keeps_the_length() -> None:
    order = draw_epoch_order(61, 0, 0, repeats=3)
    assert len(order) == 61
    counts = np.unique(order, return_counts=True)[1]
    assert sorted(counts.tolist()) == [1] + [3] * 20
    assert np.array_equal(order[:3], [order[0]] * 3)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_each_step_once(world: int) -> None:
    order = draw_epoch_order(61, 0, 0)
    plans = [
        split_into_passes(order, batch=16, micro_batch=3, rank=r, world_size=world, drop_last=False)
        for r in range(world)
    ]
    for step in range(4):
        places = [p for steps in plans for passes in steps[step] for p in passes]
        assert sorted(places) == list(range(16 * step, min(16 * step + 16, 61)))
    assert all(len(steps) == 4 for steps in plans)
    assert max(len(p) for steps in plans for step in steps for p in step) <= 3
    dropped = split_into_passes(
        order, batch=16, micro_batch=9, rank=0, world_size=world, drop_last=True
    )
    assert len(dropped) == 3


def test_pixels_do_not_depend_on_workers_or_passes(tmp_path: Path) -> None:
    train, _ = make_splits(tmp_path)
    manifest, order = manifests.load(train), draw_epoch_order(61, 3, 0)

    def draws(image: Image.Image) -> torch.Tensor:
        return torch.tensor([*torch.rand(2), np.random.rand()]) + np.asarray(image).mean()

    for pixels in (RandomCrop(16, ViewSpec(crop_min=0.2), 1), SeededTransform(draws, 1)):
        by_one = list(read_batches(manifest, pixels, order, [[p] for p in range(12)], epoch=2))
        at_once = next(iter(read_batches(manifest, pixels, order, [range(12)], epoch=2, workers=2)))
        for part in range(3):
            assert torch.equal(torch.cat([row[part] for row in by_one]), at_once[part])
        assert at_once[2].tolist() == order[:12].tolist()
        assert at_once[1].tolist() == (order[:12] % 3).tolist()
        later = next(iter(read_batches(manifest, pixels, order, [range(12)], epoch=3)))
        assert not torch.equal(later[0], at_once[0])


def test_centre_crops_are_torchvisions(tmp_path: Path) -> None:
    train, _ = make_splits(tmp_path)
    order = np.arange(61)
    (crops, _, ids) = next(
        iter(read_batches(manifests.load(train), CentreCrop(16), order, [[5, 9]]))
    )
    for crop, number in zip(crops, ids.tolist(), strict=True):
        image = Image.open(io.BytesIO(coloured(number)))
        theirs = PILToTensor()(CenterCrop(16)(Resize(18)(image)))
        assert torch.equal(crop, theirs)


def test_an_unreadable_sample_is_named(tmp_path: Path) -> None:
    train, _ = make_splits(tmp_path)
    manifest = manifests.load(train)
    url, row = manifest.shard_url(0), manifest.index_N[4]
    tar = bytearray(storage.read(url))
    tar[int(row["offset"]) + 60] ^= 255
    storage.write(url, bytes(tar))
    for workers in (0, 1):
        batches = read_batches(manifest, CentreCrop(16), np.arange(61), [[3], [4]], workers=workers)
        with pytest.raises(UnreadableSample) as caught:
            list(batches)
        assert str(caught.value).startswith("sample img4.jpg in t-000.tar of ")
        assert "crc32" in str(caught.value)
        assert "\n" not in str(caught.value)
    storage.remove_file(url)
    elsewhere = dataclasses.replace(manifest, shards_at=str(tmp_path / "gone"))
    for workers in (0, 1):
        for gone, words in ((manifest, "No such file"), (elsewhere, "a shard is gone")):
            with pytest.raises(UnreadableSample, match=rf"^sample 4: .*{words}.*\.tar[^\n]*$"):
                list(read_batches(gone, CentreCrop(16), np.arange(61), [[4]], workers=workers))


def test_splits_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    train, val = make_splits(tmp_path)
    assert open_splits(train, val).classes == 3
    bare = make_set(str(tmp_path / "bare"), [4])
    index = bare.index_N.copy()
    index["label"][1:3] = -1
    manifests.write(bare.url, bare.shards, index)
    with pytest.raises(ValueError, match=r"2 of 4 samples in .*bare have no label"):
        open_splits(train, bare.url)

    def named(url: str, *names: str) -> str:
        old = manifests.load(url)
        copy = str(tmp_path / "-".join(names))
        for shard in old.shards:
            storage.write(storage.join_url(copy, shard.name), b"\0" * shard.bytes)
        manifests.write(copy, old.shards, old.index_N, classes=names)
        return copy

    abc = named(train, "a", "b", "c")
    with pytest.raises(ValueError, match=r"1 classes of which .*a-b-c has none: 'x'"):
        open_splits(abc, named(val, "a", "x", "c"))
    more = make_set(str(tmp_path / "more"), [9], coloured, 5)
    with pytest.raises(ValueError, match=r"2 classes of which .* has none: '3', '4'"):
        open_splits(train, more.url)
    labels = manifests.load(val).index_N["label"]
    paired = open_splits(abc, named(val, "c", "a", "b", "d"))
    assert paired.classes == 3
    assert paired.val.index_N["label"].tolist() == ((labels + 2) % 3).tolist()
    assert [*paired.val.shards] == [*manifests.load(val).shards]
    with pytest.raises(ValueError, match=r"holds no manifest\.json; make shards with"):
        open_splits(train, str(tmp_path))


def test_ids_cost_classes_by_their_count(tmp_path: Path) -> None:
    train, val = make_splits(tmp_path)
    for url in (train, val):
        old = manifests.load(url)
        index = old.index_N.copy()
        index["label"] = np.array([48460, 47126, 9_000_000])[index["label"]]
        manifests.write(old.url, old.shards, index)
    splits = open_splits(train, val)
    assert splits.classes == 3 and splits.train.classes == ("47126", "48460", "9000000")
    assert splits.train.index_N["label"][:3].tolist() == [1, 0, 2]
    assert {*splits.val.index_N["label"].tolist()} == {0, 1, 2}
    again = pickle.loads(pickle.dumps(splits.val))  # as reading processes get it
    assert np.array_equal(again.index_N, splits.val.index_N)


def test_where_the_shards_are_named(tmp_path: Path) -> None:
    weights = read_weights(make_run(tmp_path / "run", train="a", val="b"))
    assert choose_split_urls(weights, "", "") == ("a", "b")
    assert choose_split_urls(weights, "", "c") == ("a", "c")
    without = read_weights(make_run(tmp_path / "sample", train=""))
    assert choose_split_urls(without, "", "")[1] == str(tmp_path / "sample-images/test")
    assert without.config is not None
    data = dataclasses.replace(without.config.data, images="/photos", probe_shards="b")
    given = dataclasses.replace(without, config=dataclasses.replace(without.config, data=data))
    assert choose_split_urls(given, "", "") == (str(folder_of_images("/photos", tmp_path)), "b")
    half = read_weights(make_run(tmp_path / "half", train="a"))
    with pytest.raises(ValueError, match=r"names no held-out shards; give --train .* data_prep"):
        choose_split_urls(half, "", "")
