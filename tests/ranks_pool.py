"""Real gloo ranks for tests: `run_ranks(2, fn, *args)` returns what `fn` returned on each rank.

`fn` must be a top-level function of a test module. Each call starts fresh processes, forked from a
server of one thread that has imported torch and DeepSpeed once, which takes seconds: nothing else
of a call lives on in the next. A rank that raises fails the test with its traceback, one that hangs
is ended by its process id.
"""

import functools
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

from mocov3_ds.distributed.ranks import free_port

_SETTINGS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # read by what is imported


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 600.0,
    import_again: bool = False,
) -> list[Any]:
    """Run `fn(*args)` on each of `world_size` gloo ranks and return the results in rank order.

    Args:
        world_size: Number of ranks to start.
        fn: Top-level function that each rank calls.
        args: Arguments of the function, the same on each rank.
        timeout: Seconds to wait for the last result.
        import_again: Whether the ranks import everything anew, because an import reads a setting.
    """
    context: Any = multiprocessing.get_context("spawn") if import_again else forks()
    port = free_port()
    # pickled here: multiprocessing would hand over a descriptor for each tensor, and only a few fit
    work = pickle.dumps((fn, args))
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank,
            args=(sender, rank, world_size, port, dict(os.environ), work),
            daemon=True,
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        return _collect(pipes, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


@functools.cache
def forks() -> Any:
    """A context whose processes are forks of one that has imported what all ranks need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported_once"])
    with mock.patch.dict(os.environ, _SETTINGS):
        forkserver.ensure_running()
    return context


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = sorted(set(range(len(pipes))) - set(results))
            raise TimeoutError(f"ranks {silent} gave no result within {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                kind, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if kind == "error":
                raise RuntimeError(f"rank {rank} of {len(pipes)}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    work: bytes,
) -> None:
    os.environ.clear()  # the server's is that of the first call
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **_SETTINGS,
    )
    try:
        import torch

        from mocov3_ds.distributed import ranks

        torch.set_num_threads(1)
        ranks.start(timeout_s=120)
        fn, args = pickle.loads(work)
        # pickled here: multiprocessing would share the memory of a process that is about to end
        pipe.send_bytes(pickle.dumps(("result", fn(*args))))
        ranks.barrier()
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
    # DeepSpeed leaves threads and C++ statics behind whose tear-down order is not ours
    os._exit(0)
