"""Which folder of the path is the class: decided where one reading is sensible, asked otherwise."""

import pytest

from data_prep.class_levels import (
    PathFacts,
    check_level,
    choose_level,
    class_at_level,
    find_empty_classes,
)


def facts(*paths, archives=()):
    """Each path is folders joined by slashes, behind the number of its archive and a colon."""
    folders = {}
    for path in paths:
        number, _, rest = path.rpartition(":")
        folders[int(number or -1), tuple(rest.split("/")) if rest else ()] = 1
    return PathFacts(folders, archives)


@pytest.mark.parametrize(
    ("paths", "classes", "level"),
    [
        (["cat", "dog"], (), "1"),
        (["cat"], (), "1"),
        (["cat", "cat/old", "dog"], (), "1"),
        (["cat", "cat/old"], (), "1"),
        (["cat", "dog", ""], (), "1"),
        (["mammal/cat", "bird/crow", "bird/owl"], (), "1"),
        (["mammal/cat", "bird/crow", "bird/owl"], ("cat", "crow", "owl"), "2"),
        (["set/train/n00000001", "set/train/n00000002"], (), "3"),
        (["n00000001/images", "n00000002/images"], (), "1"),
        (["bullet_train", "test_tube"], (), "1"),
        ([""], (), "none"),
    ],
)
def test_one_reading_is_taken(paths, classes, level):
    assert choose_level(facts(*paths), classes, "S") == level


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["set/cat", "set/dog"], "--class-level 2 makes 2 classes (cat, dog), as does --under set"),
        (["set", "set/cat", "set/dog"], "--class-level 1 makes 1 class (set)"),
        (["a/b/cat", "a/b/dog"], "--under a/b with"),
        (["photo/cat", "photo/dog", "sketch/cat"], "--class-level 2 makes 2 classes (cat, dog)"),
        (["a/abbey", "a/alley", "b/bakery"], "--class-level 2 makes 3 classes"),
        (["0:p0/cat", "0:p0/dog", "1:p1/fox", "1:p1/owl"], "--class-level 2 makes 4 classes"),
        (["train/cat", "val/cat"], "splits (train, val), not classes; shard each by itself with"),
        (["train/cat", "val"], "--under train --split train (or, if they are classes: --class-lev"),
        (["train2017", "test2017", "unlabeled"], "splits (test2017, train2017)"),
        (["d/Training/a", "d/Testing/a"], "--under d/Testing --split Testing"),
        (["cat/train", "cat/test", "dog/train"], "--files '*/test/*' --split test"),
    ],
)
def test_several_readings_are_asked_about(paths, words):
    with pytest.raises(ValueError) as error:
        choose_level(facts(*paths), (), "S")
    assert words in str(error.value) and str(error.value).endswith(".")


def test_names_of_archives_are_classes_if_they_are_synsets():
    assert (
        choose_level(facts("0:", "1:", archives=["n00000001", "n00000002"]), (), "S") == "archive"
    )
    assert choose_level(facts("0:", "1:", archives=["part-0", "part-1"]), (), "S") == "none"
    with pytest.raises(ValueError, match="--class-level archive if these are the classes"):
        choose_level(facts("0:", "1:", archives=["cat", "dog"]), (), "S")
    with pytest.raises(ValueError, match=r"one folder \(im\) of archives .* 1 if all are im, or"):
        choose_level(facts("0:im", "1:im", archives=["cat", "dog"]), (), "S")
    assert choose_level(facts("0:cat", "1:cat", archives=["p-0", "p-1"]), (), "S") == "1"


def test_classes_of_each_level():
    for level in ("", "none", "archive", "own", "1", "12"):
        check_level(level)
    for level in ("0", "-1", "first", "1.5", "١"):
        with pytest.raises(ValueError, match="is not one of: none, archive, own, or a number"):
            check_level(level)
    folders = ("a", "b")
    levels = ("1", "2", "3", "own", "archive", "none")
    wanted = ["a", "b", None, "b", "t", None]
    assert [class_at_level(level, folders, "t") for level in levels] == wanted
    assert class_at_level("own", (), "t") is None and class_at_level("archive", (), "") is None


def test_class_folders_without_images_are_found():
    folders = [("cat",), ("dog",), ("dog", "sub"), ("docs",), ("docs", "x"), ("cafe\u0301",)]
    used = {("cat",), ("caf\xe9",)}
    assert find_empty_classes("1", folders, used) == ["docs", "dog"]
    assert find_empty_classes("1", folders, used, [("docs", "x")]) == ["dog"]
    assert find_empty_classes("none", folders, used) == []
    deep = [("s", "cat"), ("s", "dog"), ("other", "fox")]
    assert find_empty_classes("2", deep, {("s", "cat")}) == ["dog"]
