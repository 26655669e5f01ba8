"""A study is read from a grid's folder or from one run's, with twins and what is missing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mocov3_ds.stability.study import LoggedRun, judge_cells, read_study
from tests.stability.judged_runs import judged_run
from tests.stability.written_study import write_run


def test_a_grid(study_folder: Path) -> None:
    study = read_study(study_folder)
    assert (study.title, study.scale) == ("Two optimizers & a twin", "tiny")
    assert study.command == ""  # a folder of an earlier version tells no command
    seeds = {label: [run.cell.seed for run in runs] for label, runs in study.arms.items()}
    assert seeds["AdamW, lr 0.001"] == seeds["AdamW, lr 0.002, frozen"] == [0, 1]
    assert seeds["LAMB"] == [0]
    assert study.unseen == ("lamb_seed-1: failed: out of memory",)


def test_a_run_is_measured_against_its_own_twin(study_folder: Path) -> None:
    arms = read_study(study_folder).arms
    runs = zip(arms["AdamW, lr 0.001"], arms["AdamW, lr 0.001, frozen"], strict=True)
    for trained, frozen in runs:
        assert trained.series.twin_knn == frozen.judgement.final_knn
        assert frozen.series.twin_knn is None


def test_a_run_is_measured_against_the_best_other_arm_at_its_seed() -> None:
    values = {("a", 0): 40.0, ("b", 0): 33.0, ("c", 0): 39.5, ("a", 1): 30.0, ("b", 1): 36.0}
    made = [judged_run(arm, seed, knn) for (arm, seed), knn in values.items()]
    half = judged_run("d", 0, 39.0, upto=90)  # half of each accuracy is reached by then
    cells = [run.cell for run in [*made, half]]
    logged = {run.cell.name: LoggedRun(run.series) for run in [*made, half]}
    runs = judge_cells(cells, logged)

    def sibling(name: str) -> tuple[str, float | None, int]:
        series = runs[name].series
        return series.sibling, series.sibling_knn, series.siblings

    assert sibling("b_seed-0") == sibling("c_seed-0") == ("a", 40.0, 2)
    assert sibling("a_seed-0") == ("c", 39.5, 2)
    assert sibling("a_seed-1") == ("b", 36.0, 1)
    assert sibling("d_seed-0") == ("a", 20.0, 3)
    # the same arms on other probes do not compare
    probed = {
        name: replace(run, series=replace(run.series, probes=1000 + number))
        for number, (name, run) in enumerate(logged.items())
    }
    assert not any(run.series.siblings for run in judge_cells(cells, probed).values())


def test_one_run(study_folder: Path) -> None:
    [[run]] = read_study(study_folder / "cells/lamb_seed-0").arms.values()
    assert run.has_trust_ratio and run.signals is not None
    [[run]] = read_study(study_folder / "cells/adamw_lr-0.001_seed-0").arms.values()
    assert not run.has_trust_ratio


def test_what_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither a grid"):
        read_study(tmp_path)
    write_run(tmp_path / "run", ["--recipe", "tiny"], 0, spikes=[], trained=True)
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps({"step": 0, "knn_full": 1.0}))
    with pytest.raises(ValueError, match="has not logged a step yet"):
        read_study(tmp_path / "run")
