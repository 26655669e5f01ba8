"""How a run compares with the plan of it: the line of the log on memory and step time.

The line is a comparison and no part of the training: whatever the planner does not know, such as a
loss or an optimizer of somebody's own, must not end a run.
"""

import logging
from typing import Literal

import torch

from mocov3_ds.config import encoder_shape
from mocov3_ds.distributed import ranks
from mocov3_ds.monitoring.run_log import peak_memory_gib
from mocov3_ds.planning.cards import find_card_of_device
from mocov3_ds.planning.drift import Drift
from mocov3_ds.planning.hardware import Cluster
from mocov3_ds.planning.memory import plan_memory
from mocov3_ds.planning.pace import Pace, plan_pace
from mocov3_ds.planning.step_setup import StepSetup
from mocov3_ds.training.run import Run

_log = logging.getLogger("mocov3_ds")

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
        return drift.describe(plan, peak_memory_gib(run.device), run_pace(run, setup))
    except Exception as error:
        _log.debug("the run and its plan", exc_info=True)
        return f"plan: this run cannot be compared with one ({type(error).__name__}: {error})"


def run_setup(run: Run) -> StepSetup:
    """A step of the run as the planner sees it."""
    return StepSetup(
        shape=encoder_shape(run.config),
        stage=run.engine.zero_optimization_stage(),
        world_size=ranks.world_size(),
        batch=run.config.batch,
        precision=_PRECISIONS[run.dtype],
        chunks=run.model.chunks,
        recompute_blocks=run.config.recompute_blocks,
        key_block=run.model.loss.key_block,
        optimizer=type(run.optimizer),
        bucket=run.engine.zero_reduce_bucket_size(),
    )


def run_pace(run: Run, setup: StepSetup) -> Pace | None:
    """Planned time of a step; None on a CPU and on cards that the planner does not know."""
    if run.device.type != "cuda":
        return None
    card = find_card_of_device(torch.cuda.get_device_name(run.device))
    if card is None:
        return None
    per_node = min(ranks.local_world_size(), ranks.world_size())
    return plan_pace(setup, Cluster(card, ranks.world_size(), per_node))
