"""A folder belongs to one grid, which may grow; and to one process at a time."""

import json
import os
import re
import socket
from pathlib import Path

import pytest

from mocov3_ds.data.storage.locks import take_lock
from mocov3_ds.stability.cells import read_grid_json
from mocov3_ds.stability.grid import load_grid
from mocov3_ds.stability.grid_folder import check_folder, folder_kept, prepare_folder
from tests.stability.small_grid import RATES, prepare


def prepare_file(folder: Path, path: Path, text: str, seeds: int | None = None) -> list[str]:
    """Prepare a folder for a grid of a file, and return all the cells that it holds then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    prepare_folder(folder, load_grid(str(path), "tiny", seeds), launcher="python", extra=())
    return [*read_grid_json(folder)["cells"]]


def titled(title: str, rates: str) -> str:
    return f'title = "{title}"\ntwins = false\nseeds = 1\n[axes]\nlr = [{rates}]\n'


def test_a_folder_takes_more_cells_but_no_other_flags(tmp_path: Path) -> None:
    names = prepare(tmp_path, RATES)
    more = prepare(tmp_path, RATES.replace("2.0", "0.75"))
    assert [*read_grid_json(tmp_path)["cells"]] == [*names, more[-1]]
    with pytest.raises(ValueError, match=r"another grid: cell .*--batch is None there, 64 here"):
        prepare(tmp_path, RATES + "\n[base]\nbatch = 64")
    with pytest.raises(ValueError, match=r"--ds optimizer is .* there, .*0\.9.* here"):
        prepare(tmp_path, RATES + "\n[base]\nbeta2 = 0.9")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/lock").write_text("")  # of a start that was killed early
    prepare(tmp_path / "other", RATES)
    (tmp_path / "third").mkdir()
    (tmp_path / "third/file").write_text("")
    with pytest.raises(ValueError, match="not empty and holds no grid"):
        prepare(tmp_path / "third", RATES)


def test_a_grid_that_is_edited_stays_itself(tmp_path: Path) -> None:
    """More seeds, other arms and another title, as long as a cell remains."""
    folder, path = tmp_path / "grid-tiny", tmp_path / "grid.toml"
    assert prepare_file(folder, path, titled("Rates", "1e-3")) == ["lr-0.001_seed-0"]
    assert len(prepare_file(folder, path, titled("Rates", "1e-3"), seeds=2)) == 2
    assert len(prepare_file(folder, path, titled("Good rates", "1e-3, 2e-3"), seeds=1)) == 3
    moved = tmp_path / "moved/grid.toml"
    assert len(prepare_file(folder, moved, titled("Good rates", "1e-3, 2e-3"), seeds=2)) == 4


@pytest.mark.parametrize(
    ("title", "rates", "reason"),
    [
        ("Rates", "3e-3", "they have no cell in common"),
        ("Other rates", "1e-3", "they have other titles"),
        (
            "Rates",
            "1e-3, 3e-3",
            "lr-0.002_seed-0 is a cell of the first alone, lr-0.003_seed-0 of the second",
        ),
    ],
)
def test_another_grid_of_that_name_is_refused(
    tmp_path: Path, title: str, rates: str, reason: str
) -> None:
    folder, mine, other = tmp_path / "grid-tiny", tmp_path / "a/grid.toml", tmp_path / "b/grid.toml"
    prepare_file(folder, mine, titled("Rates", "1e-3, 2e-3"))
    before = (folder / "grid.json").read_bytes()
    cells = rates.count(",") + 1
    sentence = (
        f"{folder} holds the grid 'Rates' of {mine} (2 cells), and the grid {title!r} of {other} "
        f"({cells} cell{'s' * (cells > 1)}) is another one: {reason}. Give --runs another folder, "
        "or the file another name."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        prepare_file(folder, other, titled(title, rates))
    assert (folder / "grid.json").read_bytes() == before


def test_a_folder_of_the_version_before_goes_by_its_title(tmp_path: Path) -> None:
    folder, path = tmp_path / "grid-tiny", tmp_path / "grid.toml"
    prepare_file(folder, path, titled("Rates", "1e-3, 2e-3"))
    tree = json.loads((folder / "grid.json").read_text())
    del tree["file"]
    (folder / "grid.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"holds the grid 'Rates' \(2 cells\), and the grid 'New'"):
        prepare_file(folder, path, titled("New", "1e-3"))
    assert len(prepare_file(folder, path, titled("Rates", "1e-3, 3e-3"))) == 3
    assert read_grid_json(folder)["file"] == str(path)


def test_nothing_is_made_where_a_folder_is_only_checked(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(RATES)
    assert check_folder(tmp_path / "none", load_grid(str(path), "tiny"), ()) == {}
    assert [item.name for item in tmp_path.iterdir()] == ["grid.toml"]


def test_the_second_process_is_told_who_has_the_folder(tmp_path: Path) -> None:
    with folder_kept(tmp_path):
        pass
    descriptor = os.open(tmp_path / "lock", os.O_RDWR)
    try:
        assert take_lock(descriptor, tmp_path)  # as another process would
        holder = {"host": "a-host", "pid": 17, "since": "noon"}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        with (
            pytest.raises(ValueError, match=r"in use by process 17 on a-host since noon, which tr"),
            folder_kept(tmp_path),
        ):
            raise AssertionError("it was kept twice")
    finally:
        os.close(descriptor)
    with folder_kept(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["host"] == socket.gethostname()
