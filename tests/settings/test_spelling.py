"""Hints for misspelt names: the nearest known one, if it is near enough."""

import pytest

from mocov3_ds.settings.spelling import did_you_mean

NAMES = ["AdamW", "Lamb", "zero_optimization"]


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("zero_optimisation", " (did you mean zero_optimization?)"),
        ("adamw", " (did you mean AdamW?)"),
        ("LAMP", " (did you mean Lamb?)"),
        ("SGD", ""),
        ("", ""),
    ],
)
def test_hints(word: str, hint: str) -> None:
    assert did_you_mean(word, NAMES) == hint


def test_the_cutoff_decides_how_near() -> None:
    assert did_you_mean("Lab", NAMES, cutoff=0.95) == ""
    assert did_you_mean("Lab", NAMES, cutoff=0.5) == " (did you mean Lamb?)"
    assert did_you_mean("Lamb", []) == ""
