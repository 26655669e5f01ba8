"""Shards against the standard library and webdataset; options, rejects, resumption, refusals."""

import errno
import gc
import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep import images
from data_prep.shard import draw_order, make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images
from mocov3_ds.data import manifest, storage
from tests.data_prep import forms
from tests.data_prep.making import make

IMAGES = forms.imagenet(7)


def samples(folder: Path) -> list[tuple[str, bytes, int]]:
    """Key, image and label of each sample as the standard library reads the shards."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            assert all((m.mtime, m.uid, m.gid, m.mode) == (0, 0, 0, 0o644) for m in members)
            assert all(m.isfile() and m.uname == m.gname == "" for m in members)
            for image, label in zip(members[::2], members[1::2], strict=True):
                key = image.name.removesuffix(".jpg")
                assert label.name == f"{key}.cls" and "." not in key
                found.append(
                    (key, archive.extractfile(image).read(), int(archive.extractfile(label).read()))
                )
    return found


def test_each_image_lies_once_unchanged_in_the_shards(tree, tmp_path):
    summary = make(tree, tmp_path / "out")
    found = samples(tmp_path / "out")
    assert sorted(found) == sorted(
        (name.partition("/")[2].removesuffix(".JPEG"), data, forms.CLASSES.index(name[:9]))
        for name, data in IMAGES.items()
    )
    assert [entry.samples for entry in summary.manifest.shards] == [5, 5, 5, 5, 1]
    assert len({label for _, _, label in found[:5]}) > 1, "shuffled over the whole set"


def test_the_manifest_finds_every_sample(tree, tmp_path):
    made = make(tree, tmp_path / "out").manifest
    loaded = manifest.load(str(tmp_path / "out"))
    assert loaded.digest == made.digest and loaded.classes == forms.CLASSES and loaded.has_labels
    assert loaded.provenance["seed"] == 0 and loaded.provenance["images"] == len(IMAGES)
    found = samples(tmp_path / "out")
    for shard_number in range(len(loaded.shards)):
        url = loaded.shard_url(shard_number)
        for row in range(loaded.first_S[shard_number], loaded.first_S[shard_number + 1]):
            entry = loaded.index_N[row]
            data = storage.read(url, int(entry["offset"]), int(entry["offset"] + entry["size"]))
            assert (data, entry["label"]) == found[row][1:]
            assert zlib.crc32(data) == entry["crc32"]
            with Image.open(io.BytesIO(data)) as image:
                assert image.size == (entry["width"], entry["height"])


@pytest.mark.filterwarnings(
    "ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_webdataset_opens_the_shards(tree, tmp_path):
    make(tree, tmp_path / "out")
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    read = [(image.size, label) for image, label in pipeline]
    gc.collect()  # webdataset leaves its files open; here is where that may be said
    rows = manifest.load(str(tmp_path / "out")).index_N
    assert read == [((row["width"], row["height"]), row["label"]) for row in rows]


def test_the_bytes_depend_on_images_and_options_alone(tree, tmp_path):
    make(tree, tmp_path / "a")
    make(tree, tmp_path / "b", workers=3)
    assert forms.files_of(tmp_path / "a") == forms.files_of(tmp_path / "b")
    tar = forms.write_tar(tmp_path / "train.tar", forms.nested(IMAGES))
    make(tar, tmp_path / "c", workers=2)
    assert forms.files_of(tmp_path / "a") == forms.files_of(tmp_path / "c")
    make(tree, tmp_path / "d", seed=1)
    assert samples(tmp_path / "a") != samples(tmp_path / "d")
    assert sorted(samples(tmp_path / "a")) == sorted(samples(tmp_path / "d"))


def test_the_order_is_fixed_for_all_time():
    assert draw_order(10, 0).tolist() == GOLDEN
    for seed in (0, 1, -5, 10**30):
        assert sorted(draw_order(1000, seed)) == list(range(1000))
    places = np.argsort(draw_order(20_000, 3))
    correlation = np.corrcoef(places, np.arange(20_000))[0, 1]
    assert abs(correlation) < 4 / 20_000**0.5


GOLDEN = [0, 8, 5, 3, 4, 1, 9, 6, 2, 7]


def test_shards_of_so_many_bytes(tree, tmp_path):
    made = make(tree, tmp_path / "out", shard_size="9kB").manifest
    largest = max(map(len, IMAGES.values())) + 3 * 512 + 1024
    sizes = [entry.bytes for entry in made.shards[:-1]]
    assert len(sizes) > 3 and all(9000 - largest < size < 9000 + largest for size in sizes), sizes


def test_images_without_labels_have_no_cls(tmp_path):
    tree = forms.write_tree(
        tmp_path / "t", {f"{n}.png": forms.picture(n, form="PNG") for n in range(3)}
    )
    made = make(tree, tmp_path / "out").manifest
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        assert sorted(archive.getnames()) == ["0.png", "1.png", "2.png"]
    assert made.index_N["label"].tolist() == [-1] * 3 and not made.has_labels


def test_json_of_a_webdataset_source_is_kept(tmp_path):
    members = {"a.jpg": forms.picture(1), "a.cls": b"2", "a.json": b'{"id": 7}' + b" " * 600}
    tar = forms.write_tar(tmp_path / "in.tar", members)
    make(tar, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        assert archive.getnames() == ["a.jpg", "a.cls", "a.json"]
        assert archive.extractfile("a.json").read() == members["a.json"]
    again = make(tmp_path / "out" / "shard-000000.tar", tmp_path / "again")
    assert again.manifest.digest == manifest.load(str(tmp_path / "out")).digest


def test_a_shard_of_rejects_alone_is_not_written(tmp_path):
    bad = {f"a/{n}.jpg": b"x" for n in range(6)}
    tree = forms.write_tree(tmp_path / "t", bad | {"a/good.jpg": forms.picture(0)})
    made = make(tree, tmp_path / "out", shard_size="2").manifest
    assert len(made.shards) == 1 and [*(tmp_path / "out").glob("*.tar")] == [
        tmp_path / "out" / made.shards[0].name
    ]
    again = make(tree, tmp_path / "out", shard_size="2")
    assert again.earlier_shards == 4 and again.manifest.digest == made.digest
    with pytest.raises(ValueError, match=r"none of the 1 images can be read, e.g. a/0.jpg: not an"):
        make(forms.write_tree(tmp_path / "n", {"a/0.jpg": b"x"}), tmp_path / "none")
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_an_image_that_no_set_may_hold_is_rejected(tree, tmp_path):
    assert images.MAX_BYTES == manifest.SAMPLE_LIMIT
    padded = tree / "n01440764" / "padded.jpg"
    padded.write_bytes(forms.picture(0, size=20))
    with padded.open("ab") as file:
        file.truncate(manifest.SAMPLE_LIMIT + 1)
    made = make(tree, tmp_path / "out")
    assert [reject.name for reject in made.rejects] == ["n01440764/padded.jpg"]
    assert manifest.load(str(tmp_path / "out")).samples == made.manifest.samples


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resize": -1}, "--resize -1 is negative"),
        ({"quality": 0}, "--quality 0 is outside 1 to 100"),
        ({"reencode": True}, "--reencode needs --resize"),
        ({"split": "../x"}, "--split '../x' names shards"),
        ({"shard_size": "x"}, "neither samples"),
    ],
)
def test_bad_options_touch_nothing(tree, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        make(tree, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_stops_the_run(tree, tmp_path):
    listing = list_images(str(tree))
    path = tree / "n01440764" / "n01440764_0.JPEG"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"n01440764_0.JPEG .* had \d+ when it was listed"):
        make_shards(listing, str(tmp_path / "out"), ShardOptions(), workers=1, quiet=True)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not [*(tmp_path / "out").rglob("*.tar*")]


def test_a_read_that_fails_names_the_source_and_not_the_shard(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "source.tar", "w") as archive:
        for name, data in IMAGES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    listing = list_images(str(tmp_path / "source.tar"))

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*source\.tar"):
        make_shards(listing, str(tmp_path / "out"), ShardOptions(), workers=1, quiet=True)


def test_an_absurdly_large_image_is_rejected_unread(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 900)
    monkeypatch.setattr("data_prep.shard._SourceFiles.read_image", None)
    with pytest.raises(ValueError, match=r"none of the 21 .* bytes, at most 900 are read"):
        make(tree, tmp_path / "out")


def test_object_storage_holds_the_same_set(tree, tmp_path, s3):
    make(tree, tmp_path / "out")
    make(tree, f"{s3}/set", workers=2)
    names = [entry.name for entry in storage.list_files(f"{s3}/set")]
    wanted = forms.files_of(tmp_path / "out")
    assert names == sorted(name for name in wanted if "/" not in name)
    for name, data in wanted.items():
        assert storage.read(f"{s3}/set/{name}") == data
    storage.remove_file(f"{s3}/set/shard-000001.tar")
    storage.remove_file(f"{s3}/set/manifest.json")
    assert make(tree, f"{s3}/set").earlier_shards == 4
    assert storage.read(f"{s3}/set/manifest.json") == wanted["manifest.json"]
    with pytest.raises(ValueError, match="another plan"):
        make(tree, f"{s3}/set", seed=9)


def test_few_archives_are_open_at_a_time(tmp_path, monkeypatch):
    for number in range(12):
        images_of = {f"n{number:08d}_{n}.JPEG": forms.picture(10 * number + n) for n in range(2)}
        forms.write_tar(tmp_path / "src" / f"n{number:08d}.tar", images_of)
    wanted = make(tmp_path / "src", tmp_path / "wanted", shard_size="1000").manifest.digest
    opened, limit = set(), 3
    plain_open, plain_close = os.open, os.close

    def count_open(path, *flags, **rest):
        descriptor = plain_open(path, *flags, **rest)
        if str(path).startswith(str(tmp_path / "src")):
            opened.add(descriptor)
            assert len(opened) <= limit
        return descriptor

    def count_close(descriptor):
        opened.discard(descriptor)
        plain_close(descriptor)

    listing = list_images(str(tmp_path / "src"))
    # a quarter of what the process may open
    monkeypatch.setattr("data_prep.shard.resource.getrlimit", lambda _: (4 * limit + 3, 999))
    monkeypatch.setattr(os, "open", count_open)
    monkeypatch.setattr(os, "close", count_close)
    options = ShardOptions(shard_size="1000")
    made = make_shards(listing, str(tmp_path / "out"), options, workers=1, quiet=True).manifest
    assert made.digest == wanted and not opened and len(made.classes) == 12


def test_an_archive_that_changes_stops_the_run(tmp_path):
    tar = forms.write_tar(tmp_path / "t.tar", IMAGES)
    listing = list_images(str(tar))
    os.utime(tar, ns=(1, 1))
    with pytest.raises(ValueError, match=r"t.tar has changed since it was listed"):
        make_shards(listing, str(tmp_path / "out"), ShardOptions(), workers=1, quiet=True)


def test_the_balance_closes_and_stands_in_the_manifest(tree, tmp_path):
    forms.write_tree(tree, {"n01440764/bad.jpg": b"x", "n01440764/a.txt": b"", ".x/1.jpg": b""})
    made = make(tree, tmp_path / "out")
    assert made.manifest.provenance["balance"] == {
        "seen": 24,
        "kept": 21,
        "rejected": 1,
        "side_files": 0,
        "left_out": {
            "ends in .txt, so no image by its name": 1,
            "hidden (or a system's own)": 1,
        },
    }
    assert "24 files seen = 21 images kept + 1 rejected + 0 label" in str(made)
    assert "balance" not in (tmp_path / "out" / "plan.json").read_text()
