"""Where shards lie: stored for everybody who opens the set, and believed of nobody."""

from pathlib import Path

import pytest

from mocov3_ds.data.shard_place import parse_place, place_of_tars
from mocov3_ds.data.storage import address


def test_a_place_is_stored_so_that_it_is_the_same_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv(address.LOGINS, "")
    monkeypatch.chdir(tmp_path)
    for url, place in (
        ("sub", f"{tmp_path}/sub"),
        ("file:///a b/c", "/a b/c"),
        ("~/set", str(Path.home() / "set")),
        ("s3://b/a?token=1#x", "s3://b/a?token=1#x"),
        ("http://me:SECRET@host:81/a%20b?v=3", "http://host:81/a%20b?v=3"),
    ):
        assert place_of_tars(url) == place == parse_place(place)
    with pytest.raises(ValueError, match=r"sig=\.\.\. is signed, .* keep the signature") as caught:
        place_of_tars("https://host/set?v=1&sig=SECRET")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "value, words",
    [
        ("", "no path"),
        (["/a"], "no path"),
        ("/a\0b", "no path"),
        ("a/b", "neither an absolute path"),
        ("~/a", "neither an absolute path"),
        ("file://a", "neither an absolute path"),
        ("ftp://host/a", "unknown scheme; known are s3"),
        ("s3:///a", "names no bucket"),
        ("s3://id:SECRET@b/a", "is not used; credentials"),
        ("http://me:SECRET@host/a", "holds a login"),
        ("http:///a", "names no server"),
    ],
)
def test_places_of_strangers_are_refused(value, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse_place(value)
    assert "SECRET" not in str(caught.value)
