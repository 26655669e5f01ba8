"""Two sets mean the same classes by the same names, whatever the numbers are."""

from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.data.class_names import comparable_name, labels_in_use, pair_classes
from mocov3_ds.data.manifest import ROW, Manifest, Shard


def make_set(url, labels, classes=()):
    index_N = np.zeros(len(labels), dtype=ROW)
    index_N["label"], index_N["offset"], index_N["size"] = labels, 512, 1
    shard = Shard("t.tar", 1 << 20, len(labels), "0" * 64)
    return Manifest(url, (shard,), index_N, tuple(classes))


@pytest.mark.parametrize(
    ("train", "judged", "labels"),
    [
        (([0, 1, 2], ["cat", "dog", "fox"]), ([0, 1], ["cat", "fox"]), [0, 2]),
        (([0, 1], ["cat", "dog"]), ([1, 0, 1], ["dog", "cat"]), [0, 1, 0]),
        (([0, 1], ["caf\u00e9", "caf\u00fe"]), ([0, 1], ["caf\u00fe", "cafe\u0301"]), [1, 0]),
        (([0, 1, 2], ["0", "1", "10"]), ([0, 10], []), [0, 2]),  # names that are numbers
        (([0, 1, 10], []), ([0, 1, 2], ["0", "1", "10"]), [0, 1, 10]),
        (([0, 2], ["0", "1", "10"]), ([0, 1], ["010", "0"]), [2, 0]),
        (([0, 1, 10], []), ([2, 1], ["0", "1", "10"]), [10, 1]),
        (([0, 1], ["cat", "dog"]), ([1, 0], []), [1, 0]),  # positions
        (([5, 9_000_000], []), ([9_000_000], []), [9_000_000]),
        (([0, 1], ["cat", "dog"]), ([0, -1], ["dog", "wolf"]), [1, -1]),  # wolf has no image
    ],
)
def test_labels_become_those_of_the_training_set(train, judged, labels):
    paired = pair_classes(make_set("train", *train), make_set("judged", *judged))
    assert paired.manifest.index_N["label"].tolist() == labels
    assert make_set("judged", *judged).index_N["label"].tolist() == judged[0], "not in place"


@pytest.mark.parametrize(
    ("train", "judged", "match"),
    [
        (([0, 1], ["cat", "dog"]), ([0, 1], ["cat", "fox"]), "1 classes of which train .*'fox' "),
        (([0, 1], []), ([0, 7], []), "1 classes of which train has none: '7'"),
        (([0, 1], ["cat", "dog"]), ([0, 2], []), "label 2 of judged, which names no classes, "),
        (([0, 3], ["cat", "dog"]), ([0], ["cat"]), "train holds label 3 and names 2 classes"),
        (([0, 2], ["a", "b", "c"]), ([0, 1], ["a", "b"]), "of which train has none: 'b'"),
        (([0], ["caf\u00e9", "cafe\u0301"]), ([0], ["x"]), "two classes of one name"),
    ],
)  # fmt: skip
def test_classes_that_do_not_pair_are_refused_by_name(train, judged, match):
    with pytest.raises(ValueError, match=match):
        pair_classes(make_set("train", *train), make_set("judged", *judged))


def test_what_was_done_is_told():
    train = make_set("train", [0, 1, 2], ["cat", "dog", "fox"])
    absent, moved = pair_classes(train, make_set("judged", [0, 1], ["cat", "fox"])).notes
    assert absent == "judged holds no images of 1 of the 3 classes of train: 'dog'"
    assert "by name ('fox' is 1 there and 2 in training)" in moved
    assert pair_classes(train, train) == (train, ())
    [note] = pair_classes(train, make_set("judged", [0, 1, 2])).notes
    assert note.startswith("judged names no classes; its labels are taken as positions in the 3")


def test_labels_in_use_are_read_in_blocks(monkeypatch):
    monkeypatch.setattr("mocov3_ds.data.class_names._BLOCK", 2)
    assert labels_in_use(make_set("x", [3, 1, -1, 3, 2])) == [1, 2, 3]
    assert comparable_name("007") == "7" and comparable_name("1.0") == "1.0"
    assert replace(make_set("x", [0]), classes=("a",)).classes == ("a",)
