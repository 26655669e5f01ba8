"""Names of splits are told from classes that sound like them."""

import pytest

from data_prep.splits import find_split, sibling_splits


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train", "val"], ["train", "val"]),
        (["Training", "Testing", "cat"], ["Testing", "Training"]),
        (["train2017", "val2017", "unlabeled2017"], ["train2017", "val2017"]),
        (["L2012_img_train", "L2012_img_val"], ["L2012_img_train", "L2012_img_val"]),
        (["im1k-train-0000", "im1k-validation-00"], ["im1k-train-0000", "im1k-validation-00"]),
        (["train-00-of-02", "test-00-of-01"], ["test-00-of-01", "train-00-of-02"]),
        (["test_images", "train"], ["test_images", "train"]),
        (["2007_trainval", "2007_test"], ["2007_test", "2007_trainval"]),
        (["train-0", "train-1"], []),
        (["bullet_train", "test_tube"], []),
        (["train", "bus", "car"], []),
        (["00000", "00001"], []),
        (["retrain", "valley", "contest"], []),
    ],
)  # fmt: skip
def test_siblings(names, splits):
    assert sibling_splits(names) == splits


def test_the_split_and_the_rest_of_a_name():
    assert find_split("im-train-0001") == ("train", "im")
    assert find_split("cat") == ("", "cat")
