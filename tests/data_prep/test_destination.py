"""Folders that shards may go to: empty ones and those of the same plan, one run at a time."""

import fcntl
import os

import pytest

from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images
from tests.data_prep import forms
from tests.data_prep.making import make


def test_other_options_and_other_images_are_refused(tree, tmp_path):
    out = tmp_path / "out"
    make(tree, out)
    content = forms.files_of(out)
    for options, match in (
        ({"seed": 1}, "seed 0 there, 1 asked for"),
        ({"shard_size": "6"}, "shard_size '5' there, '6' asked for"),
        ({"resize": 16}, "resize 0 there, 16 asked for"),
        ({"split": "train"}, "split '' there, 'train' asked for"),
    ):
        with pytest.raises(ValueError, match=f"another plan: .*{match}"):
            make(tree, out, **options)
    (tree / "n01440764" / "new.jpg").write_bytes(forms.picture(77))
    with pytest.raises(ValueError, match="images 21 there, 22 asked for, other images"):
        make(tree, out)
    assert forms.files_of(out) == content


def test_images_and_shards_do_not_share_a_folder(tree):
    content = forms.files_of(tree)
    for url in (tree, f"{tree}/../{tree.name}/"):
        with pytest.raises(ValueError, match="is the folder of the images themselves"):
            make(tree, url)
    with pytest.raises(ValueError, match=r"empty text; `\.` names the folder"):
        make(tree, "")
    assert forms.files_of(tree) == content


def test_foreign_folders_are_refused(tree, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "other.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds 'other.tar', which is not of this command"):
        make(tree, out)
    assert forms.files_of(out) == {"other.tar": b"mine"}
    (out / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan.json is no plan of shards, it begins with"):
        make(tree, out)


def test_two_runs_at_once_are_refused(tree, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another run is writing"):
        make(tree, out)
    os.close(descriptor)
    make(tree, out)


def test_shards_that_others_wrote_elsewhere_are_missed(tree, tmp_path):
    def elsewhere(work, tasks, workers):
        return (work(task._replace(url=str(tmp_path / "other"))) for task in tasks)

    listing = list_images(str(tree))
    options = {"workers": 1, "quiet": True, "engine": elsewhere}
    with pytest.raises(ValueError, match=r"shard-000000.tar was made and is not in .*share"):
        make_shards(listing, str(tmp_path / "out"), ShardOptions(), **options)
    assert not (tmp_path / "out" / "manifest.json").exists()
