"""Flags of the planner, as tyro reads them."""

from pathlib import Path
from typing import Any

import pytest
import tyro

from mocov3_ds.planning import command, flags


def test_flags_reach_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(command, "run_plan", given.append)
    arguments = ["--gpus", "8xT4", "--json", "--ds", "a.b=1", "--ds", "c=2", "--picture", "p.png"]
    tyro.cli(flags.plan, args=arguments)
    [options] = given
    assert options == flags.PlanOptions(
        gpus="8xT4", as_json=True, ds=("a.b=1", "c=2"), picture=Path("p.png")
    )
    with pytest.raises(SystemExit):
        tyro.cli(flags.plan, args=["--gpuss", "1"])
