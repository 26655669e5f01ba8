"""Labels are those that the owners' own tools give: torchvision, timm, webdataset."""

from pathlib import Path

import numpy as np
import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets
from torchvision.datasets import ImageFolder
from webdataset import TarWriter
from webdataset.autodecode import basichandlers
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_prep.index import index_tars
from data_prep.sources import list_images
from mocov3_ds.data import manifest
from tests.data_prep import forms
from tests.data_prep.making import make

NAMES = ("african elephant", "african zebra", "caf\u00e9", "great white shark", "n01440764", "x-1")


def samples_of(loaded):
    """The samples of a set as webdataset groups them."""
    for number in range(len(loaded.shards)):
        url = loaded.shard_url(number)
        with Path(url).open("rb") as stream:
            yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))


def labels_by_image(url):
    """Label of each sample of a set by its image's bytes, and the class names."""
    loaded = manifest.load(str(url))
    samples = [sample["jpg"] for sample in samples_of(loaded)]
    return dict(zip(samples, loaded.index_N["label"].tolist(), strict=True)), loaded.classes


@pytest.fixture
def tree(tmp_path):
    images = {
        f"{name}/{n}.jpg": forms.picture(10 * n + m) for m, name in enumerate(NAMES) for n in (1, 2)
    }
    return forms.write_tree(tmp_path / "tree", images)


def test_class_folders_are_those_of_image_folder_and_timm(tree, tmp_path):
    made = make(tree, tmp_path / "set")
    labels, classes = labels_by_image(tmp_path / "set")
    theirs = ImageFolder(str(tree))
    assert [*classes] == theirs.classes and made.manifest.samples == len(theirs)
    for path, label in theirs.samples:
        assert labels[Path(path).read_bytes()] == label
    _, number_of = find_images_and_targets(str(tree))
    assert {name: number for number, name in enumerate(classes)} == number_of


def test_folders_that_are_numbers_have_the_numbers_of_timm(tmp_path):
    """torchvision sorts them as text, so that folder 10 is class 2 (pytorch/vision#714)."""
    images = {f"{n}/{n}.jpg": forms.picture(n) for n in range(12)}
    listing = list_images(str(forms.write_tree(tmp_path, images)))
    found, _ = find_images_and_targets(str(tmp_path))
    theirs = {path.removeprefix(f"{tmp_path}/"): label for path, label in found}
    assert dict(zip(listing.names, listing.label_N.tolist(), strict=True)) == theirs
    assert theirs["10/10.jpg"] == 10


def test_labels_of_tars_are_what_webdataset_decodes(tmp_path):
    (tmp_path / "theirs").mkdir()
    with TarWriter(str(tmp_path / "theirs" / "0.tar")) as writer:
        for n in range(12):
            image, side = forms.picture(n), {"json": {"caption": "x"}} if n % 2 else {}
            writer.write({"__key__": f"{n:03d}", "jpg": image, "cls": (7 * n) % 12, **side})
    index_tars(str(tmp_path / "theirs"), workers=1, quiet=True)
    make(tmp_path / "theirs", tmp_path / "ours")
    for folder in ("theirs", "ours"):
        loaded = manifest.load(str(tmp_path / folder))
        labels = [basichandlers("cls", sample["cls"]) for sample in samples_of(loaded)]
        assert loaded.index_N["label"].tolist() == labels, folder
        assert np.unique(labels).tolist() == [*range(12)] and not loaded.classes
