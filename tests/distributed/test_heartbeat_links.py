"""Connections of heartbeats: who is at the other end is known, and strangers are sent away."""

import contextlib
import json
import os
import socket
import threading

import psutil
import pytest

from mocov3_ds.distributed import heartbeat_links, ranks
from mocov3_ds.distributed.heartbeat_links import connect_ranks, encode_message
from mocov3_ds.distributed.heartbeat_rules import Member
from tests.ranks_pool import run_ranks


def me() -> Member:
    born = psutil.Process().create_time()
    return Member(ranks.rank(), socket.gethostname(), os.getpid(), born)


def greet_as_a_stranger(port: int) -> None:
    """Say nonsense, a wrong secret, and nothing at all, before any rank has connected."""
    for words in (b"GET / HTTP/1.1\n", encode_message({"token": "guess", "member": []}), b""):
        with (
            socket.create_connection(("127.0.0.1", port)) as stranger,
            contextlib.suppress(OSError),
        ):
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""


def connected() -> list[tuple[int, int, bytes]]:
    """Rank, process and first word of each peer; rank 0's port is found by a stranger as well."""
    strangers = []
    broadcast = ranks.broadcast_object

    def tell(address: tuple[str, int, str]) -> tuple[str, int, str]:
        host, port, token = broadcast(address)
        if ranks.is_first():
            strangers.append(threading.Thread(target=greet_as_a_stranger, args=(port,)))
            strangers[0].start()
        return host, port, token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat_links.ranks, "broadcast_object", tell)
        members = connect_ranks(me())
    peers = []
    for connection, member in members.items():
        connection.sendall(encode_message({"rank": ranks.rank()}))
        word = connection.recv(100)
        peers.append((member.rank, member.pid, json.loads(word)["rank"]))
        assert member.born == psutil.Process(member.pid).create_time()
    ranks.barrier()
    for connection in members:
        connection.close()
    for stranger in strangers:
        stranger.join()
    return sorted(peers)


def test_each_rank_is_connected_with_rank_0() -> None:
    first, second, third = run_ranks(3, connected)
    assert [(rank, word) for rank, _, word in first] == [(1, 1), (2, 2)]
    assert second == third
    assert [(rank, word) for rank, _, word in second] == [(0, 0)]


def test_one_rank_needs_no_connection() -> None:
    assert connect_ranks(me()) == {}


def test_an_address_that_nobody_listens_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = ranks.free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "broadcast_object", lambda _: ("localhost", port, "secret"))
    words = rf"rank 1 does not reach rank 0 at port {port} of 127\.0\.0\.1 or localhost \(.*refused"
    with pytest.raises(ValueError, match=words):
        connect_ranks(Member(1, "here", 7, 0.0))
