"""Runs are found in files and folders of any program, and none is read twice or passed over."""

import json
from pathlib import Path

import pytest

from mocov3_ds.stability.logs.find import find_runs, read_filled_logs, read_logs

LINES = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'


def put(path: Path, text: str = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(source: Path) -> list[tuple[str, bool]]:
    places = find_runs(source)
    return [(place.path.relative_to(source).as_posix(), place.is_own) for place in places]


def test_folders_of_many_programs(tmp_path: Path) -> None:
    put(tmp_path / "ours/config.json", json.dumps({"config": {"recipe": "tiny"}}))
    put(tmp_path / "ours/metrics.jsonl")
    put(tmp_path / "theirs/config.json", json.dumps({"lr": 1}))
    put(tmp_path / "theirs/metrics.jsonl")
    put(tmp_path / "dino/log.txt")
    put(tmp_path / "lightning/version_0/metrics.csv", "step,loss\n1,2\n")
    put(tmp_path / "lightning/version_0/hparams.yaml", "lr: 1")
    put(tmp_path / "trainer/trainer_state.json", json.dumps({"log_history": [{"loss": 1}]}))
    put(tmp_path / "many/a.csv")
    put(tmp_path / "many/b.csv")
    put(tmp_path / "notes/readme.txt")
    for name in ("index.html", "runs.csv", "arms.csv", "events.csv"):
        put(tmp_path / "report" / name)  # a page of this program
    put(tmp_path / "grid/grid.json", "{}")
    put(tmp_path / "grid/cells/x/config.json", json.dumps({"config": {"recipe": "tiny"}}))
    put(tmp_path / "grid/cells/x/metrics.jsonl")
    assert found(tmp_path) == [
        ("dino/log.txt", False),
        ("grid/cells/x", True),
        ("lightning/version_0/metrics.csv", False),
        ("many/a.csv", False),
        ("many/b.csv", False),
        ("ours", True),
        ("theirs/metrics.jsonl", False),
        ("trainer/trainer_state.json", False),
    ]
    assert [place.path for place in find_runs(tmp_path / "many/a.csv")] == [tmp_path / "many/a.csv"]


def test_logs_of_several_kinds_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "metrics.csv")
    put(tmp_path / "events.out.tfevents.1")
    with pytest.raises(ValueError, match=r"\(.csv, TensorBoard event files\).*name the files"):
        find_runs(tmp_path)


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither a grid"):
        find_runs(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        find_runs(tmp_path / "none")


def test_names_and_settings_beside_the_log(tmp_path: Path) -> None:
    for folder in ("a/run", "b/run"):
        put(tmp_path / folder / "log.txt")
        put(tmp_path / folder / "args.json", json.dumps({"lr": 0.1, "seed": 3}))
    put(tmp_path / "c/warm.csv", "step,loss\n1,2\n")
    tables = read_logs(find_runs(tmp_path))
    assert [table.name for table in tables] == ["run", "b/run", "warm"]
    assert tables[0].facts == {"lr": 0.1, "seed": 3} and tables[2].facts == {}


def test_a_runs_folder_of_lines(tmp_path: Path) -> None:
    put(tmp_path / "theirs/config.json", json.dumps({"lr": 1}))
    put(tmp_path / "theirs/metrics.jsonl")
    [table] = read_logs(find_runs(tmp_path))
    assert (table.name, table.rows, table.facts) == ("theirs", 2, {"lr": 1})


def test_two_charts_of_wandb_are_one_run(tmp_path: Path) -> None:
    for name, metric in (("loss", "loss"), ("acc", "val/acc")):
        header = f'"Step","sun - {metric}","sun - {metric}__MIN","sun - {metric}__MAX"'
        put(tmp_path / f"{name}.csv", f"{header}\n1,2,2,2\n2,3,3,3\n")
    [table] = read_logs(find_runs(tmp_path))
    assert {name: len(column.rows_M) for name, column in table.columns.items()} == {
        "Step": 4, "loss": 2, "val/acc": 2,
    }  # fmt: skip
    assert table.rows == 4 and table.notes == ["charts acc.csv and loss.csv"]


def test_a_run_that_has_just_begun_is_left_out(tmp_path: Path) -> None:
    put(tmp_path / "a.csv", "step,loss\n1,2\n")
    for name, text in (("b.csv", ""), ("c.csv", "step,loss\n"), ("d.csv", "step,loss\n1")):
        put(tmp_path / name, text)
    tables, left_out = read_filled_logs(find_runs(tmp_path))
    assert [table.name for table in tables] == ["a"]
    assert len(left_out) == 3 and all(" has no rows yet: " in one for one in left_out)
    with pytest.raises(ValueError, match=r"b\.csv has no rows yet"):
        read_logs(find_runs(tmp_path))
    put(tmp_path / "e.csv", "step,loss\na,b\n")
    with pytest.raises(ValueError, match="holds no numbers"):
        read_filled_logs(find_runs(tmp_path))
