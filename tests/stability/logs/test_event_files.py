"""TensorBoard's event files as torch writes them, whole, in two sittings, cut short and damaged."""

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from mocov3_ds.stability.logs.event_files import PATTERN, read_events
from mocov3_ds.stability.logs.find import find_runs, read_logs
from mocov3_ds.stability.logs.foreign import read_foreign_run


def write_sitting(folder: Path, first: int, last: int, suffix: str) -> None:
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        writer.add_text("words", "no number")
        for step in range(first, last):
            writer.add_scalar("train/loss", 10 - step, step, new_style=step % 2 == 0)
        writer.add_scalar("val/knn", last, last - 1)


def test_two_sittings_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "board"
    write_sitting(folder, 1, 7, ".a")
    first = next(folder.glob(PATTERN))
    first.rename(folder / "events.out.tfevents.0000000001.a")
    write_sitting(folder, 5, 9, ".b")
    [table] = read_logs(find_runs(tmp_path))
    series = read_foreign_run(table).series
    assert table.name == "board" and not table.notes
    assert series.steps_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert series.loss_T.tolist() == [9, 8, 7, 6, 5, 4, 3, 2]
    assert series.knn_steps_K.tolist() == [6, 8] and series.knn_K.tolist() == [7, 9]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_what_stands_before_the_damage_is_kept(tmp_path: Path, damage: str) -> None:
    write_sitting(tmp_path, 0, 100, "")
    path = next(tmp_path.glob(PATTERN))
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] if damage == "cut" else data[:half] + b"~~" + data[half + 2 :])
    table = read_events(tmp_path, [path])
    assert 30 < len(table.columns["train/loss"].rows_M) < 70
    assert table.notes == ["1 file cut short or damaged"]


def test_no_scalar(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(b"no events at all" * 10)
    with pytest.raises(ValueError, match="without a scalar"):
        read_events(tmp_path, [path])
