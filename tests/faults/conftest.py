"""Runs that the tests of this folder look at; they take a minute."""

import pytest

from tests.faults.bad_runs import BadRuns, make_runs


@pytest.fixture(scope="session")
def bad_runs(tmp_path_factory: pytest.TempPathFactory) -> BadRuns:
    """All runs with a bad sample."""
    return make_runs(tmp_path_factory.mktemp("runs"))
