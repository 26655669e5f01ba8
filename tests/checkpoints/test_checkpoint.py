"""Checkpoints: whole or not at all at each moment, verified on reading, never lost for a new."""

import contextlib
import errno
import json
import logging
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mocov3_ds.checkpoints import checkpoint
from tests.disk import watched

WEIGHT = torch.arange(6.0).reshape(2, 3)


def write(run: Path, step: int, keep: int = 2, keep_every: int = 0) -> Path:
    groups = {"base": [("w", WEIGHT + step)], "optimizer": [("exp_avg/w", WEIGHT)]}
    return checkpoint.save(
        run, step, groups, {"optimizer_steps": step}, keep=keep, keep_every=keep_every
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def check_newest(run: Path, steps: set[int]) -> int:
    """Step of the newest whole checkpoint, after a look at its content and at `latest`."""
    found = checkpoint.newest(run)
    assert found is not None
    assert found.step in steps
    assert torch.equal(found.tensor("base", "w"), WEIGHT + found.step)
    pointer = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
    checkpoint.Checkpoint(pointer).verify()
    return found.step


def test_round_trip_and_keeping(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 15
    assert torch.equal(found.tensor("base", "w"), WEIGHT + 15)
    assert found.names("optimizer") == ["exp_avg/w"]
    assert names(tmp_path) == ["latest", "step-00000010", "step-00000015"]
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step-00000015"


def test_a_run_that_goes_another_way_leaves_no_later_checkpoint(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, step, keep=4)
    before = checkpoint.newest(tmp_path, before=15)
    assert before is not None
    assert before.step == 10
    assert checkpoint.newest(tmp_path, before=5) is None
    checkpoint.drop_after(tmp_path, 10)
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000010"]
    assert check_newest(tmp_path, {10}) == 10
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step-00000010"


def test_numbers_as_keys_are_sealed_as_they_are_read(tmp_path: Path) -> None:
    state = {"optimizer_steps": 5, "bad_samples": {3: "damaged", 11: "cut", 1000: "cut"}}
    checkpoint.save(tmp_path, 5, {"base": [("w", WEIGHT)]}, state, keep=2)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.value("bad_samples") == {"3": "damaged", "11": "cut", "1000": "cut"}


def test_every_nth_stays(tmp_path: Path) -> None:
    for step in range(5, 45, 5):
        write(tmp_path, step, keep=1, keep_every=15)
    assert [checkpoint.step_of(f) for f in checkpoint.folders(tmp_path)] == [15, 30, 40]


def test_a_run_that_went_back_forgets_what_it_left(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step, keep=3)
    write(tmp_path, 12, keep=3)
    assert [checkpoint.step_of(f) for f in checkpoint.folders(tmp_path)] == [5, 10, 12]
    check_newest(tmp_path, {12})


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest_of_all_ranks(tmp_path) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no state", "empty state"])
def test_a_damaged_folder_is_passed_over(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 5)
    folder = write(tmp_path, 10)
    file = folder / "base-0.safetensors"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "missing":
        file.unlink()
    elif damage == "no state":
        (folder / "state.json").unlink()
    else:
        (folder / "state.json").write_text("[]")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 5
    write(tmp_path, 10)  # done again, it takes the damaged one's place
    check_newest(tmp_path, {10})


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    write(tmp_path, 5)
    folder = write(tmp_path, 10)
    before = json.loads((folder / "state.json").read_text())
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            found = checkpoint.newest(tmp_path)
            assert found is not None
            # white space between two values may become other white space
            assert found.step == 5 or found.state == before, (path.name, place)
        path.write_bytes(content)
    check_newest(tmp_path, {10})


def test_where_no_checkpoint_is_whole_nothing_starts_anew(tmp_path: Path) -> None:
    for step in (5, 10):
        (write(tmp_path, step) / "base-0.safetensors").write_bytes(b"")
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(
        ValueError, match=r"none of the 2 checkpoints of .* is whole .*move .* away"
    ):
        checkpoint.newest_of_all_ranks(tmp_path)


def rewrite_state(folder: Path, **changes: object) -> None:
    state = json.loads((folder / "state.json").read_text())
    state = {k: v for k, v in {**state, **changes}.items() if v is not None}
    if "digest" in state:
        state["digest"] = checkpoint._seal(state)
    (folder / "state.json").write_text(json.dumps(state))


def test_a_later_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 5)
    rewrite_state(write(tmp_path, 10), format=checkpoint.FORMAT + 1, version="9.9")
    words = r"written by version 9\.9 in format 2; version .* reads up to format 1"
    with pytest.raises(checkpoint.Refused, match=words):
        checkpoint.newest(tmp_path)
    with pytest.raises(ValueError, match=words):
        checkpoint.newest_of_all_ranks(tmp_path)


def test_a_format_that_is_no_number_is_damage(tmp_path: Path) -> None:
    write(tmp_path, 5)
    rewrite_state(write(tmp_path, 10), format="one")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 5


def test_a_checkpoint_from_before_the_format_number_is_read(tmp_path: Path) -> None:
    rewrite_state(write(tmp_path, 10), format=None, digest=None, optimizer_steps=None)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 10
    with pytest.raises(ValueError, match=r"written by version .* and lacks 'optimizer_steps'"):
        found.value("optimizer_steps")


def test_a_forbidden_checkpoint_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10)

    def forbidden(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "digest", forbidden)
    with pytest.raises(ValueError, match=r"step-00000010 cannot be read: .*Permission denied"):
        checkpoint.newest(tmp_path)


def test_a_run_can_be_read_while_it_prunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 5, keep=1)
    whole = checkpoint.digest

    def as_the_run_goes_on(path: Path) -> str:
        if "step-00000005" in str(path) and path.exists():
            monkeypatch.setattr(checkpoint, "digest", whole)
            write(tmp_path, 10, keep=1)
        return whole(path)

    monkeypatch.setattr(checkpoint, "digest", as_the_run_goes_on)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 10
    assert not caplog.records


def test_large_groups_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PART_BYTES", 32)
    tensors = [(f"w{i}", WEIGHT + i) for i in range(5)]
    checkpoint.save(tmp_path, 1, {"base": tensors}, {}, keep=1)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert len(found.state["files"]) == 3
    for name, tensor in tensors:
        assert torch.equal(found.tensor("base", name), tensor)


def test_a_missing_tensor_is_told(tmp_path: Path) -> None:
    write(tmp_path, 5)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    with pytest.raises(ValueError, match="has no base tensor 'other'"):
        found.tensor("base", "other")


# ----------------------------------------------------------- kills, full disks and power cuts


def test_a_half_written_folder_is_never_picked(tmp_path: Path) -> None:
    write(tmp_path, 5)
    aside = tmp_path / "checkpoints/writing-00000010"
    aside.mkdir()
    (aside / "base-0.safetensors").write_bytes(b"half")
    check_newest(tmp_path, {5})
    write(tmp_path, 10)  # and it is no obstacle
    assert not aside.exists()
    aside.mkdir()
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000010"]


NEXT = [pytest.param(10, id="the next step"), pytest.param(5, id="the same step again")]


@pytest.mark.parametrize("step", NEXT)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """What is on disk before each operation is what a kill there would leave."""
    run, left = tmp_path / "run", tmp_path / "left"
    write(run, 3, keep=2)
    write(run, 5, keep=1)
    moments: list[str] = []

    def copy(operation: str, paths: tuple[str, ...]) -> None:
        moments.append(operation)
        shutil.copytree(run, left / f"{len(moments):03d}")

    with watched(copy, monkeypatch):
        write(run, step, keep=1)
    assert {"open", "rename", "remove", "rmdir", "mkdir", "fsync"} <= {*moments}
    found = set()
    for snapshot in sorted(left.iterdir()):
        checkpoint.sweep(snapshot)
        found.add(check_newest(snapshot, {5, step}))
        write(snapshot, 20, keep=1)
        assert names(snapshot) == ["latest", "step-00000020"]
    assert found == {5, step}


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("step", NEXT)
def test_a_disk_that_fails_at_any_moment_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, sticky: bool
) -> None:
    for moment in range(1000):
        run, count = tmp_path / str(moment), 0
        write(run, 5)

        def fail(operation: str, paths: tuple[str, ...], at: int = moment) -> None:
            nonlocal count
            count += 1
            if count == at + 1 or (sticky and count > at):
                raise OSError(errno.ENOSPC, "No space left on device")

        told = False
        with watched(fail, monkeypatch):
            try:
                write(run, step, keep=1)
            except ValueError as error:
                told = True
                assert "No space left on device" in str(error)
        if not sticky:
            assert not list((run / "checkpoints").glob("writing-*"))
        checkpoint.sweep(run)
        check_newest(run, {5, step} if told else {step})
        write(run, 20, keep=1)
        assert names(run) == ["latest", "step-00000020"]
        if count <= moment:
            break
    assert moment > 20


def test_everything_is_on_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, tuple[str, ...]]] = []
    write(tmp_path, 5)
    with watched(lambda operation, paths: log.append((operation, paths)), monkeypatch):
        folder = write(tmp_path, 10, keep=1)
    place = {entry: index for index, entry in enumerate(log)}
    parent, aside = folder.parent, str(folder).replace("step-", "writing-")
    named = place["rename", (aside, str(folder))]
    for file in folder.iterdir():
        # a file that is written aside and renamed is waited for under that name
        waited = [place.get(("fsync", (f"{aside}/{file.name}{end}",))) for end in ("", ".tmp")]
        assert any(at is not None and at < named for at in waited), file.name
    assert place["fsync", (aside,)] < named
    pointed = place["rename", (f"{parent}/latest.tmp", f"{parent}/latest")]
    of_parent = [i for i, entry in enumerate(log) if entry == ("fsync", (str(parent),))]
    assert any(named < i < pointed for i in of_parent)
    gone = place["rename", (f"{parent}/step-00000005", f"{parent}/gone-00000005")]
    assert any(pointed < i < gone for i in of_parent)


@contextlib.contextmanager
def largest_file(length: int) -> Iterator[None]:
    """Files of this process may be no longer, those that pytest writes among them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    write(tmp_path, 5)
    large = {"base": [("w", torch.zeros(100)), ("v", torch.zeros(1000))]}
    with pytest.raises(ValueError, match="File too large"), largest_file(1000):
        checkpoint.save(tmp_path, 10, large, {}, keep=1)
    check_newest(tmp_path, {5})
    assert names(tmp_path) == ["latest", "step-00000005"]
