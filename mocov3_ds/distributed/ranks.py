"""The one room that talks to other ranks; everything else asks here.

Without a process group each function answers for one process (rank 0 of 1, nothing to gather), so
the rest of the program is written once and runs the same on 1 and on N ranks.

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

    Raises:
        ValueError: a launcher set only part of the variables.
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
    given = [name for name in LAUNCHER_VARIABLES if os.environ.get(name)]
    if len(given) == len(LAUNCHER_VARIABLES):
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
    if "RANK" in given or "WORLD_SIZE" in given:
        missing = [name for name in LAUNCHER_VARIABLES if name not in given]
        raise ValueError(
            f"the launcher set {', '.join(given)} but not {', '.join(missing)}; start the run with "
            "deepspeed, torchrun, accelerate launch or plain python."
        )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(free_port()))


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def this_device() -> torch.device:
    """The accelerator of this rank, chosen by its place on the machine, or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def rank() -> int:
    """Number of this process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def is_first() -> bool:
    """True on the one rank that writes files and speaks."""
    return rank() == 0


def barrier() -> None:
    """Wait until each rank is here."""
    if world_size() > 1:
        dist.barrier()


def all_gather_cat(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient: (B, ...) -> (G, ...).

    Each rank must bring the same shape.
    """
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def all_gather_stack(x: Tensor) -> Tensor:
    """One tensor of each rank, stacked in rank order: (...) -> (world size, ...), no gradient."""
    return all_gather_cat(x[None])


def all_reduce_sum(x: Tensor, group: Any = None) -> Tensor:
    """Sum over the ranks of `group` (all ranks by default), in place; returns `x`."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group)
    return x


def all_reduce_max(x: Tensor, group: Any = None) -> Tensor:
    """Maximum over the ranks of `group` (all ranks by default), in place; returns `x`."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def reduce_scatter_sum(x: Tensor) -> Tensor:
    """This rank's part of the sum over all ranks: (world size * n,) -> (n,)."""
    if world_size() == 1:
        return x
    part = x.new_empty(len(x) // world_size())
    dist.reduce_scatter_single(part, x, op=dist.ReduceOp.SUM)
    return part


def all_gather_flat(x: Tensor) -> Tensor:
    """Parts of all ranks side by side in one buffer: (n,) -> (world size * n,)."""
    if world_size() == 1:
        return x
    whole = x.new_empty(len(x) * world_size())
    dist.all_gather_single(whole, x)
    return whole


def broadcast(x: Tensor, source: int = 0) -> Tensor:
    """Make `x` on each rank what it is on rank `source`, in place; returns `x`."""
    if world_size() > 1:
        dist.broadcast(x, src=source)
    return x


def broadcast_object(obj: Any, source: int = 0) -> Any:
    """The (small, picklable) object that rank `source` holds."""
    if world_size() == 1:
        return obj
    box = [obj if rank() == source else None]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def first_does(work: Callable[[], Any]) -> Any:
    """Let rank 0 do `work` while the others wait, and give each rank its (picklable) result.

    Raises:
        ValueError: what `work` raised on rank 0, on every rank, so that none waits for ever.
    """
    outcome: tuple[Any, str | None] = (None, None)
    if is_first():
        try:
            outcome = (work(), None)
        except (ValueError, OSError) as error:
            outcome = (None, str(error))
    result, trouble = broadcast_object(outcome)
    if trouble is not None:
        raise ValueError(trouble)
    return result


def gather_objects(obj: Any) -> list[Any]:
    """The (small, picklable) objects of all ranks, in rank order, on each rank."""
    if world_size() == 1:
        return [obj]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, obj)
    return objects


@contextmanager
def timed_collectives(phase: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
    """Run every collective of this process, ours and DeepSpeed's, inside `phase("collective")`.

    Their start and the wait for them are what is seen: the whole of a call that blocks, and of one
    that goes on beside other work only what was not hidden. Methods of torch's classes are
    exchanged for the while, as DeepSpeed keeps references to the functions above them.
    """

    def inside(method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with phase("collective"):
                return method.__get__(self)(*args, **kwargs)

        return call

    places: list[tuple[type, str]] = [(dist.Work, "wait")]
    places += [(dist.ProcessGroup, name) for name in _COLLECTIVES]
    places = [(owner, name) for owner, name in places if name in vars(owner)]
    originals = [(owner, name, vars(owner)[name]) for owner, name in places]
    for owner, name, method in originals:
        setattr(owner, name, inside(method))
    try:
        yield
    finally:
        for owner, name, method in originals:
            setattr(owner, name, method)
