"""The last words of a run that failed: one sentence, a status, and no rank left behind."""

import sys
import traceback

import torch

from mocov3_ds.distributed import heartbeat, ranks


def end(error: BaseException) -> int:
    """Say what happened, once for all ranks, and give the exit status.

    | status | the run                                                                     |
    |--------|-----------------------------------------------------------------------------|
    | 1      | failed on one rank: data that cannot be read, memory, a fault of the program |
    | 2      | was asked for something that cannot be                                      |
    | 3      | met values that are not finite, or a spike, and the policy is to stop       |
    | 75     | lost a rank or its launcher (`heartbeat.STATUS`)                            |
    | 130    | was interrupted from the keyboard                                           |
    """
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        raise error  # --help, an unknown flag: all is said
    of_a_peer = heartbeat.is_of_a_peer(error)
    status, sentence, known = _words(error)
    if of_a_peer:
        status = heartbeat.STATUS
    elif not known:
        traceback.print_exception(error)
        sys.stderr.flush()
    of_the_job = heartbeat.fail(status, sentence, of_a_peer=of_a_peer)
    if of_the_job is not None:
        return of_the_job
    if ranks.is_first():
        print(f"train.py: error: {sentence}", file=sys.stderr)  # noqa: T201
    return status


def _words(error: BaseException) -> tuple[int, str, bool]:
    """Status, sentence, and whether that says all there is to know."""
    first_line = f"{error}".strip().partition("\n")[0]
    match error:
        case SystemExit():
            return 1, first_line, True
        case KeyboardInterrupt():
            again = "the same command continues from the newest checkpoint"
            return 130, f"interrupted; {again}", True
        case FloatingPointError():
            return 3, str(error), True
        case torch.OutOfMemoryError() | MemoryError():
            what = first_line or "of the host"
            return 1, f"out of memory ({what}); a smaller --chunk helps.", True
        case ValueError() | OSError():
            return 2, str(error), True
    return 1, f"{type(error).__name__}: {first_line}", False
