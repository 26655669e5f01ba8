"""One version: the package's, and that of the citation."""

from pathlib import Path

import mocov3_ds
from mocov3_ds.version import __version__


def test_the_citation_is_of_this_version() -> None:
    citation = Path(__file__).parents[1] / "CITATION.cff"
    assert f"version: {__version__}\n" in citation.read_text()
    assert mocov3_ds.__version__ == __version__
