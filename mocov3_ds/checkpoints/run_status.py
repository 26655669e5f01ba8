"""Is a run finished? Its folder says so, whatever became of the launcher and its exit status.

RUN/finished    written by a run that came to its end: checkpoints, mirror and all
"""

import contextlib
import json
import logging
from pathlib import Path
from typing import Annotated

import tyro

from mocov3_ds.checkpoints.checkpoint import list_checkpoints, step_in_name
from mocov3_ds.checkpoints.run_folder import find_holder
from mocov3_ds.data.storage.atomic import write_text

FINISHED_STATUS, UNFINISHED_STATUS = 0, 1
_MARK = "finished"

_log = logging.getLogger("mocov3_ds")


def mark_finished(run: Path, step: int) -> None:
    """Note in a run folder that the run has come to its end.

    Args:
        run: Folder of the run.
        step: Number of steps that it has done, all of them.
    """
    try:
        write_text(run / _MARK, json.dumps({"step": step}) + "\n")
    except OSError as error:  # the checkpoint is there; the same command notes it again
        _log.warning("%s is finished, but that cannot be noted: %s", run, error)


def clear_finished(run: Path) -> None:
    """Take the note away: the run has steps to do.

    Args:
        run: Folder of the run.
    """
    (run / _MARK).unlink(missing_ok=True)


def describe_status(run: Path, wait_s: float) -> tuple[int, str]:
    """Say whether a run is finished, after waiting for ranks that are still about to save.

    Args:
        run: Folder of the run, which need not exist.
        wait_s: Seconds to wait for a process that works on the run.

    Returns:
        Exit status for a shell, 0 = finished, 1 = not; and the sentence.
    """
    if not run.is_dir():
        return UNFINISHED_STATUS, f"not begun: there is no {run}"
    holder = find_holder(run, wait_s)
    if holder:
        return UNFINISHED_STATUS, f"in work: {run} is in use by {holder}"
    with contextlib.suppress(OSError, ValueError):
        json.loads((run / _MARK).read_bytes())
        return FINISHED_STATUS, f"finished: {run}"
    saved = list_checkpoints(run)
    if not saved:
        return UNFINISHED_STATUS, f"not finished: {run} has no checkpoint yet"
    return (
        UNFINISHED_STATUS,
        f"not finished: {run} goes on from step {step_in_name(saved[-1])} with the same command",
    )


def report_status(run: Annotated[Path, tyro.conf.Positional], /, *, wait: float = 0.0) -> int:
    """Say whether a run is finished: status 0 if it is, 1 if the same command has more to do.

        until mocov3 status RUN --wait 600; do deepspeed mocov3_ds/train.py ...; done

    Args:
        run: run folder, which need not exist.
        wait: seconds to wait for ranks that work on the run, as those do that save after their
            launcher was killed.
    """
    status, sentence = describe_status(run, wait)
    print(sentence)  # noqa: T201
    return status


def main() -> int:
    """Command line of `mocov3 status`; returns the exit status."""
    return tyro.cli(report_status)
