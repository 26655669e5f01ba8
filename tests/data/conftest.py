"""Sets that the tests of the data path share."""

import pytest

from mocov3_ds.data import storage
from tests.data.loading import SIZES
from tests.data.sets import make_set


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_set(str(tmp_path_factory.mktemp("small") / "set"), SIZES)


@pytest.fixture
def writable(tmp_path):
    """A set of one's own, to damage."""
    return make_set(str(tmp_path / "set"), SIZES)


@pytest.fixture
def reads(monkeypatch):
    """URLs that are read, in blocks."""
    urls: list[str] = []
    read_blocks = storage.read_blocks

    def noted(url, *args):
        urls.append(url)
        return read_blocks(url, *args)

    monkeypatch.setattr(storage, "read_blocks", noted)
    return urls
