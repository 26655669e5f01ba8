"""What is kept as an image, and what shrinking does to it."""

import io
import json
import tarfile

import pytest
from PIL import Image

from data_prep import images
from mocov3_ds.data.views.decode import UnreadableImage
from tests.data_prep import forms
from tests.data_prep.making import make

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
    assert made.provenance["quality"] == 50 and made.provenance["pillow"]


def test_a_large_smooth_image_survives_optimised_coding(tmp_path):
    noise = forms.picture(3, size=700, form="PNG")  # larger than Pillow's default buffer
    tree = forms.write_tree(tmp_path / "t", {"a/n.png": noise})
    made = make(tree, tmp_path / "out", resize=600, quality=100).manifest
    assert made.samples == 1 and made.index_N["height"].tolist() == [600]


def test_sizes_are_height_and_width():
    data = forms.picture(3, size=24)
    assert images.checked_size(data, "header") == images.checked_size(data, "decode") == (24, 27)
    with pytest.raises(UnreadableImage, match="truncated"):
        images.checked_size(data[:-300], "header")


def test_shrinking_keeps_the_shape():
    data = forms.picture(4, size=100, form="PNG")  # 104 wide
    assert images.shrink_image(data, 100, 90, always=False) is None
    with Image.open(io.BytesIO(images.shrink_image(data, 50, 90, always=False))) as image:
        assert (image.format, image.size) == ("JPEG", (52, 50))
    with Image.open(io.BytesIO(images.shrink_image(data, 200, 90, always=True))) as image:
        assert (image.format, image.size) == ("JPEG", (104, 100))
