"""Shards against the standard library and webdataset; options, rejects, resumption, refusals."""

import fcntl
import gc
import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep import shard as sharding
from data_prep.shard import Options, parse_shard_size, shard
from data_prep.sources import open_source
from mocov3_ds.data import manifest, storage
from tests.data_prep import forms

IMAGES = forms.imagenet(7)


def make(source, url, *, workers=1, **options):
    options = Options(**{"shard_size": "5", **options})
    return shard(open_source(str(source)), str(url), options, workers=workers, quiet=True)


@pytest.fixture
def tree(tmp_path):
    return forms.write_tree(tmp_path / "tree", IMAGES)


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
    assert loaded.digest == made.digest and loaded.classes == forms.CLASSES and loaded.labelled
    assert loaded.made["seed"] == 0 and loaded.made["images"] == len(IMAGES)
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
    assert sharding._order(10, 0).tolist() == GOLDEN
    for seed in (0, 1, -5, 10**30):
        assert sorted(sharding._order(1000, seed)) == list(range(1000))
    places = np.argsort(sharding._order(20_000, 3))
    correlation = np.corrcoef(places, np.arange(20_000))[0, 1]
    assert abs(correlation) < 4 / 20_000**0.5


GOLDEN = [0, 8, 5, 3, 4, 1, 9, 6, 2, 7]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1000", (1000, False)),
        ("256MB", (256_000_000, True)),
        ("1.5 gb", (1_500_000_000, True)),
        ("1GiB", (1 << 30, True)),
        ("64kib", (1 << 16, True)),
        ("700b", (700, True)),
    ],
)
def test_shard_sizes(text, wanted):
    assert parse_shard_size(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "0MB", "-5", "10M", "1.5", "many", "5 TB"])
def test_other_shard_sizes_are_refused(text):
    with pytest.raises(ValueError, match="neither samples"):
        parse_shard_size(text)


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
    assert made.index_N["label"].tolist() == [-1] * 3 and not made.labelled


def test_json_of_a_webdataset_source_is_kept(tmp_path):
    members = {"a.jpg": forms.picture(1), "a.cls": b"2", "a.json": b'{"id": 7}' + b" " * 600}
    tar = forms.write_tar(tmp_path / "in.tar", members)
    make(tar, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        assert archive.getnames() == ["a.jpg", "a.cls", "a.json"]
        assert archive.extractfile("a.json").read() == members["a.json"]
    again = make(tmp_path / "out" / "shard-000000.tar", tmp_path / "again")
    assert again.manifest.digest == manifest.load(str(tmp_path / "out")).digest


CORRUPT = {
    "cat/zero.jpg": (b"", "empty file"),
    "cat/text.jpg": (b"<html>404</html>" * 99, "not an image"),
    "cat/cut.jpg": (forms.picture(1, size=64)[:3000], "truncated JPEG data"),
    "cat/cut.png": (forms.picture(2, form="PNG")[:500], "truncated PNG data"),
    "cat/header.png": (forms.picture(2, form="PNG")[:20], "header|image"),
    "cat/cut.bmp": (forms.picture(3, form="BMP")[:500], "truncated BMP data"),
}
GOOD = {
    "cat/cmyk.JPEG": forms.picture(1, mode="CMYK"),
    "cat/grey.jpg": forms.picture(2, mode="L"),
    "cat/png_named.JPEG": forms.picture(3, form="PNG"),
    "dog/alpha.png": forms.picture(4, form="PNG", mode="RGBA"),
    "dog/padded.jpg": forms.picture(5) + bytes(77),
    "dog/trailing.jpg": forms.picture(6) + b"made by a camera",
    "dog/tif.TIFF": forms.picture(7, form="TIFF"),
    "dog/web.webp": forms.picture(8, form="WEBP"),
}


@pytest.mark.parametrize("check", ["header", "decode"])
def test_corrupt_images_are_left_out_and_listed_odd_ones_kept(tmp_path, check):
    bad = {name: data for name, (data, _) in CORRUPT.items()}
    tree = forms.write_tree(tmp_path / "t", bad | GOOD)
    summary = make(tree, tmp_path / "out", check=check)
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    listed = {line["name"]: line["reason"] for line in map(json.loads, lines)}
    assert listed.keys() == CORRUPT.keys()
    for name, (_, reason) in CORRUPT.items():
        assert any(word in listed[name] for word in reason.split("|")), listed[name]
    kept = []
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as archive:
            kept += [archive.extractfile(m).read() for m in archive if not m.name.endswith(".cls")]
    assert sorted(kept) == sorted(GOOD.values()), "odd ones keep their bytes"
    assert summary.manifest.samples == len(GOOD) and "6 images rejected" in str(summary)
    assert "truncated JPEG" in str(summary) or "1 x" in str(summary)


def test_damaged_pixels_are_found_by_decoding_only(tmp_path):
    data = bytearray(forms.picture(9, size=64, form="PNG"))
    data[len(data) // 2] ^= 0xFF
    tree = forms.write_tree(tmp_path / "t", {"a/x.png": bytes(data), "a/y.jpg": forms.picture(1)})
    assert not make(tree, tmp_path / "quick").rejects
    (reject,) = make(tree, tmp_path / "whole", check="decode").rejects
    assert reject.name == "a/x.png" and "PNG data" in reject.reason


def test_a_shard_of_rejects_alone_is_not_written(tmp_path):
    bad = {f"a/{n}.jpg": b"x" for n in range(6)}
    tree = forms.write_tree(tmp_path / "t", bad | {"a/good.jpg": forms.picture(0)})
    made = make(tree, tmp_path / "out", shard_size="2").manifest
    assert len(made.shards) == 1 and [*(tmp_path / "out").glob("*.tar")] == [
        tmp_path / "out" / made.shards[0].name
    ]
    again = make(tree, tmp_path / "out", shard_size="2")
    assert again.found == 4 and again.manifest.digest == made.digest
    with pytest.raises(ValueError, match=r"none of the 1 images can be read, e.g. a/0.jpg: not an"):
        make(forms.write_tree(tmp_path / "n", {"a/0.jpg": b"x"}), tmp_path / "none")
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_an_image_too_long_for_a_jpeg_stays_as_it_is(tmp_path):
    (tmp_path / "tree/n01").mkdir(parents=True)
    long = tmp_path / "tree/n01/long.png"
    Image.new("L", (70_000, 4)).save(long)
    Image.new("L", (40, 40)).save(tmp_path / "tree/n01/short.png")
    make(tmp_path / "tree", tmp_path / "out", resize=4, reencode=True)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        kept = {member.name: archive.extractfile(member).read() for member in archive}
    assert sorted(name for name in kept if "cls" not in name) == ["n01_long.png", "n01_short.jpg"]
    assert kept["n01_long.png"] == long.read_bytes()


def test_an_image_that_no_set_may_hold_is_rejected(tree, tmp_path):
    assert sharding.images.MAX_BYTES == manifest.SAMPLE_LIMIT
    padded = tree / "n01440764" / "padded.jpg"
    padded.write_bytes(forms.picture(0, size=20))
    with padded.open("ab") as file:
        file.truncate(manifest.SAMPLE_LIMIT + 1)
    made = make(tree, tmp_path / "out")
    assert [reject.name for reject in made.rejects] == ["n01440764/padded.jpg"]
    assert manifest.load(str(tmp_path / "out")).samples == made.manifest.samples


def test_resize_shrinks_larger_images_only(tmp_path):
    images = {
        "a/large.png": forms.picture(0, size=64, form="PNG"),
        "a/small.png": forms.picture(1, size=20, form="PNG"),
        "a/cmyk.jpg": forms.picture(2, size=48, mode="CMYK"),
    }
    tree = forms.write_tree(tmp_path / "t", images)
    make(tree, tmp_path / "out", resize=32, shard_size="9")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        kept = {m.name: archive.extractfile(m).read() for m in archive}
    assert kept["a_small.png"] == images["a/small.png"]
    assert {*kept} == {
        "a_large.jpg",
        "a_small.png",
        "a_cmyk.jpg",
        "a_large.cls",
        "a_small.cls",
        "a_cmyk.cls",
    }
    for name, size in (("a_large.jpg", (32, 32)), ("a_cmyk.jpg", (33, 32))):
        with Image.open(io.BytesIO(kept[name])) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
    made = make(
        tree, tmp_path / "all", resize=32, reencode=True, quality=50, shard_size="9"
    ).manifest
    with tarfile.open(tmp_path / "all" / "shard-000000.tar") as archive:
        assert sum(name.endswith(".jpg") for name in archive.getnames()) == 3
        assert archive.getmember("a_large.jpg").size < len(kept["a_large.jpg"])
    assert made.made["quality"] == 50 and made.made["pillow"]


def test_a_large_smooth_image_survives_optimised_coding(tmp_path):
    noise = forms.picture(3, size=700, form="PNG")  # larger than Pillow's default buffer
    tree = forms.write_tree(tmp_path / "t", {"a/n.png": noise})
    made = make(tree, tmp_path / "out", resize=600, quality=100).manifest
    assert made.samples == 1 and made.index_N["height"].tolist() == [600]


# finished, half-finished and foreign destinations


def test_a_second_run_rewrites_nothing(tree, tmp_path):
    make(tree, tmp_path / "out")
    before = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    content = forms.files_of(tmp_path / "out")
    summary = make(tree, tmp_path / "out", workers=2)
    assert summary.found == 5 and "5 shards were finished before" in str(summary)
    assert {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")} == before
    assert forms.files_of(tmp_path / "out") == content


def test_damaged_and_missing_shards_and_receipts_are_made_again(tree, tmp_path):
    out = tmp_path / "out"
    make(tree, out)
    content = forms.files_of(out)
    flipped = bytearray((out / "shard-000000.tar").read_bytes())
    flipped[700] ^= 1
    (out / "shard-000000.tar").write_bytes(flipped)
    (out / "shard-000001.tar").unlink()
    (out / "receipts" / "shard-000002.json").write_text("{")
    (out / "receipts" / "shard-000003.json").unlink()
    (out / "shard-000003.tar").write_bytes(b"half")
    (out / "shard-000004.tar.123.tmp").write_bytes(b"left by a killed run")
    (out / "receipts" / "shard-000004.json.123.tmp").write_bytes(b"left by a killed run")
    (out / "manifest.json").unlink()
    assert make(tree, out).found == 1
    assert forms.files_of(out) == content


def test_other_options_and_other_images_are_refused(tree, tmp_path):
    out = tmp_path / "out"
    make(tree, out)
    content = forms.files_of(out)
    for options, match in (
        ({"seed": 1}, "seed 0 there, 1 asked for"),
        ({"shard_size": "6"}, "shard_size '5' there, '6' asked for"),
        ({"resize": 16}, "resize 0 there, 16 asked for"),
        ({"split": "train"}, "split '' there, 'train' asked for"),
    ):
        with pytest.raises(ValueError, match=f"another plan: .*{match}"):
            make(tree, out, **options)
    (tree / "n01440764" / "new.jpg").write_bytes(forms.picture(77))
    with pytest.raises(ValueError, match="images 21 there, 22 asked for, other images"):
        make(tree, out)
    assert forms.files_of(out) == content


def test_foreign_folders_are_refused(tree, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "other.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds other.tar, which is not of this command"):
        make(tree, out)
    assert forms.files_of(out) == {"other.tar": b"mine"}
    (out / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan.json is damaged"):
        make(tree, out)


def test_two_runs_at_once_are_refused(tree, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another run is writing"):
        make(tree, out)
    os.close(descriptor)
    make(tree, out)


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
    listing = open_source(str(tree))
    path = tree / "n01440764" / "n01440764_0.JPEG"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"n01440764_0.JPEG .* had \d+ when it was listed"):
        shard(listing, str(tmp_path / "out"), Options(), workers=1, quiet=True)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not [*(tmp_path / "out").rglob("*.tar*")]


def test_shards_that_others_wrote_elsewhere_are_missed(tree, tmp_path):
    def elsewhere(work, tasks, workers):
        return (work(task._replace(url=str(tmp_path / "other"))) for task in tasks)

    listing = open_source(str(tree))
    options = {"workers": 1, "quiet": True, "engine": elsewhere}
    with pytest.raises(ValueError, match=r"shard-000000.tar was made and is not in .*share"):
        shard(listing, str(tmp_path / "out"), Options(), **options)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_absurdly_large_image_is_rejected_unread(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding.images, "MAX_BYTES", 900)
    monkeypatch.setattr(sharding, "_read", None)
    with pytest.raises(ValueError, match=r"none of the 21 .* bytes, at most 900 are read"):
        make(tree, tmp_path / "out")


def test_object_storage_holds_the_same_set(tree, tmp_path, s3):
    make(tree, tmp_path / "out")
    make(tree, f"{s3}/set", workers=2)
    names = [entry.name for entry in storage.entries(f"{s3}/set")]
    wanted = forms.files_of(tmp_path / "out")
    assert names == sorted(name for name in wanted if "/" not in name)
    for name, data in wanted.items():
        assert storage.read(f"{s3}/set/{name}") == data
    storage.remove(f"{s3}/set/shard-000001.tar")
    storage.remove(f"{s3}/set/manifest.json")
    assert make(tree, f"{s3}/set").found == 4
    assert storage.read(f"{s3}/set/manifest.json") == wanted["manifest.json"]
    with pytest.raises(ValueError, match="another plan"):
        make(tree, f"{s3}/set", seed=9)
