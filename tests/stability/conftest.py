"""One written study for all tests of its pages, tables and pictures."""

from pathlib import Path

import pytest

from tests.stability.written_study import write_study_runs


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid's folder with written runs; tests must not change it."""
    folder = tmp_path_factory.mktemp("grid")
    write_study_runs(folder)
    return folder
