"""A rank that dies, hangs or falls silent ends the whole run in seconds, with one sentence.

    heartbeat.start()                          on all ranks, after `ranks.start`
    heartbeat.enter_stage(step, "data")        whenever the main thread begins something
    heartbeat.report_failure(status, sentence) on the rank whose main thread gives up
    heartbeat.note_saved(name)                 when a checkpoint is complete
    heartbeat.stop()                           at the end of a run

A thread of each rank keeps one connection to rank 0; both sides send a beat every half second.
Rank 0 ends the run when `heartbeat_rules` finds a dead, silent or hanging rank, or when a rank says
why it gives up: data, memory, a fault of the program. Each other rank ends when rank 0 dies or
falls silent. All ranks end when the launcher is gone, which would leave them behind as orphans
(torchrun starts its ranks in sessions of their own): at once before the training loop, and within
it at the end of the step, so that the main threads can save (`lost_launcher`).

A rank that ends because of another one exits with status 75. Before, it kills the stopped ranks of
its machine, which would keep their memory and ports. Time is counted by a clock that stands still
while the process or its machine does.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from mocov3_ds.distributed import heartbeat_rules, host_memory, ranks
from mocov3_ds.distributed.heartbeat_links import connect_ranks, encode_message
from mocov3_ds.distributed.heartbeat_rules import PEER_LOST_STATUS, SILENCE_S, Beat, Member, Stage
from mocov3_ds.distributed.processes import STARTED_BY, has_ended, kill_process, locate_work

_TICK_S = 0.5  # between two beats
_LONGEST_TICK_S = 4 * _TICK_S  # more between two looks at the clock means that it stood still
_GRACE_S = 2.0  # time for a main thread to say the same with better words
_LEAVE_S = 10.0  # time for a main thread that has given up to end the process in good order


@dataclass(frozen=True, order=True)
class _Charge:
    """Something that ends the run, unless somebody says why before it is due."""

    due: float
    """seconds on the clock"""
    status: int
    sentence: str


class Heart:
    """The heartbeat thread of one rank, and what its main thread tells it.

    Args:
        me: This rank.
        members: Connection -> rank at its other end, see `heartbeat_links.connect_ranks`.
        hang_timeout: Seconds that a stage may take; 0 = follow the run's own history.
        silence_s: Seconds that a rank in its training loop may be silent.
    """

    def __init__(
        self,
        me: Member,
        members: dict[socket.socket, Member],
        hang_timeout: float = 0.0,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.me, self._members, self._silence_s = me, members, silence_s
        self._clock = 0.0  # seconds, moved by the thread
        self.timer = heartbeat_rules.StageTimer(hang_timeout)
        self._main_thread = threading.main_thread().ident
        self._launchers = STARTED_BY
        self.lost_launcher = ""
        """what to say of a launcher that is gone, while this rank goes on to save"""
        self.saved: str | None = None
        """name of the newest checkpoint; empty = there is none, None = not yet known"""
        self.describe_work: Callable[[], str] = str
        """what other threads are at while the main thread waits for data"""
        self._lock = threading.Lock()  # guards what is sent and whether a sentence was written
        self._has_spoken = False
        self._outbox: list[dict[str, Any]] = []
        self._gave_up_at: float | None = None  # on the clock, by the main thread or for it
        self._status = PEER_LOST_STATUS
        self._closing = threading.Event()
        self._verdict = threading.Event()  # the run has ended, and somebody says why
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._run_guarded, daemon=True, name="heartbeat")
        self._received: dict[socket.socket, bytes] = {}  # beginnings of lines
        self._charges: list[_Charge] = []
        self._thread.start()

    # -------------------------------------------------------------------------- the main thread

    def enter_stage(self, step: int, stage: Stage) -> None:
        """Note that the main thread begins a stage.

        Args:
            step: The step that the stage belongs to, from 1.
            stage: The stage that begins.
        """
        self.timer.enter(step, stage, self._clock)

    def report_failure(self, status: int, sentence: str, *, of_a_peer: bool = False) -> int:
        """Say why this rank gives up, and make all others end.

        Args:
            status: Exit status that the failure deserves.
            sentence: What happened, for the user.
            of_a_peer: Whether the failure looks like the end of another rank; then the sentence
                about that one is waited for.

        Returns:
            The exit status that this rank must end with: that of the run.
        """
        if of_a_peer and self._verdict.wait(self._silence_s + 3 * _GRACE_S):
            return self._status
        self._status, self._gave_up_at = status, self._clock
        if self.me.rank == 0:
            self._speak(sentence, status)
            self._announce_end(status, sentence, [])
        elif not self._verdict.is_set():
            with self._lock:
                self._outbox.append({"failure": sentence, "status": status})
            if not self._verdict.wait(3 * _GRACE_S):
                self._speak(f"{self.me}: {sentence}", status)
        return status

    def stop(self) -> None:
        """Say goodbye; the other ranks no longer count on this one."""
        self._closing.set()
        self._thread.join(timeout=10 * _TICK_S)
        for connection in self._members:
            connection.close()

    # ------------------------------------------------------------------------------- the thread

    def _run_guarded(self) -> None:
        try:
            self._run()
        except Exception as error:
            if not self._closing.is_set():
                message = f"the heartbeat of {self.me} failed: {type(error).__name__}: {error}."
                self._speak(message, PEER_LOST_STATUS)
                self._leave(PEER_LOST_STATUS)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._members:
                selector.register(connection, selectors.EVENT_READ, connection)
            last_look, last_beat = time.monotonic(), 0.0
            while not self._closing.is_set():
                if not selector.get_map():
                    self._closing.wait(_TICK_S / 2)
                self._receive(selector, _TICK_S / 2)
                look = time.monotonic()
                self._clock += min(look - last_look, _LONGEST_TICK_S)
                last_look = look
                if self._clock - last_beat >= _TICK_S or self._outbox:
                    last_beat = self._clock
                    self.me.beat = self._take_pulse()
                    self._send({"beat": vars(self.me.beat)})
                # what has come while this thread had no processor is no silence
                self._receive(selector, 0.0)
                self._judge()
        self._send({"bye": True})

    def _receive(self, selector: selectors.BaseSelector, timeout_s: float) -> None:
        """Take in what connections bring within a time; ended ones are no longer selected."""
        if selector.get_map():
            for key, _ in selector.select(timeout_s):
                if not self._read_connection(key.data):
                    selector.unregister(key.data)

    def _take_pulse(self) -> Beat:
        seconds = self.timer.seconds(self._clock)
        location, waits = "", False
        if seconds > _LONGEST_TICK_S:
            location, waits = locate_work(self._main_thread)
            if self.timer.stage == "data" and (work := self.describe_work()):
                location = f"{location}, {work},"
        return Beat(
            step=self.timer.step,
            stage=self.timer.stage,
            seconds=seconds,
            limit=self.timer.limit(),
            location=location,
            waits=waits,
            entered=ranks.count_collectives(),
            used_gib=self._process.memory_info().rss / 2**30,
            free_gib=host_memory.free_bytes() / 2**30,
            oom_kills=host_memory.count_oom_kills(),
            saved=self.saved,
        )

    def _send(self, message: dict[str, Any]) -> None:
        """Send what waits in the outbox and a message to all members."""
        with self._lock:
            messages, self._outbox = [*self._outbox, message], []
        data = b"".join(encode_message(m) for m in messages)
        for connection in self._members:
            with contextlib.suppress(OSError):  # the reading side notices
                connection.sendall(data)

    def _read_connection(self, connection: socket.socket) -> bool:
        """Take in what a connection brings; False at its end."""
        member = self._members[connection]
        try:
            data = connection.recv(1 << 16)
        except TimeoutError:
            return True
        except OSError:
            data = b""
        *lines, beginning = (self._received.get(connection, b"") + data).split(b"\n")
        self._received[connection] = beginning
        for line in lines:
            self._take_message(member, json.loads(line))
        if data:
            member.heard = self._clock
            return True
        if not member.is_leaving and not self._verdict.is_set():
            member.is_leaving = True
            sentence = heartbeat_rules.describe_death(
                member,
                same_host=member.host == self.me.host,
                oom_kills=host_memory.count_oom_kills(),
            )
            self._charges.append(_Charge(self._clock, PEER_LOST_STATUS, sentence))
        return False

    def _take_message(self, member: Member, message: dict[str, Any]) -> None:
        if "beat" in message:
            member.beat = Beat(**message["beat"])
        elif "bye" in message:
            member.is_leaving = True
        elif "failure" in message:
            member.is_leaving = True
            sentence = f"{member}: {message['failure']}"
            self._charges.append(_Charge(self._clock + _GRACE_S, message["status"], sentence))
        elif "end" in message:
            self._status = message["status"]
            self._verdict.set()
            for host, pid, born in message["kill"]:
                kill_process(host, pid, born)
            self._gave_up_at = self._gave_up_at or self._clock - _LEAVE_S + _GRACE_S

    def _judge(self) -> None:
        """End the run where there is a reason; where it has ended, end this process in time."""
        if self._gave_up_at is not None and self._clock - self._gave_up_at > _LEAVE_S:
            if ranks.world_size() > 1:
                self._leave(self._status)
            return
        if self._verdict.is_set() or self._gave_up_at is not None:
            return
        self._look_for_launchers()
        for member in self._members.values():
            silent_s = self._clock - member.heard
            if silent_s > heartbeat_rules.silence_limit(member, self.timer.step, self._silence_s):
                sentence = heartbeat_rules.describe_silence(member, silent_s)
                self._condemn(PEER_LOST_STATUS, sentence, [member])
        if self._charges and self._clock >= min(self._charges).due:
            self._condemn(self._charges[0].status, self._charges[0].sentence)
        if self.me.rank == 0:
            staying = [m for m in self._members.values() if not m.is_leaving]
            hang = heartbeat_rules.describe_hang([self.me, *staying])
            if hang is not None:
                self._condemn(PEER_LOST_STATUS, hang)

    def _look_for_launchers(self) -> None:
        """Note that a launcher is gone; before the training loop, end the process at once."""
        if self.lost_launcher:
            return
        for name, launcher in self._launchers:
            if has_ended(launcher):
                sentence = f"{self.me}: its launcher, {name}, is gone."
                if self.timer.step == 0:
                    self._condemn(PEER_LOST_STATUS, sentence)
                self.lost_launcher = sentence

    def newest_saved(self) -> str | None:
        """Return the name of the newest checkpoint that any rank knows of, as `saved` does."""
        saved_names = [m.beat.saved for m in (*self._members.values(),)] + [self.saved]
        return max((name for name in saved_names if name is not None), default=None)

    def _condemn(self, status: int, sentence: str, stopped: list[Member] | None = None) -> None:
        """End this process, and where it is rank 0 the run; kill stopped ranks of this machine."""
        # when rank 0 has ended, one rank of each machine says so
        if self.me.rank < 2 or ranks.local_rank() == 0:
            self._speak(sentence, status)
        elif stopped:  # until that one has seen it, too, and not a rank that was killed
            time.sleep(_GRACE_S)
        if self.me.rank == 0:
            self._announce_end(status, sentence, stopped or [])
        for member in stopped or []:
            kill_process(member.host, member.pid, member.born)
        self._leave(status)

    def _announce_end(self, status: int, sentence: str, stopped: list[Member]) -> None:
        kill = [[m.host, m.pid, m.born] for m in stopped]
        self._verdict.set()
        self._send({"end": sentence, "status": status, "kill": kill})

    def _speak(self, sentence: str, status: int) -> None:
        """Write the exit message, unless this rank has written one."""
        with self._lock:
            if self._has_spoken:
                return
            self._has_spoken = True
        with contextlib.suppress(OSError):  # the terminal may have gone with the launcher
            message = heartbeat_rules.exit_message(
                sentence, status, self.newest_saved(), self.timer.steps_done
            )
            sys.stderr.write(f"\ntrain.py: error: {message}\n")
            sys.stderr.flush()

    def _leave(self, status: int) -> None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)  # the main thread may be in a call that never returns


_heart: Heart | None = None  # of this process


def start(hang_timeout: float = 0.0, silence_s: float = SILENCE_S) -> None:
    """Start the heartbeat of this rank; all ranks must call.

    Args:
        hang_timeout: Seconds that a stage may take; 0 = follow the run's own history.
        silence_s: Seconds that a rank in its training loop may be silent.

    Raises:
        ValueError: A rank cannot connect to rank 0.
    """
    global _heart
    stop()
    born = psutil.Process().create_time()
    me = Member(ranks.rank(), socket.gethostname(), os.getpid(), born)
    _heart = Heart(me, connect_ranks(me), hang_timeout, silence_s)


def enter_stage(step: int, stage: Stage) -> None:
    """Note that the main thread begins a stage; without `start` nothing happens.

    Args:
        step: The step that the stage belongs to, from 1.
        stage: The stage that begins.
    """
    if _heart is not None:
        _heart.enter_stage(step, stage)


def note_saved(name: str) -> None:
    """Note that a checkpoint is complete, to be named where the run ends; any thread may call.

    Args:
        name: Name of its folder; empty = the run has none.
    """
    if _heart is not None:
        _heart.saved = name


def explain_data(describe_work: Callable[[], str]) -> None:
    """Tell what a rank is at that hangs in the stage "data", where its main thread only waits.

    Args:
        describe_work: Names what its threads work on, from memory alone; empty for nothing.
    """
    if _heart is not None:
        _heart.describe_work = describe_work


def lost_launcher() -> str:
    """Return a sentence on the launcher of this rank if it is gone; otherwise an empty text."""
    return _heart.lost_launcher if _heart is not None else ""


def report_failure(status: int, sentence: str, *, of_a_peer: bool = False) -> int | None:
    """Say why this rank gives up, and make all others end; see `Heart.report_failure`.

    Args:
        status: Exit status that the failure deserves.
        sentence: What happened, for the user.
        of_a_peer: Whether the failure looks like the end of another rank.

    Returns:
        The exit status that this rank must end with; None without `start`, where the caller must
        write the sentence itself.
    """
    if _heart is None:
        return None
    status = _heart.report_failure(status, sentence, of_a_peer=of_a_peer)
    if ranks.world_size() == 1:  # with more ranks, what they have to say still comes through it
        stop()
    return status


def stop() -> None:
    """End the heartbeat of this rank in good order."""
    global _heart
    if _heart is not None:
        _heart.stop()
        _heart = None
