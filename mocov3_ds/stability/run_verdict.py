"""What does the page of one run say of its stability? The verdict of `mocov3 stability report`."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mocov3_ds.stability.series import list_bad_stops, read_series
from mocov3_ds.stability.verdict import judge

_log = logging.getLogger("mocov3_ds")


@dataclass(frozen=True)
class RunVerdict:
    """A word, the sentence behind it, and what could not be judged; no word where nothing can."""

    word: str
    why: str
    notes: Sequence[str] = ()


def judge_run(run: Path) -> RunVerdict:
    """The verdict on a run folder; a page does not fail for it.

    Args:
        run: run folder, of a run that has ended or not.
    """
    try:
        judgement = judge(read_series(run))
    except Exception as error:  # the log may be of any state
        _log.debug("%s has no verdict", run, exc_info=True)
        return RunVerdict("", f"it cannot be judged: {type(error).__name__}: {error}")
    return RunVerdict(judgement.verdict, judgement.why, judgement.notes)


def describe_bad_stop(run: Path, last: int) -> list[str]:
    """A line about the bad step at which a run stopped, if it did: one after its last row.

    Args:
        run: run folder, with `trouble/` where there was one.
        last: step of the last row.
    """
    lines = []
    for step, path in list_bad_stops(run, last):
        reason = _read_reason(path)
        lines.append(
            f"stopped at the bad step {step}{reason and f': {reason}'}, see trouble/{path.name}"
        )
    return lines


def _read_reason(path: Path) -> str:
    """Why a step was bad; empty where its report does not tell."""
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    return str(tree.get("reason", "")).rstrip(".") if isinstance(tree, dict) else ""
