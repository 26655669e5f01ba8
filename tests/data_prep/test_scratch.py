"""Compressed tars give the same source as the tree they were made of."""

import bz2
import gzip
import lzma
import os
import subprocess
import sys
import zlib

import pytest

from data_prep import scratch
from data_prep.source_options import SourceOptions
from data_prep.sources import list_images
from mocov3_ds.data import manifest
from tests.data_prep import forms
from tests.data_prep.making import make_from_scratch as sharded

IMAGES = forms.imagenet(4)


@pytest.fixture
def wanted(tmp_path):
    return sharded(forms.write_tree(tmp_path / "tree", IMAGES), tmp_path / "wanted")


@pytest.mark.parametrize(
    ("ending", "compress"),
    [
        (".tar.gz", gzip.compress),
        (".tgz", gzip.compress),
        (".tar.bz2", bz2.compress),
        (".tar.xz", lzma.compress),
    ],
)
def test_compressed_tars(tmp_path, wanted, ending, compress):
    path = tmp_path / f"images{ending}"
    path.write_bytes(compress(forms.tar_bytes({f"train/{n}": d for n, d in IMAGES.items()})))
    made = sharded(path, tmp_path / "out", under="train")
    assert made.digest == wanted.digest and made.classes == wanted.classes


def test_damaged_compressed_tars_are_refused(tmp_path):
    whole = gzip.compress(forms.tar_bytes(IMAGES))
    path = tmp_path / "x.tar.gz"
    for data in (whole[:-100], b"no gzip at all" * 9, whole[:200] + b"xxxx" + whole[204:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x.tar.gz is damaged or cut short"):
            list_images(str(path), scratch_folder=tmp_path)
    with pytest.raises(ValueError, match="needs a scratch folder"):
        list_images(str(path))


def test_our_own_set_is_a_source_with_its_class_names(tmp_path, wanted):
    again = sharded(tmp_path / "wanted", tmp_path / "again")
    assert again.classes == wanted.classes and again.samples == wanted.samples
    assert sorted(again.index_N["crc32"]) == sorted(wanted.index_N["crc32"])
    assert manifest.load(str(tmp_path / "again")).has_labels


def test_the_archives_of_single_classes_are_named_by_their_class(tmp_path, wanted):
    for name, data in forms.nested(IMAGES).items():
        (tmp_path / "classes").mkdir(exist_ok=True)
        (tmp_path / "classes" / name).write_bytes(data)
    made = sharded(tmp_path / "classes", tmp_path / "out")
    assert made.digest == wanted.digest and made.classes == wanted.classes


def test_mixed_folders_and_other_files_are_refused(tmp_path):
    forms.write_tar(tmp_path / "a" / "0.tar", IMAGES)
    (tmp_path / "a" / "cats").mkdir()
    with pytest.raises(ValueError, match=r"holds archives \(0.tar\) beside images or folders"):
        list_images(str(tmp_path / "a"))
    (tmp_path / "x.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"x.zip is neither a tar"):
        list_images(str(tmp_path / "x.zip"))


def test_two_sources_of_one_stem_do_not_meet(tmp_path):
    cats = {f"cat/{n}.jpg": forms.picture(n) for n in range(4)}
    dogs = {f"dog/{n}.jpg": forms.picture(100 + n) for n in range(4)}
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "part.tar.gz").write_bytes(gzip.compress(forms.tar_bytes(cats)))
    (folder / "part.tar.xz").write_bytes(lzma.compress(forms.tar_bytes(dogs)))
    (folder / "part.tgz").write_bytes(gzip.compress(forms.tar_bytes({"fox/1.jpg": b"no image"})))
    made = sharded(folder, tmp_path / "out")
    assert made.classes == ("cat", "dog", "fox") and made.samples == 8
    by_label = {0: cats, 1: dogs}
    wanted = sorted(
        (zlib.crc32(data), label) for label, of in by_label.items() for data in of.values()
    )
    assert sorted(zip(made.index_N["crc32"], made.index_N["label"], strict=True)) == wanted


def test_zstd_tars_in_one_or_more_frames(tmp_path, wanted):
    zstandard = pytest.importorskip("zstandard")
    whole = forms.tar_bytes(IMAGES)
    compress = zstandard.ZstdCompressor().compress
    path = tmp_path / "i.tar.zst"
    for data in (compress(whole), compress(whole[:5000]) + compress(whole[5000:])):
        path.write_bytes(data)
        out = tmp_path / f"out{len(data)}"
        assert sharded(path, out).digest == wanted.digest
    path.write_bytes(compress(whole)[:-90])
    with pytest.raises(ValueError, match=r"i.tar(.zst)? is (damaged or )?cut short"):
        list_images(str(path), scratch_folder=tmp_path)
    misnamed = tmp_path / "gz.tar"
    misnamed.write_bytes(gzip.compress(whole))
    assert sharded(misnamed, tmp_path / "misnamed").digest == wanted.digest


def test_damaged_bytes_inside_a_gzip_stream(tmp_path):
    """zlib raises an error of its own there, which is no OSError."""
    whole = bytearray(gzip.compress(os.urandom(3000) + forms.tar_bytes(IMAGES)))
    path = tmp_path / "x.tar.gz"
    refused = 0
    for place in range(20, 3000, 97):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.tar"):
            list_images(str(path), scratch_folder=tmp_path)
        refused += 1
    assert refused == 31


def test_looking_writes_nothing_and_lists_the_same(tmp_path):
    path = tmp_path / "i.tar.gz"
    path.write_bytes(gzip.compress(forms.tar_bytes({f"t/{n}": d for n, d in IMAGES.items()})))
    listing = list_images(str(path), is_look=True, options=SourceOptions(class_level="2"))
    assert listing.classes == forms.CLASSES and len(listing) == len(IMAGES)
    assert [*tmp_path.iterdir()] == [path]


def test_scratch_folders_of_killed_runs_go_and_others_stay(tmp_path, capsys):
    kept = [tmp_path / "data_prep-notes", tmp_path / "data_prep-unmarked"]
    for folder in kept:
        folder.mkdir()
        (folder / "thesis.tex").write_text("x")
    (kept[0] / "made-by-data_prep").touch()  # a run that has not locked it yet, or cannot
    code = (
        "import os, pathlib, sys; from data_prep.scratch import scratch_folder\n"
        "with scratch_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'big.tar').write_bytes(b'x'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120, check=False)
    (left,) = [path for path in tmp_path.iterdir() if path not in kept]
    with scratch.scratch_folder(tmp_path) as folder:
        assert not left.exists() and "which a killed run has left" in capsys.readouterr().err
        with scratch.scratch_folder(tmp_path) as other:
            assert folder.exists() and other != folder
    assert sorted(tmp_path.iterdir()) == sorted(kept)
