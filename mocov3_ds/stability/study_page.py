"""`mocov3 stability report`: one page about a grid, or about one run, and its numbers as CSV.

OUT/index.html   everything, pictures inside; opens anywhere, asks for nothing
OUT/*.png        the pictures
OUT/runs.csv     a row a run        OUT/arms.csv   a row an arm, over its seeds
OUT/events.csv   each gradient event, loss event, dip and decline
"""

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from mocov3_ds.monitoring import signal_file
from mocov3_ds.monitoring.alarms import RULES
from mocov3_ds.stability import events, figures
from mocov3_ds.stability.figures import Arms, Seen
from mocov3_ds.stability.grid import Cell, patch_rate
from mocov3_ds.stability.page import Picture, page
from mocov3_ds.stability.run import cells_of, open_grid, outcome_of
from mocov3_ds.stability.series import read_series
from mocov3_ds.stability.verdict import Verdict, judge

ALARM = "rms_rise"
"""The rule whose alarms are drawn: the one that foretold every event it was tried on."""

WORST_FIRST: tuple[Verdict, ...] = (
    "DIVERGED",
    "RESTARTED",
    "DEGRADING",
    "UNSTABLE",
    "TWITCHY",
    "STABLE",
)

# arXiv 2104.02057, Figs. 1-3 and 5: linear probe of ViT-B/16 after 100 epochs, top-1 in percent.
# (optimizer, base rate, batch, patch projection trained) -> accuracy. Where the text gives a
# difference only, the level follows from the others.
PAPER: Mapping[tuple[str, float, int, bool], float] = {
    ("adamw", 1.0e-4, 1024, True): 71.5,
    ("adamw", 1.0e-4, 2048, True): 72.6,
    ("adamw", 1.0e-4, 4096, True): 72.2,
    ("adamw", 1.0e-4, 6144, True): 69.7,
    ("adamw", 0.5e-4, 4096, True): 70.4,
    ("adamw", 1.5e-4, 4096, True): 71.7,
    ("adamw", 0.5e-4, 4096, False): 70.8,
    ("adamw", 1.0e-4, 4096, False): 72.8,
    ("adamw", 1.5e-4, 4096, False): 73.4,
    ("lamb", 5.0e-4, 4096, True): 72.5,
    ("lamb", 6.0e-4, 4096, True): 70.9,
    ("lamb", 8.0e-4, 4096, True): 66.5,
}
_AS_THE_PAPER = {"recipe": "vit_b16", "epochs": 100}
_CURES = ("beta1", "beta2", "update_clip", "trust_clip", "qk_norm", "gradient_clipping")


@dataclass(frozen=True)
class Study:
    """What a report is about.

    Attributes:
        title: of the page.
        about: what the grid asks.
        scale: empty for a single run.
        command: that made the runs.
        arms: label -> the runs of all seeds.
        unseen: cells without a logged step, with what is known of them.
    """

    title: str
    about: str
    scale: str
    command: str
    arms: Arms
    unseen: tuple[str, ...]


def report(source: Path, out: Path, *, command: str = "") -> Path:
    """Write the page, its pictures and its tables.

    Args:
        source: folder of a grid, or a run folder.
        out: folder, made if it is not there.
        command: that made the runs, printed on the page; empty = as the grid's folder tells.

    Returns:
        the page.

    Raises:
        ValueError: neither a grid nor a run, or nothing logged yet.
    """
    study = look_at(source)
    if command:
        study = dataclasses.replace(study, command=command)
    shown = _worst_arms(study.arms)
    drawn = {name: (title, words, draw(shown)) for name, (title, words, draw) in _PICTURES.items()}
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, (title, words, figure) in drawn.items():
        path = out / f"{name}.png"
        path.unlink(missing_ok=True)
        data = None
        if figure is not None:
            data = figures.png(figure)
            path.write_bytes(data)
        pictures.append(Picture(name, title, words, data))
    runs, arms = run_rows(study.arms), arm_rows(study.arms)
    _write_csv(out / "runs.csv", runs)
    _write_csv(out / "arms.csv", arms)
    _write_csv(out / "events.csv", event_rows(study.arms) or [dict.fromkeys(_EVENT_COLUMNS)])
    text = page(
        title=study.title,
        about=study.about,
        scale=study.scale,
        command=study.command,
        arms=arms,
        runs=runs,
        pictures=pictures,
        findings=findings(study.arms),
        advice=advice(study.arms),
        unseen=[*study.unseen, *_left_out(study.arms, shown), *_notes(study.arms)],
    )
    path = out / "index.html"
    path.write_text(text)
    return path


def look_at(source: Path) -> Study:
    """Read and judge the runs of a grid, or one run."""
    if (source / "grid.json").exists():
        return _look_at_grid(source)
    if not (source / "config.json").exists():
        raise ValueError(f"{source} holds neither a grid (grid.json) nor a run (config.json).")
    cell = Cell(source.resolve().name, source.resolve().name, {"seed": 0}, {})
    run = _see(source, cell, None)
    if run is None:
        raise ValueError(f"run {source} has not logged a step yet.")
    return Study(cell.name, "", "", "", {cell.label: [run]}, ())


def _look_at_grid(folder: Path) -> Study:
    tree = open_grid(folder)
    seen: dict[str, Seen] = {}
    unseen = []
    # the twins first: what a run lost is measured against its own
    for cell in sorted(cells_of(tree), key=lambda cell: bool(cell.twin)):
        twin = seen.get(cell.twin)
        run = _see(folder / "cells" / cell.name, cell, twin)
        outcome = outcome_of(folder, cell.name)
        if run is not None:
            seen[cell.name] = run
        if run is None or outcome is None or outcome.status in ("failed", "stopped"):
            status = outcome.status if outcome else "not ended"
            words = f": {outcome.words}" if outcome and outcome.words else ""
            unseen.append(f"{cell.name}: {status}{words}")
    if not seen:
        raise ValueError(f"no cell of {folder} has logged a step yet.")
    arms: dict[str, list[Seen]] = {}
    for cell in cells_of(tree):
        if cell.name in seen:
            arms.setdefault(cell.label, []).append(seen[cell.name])
    command = f"mocov3 stability run {tree['name']} --scale {tree['scale']}"
    return Study(tree["title"], tree["about"], tree["scale"], command, arms, tuple(unseen))


def _see(folder: Path, cell: Cell, twin: Seen | None) -> Seen | None:
    """Judge a run; None where it has not logged a step."""
    metrics = folder / "metrics.jsonl"
    if not (folder / "config.json").exists() or '"loss"' not in (
        metrics.read_text() if metrics.exists() else ""
    ):
        return None
    twin_knn = None
    if twin is not None and math.isfinite(twin.judgement.final_knn):
        twin_knn = twin.judgement.final_knn
    series = read_series(folder, twin_knn=twin_knn)
    table = signal_file.read(folder) if (folder / "signals.json").exists() else None
    return Seen(cell, series, judge(series), table, _optimizer(folder))


def _optimizer(run: Path) -> str:
    """Type of a run's optimizer in lower case; empty where its config does not tell."""
    tree = json.loads((run / "config.json").read_text())
    return str((tree.get("deepspeed", {}).get("optimizer") or {}).get("type", "")).lower()


def alarm_steps(run: Seen) -> npt.NDArray[np.int64]:
    """Steps at which the alarm on the first trained group begins."""
    series = run.series
    place = series.groups.index(figures.first_trained(series))
    rms_T, grad_T = series.rms_GT[place], series.grad_linf_GT[place]
    rows = events.measured(rms_T, grad_T)
    flags_T = RULES[ALARM](rms_T[rows], grad_T[rows])
    begins_T = flags_T & ~np.concatenate([[False], flags_T[:-1]])
    steps_T: npt.NDArray[np.int64] = series.steps_T[rows][begins_T]
    return steps_T


_Draw = Callable[[Arms], Any]
_PICTURES: dict[str, tuple[str, str, _Draw]] = {
    "knn": (
        "k-NN accuracy",
        "Lines are seeds; dips beyond the probes' error are shaded.",
        figures.knn_curves,
    ),
    "loss": (
        "Loss spikes",
        "Loss above the median of the 30 steps before; dots are jumps of more than 1 %.",
        figures.losses,
    ),
    "layers": (
        "Which layer, when",
        "Rows run from the input (top) to the output. Of each arm the seed with most events.",
        figures.heat_map,
    ),
    "order": (
        "First against last layer",
        "Median and quartiles over gradient events (jumps of the loss in a run without any), "
        "aligned where each begins. The lag (steps, one a seed, 95 % interval) is that of the "
        "largest cross-correlation; above 0 the first layer leads.",
        figures.aligned,
    ),
    "rms": (
        "RMS of the first trained layer",
        f"Ticks are alarms (rule {ALARM}), shades loss jumps, the dashed line is "
        f"{figures.RMS_LINE}.",
        lambda arms: figures.rms(arms, alarm_steps),
    ),
    "rate": (
        "Learning rate against accuracy",
        "Solid: patch projection trained; dashed: frozen.",
        figures.rates,
    ),
    "trust": (
        "Trust ratios",
        "LAMB fails smoothly: look for a ratio that drifts, not for a spike.",
        figures.trust_fan,
    ),
}


# ---------------------------------------------------------------------------------------- tables


def run_rows(arms: Arms) -> list[dict[str, Any]]:
    """One row a run."""
    rows = []
    for label, runs in arms.items():
        for run in runs:
            found = run.judgement
            excess_T = figures.excess_of(run.series)
            bursts = [event.ratio for event in found.gradient_events]
            rows.append(
                {
                    "arm": label,
                    "seed": run.cell.seed,
                    "run": run.cell.name,
                    "verdict": found.verdict,
                    "why": found.why,
                    "I": found.instability,
                    "E": found.events_per_1000,
                    "R": found.rms_share,
                    "T": found.lost_to_twin,
                    "jumps": len(figures.jumps(run.series)),
                    "steps_above": int(np.sum(excess_T > 1)),
                    "worst_excess": float(np.nanmax(excess_T, initial=0.0)),
                    "loss_events": len(found.loss_events),
                    "largest_burst": max(bursts, default=0.0),
                    "dips": len(found.dips),
                    "deepest_dip": max((dip.depth for dip in found.dips), default=0.0),
                    "knn_best": found.best_knn,
                    "knn_final": found.final_knn,
                    "loss_final": found.final_loss,
                    "lag": found.lead.lag if found.lead else None,
                    "steps": int(run.series.steps_T[-1]),
                    "paper": paper_value(run.cell),
                }
            )
    return rows


_SUMMED = (
    *("I", "E", "R", "T", "jumps", "steps_above", "worst_excess", "loss_events", "largest_burst"),
    *("knn_best", "knn_final", "loss_final"),
)


def arm_rows(arms: Arms) -> list[dict[str, Any]]:
    """One row an arm: verdicts of its seeds, then mean, least and largest of each number."""
    rows = []
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for one in run_rows(arms):
        by_arm.setdefault(one["arm"], []).append(one)
    for label, runs in by_arm.items():
        row: dict[str, Any] = {"arm": label, "seeds": len(runs)}
        found = [run["verdict"] for run in runs]
        row["verdicts"] = ", ".join(
            f"{word} x{found.count(word)}" for word in WORST_FIRST if word in found
        )
        for name in _SUMMED:
            values = [run[name] for run in runs if run[name] is not None]
            values = [value for value in values if math.isfinite(value)]
            row[name] = fmean(values) if values else None
            row[f"{name}_min"] = min(values, default=None)
            row[f"{name}_max"] = max(values, default=None)
        row["paper"] = runs[0]["paper"]
        rows.append(row)
    return rows


_EVENT_COLUMNS = ("run", "kind", "group", "first", "last", "peak", "size")


def event_rows(arms: Arms) -> list[dict[str, Any]]:
    """Each event of each run."""
    rows: list[dict[str, Any]] = []
    for runs in arms.values():
        for run in runs:
            found = run.judgement
            events: list[tuple[Any, ...]] = [
                ("gradient", e.group, e.first, e.last, e.peak, e.ratio)
                for e in found.gradient_events
            ]
            events += [("loss", "", e.first, e.last, e.peak, e.excess) for e in found.loss_events]
            events += [("dip", "", d.first, d.last, d.lowest, d.depth) for d in found.dips]
            events += [("decline", "", d.first, d.last, d.last, d.fall) for d in found.declines]
            rows += [
                dict(zip(_EVENT_COLUMNS, (run.cell.name, *event), strict=True)) for event in events
            ]
    return rows


def paper_value(cell: Cell) -> float | None:
    """The paper's linear-probe accuracy of this setting, None where it gives none."""
    settings = cell.settings
    same = all(settings.get(key) == value for key, value in _AS_THE_PAPER.items())
    if not same or settings.get("views.fixed") or patch_rate(settings) not in (0.0, 1.0):
        return None
    if any(key in settings for key in _CURES):
        return None
    key = (
        str(settings.get("optimizer", "AdamW")).lower(),
        float(settings.get("lr", math.nan)),
        int(settings.get("batch", 4096)),
        patch_rate(settings) > 0,
    )
    return PAPER.get(key)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# -------------------------------------------------------------------------------------- sentences


def findings(arms: Arms) -> list[str]:
    """Each arm against the first one; "beyond the seeds" only where the ranges do not touch."""
    rows = arm_rows(arms)
    if len(rows) < 2:
        return [f"{run.label}: {run.judgement.why}" for runs in arms.values() for run in runs]
    base, *others = rows
    counted = (
        ("jumps", "loss jumps a run", "{:.1f}"),
        ("worst_excess", "worst loss excess, %", "{:.1f}"),
        ("knn_final", "final k-NN, %", "{:.1f}"),
    )
    sentences = []
    for row in others:
        parts = []
        for name, words, form in counted:
            if row[name] is None or base[name] is None:
                continue
            mine, theirs = form.format(row[name]), form.format(base[name])
            parts.append(f"{words} {mine} against {theirs} ({_separation(row, base, name)})")
        sentences.append(f"{row['arm']} against {base['arm']}: {'; '.join(parts)}.")
    return sentences


def _separation(row: Mapping[str, Any], base: Mapping[str, Any], name: str) -> str:
    if min(row["seeds"], base["seeds"]) < 2:
        return "one seed: no spread known"
    if row[f"{name}_max"] < base[f"{name}_min"]:
        return "lower in every seed"
    if row[f"{name}_min"] > base[f"{name}_max"]:
        return "higher in every seed"
    return "within the spread of the seeds"


_NEXT: Mapping[str, str] = {
    "DIVERGED": "lower the rate or warm up longer; if the largest attention logit passed 1000, "
    "normalise queries and keys (--model.qk_norm); train in bf16, not fp16",
    "RESTARTED": "freeze the patch projection (--model.patch_lr 0) or slow it (0.2), shorten the "
    "memory of the second moment (beta2 0.95), clip updates (update_clip); mocov3 stability "
    "replay RUN EVENT names the layer that did it",
    "DEGRADING": "nothing spikes, so nothing that clips will help: lower the rate, or bound the "
    "trust ratio (trust_clip); compare with a lower rate before trusting the level",
    "UNSTABLE": "beta2 0.95 first (it costs nothing), then update_clip, a frozen or slower patch "
    "projection, a lower rate; mocov3 stability replay RUN EVENT names the layer that did it",
    "TWITCHY": "accuracy is not hurt yet; before raising rate or batch, take beta2 0.95 or "
    "update_clip along",
    "STABLE": "there is room: raise batch or rate, or see how wide the range of good rates is "
    "(grid lr-sensitivity)",
}


def advice(arms: Arms) -> list[tuple[str, str]]:
    """What to try next, by the worst verdict that at least half of an arm's seeds share."""
    by_word: dict[str, list[str]] = {}
    for label, runs in arms.items():
        words = sorted((run.judgement.verdict for run in runs), key=WORST_FIRST.index)
        by_word.setdefault(words[(len(words) - 1) // 2], []).append(label)
    return [
        (f"{word}: {', '.join(by_word[word])}", _NEXT[word])
        for word in WORST_FIRST
        if word in by_word
    ]


def _worst_arms(arms: Arms) -> Arms:
    """As many arms as a picture holds, in their own order."""
    if len(arms) <= figures.PANELS:
        return arms

    def trouble(label: str) -> tuple[int, float]:
        runs = arms[label]
        worst = min(WORST_FIRST.index(run.judgement.verdict) for run in runs)
        return worst, -fmean(len(run.judgement.loss_events) for run in runs)

    kept = {*sorted(arms, key=trouble)[: figures.PANELS]}
    return {label: runs for label, runs in arms.items() if label in kept}


def _left_out(arms: Arms, shown: Arms) -> Iterable[str]:
    if len(shown) < len(arms):
        yield (
            f"The pictures show the {len(shown)} arms with the most trouble of {len(arms)}; the "
            "tables have all."
        )


def _notes(arms: Arms) -> list[str]:
    """What could not be judged, each once."""
    notes = [note for runs in arms.values() for run in runs for note in run.judgement.notes]
    return list(dict.fromkeys(notes))
