"""A text is shown, not computed."""

import pytest

from mocov3_ds.settings.spreadsheet import as_cell


@pytest.mark.parametrize("text", ["=cmd|'A'!A0", "+1", "-1", "@sum", "\t=1", "\r=1", "\n=1"])
def test_what_would_be_computed_stands_behind_an_apostrophe(text: str) -> None:
    assert as_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "cat", "a=1", "'=1", "n01440764"])
def test_other_texts_stay(text: str) -> None:
    assert as_cell(text) == text
