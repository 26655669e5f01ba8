"""Parquet files give the same source as the tree they were made of."""

import json
import sys

import numpy as np
import pytest

from data_prep.sources import list_images
from tests.data_prep import forms
from tests.data_prep.making import make_from_scratch as sharded

IMAGES = forms.imagenet(4)

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def wanted(tmp_path):
    return sharded(forms.write_tree(tmp_path / "tree", IMAGES), tmp_path / "wanted")


def write_parquet(path, images, *, names=forms.CLASSES, paths=True):
    """As Hugging Face writes image sets: a struct column, integer labels, names in the metadata."""
    rows = [
        {"bytes": data, "path": name.rpartition("/")[2] if paths else None}
        for name, data in images.items()
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = [forms.CLASSES.index(name[:9]) for name in images]
    table = pa.table({"image": pa.array(rows, kind), "label": labels})
    if names:
        feature = {"names": list(names), "_type": "ClassLabel"}
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


def test_parquet_files_keep_bytes_labels_and_class_names(tmp_path, wanted):
    images = [*IMAGES.items()]
    write_parquet(tmp_path / "hf" / "train-0.parquet", dict(images[:7]))
    write_parquet(tmp_path / "hf" / "train-1.parquet", dict(images[7:]))
    made = sharded(tmp_path / "hf", tmp_path / "out")
    assert made.digest == wanted.digest and made.classes == forms.CLASSES
    named = write_parquet(tmp_path / "one.parquet", dict(images), names=("tench", "fish", "dog, x"))
    assert sharded(named, tmp_path / "named").classes == ("tench", "fish", "dog, x")


def test_parquet_rows_without_names_or_bytes(tmp_path):
    images = {"n01440764": forms.picture(1), "n01443537": forms.picture(2, form="PNG")}
    path = write_parquet(tmp_path / "p.parquet", images | {"n02102040": None}, paths=False)
    listing = list_images(str(path), scratch_folder=tmp_path)
    assert listing.names == ["p-0000000.jpg", "p-0000001.png", "p-0000002.jpg"]
    made = sharded(path, tmp_path / "out")
    assert sorted(made.index_N["label"].tolist()) == [0, 1]
    assert json.loads((tmp_path / "out" / "rejects.jsonl").read_text())["reason"] == "empty file"


def test_plain_binary_columns_and_other_label_names(tmp_path):
    table = pa.table({"id": [1, 2], "jpg": [forms.picture(1), forms.picture(2)], "cls": ["b", "a"]})
    pq.write_table(table, tmp_path / "p.parquet")
    listing = list_images(str(tmp_path / "p.parquet"), scratch_folder=tmp_path)
    assert listing.classes == ("a", "b") and listing.label_N.tolist() == [1, 0]
    assert np.all(listing.size_N > 0)


def test_parquet_files_that_hold_no_images_are_refused(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": ["x"], "label": [1]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="no column of image bytes among text, label"):
        list_images(str(tmp_path / "p.parquet"), scratch_folder=tmp_path)
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"p.parquet is not a parquet file"):
        list_images(str(tmp_path / "p.parquet"), scratch_folder=tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow to be read: pip install"):
        list_images(str(tmp_path / "p.parquet"), scratch_folder=tmp_path)
