"""Evaluations join a process group, be it of one rank; each test leaves it."""

from collections.abc import Iterator

import pytest

from mocov3_ds.distributed import ranks


@pytest.fixture(autouse=True)
def _leave_the_group() -> Iterator[None]:
    yield
    ranks.stop()
