"""Which layer group makes an event? The run is repeated without each of them.

    mocov3 stability replay RUN EVENT

The run goes back to a checkpoint before the event and lives through it again, each time with one
layer group frozen (or slowed) from there on; the group without which the event does not come is
its cause. Each of these runs is an ordinary one, forked from a copy of the checkpoint. The control,
with nothing frozen, must repeat the original to the last bit (CPU, same number of ranks).

    OUT/replay.json      which run, event, checkpoint and factor the forks are of
    OUT/cells/rewind/    only where no checkpoint is near enough: the run repeated up to there
    OUT/cells/NAME/      control, and one fork for each group
    OUT/replay.csv       what remains of the event in each
    OUT/replay.png
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.data.storage import atomic
from mocov3_ds.monitoring.metrics_file import read_rows
from mocov3_ds.settings.comparison import differences
from mocov3_ds.stability import figures
from mocov3_ds.stability.cells import default_launcher
from mocov3_ds.stability.csv_file import write_csv
from mocov3_ds.stability.drawing import as_png, write_png
from mocov3_ds.stability.events import LOSS_WINDOW, plain_jumps
from mocov3_ds.stability.findings import GradientEvent, Judgement, LossEvent, Series
from mocov3_ds.stability.forks import ForkFolder, ShowOutcomes
from mocov3_ds.stability.series import read_series
from mocov3_ds.stability.trailing import trailing_ratio, window_length
from mocov3_ds.stability.verdict import judge

Event = LossEvent | GradientEvent

CONTROL = "nothing"
"""name of the fork in which no group is frozen"""
CAUSE_BELOW = 0.5
"""a group is a cause if freezing it leaves less than this share of the control's event"""
_REWIND = "rewind"
_CLAIM = "replay.json"


@dataclass(frozen=True, kw_only=True)
class Span:
    """How far around an event the run is repeated, in steps."""

    steps: int = 60
    """shortest repetition from the checkpoint on"""
    steps_before: int = 20
    """from a checkpoint that is made for the purpose to the event"""
    steps_after: int = 10
    """repeated beyond the event"""
    nearest: int = 5
    """a kept checkpoint must be at least so many steps before the event ..."""
    farthest: int = 100
    """... and at most so many, or a nearer one is made"""


@dataclass(frozen=True, kw_only=True)
class CounterfactualOptions:
    """What the forks change, and how they are trained."""

    factor: float = 0.0
    """rate of the chosen group relative to the run's; 0 = frozen"""
    groups: tuple[str, ...] = ()
    """groups to try; empty = all that are trained"""
    launcher: str = ""
    """command line before train.py; empty = `cells.default_launcher`"""
    workers: int = 1
    """forks that are trained at a time"""
    span: Span = Span()


@dataclass(frozen=True)
class ForkResult:
    """What one fork showed.

    Attributes:
        group: group that was frozen or slowed; `CONTROL` for none.
        loss_excess: largest loss of the event's steps over its trailing median, minus 1.
        gradient: largest gradient of any group over its own trailing median.
        remaining: share of the control's event that remains; the loss's for a loss event, else the
            gradient's above 1.
    """

    group: str
    loss_excess: float
    gradient: float
    remaining: float


@dataclass(frozen=True)
class Counterfactual:
    """What all forks of an event showed.

    Attributes:
        event: event that was repeated.
        out: folder of the forks.
        start: step of the checkpoint.
        stop: last step.
        factor: rate of the chosen group in a fork, relative to the run's.
        exact: whether the control repeated the run's losses bit for bit.
        results: control first, then the groups from input to output.
        sentence: the answer in words.
    """

    event: Event
    out: Path
    start: int
    stop: int
    factor: float
    exact: bool
    results: tuple[ForkResult, ...]
    sentence: str


def choose_event(run: Path, which: str) -> Event:
    """The event of a run that is `largest`, or nearest to a step.

    Raises:
        ValueError: the folder holds no run, the run has no event, or `which` is neither.
    """
    series = read_series(run)
    return find_event(judge(series), plain_jumps(series), which)


def find_event(judgement: Judgement, jumps: Sequence[LossEvent], which: str) -> Event:
    """The largest event, or the one nearest to a step.

    Loss events where there are any, else gradient events, else the plain jumps of the loss.

    Raises:
        ValueError: the run has no event, or `which` is neither.
    """
    events: Sequence[Event] = judgement.loss_events or judgement.gradient_events or jumps
    if not events:
        raise ValueError(
            f"the run is {judgement.verdict} and has no event to replay: {judgement.why}"
        )
    if which == "largest":
        return max(events, key=lambda e: e.excess if isinstance(e, LossEvent) else e.ratio)
    if not which.isdigit():
        raise ValueError(
            f"event {which!r} must be 'largest' or a step; there are events at "
            f"{', '.join(str(event.peak) for event in events)}."
        )
    return min(events, key=lambda event: abs(event.peak - int(which)))


def repeat_without_groups(
    run: Path,
    event: Event,
    out: Path | None,
    options: CounterfactualOptions,
    *,
    show: ShowOutcomes,
) -> Counterfactual:
    """Repeat an event in forks, write table and picture; the same call again goes on.

    Args:
        run: run folder that the forks begin from.
        event: event of the run, from `choose_event`.
        out: folder of the forks; None = beside the run, named after it, the event and the factor.
        options: what the forks change, and how they are trained.
        show: called with the outcomes of the forks as they come, and their number.

    Raises:
        ValueError: no run, an unknown group, a folder of another event, or a fork that failed.
    """
    series = read_series(run)
    trained, factor, span = series.trained_groups(), options.factor, options.span
    for group in {*options.groups} - {*trained}:
        raise ValueError(f"group {group!r} is not one of {', '.join(trained)}.")
    start = _near_checkpoint(run, event, span)
    name = f"{run.resolve().name}-replay-step-{event.peak}-rate-{factor:g}"
    out = out or run.parent / name
    claim_folder(out, run, event, start, factor)
    settings = json.loads((run / "config.json").read_text())
    forks = ForkFolder(out, settings, options.launcher or default_launcher())
    source = run
    if start is None:
        start = max(event.first - span.steps_before, 1)
        source = _repeat_up_to(run, start, forks, show)
    # no fork outlives the schedule
    stop = min(max(start + span.steps, event.last + span.steps_after), series.total_steps)
    names = [CONTROL, *(options.groups or trained)]
    saved = checkpoint.checkpoint_folder(source, start)
    for name in names:
        slowed = {} if name == CONTROL else {name: factor}
        forks.add(name, slowed, stop=stop, source=source, saved=saved)
    forks.train(names, options.workers, show)
    results = tuple(_compare_forks(forks, names, event, start, stop))
    exact = _is_repeated(run, forks.run_folder(CONTROL), start, min(stop, int(series.steps_T[-1])))
    sentence = describe_results(results, event, factor, exact)
    answer = Counterfactual(event, out, start, stop, factor, exact, results, sentence)
    _write_answer(answer, forks)
    return answer


def _repeat_up_to(run: Path, step: int, forks: ForkFolder, show: ShowOutcomes) -> Path:
    """Run folder of a fork that changes nothing and ends with a checkpoint of `step`."""
    folders = checkpoint.list_checkpoints(run)
    earlier = [folder for folder in folders if checkpoint.step_in_name(folder) <= step]
    forks.add(_REWIND, {}, stop=step, source=run, saved=earlier[-1] if earlier else None)
    forks.train([_REWIND], 1, show)
    return forks.run_folder(_REWIND)


def claim_folder(out: Path, run: Path, event: Event, start: int | None, factor: float) -> None:
    """Write down what the forks are of: with another answer they must not go on.

    `start` is None where the run is repeated up to a new checkpoint first.

    Raises:
        ValueError: the folder holds the forks of another event, checkpoint or factor.
    """
    claim = {
        "run": str(run.resolve()),
        "event": f"{_kind(event)} at step {event.peak}",
        "from": "a rewind" if start is None else f"the checkpoint of step {start}",
        "factor": factor,
    }
    path = out / _CLAIM
    changes = ["forks of an earlier version"] if (out / "cells").exists() else []
    if path.exists():
        changes = list(differences(json.loads(path.read_text()), claim))
    if changes:
        raise ValueError(
            f"{out} holds another replay: {'; '.join(changes)}. Give --out another folder, or "
            "move this one away."
        )
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(claim, indent=1))


def _kind(event: Event) -> str:
    return "loss" if isinstance(event, LossEvent) else "gradient"


def _near_checkpoint(run: Path, event: Event, span: Span) -> int | None:
    """Step of the kept checkpoint to go back to; None where none is near enough."""
    steps = [checkpoint.step_in_name(folder) for folder in checkpoint.list_checkpoints(run)]
    near = [s for s in steps if event.first - span.farthest <= s <= event.first - span.nearest]
    return max(near, default=None)


# ----------------------------------------------------------------------------------------- answer


def _compare_forks(
    forks: ForkFolder, names: Sequence[str], event: Event, start: int, stop: int
) -> Iterator[ForkResult]:
    """The event in each fork, as a share of the control's; the control comes first."""
    control_size = 0.0
    for name in names:
        series = read_series(forks.run_folder(name))
        loss_excess, gradient = measure_event(series, start, stop)
        size = loss_excess if isinstance(event, LossEvent) else gradient - 1
        control_size = size if name == CONTROL else control_size
        remaining = max(size, 0.0) / control_size if control_size > 0 else np.nan
        yield ForkResult(name, loss_excess, gradient, remaining)


def measure_event(series: Series, start: int, stop: int) -> tuple[float, float]:
    """Largest loss excess and gradient ratio of the steps in (start, stop]; infinite on a NaN."""
    if series.stopped_non_finite:
        return np.inf, np.inf
    inside_T = (series.steps_T > start) & (series.steps_T <= stop)
    window = window_length(len(series.steps_T), LOSS_WINDOW)
    loss_T = trailing_ratio(series.loss_T, window)[inside_T]
    ratios = [trailing_ratio(row_T, window)[inside_T] for row_T in series.grad_linf_GT]
    gradient = max((float(np.nanmax(r, initial=0.0)) for r in ratios), default=0.0)
    return float(np.nanmax(loss_T, initial=1.0)) - 1, gradient


def _is_repeated(run: Path, control: Path, start: int, stop: int) -> bool:
    """Whether the control has the run's losses of (start, stop], bit for bit."""
    losses: list[list[Any]] = []
    for folder in (run, control):
        rows = read_rows(folder / "metrics.jsonl")
        losses.append([r["loss"] for r in rows if "loss" in r and start < r["step"] <= stop])
    return losses[0] == losses[1]


def describe_results(
    results: Sequence[ForkResult], event: Event, factor: float, exact: bool
) -> str:
    """Which group makes the event, and how sure one may be of it; the control comes first."""
    change = "freezing" if factor == 0 else f"slowing to {factor:g} of its rate"
    kind = _kind(event)
    control, *forks = results
    if not control.remaining > 0:
        why = (
            "although it repeats the run bit for bit: nothing stands above its trailing median"
            if exact
            else "since it is not bit-equal to the run: the replay is not exact"
        )
        return f"The control shows no {kind} event, so nothing can be said, {why}."
    causes = [fork for fork in forks if fork.remaining < CAUSE_BELOW]
    sure = "the control repeats the run bit for bit" if exact else "the control is not bit-equal"
    if not causes:
        smallest = min(forks, key=lambda fork: fork.remaining, default=control)
        return (
            f"{change.capitalize()} no single group removes the {kind} event at step {event.peak}: "
            f"the least is left with {smallest.group} ({smallest.remaining:.0%}); {sure}."
        )
    strongest, *weaker = sorted(causes, key=lambda fork: fork.remaining)
    also = ", ".join(f"{fork.group} {fork.remaining:.0%}" for fork in weaker)
    return (
        f"{change.capitalize()} {strongest.group} leaves {strongest.remaining:.0%} of the {kind} "
        f"event at step {event.peak}{f' (so do {also})' if also else ''}; {sure}."
    )


def _write_answer(answer: Counterfactual, forks: ForkFolder) -> None:
    rows = [
        {
            "group": fork.group,
            "loss_excess": fork.loss_excess,
            "gradient": fork.gradient,
            "left": fork.remaining,
        }
        for fork in answer.results
    ]
    write_csv(answer.out / "replay.csv", rows)
    lines = {fork.group: read_series(forks.run_folder(fork.group)) for fork in answer.results}
    figure = figures.draw_forks(lines, answer.start, answer.stop, answer.event.peak)
    write_png(answer.out / "replay.png", as_png(figure))


def format_answer(answer: Counterfactual) -> str:
    """Table and answer for a terminal."""
    width = max(len(fork.group) for fork in answer.results)
    heading = "frozen" if answer.factor == 0 else "slowed"
    lines = [f"{heading:{width}}  loss excess  gradient  left"]
    lines += [
        f"{fork.group:{width}}  {fork.loss_excess:10.1%}  {fork.gradient:7.1f}x  "
        f"{fork.remaining:4.0%}"
        for fork in answer.results
    ]
    return "\n".join([*lines, answer.sentence])
