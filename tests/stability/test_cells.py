"""Cells are ordinary runs in a folder that knows its grid and how each of them ended."""

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.stability import cells
from mocov3_ds.stability.cells import Outcome, cell_command, read_grid_json, read_outcome, run_cell
from mocov3_ds.stability.grid import lay_out, tomllib
from tests.stability.small_grid import FAKE, RATES, count_starts, prepare


def test_a_folder_takes_more_cells_but_no_other_grid(tmp_path: Path) -> None:
    names = prepare(tmp_path, RATES)
    more = prepare(tmp_path, RATES.replace("2.0", "0.75"))
    assert [*read_grid_json(tmp_path)["cells"]] == [*names, more[-1]]
    with pytest.raises(ValueError, match=r"another grid: cell .*--batch is None there, 64 here"):
        prepare(tmp_path, RATES + "\n[base]\nbatch = 64")
    with pytest.raises(ValueError, match=r"--ds optimizer is .* there, .*0\.9.* here"):
        prepare(tmp_path, RATES + "\n[base]\nbeta2 = 0.9")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    with pytest.raises(ValueError, match="not empty and holds no grid"):
        prepare(tmp_path / "other", RATES)
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


def test_an_interrupt_stops_the_training_first(tmp_path: Path) -> None:
    script = tmp_path / "sleeps.sh"
    lines = ["#!/bin/sh", f"trap 'echo saved > {tmp_path}/saved; exit 0' TERM"]
    lines += [f"echo > {tmp_path}/ready", "while :; do sleep 0.05; done"]
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
    folder = tmp_path / "grid"
    name = prepare(folder, RATES, launcher=str(script))[0]

    main_thread = threading.get_ident()

    def interrupt_once_ready() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        time.sleep(0.3)  # this process has come to wait for the script
        signal.pthread_kill(main_thread, signal.SIGALRM)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    thread = threading.Thread(target=interrupt_once_ready, daemon=True)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_cell(folder, name)
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, previous)
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert read_outcome(folder, name) is None


def test_the_fake_launcher_is_in_the_command(tmp_path: Path) -> None:
    name = prepare(tmp_path, RATES, extra=("--data.threads", "1"))[0]
    command = " ".join(cell_command(tmp_path, read_grid_json(tmp_path), name))
    assert command.startswith(FAKE) and "--data.threads 1" in command
