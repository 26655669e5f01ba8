"""Sources and sets that the tests of the sharder share."""

from pathlib import Path

import pytest

from tests.data_prep import forms
from tests.data_prep.making import make


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of 21 images in three class folders."""
    return forms.write_tree(tmp_path / "tree", forms.imagenet(7))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A finished set of 15 samples in 4 shards."""
    tree = forms.write_tree(tmp_path / "tree", forms.imagenet(5))
    make(tree, tmp_path / "out", shard_size="4")
    return tmp_path / "out"
