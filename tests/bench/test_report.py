"""Runs as the bench of a page writes them are runs that a page can be made of."""

from pathlib import Path

from mocov3_ds.bench.report import ReportOptions, write_runs
from mocov3_ds.stability.logs.find import find_runs


def test_runs_in_arms_of_ten_share_their_logs(tmp_path: Path) -> None:
    folders = write_runs(tmp_path / "runs", ReportOptions(runs=11, steps=1000, written=2))
    assert len({*folders}) == 11 and folders[10].name == "rate_1_seed_0"
    logs = {(folder / "metrics.jsonl").stat().st_ino for folder in folders}
    assert len(logs) == 2
    assert len((folders[0] / "metrics.jsonl").read_text().splitlines()) == 1001
    assert {run.path for run in find_runs(tmp_path / "runs")} == {*folders}
