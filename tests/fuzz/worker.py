"""A child process that feeds damaged inputs and tells its parent, a JSON line each, what happened.

    python -m tests.fuzz.worker FOLDER SEED FIRST LAST

Input N is a function of the seed and N. It is written to FOLDER/now-N before it is fed, so that it
is still there after a crash; one that fails is kept as FOLDER/failed-KIND-N.
"""

import contextlib
import faulthandler
import gc
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil

PATIENCE_S = 30
"""CPU seconds that an input may take."""
EVERY = 500
"""Inputs between two looks at open files and memory."""


class Hang(BaseException):
    """An input took too long."""


def main(folder: Path, seed: int, first: int, last: int) -> None:
    parent = os.fdopen(os.dup(1), "w", buffering=1)
    words = (folder / "said.log").open("ab")
    os.dup2(words.fileno(), 1)  # what the product prints, from C code as well
    os.dup2(words.fileno(), 2)
    faulthandler.enable(words)
    warnings.simplefilter("error", ResourceWarning)  # files that only the collector closes
    from tests.fuzz.kind import clear
    from tests.fuzz.kinds import KINDS

    signal.signal(signal.SIGPROF, _too_long)
    rounds = [kind for kind in KINDS for _ in range(kind.share)]
    for number in range(first, last):
        kind = rounds[number % len(rounds)]
        place = folder / f"now-{number}"
        place.mkdir()
        kind.make(place, np.random.default_rng([seed, number]))
        tell(parent, begin=number, kind=kind.name)
        # kept as it is: feeding may write beside it
        kept = folder / f"failed-{kind.name.replace(' ', '-')}-{number}"
        shutil.copytree(place, kept)
        outcome, said = "", ""
        try:
            signal.setitimer(signal.ITIMER_PROF, PATIENCE_S)
            try:
                outcome = kind.feed(place)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except (ValueError, OSError, SystemExit) as error:
            outcome, said = "error", f"{type(error).__name__}: {error}"[:500]
            try:
                clear(error, place if kind.names_files else None)
            except AssertionError:
                outcome, said = "failed", traceback.format_exc()[-3000:]
        except BaseException:
            outcome, said = "failed", traceback.format_exc()[-3000:]
        if outcome != "failed":
            shutil.rmtree(kept)
        shutil.rmtree(place)
        tell(parent, end=number, kind=kind.name, outcome=outcome, said=said)
        if (number - first) % EVERY == EVERY - 1 or number == last - 1:
            tell(parent, resources=number, **resources())


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {PATIENCE_S} s of CPU time")


def resources() -> dict[str, Any]:
    """Open files, threads and MiB of this process after a collection."""
    for _ in range(2):
        gc.collect()
    process = psutil.Process()
    return {
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "mib": process.memory_info().rss / 2**20,
    }


def tell(parent: Any, **line: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        parent.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
