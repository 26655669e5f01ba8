"""Flags become a dataclass; help and what is wrong end with a status."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from mocov3_ds.settings.command_line import read_flags


@dataclass(frozen=True)
class Flags:
    """Says what it is."""

    out: Path = Path("here")
    """where it goes"""


def test_flags_and_home() -> None:
    assert read_flags(Flags, "mocov3 it", []) == Flags()
    assert read_flags(Flags, "mocov3 it", ["--out=~/x"]) == Flags(Path.home() / "x")


def test_help_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["--help"], 0), (["--in", "x"], 2)):
        with pytest.raises(SystemExit) as ended:
            read_flags(Flags, "mocov3 it", arguments)
        assert ended.value.code == status
    printed = capsys.readouterr()
    assert "usage: mocov3 it" in printed.out and "where it goes" in printed.out
