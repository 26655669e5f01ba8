"""Checkpoints written while the training goes on: the step loop waits only for copies.

    main thread, all ranks     gather a tensor, copy it to host memory (first rank), next tensor
    a thread, first rank       file -> disk -> fsync -> digest; final name, `latest`; mirror

All communication stays on the main thread, so its order is the same on all ranks. The thread works
on copies, so the next training step cannot change what it writes. The copies have a bounded size;
beyond it the step loop waits for the disk.
"""

import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mocov3_ds.checkpoints import run_folder
from mocov3_ds.checkpoints.checkpoint_writer import (
    FILE_BYTES,
    NamedTensors,
    TensorFile,
    gather_tensor_files,
    write_checkpoint,
)
from mocov3_ds.checkpoints.mirror import Mirror
from mocov3_ds.distributed import heartbeat, ranks

_log = logging.getLogger("mocov3_ds")


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Args:
        run: The run folder.
        keep: Number of newest checkpoints that stay.
        keep_every: Checkpoints of steps that are multiples of this number stay as well; 0 = none.
        host_bytes: Bytes of copies that may wait in host memory; a single file may exceed it.
        file_bytes: A tensor file is closed once it has so many bytes.
        mirror: Where complete checkpoints are copied to, or None.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: int,
        keep_every: int = 0,
        host_bytes: int = 16 * 2**30,
        file_bytes: int = FILE_BYTES,
        mirror: Mirror | None = None,
    ) -> None:
        self._run, self._keep, self._keep_every = run, keep, keep_every
        self._host_bytes, self._file_bytes, self._mirror = host_bytes, file_bytes, mirror
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def save(
        self,
        step: int,
        groups: Mapping[str, NamedTensors],
        state: Mapping[str, Any],
        *,
        background: bool,
    ) -> float:
        """Write a checkpoint after waiting for the one before; all ranks must call.

        In the background, only the copies are waited for. If the writing fails later, a warning is
        logged at once, and the next save waits until its own checkpoint is on disk.

        Args:
            step: Number of optimizer steps done.
            groups: For each group (`base`, `optimizer`, ...) a stream of tensor names and full
                tensors, which is iterated in order.
            state: JSON values to store beside the tensors.
            background: Whether a thread does the writing.

        Returns:
            Seconds that this call took.

        Raises:
            ValueError: The checkpoint could not be written; raised on each rank. The former
                checkpoint is still the newest.
        """
        started = time.perf_counter()
        self.wait()
        failed_before = ranks.broadcast_object(self._failure is not None)
        files = gather_tensor_files(groups, self._file_bytes)
        if background and not failed_before:
            self._start_writing(step, files, state)
        else:
            self._write(step, files, state)
            for _ in files:  # all ranks gather to the end, even if the disk has failed
                pass
            ranks.run_on_first(self._raise_failure)
        return time.perf_counter() - started

    def _start_writing(
        self, step: int, files: Iterator[TensorFile], state: Mapping[str, Any]
    ) -> None:
        if not ranks.is_first():
            for _ in files:
                pass
            return
        queue = _FileQueue(self._host_bytes)
        thread = threading.Thread(
            target=self._write, args=(step, queue.take_files(), state), name="checkpoint"
        )
        try:
            thread.start()
        except RuntimeError as error:  # no more threads: write it here
            _log.warning("the checkpoint of step %d is written before going on: %s", step, error)
            self._write(step, files, state)
            for _ in files:
                pass
            return
        self._thread = thread
        try:
            for file in files:
                queue.put(file)
            queue.close(complete=True)
        finally:
            queue.close(complete=False)

    def _write(self, step: int, files: Iterator[TensorFile], state: Mapping[str, Any]) -> None:
        """Write on the main thread or on the writing one; an error goes to `_failure`."""
        if not ranks.is_first():
            return
        self._failure = None
        try:
            run_folder.check_lock_held(self._run)
            folder = write_checkpoint(
                self._run,
                step,
                files,
                state,
                keep=self._keep,
                keep_every=self._keep_every,
                in_use=self._mirror.names_in_use() if self._mirror else (),
            )
        except Exception as error:  # the training goes on whatever fails here
            self._failure = _failure_message(self._run, step, error)
            _log.warning("%s", self._failure)
            for _ in files:  # empty the queue: otherwise the step loop would wait for room in it
                pass
        else:
            heartbeat.note_saved(folder.name)
            if self._mirror:
                self._mirror.send(folder)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise ValueError(self._failure)

    def is_busy(self) -> bool:
        """Tell whether a checkpoint is being written right now; only the first rank knows."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the last checkpoint is on disk or has failed; ranks need not call together.

        Args:
            seconds: The longest time to wait; None = as long as it takes.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None

    def close(self) -> None:
        """Wait for the disk and for the mirror; ranks need not call together."""
        self.wait()
        if self._mirror:
            self._mirror.close()


class _FileQueue:
    """Tensor files on their way from the step loop to the writing thread, of bounded size."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0  # bytes
        self._files: deque[TensorFile] = deque()
        self._complete: bool | None = None  # None = open, False = the step loop failed
        self._change = threading.Condition()

    def put(self, file: TensorFile) -> None:
        """Add a file; waits while the queue has no room for it, unless the queue is empty."""
        with self._change:
            self._change.wait_for(lambda: not self._size or self._size + file.size <= self._limit)
            self._size += file.size
            self._files.append(file)
            self._change.notify_all()

    def close(self, *, complete: bool) -> None:
        """Let no more files come; only the first call counts."""
        with self._change:
            if self._complete is None:
                self._complete = complete
            self._change.notify_all()

    def take_files(self) -> Iterator[TensorFile]:
        """Yield the files in order; each takes room in the queue until the next is asked for.

        Raises:
            OSError: The step loop failed before it had added all files.
        """
        while True:
            with self._change:
                self._change.wait_for(lambda: self._files or self._complete is not None)
                if not self._files:
                    break
                file = self._files.popleft()
            yield file
            with self._change:
                self._size -= file.size
                self._change.notify_all()
        if not self._complete:
            raise OSError("the tensors were not all gathered")


def _failure_message(run: Path, step: int, error: Exception) -> str:
    try:
        free = f"{shutil.disk_usage(run).free / 1e9:.1f} GB are free there"
    except OSError as disk_error:
        free = f"{run} cannot be reached: {disk_error}"
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return (
        f"the checkpoint of step {step} could not be written: {kind}{error} ({free}). The one "
        "before it stays in force, and the same command goes on from it."
    )
