"""A rank that dies, hangs or falls silent ends the whole job, with one sentence, in seconds.

    heartbeat.start()                 on all ranks, behind `ranks.start`
    heartbeat.at(step, "data")        whenever the main thread begins something
    heartbeat.fail(status, sentence)  on the rank whose main thread gives up
    heartbeat.stop()                  at the end of a run

A thread of each rank keeps one connection to rank 0, on which both sides speak every half second.
Rank 0 ends the job when

    a connection breaks                       the process of that rank was killed or crashed
    a rank is silent for `SILENCE_S`          it was stopped, or its machine or network is gone
    the rank that is behind all others has    its main thread hangs
    been in one stage for longer than may be
    a rank says why it gives up               data, memory, a fault of the program

and each rank when rank 0 falls silent or dies, or when the launcher is gone, which would leave it
behind as an orphan (torchrun puts its ranks into sessions of their own). A rank that ends for the
sake of another leaves with status 75 ("try again" of sysexits.h), having killed the stopped ranks
of its machine, which would keep their memory and ports.

How long a stage may last comes from the run itself: `PATIENCE` times the longest so far on that
rank, and no less than `_SHORTEST`; the first two of each kind, which compile and tune, may take an
hour. Time is counted by a clock that stands still while the process or its machine does.
"""

import contextlib
import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from torch.distributed import DistError

from mocov3_ds.distributed import host_memory, ranks

STATUS = 75
"""Exit status of a rank that ends because another one, or the launcher, did."""
SILENCE_S = 20.0
"""Seconds without a word from a rank that is in its training loop; six times that before."""
PATIENCE = 10.0
"""A stage may take this many times as long as the longest one of its kind so far."""
_FIRST_S = 3600.0
_SHORTEST = {"data": 60.0, "step": 40.0, "log": 600.0, "save": 600.0}
"""Stages in their order within a step, and the seconds that each may always take."""
_TICK_S = 0.5
_GRACE_S = 2.0  # for a main thread that is about to say the same
_LAST_S = 10.0  # for a main thread that has given up to leave by itself

_LAUNCHERS = {"torchrun", "deepspeed", "accelerate", "accelerate-launch"}
_LAUNCHER_MODULES = {
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "accelerate.commands.launch",
}
_AGAIN = "The same command continues from the newest checkpoint."


@dataclass
class Beat:
    """What a rank says of itself."""

    step: int = 0
    """the one it is in, from 1; 0 before the loop"""
    stage: str = "start"
    seconds: float = 0.0
    """in that stage"""
    limit: float = math.inf
    """seconds that the stage may take"""
    place: str = ""
    """where its main thread is, once that takes long"""
    waits: bool = False
    """whether it is in a collective, which another rank may keep waiting"""
    used_gib: float = 0.0
    """memory of the process"""
    free_gib: float = 0.0
    """memory that its machine has left"""
    oom_kills: int = 0
    """times that the machine's kernel killed for lack of memory"""

    @property
    def progress(self) -> tuple[int, int]:
        """Orders ranks by how far they are."""
        order = list(_SHORTEST)
        return self.step, order.index(self.stage) if self.stage in order else len(order)

    def where(self) -> str:
        """Step and stage in words."""
        return f"step {self.step}, {self.stage}" if self.step else "the start"


@dataclass
class Member:
    """A rank as rank 0 (or, of rank 0, another rank) sees it."""

    rank: int
    host: str
    pid: int
    born: float
    """start of the process in seconds, to tell it from a later one of the same number"""
    beat: Beat = field(default_factory=Beat)
    heard: float = 0.0
    """by the clock of the listener"""
    left: bool = False
    """said goodbye, or why it gives up: its end is no news"""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def death_sentence(member: Member, *, here: bool, oom_kills: int) -> str:
    """Words on a rank whose connection broke.

    Args:
        member: that rank.
        here: whether it ran on the speaker's machine.
        oom_kills: the counter of that machine now.
    """
    beat = member.beat
    memory = f"it used {beat.used_gib:.1f} GiB and its host had {beat.free_gib:.1f} GiB left"
    if here and oom_kills > beat.oom_kills:
        reason = f"the kernel's out-of-memory killer struck on its host ({memory})"
    else:
        reason = f"killed, or crashed in native code; {memory}"
    return f"{member} died without a word in {beat.where()}: {reason}."


def silence_sentence(member: Member, seconds: float) -> str:
    """Words on a rank that says nothing though its connection stands."""
    return (
        f"{member} has been silent for {seconds:.0f} s in {member.beat.where()}: its process is "
        "stopped, or its host or network is gone."
    )


def hang_sentence(members: list[Member]) -> str | None:
    """Words on a job that stands still, or None where it goes on.

    The ranks that are behind all others are what these wait for: only their limits count.
    """
    behind = min(member.beat.progress for member in members)
    last = [member for member in members if member.beat.progress == behind]
    over = [member for member in last if member.beat.seconds > member.beat.limit]
    if not over:
        return None
    guilty = [member for member in last if not member.beat.waits] or over
    who = "; ".join(f"{m} in {m.beat.place or 'native code'}" for m in guilty[:4])
    more = f" and {len(guilty) - 4} more" if len(guilty) > 4 else ""
    beat = max((member.beat for member in over), key=lambda beat: beat.seconds)
    return (
        f"no progress for {beat.seconds:.0f} s (limit {beat.limit:.0f} s, --hang_timeout) in "
        f"{beat.where()}: {who}{more} hangs."
    )


class Heart:
    """The thread of one rank, and what its main thread tells it."""

    def __init__(self, hang_timeout: float = 0.0, silence_s: float = SILENCE_S) -> None:
        self._hang_timeout, self._silence_s = hang_timeout, silence_s
        self._clock = 0.0  # seconds, moved by the thread
        self._step, self._stage, self._since = 0, "start", 0.0
        self._longest: dict[str, float] = {}
        self._times: Counter[str] = Counter()
        self._main = threading.main_thread().ident
        self._launchers = _launchers()
        self._lock = threading.Lock()  # guards the words and what is sent
        self._spoken = False
        self._outbox: list[dict[str, Any]] = []
        self._given_up: float | None = None  # when the main thread did
        self._status = STATUS
        self._closing = threading.Event()
        self._verdict = threading.Event()  # the job has ended, and somebody says why
        self._process = psutil.Process()
        self.me = Member(
            ranks.rank(), socket.gethostname(), os.getpid(), self._process.create_time()
        )
        self._thread = threading.Thread(target=self._guarded, daemon=True, name="heartbeat")
        self._first: socket.socket | None = None  # towards rank 0
        self._server: socket.socket | None = None
        self._members: dict[socket.socket, Member] = {}
        self._received: dict[socket.socket, bytes] = {}
        self._charges: list[tuple[float, int, str]] = []  # when due, status, sentence
        self._connect()
        self._thread.start()

    # -------------------------------------------------------------------------- the main thread

    def at(self, step: int, stage: str) -> None:
        """The main thread begins a stage of a step (from 1)."""
        spent = self._clock - self._since
        self._longest[self._stage] = max(spent, self._longest.get(self._stage, 0.0))
        self._times[self._stage] += 1
        self._step, self._stage, self._since = step, stage, self._clock

    def limit(self) -> float:
        """Seconds that the present stage may take."""
        stage = self._stage
        if stage not in _SHORTEST:
            return math.inf
        if self._hang_timeout:
            return self._hang_timeout
        if self._times[stage] < 2:
            return _FIRST_S
        shortest = _SHORTEST[stage]
        if stage == "data":  # a store may be out of reach for as long as its reader is patient
            shortest += float(os.environ.get("MOCOV3_STORAGE_PATIENCE_S", 900))
        return max(shortest, PATIENCE * self._longest.get(stage, 0.0))

    def fail(self, status: int, sentence: str, *, of_a_peer: bool = False) -> int:
        """Say why this rank gives up, and see to it that all others end.

        Args:
            status: exit status that it deserves.
            sentence: for the user.
            of_a_peer: what it met looks like the end of another rank, which is waited for.

        Returns:
            the exit status that it shall have: that of the job.
        """
        if of_a_peer and self._verdict.wait(self._silence_s + 3 * _GRACE_S):
            return self._status
        self._status, self._given_up = status, self._clock
        if self.me.rank == 0:
            self._speak(sentence, status)
            self._end(status, sentence, [])
        elif not self._verdict.is_set():
            with self._lock:
                self._outbox.append({"trouble": sentence, "status": status})
            if not self._verdict.wait(3 * _GRACE_S):
                self._speak(f"{self.me}: {sentence}", status)
        return status

    def stop(self) -> None:
        """Say goodbye; the other ranks no longer count on this one."""
        self._closing.set()
        self._thread.join(timeout=10 * _TICK_S)
        for connection in [self._first, self._server, *self._members]:
            if connection is not None:
                connection.close()

    # ------------------------------------------------------------------------------ the meeting

    def _connect(self) -> None:
        if ranks.world_size() == 1:
            return
        token = secrets.token_hex(16)
        if ranks.is_first():
            self._server = _listen(backlog=ranks.world_size())
            self._server.settimeout(60.0)
        port = self._server.getsockname()[1] if self._server is not None else 0
        host, port, token = ranks.broadcast_object((self.me.host, port, token))
        if self._server is not None:
            while len(self._members) < ranks.world_size() - 1:
                self._welcome(self._server, token)
        else:
            self._first = _dial([os.environ.get("MASTER_ADDR", host), host], port)
            hello = {"token": token, "member": [self.me.rank, *self._identity()]}
            self._first.sendall(_line(hello))
            answer = json.loads(_read_line(self._first))
            self._members[self._first] = Member(0, *answer["member"])
        for connection, member in self._members.items():
            connection.settimeout(1.0)
            member.beat.oom_kills = _oom_kills()

    def _identity(self) -> tuple[str, int, float]:
        return self.me.host, self.me.pid, self.me.born

    def _welcome(self, server: socket.socket, token: str) -> None:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            raise ValueError(
                f"{ranks.world_size() - 1 - len(self._members)} ranks did not reach rank 0 at "
                f"port {server.getsockname()[1]} of {self.me.host} within 60 s; TCP connections "
                "between the hosts must be allowed."
            ) from None
        connection.settimeout(10.0)
        try:  # whoever else finds the port is sent away
            hello = json.loads(_read_line(connection))
            if not secrets.compare_digest(hello["token"], token):
                raise ValueError("not of this job")
            member = Member(*hello["member"])
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            return
        connection.sendall(_line({"member": self._identity()}))
        self._members[connection] = member

    # ------------------------------------------------------------------------------- the thread

    def _guarded(self) -> None:
        try:
            self._watch()
        except Exception as error:
            if not self._closing.is_set():
                words = f"the heartbeat of {self.me} failed: {type(error).__name__}: {error}."
                self._speak(words, STATUS)
                self._leave(STATUS)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._members:
                selector.register(connection, selectors.EVENT_READ, connection)
            last, spoke = time.monotonic(), 0.0
            while not self._closing.is_set():
                if selector.get_map():
                    ready = [key.data for key, _ in selector.select(_TICK_S / 2)]
                else:
                    self._closing.wait(_TICK_S / 2)
                    ready = []
                now = time.monotonic()
                self._clock += min(now - last, 4 * _TICK_S)
                last = now
                for connection in ready:
                    if not self._hear(connection):
                        selector.unregister(connection)
                if self._clock - spoke >= _TICK_S or self._outbox:
                    spoke = self._clock
                    self.me.beat = self._beat()
                    self._say({"beat": vars(self.me.beat)})
                self._judge()
        self._say({"bye": True})

    def _beat(self) -> Beat:
        seconds = self._clock - self._since
        place, waits = _main_thread_place(self._main) if seconds > 4 * _TICK_S else ("", False)
        memory = self._process.memory_info().rss
        return Beat(
            self._step, self._stage, seconds, self.limit(), place, waits,
            memory / 2**30, host_memory.free_bytes() / 2**30, _oom_kills(),
        )  # fmt: skip

    def _say(self, message: dict[str, Any]) -> None:
        with self._lock:
            messages, self._outbox = [*self._outbox, message], []
        data = b"".join(_line(m) for m in messages)
        for connection in self._members:
            with contextlib.suppress(OSError):  # the reading side notices
                connection.sendall(data)

    def _hear(self, connection: socket.socket) -> bool:
        """Take in what a connection brings; False at its end."""
        member = self._members[connection]
        try:
            data = connection.recv(1 << 16)
        except TimeoutError:
            return True
        except OSError:
            data = b""
        *lines, rest = (self._received.get(connection, b"") + data).split(b"\n")
        self._received[connection] = rest
        for line in lines:
            self._take(member, json.loads(line))
        if data:
            member.heard = self._clock
            return True
        if not member.left and not self._verdict.is_set():
            member.left = True
            here = member.host == self.me.host
            self._charge(STATUS, death_sentence(member, here=here, oom_kills=_oom_kills()))
        return False

    def _take(self, member: Member, message: dict[str, Any]) -> None:
        if "beat" in message:
            member.beat = Beat(**message["beat"])
        elif "bye" in message:
            member.left = True
        elif "trouble" in message:
            member.left = True
            self._charge(message["status"], f"{member}: {message['trouble']}", _GRACE_S)
        elif "end" in message:
            self._status = message["status"]
            self._verdict.set()
            for host, pid, born in message["kill"]:
                _kill(host, pid, born)
            self._given_up = self._given_up or self._clock - _LAST_S + _GRACE_S

    def _charge(self, status: int, sentence: str, grace: float = 0.0) -> None:
        self._charges.append((self._clock + grace, status, sentence))

    def _judge(self) -> None:
        if self._given_up is not None and self._clock - self._given_up > _LAST_S:
            if ranks.world_size() > 1:
                self._leave(self._status)
            return
        if self._verdict.is_set() or self._given_up is not None:
            return
        gone = next((name for name, process in self._launchers if not process.is_running()), None)
        if gone is not None:
            self._condemn(STATUS, f"{self.me}: its launcher, {gone}, is gone.", [])
        for member in self._members.values():
            # whoever is in its second step has had all others in the first
            patience = self._silence_s * (1 if member.beat.step or self._step > 1 else 6)
            if not member.left and self._clock - member.heard > patience:
                silence = silence_sentence(member, self._clock - member.heard)
                self._condemn(STATUS, silence, [member])
        if self._charges and self._clock >= min(self._charges)[0]:
            _, status, sentence = self._charges[0]
            self._condemn(status, sentence, [])
        if self.me.rank == 0:
            present = [m for m in self._members.values() if not m.left]
            hang = hang_sentence([self.me, *present])
            if hang is not None:
                self._condemn(STATUS, hang, [])

    def _condemn(self, status: int, sentence: str, stopped: list[Member]) -> None:
        """End this process, and from rank 0 the job."""
        # of rank 0's end, one rank of each host speaks
        if self.me.rank < 2 or ranks.local_rank() == 0:
            self._speak(sentence, status)
        if self.me.rank == 0:
            self._end(status, sentence, stopped)
        for member in stopped:
            _kill(member.host, member.pid, member.born)
        self._leave(status)

    def _end(self, status: int, sentence: str, stopped: list[Member]) -> None:
        kill = [[m.host, m.pid, m.born] for m in stopped]
        self._verdict.set()
        self._say({"end": sentence, "status": status, "kill": kill})

    def _speak(self, sentence: str, status: int) -> None:
        with self._lock:
            if self._spoken:
                return
            self._spoken = True
        again = status in (1, STATUS)
        end = (f" {_AGAIN}" if sentence.endswith(".") else f". {_AGAIN}") if again else ""
        with contextlib.suppress(OSError):  # the terminal may have gone with the launcher
            sys.stderr.write(f"\ntrain.py: error: {sentence}{end}\n")
            sys.stderr.flush()

    def _leave(self, status: int) -> None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)  # the main thread may be in a call that never returns


_heart: Heart | None = None


def start(hang_timeout: float = 0.0, silence_s: float = SILENCE_S) -> None:
    """Watch over all ranks from here on; all of them must call.

    Args:
        hang_timeout: seconds that a stage may take; 0 = from the run's own history.
        silence_s: seconds after which a rank without a word counts as lost.

    Raises:
        ValueError: a rank cannot connect to rank 0.
    """
    global _heart
    stop()
    _heart = Heart(hang_timeout, silence_s)


def at(step: int, stage: str) -> None:
    """The main thread begins a stage of a step (from 1); without `start` nothing happens."""
    if _heart is not None:
        _heart.at(step, stage)


def fail(status: int, sentence: str, *, of_a_peer: bool = False) -> int | None:
    """See `Heart.fail`; None where no heart beats, and the caller must speak itself."""
    if _heart is None:
        return None
    status = _heart.fail(status, sentence, of_a_peer=of_a_peer)
    if ranks.world_size() == 1:  # else the others' last words come through it
        stop()
    return status


def stop() -> None:
    """End the watch in good order."""
    global _heart
    if _heart is not None:
        _heart.stop()
        _heart = None


def is_of_a_peer(error: BaseException) -> bool:
    """Whether an error looks like the end of another rank, as collectives of this one see it."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return ranks.world_size() > 1 and (
        isinstance(error, DistError)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read_line(connection: socket.socket) -> bytes:
    """The first line, without taking anything behind it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 4096:
            raise OSError("no greeting")
        line += byte
    return line


def _listen(backlog: int) -> socket.socket:
    """A socket at a free port of all this host's addresses."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            family = socket.AF_INET6
            return socket.create_server(
                ("", 0), family=family, backlog=backlog, dualstack_ipv6=True
            )
    return socket.create_server(("", 0), backlog=backlog)


def _dial(hosts: list[str], port: int) -> socket.socket:
    trouble: OSError | None = None
    for host in hosts:
        try:
            return socket.create_connection((host, port), timeout=30.0)
        except OSError as error:
            trouble = error
    raise ValueError(
        f"rank {ranks.rank()} does not reach rank 0 at port {port} of {' or '.join(hosts)} "
        f"({trouble}); TCP connections between the hosts must be allowed."
    )


def _kill(host: str, pid: int, born: float) -> None:
    """Kill a rank of this machine, if that number still is that process."""
    if host != socket.gethostname() or pid == os.getpid():
        return
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.create_time() == born:
            process.kill()


def _launchers() -> list[tuple[str, psutil.Process]]:
    """The launcher's processes above this one, nearest first; none where a shell started it."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            words = process.cmdline()[:4]
            name = next(
                (w for w in words if Path(w).name in _LAUNCHERS or w in _LAUNCHER_MODULES), None
            )
            if name is None:
                break
            found.append((f"{Path(name).name} (pid {process.pid})", process))
    return found


def _main_thread_place(main: int | None) -> tuple[str, bool]:
    """The program's innermost line in the main thread, and whether it waits in a collective."""
    frame = sys._current_frames().get(main or 0)
    place, waits = "", False
    for each in _outwards(frame):
        path = each.f_code.co_filename
        waits |= path.endswith(("distributed/ranks.py", "distributed_c10d.py"))
        if not place and "site-packages" not in path and "<frozen" not in path:
            place = f"{each.f_code.co_name} ({Path(path).name}:{each.f_lineno})"
    return place, waits


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _oom_kills() -> int:
    """How often this machine's kernel has killed a process for lack of memory."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
