"""The checkpoint benchmark: each way saves and trains on, and the table has its row."""

import contextlib
import io
from pathlib import Path

from mocov3_ds.bench import checkpoint
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.vit import VitShape
from tests.ranks_pool import run_ranks

SMALL = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=8, dim=24, depth=1, heads=3), hidden=32, out=16
)


def table(folder: str) -> str:
    options = checkpoint.CheckpointOptions(batch=4, repeats=1, folder=Path(folder))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        checkpoint.measure_saves(SMALL, options)
    return printed.getvalue()


def test_each_way_of_saving_has_its_row(tmp_path: Path) -> None:
    [printed] = run_ranks(1, table, str(tmp_path))
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0].partition(" ")[0].strip(",") for row in rows] == [
        "save",
        "foreground",
        "background",
        "background",
    ]
    assert all(len(row) == 7 for row in rows)
    for row in rows[1:]:
        stall, on_disk = float(row[1]), float(row[4])
        assert 0 <= stall <= on_disk + 0.1  # rounded to another place
    assert not list(tmp_path.iterdir())
