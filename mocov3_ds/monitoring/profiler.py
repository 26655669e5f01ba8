"""Where the time of a step goes: labelled phases, a table of them, and a trace to look at.

    with phase(StepPhase.VIEWS):     anywhere; costs a microsecond while no profile is taken
        ...

Phases nest. Time inside an inner phase is not counted for the outer one, so the rows of the table
add up to the step. The same phase inside and outside the backward gives two rows, which is how the
recomputation of a chunk is told from its first pass.

On the CPU a phase lasts from the first to the last of its lines. On a GPU, where lines only launch
work, two events on the stream bound it: nothing waits, and time in which the stream idles because
the host is late counts for the phase that comes next.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from mocov3_ds.data.storage.atomic import write_text
from mocov3_ds.distributed import ranks
from mocov3_ds.settings.wording import count_noun

WARM_UP = 2
"""steps before the profile: allocators, caches and compiled code settle"""


class StepPhase(Enum):
    """Phases of a training step; the values are their names in the trace."""

    STEP = "step"
    DATA = "data"
    VIEWS = "views"
    BACKBONE = "backbone"
    """one chunk of one view; within `BACKWARD` a chunk that is computed again"""
    HEADS = "heads"
    MOMENTUM = "momentum"
    KEYS = "keys"
    LOSS = "loss"
    BACKWARD = "backward"
    BACKWARD_OF_HEADS = "heads and loss"
    BACKWARD_OF_BACKBONES = "backbones"
    OPTIMIZER = "optimizer"
    COLLECTIVE = "collective"
    """communication between ranks, within whatever phase it happens"""


PhasePath = tuple[StepPhase, ...]
"""open phases at a moment, outermost first"""


@dataclass(frozen=True)
class TableRow:
    """A row of the table: which phases it counts."""

    title: str
    phase: StepPhase
    """the innermost phase"""
    enclosing: StepPhase | None = None
    """a phase around it; None = whatever is around it"""

    def counts(self, path: PhasePath) -> bool:
        """Tell whether time in the innermost phase of a path belongs to this row.

        Args:
            path: Open phases, outermost first.
        """
        return path[-1] is self.phase and (self.enclosing is None or self.enclosing in path)


TABLE_ROWS = (
    TableRow("wait for data", StepPhase.DATA),
    TableRow("views: copy to the device, colours, blur", StepPhase.VIEWS),
    TableRow(
        "reduction of the gradients, backward of batch norm over ranks",
        StepPhase.COLLECTIVE,
        enclosing=StepPhase.BACKWARD,
    ),
    TableRow("backward: chunks recomputed", StepPhase.BACKBONE, enclosing=StepPhase.BACKWARD),
    TableRow("backward: loss and heads", StepPhase.BACKWARD_OF_HEADS),
    TableRow("backward: backbones", StepPhase.BACKWARD_OF_BACKBONES),
    TableRow("backward: backbones", StepPhase.BACKWARD),
    TableRow("queries: backbones", StepPhase.BACKBONE),
    TableRow("queries: heads", StepPhase.HEADS),
    TableRow("momentum encoder: its move", StepPhase.MOMENTUM),
    TableRow("keys: backbones and heads", StepPhase.KEYS),
    TableRow("loss", StepPhase.LOSS),
    TableRow(
        "optimizer: norms and weights of the other ranks",
        StepPhase.COLLECTIVE,
        enclosing=StepPhase.OPTIMIZER,
    ),
    TableRow("optimizer", StepPhase.OPTIMIZER),
    TableRow("batch norm, keys and loss of the other ranks", StepPhase.COLLECTIVE),
    TableRow("everything else: metrics, log, k-NN monitor", StepPhase.STEP),
)
"""rows of the table in its order; a phase counts for the first row that fits"""


class PhaseClock:
    """Adds up the time of nested phases, each without the phases inside of it.

    Marks in time are nanoseconds on the CPU, and events of the stream on a GPU.

    Args:
        device: The device of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[StepPhase] = []
        self._spans: list[tuple[PhasePath, object, object]] = []
        self._last: object = None

    def _mark_time(self) -> object:
        if not self._cuda:
            return time.perf_counter_ns()
        make_event: Any = torch.cuda.Event  # torch has no types for it
        event = make_event(enable_timing=True)
        event.record()
        return event

    def _end_span(self) -> None:
        """Count the time since the last call for the innermost open phase."""
        mark = self._mark_time()
        if self._open:
            self._spans.append((tuple(self._open), self._last, mark))
        self._last = mark

    def enter(self, inner: StepPhase) -> None:
        """Open a phase inside the present one."""
        self._end_span()
        self._open.append(inner)

    def leave(self) -> None:
        """Close the innermost phase."""
        self._end_span()
        self._open.pop()

    def replace(self, following: StepPhase) -> None:
        """Close the innermost phase, and open another one in its place."""
        self._end_span()
        self._open[-1] = following

    def seconds(self) -> dict[PhasePath, float]:
        """Return for each path of open phases the seconds that its innermost phase took."""
        if self._cuda:
            torch.cuda.synchronize()
        total: dict[PhasePath, float] = defaultdict(float)
        for path, begin, end in self._spans:
            total[path] += _seconds_between(begin, end)
        return dict(total)


def _seconds_between(begin: object, end: object) -> float:
    if isinstance(begin, int) and isinstance(end, int):
        return (end - begin) / 1e9
    assert isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    return float(begin.elapsed_time(end)) / 1e3


_clock: PhaseClock | None = None  # of the profile that is being taken in this process


@contextmanager
def running_clock(clock: PhaseClock) -> Iterator[None]:
    """Count all phases of this process on a clock while the block runs.

    Args:
        clock: The clock, which may have counted phases before.
    """
    global _clock
    _clock = clock
    try:
        yield
    finally:
        _clock = None


@contextmanager
def phase(inner: StepPhase) -> Iterator[None]:
    """Count the time inside for a phase, and show it in the trace, while a profile is taken.

    Args:
        inner: The phase that the block is.
    """
    clock = _clock
    if clock is None:
        yield
        return
    clock.enter(inner)
    try:
        with record_function(inner.value):
            yield
    finally:
        clock.leave()


def replace_phase_in_backward(tensor: Tensor, following: StepPhase) -> None:
    """End the present phase, and begin another one, when the backward reaches a tensor.

    Args:
        tensor: A tensor that requires a gradient.
        following: The phase that begins there.
    """

    def replace_phase(_gradient: Tensor) -> None:
        if _clock is not None:
            _clock.replace(following)

    untyped_tensor: Any = tensor  # torch has no types for hooks
    untyped_tensor.register_hook(replace_phase)


class Profile:
    """Profiles some steps of a run after `WARM_UP` ones; with 0 steps each call does nothing.

    Args:
        folder: The run folder; `profile/table.md` and a Chrome trace of each rank go there.
        steps: Number of steps to profile.
        device: The device of this rank.
        say: Prints the table and, at the end, where it lies.
    """

    def __init__(
        self, folder: Path, steps: int, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._folder, self._steps, self._device, self._say = folder / "profile", steps, device, say
        self._steps_done = 0
        self._clock = PhaseClock(device)
        self._trace: profile | None = None
        self._running = ExitStack()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enclose one step of the run; all ranks must call."""
        if self._steps and self._steps_done == WARM_UP:
            self._start_profile()
        with phase(StepPhase.STEP):
            yield
        self._steps_done += 1
        if self._trace is not None and self._steps_done == WARM_UP + self._steps:
            self._finish_profile()

    def close(self) -> None:
        """Stop without a result where the run ended too early for one."""
        if self._steps and self._steps_done < WARM_UP + self._steps:
            self._running.close()
            if self._trace is not None:
                self._trace.stop()
            self._say(
                f"no profile: --profile {self._steps} takes {WARM_UP + self._steps} steps and the "
                f"run had {self._steps_done} to do"
            )

    def _start_profile(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._trace = profile(activities=activities)
        self._trace.start()
        self._running.enter_context(running_clock(self._clock))
        self._running.enter_context(ranks.timed_collectives(partial(phase, StepPhase.COLLECTIVE)))

    def _finish_profile(self) -> None:
        assert self._trace is not None
        self._running.close()
        self._trace.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._trace.export_chrome_trace(str(self._folder / f"trace-rank{ranks.rank()}.json"))
        seconds = sum_rows(self._clock.seconds())
        local_rows = {title: total / self._steps for title, total in seconds.items()}
        text = format_table(ranks.gather_objects(local_rows), self._steps)
        if ranks.is_first():
            write_text(self._folder / "table.md", text + "\n")
        self._say(f"{text}\n\n{self._folder}: the table and a trace of each rank (ui.perfetto.dev)")


def sum_rows(seconds: Mapping[PhasePath, float]) -> dict[str, float]:
    """Add up the seconds of each row of the table.

    Args:
        seconds: Path of open phases -> seconds of its innermost phase.

    Returns:
        Title of a row -> seconds.
    """
    total: dict[str, float] = defaultdict(float)
    for path, seconds_of_path in seconds.items():
        total[_row_title(path)] += seconds_of_path
    return dict(total)


def _row_title(path: PhasePath) -> str:
    return next(row.title for row in TABLE_ROWS if row.counts(path))


def format_table(rows_of_ranks: Sequence[Mapping[str, float]], steps: int) -> str:
    """Write the table in Markdown: mean over the ranks, share of the step, slowest rank.

    Args:
        rows_of_ranks: Title of a row -> seconds per step, for each rank.
        steps: Number of profiled steps.
    """
    titles = [
        title
        for title in dict.fromkeys(row.title for row in TABLE_ROWS)
        if any(title in rows for rows in rows_of_ranks)
    ]
    count = len(rows_of_ranks)
    mean = {title: sum(rows.get(title, 0.0) for rows in rows_of_ranks) / count for title in titles}
    total = sum(mean.values())
    lines = [
        f"Where the time goes: {total:.3f} s a step, mean of {steps} steps "
        f"after {WARM_UP}, {count_noun(count, 'rank')}, tracing included.\n",
        "| part | s a step | share | slowest rank, s |",
        "|---|---|---|---|",
    ]
    for title in titles:
        slowest = max(rows.get(title, 0.0) for rows in rows_of_ranks)
        share = 100 * mean[title] / total
        lines.append(f"| {title} | {mean[title]:.4f} | {share:.1f} % | {slowest:.4f} |")
    return "\n".join(lines)
