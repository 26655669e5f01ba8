"""A run folder says whether the run is finished."""

from pathlib import Path

import pytest

from mocov3_ds.checkpoints import run_folder
from mocov3_ds.checkpoints.run_status import (
    clear_finished,
    describe_status,
    main,
    mark_finished,
)


def test_a_run_is_finished_once_it_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert describe_status(run, 0) == (1, f"not begun: there is no {run}")
    run.mkdir()
    assert describe_status(run, 0) == (1, f"not finished: {run} has no checkpoint yet")
    (run / "checkpoints/step-00000012").mkdir(parents=True)
    status, words = describe_status(run, 0)
    assert status == 1
    assert words == f"not finished: {run} goes on from step 12 with the same command"
    mark_finished(run, 12)
    assert describe_status(run, 0) == (0, f"finished: {run}")
    clear_finished(run)
    clear_finished(run)
    assert describe_status(run, 0)[0] == 1


def test_a_mark_that_was_cut_short_is_none(tmp_path: Path) -> None:
    (tmp_path / "finished").write_text("")
    assert describe_status(tmp_path, 0)[0] == 1


def test_a_run_that_somebody_works_on_is_not_finished(tmp_path: Path) -> None:
    mark_finished(tmp_path, 12)
    run_folder.lock_folder(tmp_path)
    try:
        status, words = describe_status(tmp_path, 0)
    finally:
        run_folder.unlock_folder(tmp_path)
    assert status == 1
    assert words.startswith(f"in work: {tmp_path} is in use by process ")
    assert describe_status(tmp_path, 0)[0] == 0


@pytest.mark.parametrize(("is_finished", "status"), [(True, 0), (False, 1)])
def test_the_command_answers_by_its_exit_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_finished: bool,
    status: int,
) -> None:
    if is_finished:
        mark_finished(tmp_path, 12)
    monkeypatch.setattr("sys.argv", ["mocov3 status", str(tmp_path), "--wait", "0.1"])
    assert main() == status
    assert capsys.readouterr().out.startswith("finished: " if is_finished else "not finished: ")
