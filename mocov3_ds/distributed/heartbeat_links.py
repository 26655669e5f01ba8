"""The connections that heartbeats go through: one TCP connection from each rank to rank 0.

Messages are JSON objects, one per line. Rank 0 tells all ranks its port and a secret by a broadcast
of the process group; whoever else finds the port does not know the secret and is sent away.
"""

import contextlib
import json
import os
import secrets
import socket
from typing import Any

from mocov3_ds.distributed import host_memory, ranks
from mocov3_ds.distributed.heartbeat_rules import Member

_ACCEPT_S = 60.0  # that rank 0 waits for the next rank
_CONNECT_S = 30.0
_GREETING_S = 10.0
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
    server = _open_server(backlog=ranks.world_size()) if ranks.is_first() else None
    port = server.getsockname()[1] if server is not None else 0
    host, port, token = ranks.broadcast_object((me.host, port, token))
    members: dict[socket.socket, Member] = {}
    if server is not None:
        with server:
            while len(members) < ranks.world_size() - 1:
                connection = _accept_connection(server, me.host, len(members))
                member = _exchange_greetings(connection, me, token)
                if member is not None:
                    members[connection] = member
    else:
        connection = _connect_to_first([os.environ.get("MASTER_ADDR", host), host], port)
        hello = {"token": token, "member": [me.rank, *_identity(me)]}
        connection.sendall(encode_message(hello))
        members[connection] = Member(0, *json.loads(_read_line(connection))["member"])
    for connection, member in members.items():
        connection.settimeout(_SEND_S)
        member.beat.oom_kills = host_memory.count_oom_kills()
    return members


def _identity(member: Member) -> tuple[str, int, float]:
    return member.host, member.pid, member.born


def _accept_connection(server: socket.socket, host: str, connected: int) -> socket.socket:
    try:
        connection, _ = server.accept()
    except TimeoutError:
        raise ValueError(
            f"{ranks.world_size() - 1 - connected} ranks did not reach rank 0 at port "
            f"{server.getsockname()[1]} of {host} within {_ACCEPT_S:.0f} s; TCP connections "
            "between the hosts must be allowed."
        ) from None
    connection.settimeout(_GREETING_S)
    return connection


def _exchange_greetings(connection: socket.socket, me: Member, token: str) -> Member | None:
    """Return who is at the other end; None for a stranger, whose connection is closed."""
    try:
        hello = json.loads(_read_line(connection))
        if not secrets.compare_digest(hello["token"], token):
            raise ValueError("not of this run")
        member = Member(*hello["member"])
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
        return None
    connection.sendall(encode_message({"member": _identity(me)}))
    return member


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


def _open_server(backlog: int) -> socket.socket:
    """Listen at a free port of all addresses of this machine."""
    server: socket.socket | None = None
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            server = socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
            )
    server = server or socket.create_server(("", 0), backlog=backlog)
    server.settimeout(_ACCEPT_S)
    return server


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
