"""What are the numbers of a study? One row a run, an arm, or an event.

The keys of the rows are the columns of `runs.csv`, `arms.csv` and `events.csv`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mocov3_ds.stability import paired
from mocov3_ds.stability.cell_flags import patch_rate
from mocov3_ds.stability.findings import WORST_FIRST, Lead
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.layer_order import pool_leads
from mocov3_ds.stability.study import Arms, JudgedRun

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
_PAPER_SETTINGS = {"recipe": "vit_b16", "epochs": 100}
_CURES = (
    *("beta1", "beta2", "update_clip", "trust_clip", "gradient_clipping", "clip"),
    *("qk_norm", "layer_scale", "sigma_reparam", "model.backbone", "moco.momentum_batch"),
)

_SUMMARISED = (
    *("I", "E", "R", "T", "jumps", "steps_above", "worst_excess", "loss_events", "largest_burst"),
    *("knn_best", "knn_final", "knn_full", "loss_final"),
)
"""columns of a run that are summarised in the row of its arm"""
FINALS = ("knn_final", "knn_full")
"""columns that tell how good the network is in the end"""
EVENT_COLUMNS = ("run", "kind", "group", "first", "last", "peak", "size")


def tabulate_runs(arms: Arms) -> list[dict[str, Any]]:
    """One row a run."""
    return [_run_row(label, run) for label, runs in arms.items() for run in runs]


def _run_row(label: str, run: JudgedRun) -> dict[str, Any]:
    judgement = run.judgement
    return {
        "arm": label,
        "seed": run.cell.seed,
        "run": run.cell.name,
        "verdict": judgement.verdict,
        "why": judgement.why,
        "I": judgement.instability,
        "E": judgement.events_per_1000,
        "R": judgement.rms_share,
        "T": judgement.lost_to_twin,
        **_loss_columns(run),
        "largest_burst": max((event.ratio for event in judgement.gradient_events), default=0.0),
        "dips": len(judgement.dips),
        "deepest_dip": max((dip.depth for dip in judgement.dips), default=0.0),
        "knn_best": judgement.best_knn,
        "knn_final": judgement.final_knn,
        "knn_full": run.series.knn_at_end,
        "loss_final": judgement.final_loss,
        **_lead_columns(judgement.lead),
        "steps": int(run.series.steps_T[-1]),
        "planned_steps": run.series.total_steps,
        "paper": paper_accuracy(run.cell),
    }


def _loss_columns(run: JudgedRun) -> dict[str, float]:
    """Jumps and events of the loss; NaN where no loss was logged."""
    if not run.series.has_loss:
        return dict.fromkeys(("jumps", "steps_above", "worst_excess", "loss_events"), math.nan)
    return {
        "jumps": len(run.jumps),
        "steps_above": int(np.sum(run.loss_excess > 1)),
        "worst_excess": float(np.nanmax(run.loss_excess, initial=0.0)),
        "loss_events": len(run.judgement.loss_events),
    }


def _lead_columns(lead: Lead | None) -> dict[str, float | None]:
    """Steps by which the first trained layer leads in the gradient events, and how many those are.

    Empty where nothing is known: fewer than two layers, no event, or too few for an interval.
    """
    values = (math.nan, math.nan, math.nan) if lead is None else (lead.median, *lead.interval)
    middle, low, high = (value if math.isfinite(value) else None for value in values)
    count = len(lead.per_event) if lead else 0
    return {"lead": middle, "lead_low": low, "lead_high": high, "lead_events": count}


def tabulate_arms(arms: Arms, compared: Arms | None = None) -> list[dict[str, Any]]:
    """One row an arm: verdicts of all its runs, then the numbers of those that can be compared.

    Each number has its mean with 95 % interval, least, largest, and standard deviation between
    seeds with 95 % interval (`paired.spread_over_seeds`). The final accuracy of a run that stopped
    at a value that was not finite counts as guessing, as in comparisons.

    Args:
        arms: all runs, ended or not.
        compared: runs that got equally far (`comparable_runs.line_up`); None = all.
    """
    rows = []
    for label, runs in arms.items():
        comparable = runs if compared is None else compared.get(label, ())
        run_rows = [{**_run_row(label, run), **guessed_finals(run)} for run in comparable]
        verdicts = [run.judgement.verdict for run in runs]
        counts = [f"{name} x{verdicts.count(name)}" for name in WORST_FIRST if name in verdicts]
        row: dict[str, Any] = {
            "arm": label,
            "seeds": len(comparable),
            "left_out": len(runs) - len(comparable),
            "verdicts": ", ".join(counts),
        }
        for name in _SUMMARISED:
            row |= _summarise_column(name, [run[name] for run in run_rows])
        lead = pool_leads([run.judgement.lead for run in comparable])
        rows.append({**row, **_lead_columns(lead), "paper": paper_accuracy(runs[0].cell)})
    return rows


def guessed_finals(run: JudgedRun) -> Mapping[str, float]:
    """Columns of the final accuracy of a run that has no network any more; empty for others."""
    return dict.fromkeys(FINALS, run.series.knn_chance) if run.has_no_network else {}


def _summarise_column(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, range and spread of a column over seeds; None where too few seeds have a value."""
    finite_values = [value for value in values if value is not None and math.isfinite(value)]
    spread = paired.spread_over_seeds(finite_values)
    low, high = spread.mean_interval
    sd_low, sd_high = spread.sd_interval
    columns = {
        name: spread.mean,
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_sd": spread.sd,
        f"{name}_sd_low": sd_low,
        f"{name}_sd_high": sd_high,
    }
    return {
        **{key: value if math.isfinite(value) else None for key, value in columns.items()},
        f"{name}_min": min(finite_values, default=None),
        f"{name}_max": max(finite_values, default=None),
    }


def tabulate_events(arms: Arms) -> list[dict[str, Any]]:
    """Each event of each run, with the columns `EVENT_COLUMNS`."""
    rows: list[dict[str, Any]] = []
    for runs in arms.values():
        for run in runs:
            judgement = run.judgement
            events: list[tuple[Any, ...]] = [
                ("gradient", e.group, e.first, e.last, e.peak, e.ratio)
                for e in judgement.gradient_events
            ]
            events += [
                ("loss", "", e.first, e.last, e.peak, e.excess) for e in judgement.loss_events
            ]
            events += [("dip", "", d.first, d.last, d.lowest, d.depth) for d in judgement.dips]
            events += [("decline", "", d.first, d.last, d.last, d.fall) for d in judgement.declines]
            rows += [
                dict(zip(EVENT_COLUMNS, (run.cell.name, *event), strict=True)) for event in events
            ]
    return rows


def paper_accuracy(cell: Cell) -> float | None:
    """The paper's linear-probe accuracy of a cell's settings in percent, None without one."""
    settings = cell.settings
    as_paper = all(settings.get(key) == value for key, value in _PAPER_SETTINGS.items())
    if not as_paper or settings.get("views.fixed") or patch_rate(settings) not in (0.0, 1.0):
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
