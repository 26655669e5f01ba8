"""`mocov3 stability`: what it prints, what it refuses, and a grid that is killed and goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mocov3_ds.stability import commands
from mocov3_ds.stability.cell_table import tabulate_cells
from mocov3_ds.stability.cells import read_outcome
from mocov3_ds.stability.executors import run_here
from tests.data.sets import make_set
from tests.stability.small_grid import prepare
from tests.test_train import environment, rows_of


def test_the_replay_needs_a_rate_below_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in (
        (["--factor", "1"], "--factor 1.0 must be from 0 (frozen) to below 1."),
        ([], f"{tmp_path} is no run folder"),
    ):
        assert commands.main(["replay", str(tmp_path), *words]) == 2
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
    data = ("--data.shards", str(tmp_path / "train"))
    data += ("--data.probe_shards", str(tmp_path / "probes"))
    uninterrupted = tmp_path / "uninterrupted"
    names = prepare(uninterrupted, REAL, launcher=sys.executable, extra=data)
    statuses = [outcome.status for outcome in run_here(uninterrupted, names, 1)]
    log = uninterrupted / "logs" / f"{names[1]}.log"
    assert statuses == ["done", "diverged"], log.read_text()

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
    assert read_outcome(killed, names[0]) is None
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert tabulate_cells(killed) == tabulate_cells(uninterrupted)
    assert rows_of(killed / "cells" / names[0]) == rows_of(uninterrupted / "cells" / names[0])

    pytest.importorskip("ray")
    on_ray = tmp_path / "ray"
    prepare(on_ray, REAL, launcher=sys.executable, extra=data)
    program = [sys.executable, "-m", "tests.stability.on_ray", str(on_ray), *names]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert tabulate_cells(on_ray) == tabulate_cells(uninterrupted)
