"""Patterns, braces and `::` name files as webdataset reads them; kinds and splits stay apart."""

import pytest
from webdataset.shardlists import expand_urls

from data_prep.source_files import (
    expand_names,
    find_source_files,
    is_archive,
    select_names,
    split_pattern,
)
from tests.data_prep import forms


def names(found):
    return [path.name for path in found.archives]


@pytest.fixture
def folder(tmp_path):
    for name in ("t-0", "t-1", "u-0"):
        forms.write_tar(tmp_path / "tars" / f"{name}.tar", {"a.jpg": b"x"})
    return tmp_path / "tars"


def test_names_expand_as_in_webdataset():
    for text in ("a-{000..012}.tar", "a.tar::b-{x,y}.tar", "{0..1}/{2..3}.tar", "plain.tar"):
        assert expand_names(text) == expand_urls(text)
    with pytest.raises(ValueError, match=r"pipe:cat ... is a command \(pipe:\)"):
        expand_names("pipe:cat a.tar")
    with pytest.raises(ValueError, match="name more than 1000000 files"):
        expand_names("a-{0..99999999999999999999}.tar")
    with pytest.raises(ValueError, match=r"braces in .* cannot be read"):
        expand_names("a-{0..1.tar")


def test_patterns_braces_and_joins_are_sources(folder):
    for source in (
        f"{folder}/t-{{0..1}}.tar",
        f"{folder}/t-*.tar",
        f"{folder}/t-0.tar::{folder}/t-1.tar",
    ):
        assert names(find_source_files(source)) == ["t-0.tar", "t-1.tar"]
    found = find_source_files(str(folder), "t-*.tar")
    assert names(found) == ["t-0.tar", "t-1.tar"] and found.balance.omitted == 1
    assert names(find_source_files(str(folder), "t-{0..1}.tar::u-0.tar")) == [
        "t-0.tar", "t-1.tar", "u-0.tar",
    ]  # fmt: skip
    assert names(find_source_files(str(folder.parent), "tars/u-*.tar")) == ["u-0.tar"]
    literal = forms.write_tar(folder / "a{0..1}[x]::b.tar", {"a.jpg": b"x"})
    assert find_source_files(str(literal)).archives == [literal]


@pytest.mark.parametrize(
    ("source", "files", "words"),
    [
        ("tars/t-{0..2}.tar", "", "there is no tars/t-2.tar, one of 3 files that"),
        ("tars/x-*.tar", "", "there is no tars/x-*.tar; the source is"),
        ("tars", "x-*", "none of the 3 archives in tars matches --files x-*; there are t-0.tar"),
        ("tars/t-0.tar::tree", "", "tree is a folder of images, one of 2 paths"),
        ("s3://b/a.tar::s3://b/b.tar", "", "sources are files of this machine"),
        ("tars/t-0.tar", "u-*", "does not match --files"),
        ("", "", "the source is empty text"),
    ],
)
def test_what_cannot_be_taken_is_refused(folder, monkeypatch, source, files, words):
    forms.write_tree(folder.parent / "tree", {"cat/1.jpg": b"x"})
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ValueError) as error:
        find_source_files(source, files)
    assert words in str(error.value)


def test_hidden_things_and_manifests_beside_tars_are_left_out(folder):
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    for name in ("manifest.json", ".t-9.tar", "notes.md"):
        (folder / name).write_text("x")
    found = find_source_files(str(folder))
    assert names(found) == ["t-0.tar", "t-1.tar", "u-0.tar"]
    found.balance.images = 0
    assert found.balance.files == found.balance.omitted == 4
    (folder / "cats").mkdir()
    with pytest.raises(ValueError, match=r"beside images or folders \(cats\).*--files '\*.tar'"):
        find_source_files(str(folder))
    assert len(names(find_source_files(str(folder), "*.tar"))) == 3


def test_tables_without_images_are_left_out_from_beside_tars(folder, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"url": ["x"], "key": ["0"]}), folder / "t-0.parquet")
    found = find_source_files(str(folder))
    assert len(names(found)) == 3 and found.balance.left_out["archive without images"].count == 1
    pq.write_table(pa.table({"jpg": [b"x"]}), folder / "t-1.parquet")
    with pytest.raises(ValueError, match=r"tars and parquet files with images \(t-1.parquet\)"):
        find_source_files(str(folder))
    assert len(names(find_source_files(str(folder), "*.tar"))) == 3


def test_archives_of_several_splits_are_refused(folder):
    for name in ("im-train-0001", "im-train-0002", "im-val-00"):
        forms.write_tar(folder / f"{name}.tar", {"a.jpg": b"x"})
    with pytest.raises(ValueError, match=r"several splits \(im-train-0001.tar, im-val-00.tar\)"):
        find_source_files(str(folder))
    assert len(names(find_source_files(str(folder), "*"))) == 6
    with pytest.raises(ValueError, match="several splits"):
        find_source_files(f"{folder}/im-*.tar")
    assert len(names(find_source_files(f"{folder}/im-{{train-0001,val-00}}.tar"))) == 2


def test_small_things():
    paths = [folder_path("a.tar"), folder_path("a.TAR.GZ"), folder_path("a.TAR")]
    paths += [folder_path("a.tzst"), folder_path("a.PARQUET")]
    assert all(map(is_archive, paths)) and not is_archive(folder_path("a.zip"))
    assert select_names(["a", "b"], []) == ["a", "b"] and select_names(["a", "b"], ["b*"]) == ["b"]
    assert split_pattern("imagenet1k-train-0000.tar") == "imagenet1k-train-*.tar"
    assert split_pattern("train-00000-of-00002.parquet") == "train-*.parquet"


def folder_path(name):
    return forms.Path("/x") / name
