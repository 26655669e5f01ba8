"""Parquet files give the same source as the tree they were made of."""

import json
import sys

import numpy as np
import pytest

from data_prep import parquet
from data_prep.class_numbers import ClassNames
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


def write_columns(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def listing_of(path, **options):
    return list_images(str(path), scratch_folder=path.parent, **options)


@pytest.mark.parametrize(
    ("others", "taken"),
    [
        ({"thumbnail": [forms.picture(5, size=8), forms.picture(6, size=8)]}, "image"),
        ({"sha": [b"0" * 32, b"1" * 32]}, "image"),
        ({"sha": pa.array([b"0" * 32, b"1" * 32], pa.binary(32))}, "image"),
    ],
)
def test_the_column_of_images_is_taken_by_name(tmp_path, others, taken):
    wanted = [forms.picture(1), forms.picture(2)]
    path = write_columns(tmp_path / "p.parquet", **others, image=wanted, label=[0, 1])
    listing, [other] = listing_of(path), others
    assert listing.size_N.tolist() == [len(image_bytes) for image_bytes in wanted]
    assert f"images are column {taken!r} (not {other!r})" in listing.notes[0]
    with pytest.raises(ValueError, match="no column 'nothing' of bytes; those of bytes are"):
        listing_of(path, image="nothing")
    other_sizes = listing_of(path, image=other).size_N
    assert other_sizes.tolist() == [len(value) for value in pa.table(others)[other].to_pylist()]


def test_images_of_other_names_are_told_by_kind_and_content(tmp_path):
    images = [forms.picture(1), forms.picture(2)]
    path = write_columns(tmp_path / "p.parquet", digest=[b"0", b"1"], photo=images)
    assert (
        "images are column 'photo' (not 'digest'); no column is the label"
        in (listing_of(path).notes[0])
    )
    structs = [{"bytes": image_bytes, "path": None} for image_bytes in images]
    path = write_columns(tmp_path / "p.parquet", small=images, photo=structs)
    assert "images are column 'photo'" in listing_of(path).notes[0]
    path = write_columns(tmp_path / "p.parquet", left=images, right=images, y=[0, 1])
    with pytest.raises(ValueError, match="2 columns that may be the images, 'left', 'right'; say "):
        listing_of(path)
    assert listing_of(path, image="right").label_N.tolist() == [0, 1]
    view = pa.array(images, pa.binary_view())
    assert len(listing_of(write_columns(tmp_path / "p.parquet", image=view))) == 2


@pytest.mark.parametrize(
    ("columns", "options", "numbers"),
    [
        ({"target": [5, 2]}, {}, [5, 2]),
        ({"label": [1.0, 0.0]}, {}, [1, 0]),
        ({"label": [1, 0], "class_name": ["x", "y"]}, {}, [1, 0]),
        ({"fine_label": [1, 0], "coarse_label": [3, 3]}, {"label": "coarse_label"}, [3, 3]),
        ({"label": ["10", "2"]}, {}, [10, 2]),
        ({"label": pa.array(["b", "a"]).dictionary_encode()}, {}, [1, 0]),
        ({"labels": [[0], [1, 2]], "kind": [4, 5]}, {"label": "kind"}, [4, 5]),
        ({"label": [0, None]}, {"unlabelled": "keep"}, [0, -1]),
        ({"label": [0, 1]}, {"label": "-"}, [-1, -1]),
        ({"url": ["u", "v"]}, {}, [-1, -1]),
        ({"label": [2**40, 7]}, {}, [1, 0]),
    ],
)
def test_the_label_is_one_column_of_names_or_whole_numbers(tmp_path, columns, options, numbers):
    path = write_columns(
        tmp_path / "p.parquet", image=[forms.picture(1), forms.picture(2)], **columns
    )
    assert listing_of(path, **options).label_N.tolist() == numbers


@pytest.mark.parametrize(
    ("columns", "options", "match"),
    [
        ({"label": [0.4, 1.0]}, {}, "'label' in row 0 of .*p.parquet is 0.4; a label is one name"),
        ({"label": [0.0, float("nan")]}, {}, "1 of 2 images .* have no class.*--unlabelled keep"),
        ({"labels": [[[0]], [[1, 2]]]}, {}, "'labels' of .* holds list<.*; .*--label - none"),
        ({"label": [True, False]}, {}, "'label' of .* holds bool"),
        (
            {"fine_label": [1, 0], "coarse_label": [3, 3]},
            {},
            "'fine_label', 'coarse_label'; say",
        ),
        ({"label": [1, 0]}, {"label": "x"}, "no column 'x' for labels; the others are 'label'"),
        ({"label": [0, -3]}, {}, "label -3 of"),
    ],
)
def test_columns_that_are_no_label_are_refused(tmp_path, columns, options, match):
    path = write_columns(
        tmp_path / "p.parquet", image=[forms.picture(1), forms.picture(2)], **columns
    )
    with pytest.raises(ValueError, match=match):
        listing_of(path, **options)


def test_files_of_one_source_name_their_classes_alike(tmp_path):
    images = [*IMAGES.items()]
    folder = write_parquet(tmp_path / "hf" / "a.parquet", dict(images[:7])).parent
    other = write_parquet(folder / "b.parquet", dict(images[7:]), names=forms.CLASSES[::-1])
    with pytest.raises(ValueError, match=r"b.parquet and .*a.parquet name the classes of 'label'"):
        list_images(str(folder), scratch_folder=tmp_path)
    write_columns(other, image=[forms.picture(1)])
    with pytest.raises(ValueError, match=r"b.parquet has no column 'label', .*a.parquet has one"):
        list_images(str(folder), scratch_folder=tmp_path)


def test_looking_reads_the_labels_alone(tmp_path):
    images = [forms.picture(1), forms.picture(2)]
    path = tmp_path / "im.parquet"
    pq.write_table(pa.table({"jpg": images, "label": [3, 1]}), path)
    looked = list_images(str(path), is_look=True)
    assert looked.label_N.tolist() == [3, 1] and [*tmp_path.iterdir()] == [path]
    assert any("only the labels of parquet files are read" in note for note in looked.notes)
    assert parquet.has_images(path) and parquet.list_rows(path, COLUMNS)[1].label == 1
    pq.write_table(pa.table({"url": ["x"]}), path)
    assert not parquet.has_images(path)


COLUMNS = parquet.Columns("jpg", "label", ClassNames(), ())
