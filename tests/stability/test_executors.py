"""Every executor runs the same cells: what ended stays, what broke is done again."""

import subprocess
from pathlib import Path

import pytest

from mocov3_ds.stability import executors
from mocov3_ds.stability.cells import Outcome
from mocov3_ds.stability.executors import run_here
from tests.stability.small_grid import RATES, count_starts, prepare, statuses
from tests.test_train import environment


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cell_that_diverges_or_fails_stops_no_other(tmp_path: Path, workers: int) -> None:
    names = prepare(tmp_path, RATES)
    assert statuses(tmp_path) == dict.fromkeys(names, "waiting")
    outcomes = {o.cell: o for o in run_here(tmp_path, names, workers)}
    assert [outcomes[name].status for name in names] == ["done", "failed", "diverged"]
    assert outcomes[names[1]].message == "train.py: error: out of memory"
    assert outcomes[names[2]].message == "train.py: error: the loss is nan"
    # again: what ended is not started a second time, what failed is
    second = list(run_here(tmp_path, names, 1))
    assert [outcome.status for outcome in second] == ["done", "done", "diverged"]
    assert count_starts(tmp_path) == [1, 2, 1]
    assert "started xx" in (tmp_path / "logs" / f"{names[1]}.log").read_text()


def test_a_slurm_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder"
    names = prepare(folder, RATES)
    options = "--partition gpu --time 24:00:00 --exclusive"
    script = executors.write_slurm_script(folder, names, at_once=2, options=options)
    text = script.read_text()
    for line in ("--array=0-2%2", "--partition gpu", "--time 24:00:00", "--exclusive"):
        assert f"\n#SBATCH {line}\n" in text
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert "there is no sbatch on this machine" in executors.submit_script(script)
        for words, status in (("echo Submitted batch job 7", 0), ("echo no such partition >&2", 1)):
            sbatch = tmp_path / "sbatch"
            sbatch.write_text(f"#!/bin/sh\n{words}\nexit {status}\n")
            sbatch.chmod(0o755)
            if status:
                with pytest.raises(ValueError, match="failed: no such partition"):
                    executors.submit_script(script)
            else:
                assert executors.submit_script(script) == "Submitted batch job 7"
    variables = {**environment(), "SLURM_ARRAY_TASK_ID": "2"}
    result = subprocess.run(
        ["bash", str(script)], env=variables, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"diverged: {names[2]}: train.py: error: the loss is nan"
    assert statuses(folder) == dict(zip(names, ("waiting", "waiting", "diverged"), strict=True))


def test_a_line_for_each_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [Outcome("a", "done", 0, 12.3, ""), Outcome("b", "failed", 1, 4.0, "no memory")]
    assert executors.collect_outcomes(iter(outcomes), 3, 1) == outcomes
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["done after 12 s: a", "failed after 4 s: b: no memory"]


def test_lines_of_sbatch_quote_what_has_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "a grid 50%"
    folder.mkdir()
    options = "--comment 'two words' --time 24:00:00 --partition=gpu"
    script = executors.write_slurm_script(folder, ["a b"], at_once=0, options=options)
    lines = [line[8:] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert lines == [
        '--job-name="stability-a grid 50%"',
        "--array=0-0",
        f'--output="{tmp_path}/a grid 50%%/logs/slurm-%A_%a.log"',
        "--signal=B:TERM@120",
        '--comment "two words"',
        "--time 24:00:00",
        "--partition=gpu",
    ]
    for bad in ("--comment 'a\nb'", "--comment 'a\"b'", "--comment 'open"):
        with pytest.raises(ValueError, match=r"cannot stand in an #SBATCH line|cannot be read"):
            executors.write_slurm_script(folder, ["a"], at_once=0, options=bad)
    broken = tmp_path / "x\nscancel"
    broken.mkdir()
    with pytest.raises(ValueError, match="cannot stand in an #SBATCH line"):
        executors.write_slurm_script(broken, ["a"], at_once=0, options="")
