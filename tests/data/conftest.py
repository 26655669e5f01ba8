"""Sets that the tests of the data path share."""

import pytest

from tests.data.loading import SIZES
from tests.data.sets import make_set


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_set(str(tmp_path_factory.mktemp("small") / "set"), SIZES)


@pytest.fixture
def writable(tmp_path):
    """A set of one's own, to damage."""
    return make_set(str(tmp_path / "set"), SIZES)
