"""Labels of one image: in members of tars, in fields and in cells."""

from decimal import Decimal

import pytest

from data_prep import labels
from data_prep.sources import list_images
from tests.data_prep import forms


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (3, 3), (3.0, 3), (Decimal("3.0"), 3), (10**18, 10**18), (-1, -1), (None, None),
        (float("nan"), None), ("dog", "dog"), (" white shark ", "white shark"), ("", None),
        ("10", 10), ("007", 7), ("3.0", 3), ("12e4", "12e4"), ("1.5.2", "1.5.2"), ("1_0", "1_0"),
        ("\u0663", "\u0663"), ("n01440764", "n01440764"), ("9" * 41, "9" * 41),
    ],
)  # fmt: skip
def test_a_label_is_a_name_a_whole_number_or_none(value, label):
    assert labels.convert_label(value, "x") == label


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (0.5, "place is 0.5; a label is one name or one whole number"),
        ("0.5", "place is 0.5"),
        (float("inf"), "place is inf"),
        (1e18, "place is 1e\\+18, a float too large"),
        (10**1000, "of over 40 digits"),
        (True, r"place is True \(bool\)"),
        ([2], r"place is \[2\] \(list\); .*--label NAME takes another"),
        ({"id": 3}, r"place is {'id': 3} \(dict\)"),
        ([0] * 99, r"\.\.\. \(list\)"),
    ],
)
def test_what_is_no_label_is_refused(value, match):
    with pytest.raises(ValueError, match=match):
        labels.convert_label(value, "place")


def test_labels_of_members():
    assert labels.parse_cls(b" -1\n", "a.cls") == -1 and labels.parse_cls(b"dog", "a.cls") == "dog"
    assert labels.parse_cls(b"\xef\xbb\xbf9999999999", "a.cls") == 9999999999
    for text, label in ((b'{"label": 3}', 3), (b'{"cls": "x"}', "x"), (b'{"label": null}', None)):
        assert labels.parse_json_label(text, "a.json") == label
    assert labels.parse_json_label(b"[1]", "a.json") is None
    assert labels.parse_json_label(b'{"label": 3, "taxon": 5}', "a.json", "taxon") == 5


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.cls", b"x" * 2000, "a.cls .* has 2000 bytes"),
        ("a.cls", b" ", "a.cls .* is empty"),
        ("a.cls", b"\xff\xfe", "a.cls .* is not text"),
        ("a.cls", b"1\n2", "a.cls .* has several lines"),
        ("a.cls", b"0.5", "label of a.cls .* is 0.5"),
        ("a.json", b"{", "a.json .* is not valid JSON"),
        ("a.json", b"[" * 100_000, "a.json .* is not valid JSON"),
        ("a.json", b'{"label": ' + b"9" * 1000 + b"}", "'label' of a.json .* of over 40 digits"),
        ("a.json", b'{"label": ' + b"9" * 5000 + b"}", "a.json .* is not valid JSON"),
        ("a.json", b'{"label": [1, 2]}', r"'label' of a.json .* is \[1, 2\]"),
    ],
)
def test_members_without_a_label_are_refused_by_name(tmp_path, name, content, match):
    source = forms.write_tar(tmp_path / "w.tar", {"a.jpg": forms.picture(0), name: content})
    with pytest.raises(ValueError, match=match) as error:
        list_images(str(source))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
