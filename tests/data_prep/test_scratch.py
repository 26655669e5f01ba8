"""Compressed tars give the same source as the tree they were made of."""

import bz2
import gzip
import lzma

import pytest

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
        with pytest.raises(ValueError, match=r"x.tar.gz cannot be unpacked to"):
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
