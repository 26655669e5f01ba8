"""Names before a file is opened."""

import pytest

from data_prep.member_names import (
    is_hidden,
    join_names,
    name_ending,
    normalize_name,
    quote_message,
    quote_name,
)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("cat/1.jpg", False),
        ("a.b/c..d/1.jpg", False),
        (".hidden", True),
        (".ipynb_checkpoints/1.jpg", True),
        ("cat/.x/1.jpg", True),
        ("__MACOSX/cat/1.jpg", True),
        ("cat/@eaDir/1.jpg", True),
        ("Thumbs.db", True),
        ("cat/Thumbs.db", True),
        ("__MACOSX.jpg", False),
    ],
)
def test_hidden_things(name, hidden):
    assert is_hidden(name) is hidden


def test_endings():
    names = ("a.JPG", "a.b/c", ".jpg", "x/.jpg", "a.tar.gz", "a.")
    assert [name_ending(name) for name in names] == ["jpg", "", "", "", "gz", ""]


def test_names_do_not_command_a_terminal():
    assert quote_name("straße ü/1.jpg") == "straße ü/1.jpg"
    assert quote_name("a\nsound\x1b[8m") == r"'a\nsound\x1b[8m'"
    assert quote_name("caf\udce9") == r"'caf\udce9'"
    assert quote_message("it's é:\na\x1b\udce9") == r"it's é:\na\x1b\udce9"
    assert join_names(["a", "b"]) == "a, b"
    assert join_names([f"{n}" for n in range(9)], 2) == "0, 1, ... (9 in all)"


def test_forms_of_unicode_compare_alike():
    assert normalize_name("cafe\u0301") == normalize_name("caf\xe9") == "caf\xe9"
    assert normalize_name("plain") == "plain"
