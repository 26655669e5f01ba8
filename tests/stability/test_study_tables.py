"""Rows of a study: what the detectors found, in CSV files and beside the paper's values."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mocov3_ds.stability.comparisons import compare_arms
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.study import read_study
from mocov3_ds.stability.study_page import write_study
from mocov3_ds.stability.study_tables import (
    EVENT_COLUMNS,
    paper_accuracy,
    tabulate_arms,
    tabulate_events,
    tabulate_runs,
)
from tests.stability.judged_runs import judged_run


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_tables_hold_what_the_detectors_found(study_folder: Path, tmp_path: Path) -> None:
    write_study(study_folder, tmp_path)
    runs = {row["run"]: row for row in rows_of(tmp_path / "runs.csv")}
    assert len(runs) == 9
    spiky = runs["adamw_lr-0.001_seed-0"]
    assert int(spiky["jumps"]) == 2
    assert float(spiky["worst_excess"]) == pytest.approx(24, abs=2)
    assert spiky["verdict"] != "STABLE"
    frozen = runs["adamw_lr-0.001_frozen_seed-0"]
    assert (frozen["verdict"], frozen["jumps"]) == ("STABLE", "0")
    assert float(spiky["T"]) == pytest.approx(
        float(frozen["knn_final"]) - float(spiky["knn_final"])
    )
    assert not frozen["T"]
    # two planted spikes of all layers at once: a median, and too few for an interval
    assert (spiky["lead"], spiky["lead_events"], spiky["lead_low"]) == ("0.0", "2", "")
    assert (frozen["lead"], frozen["lead_events"]) == ("", "0")
    arms = {row["arm"]: row for row in rows_of(tmp_path / "arms.csv")}
    assert arms["AdamW, lr 0.001"]["seeds"] == "2"
    assert arms["LAMB"]["verdicts"] == "STABLE x1"
    events = rows_of(tmp_path / "events.csv")
    peaks = [int(e["peak"]) for e in events if e["run"].endswith("0.002_seed-1") and not e["group"]]
    assert sorted(p for p in peaks if p in (203, 330)) == [203, 330]


def test_the_papers_values_stand_beside_the_papers_settings_alone() -> None:
    def value(**settings: Any) -> float | None:
        base = {"recipe": "vit_b16", "epochs": 100, "batch": 4096, "lr": 1e-4, "seed": 0}
        return paper_accuracy(Cell("", "", {**base, **settings}, {}))

    assert value() == 72.2
    assert value(patch="frozen") == 72.8
    assert value(batch=6144) == 69.7
    assert value(optimizer="Lamb", lr=8e-4) == 66.5
    for change in ({"epochs": 300}, {"lr": 3e-4}, {"recipe": "vit_s16"}, {"beta2": 0.95}):
        assert value(**change) is None
    assert value(patch=0.2) is value(**{"views.fixed": True}) is None


def test_an_arm_is_the_mean_of_its_runs(study_folder: Path) -> None:
    arms = read_study(study_folder).arms
    runs = [row for row in tabulate_runs(arms) if row["arm"] == "AdamW, lr 0.001"]
    [arm] = [row for row in tabulate_arms(arms) if row["arm"] == "AdamW, lr 0.001"]
    for name in ("worst_excess", "knn_final", "E"):
        values = [run[name] for run in runs]
        assert arm[name] == pytest.approx(sum(values) / 2)
        assert (arm[f"{name}_min"], arm[f"{name}_max"]) == (min(values), max(values))
    assert sum(len(run["verdict"]) > 0 for run in runs) == arm["seeds"]


def test_every_event_has_its_columns(study_folder: Path) -> None:
    rows = tabulate_events(read_study(study_folder).arms)
    assert {row["kind"] for row in rows} >= {"gradient", "loss", "dip"}
    for row in rows:
        assert tuple(row) == EVENT_COLUMNS
        assert row["first"] <= row["peak"] <= row["last"]


def test_without_a_loss_there_are_no_counts_of_its_events() -> None:
    arms = {}
    for name in "ab":
        run = judged_run(name, 0, 30.0)
        silent_T = np.full_like(run.series.loss_T, np.nan)
        arms[name] = [replace(run, series=replace(run.series, loss_T=silent_T, has_loss=False))]
    row = tabulate_runs(arms)[0]
    assert all(np.isnan(row[name]) for name in ("jumps", "worst_excess", "loss_events"))
    assert tabulate_arms(arms)[0]["jumps"] is None
    assert [one.metric for one in compare_arms(arms)] == ["knn_final"]
