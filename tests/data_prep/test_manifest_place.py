"""Tars in a place that is only read: their manifest lies elsewhere, and opens as any set."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_prep.index import index_tars
from data_prep.manifest_place import choose_place
from data_prep.stats import set_stats
from data_prep.verify import verify_set
from mocov3_ds.data import fetch, manifest, storage
from mocov3_ds.data.ordered_samples import OrderedSamples
from mocov3_ds.data.storage import address
from tests.data.loading import open_loader
from tests.data.sets import make_set
from tests.data.storage.stub_server import Answer, file_answer, serve
from tests.data_prep import forms
from tests.data_prep.making import find_problems


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """Tars with unreadable images in a folder that this process may not write to."""
    folder = tmp_path / "ro"
    made = make_set(str(folder), (5, 9, 12), classes=26)
    (folder / manifest.NAME).unlink()
    (folder / manifest.INDEX_NAME).unlink()
    forms.write_tar(folder / "t-003.tar", {"x.jpg": b"no image", "x.cls": b"1"})

    def refuse(path):
        if path.parent == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return storage.atomic.open_new(path)

    monkeypatch.setattr(storage, "open_new", refuse)
    return folder, made


def index(url, target="", **options):
    return index_tars(str(url), workers=1, quiet=True, manifest_folder=str(target), **options)


def read_all(loaded):
    return dict(fetch.read_samples(loaded, np.arange(loaded.samples)))


def test_the_manifest_of_a_read_only_folder_lies_elsewhere(read_only, tmp_path, monkeypatch):
    folder, made = read_only
    content = forms.files_of(folder)
    with pytest.raises(ValueError, match=r"\(Read-only file system\); --manifest FOLDER writes"):
        index(folder)
    monkeypatch.chdir(tmp_path)
    lines, target = [], tmp_path / "own" / "set"
    index("ro", "own/set/manifest.json", say=lines.append)
    assert f"note: the tars stay in {folder}, which the manifest names." in lines
    assert forms.files_of(folder) == content
    assert {*forms.files_of(target)} == {"manifest.json", "index.bin", "rejects.jsonl"}
    loaded = manifest.load(str(target))
    assert loaded.digest == made.digest and loaded.shards_at == str(folder)
    assert read_all(loaded) == read_all(made)
    assert fetch.locate_sample(loaded, 6) == ("t-001.tar", "img6.jpg")
    with open_loader(loaded) as ours, open_loader(made) as theirs:
        assert next(ours).sample_ids_B.tolist() == next(theirs).sample_ids_B.tolist()
    samples = [*OrderedSamples(str(target), batch=13, rank=0, world_size=1)]
    assert len(samples) == 26
    assert {sample["__url__"] for sample in samples} == {made.shard_url(n) for n in range(3)}
    assert set_stats(str(target)).shards == 3
    verdict = verify_set(str(target), workers=1, quiet=True)
    assert verdict.is_sound and verdict.is_listed and f"MB, in {folder}" in str(verdict)


def test_tars_that_change_or_go_are_told_with_both_places(read_only, tmp_path):
    folder, _ = read_only
    target = tmp_path / "set"
    index(folder, target)
    shutil.copy(folder / "t-000.tar", folder / "t-004.tar")
    (folder / "t-001.tar").unlink()
    problems = find_problems(target)
    assert ("t-001.tar", "", f"is missing in {folder}") in problems
    assert ("t-004.tar", "", "is not in the manifest") in problems
    for read in (read_all, lambda loaded: [*OrderedSamples(loaded, batch=26)]):
        with pytest.raises(FileNotFoundError, match=f"t-001.tar.*'{target}' says .*'{folder}'; "):
            read(manifest.load(str(target)))


def test_folders_that_no_manifest_should_go_to(read_only, tmp_path):
    folder, _ = read_only
    target, tars = tmp_path / "set", tmp_path / "tars"
    index(folder, target)
    with pytest.raises(ValueError, match=r"has a manifest.json already; .* --replace"):
        index(folder, target)
    index(folder, target, replace=True)
    forms.write_tar(tars / "a.tar", {"a.jpg": forms.picture(1)})
    with pytest.raises(ValueError, match=r"holds tars itself \(a.tar\)"):
        index(folder, tars, replace=True)
    with pytest.raises(ValueError, match="http://h/x is on a web server, which is only read from"):
        index(folder, "http://h/x")
    with pytest.raises(ValueError, match="holds no file that ends in"):
        index(tmp_path / "nothing", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (tmp_path / "nothing").exists()
    (tmp_path / "link").symlink_to(tars)
    assert choose_place(str(tars), str(tmp_path / "link"), replace=False) == (str(tars), "")


def test_a_set_on_a_plain_web_server(tmp_path, monkeypatch):
    monkeypatch.setenv(address.LOGINS, "")
    made = make_set(str(tmp_path / "a b"), (5, 9, 12), classes=26)

    def answer(asked):
        path = tmp_path / "a b" / asked.target.removeprefix("/a%20b/")
        is_tar = path.suffix == ".tar" and path.exists()
        return file_answer(asked, path.read_bytes()) if is_tar else Answer(404)

    target, lines = tmp_path / "set", []
    with serve(answer) as (host, _):
        url, names = f"http://me:SECRET@{host}/a b", "t-{000..002}.tar"
        with pytest.raises(ValueError, match=r"only read from.*--files .*--manifest FOLDER"):
            index(url)
        with pytest.raises(ValueError, match=r"only read from; --manifest FOLDER"):
            index(url, files=names)
        with pytest.raises(ValueError, match=r"holds no t-003\.tar, one of 4 tars"):
            index(url, target, files="t-{000..003}.tar")
        assert not (target / manifest.NAME).exists()
        index(url, target, files=names, say=lines.append)
        index(f"{url}/{names}", target, replace=True)
        loaded = manifest.load(str(target))
        assert loaded.digest == made.digest and loaded.shards_at == f"http://{host}/a b"
        assert read_all(loaded) == read_all(made)
        verdict = verify_set(str(target), workers=1, quiet=True)
        assert verdict.is_sound and not verdict.is_listed
        with pytest.raises(ValueError, match="is signed"):
            index(f"{url}?sig=SECRET", tmp_path / "new", files=names)
        (tmp_path / "a b" / "t-000.tar").unlink()
        with pytest.raises(
            FileNotFoundError, match=f"/t-000.tar.*'{target}' says .*'http://{host}"
        ):
            read_all(loaded)
    assert not (tmp_path / "new").exists()
    assert any("user and password are not in the manifest" in line for line in lines)
    assert "SECRET" not in f"{lines} {json.dumps(forms.files_of(target), default=repr)}"


@pytest.mark.slow
def test_a_file_system_that_is_mounted_to_be_read(tmp_path):
    folder, target = tmp_path / "ro", tmp_path / "set"
    folder.mkdir()
    forms.write_tar(tmp_path / "a.tar", {"a.jpg": forms.picture(1), "a.cls": b"0"})
    mount = f"mount -t tmpfs t {folder} && cp {tmp_path}/a.tar {folder}"
    mount += f" && mount -o remount,ro {folder}"
    if subprocess.run(["unshare", "-m", "bash", "-c", mount], capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    prep = f"{sys.executable} -m data_prep"
    script = f"{mount}; {prep} index {folder}; {prep} index {folder} --manifest {target}"
    script += f"; {prep} verify {target}"
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True)
    assert "(Read-only file system); --manifest FOLDER writes the manifest to" in done.stderr
    assert done.returncode == 0 and done.stdout.endswith("sound\n")
    assert manifest.load(str(target)).shards_at == str(folder)
