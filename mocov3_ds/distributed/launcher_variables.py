"""Which rank is this process, of how many, and where do they meet? As its launcher's variables say.

`deepspeed`, `torchrun` and `accelerate launch` set all of `NAMES`; `srun` has its own, which become
these; with neither, a process is a run of one rank. What cannot be is refused before any rank waits
for another one.
"""

import logging
import os
import socket

from mocov3_ds.settings.environment import read_number

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_SHELL_STEPS = {"4294967290", "4294967291", "batch", "interactive"}
"""what SLURM_STEP_ID may be in an interactive shell and in a batch script (slurm.h)"""

_log = logging.getLogger("mocov3_ds")


def fill_variables() -> set[str]:
    """Set those of `NAMES` that the launcher left out, where it is clear what they must be.

    Returns:
        The names of those that were set.

    Raises:
        ValueError: A launcher set only some of them, or values that cannot be.
    """
    present = [name for name in NAMES if os.environ.get(name)]
    if len(present) < len(NAMES):
        _fill_missing(present)
    filled = {*NAMES} - {*present}
    rank, world_size = (int(read_number(name)) for name in ("RANK", "WORLD_SIZE"))
    local_rank = int(read_number("LOCAL_RANK"))
    read_number("MASTER_PORT")
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if value >= world_size:
            raise ValueError(
                f"{name}={value} cannot be with WORLD_SIZE={world_size}: ranks are counted from 0 "
                f"to {world_size - 1}. Each process of a run gets the same WORLD_SIZE."
            )
    return filled


def _fill_missing(present: list[str]) -> None:
    tasks = count_step_tasks()
    if tasks > 1:
        _fill_from_slurm(tasks)
        return
    if "RANK" in present or "WORLD_SIZE" in present:
        missing = [name for name in NAMES if name not in present]
        raise ValueError(
            f"the launcher set {', '.join(present)} but not {', '.join(missing)}; start the run "
            "with deepspeed, torchrun, accelerate launch or plain python."
        )
    tasks_of_job = int(read_number("SLURM_NTASKS"))
    if tasks_of_job > 1:
        _log.warning(
            "Slurm's job has %d tasks, but this process is none of them (no srun before the "
            "command): it is a run of one rank.",
            tasks_of_job,
        )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(free_port()))


def count_step_tasks() -> int:
    """Return the tasks of the Slurm step that this process is a task of; 1 where it is in none.

    The size of the job (`SLURM_NTASKS`) stands in the environment of its batch script and of an
    interactive shell as well, which are one process each, number 0. `srun` alone says the size of
    its step.
    """
    if not os.environ.get("SLURM_PROCID") or os.environ.get("SLURM_STEP_ID") in _SHELL_STEPS:
        return 1
    has_step_tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or not read_number("SLURM_PROCID")
    return int(read_number("SLURM_STEP_NUM_TASKS" if has_step_tasks else "SLURM_NTASKS"))


def _fill_from_slurm(tasks: int) -> None:
    if not os.environ.get("MASTER_ADDR"):
        raise ValueError(
            f"Slurm started {tasks} tasks but MASTER_ADDR is not set; put "
            "export MASTER_ADDR=$(scontrol show hostnames $SLURM_NODELIST | head -n 1) "
            "before srun."
        )
    if not os.environ.get("MASTER_PORT"):
        os.environ["MASTER_PORT"] = "29500"
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = str(tasks)
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def choose_device(local_rank: int, devices: int) -> int:
    """Return the number of the accelerator of a rank among those that its process sees.

    Args:
        local_rank: Number of the rank on its machine, from 0.
        devices: Accelerators that the process sees. One alone is the rank's own, as a launcher
            shows it that gives each task a device (`srun --gpus-per-task=1`).

    Raises:
        ValueError: There are several, but fewer than ranks.
    """
    if devices == 1:
        return 0
    if local_rank >= devices:
        raise ValueError(
            f"LOCAL_RANK={local_rank}, but this process sees {devices} devices: start at most "
            f"{devices} ranks on this machine (deepspeed --num_gpus, torchrun --nproc-per-node), "
            "or let CUDA_VISIBLE_DEVICES show all of its devices."
        )
    return local_rank
