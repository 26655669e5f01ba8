"""Checkpoints: whole or not at all, verified on reading, and a folder belongs to one run."""

import json
from pathlib import Path

import pytest
import torch

from mocov3_ds import checkpoint

WEIGHT = torch.arange(6.0).reshape(2, 3)


def write(run: Path, step: int, keep: int = 2) -> Path:
    groups = {"base": [("w", WEIGHT + step)], "optimizer": [("exp_avg/w", WEIGHT)]}
    return checkpoint.save(run, step, groups, {"optimizer_steps": step}, keep=keep)


def test_round_trip_and_keeping(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 15
    assert torch.equal(found.tensor("base", "w"), WEIGHT + 15)
    assert found.names("optimizer") == ["exp_avg/w"]
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000010", "step-00000015"]
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step-00000015"


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no state"])
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
    else:
        (folder / "state.json").unlink()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 5


def test_a_half_written_folder_is_never_picked(tmp_path: Path) -> None:
    write(tmp_path, 5)
    aside = tmp_path / "checkpoints/writing-00000010"
    aside.mkdir()
    (aside / "base-0.safetensors").write_bytes(b"half")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 5
    write(tmp_path, 10)  # and it is no obstacle
    assert not aside.exists()


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


def resolved(**changes: object) -> dict[str, object]:
    config = {"batch": 8, "epochs": 3, "model": {"dim": 16}, "data": {"threads": 1, "lanes": 4}}
    return {"config": {**config, **changes}, "deepspeed": {"optimizer": {"type": "AdamW"}}}


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint.claim_folder(run, resolved(), "data")
    checkpoint.claim_folder(run, resolved(save={"keep": 9}), "data")  # decides no number
    checkpoint.claim_folder(run, resolved(data={"threads": 7, "lanes": 4}), "data")
    before = (run / "config.json").read_text()
    with pytest.raises(ValueError, match=r"epochs is 3 there, 5 here.*--name"):
        checkpoint.claim_folder(run, resolved(epochs=5), "data")
    with pytest.raises(ValueError, match=r"model\.dim is 16 there, 32 here"):
        checkpoint.claim_folder(run, resolved(model={"dim": 32}), "data")
    with pytest.raises(ValueError, match="training shards is data there, other here"):
        checkpoint.claim_folder(run, resolved(), "other")
    assert (run / "config.json").read_text() == before
    assert json.loads(before)["data_digest"] == "data"


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no config\.json"):
        checkpoint.claim_folder(tmp_path, resolved(), "data")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
