"""The files of a page's pictures: written where there is something to draw, else removed."""

from pathlib import Path

import pytest

from mocov3_ds.stability import study_pictures
from mocov3_ds.stability.study_pictures import PICTURES, write_pictures
from tests.stability.judged_runs import judged_run


def test_names_are_files_of_their_own() -> None:
    assert len({kind.name for kind in PICTURES}) == len(PICTURES)


def test_pictures_are_written_and_stale_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [kind for kind in PICTURES if kind.name in ("paired", "trust")]  # quickly drawn
    monkeypatch.setattr(study_pictures, "PICTURES", kinds)
    arms = {"a": [judged_run("a", 0, 40.0)], "b": [judged_run("b", 0, 42.0)]}
    (tmp_path / "trust.png").write_bytes(b"of an earlier page")
    (tmp_path / "own.txt").write_text("not a picture")
    pictures = write_pictures(arms, tmp_path)
    assert [picture.title for picture in pictures] == [kind.title for kind in kinds]
    paired, trust = pictures
    assert paired.data is not None and trust.data is None  # no run has trust ratios
    assert (tmp_path / "paired.png").read_bytes() == paired.data
    assert {path.name for path in tmp_path.iterdir()} == {"paired.png", "own.txt"}
