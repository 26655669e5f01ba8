"""Ranks meet before anything else: which of them has not come is said while it is waited for.

    the address does not answer     each other rank says so, with the reason, every `SPEAK_S`
    some ranks do not come          rank 0 names them, and what they need, every `SPEAK_S`
    two processes are one rank      the second is refused, and told which was the first
    ranks that contradict           all end: another WORLD_SIZE, two on one accelerator

Who is not there after `LIMIT_S` ends the run. A thread watches over it, because torch's own calls,
which connect the ranks at last, say nothing and cannot be interrupted.
"""

import contextlib
import errno
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store

SPEAK_S = 60.0
"""seconds between two lines about what is waited for"""
LIMIT_S = 900.0
"""seconds after which a rank gives up"""
LOST_STATUS = 75
"""exit status of a rank that gives up ("try again" of sysexits.h)"""

_LONGEST_POLL_S = 0.5
_PROBE_S = 5.0
_NAMED = 8
_REFUSED = "refused"


class Newcomer(NamedTuple):
    """What a rank says of itself when it comes."""

    rank: int
    world_size: int
    host: str
    pid: int
    device: str
    """identity of its accelerator; empty on a CPU"""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def encode(self) -> str:
        """Return it as text for the store."""
        return "\n".join(map(str, self))


def decode_newcomer(text: bytes) -> Newcomer:
    """Return what `Newcomer.encode` has written.

    Args:
        text: Value in the store, which anybody in the network may have written.

    Raises:
        ValueError: It is something else.
    """
    fields = text[:4096].decode(errors="replace").split("\n")
    if len(fields) != len(Newcomer._fields) or not all(
        re.fullmatch(r"\d{1,9}", fields[i]) for i in (0, 1, 3)
    ):
        raise ValueError(f"what came to the meeting of the ranks is no rank: {text[:80]!r}.")
    rank, world_size, host, pid, device = fields
    return Newcomer(int(rank), int(world_size), host, int(pid), device)


# ---------------------------------------------------------------------------------- while it waits


@dataclass
class Wait:
    """What a rank waits for at the moment."""

    reason: str = ""
    """in words; empty = another rank says it"""


@contextlib.contextmanager
def spoken_wait(rank: int) -> Iterator[Wait]:
    """Let a thread say every minute what this rank waits for, and end the process at the limit.

    Args:
        rank: Number of this rank, to name it.
    """
    wait, is_over = Wait(), threading.Event()
    thread = threading.Thread(
        target=_watch_wait, args=(rank, wait, is_over), daemon=True, name="meeting"
    )
    thread.start()
    try:
        yield wait
    finally:
        is_over.set()


def _watch_wait(rank: int, wait: Wait, is_over: threading.Event) -> None:
    started = time.monotonic()
    while not is_over.wait(SPEAK_S):
        waited_s, reason = time.monotonic() - started, wait.reason
        if waited_s > LIMIT_S + (0 if reason else SPEAK_S):
            reason = reason or "other ranks did not come, and rank 0 has not said which"
            _speak(f"\ntrain.py: error: rank {rank} gives up after {waited_s:.0f} s: {reason}.")
            os._exit(LOST_STATUS)  # the main thread may be in a call that never returns
        if reason:
            _speak(f"rank {rank} has waited {waited_s:.0f} s of {LIMIT_S:.0f} s: {reason}")


def _speak(line: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


# -------------------------------------------------------------------------------------- the meeting


def meet_ranks(me: Newcomer, address: str, port: int, *, hosted: bool, attempt: str) -> Store:
    """Wait until all ranks have come to the store of the run; all ranks must call.

    Args:
        me: What this rank says of itself.
        address: MASTER_ADDR, the machine of the store.
        port: MASTER_PORT of that machine.
        hosted: Whether the launcher holds the store (torchrun); otherwise rank 0 does.
        attempt: Text that differs between restarts of the ranks under one launcher.

    Returns:
        The store, for the process group.

    Raises:
        ValueError: The port is held by another process, this rank is there already, or ranks
            contradict each other; rank 0 says it for all.
        SystemExit: The same on the other ranks, which need not say it again.
    """
    with spoken_wait(me.rank) as wait:
        if me.rank == 0 and not hosted:
            server = open_store(address, port, me.world_size)
        else:
            server = _join_store(address, port, me.world_size, wait)
        # torchrun --max-restarts keeps its store, with the addresses of ranks that are gone in it
        store = PrefixStore(f"meeting-{attempt}", server)
        _announce(store, me)
        if me.rank == 0:
            _receive_all(store, me, f"MASTER_ADDR={address} and MASTER_PORT={port}", wait)
        else:
            wait.reason = ""  # rank 0 names those that are missing
            _poll(lambda: store.check(["verdict"]))
            _obey_verdict(store.get("verdict"), me)
    return PrefixStore(f"attempt-{attempt}", server)


def open_store(address: str, port: int, world_size: int) -> TCPStore:
    """Open the store that ranks meet at, on this machine.

    Args:
        address: MASTER_ADDR, a name of this machine.
        port: Port to listen on.
        world_size: Number of ranks of the run.

    Raises:
        ValueError: The port is taken, or may not be used.
    """
    try:
        return _make_store(address, port, world_size, is_master=True)
    except DistError as error:
        text = str(error).partition("\n")[0]
        if "EADDRINUSE" not in text and "address already in use" not in text:
            raise ValueError(f"rank 0 cannot listen on port {port} ({text}).") from None
    raise ValueError(
        f"port {port} of this machine is held by another run or process: give the launcher a free "
        f"one (deepspeed --master_port {free_neighbour(port)}, torchrun --master-port, accelerate "
        "launch --main_process_port), or set MASTER_PORT."
    )


def free_neighbour(port: int) -> int:
    """Return a port above a taken one that nothing listens on, to name it as an example.

    Args:
        port: The port that is taken.
    """
    for candidate in range(port + 1, min(port + 100, 65536)):
        with contextlib.suppress(OSError), socket.create_server(("", candidate)):
            return candidate
    return 29501


def _make_store(address: str, port: int, world_size: int, *, is_master: bool) -> TCPStore:
    return TCPStore(
        address,
        port,
        world_size,
        is_master,
        timeout=timedelta(seconds=LIMIT_S),
        wait_for_workers=False,
        multi_tenant=is_master,
    )


def _join_store(address: str, port: int, world_size: int, wait: Wait) -> TCPStore:
    """Connect with the store as soon as it is there."""
    pause_s = 0.05
    while True:
        try:
            with socket.create_connection((address, port), timeout=_PROBE_S):
                pass
            wait.reason = (
                f"what listens at {address}:{port} does not answer as rank 0 of a run does"
            )
            return _make_store(address, port, world_size, is_master=False)
        except (OSError, DistError) as error:
            wait.reason = (
                f"rank 0 of {world_size} does not answer at MASTER_ADDR {address}, MASTER_PORT "
                f"{port} ({describe_connection_error(error)}); it must be started on that machine, "
                "and TCP connections to it must be allowed"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_POLL_S)


def describe_connection_error(error: Exception) -> str:
    """Return in a few words why a connection could not be made.

    Args:
        error: What the attempt raised.
    """
    if isinstance(error, socket.gaierror):
        return "no machine of that name"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    if isinstance(error, TimeoutError):
        return os.strerror(errno.ETIMEDOUT).lower()
    return str(error).partition("\n")[0]


def _announce(store: Store, me: Newcomer) -> None:
    """Tell the store that this rank has come."""
    text = me.encode()
    newcomer = store.compare_set(f"rank-{me.rank}", "", text)
    if newcomer != text.encode():
        raise ValueError(
            f"{decode_newcomer(newcomer)} has come already, so process {me.pid} on {me.host} "
            f"cannot be rank {me.rank}, too: each process needs a RANK of its own, and each run a "
            "port of its own (deepspeed --master_port)."
        )


def _receive_all(store: Store, me: Newcomer, address: str, wait: Wait) -> None:
    """Wait for all other ranks, and tell them whether they go together."""
    missing = [*range(me.world_size)]

    def is_complete() -> bool:
        missing[:] = [r for r in missing if not store.check([f"rank-{r}"])]
        wait.reason = describe_missing(missing, me.world_size, address)
        return not missing

    _poll(is_complete)
    try:
        check_members([decode_newcomer(store.get(f"rank-{r}")) for r in range(me.world_size)])
    except ValueError:
        store.set("verdict", _REFUSED)
        raise
    store.set("verdict", str(me.world_size))


def _obey_verdict(verdict: bytes, me: Newcomer) -> None:
    if verdict.decode() == _REFUSED:
        raise SystemExit(2)
    if verdict.decode() != str(me.world_size):
        raise ValueError(
            f"{me} was started with WORLD_SIZE={me.world_size}, rank 0 with WORLD_SIZE="
            f"{verdict.decode()[:20]}: all must have the same."
        )


def _poll(is_done: Callable[[], bool]) -> None:
    pause_s = 0.01
    while not is_done():
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_POLL_S)


def describe_missing(missing: Sequence[int], world_size: int, address: str) -> str:
    """Say which ranks have not come, and what they need to come.

    Args:
        missing: Numbers of these ranks, in order.
        world_size: Number of ranks of the run.
        address: What tells a rank where to come to.
    """
    named = ", ".join(map(str, missing[:_NAMED]))
    unnamed = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    noun = "rank" if len(missing) == 1 else "ranks"
    return (
        f"{noun} {named}{unnamed} of {world_size} (missing: {len(missing)}) did not come; each is "
        f"a process that its launcher starts with its RANK, WORLD_SIZE={world_size}, {address}, "
        "which it must reach over TCP"
    )


def check_members(members: Sequence[Newcomer]) -> None:
    """Check that ranks belong to one run, and that each has an accelerator of its own.

    Args:
        members: What all ranks say of themselves, in their order.

    Raises:
        ValueError: They do not go together.
    """
    first, device_owners = members[0], dict[tuple[str, str], Newcomer]()
    for member in members:
        if member.world_size != first.world_size:
            raise ValueError(
                f"{member} was started with WORLD_SIZE={member.world_size}, {first} with "
                f"{first.world_size}: all must have the same."
            )
        owner = device_owners.setdefault((member.host, member.device), member)
        if member.device and owner is not member:
            raise ValueError(
                f"{owner} and {member} would train on one accelerator ({member.device}): start one "
                "rank a device, each with a LOCAL_RANK or a visible device of its own."
            )
