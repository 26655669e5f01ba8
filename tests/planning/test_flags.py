"""Flags of the planner, as they are read before torch is imported."""

from pathlib import Path

import pytest

from mocov3_ds.planning.flags import PlanOptions, read_flags


def test_flags_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpus", "8xT4", "--json", "--ds", "a.b=1", "--ds", "c=2", "--picture", "p.png"]
    assert read_flags(arguments) == PlanOptions(
        gpus="8xT4", as_json=True, ds=("a.b=1", "c=2"), picture=Path("p.png")
    )
    assert read_flags(["--rates=~/gpu.json"]).rates == Path.home() / "gpu.json"
    with pytest.raises(SystemExit) as ended:
        read_flags(["--gpuss", "1"])
    assert ended.value.code == 2
    assert "--gpus" in capsys.readouterr().err
