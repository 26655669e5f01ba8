"""What the evaluations of an encoder found: `results.json`, and its line for a README table.

    {"knn base": {"top1": 71.2, "encoder": "cifar10 (base encoder, step 9700)", ...}, ...}

An evaluation that is run again replaces its own entry.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Protocol = Literal["knn", "linear", "finetune"]

NAME = "results.json"
HEADER = "| encoder | k-NN top-1 | linear top-1 | fine-tune top-1 |\n|---|---|---|---|"


def folder_of(path: Path) -> Path:
    """Where the evaluations of a run (in it) or of a weights file (beside it) are kept."""
    return path if path.is_dir() else path.with_name(path.name + "-evaluation")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """All entries of a folder; none where nothing was evaluated.

    Raises:
        ValueError: the file there is not one of ours.
    """
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        entries: dict[str, dict[str, Any]] = json.loads(path.read_text())
        for entry in entries.values():
            float(entry["top1"])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is no results file; move it away.") from None
    return entries


def record(folder: Path, protocol: Protocol, which: str, entry: Mapping[str, Any]) -> Path:
    """Add or replace one entry, all at once.

    Args:
        folder: made if it is not there.
        protocol: evaluation that was run.
        which: base or momentum encoder.
        entry: JSON values; `top1` in percent and `encoder` must be there.
    """
    entries = read(folder) | {f"{protocol} {which}": dict(entry)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    aside = path.with_name(f"{NAME}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(entries, indent=1) + "\n")
    aside.replace(path)
    return path


def table_line(folder: Path, which: str) -> str:
    """The encoder's row below `HEADER`; an evaluation that was not run shows as a dash."""
    entries = read(folder)
    found = [entries.get(f"{protocol} {which}") for protocol in ("knn", "linear", "finetune")]
    title = next((entry["encoder"] for entry in found if entry), folder.name)
    cells = [f"{entry['top1']:.2f} %" if entry else "-" for entry in found]
    return f"| {title} | {' | '.join(cells)} |"
