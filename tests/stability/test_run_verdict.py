"""The verdict on the page of one run, and the bad step at which it stopped."""

from pathlib import Path

from mocov3_ds.stability.run_verdict import describe_bad_stop, judge_run
from mocov3_ds.stability.series import read_series
from mocov3_ds.stability.verdict import judge


def test_it_is_that_of_the_study(study_folder: Path) -> None:
    run = study_folder / "cells/adamw_lr-0.001_seed-0"
    verdict, judgement = judge_run(run), judge(read_series(run))
    assert (verdict.word, verdict.why, verdict.notes) == (
        judgement.verdict, judgement.why, judgement.notes,
    )  # fmt: skip


def test_no_run_has_no_verdict(tmp_path: Path) -> None:
    assert judge_run(tmp_path).word == "" and "cannot be judged" in judge_run(tmp_path).why


def test_a_bad_step_after_the_last_row(tmp_path: Path) -> None:
    assert describe_bad_stop(tmp_path, 9) == []
    (tmp_path / "trouble/step-00000012-14").mkdir(parents=True)
    for name, text in (("step-00000004", "{}"), ("step-00000010", "["), ("step-00000011-12", "{}")):
        (tmp_path / f"trouble/{name}.json").write_text(text)
    assert describe_bad_stop(tmp_path, 9) == [
        "stopped at the bad step 10, see trouble/step-00000010.json"
    ]
