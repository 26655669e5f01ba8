"""Real gloo ranks for tests: `run_ranks(2, fn, *args)` returns what `fn` returned on each rank.

`fn` must be a top-level function of a test module. Each call starts fresh processes; put several
configurations into one call, since a rank that imports DeepSpeed takes seconds to start. A rank
that raises fails the test with its traceback, one that hangs is ended by its process id.
"""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 240.0
) -> list[Any]:
    """Run `fn(*args)` on each of `world_size` gloo ranks and return the results in rank order."""
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        here, there = context.Pipe(duplex=False)
        process = context.Process(
            target=_one_rank, args=(there, rank, world_size, port, fn, args), daemon=True
        )
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    try:
        return _collect(pipes, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


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


def _one_rank(
    pipe: Connection, rank: int, world_size: int, port: int, fn: Callable[..., Any], args: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    try:
        import torch

        from mocov3_ds.distributed import ranks

        torch.set_num_threads(1)
        ranks.start(timeout_s=120)
        # pickled here: multiprocessing would share the memory of a process that is about to end
        pipe.send_bytes(pickle.dumps(("result", fn(*args))))
        ranks.barrier()
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
    # DeepSpeed leaves threads and C++ statics behind whose tear-down order is not ours
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
