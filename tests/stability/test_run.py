"""Cells are ordinary runs: what ended stays, what broke is done again, every executor agrees."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.stability import commands
from mocov3_ds.stability import grid as grids
from mocov3_ds.stability import run as runs
from mocov3_ds.stability.grid import lay_out, tomllib
from tests.data.sets import make_set
from tests.test_train import environment, rows_of

FAKE = f"{shlex.quote(sys.executable)} {Path(__file__).with_name('fake_training.py')}"
RATES = "twins = false\nseeds = 1\n[axes]\nlr = [0.25, 0.5, 2.0]"


def prepared(folder: Path, text: str, *, launcher: str, extra: list[str]) -> list[str]:
    grid = lay_out(tomllib.loads(text), "mine", "tiny")
    runs.prepare(folder, grid, launcher=launcher, extra=extra)
    return [cell.name for cell in grid.cells]


def statuses(folder: Path) -> dict[str, str]:
    return {row["cell"]: row["status"] for row in runs.table(folder)}


def starts(folder: Path) -> list[int]:
    return [len(path.read_text()) for path in sorted(folder.glob("cells/*/starts"))]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cell_that_diverges_or_fails_stops_no_other(tmp_path: Path, workers: int) -> None:
    names = prepared(tmp_path, RATES, launcher=FAKE, extra=["--data.threads", "1"])
    assert statuses(tmp_path) == dict.fromkeys(names, "waiting")
    outcomes = {o.cell: o for o in runs.here(tmp_path, names, workers)}
    assert [outcomes[name].status for name in names] == ["done", "failed", "diverged"]
    assert outcomes[names[1]].words == "train.py: error: out of memory"
    assert outcomes[names[2]].words == "train.py: error: the loss is nan"
    assert "--data.threads 1" in " ".join(
        runs.command(tmp_path, runs.open_grid(tmp_path), names[0])
    )
    # again: what ended is not started a second time, what failed is
    again = list(runs.here(tmp_path, names, 1))
    assert [outcome.status for outcome in again] == ["done", "done", "diverged"]
    assert starts(tmp_path) == [1, 2, 1]
    rows = {row["cell"]: row for row in runs.table(tmp_path)}
    assert (rows[names[1]]["steps"], rows[names[1]]["final_loss"]) == (3, 0.5)
    assert rows[names[1]]["knn_best"] == rows[names[1]]["knn_last"] == 40.5
    assert rows[names[2]]["steps"] == 1
    lines = runs.write_table(tmp_path).read_text().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("cell,label,seed,status,steps")
    assert "started xx" in (tmp_path / "logs" / f"{names[1]}.log").read_text()


def test_a_folder_takes_more_cells_but_no_other_grid(tmp_path: Path) -> None:
    names = prepared(tmp_path, RATES, launcher=FAKE, extra=[])
    more = prepared(tmp_path, RATES.replace("2.0", "0.75"), launcher=FAKE, extra=[])
    assert [*runs.open_grid(tmp_path)["cells"]] == [*names, more[-1]]
    with pytest.raises(ValueError, match=r"holds another grid: cell .* has nothing there, --batch"):
        prepared(tmp_path, RATES + "\n[base]\nbatch = 64", launcher=FAKE, extra=[])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    with pytest.raises(ValueError, match="not empty and holds no grid"):
        prepared(tmp_path / "other", RATES, launcher=FAKE, extra=[])
    with pytest.raises(ValueError, match=r"holds no grid\.json"):
        runs.open_grid(tmp_path / "none")


def test_launchers_that_hide_the_exit_status(tmp_path: Path) -> None:
    said = {
        "done nothing": "failed",
        "exitcode  : 3 (pid: 17)": "diverged",
        "exitcode  : 1 (pid: 17)": "failed",
        "process 8 exits with return code = 3": "diverged",
        "exits with return code = 31": "failed",
    }
    assert {words: runs._status(tmp_path, 1, words) for words in said} == said
    assert runs._status(tmp_path, 0, "") == "stopped"


def test_free_ports_and_places(tmp_path: Path) -> None:
    launcher = "torchrun --nproc-per-node 2 --master-port {port}"
    (name, *_) = prepared(tmp_path, RATES, launcher=launcher, extra=[])
    words = runs.command(tmp_path, runs.open_grid(tmp_path), name)
    assert words[:4] == ["torchrun", "--nproc-per-node", "2", "--master-port"]
    assert words[4].isdigit()
    assert words[5].endswith("mocov3_ds/train.py")
    assert words[-4:] == ["--runs", str(tmp_path / "cells"), "--name", name]


def test_a_slurm_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = prepared(tmp_path / "a folder", RATES, launcher=FAKE, extra=[])
    options = "--partition gpu --time 24:00:00 --exclusive"
    script = runs.slurm_script(tmp_path / "a folder", names, at_once=2, options=options)
    text = script.read_text()
    for line in ("--array=0-2%2", "--partition gpu", "--time 24:00:00", "--exclusive"):
        assert f"\n#SBATCH {line}\n" in text
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert "there is no sbatch on this machine" in runs.submit(script)
        for words, status in (("echo Submitted batch job 7", 0), ("echo no such partition >&2", 1)):
            sbatch = tmp_path / "sbatch"
            sbatch.write_text(f"#!/bin/sh\n{words}\nexit {status}\n")
            sbatch.chmod(0o755)
            if status:
                with pytest.raises(ValueError, match="failed: no such partition"):
                    runs.submit(script)
            else:
                assert runs.submit(script) == "Submitted batch job 7"
    environment_ = {**environment(), "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(
        ["bash", str(script)], env=environment_, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"diverged: {names[2]}: train.py: error: the loss is nan"
    assert statuses(tmp_path / "a folder") == dict(
        zip(names, ("waiting", "waiting", "diverged"), strict=True)
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('title = "Three rates"\n' + RATES)
    command = ["run", str(path), "--runs", str(tmp_path / "out"), "--launcher", FAKE]
    assert commands.main([*command, "--flags", "--data.threads 3", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count(" --data.threads 3") == 3
    assert said.count("train.py --recipe tiny") == 3
    assert not (tmp_path / "out").exists()
    assert commands.main(command) == 0
    said = capsys.readouterr().out
    assert "Three rates (tiny): 3 of 3 cells to run" in said
    assert "lr-0.25_seed-0  done" in said
    assert commands.main(command) == 0
    assert "1 of 3 cells to run" in capsys.readouterr().out
    for words, sentence in (
        ([*command[:2], "--scale", "cifar"], ""),
        (["run", "paper-lr", "--scale", "cifar"], "needs images: --shards FOLDER"),
        (["run", "paper-rl"], "did you mean paper-lr"),
        (["cell", str(tmp_path / "out/mine-tiny"), "other"], "has no cell 'other'"),
        (["report", str(tmp_path)], "holds neither a grid"),
    ):
        if sentence:
            assert commands.main(words) == 2
            assert sentence in capsys.readouterr().err


REAL = """
seeds = 1
twins = false
[base]
batch = 16
epochs = 6
warmup_epochs = 1
"views.image_size" = 16
"model.dim" = 24
"model.depth" = 2
"model.heads" = 2
"model.hidden" = 32
"model.out" = 16
"save.every_steps" = 2
"data.lanes" = 4
"data.threads" = 1
"knn.every_steps" = 3
"knn.probes" = 30
"knn.bank" = 32
[axes]
lr = [1e-3, 1e30]
"""


@pytest.mark.slow
def test_a_killed_grid_goes_on_and_ray_gives_the_same_table(tmp_path: Path) -> None:
    make_set(str(tmp_path / "train"), [20, 7, 23])
    make_set(str(tmp_path / "probes"), [33])
    path = tmp_path / "mine.toml"
    path.write_text(REAL)
    data = ["--data.shards", str(tmp_path / "train"), "--data.probe_shards"]
    data.append(str(tmp_path / "probes"))
    whole = tmp_path / "whole"
    names = prepared(whole, REAL, launcher=sys.executable, extra=data)
    found = [outcome.status for outcome in runs.here(whole, names, 1)]
    assert found == ["done", "diverged"], (whole / "logs" / f"{names[1]}.log").read_text()

    # the same grid as a command that is killed in the middle of its first cell
    command = [sys.executable, "-m", "mocov3_ds.cli", "stability", "run", str(path)]
    command += ["--runs", str(tmp_path / "killed"), "--shards", str(tmp_path / "train")]
    command += ["--probes", str(tmp_path / "probes"), "--launcher", sys.executable]
    killed = tmp_path / "killed/mine-tiny"
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    metrics = killed / "cells" / names[0] / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert runs.outcome_of(killed, names[0]) is None
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert runs.table(killed) == runs.table(whole)
    assert rows_of(killed / "cells" / names[0]) == rows_of(whole / "cells" / names[0])

    pytest.importorskip("ray")
    on_ray = tmp_path / "ray"
    prepared(on_ray, REAL, launcher=sys.executable, extra=data)
    program = [sys.executable, "-m", "tests.stability.on_ray", str(on_ray), *names]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert runs.table(on_ray) == runs.table(whole)


def test_every_cell_knows_its_settings(tmp_path: Path) -> None:
    prepared(tmp_path, RATES, launcher=FAKE, extra=[])
    tree: dict[str, Any] = json.loads((tmp_path / "grid.json").read_text())
    assert runs.cells_of(tree) == list(grids.lay_out(tomllib.loads(RATES), "m", "tiny").cells)
