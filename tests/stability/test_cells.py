"""Cells are ordinary runs in a folder that knows its grid and how each of them ended."""

import json
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.stability import cells
from mocov3_ds.stability.cells import Outcome, cell_command, read_grid_json, read_outcome, run_cell
from mocov3_ds.stability.grid import lay_out, tomllib
from tests.stability.small_grid import FAKE, RATES, count_starts, prepare


def test_a_folder_without_a_grid(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no grid\.json"):
        read_grid_json(tmp_path / "none")


def test_every_cell_knows_its_settings(tmp_path: Path) -> None:
    prepare(tmp_path, RATES)
    tree: dict[str, Any] = json.loads((tmp_path / "grid.json").read_text())
    assert cells.list_cells(tree) == list(lay_out(tomllib.loads(RATES), "m", "tiny").cells)


def test_free_ports_and_the_run_folder(tmp_path: Path) -> None:
    launcher = "torchrun --nproc-per-node 2 --master-port {port}"
    (name, *_) = prepare(tmp_path, RATES, launcher=launcher)
    words = cell_command(tmp_path, read_grid_json(tmp_path), name)
    assert words[:4] == ["torchrun", "--nproc-per-node", "2", "--master-port"]
    assert words[4].isdigit()
    assert words[5].endswith("mocov3_ds/train.py")
    assert words[-4:] == ["--runs", str(tmp_path / "cells"), "--name", name]


def test_launchers_that_hide_the_exit_status(tmp_path: Path) -> None:
    expected = {
        "done nothing": "failed",
        "exitcode  : 3 (pid: 17)": "diverged",
        "exitcode  : 1 (pid: 17)": "failed",
        "process 8 exits with return code = 3": "diverged",
        "exits with return code = 31": "failed",
    }
    assert {text: cells.name_status(tmp_path, 1, text) for text in expected} == expected
    assert cells.name_status(tmp_path, 3, "") == "diverged"
    assert cells.name_status(tmp_path, 0, "") == "stopped"


def test_a_cell_that_has_ended_is_not_started_again(tmp_path: Path) -> None:
    name = prepare(tmp_path, RATES)[0]
    assert read_outcome(tmp_path, name) is None
    outcome = run_cell(tmp_path, name)
    assert (outcome.status, outcome.exit, outcome.message) == ("done", 0, "")
    assert run_cell(tmp_path, name) == read_outcome(tmp_path, name) == outcome
    assert count_starts(tmp_path) == [1]
    assert cells.is_finished(tmp_path / "cells" / name)


def test_outcomes_of_the_version_before_are_read(tmp_path: Path) -> None:
    outcome = Outcome("a", "failed", 1, 2.5, "out of memory")
    (tmp_path / "outcomes").mkdir()
    outcome.write(tmp_path)
    tree = json.loads((tmp_path / "outcomes/a.json").read_text())
    assert tree == {
        "cell": "a",
        "status": "failed",
        "exit": 1,
        "seconds": 2.5,
        "words": "out of memory",
    }
    assert read_outcome(tmp_path, "a") == outcome


def test_the_fake_launcher_is_in_the_command(tmp_path: Path) -> None:
    name = prepare(tmp_path, RATES, extra=("--data.threads", "1"))[0]
    command = " ".join(cell_command(tmp_path, read_grid_json(tmp_path), name))
    assert command.startswith(FAKE) and "--data.threads 1" in command
