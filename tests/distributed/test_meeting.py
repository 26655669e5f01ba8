"""Ranks meet: who is missing, twice there, or does not fit is said, and a held port is named."""

import re
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed.distributed_c10d import Store

from mocov3_ds.distributed import meeting
from mocov3_ds.distributed.meeting import (
    Newcomer,
    check_members,
    decode_newcomer,
    describe_connection_error,
    describe_missing,
    meet_ranks,
    open_store,
)
from tests.ranks_pool import forks


def newcomer(rank: int, world_size: int = 2, host: str = "here", device: str = "") -> Newcomer:
    return Newcomer(rank, world_size, host, 100 + rank, device)


def meet(*members: Newcomer, port: int) -> list[Future[Store]]:
    """Let all come at once, each in a thread."""
    with ThreadPoolExecutor(len(members)) as pool:
        return [
            pool.submit(meet_ranks, me, "localhost", port, hosted=False, attempt="0")
            for me in members
        ]


def test_ranks_that_have_met_share_a_store(free_port: int) -> None:
    stores = [met.result() for met in meet(newcomer(0), newcomer(1), port=free_port)]
    stores[0].set("word", "heard")
    assert stores[1].get("word") == b"heard"


def test_ranks_that_contradict_are_refused(free_port: int) -> None:
    first, second = meet(newcomer(0, device="GPU-7"), newcomer(1, device="GPU-7"), port=free_port)
    with pytest.raises(ValueError, match=r"rank 0 \(host here, pid 100\) and rank 1 .* one accel"):
        first.result()
    with pytest.raises(SystemExit, match="2"):  # rank 0 has said it
        second.result()


def test_the_second_of_one_number_is_refused(free_port: int) -> None:
    twin = newcomer(1)._replace(pid=999)
    first, *twins = meet(newcomer(0), newcomer(1), twin, port=free_port)
    first.result()
    errors = [str(t.exception()) for t in twins if t.exception()]
    assert len(errors) == 1
    assert re.search(r"rank 1 \(host here, pid \d+\) has come already, so process \d+", errors[0])


def test_members_of_one_run_fit() -> None:
    check_members([newcomer(0), newcomer(1)])
    check_members([newcomer(0, device="GPU-7"), newcomer(1, device="GPU-8")])
    check_members([newcomer(0, device="GPU-7"), newcomer(1, host="there", device="GPU-7")])
    with pytest.raises(ValueError, match=r"rank 1 .* started with WORLD_SIZE=3, rank 0 .* with 2:"):
        check_members([newcomer(0), newcomer(1, 3)])


def test_a_held_port_is_named() -> None:
    with socket.create_server(("", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"^port {port} of this machine is held .*--master_po"
        ):
            open_store("localhost", port, 2)


def test_who_comes_is_read_with_care() -> None:
    assert decode_newcomer(newcomer(1).encode().encode()) == newcomer(1)
    for text in (b"", b"1\n2\nhere\nx\n", b"1\n2\nhere", b"\xff" * 10_000, b"-1\n2\nhere\n3\n"):
        with pytest.raises(ValueError, match="is no rank"):
            decode_newcomer(text)


def test_what_is_missing_is_named() -> None:
    words = describe_missing([1, 3], 4, "MASTER_ADDR=node1 and MASTER_PORT=29500")
    assert words.startswith("ranks 1, 3 of 4 (missing: 2) did not come")
    assert "WORLD_SIZE=4, MASTER_ADDR=node1 and MASTER_PORT=29500" in words
    assert "rank 0, 1, 2, 3, 4, 5, 6, 7 and 92 more of 100" in describe_missing(
        range(100), 100, ""
    ).replace("ranks", "rank")


def test_reasons_are_short() -> None:
    assert describe_connection_error(ConnectionRefusedError(111, "x")) == "connection refused"
    assert describe_connection_error(socket.gaierror(-2, "x")) == "no machine of that name"
    assert describe_connection_error(TimeoutError("timed out")) == "connection timed out"


def wait_alone(rank: int, port: int, output: str) -> None:
    meeting.SPEAK_S, meeting.LIMIT_S = 0.2, 0.5
    with Path(output).open("w", buffering=1) as file:
        meeting.sys.stderr = file
        me = newcomer(rank)
        threading.Timer(240, meeting.os._exit, (7,)).start()
        meet_ranks(me, "localhost", port, hosted=False, attempt="0")


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, r"rank 1 of 2 \(missing: 1\) did not come; .* MASTER_ADDR=localhost and MASTER_PORT="),
        (1, r"rank 0 of 2 does not answer at MASTER_ADDR localhost, .* \(connection refused\)"),
    ],
)
def test_who_waits_says_for_what_and_gives_up(
    tmp_path: Path, free_port: int, rank: int, words: str
) -> None:
    output = tmp_path / "output"
    process = forks().Process(target=wait_alone, args=(rank, free_port, str(output)))
    process.start()
    process.join(240)
    assert process.exitcode == 75
    first, *_, last = output.read_text().splitlines()
    assert re.match(rf"rank {rank} has waited 0 s of 0 s: {words}", first)
    assert re.match(rf"train\.py: error: rank {rank} gives up after 1 s: {words}", last)
