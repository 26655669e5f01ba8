"""Checkpoints behind the training: what was handed over is what is written, and trouble is told."""

import errno
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mocov3_ds.checkpoints import checkpoint, checkpoint_writer, run_folder
from mocov3_ds.checkpoints.saver import Saver
from mocov3_ds.distributed import heartbeat, ranks
from tests.ranks_pool import run_ranks

SIZE = 64
FILE_BYTES = SIZE * 4  # bytes of a tensor, and of a file in these tests


def weights(step: int, count: int = 6) -> list[tuple[str, Tensor]]:
    return [(f"w{i}", torch.full((SIZE,), 100.0 * step + i)) for i in range(count)]


def check(run: Path, step: int) -> None:
    found = checkpoint.find_newest(run)
    assert found is not None
    assert found.step == step
    for name, tensor in weights(step):
        assert torch.equal(found.read_tensor("base", name), tensor)


def small_saver(run: Path, host_bytes: int = 2**20) -> Saver:
    """A saver that writes a file for each tensor."""
    return Saver(run, keep=2, host_bytes=host_bytes, file_bytes=FILE_BYTES)


class SlowDisk:
    """Holds the writing of files until it is opened; what a slow disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.waiting = threading.Event(), threading.Event()
        self.threads: set[str] = set()
        self.written = 0
        write = checkpoint_writer.save_file

        def slow(tensors: dict[str, Tensor], path: str) -> None:
            self.threads.add(threading.current_thread().name)
            self.waiting.set()
            assert self.open.wait(240)
            write(tensors, path)
            self.written += 1

        monkeypatch.setattr(checkpoint_writer, "save_file", slow)


def full_disk(monkeypatch: pytest.MonkeyPatch, first: int = 2) -> Callable[[], None]:
    """From file `first` of a checkpoint on, the disk is full, until what is returned is called."""
    write = checkpoint_writer.save_file

    def fail(tensors: dict[str, Tensor], path: str) -> None:
        if path.endswith(f"base-{first}.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint_writer, "save_file", fail)
    return lambda: monkeypatch.setattr(checkpoint_writer, "save_file", write)


def test_a_save_in_the_background_holds_what_was_there_when_it_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, saver, tensors = SlowDisk(monkeypatch), small_saver(tmp_path), weights(5)
    seconds = saver.save(5, {"base": tensors}, {"a": 1}, background=True)
    assert seconds >= 0
    for _, tensor in tensors:
        tensor.zero_()  # the next step
    assert checkpoint.find_newest(tmp_path) is None
    disk.open.set()
    saver.close()
    check(tmp_path, 5)
    assert disk.threads == {"checkpoint"}
    saver.save(6, {"base": weights(6)}, {}, background=False)
    check(tmp_path, 6)
    assert "MainThread" in disk.threads


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, saver = SlowDisk(monkeypatch), small_saver(tmp_path)
    saver.save(5, {"base": weights(5)}, {}, background=True)
    assert disk.waiting.wait(240)
    seen: list[int] = []

    def gathered() -> Iterator[tuple[str, Tensor]]:
        found = checkpoint.find_newest(tmp_path)
        seen.append(-1 if found is None else found.step)
        yield from weights(6)

    threading.Timer(0.2, disk.open.set).start()
    saver.save(6, {"base": gathered()}, {}, background=True)
    assert seen == [5]
    saver.close()
    check(tmp_path, 6)


def test_where_no_thread_can_start_the_checkpoint_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    noted: list[str] = []
    monkeypatch.setattr(heartbeat, "note_saved", noted.append)
    monkeypatch.setattr(threading.Thread, "start", start)
    saver = small_saver(tmp_path)
    saver.save(3, {"base": weights(3)}, {}, background=True)
    check(tmp_path, 3)
    assert noted == ["step-00000003"]  # for the exit message
    assert "is written before going on: can't start new thread" in caplog.text
    saver.close()


def test_copies_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, saver = SlowDisk(monkeypatch), small_saver(tmp_path, host_bytes=3 * FILE_BYTES)
    ahead: list[int] = []  # files gathered but not yet written, whenever a tensor is asked for

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for i, named in enumerate(weights(5, count=20)):
            ahead.append(i - disk.written)
            yield named

    saving = threading.Thread(
        target=saver.save, args=(5, {"base": gathered()}, {}), kwargs={"background": True}
    )
    saving.start()
    assert disk.waiting.wait(240)
    while len(ahead) < 4:
        time.sleep(0.01)
    disk.open.set()
    saving.join()
    saver.close()
    # one file is being written and two wait; a fourth is gathered and finds no room
    assert len(ahead) == 20
    assert max(ahead) == 3
    check(tmp_path, 5)


def test_one_file_may_be_larger_than_the_bound(tmp_path: Path) -> None:
    saver = small_saver(tmp_path, host_bytes=0)
    saver.save(5, {"base": weights(5)}, {}, background=True)
    saver.close()
    check(tmp_path, 5)


def test_trouble_in_the_background_is_told_and_the_next_save_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    let_it_work, saver = full_disk(monkeypatch), small_saver(tmp_path)
    saver.save(4, {"base": weights(4, 2)}, {}, background=True)  # fits
    saver.save(5, {"base": weights(5)}, {}, background=True)
    saver.close()
    assert "checkpoint of step 5 could not be written: [Errno 28] No space left" in caplog.text
    assert "GB are free there" in caplog.text
    with pytest.raises(ValueError, match=r"step 6 could not be written.*stays in force"):
        saver.save(6, {"base": weights(6)}, {}, background=True)
    assert [checkpoint.step_in_name(f) for f in checkpoint.list_checkpoints(tmp_path)] == [4]
    let_it_work()
    saver.save(7, {"base": weights(7)}, {}, background=True)
    check(tmp_path, 7)  # waited for, since the one before had failed
    saver.save(8, {"base": weights(8)}, {}, background=True)
    saver.close()
    check(tmp_path, 8)


def test_a_fault_of_the_program_in_the_background_is_told_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any) -> None:
        raise KeyError("fault")

    saver = small_saver(tmp_path)
    monkeypatch.setattr(checkpoint_writer, "digest_file", fault)
    saver.save(5, {"base": weights(5)}, {}, background=True)
    with pytest.raises(ValueError, match="KeyError: 'fault'"):
        saver.save(6, {"base": weights(6)}, {}, background=True)


def test_a_gather_that_fails_leaves_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def gathered() -> Iterator[tuple[str, Tensor]]:
        yield from weights(6, 3)
        raise RuntimeError("a rank died")

    saver = small_saver(tmp_path)
    saver.save(5, {"base": weights(5)}, {}, background=True)
    with pytest.raises(RuntimeError, match="a rank died"):
        saver.save(6, {"base": gathered()}, {}, background=True)
    saver.close()
    check(tmp_path, 5)
    assert "step 6 could not be written: the tensors were not all gathered" in caplog.text
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000005"]


def test_a_folder_that_is_no_longer_ours_is_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_folder.lock_folder(run)
    saver = small_saver(run)
    (run / "lock").unlink()
    with pytest.raises(ValueError, match="was removed or replaced while this process worked on it"):
        saver.save(5, {"base": weights(5)}, {}, background=False)
    assert not list(run.iterdir())
    run_folder.unlock_folder(run)


def on_each_rank(folder: str) -> dict[str, Any]:
    """Saves on several ranks: one that works, one that fails behind the training, the next."""
    logging.disable(logging.CRITICAL)
    run, said = Path(folder), []
    saver = small_saver(run)

    def gathered(step: int) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights(step):
            # each rank brings a part of it, as a sharded optimizer does
            yield name, ranks.all_reduce_sum(tensor / ranks.world_size())

    saver.save(5, {"base": gathered(5)}, {}, background=True)
    saver.close()
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch)
        saver.save(6, {"base": gathered(6)}, {}, background=True)
        for step in (7, 8):
            try:
                saver.save(step, {"base": gathered(step)}, {}, background=True)
            except ValueError as error:
                said.append(str(error))
    found = checkpoint.find_newest_on_all_ranks(run)
    assert found is not None
    in_force = found.step
    saver.save(9, {"base": gathered(9)}, {}, background=True)
    saver.close()
    ranks.barrier()
    found = checkpoint.find_newest_on_all_ranks(run)
    assert found is not None
    return {"said": said, "in force": in_force, "last": found.step}


def test_all_ranks_hear_of_trouble_on_the_first(tmp_path: Path) -> None:
    first, second = run_ranks(2, on_each_rank, str(tmp_path))
    assert first == second
    assert first["in force"] == 5
    assert first["last"] == 9
    assert [words.partition(" could")[0] for words in first["said"]] == [
        "the checkpoint of step 7",
        "the checkpoint of step 8",
    ]
    check(tmp_path, 9)
    state = json.loads((tmp_path / "checkpoints/step-00000009/state.json").read_text())
    assert sorted(state["files"]) == [f"base-{i}.safetensors" for i in range(6)]
