"""Connections of heartbeats: who is at the other end is known, and strangers are sent away."""

import contextlib
import json
import os
import socket
import threading

import psutil
import pytest

from mocov3_ds.distributed import heartbeat_links, ranks
from mocov3_ds.distributed.heartbeat_links import (
    connect_ranks,
    encode_greeting,
    encode_message,
    welcome_ranks,
)
from mocov3_ds.distributed.heartbeat_rules import Member
from tests.ranks_pool import run_ranks


def me() -> Member:
    born = psutil.Process().create_time()
    return Member(ranks.rank(), socket.gethostname(), os.getpid(), born)


def greet_as_a_stranger(port: int) -> None:
    """Say nonsense, a wrong secret, and nothing at all, before any rank has connected."""
    greetings = (
        b"GET / HTTP/1.1\n",
        encode_greeting(Member(1, "here", 7, 0.0), "0" * 32),
        b"[" * 4000 + b"\n",  # no JSON is read before the secret
        b"x" * 100_000,
        b"",
    )
    for words in greetings:
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


def test_those_who_drip_hold_up_nobody_and_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_links, "_GREETERS", 3)
    first, token = Member(0, "here", 6, 0.0), "a" * 32
    with contextlib.ExitStack() as closing:
        server = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = server.getsockname()
        strangers = [
            closing.enter_context(socket.create_connection(address)) for _ in range(5)
        ]  # more than may wait at the door
        for stranger in strangers:
            stranger.sendall(b"a")
        rank = closing.enter_context(socket.create_connection(address))
        greeting = encode_greeting(Member(1, "there", 7, 2.0), token)
        rank.sendall(greeting[:40])
        sender = threading.Timer(0.5, rank.sendall, [greeting[40:]])
        sender.start()
        members = welcome_ranks(server, first, token, 1)
        sender.join()
        ((connection, member),) = members.items()
        closing.enter_context(connection)
        assert (member.rank, member.host, member.pid, member.born) == (1, "there", 7, 2.0)
        assert json.loads(rank.recv(100)) == {"member": ["here", 6, 0.0]}
        for stranger in strangers:
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1) == b""


def test_ranks_that_do_not_come_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_links, "_ACCEPT_S", 0.0)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ValueError, match=r"^2 ranks did not reach rank 0 at port \d+ of here"),
    ):
        welcome_ranks(server, Member(0, "here", 6, 0.0), "a" * 32, 2)
