"""`mocov3 stability run`: what it says, what it trains, what it refuses."""

import shlex
from pathlib import Path

import pytest

from mocov3_ds.stability import commands
from mocov3_ds.stability.cells import read_grid_json
from tests.stability.small_grid import FAKE, RATES


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('title = "Three rates"\n' + RATES)
    command = ["run", str(path), "--runs", str(tmp_path / "out"), "--launcher", FAKE]
    assert commands.main([*command, "--flags", "--data.threads 3", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" --data.threads 3") == 3
    assert printed.count("train.py --recipe tiny") == 3
    assert "3 cells: 3 arms, 1 seed; 192 steps and 9 k-NN evaluations in a cell" in printed
    assert "Cannot be told with one seed." in printed
    assert not (tmp_path / "out").exists()
    assert commands.main(command) == 0
    printed = capsys.readouterr().out
    assert "Three rates at scale tiny, in " in printed and "3 of 3 cells to run" in printed
    made_by = shlex.split(read_grid_json(tmp_path / "out/mine-tiny")["command"])
    assert made_by == ["mocov3", "stability", *command]
    assert "lr-0.25_seed-0  done" in printed
    assert commands.main(command) == 0
    assert "1 of 3 cells to run" in capsys.readouterr().out
    other = tmp_path / "other/mine.toml"
    other.parent.mkdir()
    other.write_text('title = "Three others"\n' + RATES)
    assert commands.main(["run", str(other), *command[2:]]) == 2
    assert f"the grid 'Three others' of {other} (3 cells) is another" in capsys.readouterr().err
    for words, sentence in (
        (["run", "paper-lr", "--scale", "cifar"], "needs images: --shards FOLDER"),
        (["run", "paper-rl"], "did you mean paper-lr"),
        (["cell", str(tmp_path / "out/mine-tiny"), "other"], "has no cell 'other'"),
        (["report", str(tmp_path / "none")], "neither a grid"),
        (["report"], "needs a grid's folder, runs or logs"),
        (["report", str(path), "--probes", "-1"], "--probes -1 must be 0"),
    ):
        assert commands.main(words) == 2
        assert sentence in capsys.readouterr().err
