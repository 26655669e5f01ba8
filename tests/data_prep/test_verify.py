"""Whatever is done to a finished set is found; tars of others are described or refused."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from data_prep.index import index_tars
from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images
from data_prep.verify import verify_set
from mocov3_ds.data import manifest, storage
from tests.data_prep import forms
from tests.data_prep.making import find_problems, make


def test_a_finished_set_is_sound(made):
    for workers in (1, 2):
        verdict = verify_set(str(made), workers=workers, quiet=True)
        assert verdict.is_sound and verdict.shards == 4 and verdict.samples == 15
        assert verdict.labels == dict.fromkeys(forms.CLASSES, 5)
        assert verdict.bytes == sum(path.stat().st_size for path in made.glob("*.tar"))
        assert "sound" in str(verdict) and "3 labels, 5 to 5 samples each" in str(verdict)


def test_images_that_show_nothing_are_reported(tmp_path):
    grey_HW = np.linspace(100, 110, 24 * 24).reshape(24, 24).astype(np.uint8)
    faint = io.BytesIO()
    Image.fromarray(grey_HW).save(faint, "PNG")
    images = {"a/1.png": faint.getvalue(), "a/2.png": forms.picture(1, form="PNG")}
    make(forms.write_tree(tmp_path / "tree", images), tmp_path / "out")
    verdict = verify_set(str(tmp_path / "out"), workers=1, quiet=True)
    assert verdict.is_sound and verdict.faint_images == 1
    assert "1 images are nearly of one colour" in str(verdict) and "/a_1;" in str(verdict)
    headers = verify_set(str(tmp_path / "out"), workers=1, quiet=True, decode_all=False)
    assert not headers.faint_images


def test_every_byte_counts(made):
    """Any flipped bit of a shard is found, wherever it lies."""
    path = made / "shard-000003.tar"
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 997), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = find_problems(made, decode_all=False)
        assert any("SHA-256" in what for _, _, what in found), place
    path.write_bytes(whole)
    assert not find_problems(made)


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
    found = find_problems(made)
    assert ("shard-000001.tar", key, "not an image") in found
    assert any(sample == key and "crc32" in what for _, sample, what in found)

    header = bytearray(whole)
    header[int(row["offset"]) - 512] ^= 4
    path.write_bytes(header)
    assert any("checksum is wrong" in what for _, _, what in find_problems(made))

    path.write_bytes(whole[: int(row["offset"]) - 512])  # at a member boundary
    found = [what for _, _, what in find_problems(made)]
    assert any("cut short" in what for what in found)
    assert any("holds 1 samples, the manifest says 4" in what for what in found)

    path.unlink()
    assert find_problems(made) == [("shard-000001.tar", "", "is missing")]
    path.write_bytes(whole)
    (made / "stray.tar").write_bytes(b"x")
    assert find_problems(made) == [("stray.tar", "", "is not in the manifest")]


def test_an_index_that_lies_is_found(made):
    loaded = manifest.load(str(made))
    rows = loaded.index_N.copy()
    rows["label"][0] += 1
    rows["crc32"][1] ^= 1
    rows["size"][2] -= 1
    rows["offset"][3] += 512
    manifest.write(str(made), loaded.shards, rows, classes=loaded.classes)
    found = [what for _, _, what in find_problems(made)]
    for word in ("label", "crc32", "size", "has no sample at byte", "is not in the index"):
        assert any(word in what for what in found), word
    assert len(found) == 5


def test_repeated_images_and_keys_are_reported(tmp_path):
    same = forms.picture(1)
    tree = forms.write_tree(
        tmp_path / "t", {"a/x.jpg": same, "b/y.jpg": same, "b/z.jpg": forms.picture(2)}
    )
    make_shards(list_images(str(tree)), str(tmp_path / "o"), ShardOptions(), workers=1, quiet=True)
    verdict = verify_set(str(tmp_path / "o"), workers=1, quiet=True)
    assert verdict.is_sound and verdict.repeated_image_groups == 1
    (group,) = verdict.repeated_images
    assert sorted(group) == ["shard-000000.tar/a_x", "shard-000000.tar/b_y"]
    assert "1 images occur more than once" in str(verdict)
    for name in ("0.tar", "1.tar"):
        forms.write_tar(tmp_path / "w" / name, {"k.jpg": forms.picture(len(name)), "k.cls": b"0"})
    index_tars(str(tmp_path / "w"), workers=1, quiet=True)
    verdict = verify_set(str(tmp_path / "w"), workers=1, quiet=True)
    assert verdict.repeated_keys == ["k"] and verdict.is_sound


def test_the_verdict_for_machines(made):
    (made / "shard-000000.tar").unlink()
    tree = json.loads(verify_set(str(made), workers=1, quiet=True).as_json())
    assert tree["sound"] is False and tree["samples"] == 15
    assert tree["problems"] == [{"shard": "shard-000000.tar", "sample": "", "what": "is missing"}]
    assert tree["labels"] == dict.fromkeys(forms.CLASSES, 5)


def test_a_set_in_object_storage(made, s3):
    for path in made.iterdir():
        if path.is_file():
            storage.write(f"{s3}/v/{path.name}", path.read_bytes())
    assert not find_problems(f"{s3}/v")
    whole = storage.read(f"{s3}/v/shard-000002.tar")
    storage.write(f"{s3}/v/shard-000002.tar", whole[:-1] + b"x")
    assert any("SHA-256" in what for _, _, what in find_problems(f"{s3}/v"))


def test_a_balance_that_does_not_close_is_a_problem(made):
    loaded = manifest.load(str(made))
    balance = {**loaded.provenance["balance"], "seen": 16}
    changed = {**loaded.provenance, "balance": balance}
    manifest.write(
        str(made), loaded.shards, loaded.index_N, classes=loaded.classes, provenance=changed
    )
    assert find_problems(made) == [
        ("manifest.json", "", "the balance does not close: 16 files seen, 15 accounted for")
    ]


def test_labels_that_are_names_or_ids_are_compared(tmp_path):
    for folder, first, second in (("names", b"cat", b"dog"), ("ids", b"5", b"9999999999")):
        members = {"a.jpg": forms.picture(1), "a.cls": first, "b.jpg": forms.picture(2)}
        forms.write_tar(tmp_path / folder / "0.tar", members | {"b.cls": second})
        made = index_tars(str(tmp_path / folder), workers=1, quiet=True)
        assert made.index_N["label"].tolist() == [0, 1] and not find_problems(tmp_path / folder)
        rows = made.index_N[[1, 0]].copy()
        rows["label"] = 0, 1
        rows = rows[[1, 0]]
        manifest.write(
            str(tmp_path / folder),
            made.shards,
            rows,
            classes=made.classes,
            provenance=made.provenance,
        )
        found = [what for _, _, what in find_problems(tmp_path / folder)]
        assert found == ["label 0, the index says 1", "label 1, the index says 0"]


def test_a_hostile_name_does_not_speak_for_the_verdict(tmp_path):
    key = "k\nsound\n\x1b]0;owned\x07\x1b[8m"
    members = {f"{key}.jpg": forms.picture(1), "x.jpg": forms.picture(2)}
    forms.write_tar(tmp_path / "0.tar", members)
    made = index_tars(str(tmp_path), workers=1, quiet=True)
    rows = made.index_N.copy()
    rows["crc32"] ^= 1
    manifest.write(str(tmp_path), made.shards, rows, provenance=made.provenance)
    lines = str(verify_set(str(tmp_path), workers=1, quiet=True)).splitlines()
    assert lines[-1] == "NOT sound: 2 problems" and "sound" not in lines
    assert "\x1b" not in "".join(lines) and any(r"k\nsound\n\x1b" in line for line in lines)
