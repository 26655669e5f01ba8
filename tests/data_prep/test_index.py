"""Tars that others made: described or refused."""

import io
import json
import tarfile
import zlib
from dataclasses import replace

import numpy as np
import pytest

from data_prep import tar
from data_prep.class_numbers import ClassNames
from data_prep.index import index_tars
from data_prep.pixel_stats import measure_pixels
from data_prep.verify import verify_set
from data_prep.wds_samples import MemberPick
from mocov3_ds.data import manifest, storage
from tests.data_prep import forms
from tests.data_prep.making import find_problems, make


def others(folder, form=tarfile.PAX_FORMAT):
    """Two tars as webdataset's own tools may write them."""
    long = "deep/" * 30 + "long" * 30
    first = {"a.jpg": forms.picture(1), "a.cls": b"4", "a.txt": b"a caption", "b.cls": b"2"}
    first |= {
        "b.png": forms.picture(2, form="PNG"),
        f"{long}.jpg": forms.picture(3),
        f"{long}.cls": b"0",
    }
    second = {
        "c.json": b'{"label": 1, "w": 3}',
        "c.jpeg": forms.picture(4),
        "d.webp": b"broken",
        "d.cls": b"1",
    }
    forms.write_tar(folder / "0.tar", first, form)
    forms.write_tar(folder / "1.tar", second, form)
    return [first["a.jpg"], first["b.png"], first[f"{long}.jpg"], second["c.jpeg"]]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_of_others_are_described(tmp_path, form):
    images = others(tmp_path, form)
    made = index_tars(str(tmp_path), workers=2, quiet=True)
    assert made.digest == manifest.load(str(tmp_path)).digest
    assert [entry.samples for entry in made.shards] == [3, 1]
    assert made.index_N["label"].tolist() == [4, 2, 0, 1] and made.has_labels
    for number, row in enumerate(made.index_N):
        url = made.shard_url(0 if number < 3 else 1)
        start, end = int(row["offset"]), int(row["offset"] + row["size"])
        assert storage.read(url, start, end) == images[number]
    (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert reject == {"name": "1.tar/d", "reason": "not an image"}
    assert not find_problems(tmp_path), "what the index leaves out on purpose is no problem"
    with pytest.raises(ValueError, match=r"has a manifest.json already; .* --replace"):
        index_tars(str(tmp_path), workers=1, quiet=True)
    assert index_tars(str(tmp_path), workers=1, quiet=True, replace=True).digest == made.digest


def test_a_described_set_opens_like_one_of_ours(made):
    ours = manifest.load(str(made))
    names = ClassNames((ours.classes,))
    again = index_tars(str(made), workers=1, replace=True, classes=names, quiet=True)
    assert again.digest == ours.digest and again.classes == ours.classes


def test_damaged_and_hostile_tars_are_refused(tmp_path):
    others(tmp_path)
    whole = (tmp_path / "0.tar").read_bytes()

    def refused(data, match):
        (tmp_path / "0.tar").write_bytes(data)
        with pytest.raises(ValueError, match=match):
            index_tars(str(tmp_path), workers=1, quiet=True)
        assert not (tmp_path / "manifest.json").exists()

    first_end = 512 + len(forms.picture(1)) + -len(forms.picture(1)) % 512
    refused(whole[:first_end], r"0.tar is cut short at byte \d+")
    flipped = bytearray(whole)
    flipped[first_end + 3] ^= 1
    refused(flipped, "checksum is wrong")
    refused(forms.tar_bytes({"../a.jpg": forms.picture(1)}), "leaves the archive's own folder")
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    refused(link.tobuf() + tar.END, "symbolic link")
    huge = tarfile.TarInfo("a.jpg")
    huge.size = 1 << 40
    refused(huge.tobuf(tarfile.GNU_FORMAT) + tar.END, "runs past the end")
    refused(b"", "cut short at byte 0")


def test_folders_without_tars_or_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no file that ends in .tar"):
        index_tars(str(tmp_path), workers=1, quiet=True)
    forms.write_tar(tmp_path / "0.tar", {"a.txt": b"x"})
    with pytest.raises(ValueError, match="hold no readable images"):
        index_tars(str(tmp_path), workers=1, quiet=True)
    with pytest.raises(ValueError, match=r"holds no manifest.json; make shards"):
        verify_set(str(tmp_path), workers=1, quiet=True)


def test_an_archive_in_pieces_reads_like_a_whole_one(tmp_path, monkeypatch):
    """Members over the edges of the blocks that storage hands out."""
    others(tmp_path)
    wanted = index_tars(str(tmp_path), workers=1, quiet=True)

    def small(url, start=0, end=None):
        data = io.BytesIO(storage.read(url))
        return iter(lambda: data.read(37), b"")

    monkeypatch.setattr(storage, "read_blocks", small)
    assert index_tars(str(tmp_path), workers=1, quiet=True, replace=True).digest == wanted.digest


def test_a_bad_label_file_costs_the_label_and_not_the_image(tmp_path):
    members = {
        "a.jpg": forms.picture(1),
        "a.json": b"{",
        "b.jpg": forms.picture(2),
        "b.json": b'{"label": 3}',
    }
    forms.write_tar(tmp_path / "0.tar", members)
    lines = []
    made = index_tars(str(tmp_path), workers=1, quiet=True, say=lines.append)
    assert made.index_N["label"].tolist() == [-1, 3]
    assert any("1 label files cannot be read" in line and "a.json in" in line for line in lines)
    assert not (tmp_path / "rejects.jsonl").exists() and not find_problems(tmp_path)


def test_some_tars_of_a_folder_are_described(tmp_path):
    for number, name in enumerate(("im-train-0", "im-train-1", "im-val-0", ".hidden")):
        members = {"a.jpg": forms.picture(number), "a.cls": b"%d" % number}
        forms.write_tar(tmp_path / f"{name}.tar", members)
    with pytest.raises(ValueError, match=r"several splits .*--files 'im-train-\*.tar' or 'im-val"):
        index_tars(str(tmp_path), workers=1, quiet=True)
    for url, files in (
        (str(tmp_path), "im-train-*.tar"),
        (f"{tmp_path}/im-train-{{0..1}}.tar", ""),
        (f"{tmp_path}/im-train-0.tar::{tmp_path}/im-train-1.tar", ""),
        (f"{tmp_path}/im-tr*.tar", ""),
    ):
        made = index_tars(url, workers=1, quiet=True, files=files, replace=True)
        assert [shard.name for shard in made.shards] == ["im-train-0.tar", "im-train-1.tar"]
        assert not find_problems(tmp_path), "tars that were not asked for are no problem"
    with pytest.raises(ValueError, match=r"holds no im-train-2.tar, one of 3 tars .*1 are missing"):
        index_tars(f"{tmp_path}/im-train-{{0..2}}.tar", workers=1, quiet=True, replace=True)
    with pytest.raises(ValueError, match="names tars of 2 folders"):
        index_tars(f"{tmp_path}/a.tar::{tmp_path}/b/a.tar", workers=1, quiet=True, replace=True)


def test_tars_without_images_belong_to_the_set(tmp_path):
    forms.write_tar(tmp_path / "0.tar", {"a.jpg": forms.picture(1), "a.cls": b"0"})
    forms.write_tar(tmp_path / "1.tar", {})
    forms.write_tar(tmp_path / "2.tar", {"b.jpg": b"broken"})
    made = index_tars(str(tmp_path), workers=1, quiet=True, unlabelled="keep")
    assert made.provenance["balance"]["rejected"] == 1 and not find_problems(tmp_path)
    forms.write_tar(tmp_path / "1.tar", {"c.jpg": forms.picture(2)})
    assert ("1.tar", "", "is not in the manifest") in find_problems(tmp_path)
    forms.write_tar(tmp_path / "1.tar", {"c.txt": b"x"})
    ((_, _, message),) = find_problems(tmp_path)
    assert "other files than were described: seen 4, 3 in the manifest" in message


def test_what_this_program_did_not_write_stays(tmp_path):
    others(tmp_path)
    (tmp_path / "index.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds index.bin and no manifest.json"):
        index_tars(str(tmp_path), workers=1, quiet=True)
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    for again in (False, True):
        with pytest.raises(ValueError, match=r"manifest.json is not of this program"):
            index_tars(str(tmp_path), workers=1, quiet=True, replace=again)
    assert (tmp_path / "index.bin").read_bytes() == b"mine"


def test_a_set_described_by_member_names_is_verified_by_them(tmp_path):
    members = {}
    for key in "ab":
        members |= {f"{key}.left.png": forms.picture(1, form="PNG"), f"{key}.class": b"dog"}
        members |= {f"{key}.right.png": forms.picture(2, form="PNG")}
    forms.write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=r"2 samples of .* several images: left.png, right.png"):
        index_tars(str(tmp_path), workers=1, quiet=True)
    pick = MemberPick("right", "class")
    made = index_tars(str(tmp_path), workers=1, quiet=True, pick=pick)
    assert made.classes == ("dog",) and made.samples == 2 and not find_problems(tmp_path)


def test_manifests_from_before_the_balance_stay_sound(tmp_path):
    """They left out the images of bad label files, and had no balance."""
    members = {"a.jpg": forms.picture(1), "a.json": b"{", "b.jpg": forms.picture(2)}
    forms.write_tar(tmp_path / "0.tar", members | {"b.json": b'{"label": 3}'})
    made = index_tars(str(tmp_path), workers=1, quiet=True)
    shards = [replace(shard, samples=1) for shard in made.shards]
    old = {"program": "mocov3-ds 0", "rejected": 1, "source": "index"}
    manifest.write(str(tmp_path), shards, made.index_N[1:], provenance=old)
    assert not find_problems(tmp_path)


def test_ids_are_class_names_on_the_way_through_index_verify_and_shard(tmp_path):
    ids = [9_999_999_999, 5, 2**40, 5]
    members = {}
    for number, label in enumerate(ids):
        members |= {f"{number}.jpg": forms.picture(number), f"{number}.cls": b"%d" % label}
    forms.write_tar(tmp_path / "theirs" / "0.tar", members)
    described = index_tars(str(tmp_path / "theirs"), workers=1, quiet=True)
    for folder, source in (("ours", "theirs"), ("again", "ours")):
        make(tmp_path / source, tmp_path / folder)
    for folder in ("theirs", "ours", "again"):
        loaded = manifest.load(str(tmp_path / folder))
        assert loaded.classes == described.classes == ("5", "9999999999", "1099511627776")
        names = [int(loaded.classes[label]) for label in loaded.index_N["label"]]
        images = loaded.index_N["crc32"].tolist()
        wanted = {zlib.crc32(forms.picture(number)): label for number, label in enumerate(ids)}
        assert dict(zip(images, names, strict=True)) == wanted
        assert not find_problems(tmp_path / folder)


@pytest.mark.parametrize(
    ("ending", "reason"),
    [("jxl", "image format that is not read (.jxl)"), ("jpg", "not an image")],
)
def test_a_class_without_a_readable_image_keeps_its_number(tmp_path, ending, reason):
    members = {"1.jpg": forms.picture(1), "1.cls": b"cat"}
    members |= {f"2.{ending}": b"nothing", "2.cls": b"dog"}
    members |= {"3.jpg": forms.picture(3), "3.cls": b"fox"}
    forms.write_tar(tmp_path / "tars/0.tar", members)
    described = index_tars(str(tmp_path / "tars"), workers=1, quiet=True)
    make(tmp_path / "tars", tmp_path / "out")
    sharded = manifest.load(str(tmp_path / "out"))
    for folder, made in (("tars", described), ("out", sharded)):
        assert made.classes == ("cat", "dog", "fox")
        assert made.index_N["label"].tolist() == [0, 2]
        rejects = (tmp_path / folder / "rejects.jsonl").read_text().splitlines()
        assert [json.loads(line)["reason"] for line in rejects] == [reason]
        assert not find_problems(tmp_path / folder)


def test_tars_of_arrays_are_described_verified_and_sharded(tmp_path):
    def stored(array):
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 4096, (9, 7 + n, 6)).astype(np.uint16) for n in range(3)]
    members = {}
    for number, array in enumerate(arrays):
        members |= {f"{number}.npy": stored(array), f"{number}.cls": b"%d" % number}
    members |= {"3.npy": stored(np.zeros(5)), "3.cls": b"0"}  # no image
    forms.write_tar(tmp_path / "w" / "0.tar", members)
    made = index_tars(str(tmp_path / "w"), workers=1, quiet=True)
    assert (
        made.index_N["width"].tolist() == [7, 8, 9] and made.index_N["height"].tolist() == [9] * 3
    )
    assert verify_set(str(tmp_path / "w"), workers=1, quiet=True).is_sound
    again = make(tmp_path / "w" / "0.tar", tmp_path / "out").manifest
    assert again.samples == 3 and again.index_N["label"].tolist() == [0, 1, 2]
    assert verify_set(str(tmp_path / "out"), workers=1, quiet=True).is_sound
    found = measure_pixels(again, channels=6, quiet=True)
    exact = [(array >> 4).reshape(-1, 6).mean(0) / 255 for array in arrays]
    np.testing.assert_allclose(found.mean, np.mean(exact, 0), rtol=1e-12)
