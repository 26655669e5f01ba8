"""Runs that no grid made: arms by what differs, seeds as pairs, doubt said."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mocov3_ds.stability.ordinary_runs import group_runs, read_ordinary_runs
from tests.stability.written_study import write_run


def grouped(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, int]]:
    cells, _ = group_runs(facts)
    return {cell.name: (cell.label, cell.seed) for cell in cells}


def test_arms_are_what_differs_but_for_the_seed() -> None:
    facts = {
        "a": {"ds.optimizer.params.lr": 0.1, "epochs": 3, "seed": 0},
        "b": {"ds.optimizer.params.lr": 0.1, "epochs": 3, "seed": 1},
        "c": {"ds.optimizer.params.lr": 0.2, "epochs": 3, "seed": 0},
    }
    assert grouped(facts) == {"a": ("lr 0.1", 0), "b": ("lr 0.1", 1), "c": ("lr 0.2", 0)}
    cells, notes = group_runs(facts)
    assert notes == [] and cells[2].settings == {"lr": 0.2, "seed": 0}


def test_a_frozen_twin_is_linked() -> None:
    facts = {
        f"{patch}-{seed}": {"model.patch_lr": float(patch), "seed": seed}
        for patch in (0, 1)
        for seed in (0, 1)
    }
    cells, _ = group_runs(facts)
    assert {cell.name: cell.twin for cell in cells} == {
        "0-0": "", "0-1": "", "1-0": "0-0", "1-1": "0-1",
    }  # fmt: skip
    assert [cell.frozen for cell in cells] == [True, True, False, False]


@pytest.mark.parametrize(
    ("names", "arms"),
    [
        (["hot_seed-0", "hot_seed-1", "cool_seed0"], [("hot", 0), ("hot", 1), ("cool", 0)]),
        (["hot_s0", "hot_s1"], [("hot", 0), ("hot", 1)]),
        (["a", "b"], [("a", 0), ("b", 1)]),
        (["seed3", "seed4"], [("seed3", 3), ("seed4", 4)]),
    ],
)
def test_names_tell_where_settings_do_not(names: list[str], arms: list[tuple[str, int]]) -> None:
    assert list(grouped({name: {} for name in names}).values()) == arms


def test_runs_without_a_seed_are_no_pairs() -> None:
    facts: dict[str, dict[str, Any]] = {
        "u": {"lr": 1}, "v": {"lr": 1}, "w": {"lr": 2}, "x": {"lr": 2, "seed": 0},
    }  # fmt: skip
    cells, notes = group_runs(facts)
    seeds = [cell.seed for cell in cells]
    assert len({*seeds}) == 4 and seeds[3] == 0
    assert notes == ["3 runs name no seed, so nothing is paired by them: u, v, w"]


def test_two_runs_of_one_seed_and_one_setting_are_told_apart_by_name() -> None:
    facts = {"one": {"lr": 1, "seed": 0}, "two": {"lr": 1, "seed": 0}, "far": {"lr": 2, "seed": 0}}
    assert [label for label, _ in grouped(facts).values()] == ["one", "two", "far"]


def test_own_runs_beside_those_of_others(tmp_path: Path) -> None:
    for seed in (0, 1):
        flags = ["--model.depth", "3", "--epochs", "30", "--seed", str(seed)]
        write_run(tmp_path / f"ours/run{seed}", flags, seed, spikes=[200], trained=True)
    rows = [f"{s},{3 - s / 300},{20 + s / 10 if s % 5 == 0 else ''}" for s in range(1, 301)]
    (tmp_path / "theirs.csv").write_text("step,loss,val_acc\n" + "\n".join(rows))
    study = read_ordinary_runs([tmp_path / "ours", tmp_path / "theirs.csv"])
    names = [run.cell.name for runs in study.arms.values() for run in runs]
    assert sorted(names) == ["run0", "run1", "theirs"]
    [understood] = study.understood
    assert understood.startswith("theirs: 300 rows; step = step, loss = loss, knn = val_acc")
    assert [name for name, _ in study.run_commands] == ["run0", "run1"]
    assert "--epochs 30" in study.run_commands[0][1]
    pair = read_ordinary_runs([tmp_path / "ours"])
    assert [len(runs) for runs in pair.arms.values()] == [2]
    theirs = read_ordinary_runs([tmp_path / "theirs.csv"], ["knn="])
    [[run]] = theirs.arms.values()
    assert not len(run.series.knn_K)


def test_what_has_no_effect_or_is_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run", ["--model.depth", "3"], 0, spikes=[], trained=True)
    with pytest.raises(ValueError, match="these runs are mocov3's own"):
        read_ordinary_runs([tmp_path / "run"], ["knn=a"])
    (tmp_path / "run/metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has logged a step yet"):
        read_ordinary_runs([tmp_path / "run"])


def test_hostile_names_and_settings(tmp_path: Path) -> None:
    name = "=cmd $x$ <b>"
    (tmp_path / name).mkdir()
    rows = "".join(json.dumps({"step": s, "loss": float(np.exp(-s))}) + "\n" for s in range(1, 9))
    (tmp_path / name / "log.txt").write_text(rows)
    (tmp_path / name / "args.json").write_text("[" * 100_000)
    study = read_ordinary_runs([tmp_path])
    assert list(study.arms) == [name]
