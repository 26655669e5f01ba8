"""results.json and its table line."""

from pathlib import Path

import pytest

from mocov3_ds.evaluation import results


def test_entries_are_added_and_replaced(tmp_path: Path) -> None:
    assert results.read_results(tmp_path) == {}
    for top1 in (10.0, 71.234):
        results.record_result(tmp_path / "run", "knn", "base", {"top1": top1, "encoder": "x"})
    results.record_result(tmp_path / "run", "finetune", "base", {"top1": 90.0, "encoder": "x"})
    results.record_result(tmp_path / "run", "knn", "momentum", {"top1": 5.0, "encoder": "y"})
    assert len(results.read_results(tmp_path / "run")) == 3
    assert results.format_table(tmp_path / "run", "base").splitlines() == [
        *("| encoder | k-NN top-1 | linear top-1 | fine-tune top-1 |", "|---|---|---|---|"),
        "| x | 71.23 % | - | 90.00 % |",
    ]
    assert results.format_table(tmp_path / "run", "momentum").endswith("\n| y | 5.00 % | - | - |")
    assert results.format_table(tmp_path, "base") == ""
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    for text in ("{", "[1]", '{"a": {}}', '{"a": 1}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match="is no results file; move it away"):
            results.record_result(tmp_path, "knn", "base", {"top1": 1.0, "encoder": "x"})
        assert (tmp_path / "results.json").read_text() == text


def test_where_results_lie(tmp_path: Path) -> None:
    assert results.results_folder(tmp_path) == tmp_path
    file = tmp_path / "vit.pth.tar"
    assert results.results_folder(file) == tmp_path / "vit.pth.tar-evaluation"
