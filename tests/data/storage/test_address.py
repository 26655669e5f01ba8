"""Addresses are literal, joined without loss, and shown without their secrets."""

import os

import pytest

from mocov3_ds.data import storage
from mocov3_ds.data.storage import address
from mocov3_ds.data.storage.address import Address, hide_secrets, join_url, split_url


@pytest.mark.parametrize("key", ["a#b/c?d=1", "p%20q", "a//b", "/a", "//", "", "ü/x y", "a@b"])
def test_behind_the_bucket_all_is_the_key(key):
    for scheme in ("s3", "gs", "az"):
        assert split_url(f"{scheme}://bucket/{key}") == Address(f"{scheme}://bucket", key)


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://h:8/a%20b/set", "/a%20b/set"),
        ("http://h:8/a b/set?sig=1%2B&x=a b", "/a%20b/set?sig=1%2B&x=a%20b"),
        ("http://h:8/100%/x?y=/z?", "/100%25/x?y=/z?"),
        ("http://h:8/ü", "/%C3%BC"),
        ("http://h:8", "/"),
        ("http://h:8/a//b/", "/a//b/"),
        ("http://h:8/a;v=1/b@c+d", "/a;v=1/b@c+d"),
    ],
)
def test_web_addresses_are_escaped_once_and_keep_their_query(url, target):
    assert split_url(url) == Address("http://h:8", target)


def test_a_file_in_a_folder():
    assert join_url("/data/set/", "a.tar") == "/data/set/a.tar" and join_url("/", "a") == "/a"
    with pytest.raises(ValueError, match="address is empty text"):
        join_url("", "a.tar")
    assert join_url("s3://b", "a#1") == join_url("s3://b/", "a#1") == "s3://b/a#1"
    assert join_url("s3://b/x//", "a") == "s3://b/x//a"
    assert join_url("s3://b/x?y", "a") == "s3://b/x?y/a"
    assert join_url("http://h/set?sig=1", "a b%?.tar") == "http://h/set/a%20b%25%3F.tar?sig=1"


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ("/data/set/", "/data/set"),
        ("/", "/"),
        ("/data/set/m.json", "/data/set"),
        ("s3://b/set/", "s3://b/set"),
        ("s3://b/set/m.json", "s3://b/set"),
        ("s3://b/set//", "s3://b/set//"),
        ("http://h/set/m.json?sig=1", "http://h/set?sig=1"),
        ("http://h/set/?sig=1", "http://h/set?sig=1"),
    ],
)
def test_a_folder_given_itself_or_by_a_file(given, folder):
    assert storage.folder_url(given, "m.json") == folder


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3:///x", "names no bucket"),
        ("s3://key:SECRET@bucket/x", "is not used; credentials of a store come from its own"),
        ("http:///x", "names no server"),
        ("http://user:SEC/RET@host/x", "no server that can be read; in a user name or password"),
        ("http://host:port/x", "no server that can be read"),
        ("http://host/a#b", "no server gets to see what follows #"),
    ],
)
def test_what_is_no_address_is_refused_without_its_secrets(url, words):
    with pytest.raises(ValueError, match=words) as error:
        split_url(url)
    assert "SEC" not in str(error.value)


def test_secrets_are_not_shown():
    text = "asked http://me:pw@h/x?v=1&X-Amz-Signature=abc&sig=d%2F and s3://b/a@c: 'http://u@i/'"
    assert hide_secrets(text) == (
        "asked http://h/x?v=1&X-Amz-Signature=...&sig=... and s3://b/a@c: 'http://i/'"
    )
    assert hide_secrets("http://a:p@ss@h/x@y") == "http://h/x@y"
    assert hide_secrets("/data/a:b@c") == "/data/a:b@c"


def test_a_login_is_kept_apart_from_the_address(monkeypatch, tmp_path):
    monkeypatch.setenv(address.LOGINS, "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert address.find_login("http://h:8") is None
    assert storage.take_login("http://me:p%40ss@h:8/x?y=a@b") == "http://h:8/x?y=a@b"
    assert storage.take_login("http://h:8/x@y") == "http://h:8/x@y"
    assert storage.take_login("/data/http://a:b@c") == "/data/http://a:b@c"
    assert address.find_login("http://h:8") == ("me", "p@ss")
    assert "p%40ss" in os.environ[address.LOGINS]  # for the processes that this one starts
    (tmp_path / "netrc").write_text("machine other login you password word\n")
    (tmp_path / "netrc").chmod(0o600)
    assert address.find_login("https://other") == ("you", "word")
    (tmp_path / "netrc").write_text("machine\n")
    with pytest.raises(ValueError, match="cannot be read as a netrc file"):
        address.find_login("https://other")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("x/t-{0..1}.tar", "is a list of tars; .*index x, then give x"),
        ("s3://b/set/{train,val}-00.tar", "index s3://b/set, then give s3://b/set"),
        ("s3://b/set/a.tar::s3://b/set/b.tar", "index s3://b/set, then"),
        ("t-*.tar", r"index \., then give \."),
        ("pipe:cat t.tar", "is a command"),
        ("/here/pipe:cat t.tar", "is a command"),
    ],
)
def test_lists_of_tars_are_explained(url, words):
    import re

    assert re.search(words, storage.explain_pattern(url))


@pytest.mark.parametrize("url", ["/data/set", "s3://b/{a}", "http://h/x?list=a,b*", "a:b"])
def test_other_addresses_are_no_lists(url):
    assert storage.explain_pattern(url) == ""
