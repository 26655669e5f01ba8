"""Whatever is done to a finished set is found; tars of others are described or refused."""

import io
import json
import tarfile

import pytest

from data_prep import tar
from data_prep.shard import Options, shard
from data_prep.sources import open_source
from data_prep.verify import index, verify
from mocov3_ds.data import manifest, storage
from tests.data_prep import forms

IMAGES = forms.imagenet(5)


@pytest.fixture
def made(tmp_path):
    """A finished set of 15 samples in 4 shards."""
    tree = forms.write_tree(tmp_path / "tree", IMAGES)
    out = tmp_path / "out"
    shard(open_source(str(tree)), str(out), Options(shard_size="4"), workers=1, quiet=True)
    return out


def problems(url, **options):
    verdict = verify(str(url), workers=1, quiet=True, **options)
    assert verdict.sound == (not verdict.problems)
    return [(p.shard, p.sample, p.what) for p in verdict.problems]


def test_a_finished_set_is_sound(made):
    for workers in (1, 2):
        verdict = verify(str(made), workers=workers, quiet=True)
        assert verdict.sound and verdict.shards == 4 and verdict.samples == 15
        assert verdict.labels == dict.fromkeys(forms.CLASSES, 5)
        assert verdict.bytes == sum(path.stat().st_size for path in made.glob("*.tar"))
        assert "sound" in str(verdict) and "3 labels, 5 to 5 samples each" in str(verdict)


def test_every_byte_counts(made):
    """Any flipped bit of a shard is found, wherever it lies."""
    path = made / "shard-000003.tar"
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 997), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = problems(made, decode_all=False)
        assert any("SHA-256" in what for _, _, what in found), place
    path.write_bytes(whole)
    assert not problems(made)


def test_damage_is_named_where_it_lies(made):
    loaded = manifest.load(str(made))
    path = made / "shard-000001.tar"
    whole = path.read_bytes()
    row = loaded.index_N[5]
    with tarfile.open(path) as archive:
        key = archive.getnames()[2].removesuffix(".jpg")

    pixels = bytearray(whole)
    pixels[int(row["offset"])] = 0
    path.write_bytes(pixels)
    found = problems(made)
    assert ("shard-000001.tar", key, "not an image") in found
    assert any(sample == key and "crc32" in what for _, sample, what in found)

    header = bytearray(whole)
    header[int(row["offset"]) - 512] ^= 4
    path.write_bytes(header)
    assert any("checksum is wrong" in what for _, _, what in problems(made))

    path.write_bytes(whole[: int(row["offset"]) - 512])  # at a member boundary
    found = [what for _, _, what in problems(made)]
    assert any("cut short" in what for what in found)
    assert any("holds 1 samples, the manifest says 4" in what for what in found)

    path.unlink()
    assert problems(made) == [("shard-000001.tar", "", "is missing")]
    path.write_bytes(whole)
    (made / "stray.tar").write_bytes(b"x")
    assert problems(made) == [("stray.tar", "", "is not in the manifest")]


def test_an_index_that_lies_is_found(made):
    loaded = manifest.load(str(made))
    rows = loaded.index_N.copy()
    rows["label"][0] += 1
    rows["crc32"][1] ^= 1
    rows["size"][2] -= 1
    rows["offset"][3] += 512
    manifest.write(str(made), loaded.shards, rows, classes=loaded.classes)
    found = [what for _, _, what in problems(made)]
    for word in ("label", "crc32", "size", "has no sample at byte", "is not in the index"):
        assert any(word in what for what in found), word
    assert len(found) == 5


def test_repeated_images_and_keys_are_told(tmp_path):
    same = forms.picture(1)
    tree = forms.write_tree(
        tmp_path / "t", {"a/x.jpg": same, "b/y.jpg": same, "b/z.jpg": forms.picture(2)}
    )
    shard(open_source(str(tree)), str(tmp_path / "o"), Options(), workers=1, quiet=True)
    verdict = verify(str(tmp_path / "o"), workers=1, quiet=True)
    assert verdict.sound and verdict.repeated_image_groups == 1
    (group,) = verdict.repeated_images
    assert sorted(group) == ["shard-000000.tar/a_x", "shard-000000.tar/b_y"]
    assert "1 images occur more than once" in str(verdict)
    for name in ("0.tar", "1.tar"):
        forms.write_tar(tmp_path / "w" / name, {"k.jpg": forms.picture(len(name)), "k.cls": b"0"})
    index(str(tmp_path / "w"), workers=1, quiet=True)
    verdict = verify(str(tmp_path / "w"), workers=1, quiet=True)
    assert verdict.repeated_keys == ["k"] and verdict.sound


def test_the_verdict_for_machines(made):
    (made / "shard-000000.tar").unlink()
    tree = json.loads(verify(str(made), workers=1, quiet=True).as_json())
    assert tree["sound"] is False and tree["samples"] == 15
    assert tree["problems"] == [{"shard": "shard-000000.tar", "sample": "", "what": "is missing"}]
    assert tree["labels"] == dict.fromkeys(forms.CLASSES, 5)


def test_a_set_in_object_storage(made, s3):
    for path in made.iterdir():
        if path.is_file():
            storage.write(f"{s3}/v/{path.name}", path.read_bytes())
    assert not problems(f"{s3}/v")
    whole = storage.read(f"{s3}/v/shard-000002.tar")
    storage.write(f"{s3}/v/shard-000002.tar", whole[:-1] + b"x")
    assert any("SHA-256" in what for _, _, what in problems(f"{s3}/v"))


# index


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
    made = index(str(tmp_path), workers=2, quiet=True)
    assert made.digest == manifest.load(str(tmp_path)).digest
    assert [entry.samples for entry in made.shards] == [3, 1]
    assert made.index_N["label"].tolist() == [4, 2, 0, 1] and made.labelled
    for number, row in enumerate(made.index_N):
        url = made.shard_url(0 if number < 3 else 1)
        start, end = int(row["offset"]), int(row["offset"] + row["size"])
        assert storage.read(url, start, end) == images[number]
    (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert reject == {"name": "1.tar/d", "reason": "not an image"}
    assert not problems(tmp_path), "what the index leaves out on purpose is no problem"
    with pytest.raises(ValueError, match=r"has a manifest.json already; .* --replace"):
        index(str(tmp_path), workers=1, quiet=True)
    assert index(str(tmp_path), workers=1, quiet=True, replace=True).digest == made.digest


def test_a_described_set_opens_like_one_of_ours(made):
    ours = manifest.load(str(made))
    again = index(str(made), workers=1, replace=True, classes=ours.classes, quiet=True)
    assert again.digest == ours.digest and again.classes == ours.classes


def test_damaged_and_hostile_tars_are_refused(tmp_path):
    others(tmp_path)
    whole = (tmp_path / "0.tar").read_bytes()

    def refused(data, match):
        (tmp_path / "0.tar").write_bytes(data)
        with pytest.raises(ValueError, match=match):
            index(str(tmp_path), workers=1, quiet=True)
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
        index(str(tmp_path), workers=1, quiet=True)
    forms.write_tar(tmp_path / "0.tar", {"a.txt": b"x"})
    with pytest.raises(ValueError, match="hold no readable images"):
        index(str(tmp_path), workers=1, quiet=True)
    with pytest.raises(ValueError, match=r"holds no manifest.json; make shards"):
        verify(str(tmp_path), workers=1, quiet=True)


def test_a_sample_with_a_bad_label_file_is_left_out(tmp_path):
    members = {
        "a.jpg": forms.picture(1),
        "a.json": b"{",
        "b.jpg": forms.picture(2),
        "b.json": b'{"label": 3}',
    }
    forms.write_tar(tmp_path / "0.tar", members)
    made = index(str(tmp_path), workers=1, quiet=True)
    assert made.index_N["label"].tolist() == [3]
    assert "a.json in" in (tmp_path / "rejects.jsonl").read_text()


def test_an_archive_in_pieces_reads_like_a_whole_one(tmp_path, monkeypatch):
    """Members over the edges of the blocks that storage hands out."""
    others(tmp_path)
    wanted = index(str(tmp_path), workers=1, quiet=True)

    def small(url, start=0, end=None):
        data = io.BytesIO(storage.read(url))
        return iter(lambda: data.read(37), b"")

    monkeypatch.setattr(storage, "chunks", small)
    assert index(str(tmp_path), workers=1, quiet=True, replace=True).digest == wanted.digest
