"""Communication between ranks: everything that other modules need of torch.distributed.

Without a process group each function answers for a single process (rank 0 of 1, nothing to gather).
So the rest of the program is written once, and runs the same on 1 and on N ranks.

Shape suffixes: B = rows of this rank, G = rows of all ranks.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "allgather", "_allgather_base"),
    *("all_gather_single", "allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"),
    *("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced", "alltoall_base"),
)


def start(timeout_s: float = 600.0) -> torch.device:
    """Join the process group that the launcher describes and return this rank's device.

    Reads the variables that `deepspeed`, `torchrun` and `accelerate launch` set, then those of a
    Slurm step (`srun`); with neither, this is a run of one rank. NCCL where there is a GPU, gloo
    otherwise.

    Args:
        timeout_s: Seconds that a rank may wait for another one in a collective.

    Raises:
        ValueError: A launcher set only some of the variables.
    """
    _fill_launcher_variables()
    device = this_device()
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        store, number, size = next(rendezvous("env://", timeout=timeout))
        # torchrun --max-restarts keeps its store, with the addresses of ranks that are gone in it
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(f"attempt-{attempt}", store),
            rank=number,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    return device


def _fill_launcher_variables() -> None:
    present = [name for name in LAUNCHER_VARIABLES if os.environ.get(name)]
    if len(present) == len(LAUNCHER_VARIABLES):
        return
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        if "MASTER_ADDR" not in os.environ:
            raise ValueError(
                "Slurm started several tasks but MASTER_ADDR is not set; put "
                "export MASTER_ADDR=$(scontrol show hostnames $SLURM_NODELIST | head -n 1) "
                "before srun."
            )
        os.environ.setdefault("MASTER_PORT", "29500")
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        return
    if "RANK" in present or "WORLD_SIZE" in present:
        missing = [name for name in LAUNCHER_VARIABLES if name not in present]
        raise ValueError(
            f"the launcher set {', '.join(present)} but not {', '.join(missing)}; start the run "
            "with deepspeed, torchrun, accelerate launch or plain python."
        )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(free_port()))


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def this_device() -> torch.device:
    """Return the accelerator with the number of this rank on its machine, or else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def rank() -> int:
    """Return the number of this process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return the number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def is_first() -> bool:
    """Tell whether this is the one rank that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until all ranks have called."""
    if world_size() > 1:
        dist.barrier()


def all_gather_cat(x: Tensor) -> Tensor:
    """Join the rows of all ranks in rank order, without gradient: (B, ...) -> (G, ...).

    Args:
        x: Rows of this rank; the shape must be the same on all ranks.
    """
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    rows_of_ranks = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(rows_of_ranks, x)
    return torch.cat(rows_of_ranks)


def all_gather_stack(x: Tensor) -> Tensor:
    """Stack the tensors of all ranks in rank order, without gradient: (...) -> (world size, ...).

    Args:
        x: Tensor of this rank; the shape must be the same on all ranks.
    """
    return all_gather_cat(x[None])


def all_reduce_sum(x: Tensor, group: Any = None) -> Tensor:
    """Add up a tensor over ranks, in place, and return it.

    Args:
        x: Tensor of this rank, which becomes the sum.
        group: Process group of the ranks that take part; None = all ranks.
    """
    return _all_reduce(x, dist.ReduceOp.SUM, group)


def all_reduce_max(x: Tensor, group: Any = None) -> Tensor:
    """Take the maximum of a tensor over ranks, in place, and return it.

    Args:
        x: Tensor of this rank, which becomes the maximum.
        group: Process group of the ranks that take part; None = all ranks.
    """
    return _all_reduce(x, dist.ReduceOp.MAX, group)


def _all_reduce(x: Tensor, operation: Any, group: Any) -> Tensor:
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=operation, group=group)
    return x


def reduce_scatter_sum(x: Tensor) -> Tensor:
    """Add up a tensor over all ranks and return this rank's share: (world size * n,) -> (n,).

    Args:
        x: Tensor of this rank, one-dimensional.
    """
    if world_size() == 1:
        return x
    share = x.new_empty(len(x) // world_size())
    dist.reduce_scatter_single(share, x, op=dist.ReduceOp.SUM)
    return share


def all_gather_flat(x: Tensor) -> Tensor:
    """Join the shares of all ranks in one buffer: (n,) -> (world size * n,).

    Args:
        x: Share of this rank, one-dimensional.
    """
    if world_size() == 1:
        return x
    joined = x.new_empty(len(x) * world_size())
    dist.all_gather_single(joined, x)
    return joined


def broadcast(x: Tensor, source: int = 0) -> Tensor:
    """Give a tensor of one rank to all, in place, and return it.

    Args:
        x: Tensor of this rank, which becomes that of the source.
        source: Number of the rank whose tensor all get.
    """
    if world_size() > 1:
        dist.broadcast(x, src=source)
    return x


def broadcast_object(obj: Any, source: int = 0) -> Any:
    """Return the object of one rank on all ranks.

    Args:
        obj: A small object that can be pickled; only that of the source counts.
        source: Number of the rank whose object all get.
    """
    if world_size() == 1:
        return obj
    box = [obj if rank() == source else None]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def run_on_first(work: Callable[[], Any]) -> Any:
    """Let rank 0 do something while the others wait, and return its result on all ranks.

    Args:
        work: What rank 0 calls; its result must be small and can be pickled.

    Raises:
        ValueError: Rank 0 raised a ValueError or an OSError; all ranks raise it with the same text,
            so that none waits for ever.
    """
    outcome: tuple[Any, str | None] = (None, None)
    if is_first():
        try:
            outcome = (work(), None)
        except (ValueError, OSError) as error:
            outcome = (None, str(error))
    result, message = broadcast_object(outcome)
    if message is not None:
        raise ValueError(message)
    return result


def gather_objects(obj: Any) -> list[Any]:
    """Return the objects of all ranks, in rank order, on each rank.

    Args:
        obj: A small object that can be pickled.
    """
    if world_size() == 1:
        return [obj]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, obj)
    return objects


@contextmanager
def timed_collectives(timed: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Run every collective of this process, ours and DeepSpeed's, inside a context manager.

    What counts is the start of a collective and the wait for it: a call that blocks counts
    completely, and of one that goes on beside other work only what that work does not hide.
    Methods of torch's classes are replaced while the block runs, because DeepSpeed keeps references
    to the functions above them.

    Args:
        timed: Makes the context manager that each call runs in.
    """

    def wrap_method(method: Any) -> Any:
        def call_timed(self: Any, *args: Any, **kwargs: Any) -> Any:
            with timed():
                return method.__get__(self)(*args, **kwargs)

        return call_timed

    methods: list[tuple[type, str]] = [(dist.Work, "wait")]
    methods += [(dist.ProcessGroup, name) for name in _COLLECTIVES]
    originals = [(owner, name, vars(owner)[name]) for owner, name in methods if name in vars(owner)]
    for owner, name, method in originals:
        setattr(owner, name, wrap_method(method))
    try:
        yield
    finally:
        for owner, name, method in originals:
            setattr(owner, name, method)
