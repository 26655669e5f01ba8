"""A sink at work in a thread of its own, so that one that fails or hangs costs the run nothing.

    sink = BackgroundSink("wandb", open_wandb, run, steps_done)   returns at once
    sink.send(lambda opened: opened.show_row(step, values))       returns at once
    sink.close(deadline)                                          waits until then at the most
    leave_hanging_sinks(status)                                   at the very end of a program

What a sink cannot take is lost to it, counted, and told once; `metrics.jsonl` has everything.
"""

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mocov3_ds.monitoring.sinks import Sink, SinkOpener
from mocov3_ds.settings.wording import count_noun

_WAITING = 4096
"""rows that wait for a sink at the most; with layer signals they take about 40 MB"""
_GIVE_UP = 20
"""failures without a success between them after which a sink gets nothing more"""

Work = Callable[[Sink], None]

_hanging: list[threading.Thread] = []
"""threads of sinks that did not finish in time"""

_log = logging.getLogger("mocov3_ds")


class BackgroundSink:
    """Opens, feeds and closes a sink in a thread.

    Args:
        name: The sink's name as users give it.
        opener: Opens the sink; called in the thread.
        run: The run folder.
        steps_done: Number of optimizer steps done.
        waiting: Number of rows that wait for the sink at the most.
    """

    def __init__(
        self, name: str, opener: SinkOpener, run: Path, steps_done: int, waiting: int = _WAITING
    ) -> None:
        self.name, self.lost = name, 0
        self._sent, self._told, self._is_broken = 0, False, False
        self._queue: queue.Queue[Work | None] = queue.Queue(waiting)
        self._thread = threading.Thread(
            target=self._work, args=(opener, run, steps_done), name=f"sink-{name}", daemon=True
        )
        self._thread.start()

    def send(self, work: Work) -> None:
        """Let the sink do something soon; it is lost where the sink has failed or does not keep up.

        Args:
            work: What to do with the opened sink.
        """
        self._sent += 1
        if self._is_broken:
            self.lost += 1
            return
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            self._lose(f"does not keep up: {self._queue.maxsize} rows wait for it")

    def close(self, deadline: float) -> str:
        """Let the sink finish; return what it has lost in a sentence, empty where nothing.

        Args:
            deadline: Time of `time.monotonic` until which to wait.
        """
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=max(deadline - time.monotonic(), 0.01))
        self._thread.join(max(deadline - time.monotonic(), 0.01))
        if self._thread.is_alive():
            self._is_broken = True
            _hanging.append(self._thread)
            waiting = self._queue.qsize()
            return f"{self.name} did not finish in time; {count_noun(waiting, 'row')} wait for it"
        if self.lost:
            return f"{self.name} has not got {self.lost} of {count_noun(self._sent, 'row')}"
        return ""

    def _work(self, opener: SinkOpener, run: Path, steps_done: int) -> None:
        try:
            sink = opener(run, steps_done)
        except BaseException as error:  # even SystemExit, which some trackers raise
            self._is_broken = True
            self._lose(f"cannot be opened ({_describe(error)})", rows=0)
            sink = None
        failures = 0
        while (work := self._queue.get()) is not None:
            if sink is None or self._is_broken:
                self.lost += 1
                continue
            try:
                work(sink)
                failures = 0
            except BaseException as error:
                failures += 1
                self._is_broken = failures >= _GIVE_UP
                self._lose(f"failed ({_describe(error)})")
        if sink is not None:
            try:
                sink.close()
            except BaseException as error:
                self._lose(f"failed at its end ({_describe(error)})", rows=0)

    def _lose(self, reason: str, rows: int = 1) -> None:
        """Count rows that the sink does not get, and say why the first time."""
        self.lost += rows
        if not self._told:
            self._told = True
            _log.warning("--log %s %s; the run goes on, metrics.jsonl has all", self.name, reason)


def leave_hanging_sinks(status: int) -> None:
    """End this process at once if a sink still hangs, else do nothing.

    Python would run what trackers have registered for its end, which may wait for minutes.

    Args:
        status: Exit status of the process.
    """
    if any(thread.is_alive() for thread in _hanging):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _describe(error: BaseException) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
