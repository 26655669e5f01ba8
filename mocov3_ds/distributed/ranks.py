"""Communication between ranks: everything that other modules need of torch.distributed.

Without a process group each function answers for a single process (rank 0 of 1, nothing to gather).
So the rest of the program is written once, and runs the same on 1 and on N ranks.

Shape suffixes: B = rows of this rank, G = rows of all ranks.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from mocov3_ds.distributed import devices, launcher_variables
from mocov3_ds.distributed.meeting import Newcomer, meet_ranks, spoken_wait
from mocov3_ds.settings.environment import DeviceChoice

LAUNCHER_VARIABLES = launcher_variables.NAMES
_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "allgather", "_allgather_base"),
    *("all_gather_single", "allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"),
    *("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced", "alltoall_base"),
)


_groups_joined = 0  # by this process, one after another
_stores: list[Store] = []  # kept where ranks that a launcher started meet again
_filled: set[str] = set()  # variables that no launcher has set, but `start`


def start(timeout_s: float = 600.0, device_choice: DeviceChoice = "auto") -> torch.device:
    """Join the process group that the launcher describes and return this rank's device.

    Reads the variables that `deepspeed`, `torchrun` and `accelerate launch` set, then those of a
    Slurm step (`srun`); with neither, this is a run of one rank. NCCL where there is a GPU, gloo
    otherwise.

    Args:
        timeout_s: Seconds that a rank may wait for another one in a collective.
        device_choice: "cpu" leaves cards alone; "auto" uses the rank's own, and the CPU only where
            the machine has none.

    Raises:
        ValueError: A launcher set only some of the variables or values that cannot be, the port is
            held by another run, ranks contradict each other, or torch cannot use the machine's
            card.
    """
    _filled.update(launcher_variables.fill_variables())
    if device_choice == "cpu":
        devices.insist_on_cpu()
    problem = devices.describe_unusable_card()
    if problem:
        raise ValueError(problem)
    device = this_device()
    if device.type == "cuda":
        devices.check_kernels(device)
    if not dist.is_initialized():
        _join_group(device, timedelta(seconds=timeout_s))
    return device


def _join_group(device: torch.device, timeout: timedelta) -> None:
    global _groups_joined
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    identity = str(torch.cuda.get_device_properties(device).uuid) if backend == "nccl" else ""
    me = Newcomer(rank, world_size, socket.gethostname(), os.getpid(), identity)
    store = meet_ranks(
        me,
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        hosted=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{_groups_joined}",
    )
    _groups_joined += 1
    if not _filled:  # the next group of these ranks meets at the same port
        _stores.append(store)
    with spoken_wait(rank) as wait:
        if rank == 0:
            wait.reason = (
                f"all ranks have come, but {backend} does not connect them: TCP between all hosts "
                "must be allowed, and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network"
            )
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on at the moment."""
    return launcher_variables.free_port()


def stop() -> None:
    """Leave the process group, ours and DeepSpeed's; `start` may join another one."""
    if dist.is_initialized():
        deepspeed_comm = sys.modules.get("deepspeed.comm.comm")
        if deepspeed_comm is not None and deepspeed_comm.cdb is not None:
            deepspeed_comm.destroy_process_group()
        else:
            dist.destroy_process_group()
    while _filled:
        os.environ.pop(_filled.pop(), None)


def has_group() -> bool:
    """Tell whether this process is in a process group, ours or the caller's."""
    return dist.is_initialized()


def this_device() -> torch.device:
    """Return the accelerator with the number of this rank on its machine, or else the CPU."""
    if not devices.has_usable_card():
        return torch.device("cpu")
    devices.choose_allocator()
    device = torch.device(
        "cuda", launcher_variables.choose_device(local_rank(), torch.cuda.device_count())
    )
    torch.cuda.set_device(device)
    return device


def rank(group: Any = None) -> int:
    """Return the number of this process among all, or in a process group, from 0."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: Any = None) -> int:
    """Return the number of processes that train together, or that a process group has."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


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


def all_to_all(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: Any = None
) -> Tensor:
    """Give each rank its part of a tensor, and return what all ranks gave this one, in rank order.

    Args:
        x: Parts for each rank, one after another, one-dimensional.
        sent: Elements for each rank.
        received: Elements from each rank.
        group: Process group of the ranks that take part; None = all ranks.
    """
    result = x.new_empty(sum(received))
    dist.all_to_all_single(result, x, list(received), list(sent), group=group)
    return result


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


def gather_objects(obj: Any, group: Any = None) -> list[Any]:
    """Return the objects of all ranks, in rank order, on each rank.

    Args:
        obj: A small object that can be pickled.
        group: Process group of the ranks that take part; None = all ranks.
    """
    if world_size(group) == 1:
        return [obj]
    objects: list[Any] = [None] * world_size(group)
    dist.all_gather_object(objects, obj, group=group)
    return objects


def count_collectives() -> int:
    """Return how many collectives this rank has entered, ours and DeepSpeed's, in all threads.

    The process groups count them when they are called, not when they are done; any thread may ask.
    """
    if not dist.is_initialized():
        return 0
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(int(group._get_sequence_number_for_group()) for group in groups)


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
