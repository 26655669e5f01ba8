"""Runs that no grid made: arms by what differs, seeds as pairs, doubt said."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mocov3_ds.stability.comparable_runs import line_up
from mocov3_ds.stability.comparisons import compare_arms
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
    _, notes = group_runs({"a": {}, "b": {}})
    assert notes == ["2 runs name no seed, so nothing is paired by them: a, b"]
    assert group_runs({"a": {}})[1] == []


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


def write_csv(path: Path, steps: int, final: float = 60.0) -> None:
    """A log of a loss, and an accuracy every ten steps that ends at `final` after 1,000."""
    random = np.random.default_rng(len(path.name))
    lines = [
        f"{s},{3 + 5 * np.exp(-s / 200) * (1 + 0.01 * random.standard_normal())},"
        + (f"{final - 40 * np.exp(-s / 250) + random.normal()}" if s % 10 == 0 else "")
        for s in range(1, steps + 1)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("step,loss,knn\n" + "\n".join(lines) + "\n")


def test_a_log_that_was_cut_short_is_unfinished(tmp_path: Path) -> None:
    """Half of a run is not worse than a whole one: it has had half of the steps."""
    for seed in range(3):
        write_csv(tmp_path / f"base_seed{seed}.csv", 1000)
        write_csv(tmp_path / f"cut_seed{seed}.csv", 500)
    study = read_ordinary_runs([tmp_path])
    lined_up = line_up(study.arms)
    [one] = [one for one in compare_arms(lined_up.arms) if one.metric == "knn_final"]
    assert abs(one.difference) < 2
    assert "after step 500, the last that all of them have reached" in lined_up.notes[0]
    [note] = [note for note in study.unseen if "longest run" in note]
    assert "cut_seed0 (500 steps)" in note and "base_seed0 (1,000 steps), tells" in note
    assert not any(run.judgement.verdict == "BELOW ITS TWIN" for run in study.arms["cut"])


def test_a_config_beside_a_log_tells_that_it_has_ended(tmp_path: Path) -> None:
    for name, steps in (("long", 1000), ("short", 500)):
        write_csv(tmp_path / f"{name}_seed0/metrics.csv", steps)
        config = {"total_steps": steps}
        (tmp_path / f"{name}_seed0/config.json").write_text(json.dumps(config))
    study = read_ordinary_runs([tmp_path])
    assert line_up(study.arms).notes == ()
    [note] = [note for note in study.unseen if "ended" in note]
    assert note == (
        "Runs of different lengths that have ended are compared at their ends: long_seed0 (1,000 "
        "steps), short_seed0 (500 steps)."
    )


def test_a_log_that_has_not_begun_is_listed(tmp_path: Path) -> None:
    write_csv(tmp_path / "a_seed0.csv", 100)
    (tmp_path / "b_seed0.csv").write_text("step,loss,knn\n")
    (tmp_path / "c_seed0.csv").write_text("step,loss,knn\n0,,\n")
    study = read_ordinary_runs([tmp_path])
    assert list(study.arms) == ["a"]
    assert any(re.match(r"left out: .*b_seed0.csv has no rows yet", one) for one in study.unseen)
    assert any("columns loss, knn hold no number" in one for one in study.unseen)
    (tmp_path / "a_seed0.csv").unlink()
    with pytest.raises(ValueError, match=r"has logged a step yet; .*b_seed0.csv has no rows yet"):
        read_ordinary_runs([tmp_path])
