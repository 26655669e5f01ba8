"""Checkpoints behind the training: the step loop waits for copies, one thread for the disk.

    main thread, all ranks    gather a tensor, copy it to host memory (first rank), next tensor
    one thread, first rank    part -> file -> fsync -> digest; names, `latest`, pruning; mirror

All communication stays on the main thread, so its order is the same on all ranks. The copies are
what makes a step taken meanwhile harmless; their size is bounded, and the step loop waits for the
disk beyond that.
"""

import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mocov3_ds.checkpoints import checkpoint, run_folder
from mocov3_ds.checkpoints.checkpoint import Part, Tensors
from mocov3_ds.checkpoints.mirror import Mirror
from mocov3_ds.distributed import ranks

_log = logging.getLogger("mocov3_ds")


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Args:
        run: run folder.
        keep: newest checkpoints that stay.
        keep_every: those of multiples of so many steps stay as well; 0 = none.
        host_bytes: of copies that may wait in host memory; one part may exceed it.
        mirror: where complete checkpoints are copied to.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: int,
        keep_every: int = 0,
        host_bytes: int = 16 * 2**30,
        mirror: Mirror | None = None,
    ) -> None:
        self._run, self._keep, self._keep_every = run, keep, keep_every
        self._host_bytes, self._mirror = host_bytes, mirror
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def save(
        self,
        step: int,
        groups: Mapping[str, Tensors],
        state: Mapping[str, Any],
        *,
        background: bool,
    ) -> float:
        """Write a checkpoint; all ranks must call. The one before it is waited for.

        In the background only the copies are waited for. If that fails later, a warning says so at
        once, and the next save is waited for to its end, while its state is still at hand.

        Args:
            step: optimizer steps done.
            groups: named streams of (tensor name, whole tensor), iterated in order.
            state: JSON values to keep beside them.
            background: let a thread do the writing.

        Returns:
            seconds that this call took.

        Raises:
            ValueError: it could not be written, on each rank; the former checkpoint is in force.
        """
        started = time.perf_counter()
        self.wait()
        failed_before = ranks.broadcast_object(self._failure is not None)
        of_all = checkpoint.parts(groups)
        if background and not failed_before:
            self._hand_over(step, of_all, state)
        else:
            self._write(step, of_all, state)
            for _ in of_all:  # all ranks gather to the end, also after the disk failed
                pass
            ranks.first_does(self._tell)
        return time.perf_counter() - started

    def _hand_over(self, step: int, of_all: Iterator[Part], state: Mapping[str, Any]) -> None:
        if not ranks.is_first():
            for _ in of_all:
                pass
            return
        copies = _Copies(self._host_bytes)
        self._thread = threading.Thread(
            target=self._write, args=(step, copies.taken(), state), name="checkpoint"
        )
        self._thread.start()
        try:
            for part in of_all:
                copies.put(part)
            copies.end(complete=True)
        finally:
            copies.end(complete=False)

    def _write(self, step: int, of_all: Iterator[Part], state: Mapping[str, Any]) -> None:
        """Runs on the main thread or on the writer's; keeps what went wrong in `_failure`."""
        if not ranks.is_first():
            return
        self._failure = None
        spare = self._mirror.reading() if self._mirror else ()
        try:
            run_folder.check_still_ours(self._run)
            folder = checkpoint.write(
                self._run,
                step,
                of_all,
                state,
                keep=self._keep,
                keep_every=self._keep_every,
                spare=spare,
            )
        except Exception as error:
            self._failure = _sentence(self._run, step, error)
            _log.warning("%s", self._failure)
            for _ in of_all:  # take what comes, so that the step loop never waits for nobody
                pass
        else:
            if self._mirror:
                self._mirror.send(folder)

    def _tell(self) -> None:
        if self._failure is not None:
            raise ValueError(self._failure)

    def busy(self) -> bool:
        """Whether a checkpoint is on its way to the disk; on the first rank."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Until the last checkpoint that was asked for is on disk or has failed; needs no rank.

        Args:
            seconds: wait no longer than that.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None

    def close(self) -> None:
        """Wait for what is on its way, to the disk and to the mirror; needs no other rank."""
        self.wait()
        if self._mirror:
            self._mirror.close()


class _Copies:
    """Parts on their way from the step loop to the writer, of bounded size."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._parts: deque[Part] = deque()
        self._ended: bool | None = None  # True = complete, False = the step loop failed
        self._change = threading.Condition()

    def put(self, part: Part) -> None:
        """Hand a part over; waits while too many bytes are held, unless none are."""
        with self._change:
            self._change.wait_for(lambda: not self._held or self._held + part[2] <= self._limit)
            self._held += part[2]
            self._parts.append(part)
            self._change.notify_all()

    def end(self, *, complete: bool) -> None:
        """Nothing more comes; the first call counts."""
        with self._change:
            if self._ended is None:
                self._ended = complete
            self._change.notify_all()

    def taken(self) -> Iterator[Part]:
        """The parts in order; one counts as held until the next is asked for.

        Raises:
            OSError: the step loop failed before it had handed over all of them.
        """
        while True:
            with self._change:
                self._change.wait_for(lambda: self._parts or self._ended is not None)
                if not self._parts:
                    break
                part = self._parts.popleft()
            yield part
            with self._change:
                self._held -= part[2]
                self._change.notify_all()
        if not self._ended:
            raise OSError("the tensors were not all gathered")


def _sentence(run: Path, step: int, error: Exception) -> str:
    try:
        free = f"{shutil.disk_usage(run).free / 1e9:.1f} GB are free there"
    except OSError as trouble:
        free = f"{run} cannot be reached: {trouble}"
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return (
        f"the checkpoint of step {step} could not be written: {kind}{error} ({free}). The one "
        "before it stays in force, and the same command goes on from it."
    )
