"""The one room that talks to other ranks; everything else asks here.

Without a process group each function answers for one process (rank 0 of 1, nothing to gather), so
the rest of the program is written once and runs the same on 1 and on N ranks.

Shape suffixes: B = rows of this rank, G = rows of all ranks.
"""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    return device


def _fill_launcher_variables() -> None:
    given = [name for name in _LAUNCHER_VARIABLES if os.environ.get(name)]
    if len(given) == len(_LAUNCHER_VARIABLES):
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
        missing = [name for name in _LAUNCHER_VARIABLES if name not in given]
        raise ValueError(
            f"the launcher set {', '.join(given)} but not {', '.join(missing)}; start the run with "
            "deepspeed, torchrun, accelerate launch or plain python."
        )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(_free_port()))


def _free_port() -> int:
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
