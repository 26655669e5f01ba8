"""Which tars are meant: by folder, by pattern, by name where a server cannot list."""

import pytest

from data_prep import tar_names
from data_prep.tar_names import check_present, find_tars, name_tars
from mocov3_ds.data.storage import address


@pytest.mark.parametrize(
    "url, files, found",
    [
        ("s3://b/set", "", ("s3://b/set", [])),
        ("s3://b/t-{0..1}.tar", "", ("s3://b", ["t-0.tar", "t-1.tar"])),
        ("s3://b/set/t#1.tar", "", ("s3://b/set", ["t#1.tar"])),
        ("s3://b/T.TAR", "", ("s3://b", ["T.TAR"])),
        ("none/t-*.tar", "", ("none", ["t-*.tar"])),
        ("a.tar::b.tar", "", (".", ["a.tar", "b.tar"])),
        ("http://host:80", "", ("http://host:80", [])),
        ("http://h/set?v=a/b", "t-{0..1}.tar", ("http://h/set?v=a/b", ["t-0.tar", "t-1.tar"])),
        ("http://h/a/t-{0..1}.tar?v=3", "", ("http://h/a?v=3", ["t-0.tar", "t-1.tar"])),
        ("http://h/a/x%20y.tar", "", ("http://h/a", ["x y.tar"])),
        ("http://u:p@h/a.tar::http://u:p@h/b.tar", "", ("http://h", ["a.tar", "b.tar"])),
    ],
)
def test_folder_and_names_of_a_url(monkeypatch, url, files, found):
    monkeypatch.setenv(address.LOGINS, "")
    assert find_tars(url, files) == found


def test_endings_of_any_case_are_tars(tmp_path):
    for name in ("A.TAR", "b.tar", ".c.tar", "d.tar.gz"):
        (tmp_path / name).write_bytes(b"")
    assert name_tars(str(tmp_path), []) == ["A.TAR", "b.tar"]
    assert find_tars(str(tmp_path / "A.TAR"), "") == (str(tmp_path), ["A.TAR"])


def test_names_in_the_url_and_in_files_are_refused():
    for url in ("t-*.tar", "s3://b/t-{0..1}.tar", "http://h/a.tar"):
        with pytest.raises(ValueError, match=r"names tars itself, and --files b.tar does, too"):
            find_tars(url, "b.tar")


def test_tars_of_two_folders_are_refused_without_their_signature():
    with pytest.raises(ValueError, match="names tars of 2 folders") as caught:
        find_tars("http://h/a.tar?sig=SECRET::http://h/b.tar?sig=SECRET2", "")
    assert "SECRET" not in str(caught.value)


def test_a_server_that_cannot_list_needs_names(monkeypatch):
    for patterns in ((), ("t-*.tar",)):
        with pytest.raises(
            ValueError, match=r"cannot list .*--files 'train-\{000\.\.127\}\.tar'.*--m"
        ):
            name_tars("http://h/a", patterns)
    for name in ("../a.tar", "a.zip", "b\\a.tar"):
        with pytest.raises(ValueError, match="no name of a tar in the folder http://h/a"):
            name_tars("http://h/a", ("0.tar", name))
    names = name_tars("http://h/a", ("b.tar", "a.tar", "b.tar"))
    assert names == ["a.tar", "b.tar"]
    monkeypatch.setattr(tar_names.storage, "exists", lambda url: url == "http://h/a/a.tar")
    check_present("http://h/a", ["a.tar"])
    with pytest.raises(ValueError, match=r"h/a holds no b.tar, one of 2 tars .*\(1 are missing"):
        check_present("http://h/a", names)
