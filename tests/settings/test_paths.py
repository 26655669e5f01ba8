"""`~` at the beginning of a word of the command line."""

from pathlib import Path

import pytest

from mocov3_ds.settings.paths import check_text, expand_home, expand_user


def test_home_is_expanded_where_a_path_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert expand_home(["~/x", "--out=~/a b", "~", "--data.shards=~/s/t", "-o=~/u"]) == [
        *("/home/ann/x", "--out=/home/ann/a b", "/home/ann"),
        *("--data.shards=/home/ann/s/t", "-o=/home/ann/u"),
    ]


def test_other_words_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    words = ["a~b", "--x", "s3://bucket/~x", "", "=~/x", "~nobody_of_this_name/x", "--ds", "a.b=1"]
    assert expand_home(words) == words
    assert expand_user("~nobody_of_this_name/x") == Path("~nobody_of_this_name/x")
    assert expand_user("~/x") == Path("/home/ann/x")
    assert expand_home(["~root/x"])[0] in (str(Path("~root/x").expanduser()), "~root/x")


@pytest.mark.parametrize("word", ["caf\udce9", "a\0b"])
def test_what_no_file_can_hold_is_refused(word: str) -> None:
    check_text(["müller", "--x=1", "a\nb"])
    with pytest.raises(ValueError, match="of the command line") as refused:
        check_text(["--name", word])
    assert str(refused.value).isascii()
