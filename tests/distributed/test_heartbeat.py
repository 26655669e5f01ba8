"""Real gloo ranks, killed, stopped, stuck or raising: all of them end, and one names the reason."""

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
from types import SimpleNamespace
from typing import cast

import psutil
import pytest
import torch

from mocov3_ds.distributed import heartbeat, ranks
from mocov3_ds.distributed.heartbeat import Beat, Member
from mocov3_ds.faults import exit_status
from tests.ranks_pool import forks, free_port

WORLD = 3
STEP_OF_TROUBLE = 5


def one_rank(rank: int, port: int, folder: str, trouble: str, of_rank: int) -> None:
    """A loop with a collective in each step; in one step, one rank has its trouble."""
    place = Path(folder)
    words = (place / f"{rank}.err").open("w")
    os.dup2(words.fileno(), 2)
    sys.stderr = words
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        ranks.start(timeout_s=100)
        heartbeat.start(hang_timeout=3.0 if trouble == "hang" else 0.0, silence_s=5.0)
        for step in range(1, 500 if trouble != "none" else 9):
            heartbeat.at(step, "data")
            if step == STEP_OF_TROUBLE and rank == of_rank:
                have(trouble)
            if step == 10 * STEP_OF_TROUBLE and rank == of_rank:
                (place / "now").touch()  # "outside": some beats after the first
            heartbeat.at(step, "step")
            ranks.all_reduce_sum(torch.ones(1))
            time.sleep(0.03)
        heartbeat.stop()
    except BaseException as error:
        os._exit(exit_status.end(error))
    os._exit(0)


def have(trouble: str) -> None:
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


def everybody_raises(rank: int, port: int, folder: str, trouble: str, of_rank: int) -> None:
    one_rank(rank, port, folder, trouble, rank)


def outcome(
    folder: Path,
    trouble: str,
    of_rank: int,
    outside: signal.Signals | None = None,
    body: Callable[..., None] = one_rank,
) -> tuple[list[int | None], str]:
    """Exit codes of all ranks, and all that they said."""
    context = forks()
    port = free_port()
    processes: list[BaseProcess] = [
        context.Process(target=body, args=(rank, port, str(folder), trouble, of_rank))
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
            number = processes[of_rank].pid
            assert number is not None
            os.kill(number, outside)
        deadline = time.monotonic() + 60  # what the heartbeat promises
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return codes, "\n".join((folder / f"{rank}.err").read_text() for rank in range(WORLD))


AGAIN = "The same command continues from the newest checkpoint."
DIED = r"rank {} \(host \S+, pid \d+\) died without a word in step \d+, \w+: (killed|the kernel)"
SILENT = r"rank {} \(host \S+, pid \d+\) has been silent for \d+ s in step \d+, \w+: its process is"
CASES = {
    "killed": ("outside", 1, signal.SIGKILL, [75, -9, 75], DIED.format(1)),
    "first killed": ("outside", 0, signal.SIGKILL, [-9, 75, 75], DIED.format(0)),
    "stopped": ("outside", 2, signal.SIGSTOP, [75, 75, -9], SILENT.format(2)),
    "first stopped": ("outside", 0, signal.SIGSTOP, [-9, 75, 75], SILENT.format(0)),
    "hangs": (
        "hang", 1, None, [75, 75, 75],
        r"no progress for \d+ s \(limit 3 s, --hang_timeout\) in step 5, data: "
        r"rank 1 \(host \S+, pid \d+\) in have \(test_heartbeat\.py:\d+\) hangs\.",
    ),
    "data": ("unreadable", 1, None, [1, 1, 1], r"rank 1, step 5: shard-7\.tar is damaged"),
    "data of the first": ("unreadable", 0, None, [1, 1, 1], r"shard-7\.tar is damaged"),
    "memory": ("memory", 2, None, [1, 1, 1], r"rank 2 .*out of memory \(CUDA .* 7 GiB\)"),
    "fault": ("fault", 1, None, [1, 1, 1], r"rank 1 .*KeyError: 'weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_trouble_of_one_rank_ends_all_with_one_sentence(tmp_path: Path, case: str) -> None:
    trouble, of_rank, outside, codes, words = CASES[case]
    found, said = outcome(tmp_path, trouble, of_rank, outside)
    assert found == codes, said
    sentences = [line for line in said.splitlines() if line.startswith("train.py: error: ")]
    # of the end of rank 0 one rank of each host tells, and rank 1: here the same
    assert len(sentences) == 1, said
    assert re.search(words, sentences[0]), said
    assert sentences[0].endswith(AGAIN), said
    assert ("Traceback" in said) == (case == "fault"), said  # a fault of ours, to report


def test_what_all_ranks_meet_is_said_once_by_the_first(tmp_path: Path) -> None:
    codes, said = outcome(tmp_path, "all", 0, body=everybody_raises)
    assert codes == [2, 2, 2], said
    assert said.strip() == "train.py: error: batch 7 cannot be."


def test_a_run_that_ends_well_says_nothing(tmp_path: Path) -> None:
    codes, said = outcome(tmp_path, "none", 0)
    assert codes == [0, 0, 0], said
    assert said.strip() == ""


def member(rank: int, **beat: object) -> Member:
    return Member(rank, "host", 100 + rank, 0.0, Beat(**beat))  # type: ignore[arg-type]


@pytest.mark.parametrize(("step", "condemned"), [(0, False), (1, False), (2, True), (7, True)])
def test_a_rank_that_was_silent_from_the_start_of_the_loop_on_has_no_longer(
    step: int, condemned: bool
) -> None:
    """It has not yet said that it is in the loop; who is in the second step knows that it is."""
    silent = Member(1, "here", 12, 0.0, heard=10.0)
    said: list[str] = []
    heart = SimpleNamespace(
        me=Member(2, "here", 13, 0.0), _members={"connection": silent}, _step=step,
        _silence_s=20.0, _clock=35.0, _given_up=None, _verdict=threading.Event(), _launchers=[],
        _charges=[], _condemn=lambda _status, sentence, _stopped: said.append(sentence),
    )  # fmt: skip
    heartbeat.Heart._judge(cast(heartbeat.Heart, heart))
    assert bool(said) is condemned
    assert not said or "has been silent for 25 s in the start" in said[0]


def test_only_the_rank_that_others_wait_for_can_hang() -> None:
    waiting = member(0, step=7, stage="step", seconds=500.0, limit=40.0, waits=True)
    reading = member(1, step=7, stage="data", seconds=500.0, limit=960.0)
    assert heartbeat.hang_sentence([waiting, reading]) is None
    reading.beat.seconds = 961.0
    words = heartbeat.hang_sentence([waiting, reading])
    assert words is not None
    assert "no progress for 961 s (limit 960 s, --hang_timeout) in step 7, data: rank 1" in words
    assert "rank 0" not in words
    # looking at the features, and starting, may take for ever
    assert heartbeat.hang_sentence([member(0, step=7, stage="look", seconds=1e6)]) is None


def test_limits_follow_the_longest_of_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCOV3_STORAGE_PATIENCE_S", "100")
    heart = heartbeat.Heart()
    heart._thread.join(0)
    try:
        limits = []
        for step in range(1, 5):
            heart.at(step, "data")
            limits.append(heart.limit())
            heart.at(step, "step")
            limits.append(heart.limit())
            heart._clock += 30.0
    finally:
        heart.stop()
    # the first two of each kind may take an hour; later ten times the longest, or the least
    assert limits[:4] == [3600.0] * 4
    assert limits[4] == 160.0
    assert 300.0 <= limits[5] < 310.0
    given = heartbeat.Heart(hang_timeout=5.0)
    given.at(1, "step")
    assert given.limit() == 5.0
    given.stop()


def test_the_word_on_a_death_tells_an_out_of_memory_kill() -> None:
    dead = member(1, step=3, stage="step", used_gib=30.0, free_gib=0.2, oom_kills=4)
    assert "out-of-memory killer struck" in heartbeat.death_sentence(dead, here=True, oom_kills=5)
    for here, kills in ((True, 4), (False, 5)):
        words = heartbeat.death_sentence(dead, here=here, oom_kills=kills)
        assert "killed, or crashed in native code; it used 30.0 GiB and its host had 0.2" in words


def test_no_other_process_of_the_same_number_is_killed() -> None:
    me = psutil.Process()
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    assert child.pid is not None
    born = psutil.Process(child.pid).create_time()
    heartbeat._kill(socket.gethostname(), child.pid, born + 1.0)
    heartbeat._kill("elsewhere", child.pid, born)
    heartbeat._kill(socket.gethostname(), me.pid, me.create_time())
    assert child.is_alive()
    heartbeat._kill(socket.gethostname(), child.pid, born)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
