"""Tables of a grid's file: read, and refused with the place and the key."""

from typing import Any

import pytest

from mocov3_ds.stability import grid_file
from mocov3_ds.stability.grid_file import Arm


def test_arms() -> None:
    assert grid_file.read_arms(None) == [Arm()]
    trees = [{"name": "a", "lr": 1e-3, "axes": {"batch": [64, 128]}}, {"name": "b"}]
    assert grid_file.read_arms(trees) == [
        Arm("a", {"lr": 1e-3}, {"batch": [64, 128]}),
        Arm("b"),
    ]


def test_seeds_and_twins() -> None:
    arms = [Arm("a"), Arm("b")]
    for count, seeds in ((None, [0, 1, 2, 3, 4]), (2, [0, 1])):
        assert [*grid_file.read_seeds({"seeds": 5}, count)] == seeds
    assert [*grid_file.read_seeds({}, None)] == [0, 1, 2]
    for count, seeds in ((None, [9, 6, 7]), (2, [9, 6])):
        assert grid_file.read_seeds({"seeds": [9, 6, 7]}, count) == seeds
    with pytest.raises(ValueError, match="--seeds 4 is more than the 3 that the file lists"):
        grid_file.read_seeds({"seeds": [9, 6, 7]}, 4)
    for wrong in ([], [1, 1], [-1], [True]):
        with pytest.raises(ValueError, match="a list has different numbers of 0 or more"):
            grid_file.read_seeds({"seeds": wrong}, None)
    twins = [{}, {"twins": True}, {"twins": False}, {"twins": ["b"]}]
    assert [grid_file.read_twins(tree, arms) for tree in twins] == [
        *(["a", "b"], ["a", "b"], [], ["b"])
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bacth": 3}, "[base] has an unknown setting 'bacth' (did you mean batch?)"),
        ({"depth": 3}, "'depth' (did you mean model.depth?); it takes the words "),
        (
            {"patch": 1.5},
            "[base] has patch = 1.5; it is 'trained', 'frozen' or a rate from",
        ),
        ({"ds": "x"}, "[base] sets 'ds'; use the words lr, beta2, ... instead."),
        ({"epochs": -1}, "[base] has epochs = -1; it must be a number of 0 or more."),
    ],
)
def test_the_sentence_names_place_and_key(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        grid_file.check_settings(settings, "[base]")
    assert sentence in str(error.value)


def test_right_settings_pass() -> None:
    grid_file.check_settings({"lr": 1e-3, "patch": 0.2, "views.fixed": True}, "[base]")
    grid_file.check_axes({"patch": ["trained", 0], "batch": [64]}, "[axes]")
    with pytest.raises(ValueError, match=r"\[axes\] has batch = 64; an axis is a list"):
        grid_file.check_axes({"batch": 64}, "[axes]")
