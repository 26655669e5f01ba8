"""Writing checkpoints: complete or absent at each moment, and never lost for a new one."""

import errno
import re
import shutil
from pathlib import Path

import pytest
import torch

from mocov3_ds.checkpoints import checkpoint, checkpoint_writer
from mocov3_ds.checkpoints.saver import Saver
from tests.checkpoints.saved import WEIGHT, check_newest, file_names, save_step, steps_on_disk
from tests.disk import largest_file, watched


def test_round_trip_and_keeping(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_step(tmp_path, step)
    newest = checkpoint.find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 15
    assert torch.equal(newest.read_tensor("base", "w"), WEIGHT + 15)
    assert newest.tensor_names("optimizer") == ["exp_avg/w"]
    assert file_names(tmp_path) == ["latest", "step-00000010", "step-00000015"]
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step-00000015"


def test_a_run_that_goes_another_way_leaves_no_later_checkpoint(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save_step(tmp_path, step, keep=4)
    before = checkpoint.find_newest(tmp_path, before=15)
    assert before is not None
    assert before.step == 10
    assert checkpoint.find_newest(tmp_path, before=5) is None
    checkpoint_writer.remove_checkpoints_after(tmp_path, 10)
    assert file_names(tmp_path) == ["latest", "step-00000005", "step-00000010"]
    assert check_newest(tmp_path, {10}) == 10
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step-00000010"


def test_every_nth_stays(tmp_path: Path) -> None:
    for step in range(5, 45, 5):
        save_step(tmp_path, step, keep=1, keep_every=15)
    assert steps_on_disk(tmp_path) == [15, 30, 40]


def test_a_run_that_went_back_forgets_what_it_left(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_step(tmp_path, step, keep=3)
    save_step(tmp_path, 12, keep=3)
    assert steps_on_disk(tmp_path) == [5, 10, 12]
    check_newest(tmp_path, {12})


def test_large_groups_are_written_in_several_files(tmp_path: Path) -> None:
    tensors = [(f"w{i}", WEIGHT + i) for i in range(5)]
    saver = Saver(tmp_path, keep=1, file_bytes=32)
    saver.save(1, {"base": tensors}, {}, background=False)
    newest = checkpoint.find_newest(tmp_path)
    assert newest is not None
    assert len(newest.state["files"]) == 3
    for name, tensor in tensors:
        assert torch.equal(newest.read_tensor("base", name), tensor)


# ----------------------------------------------------------- kills, full disks and power cuts


def test_a_half_written_folder_is_never_picked(tmp_path: Path) -> None:
    save_step(tmp_path, 5)
    temporary = tmp_path / "checkpoints/writing-00000010"
    temporary.mkdir()
    (temporary / "base-0.safetensors").write_bytes(b"half")
    check_newest(tmp_path, {5})
    save_step(tmp_path, 10)  # and it is no obstacle
    assert not temporary.exists()
    temporary.mkdir()
    checkpoint_writer.remove_leftovers(tmp_path)
    assert file_names(tmp_path) == ["latest", "step-00000005", "step-00000010"]


NEXT = [pytest.param(10, id="the next step"), pytest.param(5, id="the same step again")]


@pytest.mark.parametrize("step", NEXT)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """What is on disk before each operation is what a kill there would leave."""
    run, snapshots = tmp_path / "run", tmp_path / "snapshots"
    save_step(run, 3, keep=2)
    save_step(run, 5, keep=1)
    moments: list[str] = []

    def copy(operation: str, paths: tuple[str, ...]) -> None:
        moments.append(operation)
        shutil.copytree(run, snapshots / f"{len(moments):03d}")

    with watched(copy, monkeypatch):
        save_step(run, step, keep=1)
    assert {"open", "rename", "remove", "rmdir", "mkdir", "fsync"} <= {*moments}
    picked = set()
    for snapshot in sorted(snapshots.iterdir()):
        checkpoint_writer.remove_leftovers(snapshot)
        picked.add(check_newest(snapshot, {5, step}))
        save_step(snapshot, 20, keep=1)
        assert file_names(snapshot) == ["latest", "step-00000020"]
    assert picked == {5, step}


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("step", NEXT)
def test_a_disk_that_fails_at_any_moment_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, sticky: bool
) -> None:
    for moment in range(1000):
        run, count = tmp_path / str(moment), 0
        save_step(run, 5)

        def fail(operation: str, paths: tuple[str, ...], failing: int = moment) -> None:
            nonlocal count
            count += 1
            if count == failing + 1 or (sticky and count > failing):
                raise OSError(errno.ENOSPC, "No space left on device")

        refused = False
        with watched(fail, monkeypatch):
            try:
                save_step(run, step, keep=1)
            except ValueError as error:
                refused = True
                assert "No space left on device" in str(error)
        if not sticky:
            assert not list((run / "checkpoints").glob("writing-*"))
        checkpoint_writer.remove_leftovers(run)
        check_newest(run, {5, step} if refused else {step})
        save_step(run, 20, keep=1)
        assert file_names(run) == ["latest", "step-00000020"]
        if count <= moment:
            break
    assert moment > 20


def test_everything_is_on_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, tuple[str, ...]]] = []
    save_step(tmp_path, 5)

    def note(operation: str, paths: tuple[str, ...]) -> None:
        # the name of a temporary file has a random part
        plain = tuple(re.sub(r"\.\d+-[0-9a-f]{8}\.tmp$", ".tmp", path) for path in paths)
        log.append((operation, plain))

    with watched(note, monkeypatch):
        folder = save_step(tmp_path, 10, keep=1)
    position = {entry: index for index, entry in enumerate(log)}
    parent, temporary = folder.parent, str(folder).replace("step-", "writing-")
    named = position["rename", (temporary, str(folder))]
    for file in folder.iterdir():
        # a file that is written under another name and renamed is synced under that name
        synced = [
            position.get(("fsync", (f"{temporary}/{file.name}{end}",))) for end in ("", ".tmp")
        ]
        assert any(p is not None and p < named for p in synced), file.name
    assert position["fsync", (temporary,)] < named
    pointed = position["rename", (f"{parent}/latest.tmp", f"{parent}/latest")]
    of_parent = [i for i, entry in enumerate(log) if entry == ("fsync", (str(parent),))]
    assert any(named < i < pointed for i in of_parent)
    removed = position["rename", (f"{parent}/step-00000005", f"{parent}/gone-00000005")]
    assert any(pointed < i < removed for i in of_parent)


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    save_step(tmp_path, 5)
    large = {"base": [("w", torch.zeros(100)), ("v", torch.zeros(1000))]}
    with pytest.raises(ValueError, match="File too large"), largest_file(1000):
        Saver(tmp_path, keep=1).save(10, large, {}, background=False)
    check_newest(tmp_path, {5})
    assert file_names(tmp_path) == ["latest", "step-00000005"]
