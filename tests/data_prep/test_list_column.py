"""Lists of classes in parquet: they reach the shards whole, or one sentence says why not."""

import json

import numpy as np
import pytest

from data_prep.sources import list_images
from mocov3_ds.data import manifest as manifests
from mocov3_ds.evaluation.label_lists import open_listed_splits, read_label_lists
from tests.data_prep import forms
from tests.data_prep.making import make_from_scratch as sharded

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LISTS = [["cat", "dog"], [], ["dog"], ["É", "7"], ["cat"], ["cat", "É"], []]


def write_table(path, lists, kind=None, *, feature=None, **others):
    images = [forms.picture(number) for number in range(len(lists))]
    table = pa.table({"image": images, "labels": pa.array(lists, kind), **others})
    if feature:
        tree = {"info": {"features": {"labels": feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(tree)})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return path


def listing_of(path, **options):
    return list_images(str(path), scratch_folder=path.parent, **options)


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string())])
def test_lists_come_to_the_evaluation_as_they_were(tmp_path, kind):
    path = write_table(tmp_path / "p.parquet", LISTS, kind)
    made = sharded(path, tmp_path / "out")
    assert len(made.shards) == 2 and not made.has_labels and made.classes == ()
    assert read_lists(made) == sorted(LISTS)
    again = sharded(path, tmp_path / "again", label="labels")
    assert again.digest == made.digest
    splits = open_listed_splits(made.url, again.url, "labels")
    assert splits.classes == ("7", "cat", "dog", "É")
    assert splits.has_train_NC.sum(0).tolist() == [1, 3, 2, 2]


def read_lists(made):
    return sorted(read_label_lists(manifests.load(made.url), "labels"))


def test_each_image_keeps_its_own_list(tmp_path):
    """Written in an order drawn over the set: the list of row n is beside the image of row n."""
    lists = [[f"class {number}"] for number in range(12)]
    listing = listing_of(write_table(tmp_path / "p.parquet", lists))
    names = dict(zip(listing.names, listing.select_items(np.arange(len(listing))), strict=True))
    for number in range(12):
        item = names[f"p-{number:07d}.jpg"]
        with open(item.path, "rb") as file:  # noqa: PTH123 - a path as text
            file.seek(item.offset)
            assert file.read(item.size) == forms.picture(number)
            file.seek(item.json_offset)
            assert json.loads(file.read(item.json_size)) == {"labels": lists[number]}


@pytest.mark.parametrize(
    "feature",
    [
        {"feature": {"names": ["ant", "bee"], "_type": "ClassLabel"}, "_type": "Sequence"},
        [{"names": ["ant", "bee"], "_type": "ClassLabel"}],
    ],
)
def test_numbers_become_the_names_that_the_file_states(tmp_path, feature):
    path = write_table(tmp_path / "p.parquet", [[1, 0], [], [1]], feature=feature)
    assert read_lists(sharded(path, tmp_path / "named")) == [[], ["bee"], ["bee", "ant"]]
    plain = write_table(tmp_path / "plain" / "p.parquet", [[1, 0], [], [1]])
    assert read_lists(sharded(plain, tmp_path / "numbers")) == [[], ["1"], ["1", "0"]]
    path = write_table(tmp_path / "q.parquet", [[1], [2]], feature=feature)
    with pytest.raises(ValueError, match=r"'labels' in row 1 of .* holds 2, .* names 2 classes"):
        listing_of(path)


def test_which_column_of_lists_is_said_and_can_be_chosen(tmp_path):
    table = {"label": [3, 4], "objects": [["cat"], ["dog", "cat"]]}
    path = write_table(tmp_path / "p.parquet", [["x"], ["y"]], **table)
    with pytest.raises(ValueError, match=r"2 columns that may be the label, 'labels', 'label'"):
        listing_of(path)
    listing = listing_of(path, label="objects")
    assert "column 'objects' lists the classes of each image" in listing.notes[0]
    assert "mocov3 knn --labels objects" in listing.notes[0]
    assert (listing.label_N < 0).all() and listing.classes == () and not listing.class_origin
    listing = listing_of(path, label="label")
    assert listing.label_N.tolist() == [3, 4] and not listing.json_N2.any()
    assert not listing_of(path, label="-").json_N2.any()


def test_a_look_reads_the_lists_and_writes_nothing(tmp_path):
    path = write_table(tmp_path / "p.parquet", LISTS)
    listing = list_images(str(path), is_look=True)
    assert listing.json_N2[:, 1].tolist() == listing_of(path).json_N2[:, 1].tolist()


def test_several_files_make_one_set(tmp_path):
    write_table(tmp_path / "hf" / "a.parquet", LISTS[:3])
    write_table(tmp_path / "hf" / "b.parquet", LISTS[3:])
    assert read_lists(sharded(tmp_path / "hf", tmp_path / "out")) == sorted(LISTS)
    write_table(tmp_path / "hf" / "b.parquet", [1, 2])
    with pytest.raises(ValueError, match=r"b.parquet holds int64 in 'labels', .* shard each by"):
        listing_of(tmp_path / "hf")


@pytest.mark.parametrize(
    ("lists", "kind", "words"),
    [
        ([["a"], None], None, "'labels' in row 1 of .* has no list; an image without any of the"),
        ([["a"], ["b", None]], None, "'labels' in row 1 of .* a list with a gap"),
        ([[0.5], [1.0]], None, "holds list<.*double>; a label is one name or one whole number an"),
        ([[["a"]], []], None, "holds list<.*list<.*; a label is one name or one whole number an"),
        ([[True], []], None, "holds list<.*bool>; a label is one name"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(tmp_path, lists, kind, words):
    path = write_table(tmp_path / "p.parquet", lists, kind)
    for look in (False, True):
        with pytest.raises(ValueError, match=words):
            listing_of(path, is_look=look)
    assert len(listing_of(path, label="-")) == 2
