"""Real gloo ranks, killed, stopped, stuck or raising: all of them end, and one names the reason."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist

from mocov3_ds.distributed import heartbeat, ranks
from mocov3_ds.distributed.heartbeat_rules import Beat, Member
from mocov3_ds.distributed.processes import has_ended
from mocov3_ds.distributed.ranks import free_port
from mocov3_ds.faults import exit_status
from tests.ranks_pool import forks

WORLD = 3
STEP_OF_TROUBLE = 5
LIMIT_S = 10.0
"""Seconds of silence or of a stage for a rank that is to be found; no other one meets a limit."""


def run_rank(
    rank: int, port: int, folder: str, trouble: str, affected: int, silence_s: float = 300.0
) -> None:
    """A loop with a collective in each step; in one step, one rank has its trouble."""
    errors = (Path(folder) / f"{rank}.err").open("w")
    os.dup2(errors.fileno(), 2)
    sys.stderr = errors
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        ranks.start(timeout_s=100)
        heartbeat.start(LIMIT_S if trouble.startswith("hang") else 0.0, silence_s)
        if rank == 0:
            heartbeat.note_saved("step-00000003")
        heartbeat.explain_data(lambda: "decoding sample 17")
        for step in range(1, 500 if trouble != "none" else 9):
            heartbeat.enter_stage(step, "data")
            if step == STEP_OF_TROUBLE and rank == affected and trouble != "hang in the step":
                meet(trouble)
            if step == 10 * STEP_OF_TROUBLE and rank == affected:
                (Path(folder) / "now").touch()  # "outside": some beats after the first
            heartbeat.enter_stage(step, "step")
            if trouble == "hang in the step":
                if step == STEP_OF_TROUBLE and rank == affected:
                    meet("hang")
                add_up_as_nccl(torch.ones(1))
            else:
                ranks.all_reduce_sum(torch.ones(1))
            time.sleep(0.03)
        heartbeat.stop()
    except BaseException as error:
        os._exit(exit_status.report_failure(error))
    os._exit(0)


def add_up_as_nccl(x: torch.Tensor) -> None:
    """The collective returns at once, and code that is none waits for the value."""
    work = dist.all_reduce(x, async_op=True)
    assert work is not None
    while not work.is_completed():
        time.sleep(0.01)


def meet(trouble: str) -> None:
    match trouble:
        case "hang":
            time.sleep(1000)
        case "unreadable":
            raise SystemExit("rank 1, step 5: shard-7.tar is damaged")
        case "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")
        case "fault":
            raise KeyError("weight")
        case "all":
            raise ValueError("batch 7 cannot be.")


def run_rank_that_raises(
    rank: int, port: int, folder: str, trouble: str, affected: int, silence_s: float
) -> None:
    run_rank(rank, port, folder, trouble, rank, silence_s)


def outcome(
    folder: Path,
    trouble: str,
    affected: int,
    outside: signal.Signals | None = None,
    body: Callable[..., None] = run_rank,
) -> tuple[list[int | None], str]:
    """Exit codes of all ranks, and all that they said."""
    context = forks()
    port = free_port()
    silence_s = LIMIT_S if outside == signal.SIGSTOP else 300.0
    processes: list[BaseProcess] = [
        context.Process(target=body, args=(rank, port, str(folder), trouble, affected, silence_s))
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    try:
        if outside is not None:
            deadline = time.monotonic() + 120
            while not (folder / "now").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            number = processes[affected].pid
            assert number is not None
            os.kill(number, outside)
        deadline = time.monotonic() + 240
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return codes, "\n".join((folder / f"{rank}.err").read_text() for rank in range(WORLD))


AGAIN = "same command continues from the newest checkpoint, step-00000003 (1 step since then"
DIED = r"rank {} \(host \S+, pid \d+\) died without a word in step \d+, \w+: (killed|the kernel)"
SILENT = r"rank {} \(host \S+, pid \d+\) has been silent for \d+ s in step \d+, \w+: its process is"
CASES = {
    "killed": ("outside", 1, signal.SIGKILL, [75, -9, 75], DIED.format(1)),
    "first killed": ("outside", 0, signal.SIGKILL, [-9, 75, 75], DIED.format(0)),
    "stopped": ("outside", 2, signal.SIGSTOP, [75, 75, -9], SILENT.format(2)),
    "first stopped": ("outside", 0, signal.SIGSTOP, [-9, 75, 75], SILENT.format(0)),
    "hangs": (
        "hang", 1, None, [75, 75, 75],
        r"no progress for \d+ s \(limit 10 s, --hang_timeout\) in step 5, data: "
        r"rank 1 \(host \S+, pid \d+\) in meet \(test_heartbeat\.py:\d+\), decoding sample 17, "
        r"hangs\.",
    ),
    "hangs under NCCL": (
        "hang in the step", 1, None, [75, 75, 75],
        r"no progress for \d+ s \(limit 10 s, --hang_timeout\) in step 5, step: "
        r"rank 1 \(host \S+, pid \d+\) in meet \(test_heartbeat\.py:\d+\) hangs\.",
    ),
    "data": ("unreadable", 1, None, [1, 1, 1], r"rank 1, step 5: shard-7\.tar is damaged"),
    "data of the first": ("unreadable", 0, None, [1, 1, 1], r"shard-7\.tar is damaged"),
    "memory": ("memory", 2, None, [1, 1, 1], r"rank 2 .*out of memory \(CUDA .* 7 GiB\)"),
    "fault": ("fault", 1, None, [1, 1, 1], r"rank 1 .*KeyError: 'weight'"),
}  # fmt: skip


SLOW = {"hangs under NCCL"}
MARKED = [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES]


@pytest.mark.parametrize("case", MARKED)
def test_the_trouble_of_one_rank_ends_all_with_one_sentence(tmp_path: Path, case: str) -> None:
    trouble, affected, outside, expected_codes, words = CASES[case]
    codes, said = outcome(tmp_path, trouble, affected, outside)
    assert codes == expected_codes, said
    sentences = [line for line in said.splitlines() if line.startswith("train.py: error: ")]
    # of the end of rank 0 one rank of each host tells, and rank 1: here the same
    assert len(sentences) == 1, said
    assert re.search(words, sentences[0]), said
    # rank 0 alone knows of checkpoints; the others have heard of them by its beats
    assert (AGAIN if outside is None else AGAIN.partition("(")[0]) in sentences[0], said
    assert ("Traceback" in said) == (case == "fault"), said  # a fault of ours, to report


def test_what_all_ranks_meet_is_said_once_by_the_first(tmp_path: Path) -> None:
    codes, said = outcome(tmp_path, "all", 0, body=run_rank_that_raises)
    assert codes == [2, 2, 2], said
    assert said.strip() == "train.py: error: batch 7 cannot be."


def test_a_run_that_ends_well_says_nothing(tmp_path: Path) -> None:
    codes, said = outcome(tmp_path, "none", 0)
    assert codes == [0, 0, 0], said
    assert said.strip() == ""


def listen_without_a_processor(speaks: bool) -> None:
    """Each beat of the other rank comes while the thread, already behind, waits for its turn."""
    near, far = socket.socketpair()
    beat = json.dumps({"beat": vars(Beat())}).encode() + b"\n"
    now = 0.0
    looks = threading.Semaphore(0)

    def two_seconds_later() -> float:
        nonlocal now
        now += 2.0
        if speaks:
            far.sendall(beat)
        looks.release()
        return now

    with mock.patch.object(heartbeat.time, "monotonic", two_seconds_later):
        members = {near: Member(1, "elsewhere", 12, 0.0)}
        heart = heartbeat.Heart(Member(0, "here", 13, 0.0), members, silence_s=0.2)
        for _ in range(6):
            looks.acquire()
        heart.stop()
    os._exit(0)


@pytest.mark.parametrize(("speaks", "status"), [(True, 0), (False, 75)])
def test_what_waits_to_be_read_is_no_silence(speaks: bool, status: int) -> None:
    process = forks().Process(target=listen_without_a_processor, args=(speaks,))
    process.start()
    process.join(240)
    assert process.exitcode == status


def lose_launcher(step: int) -> None:
    """A rank whose launcher ends: before the loop it ends, too; within it, the main thread does."""
    launcher = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
    launcher.start()
    while not has_ended(psutil.Process(launcher.pid)):  # dead, but its status is not yet read
        time.sleep(0.05)
    gone = [("deepspeed (pid 7)", psutil.Process(launcher.pid))]
    with mock.patch.object(heartbeat, "STARTED_BY", gone):
        if step:
            with mock.patch.object(heartbeat.Heart, "_look_for_launchers"):
                heartbeat.start()
                heartbeat.enter_stage(step, "data")
        else:
            heartbeat.start()
    deadline = time.monotonic() + 240
    while not heartbeat.lost_launcher() and time.monotonic() < deadline:
        time.sleep(0.05)
    os._exit(9 if "its launcher, deepspeed (pid 7), is gone." in heartbeat.lost_launcher() else 1)


@pytest.mark.parametrize(("step", "status"), [(0, 75), (1, 9)])
def test_a_rank_may_save_when_its_launcher_is_gone(step: int, status: int) -> None:
    process = forks().Process(target=lose_launcher, args=(step,))
    process.start()
    process.join(300)
    assert process.exitcode == status


def test_one_rank_alone_has_a_heart(capfd: pytest.CaptureFixture[str]) -> None:
    assert heartbeat.report_failure(1, "no heart beats yet") is None
    assert heartbeat.lost_launcher() == ""
    heartbeat.note_saved("step-00000001")
    heartbeat.start()
    heartbeat.enter_stage(1, "data")
    assert heartbeat.report_failure(3, "the loss is nan.") == 3
    assert capfd.readouterr().err == "\ntrain.py: error: the loss is nan.\n"
    assert heartbeat.report_failure(1, "it has stopped") is None
