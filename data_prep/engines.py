"""Who makes the shards: this process, a pool of processes, or a Ray cluster.

Each takes one function and its tasks, one task a shard, and yields results as they are ready. A
task does nothing if its shard is finished already, so any of them may be done again.
"""

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any, Protocol, TypeVar

_RAY_RETRIES = 5

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
            with _ctrl_c_waits():  # submitting may start a worker
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


def ray_cluster(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """The same on a Ray cluster: one task a shard, done again elsewhere when its node dies.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine, or starts one here. Every
    node needs this package, and sees the source and (unless it is object storage) the destination
    under the same path.

    Args:
        work: a function of a module.
        tasks: taken a few ahead of the workers.
        workers: tasks at a time; 0 = all CPUs of the cluster.

    Raises:
        ValueError: Ray is not installed, or a shard's node died more often than is tried.
        Exception: what `work` raised.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'mocov3-ds[ray]'.") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_retries=_RAY_RETRIES)(work)
    ahead = 2 * (workers or round(ray.cluster_resources().get("CPU", 1)))
    pending: list[Any] = []
    try:
        for task in tasks:
            pending.append(remote.remote(task))
            if len(pending) >= ahead:
                done, pending = ray.wait(pending)
                yield from ray.get(done)
        while pending:
            done, pending = ray.wait(pending)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        first = f"{error}".partition("\n")[0]
        raise ValueError(
            f"the Ray cluster lost a shard {_RAY_RETRIES + 1} times ({first}); the same command "
            "goes on where this one ends."
        ) from None
    finally:
        for left in pending:
            ray.cancel(left)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C comes afterwards, and never to a process started meanwhile, slowly as it may start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
