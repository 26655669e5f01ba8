"""How a failed run ends: one sentence for the user, an exit status, and no rank left behind."""

import contextlib
import sys
import traceback
from typing import NamedTuple

from mocov3_ds.data.storage import hide_secrets
from mocov3_ds.distributed import (
    collective_errors,
    devices,
    heartbeat,
    heartbeat_rules,
    ranks,
)
from mocov3_ds.distributed.heartbeat_rules import INTERRUPTED_STATUS, PEER_LOST_STATUS
from mocov3_ds.faults.preemption import AskedToStopError, Stop


class Ending(NamedTuple):
    """How a run ends."""

    status: int
    """exit status of the process"""
    sentence: str
    """exit message for the user"""
    is_explained: bool
    """whether the sentence tells all; otherwise the traceback is printed as well"""


def report_failure(error: BaseException) -> int:
    """Say what happened, once for all ranks, and return the exit status.

    | status | the run                                                                     |
    |--------|-----------------------------------------------------------------------------|
    | 1      | failed on one rank: data that cannot be read, memory, a fault of the program |
    | 2      | was asked for something that cannot be, or NCCL does not connect its ranks  |
    | 3      | met values that are not finite, or a spike, and the policy is to stop       |
    | 75     | lost a rank or its launcher (`heartbeat_rules.PEER_LOST_STATUS`)            |
    | 0      | was asked to stop by a signal (or `--stopped_status`)                       |
    | 130    | was interrupted from the keyboard                                           |

    Args:
        error: What ended the run on this rank.
    """
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        raise error  # --help or an unknown flag: the parser has said everything
    of_a_peer = collective_errors.is_peer_failure(error)
    ending = describe_ending(error)
    status = PEER_LOST_STATUS if of_a_peer else ending.status
    if not of_a_peer and not ending.is_explained:
        traceback.print_exception(error)
        sys.stderr.flush()
    status_of_run = heartbeat.report_failure(status, ending.sentence, of_a_peer=of_a_peer)
    if status_of_run is not None:
        return status_of_run
    # the heart begins with a collective, so none has worked yet, and none will by trying again
    is_of_nccl = collective_errors.is_nccl_error(error)
    if is_of_nccl and not collective_errors.is_memory_fault(error):
        status = 2
    if ranks.is_first() or (is_of_nccl and not of_a_peer):
        _print_error(ending.sentence)
    return status


def report_stop(stop: Stop, stopped_status: int, saved: str) -> int:
    """Say why a run that has saved leaves before its end, and return the exit status.

    Args:
        stop: Why the run leaves before its end.
        stopped_status: Exit status of a run that a signal has asked to stop.
        saved: Name of the checkpoint that it has written last.
    """
    if not stop.launcher_is_lost:
        return stopped_status
    if ranks.is_first():
        steps_done = heartbeat_rules.step_in_name(saved)
        message = heartbeat_rules.exit_message(stop.sentence, PEER_LOST_STATUS, saved, steps_done)
        _print_error(message)
    return PEER_LOST_STATUS


def _print_error(sentence: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may have gone with the launcher
        print(f"train.py: error: {sentence}", file=sys.stderr, flush=True)  # noqa: T201


def describe_ending(error: BaseException) -> Ending:
    """Choose exit status and exit message for an error of this rank.

    Args:
        error: What ended the run on this rank.
    """
    message = hide_secrets(str(error))
    first_line = message.strip().partition("\n")[0]
    if collective_errors.is_nccl_error(error):
        complaint, remedy = collective_errors.read_complaint(error)
        first_line = f"NCCL: {complaint}"
        if not collective_errors.is_memory_fault(error):
            return Ending(1, f"{first_line}{'; ' * bool(remedy)}{remedy}.", True)
    if collective_errors.is_memory_fault(error):
        memory = first_line or "of the host"
        foreign_bytes = devices.bytes_of_others()
        hint = f"other programs hold {foreign_bytes / 2**30:.1f} GiB of the card: end them, or "
        remedy = f"{hint * bool(foreign_bytes)}a smaller --chunk helps"
        return Ending(1, f"out of memory ({memory}); {remedy}.", True)
    match error:
        case SystemExit():
            return Ending(1, first_line, True)
        case KeyboardInterrupt():
            return Ending(INTERRUPTED_STATUS, "interrupted", True)
        case AskedToStopError():
            return Ending(error.status, f"{error}; nothing is lost", True)
        case FloatingPointError():
            return Ending(3, message, True)
        case ValueError() | OSError():
            return Ending(2, message, True)
    return Ending(1, f"{type(error).__name__}: {first_line}", False)
