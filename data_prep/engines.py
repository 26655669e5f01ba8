"""Who makes the shards? This process, a pool of processes, or a Ray cluster.

Each takes one function and its tasks, one task a shard, and yields results as they are ready. A
task does nothing if its shard is finished already, so any of them may be done again.
"""

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

_RAY_RETRIES = 5

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Function that runs `work` on tasks with a number of workers."""

    def __call__(self, work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
        """Yield results in the order they are ready."""
        ...


def default_workers() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_pool(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Yield the results of `work` on each task, in the order they are ready.

    Args:
        work: Function of a module, which runs in other processes.
        tasks: Tasks, taken a few ahead of the workers, so they may be made on the fly.
        workers: Number of processes; 1 = this one alone.

    Raises:
        ValueError: A worker was killed.
        Exception: What `work` raised; tasks not begun are dropped.
    """
    if workers <= 1:
        yield from map(work, tasks)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    # Ctrl-C while `concurrent.futures.wait` takes the futures' locks would leave one locked for
    # ever; a queue has no such moment
    ready: SimpleQueue[Future[R]] = SimpleQueue()
    pending = 0
    try:
        for task in tasks:
            with _delay_ctrl_c():  # submitting may start a worker
                pool.submit(work, task).add_done_callback(ready.put)
            pending += 1
            if pending >= 2 * workers:
                yield ready.get().result()
                pending -= 1
        for _ in range(pending):
            yield ready.get().result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed, most likely for lack of memory; the same command goes on "
            "where this one ends, with fewer --workers if it happens again."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def ray_cluster(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Do the same on a Ray cluster: one task a shard, done again elsewhere when its node dies.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine, or starts one here. Every
    node needs this package, and sees the source and (unless it is object storage) the destination
    under the same path.

    Args:
        work: Function of a module, which runs on the nodes.
        tasks: Tasks, taken a few ahead of the workers.
        workers: Number of tasks at a time; 0 = all CPUs of the cluster.

    Raises:
        ValueError: Ray is not installed, or a shard's node died more often than is tried.
        Exception: What `work` raised.
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
                ready, pending = ray.wait(pending)
                yield from ray.get(ready)
        while pending:
            ready, pending = ray.wait(pending)
            yield from ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        first = f"{error}".partition("\n")[0]
        raise ValueError(
            f"the Ray cluster lost a shard {_RAY_RETRIES + 1} times ({first}); the same command "
            "goes on where this one ends."
        ) from None
    finally:
        for reference in pending:
            ray.cancel(reference)


@contextmanager
def _delay_ctrl_c() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends, and from any process that is started in it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
