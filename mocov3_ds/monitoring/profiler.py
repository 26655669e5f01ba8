"""Where the time of a step goes: labelled phases, a table of them, and a trace to look at.

    with phase("views"):            anywhere; costs a microsecond while no profile is taken
        ...

Phases nest: time inside an inner phase is not counted for the outer one, so the rows of the table
add up to the step. A phase inside "backward" is told from the same one outside of it, which is how
the recomputation of a chunk is told from its first pass.

On the CPU a phase lasts from the first to the last of its lines. On a GPU, where lines only launch
work, two events on the stream bound it: nothing waits, and time in which the stream idles for the
host counts for the phase that comes late.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mocov3_ds.distributed import ranks

WARM_UP = 2
"""steps before the profile: allocators, caches and compiled code settle"""

# where a path ends -> row of the table, in its order; the first that fits counts
_ROWS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("data",), "wait for data"),
    (("views",), "views: copy to the device, colours, blur"),
    (("backward", "collective"), "reduction of the gradients, backward of batch norm over ranks"),
    (("backward", "backbone"), "backward: chunks recomputed"),
    (("heads and loss",), "backward: loss and heads"),
    (("backbones",), "backward: backbones"),
    (("backward",), "backward: backbones"),
    (("backbone",), "queries: backbones"),
    (("heads",), "queries: heads"),
    (("momentum",), "momentum encoder: its move"),
    (("keys",), "keys: backbones and heads"),
    (("loss",), "loss"),
    (("optimizer", "collective"), "optimizer: norms and weights of the other ranks"),
    (("optimizer",), "optimizer"),
    (("collective",), "batch norm, keys and loss of the other ranks"),
    (("step",), "everything else: metrics, log, k-NN monitor"),
)


class _Clock:
    """Adds up the own time of nested phases; marks are nanoseconds, or events of a GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[str] = []
        self._spans: list[tuple[tuple[str, ...], object, object]] = []
        self._last: object = None

    def _mark(self) -> object:
        if not self._cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _turn(self) -> None:
        """The time since the last turn belongs to the innermost open phase."""
        now = self._mark()
        if self._open:
            self._spans.append((tuple(self._open), self._last, now))
        self._last = now

    def enter(self, name: str) -> None:
        self._turn()
        self._open.append(name)

    def leave(self) -> None:
        self._turn()
        self._open.pop()

    def rename(self, name: str) -> None:
        self._turn()
        self._open[-1] = name

    def seconds(self) -> dict[tuple[str, ...], float]:
        """Path of phases -> own seconds."""
        if self._cuda:
            torch.cuda.synchronize()
        total: dict[tuple[str, ...], float] = defaultdict(float)
        for path, begin, end in self._spans:
            total[path] += _seconds(begin, end)
        return dict(total)


def _seconds(begin: object, end: object) -> float:
    if isinstance(begin, int) and isinstance(end, int):
        return (end - begin) / 1e9
    assert isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    return float(begin.elapsed_time(end)) / 1e3


_clock: _Clock | None = None  # of the profile that is being taken in this process


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time inside for `name`, and show it in the trace, while a profile is taken."""
    clock = _clock
    if clock is None:
        yield
        return
    clock.enter(name)
    try:
        with record_function(name):
            yield
    finally:
        clock.leave()


def turns_into(name: str) -> Callable[[torch.Tensor], None]:
    """A tensor hook: when the backward reaches the tensor, the phase around goes by this name."""

    def hook(_gradient: torch.Tensor) -> None:
        if _clock is not None:
            _clock.rename(name)

    return hook


class Profile:
    """Profiles `steps` steps of a run after `WARM_UP` ones; with 0 steps each call does nothing.

    Args:
        folder: run folder; `profile/table.md` and a Chrome trace of each rank go there.
        steps: how many steps.
        device: of this rank.
        say: prints the table and, at the end, where it lies.
    """

    def __init__(
        self, folder: Path, steps: int, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._folder, self._steps, self._device, self._say = folder / "profile", steps, device, say
        self._seen = 0
        self._trace: profile | None = None
        self._while_on = ExitStack()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step of the run; all ranks must come here alike."""
        if self._steps and self._seen == WARM_UP:
            self._start()
        with phase("step"):
            yield
        self._seen += 1
        if self._trace is not None and self._seen == WARM_UP + self._steps:
            self._finish()

    def close(self) -> None:
        """Stop without a result where the run ended too early for one."""
        global _clock
        if self._steps and self._seen < WARM_UP + self._steps:
            _clock = None
            self._while_on.close()
            if self._trace is not None:
                self._trace.stop()
            self._say(
                f"no profile: --profile {self._steps} takes {WARM_UP + self._steps} steps and the "
                f"run had {self._seen} to do"
            )

    def _start(self) -> None:
        global _clock
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._trace = profile(activities=activities)
        self._trace.start()
        _clock = _Clock(self._device)
        self._while_on.enter_context(ranks.timed_collectives(phase))

    def _finish(self) -> None:
        global _clock
        assert _clock is not None and self._trace is not None
        clock, _clock = _clock, None
        self._while_on.close()
        self._trace.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._trace.export_chrome_trace(str(self._folder / f"trace-rank{ranks.rank()}.json"))
        own = {row: seconds / self._steps for row, seconds in rows(clock.seconds()).items()}
        text = table(ranks.gather_objects(own), self._steps)
        if ranks.is_first():
            (self._folder / "table.md").write_text(text + "\n")
        self._say(f"{text}\n\n{self._folder}: the table and a trace of each rank (ui.perfetto.dev)")


def rows(seconds: dict[tuple[str, ...], float]) -> dict[str, float]:
    """Row of the table -> seconds, from the paths of phases."""
    result: dict[str, float] = defaultdict(float)
    for path, own in seconds.items():
        result[_row(path)] += own
    return dict(result)


def _row(path: tuple[str, ...]) -> str:
    for suffix, row in _ROWS:
        if path[-1] == suffix[-1] and set(suffix) <= set(path):
            return row
    raise AssertionError(f"no row for the phase {path}")


def table(of_ranks: list[dict[str, float]], steps: int) -> str:
    """Markdown: mean seconds of a row over the ranks, its share, and the slowest rank's seconds."""
    wanted = dict.fromkeys(row for _, row in _ROWS)
    names = [row for row in wanted if any(row in own for own in of_ranks)]
    mean = {name: sum(own.get(name, 0.0) for own in of_ranks) / len(of_ranks) for name in names}
    total = sum(mean.values())
    lines = [
        f"Where the time goes: {total:.3f} s a step, mean of {steps} steps "
        f"after {WARM_UP}, {len(of_ranks)} rank{'s' * (len(of_ranks) > 1)}, tracing included.\n",
        "| part | s a step | share | slowest rank, s |",
        "|---|---|---|---|",
    ]
    for name in names:
        slowest = max(own.get(name, 0.0) for own in of_ranks)
        share = 100 * mean[name] / total
        lines.append(f"| {name} | {mean[name]:.4f} | {share:.1f} % | {slowest:.4f} |")
    return "\n".join(lines)
