"""The connections that heartbeats go through: one TCP connection from each rank to rank 0.

Messages are JSON objects, one per line. Rank 0 tells all ranks its port and a secret by a broadcast
of the process group. A greeting begins with the secret, and nothing behind it is looked at before
the secret is right; whoever else finds the port is sent away, and holds up nobody. Where the ranks
meet at an address of this machine alone (127.0.0.1), the port is open to this machine alone.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import time
from dataclasses import dataclass
from typing import Any

from mocov3_ds.distributed import host_memory, ranks
from mocov3_ds.distributed.heartbeat_rules import Member

_ACCEPT_S = 60.0  # that rank 0 waits for the next rank
_CONNECT_S = 30.0
_GREETING_S = 10.0  # for a whole greeting
_GREETING_BYTES = 4096
_GREETERS = 64  # strangers at the door, beside the ranks
_SEND_S = 1.0  # longest time that a heartbeat waits for one connection


def connect_ranks(me: Member) -> dict[socket.socket, Member]:
    """Connect this rank with rank 0, or rank 0 with all others; all ranks must call.

    Args:
        me: Identity of this rank, sent as a greeting.

    Returns:
        Connection -> rank at its other end: all others on rank 0, rank 0 on the others.

    Raises:
        ValueError: A rank cannot connect to rank 0.
    """
    if ranks.world_size() == 1:
        return {}
    token = secrets.token_hex(16)
    address = os.environ.get("MASTER_ADDR", "")
    server = _open_server(address, ranks.world_size()) if ranks.is_first() else None
    port = server.getsockname()[1] if server is not None else 0
    host, port, token = ranks.broadcast_object((me.host, port, token))
    members: dict[socket.socket, Member] = {}
    if server is not None:
        with server:
            members = welcome_ranks(server, me, token, ranks.world_size() - 1)
    else:
        connection = _connect_to_first([address or host, host], port)
        connection.sendall(encode_greeting(me, token))
        members[connection] = Member(0, *json.loads(_read_line(connection))["member"])
    for connection, member in members.items():
        connection.settimeout(_SEND_S)
        member.beat.oom_kills = host_memory.count_oom_kills()
    return members


def _identity(member: Member) -> tuple[str, int, float]:
    return member.host, member.pid, member.born


def encode_greeting(me: Member, token: str) -> bytes:
    """Return the first line that a rank sends to rank 0.

    Args:
        me: Identity of the rank that sends it.
        token: Secret of the run.
    """
    return token.encode() + encode_message({"member": [me.rank, *_identity(me)]})


@dataclass
class _Greeter:
    """Somebody at the door who has not yet said all."""

    deadline: float
    said: bytes = b""

    def read(self, connection: socket.socket, token: str) -> Member | None:
        """Take in what has come; return who it is once that is known.

        Raises:
            OSError: It is a stranger, or has gone.
        """
        data = connection.recv(_GREETING_BYTES)
        self.said += data
        secret = self.said[: len(token)]
        if not data or len(self.said) > _GREETING_BYTES:
            raise OSError("no greeting")
        if len(secret) == len(token) and not secrets.compare_digest(secret, token.encode()):
            raise OSError("not of this run")
        if not self.said.endswith(b"\n") or len(secret) < len(token):
            return None
        return Member(*json.loads(self.said[len(token) :])["member"])


def welcome_ranks(
    server: socket.socket, me: Member, token: str, count: int
) -> dict[socket.socket, Member]:
    """Let all other ranks in, in whatever order they come, and no stranger.

    Args:
        server: Socket that they connect to.
        me: Rank 0, which tells the others who it is.
        token: Secret of the run.
        count: Number of the other ranks.

    Raises:
        ValueError: For a minute none has come, and some are missing.
    """
    members: dict[socket.socket, Member] = {}
    greeters: dict[socket.socket, _Greeter] = {}
    last = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while len(members) < count:
            for key, _ in selector.select(0.5):
                if key.fileobj is server:
                    connection, _ = server.accept()
                    connection.setblocking(False)
                    selector.register(connection, selectors.EVENT_READ, connection)
                    greeters[connection] = _Greeter(time.monotonic() + _GREETING_S)
                elif (member := _hear_greeter(key.data, greeters[key.data], me, token)) is None:
                    continue
                else:
                    members[key.data], last = member, time.monotonic()
                    selector.unregister(key.data)
                    del greeters[key.data]
            _send_away(selector, greeters, count)
            if time.monotonic() - last > _ACCEPT_S:
                raise ValueError(
                    f"{count - len(members)} ranks did not reach rank 0 at port "
                    f"{server.getsockname()[1]} of {me.host} within {_ACCEPT_S:.0f} s; TCP "
                    "connections between the hosts must be allowed."
                )
        for connection in greeters:
            connection.close()
    return members


def _hear_greeter(
    connection: socket.socket, greeter: _Greeter, me: Member, token: str
) -> Member | None:
    """Return who is at the other end once it has said so; a stranger's time is over at once."""
    try:
        member = greeter.read(connection, token)
        if member is not None:
            connection.settimeout(_SEND_S)
            connection.sendall(encode_message({"member": _identity(me)}))
    except (OSError, ValueError, KeyError, TypeError):
        greeter.deadline = 0.0
        return None
    return member


def _send_away(
    selector: selectors.BaseSelector, greeters: dict[socket.socket, _Greeter], ranks_at_most: int
) -> None:
    """Close the connections of those whose time is over, and of the oldest if there are many."""
    crowd = len(greeters) - ranks_at_most - _GREETERS
    for number, (connection, greeter) in enumerate([*greeters.items()]):
        if number < crowd or time.monotonic() > greeter.deadline:
            selector.unregister(connection)
            connection.close()
            del greeters[connection]


def encode_message(message: dict[str, Any]) -> bytes:
    """Return a message as the line that is sent.

    Args:
        message: JSON values by name.
    """
    return json.dumps(message).encode() + b"\n"


def _read_line(connection: socket.socket) -> bytes:
    """Read the first line and nothing behind it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 4096:
            raise OSError("no greeting")
        line += byte
    return line


def _open_server(address: str, backlog: int) -> socket.socket:
    """Listen at a free port: of this machine alone where the ranks meet at such an address."""
    if address == "localhost" or address.startswith("127."):
        return socket.create_server(("127.0.0.1", 0), backlog=backlog)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
            )
    return socket.create_server(("", 0), backlog=backlog)


def _connect_to_first(hosts: list[str], port: int) -> socket.socket:
    last_error: OSError | None = None
    for host in hosts:
        try:
            return socket.create_connection((host, port), timeout=_CONNECT_S)
        except OSError as error:
            last_error = error
    raise ValueError(
        f"rank {ranks.rank()} does not reach rank 0 at port {port} of {' or '.join(hosts)} "
        f"({last_error}); TCP connections between the hosts must be allowed."
    )
