"""Reading checkpoints: each byte is verified, and a damaged one is never taken for a good one."""

import errno
import json
import logging
from pathlib import Path

import pytest

from mocov3_ds.checkpoints import checkpoint
from tests.checkpoints.saved import check_newest, save_step


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.find_newest(tmp_path) is None
    assert checkpoint.find_newest_on_all_ranks(tmp_path) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no state", "empty state"])
def test_a_damaged_folder_is_passed_over(tmp_path: Path, damage: str) -> None:
    save_step(tmp_path, 5)
    folder = save_step(tmp_path, 10)
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
    newest = checkpoint.find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 5
    save_step(tmp_path, 10)  # written again, it replaces the damaged one
    check_newest(tmp_path, {10})


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    save_step(tmp_path, 5)
    folder = save_step(tmp_path, 10)
    before = json.loads((folder / "state.json").read_text())
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for index in range(len(content)):
            flipped = bytearray(content)
            flipped[index] ^= 1 << index % 8
            path.write_bytes(flipped)
            newest = checkpoint.find_newest(tmp_path)
            assert newest is not None
            # white space between two values may become other white space
            assert newest.step == 5 or newest.state == before, (path.name, index)
        path.write_bytes(content)
    check_newest(tmp_path, {10})


def test_where_no_checkpoint_is_whole_nothing_starts_anew(tmp_path: Path) -> None:
    for step in (5, 10):
        (save_step(tmp_path, step) / "base-0.safetensors").write_bytes(b"")
    assert checkpoint.find_newest(tmp_path) is None
    with pytest.raises(
        ValueError, match=r"none of the 2 checkpoints of .* is whole .*move .* away"
    ):
        checkpoint.find_newest_on_all_ranks(tmp_path)


def rewrite_state(folder: Path, **changes: object) -> None:
    state = json.loads((folder / "state.json").read_text())
    state = {k: v for k, v in {**state, **changes}.items() if v is not None}
    if "digest" in state:
        state["digest"] = checkpoint.state_digest(state)
    (folder / "state.json").write_text(json.dumps(state))


def test_a_later_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    save_step(tmp_path, 5)
    rewrite_state(save_step(tmp_path, 10), format=checkpoint.FORMAT + 1, version="9.9")
    words = r"written by version 9\.9 in format 2; version .* reads up to format 1"
    with pytest.raises(checkpoint.CheckpointRefusedError, match=words):
        checkpoint.find_newest(tmp_path)
    with pytest.raises(ValueError, match=words):
        checkpoint.find_newest_on_all_ranks(tmp_path)


def test_a_format_that_is_no_number_is_damage(tmp_path: Path) -> None:
    save_step(tmp_path, 5)
    rewrite_state(save_step(tmp_path, 10), format="one")
    newest = checkpoint.find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 5


def test_a_checkpoint_from_before_the_format_number_is_read(tmp_path: Path) -> None:
    rewrite_state(save_step(tmp_path, 10), format=None, digest=None, optimizer_steps=None)
    newest = checkpoint.find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 10
    with pytest.raises(ValueError, match=r"written by version .* and lacks 'optimizer_steps'"):
        newest.state_value("optimizer_steps")


def test_a_forbidden_checkpoint_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 5)
    save_step(tmp_path, 10)

    def forbidden(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "digest_file", forbidden)
    with pytest.raises(ValueError, match=r"step-00000010 cannot be read: .*Permission denied"):
        checkpoint.find_newest(tmp_path)


def test_a_run_can_be_read_while_it_prunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_step(tmp_path, 5, keep=1)
    original = checkpoint.digest_file

    def as_the_run_goes_on(path: Path) -> str:
        if "step-00000005" in str(path) and path.exists():
            monkeypatch.setattr(checkpoint, "digest_file", original)
            save_step(tmp_path, 10, keep=1)
        return original(path)

    monkeypatch.setattr(checkpoint, "digest_file", as_the_run_goes_on)
    newest = checkpoint.find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 10
    assert not caplog.records


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_step(tmp_path, 5)
    newest = checkpoint.find_newest(tmp_path)
    assert newest is not None
    with pytest.raises(ValueError, match="has no base tensor 'other'"):
        newest.read_tensor("base", "other")


def test_numbers_as_keys_are_sealed_as_they_are_read(tmp_path: Path) -> None:
    state = {"optimizer_steps": 5, "bad_samples": {3: "damaged", 11: "cut", 1000: "cut"}}
    save_step(tmp_path, 5, state=state)
    newest = checkpoint.find_newest(tmp_path)
    assert newest is not None
    assert newest.state_value("bad_samples") == {"3": "damaged", "11": "cut", "1000": "cut"}
