"""Who makes the shards: this process, a pool of processes, or a Ray cluster.

Each takes one function and its tasks, one task a shard, and yields results as they are ready. A
task does nothing if its shard is finished already, so any of them may be done again.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Runs `work` on tasks with so many workers."""

    def __call__(self, work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
        """Results in the order they are ready."""
        ...


def default_workers() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_pool(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Results of `work` on each task, in the order they are ready.

    Args:
        work: a function of a module, run in other processes.
        tasks: taken a few ahead of the workers, so they may be made on the fly.
        workers: processes; 1 = this one.

    Raises:
        ValueError: a worker was killed.
        Exception: what `work` raised; tasks not begun are dropped.
    """
    if workers <= 1:
        yield from map(work, tasks)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        pending: set[Future[R]] = set()
        for task in tasks:
            pending.add(pool.submit(work, task))
            if len(pending) >= 2 * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed, most likely for lack of memory; the same command goes on "
            "where this one ends, with fewer --workers if it happens again."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
