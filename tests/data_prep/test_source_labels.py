"""Classes of a source's images: of their own label files, or of their paths."""

import pytest

from data_prep.class_numbers import ClassNames
from data_prep.listing import UnsortedImages
from data_prep.source_labels import label_images, path_facts
from data_prep.source_options import SourceOptions

PLAIN = SourceOptions()


def images(*names, labels=None):
    listed = UnsortedImages()
    for number, name in enumerate(names):
        listed.add_image(name, -1, 0, 1, labels[number] if labels else None)
        listed.folders.add(name.rpartition("/")[0])
    return listed


def label(listed, options=PLAIN, classes=None):
    return label_images(listed, path_facts(listed, []), classes or ClassNames(), "S", options)


def test_paths_are_counted_by_folder():
    facts = path_facts(images("a/b/1", "a/b/2", "c"), [])
    assert facts.folders == {(-1, ("a", "b")): 2, (-1, ()): 1}


def test_folders_are_classes_where_there_are_no_label_files():
    listed = images("cat/1", "dog/2")
    assert label(listed) == ("folder 1 of the path", []) and listed.label == ["cat", "dog"]
    labelled = images("cat/1", "dog/2", labels=[7, None])
    assert label(labelled) == ("the labels of the samples", ()) and labelled.label == [7, None]
    assert label(labelled, SourceOptions(class_level="own"))[0].startswith("the folder that each")
    assert labelled.label == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"--class-level 3 gives no image of S a class; .*cat/1"):
        label(images("cat/1"), SourceOptions(class_level="3"))
    flat = images("1", "2")
    assert label(flat) == ("", ()) and flat.label == [None, None]


def test_empty_class_folders_are_asked_about():
    for choice in ("keep", "drop", "refuse"):
        listed = images("cat/1")
        listed.folders.add("dog")
        options = SourceOptions(empty_classes=choice)
        if choice != "refuse":
            assert [*label(listed, options)[1]] == (["dog"] if choice == "keep" else [])
            continue
        with pytest.raises(ValueError, match="--empty-classes keep lets them keep their numbers"):
            label(listed, options)
        assert label(listed, options, ClassNames((("cat", "dog"),)))[1] == ()


def test_unreadable_label_files_alone_are_refused():
    listed = images("1", "2")
    listed.bad_rows, listed.bad_label = {0, 1}, "1.cls is empty."
    with pytest.raises(
        ValueError, match=r"none of the 2 label files of S can be read: 1.cls is em"
    ):
        label(listed)
