"""What a grid's arms cost, read from its folder: sums, the way to a reference, and refusals."""

import json
from pathlib import Path

import pytest

from mocov3_ds.bench import cost
from mocov3_ds.stability.cells import Outcome
from mocov3_ds.stability.grid import lay_out, tomllib
from mocov3_ds.stability.grid_folder import prepare_folder

GRID = """
twins = false
seeds = 2
[[arms]]
name = "slow"
[[arms]]
name = "fast"
beta2 = 0.95
"""


def write_run(folder: Path, name: str, cpu_s: float, knn: list[float], full: float) -> None:
    run = folder / "cells" / name
    run.mkdir(parents=True)
    rows = [{"step": 0, "knn_full": 20.0}]
    for step in range(1, 2 * len(knn) + 1):
        row = {"step": step, "lr": 0.1, "loss": 1.0, "cpu_s": cpu_s}
        rows.append(row | ({"knn": knn[step // 2 - 1]} if step % 2 == 0 else {}))
    rows[-1]["knn_full"] = full
    again = {"step": 1, "lr": 0.1, "loss": 1.0, "cpu_s": 1000.0}  # before a kill: made again
    lines = [json.dumps(row) for row in [rows[0], again, *rows[1:]]]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    Outcome(name, "done", 0, 1.0, "").write(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    grid = lay_out(tomllib.loads(GRID), "mine", "tiny")
    prepare_folder(tmp_path, grid, launcher="python", extra=[])
    (tmp_path / "outcomes").mkdir(exist_ok=True)
    names = {(cell.label, cell.seed): cell.name for cell in grid.cells}
    write_run(tmp_path, names["slow", 0], 10.0, [21.0, 25.0, 30.0], 31.0)
    write_run(tmp_path, names["slow", 1], 10.0, [21.0, 25.0, 34.0], 35.0)
    write_run(tmp_path, names["fast", 0], 5.0, [22.0, 26.0, 34.0], 36.0)
    write_run(tmp_path, names["fast", 1], 5.0, [22.0, 26.0, 33.0], 34.0)
    return tmp_path


def test_sums_and_the_way_to_the_reference(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cost.run_bench(cost.CostOptions(grid=folder, picture=folder / "cost.png"))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0][1:] == ["2", "6", "60", "100 %", "33.0 (31.0 to 35.0)", "60", "100 % |"]
    # 30 % lies half way between 26 % after 20 s and 34 % after 30 s; seed 1 never has 34 %
    assert rows[1][1:] == [
        *("2", "6", "30", "50 %", "35.0 (34.0 to 36.0)", "25 (1 of 2 seeds)", "42 % |")
    ]
    assert (folder / "cost.png").read_bytes()[1:4] == b"PNG"


def test_there_at_the_first_evaluation_or_never(folder: Path) -> None:
    run = cost.read_costs(folder)["fast"][0]
    assert cost.cpu_s_to_reach(run, 20.0) == 10.0
    assert cost.cpu_s_to_reach(run, 34.5) is None


def test_bad_input_is_one_sentence(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match="--reference fats: no such arm"):
        cost.run_bench(cost.CostOptions(grid=folder, reference="fats"))
    empty = tmp_path_factory.mktemp("other")
    with pytest.raises(ValueError, match=r"holds no grid\.json"):
        cost.run_bench(cost.CostOptions(grid=empty))
    for outcome in (folder / "outcomes").iterdir():
        outcome.unlink()
    with pytest.raises(ValueError, match="has ended yet"):
        cost.run_bench(cost.CostOptions(grid=folder))
