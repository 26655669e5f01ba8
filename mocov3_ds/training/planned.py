"""How a run compares with the plan of it: the line of the log on memory and step time.

The line is a comparison and no part of the training: whatever the planner does not know, such as a
loss or an optimizer of somebody's own, must not end a run.
"""

import logging
import math
from typing import Literal

import torch

from mocov3_ds.config.compression import (
    OFF,
    check_patches,
    count_lengths,
    length_at,
    read_schedule,
)
from mocov3_ds.config.run_config import Config, encoder_shape
from mocov3_ds.distributed import devices, ranks
from mocov3_ds.monitoring.run_log import peak_memory
from mocov3_ds.planning.architecture import model_operations, patches_of
from mocov3_ds.planning.cards import PRESETS, find_card_of_device
from mocov3_ds.planning.drift import SETTLED, Drift
from mocov3_ds.planning.hardware import Cluster
from mocov3_ds.planning.memory import plan_memory
from mocov3_ds.planning.pace import Pace, plan_pace
from mocov3_ds.planning.step_setup import StepSetup
from mocov3_ds.planning.whole_matrices import matrix_params
from mocov3_ds.training.advance import schedule_position
from mocov3_ds.training.compression import image_operations
from mocov3_ds.training.run import Run

_log = logging.getLogger("mocov3_ds")

_LONGEST_ON_CPU = 2
"""days; the recipes for a CPU take minutes"""

_PRECISIONS: dict[torch.dtype, Literal["fp32", "bf16", "fp16"]] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


def drift_line(drift: Drift, run: Run) -> str:
    """Memory and step time as planned and as measured; a reason where they cannot be compared.

    Args:
        drift: what was measured of the run so far.
        run: the run, built and at work.
    """
    try:
        setup = run_setup(run)
        plan = plan_memory(setup, on_demand=run.device.type == "cpu")
        memory, pace = peak_memory(run.device), run_pace(run, setup)
        reserved = memory.get("memory_reserved_gib", 0.0)
        return drift.describe(plan, memory["memory_gib"], pace, reserved_gib=reserved)
    except Exception as error:
        _log.debug("the run and its plan", exc_info=True)
        return f"plan: this run cannot be compared with one ({type(error).__name__}: {error})"


def check_length(config: Config, device: torch.device, total_steps: int) -> None:
    """Refuse a run of days on the CPU that nobody has asked for.

    A torch built for GPUs on a machine where none is seen is most often a container without its
    cards, or a login node. A network whose operations cannot be counted is not refused.

    Args:
        config: settings of the run.
        device: device of this rank.
        total_steps: steps of the whole run.

    Raises:
        ValueError: the CPU would take days, this torch is built for GPUs, and `--device cpu` is
            not given; or the network cannot shorten its sequences as `--compress` says.
    """
    for_gpus = torch.version.cuda is not None or torch.version.hip is not None
    if device.type != "cpu" or not for_gpus or devices.is_cpu_meant():
        return
    steps = min(total_steps, config.stop_after_steps or total_steps)
    operations = _mean_operations(config) * config.batch * steps
    machines = max(1, ranks.world_size() // ranks.local_world_size())
    days = operations / machines / PRESETS["cpu"].fp32_rate / 86400
    if days > _LONGEST_ON_CPU:  # not where they are nan
        raise ValueError(
            f"no GPU is seen on this machine, and {steps} steps would take {days:.0f} days or more "
            "on its CPU: look at nvidia-smi, and start a container with --gpus all; --device cpu "
            "trains on the CPU all the same."
        )


def _mean_operations(config: Config) -> float:
    """Operations of an image in a step, on average over a whole run; nan where not known."""
    shape = encoder_shape(config)
    try:
        if config.compress == OFF:
            return model_operations(shape)
        patches = patches_of(shape)
    except ValueError:  # a backbone that does not run without numbers
        return math.nan
    check_patches(config.compress, patches)
    lengths = count_lengths(config.compress, patches)
    return sum(share * image_operations(shape, length) for length, share in lengths.items())


def run_setup(run: Run) -> StepSetup:
    """A step of the run as the planner sees it."""
    tf32 = run.config.tf32 and run.dtype == torch.float32
    return StepSetup(
        shape=encoder_shape(run.config),
        stage=run.engine.zero_optimization_stage(),
        world_size=ranks.world_size(),
        batch=run.config.batch,
        precision="tf32" if tf32 else _PRECISIONS[run.dtype],
        chunks=run.model.chunks,
        recompute_blocks=run.config.recompute_blocks,
        key_block=run.model.loss.key_block,
        optimizer=type(run.optimizer),
        optimizer_params=matrix_params(run.optimizer.param_groups[0]),
        device="cpu" if run.device.type == "cpu" else "cuda",
        bucket=run.engine.zero_reduce_bucket_size(),
    )


def _last_steps_were_whole(run: Run) -> bool:
    """Whether the steps whose time `Drift` knows were over whole sequences."""
    points, (done, total) = read_schedule(run.config.compress), schedule_position(run)
    return length_at(points, max(done - SETTLED, 0) / max(total, 1)).is_whole


def run_pace(run: Run, setup: StepSetup) -> Pace | None:
    """Planned time of a step; None where there is none to compare with.

    That is on a CPU, on cards that the planner does not know, with products in fp8, and while
    sequences are shortened.
    """
    if run.device.type != "cuda" or run.config.model.fp8 or not _last_steps_were_whole(run):
        return None
    card = find_card_of_device(torch.cuda.get_device_name(run.device))
    if card is None:
        return None
    per_node = min(ranks.local_world_size(), ranks.world_size())
    return plan_pace(setup, Cluster(card, ranks.world_size(), per_node))
