"""Scalars of TensorBoard's page: files of one run are joined, and their names say what they are."""

from pathlib import Path

from mocov3_ds.stability.logs.find import find_runs, read_logs
from tests.stability.logs.test_find import put


def test_scalars_of_tensorboards_page_are_joined(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for name in ("run-sun-tag-train_loss", "run-sun-tag-val_acc (1)", "moon-tag-loss"):
            put(tmp_path / folder / f"{name}.csv", "Wall time,Step,Value\n1.5e9,1,2\n1.5e9,2,3\n")
    put(tmp_path / "a/run-.-tag-lr.csv", "Wall time,Step,Value\n1.5e9,1,2\n")
    tables = {table.name: table for table in read_logs(find_runs(tmp_path))}
    assert {name: list(table.columns) for name, table in tables.items()} == {
        "moon": ["Step", "loss"],
        "a": ["Step", "lr"],
        "sun": ["Step", "train_loss", "val_acc"],
        "b/moon": ["Step", "loss"],
        "b/sun": ["Step", "train_loss", "val_acc"],
    }
    assert tables["b/sun"].rows == 4
    [plain] = read_logs(find_runs(put(tmp_path / "c.csv", "Wall time,Step,Value\n1,1,2\n")))
    assert list(plain.columns) == ["Wall time", "Step", "Value"]  # its name tells no scalar
