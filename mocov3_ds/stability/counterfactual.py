"""Counterfactual replay: which layer group makes an event?

    mocov3 stability replay RUN EVENT

The run goes back to a checkpoint before the event and lives through it again, each time with one
layer group frozen (or slowed) from there on; the group without which the event does not come is
its cause. Each of these runs is an ordinary one, forked from a copy of the checkpoint. The control,
with nothing frozen, must repeat the original to the last bit (CPU, same number of ranks).

    OUT/replay.json      which run, event, checkpoint and factor the forks are of
    OUT/cells/rewind/    only where no checkpoint is near enough: the run repeated up to there
    OUT/cells/NAME/      control, and one fork for each group
    OUT/replay.csv       what is left of the event in each
    OUT/replay.png
"""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.config import RECIPES, Config, from_json
from mocov3_ds.data.storage import atomic
from mocov3_ds.monitoring.run_log import keep_rows_until, read_rows
from mocov3_ds.stability import figures
from mocov3_ds.stability import run as runs
from mocov3_ds.stability.figures import Seen
from mocov3_ds.stability.grid import Cell, flag
from mocov3_ds.stability.series import read_series
from mocov3_ds.stability.verdict import GradientEvent, Judgement, LossEvent, Series, judge

Event = LossEvent | GradientEvent

CONTROL = "nothing"
STEPS = 60
"""Shortest replay, steps from the checkpoint."""
BEFORE = 20
"""Steps between a checkpoint that is made for the purpose and the event."""
NEAREST = 5
"""A kept checkpoint must be at least so many steps before the event ..."""
FARTHEST = 100
"""... and at most so many, or a nearer one is made."""
AFTER = 10
"""Steps that are replayed beyond the event."""
GONE = 0.5
"""A group is a cause if freezing it leaves less than this share of the control's event."""
STILL = 1e-30
"""Rate that stands for frozen: no weight moves, while the momentum encoder goes on as it was going.
A rate of 0 would take the group out of training, and its momentum encoder's copy would jump."""
_ENGINE, _OF = "deepspeed.json", "replay.json"


@dataclass(frozen=True)
class Replayed:
    """What one fork showed.

    Attributes:
        group: frozen or slowed; `CONTROL` for none.
        loss_excess: largest loss of the event's steps over its trailing median, minus 1.
        gradient: largest gradient of any group over its own trailing median.
        left: share of the control's event that is left; the loss's for a loss event, else the
            gradient's above 1.
    """

    group: str
    loss_excess: float
    gradient: float
    left: float


@dataclass(frozen=True)
class Answer:
    """What a replay showed.

    Attributes:
        event: that was replayed.
        out: folder of the forks.
        start: step of the checkpoint.
        stop: last step.
        factor: rate of the chosen group in a fork, relative to the run's.
        exact: whether the control repeated the run's losses bit for bit.
        found: control first, then the groups from input to output.
        sentence: the answer.
    """

    event: Event
    out: Path
    start: int
    stop: int
    factor: float
    exact: bool
    found: tuple[Replayed, ...]
    sentence: str


def replay(
    run: Path,
    which: str,
    out: Path | None,
    *,
    factor: float = 0.0,
    groups: Sequence[str] = (),
    launcher: str = "",
    watch: Callable[[Iterator[runs.Outcome], int], object],
    workers: int = 1,
) -> Answer:
    """Replay an event and write table and picture; started again it goes on where it stopped.

    Args:
        run: run folder.
        which: `largest`, or a step: the event nearest to it.
        out: folder of the forks; None = beside the run, named after it, the event and the factor.
        factor: rate of the chosen group relative to the run's; 0 = frozen.
        groups: to try; empty = all that are trained.
        launcher: see `run.prepare`.
        watch: shows the outcomes of so many forks and consumes them.
        workers: forks at a time.

    Raises:
        ValueError: no run, no event, an unknown group, a folder of another replay, or a fork that
            failed.
    """
    series = read_series(run)
    event = find_event(judge(series), figures.jumps(series), which)
    trained = trained_groups(series)
    for group in groups:
        if group not in trained:
            raise ValueError(f"group {group!r} is not one of {', '.join(trained)}.")
    settings = json.loads((run / "config.json").read_text())
    start = _nearest(run, event)
    if out is None:
        out = run.parent / f"{run.resolve().name}-replay-step-{event.peak}-rate-{factor:g}"
    _claim(out, run, event, start, factor)
    (out / _ENGINE).write_text(json.dumps(settings["deepspeed"], indent=1))
    plan = _Plan(out, settings, launcher or runs.default_launcher())
    source = run
    if start is None:
        start = max(event.first - BEFORE, 1)
        plan.add("rewind", {}, stop=start)
        _fork(_earlier(run, start), run, out / "cells" / "rewind", plan.config("rewind"))
        watch(runs.here(out, plan.undone(["rewind"]), 1), 1)
        source = out / "cells" / "rewind"
        plan.need(["rewind"])
    # no fork outlives the schedule
    stop = min(max(start + STEPS, event.last + AFTER), series.total_steps)
    names = [CONTROL, *(groups or trained)]
    for name in names:
        slowed = {} if name == CONTROL else {name: factor}
        plan.add(name, slowed, stop=stop)
        _fork(_folder(source, start), source, out / "cells" / name, plan.config(name))
    left = plan.undone(names)
    watch(runs.here(out, left, workers), len(left))
    plan.need(names)
    found = tuple(_compare(out, names, event, start, stop))
    both = min(stop, int(series.steps_T[-1]))  # the run may have been cut short
    exact = _losses(out / "cells" / CONTROL, start, both) == _losses(run, start, both)
    answer = Answer(
        event, out, start, stop, factor, exact, found, _sentence(found, event, factor, exact)
    )
    _write(out, answer)
    return answer


def find_event(judgement: Judgement, jumps: Sequence[LossEvent], which: str) -> Event:
    """The largest event, or the one nearest to a step.

    Loss events where there are any, else gradient events, else mere jumps of the loss.

    Raises:
        ValueError: the run has none, or `which` is neither.
    """
    events: Sequence[Event] = judgement.loss_events or judgement.gradient_events or jumps
    if not events:
        raise ValueError(
            f"the run is {judgement.verdict} and has no event to replay: {judgement.why}"
        )
    if which == "largest":
        return max(events, key=_size)
    if not which.isdigit():
        raise ValueError(
            f"event {which!r} must be 'largest' or a step; there are events at "
            f"{', '.join(str(event.peak) for event in events)}."
        )
    return min(events, key=lambda event: abs(event.peak - int(which)))


def _size(event: Event) -> float:
    return event.excess if isinstance(event, LossEvent) else event.ratio


def trained_groups(series: Series) -> list[str]:
    """Groups whose gradient was measured, from input to output."""
    rows = zip(series.groups, series.grad_linf_GT, strict=True)
    return [group for group, grad_T in rows if np.isfinite(grad_T).any()]


# ------------------------------------------------------------------------------------------ forks


def _claim(out: Path, run: Path, event: Event, start: int | None, factor: float) -> None:
    """Write down what the forks are of: with another answer they must not go on.

    Raises:
        ValueError: the folder holds those of another replay.
    """
    mine = {
        "run": str(run.resolve()),
        "event": f"{'loss' if isinstance(event, LossEvent) else 'gradient'} at step {event.peak}",
        "from": "a rewind" if start is None else f"the checkpoint of step {start}",
        "factor": factor,
    }
    path = out / _OF
    if path.exists():
        theirs = json.loads(path.read_text())
        differing = [
            f"{key} {theirs.get(key)} there, {value} here"
            for key, value in mine.items()
            if theirs.get(key) != value
        ]
    else:
        differing = ["forks of an earlier version"] * (out / "cells").exists()
    if differing:
        raise ValueError(
            f"{out} holds another replay: {'; '.join(differing)}. Give --out another folder, or "
            "move this one away."
        )
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(mine, indent=1))


class _Plan:
    """The folder of the forks, which is that of a grid: a cell for each."""

    def __init__(self, out: Path, settings: Mapping[str, Any], launcher: str) -> None:
        self._out, self._settings = out, settings
        (out / "logs").mkdir(exist_ok=True)
        (out / "outcomes").mkdir(exist_ok=True)
        self._tree: dict[str, Any] = {
            "name": "replay",
            "scale": "",
            "title": "Replay",
            "about": "",
            "launcher": launcher,
            "cells": {},
        }
        self._stops: dict[str, int] = {}

    def add(self, name: str, slowed: Mapping[str, float], *, stop: int) -> None:
        """A fork in which some groups learn at a part of their rate, or not at all."""
        self._stops[name] = stop
        wanted = flags_of(self.config(name, slowed)["config"])
        wanted += ["--deepspeed_config", str((self._out / _ENGINE).absolute())]
        wanted += ["--stop_after_steps", str(stop)]
        cell = Cell(name, name, {"seed": 0}, {})
        self._tree["cells"][name] = {
            **dataclasses.asdict(cell),
            "flags": wanted,
            "slowed": dict(slowed),
        }
        (self._out / "grid.json").write_text(json.dumps(self._tree, indent=1))

    def config(self, name: str, slowed: Mapping[str, float] | None = None) -> dict[str, Any]:
        """What the fork's `config.json` holds."""
        if slowed is None:
            slowed = self._tree["cells"][name]["slowed"]
        tree: dict[str, Any] = json.loads(json.dumps(self._settings))
        for group, factor in slowed.items():
            slow(tree["config"], group, factor)
        return tree

    def undone(self, names: Sequence[str]) -> list[str]:
        """Forks that have not come to their last step."""
        return [name for name in names if self._last_step(name) < self._stops[name]]

    def _last_step(self, name: str) -> int:
        rows = read_rows(self._out / "cells" / name / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def need(self, names: Sequence[str]) -> None:
        """Raises ValueError where a fork did not come to its end, nor diverged."""
        for name in self.undone(names):
            outcome = runs.outcome_of(self._out, name)
            if outcome is None or outcome.status != "diverged":
                words = outcome.words if outcome else "it did not run"
                raise ValueError(f"the fork {self._out / 'cells' / name} failed: {words}")


def slow(config: dict[str, Any], group: str, factor: float) -> None:
    """Let a group learn at `factor` of the rate it has in a run's `config.json`."""
    rates = dict(entry.partition("=")[::2] for entry in config["model"].get("group_lr", ()))
    rates[group] = f"{float(rates.get(group, 1)) * max(factor, STILL):g}"
    config["model"]["group_lr"] = [f"{name}={rate}" for name, rate in rates.items()]


def flags_of(config: Mapping[str, Any]) -> list[str]:
    """The `config` part of a `config.json` as flags, those of its recipe left out."""
    mine = from_json({"config": config})
    default = RECIPES[mine.recipe].config
    out = ["--recipe", mine.recipe]
    skipped = ("recipe", "name", "runs", "stop_after_steps", "deepspeed_config", "ds")
    for key, value in _leaves(mine):
        if key not in skipped and value != dict(_leaves(default))[key]:
            out += flag(key, value)
    return out


def _leaves(config: Config) -> Iterator[tuple[str, Any]]:
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            for leaf in dataclasses.fields(value):
                yield f"{entry.name}.{leaf.name}", getattr(value, leaf.name)
        else:
            yield entry.name, value


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _nearest(run: Path, event: Event) -> int | None:
    """Step of the kept checkpoint to go back to; None where none is near enough."""
    steps = [checkpoint.step_of(folder) for folder in checkpoint.folders(run)]
    near = [s for s in steps if event.first - FARTHEST <= s <= event.first - NEAREST]
    return max(near, default=None)


def _earlier(run: Path, step: int) -> Path | None:
    """The last kept checkpoint up to a step; None = from the start."""
    kept = [folder for folder in checkpoint.folders(run) if checkpoint.step_of(folder) <= step]
    return kept[-1] if kept else None


def _fork(saved: Path | None, source: Path, target: Path, settings: Mapping[str, Any]) -> None:
    """A run folder that goes on from a checkpoint of another; left alone where it is there."""
    if saved is None or (target / "config.json").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    folder = target / "checkpoints" / saved.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    (target / "checkpoints" / "latest").write_text(saved.name + "\n")
    for name in ("metrics.jsonl", "signals.json", "signals.f32"):
        if (source / name).exists():
            shutil.copy2(source / name, target / name)
    keep_rows_until(target / "metrics.jsonl", checkpoint.step_of(saved))
    # the last thing: with it the fork is whole
    atomic.write_text(target / "config.json", json.dumps(settings, indent=1))


# ----------------------------------------------------------------------------------------- answer


def _compare(
    out: Path, names: Sequence[str], event: Event, start: int, stop: int
) -> Iterator[Replayed]:
    """The event in each fork, as a share of the control's."""
    loss_event = isinstance(event, LossEvent)
    whole = 0.0
    for name in names:
        excess, gradient = measure(read_series(out / "cells" / name), start, stop)
        size = excess if loss_event else gradient - 1
        whole = size if name == CONTROL else whole
        yield Replayed(name, excess, gradient, max(size, 0.0) / whole if whole > 0 else np.nan)


def measure(series: Series, start: int, stop: int) -> tuple[float, float]:
    """Largest loss excess and gradient ratio of the steps in (start, stop]; infinite on a NaN."""
    run = Seen(Cell("", "", {"seed": 0}, {}), series, judge(series), None)
    there_T = (series.steps_T > start) & (series.steps_T <= stop)
    window = figures.window_of(run)
    if series.stopped_non_finite:
        return np.inf, np.inf
    loss_T = figures.trailing_ratio(series.loss_T, window)[there_T]
    ratios = [figures.trailing_ratio(row_T, window)[there_T] for row_T in series.grad_linf_GT]
    gradient = max((float(np.nanmax(r, initial=0.0)) for r in ratios), default=0.0)
    return float(np.nanmax(loss_T, initial=1.0)) - 1, gradient


def _losses(run: Path, start: int, stop: int) -> list[Any]:
    rows = read_rows(run / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row and start < row["step"] <= stop]


def _sentence(found: Sequence[Replayed], event: Event, factor: float, exact: bool) -> str:
    """Which group, and how sure one may be of it."""
    what = "freezing" if factor == 0 else f"slowing to {factor:g} of its rate"
    kind = "loss" if isinstance(event, LossEvent) else "gradient"
    control, *others = found
    if not control.left > 0:
        why = (
            "although it repeats the run bit for bit: nothing stands above its trailing median"
            if exact
            else "since it is not bit-equal to the run: the replay is not exact"
        )
        return f"The control shows no {kind} event, so nothing can be said, {why}."
    causes = sorted((r for r in others if r.left < GONE), key=lambda r: r.left)
    sure = "the control repeats the run bit for bit" if exact else "the control is not bit-equal"
    if not causes:
        least = min(others, key=lambda r: r.left, default=control)
        return (
            f"{what.capitalize()} no single group removes the {kind} event at step {event.peak}: "
            f"the least is left with {least.group} ({least.left:.0%}); {sure}."
        )
    first, *rest = causes
    also = f" (so do {', '.join(f'{r.group} {r.left:.0%}' for r in rest)})" if rest else ""
    return (
        f"{what.capitalize()} {first.group} leaves {first.left:.0%} of the {kind} event at step "
        f"{event.peak}{also}; {sure}."
    )


def _write(out: Path, answer: Answer) -> None:
    rows = [dataclasses.asdict(row) for row in answer.found]
    with (out / "replay.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    labels = [row.group for row in answer.found]
    lines = [read_series(out / "cells" / name) for name in labels]
    figure = figures.replayed(labels, lines, answer.start, answer.stop, answer.event.peak)
    (out / "replay.png").write_bytes(figures.png(figure))


def as_text(answer: Answer) -> str:
    """Table and answer for a terminal."""
    width = max(len(row.group) for row in answer.found)
    lines = [f"{'frozen' if answer.factor == 0 else 'slowed':{width}}  loss excess  gradient  left"]
    lines += [
        f"{row.group:{width}}  {row.loss_excess:10.1%}  {row.gradient:7.1f}x  {row.left:4.0%}"
        for row in answer.found
    ]
    return "\n".join([*lines, answer.sentence])
