"""What is concluded from the heartbeats of ranks: which one died, fell silent, or hangs.

Everything here is a pure function of what ranks say of themselves; `heartbeat` sends and receives.

    a connection broke                       the process of that rank was killed or crashed
    a rank was silent for `SILENCE_S`        it was stopped, or its machine or network is gone
    the rank behind all others has been in   its main thread hangs
    one stage for longer than is allowed

How long a stage may last comes from the run itself: `HANG_FACTOR` times the longest so far on that
rank, and at least `SHORTEST_LIMIT_S`. The first two stages of each kind, which compile and tune,
may take an hour.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mocov3_ds.settings.environment import read_number
from mocov3_ds.settings.wording import count_noun

PEER_LOST_STATUS = 75
"""exit status of a rank that ends because another one, or the launcher, did ("try again" of
sysexits.h)"""
INTERRUPTED_STATUS = 130
"""exit status of a run that Ctrl-C has ended, as a shell has it"""
SILENCE_S = 20.0
"""seconds without a heartbeat after which a rank in its training loop counts as lost"""
STARTUP_FACTOR = 6
"""before the loop, a rank may be silent for this many times as long"""
HANG_FACTOR = 10.0
"""a stage may take this many times as long as the longest one of its kind so far"""
FIRST_LIMIT_S = 3600.0
"""seconds that each of the first two stages of a kind may take"""

Stage = Literal["start", "data", "step", "look", "log", "save", "close"]

SHORTEST_LIMIT_S: dict[Stage, float] = {"data": 60.0, "step": 40.0, "log": 600.0, "save": 600.0}
"""limited stages in their order within a step -> seconds that each may always take"""


class StageTimer:
    """Knows how long the present stage has lasted and how long it may last.

    Args:
        hang_timeout: Seconds that every limited stage may take; 0 = follow the run's own history.
    """

    def __init__(self, hang_timeout: float) -> None:
        self._hang_timeout = hang_timeout
        self.step = 0
        """the step that the rank is in, from 1; 0 before the loop"""
        self.stage: Stage = "start"
        self._since = 0.0  # by the clock, as below
        self._longest: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def enter(self, step: int, stage: Stage, clock: float) -> None:
        """End the present stage and begin another one.

        Args:
            step: The step that the new stage belongs to, from 1.
            stage: The stage that begins now.
            clock: Seconds on the rank's clock now.
        """
        spent = self.seconds(clock)
        self._longest[self.stage] = max(spent, self._longest.get(self.stage, 0.0))
        self._counts[self.stage] += 1
        self.step, self.stage, self._since = step, stage, clock

    def seconds(self, clock: float) -> float:
        """Return the seconds since the present stage began.

        Args:
            clock: Seconds on the rank's clock now.
        """
        return clock - self._since

    @property
    def steps_done(self) -> int:
        """Number of steps that are complete."""
        return self.step - 1 if self.stage in ("data", "step") and self.step else self.step

    def limit(self) -> float:
        """Return the seconds that the present stage may take; infinite for some stages."""
        if self.stage not in SHORTEST_LIMIT_S:
            return math.inf
        if self._hang_timeout:
            return self._hang_timeout
        if self._counts[self.stage] < 2:
            return FIRST_LIMIT_S
        shortest = SHORTEST_LIMIT_S[self.stage]
        if self.stage == "data":  # an unreachable store is retried for so long
            shortest += read_number("MOCOV3_STORAGE_PATIENCE_S")
        return max(shortest, HANG_FACTOR * self._longest.get(self.stage, 0.0))


@dataclass
class Beat:
    """What a rank says of itself twice a second."""

    step: int = 0
    """the step that it is in, from 1; 0 before the loop"""
    stage: Stage = "start"
    seconds: float = 0.0
    """time in that stage so far"""
    limit: float = math.inf
    """seconds that the stage may take"""
    location: str = ""
    """line that its main thread is at, once the stage takes long"""
    waits: bool = False
    """whether it is in a collective, where it may wait for another rank"""
    entered: int = 0
    """collectives that it has entered so far, of all its threads"""
    used_gib: float = 0.0
    """memory of the process"""
    free_gib: float = 0.0
    """memory that its machine has left"""
    oom_kills: int = 0
    """times that the machine's kernel has killed a process for lack of memory"""
    saved: str | None = None
    """name of the newest checkpoint that the rank knows of; empty = there is none"""

    @property
    def progress(self) -> tuple[int, int]:
        """Orders ranks by how far they are."""
        order = list(SHORTEST_LIMIT_S)
        return self.step, order.index(self.stage) if self.stage in order else len(order)

    def describe_progress(self) -> str:
        """Return step and stage in words."""
        return f"step {self.step}, {self.stage}" if self.step else "the start"


@dataclass
class Member:
    """A rank as another rank sees it."""

    rank: int
    host: str
    pid: int
    born: float
    """start of the process in seconds, to tell it from a later one of the same number"""
    beat: Beat = field(default_factory=Beat)
    """the last one that was received"""
    heard: float = 0.0
    """seconds on the listener's clock when something was last received"""
    is_leaving: bool = False
    """it has said goodbye or why it gives up, so its end is no news"""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def silence_limit(member: Member, listener_step: int, silence_s: float) -> float:
    """Return the seconds that a rank may be silent; infinite for one that is leaving.

    Args:
        member: The rank, with its last beat.
        listener_step: Step that the listening rank is in; from its second step on, all ranks must
            have passed the first.
        silence_s: Seconds that a rank in its training loop may be silent.
    """
    if member.is_leaving:
        return math.inf
    in_loop = member.beat.step > 0 or listener_step > 1
    return silence_s if in_loop else STARTUP_FACTOR * silence_s


def describe_death(member: Member, *, same_host: bool, oom_kills: int) -> str:
    """Say what is known of a rank whose connection broke.

    Args:
        member: The rank, with its last beat.
        same_host: Whether it ran on the machine of the rank that speaks.
        oom_kills: Times that the kernel of the speaker's machine has killed for lack of memory.
    """
    beat = member.beat
    memory = f"it used {beat.used_gib:.1f} GiB and its host had {beat.free_gib:.1f} GiB left"
    if same_host and oom_kills > beat.oom_kills:
        reason = f"the kernel's out-of-memory killer struck on its host ({memory})"
    else:
        reason = f"killed, or crashed in native code; {memory}"
    return f"{member} died without a word in {beat.describe_progress()}: {reason}."


def describe_silence(member: Member, seconds: float) -> str:
    """Say that a rank sends nothing though its connection stands.

    Args:
        member: The rank, with its last beat.
        seconds: How long nothing was received from it.
    """
    return (
        f"{member} has been silent for {seconds:.0f} s in {member.beat.describe_progress()}: its "
        "process is stopped, or its host or network is gone."
    )


def describe_hang(members: Sequence[Member]) -> str | None:
    """Say that a run stands still, and at which ranks; None where it goes on.

    The ranks that are behind all others are what these wait for: only their limits count. Of these
    the ones that have entered the fewest collectives are to blame: under NCCL a collective returns
    at once, and its rank waits at whatever next reads a value, so that where it stands says little.

    Args:
        members: All ranks that are not leaving, with their last beats.
    """
    progress = min(member.beat.progress for member in members)
    hindmost = [member for member in members if member.beat.progress == progress]
    overdue = [member for member in hindmost if member.beat.seconds > member.beat.limit]
    if not overdue:
        return None
    fewest = min(member.beat.entered for member in hindmost)
    culprits = [member for member in hindmost if member.beat.entered == fewest]
    reason = ""
    if len(culprits) == len(hindmost):
        # a rank that waits in a collective is not to blame, unless all of them do
        culprits = [member for member in hindmost if not member.beat.waits] or overdue
        if fewest and len(culprits) == len(members) > 1:
            reason = (
                f" All have entered the same {fewest} collectives: the network between them, or a "
                "device, may stand still."
            )
    named = "; ".join(f"{m} in {m.beat.location or 'native code'}" for m in culprits[:4])
    unnamed = f" and {len(culprits) - 4} more" if len(culprits) > 4 else ""
    beat = max((member.beat for member in overdue), key=lambda beat: beat.seconds)
    return (
        f"no progress for {beat.seconds:.0f} s (limit {beat.limit:.0f} s, --hang_timeout) in "
        f"{beat.describe_progress()}: {named}{unnamed} hangs.{reason}"
    )


def exit_message(sentence: str, status: int, saved: str | None, steps_done: int) -> str:
    """Return the line that a run ends with, and what to do where the same command may help.

    Args:
        sentence: What happened, with or without a full stop.
        status: Exit status of the run.
        saved: Name of the newest checkpoint; empty = there is none, None = not yet known.
        steps_done: Number of steps that are complete.
    """
    if status not in (1, PEER_LOST_STATUS, INTERRUPTED_STATUS):
        return sentence
    stop = "" if sentence.endswith(".") else "."
    # what one rank has met, such as data that are gone, the same command alone would meet again
    condition = "Once that is mended, the" if status == 1 else "The"
    return f"{sentence}{stop} {condition} {describe_way_on(saved, steps_done)}"


def describe_way_on(saved: str | None, steps_done: int) -> str:
    """Say from where the same command goes on: half a sentence, and what is lost.

    Args:
        saved: Name of the newest checkpoint; empty = there is none, None = not yet known.
        steps_done: Number of steps that are complete.
    """
    if saved is None:
        return "same command tries again."
    if not saved:
        return (
            "same command starts from the beginning: there is no checkpoint yet"
            f"{_describe_loss(steps_done)}."
        )
    loss = _describe_loss(steps_done - step_in_name(saved))
    return f"same command continues from the newest checkpoint, {saved}{loss}."


def step_in_name(saved: str) -> int:
    """Return the number of steps done that the name of a checkpoint tells.

    Args:
        saved: Name of its folder, `step-NNNNNNNN`.
    """
    return int(saved.rpartition("-")[2])


def _describe_loss(steps: int) -> str:
    return f" ({count_noun(steps, 'step')} since then will be repeated)" if steps > 0 else ""
