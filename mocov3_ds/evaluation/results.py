"""Which accuracies did the evaluations of an encoder measure? `results.json`, and a table of it.

    {"knn base": {"top1": 71.2, "encoder": "cifar10 (base encoder, step 9700)", ...}, ...}

An evaluation that is run again replaces its own entry.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mocov3_ds.data.storage import atomic

Evaluation = Literal["knn", "linear", "finetune", "attentive", "multilabel"]

FILE_NAME = "results.json"
_ALWAYS: Mapping[str, str] = {
    "knn": "k-NN top-1",
    "linear": "linear top-1",
    "finetune": "fine-tune top-1",
}
_COLUMNS: Mapping[str, str] = {
    **_ALWAYS,
    "attentive": "attentive top-1",
    "multilabel": "multi-label k-NN mAP",
}


def results_folder(path: Path) -> Path:
    """Where results are kept: in the folder of a run, or beside a weights file."""
    return path if path.is_dir() else path.with_name(path.name + "-evaluation")


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """All entries of a folder, by evaluation and encoder; none where nothing was evaluated.

    Raises:
        ValueError: the results.json of the folder was written by another program.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return {}
    try:
        entries: dict[str, dict[str, Any]] = json.loads(path.read_text())
        for entry in entries.values():
            _measure(entry)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is no results file; move it away.") from None
    return entries


def record_result(
    folder: Path, evaluation: Evaluation, role: str, entry: Mapping[str, Any]
) -> None:
    """Add or replace one entry of results.json, whole or not at all.

    Args:
        folder: folder of results.json, made if it is missing.
        evaluation: the evaluation that was run.
        role: base or momentum encoder.
        entry: JSON values, among them `top1` or `mean_ap` in percent and the title of the
            `encoder`.
    """
    entries = read_results(folder) | {f"{evaluation} {role}": dict(entry)}
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / FILE_NAME, json.dumps(entries, indent=1) + "\n")


def format_table(folder: Path, role: str) -> str:
    """Markdown table with one row, the results of an encoder; empty where there is none.

    Of the paper's evaluations, those that were not run show as a dash.

    Args:
        folder: folder that holds results.json, if anything was evaluated.
        role: base or momentum encoder.
    """
    entries = read_results(folder)
    row = {name: entries.get(f"{name} {role}") for name in _COLUMNS}
    titles = [entry["encoder"] for entry in row.values() if entry]
    if not titles:
        return ""
    columns = [name for name in _COLUMNS if name in _ALWAYS or row[name]]
    entries_shown = [row[name] for name in columns]
    cells = [f"{_measure(entry):.2f} %" if entry else "-" for entry in entries_shown]
    lines = [["encoder", *(_COLUMNS[name] for name in columns)], [titles[0], *cells]]
    header, values = (f"| {' | '.join(line)} |" for line in lines)
    return f"{header}\n|{'---|' * (len(columns) + 1)}\n{values}"


def _measure(entry: Mapping[str, Any]) -> float:
    """What an evaluation found, in percent."""
    return float(entry["mean_ap"] if "mean_ap" in entry else entry["top1"])
