"""What a run says of itself at its start and at its end."""

import shlex
from collections.abc import Sequence

import torch

from mocov3_ds.checkpoints.checkpoint import checkpoint_folder
from mocov3_ds.data.views import decode
from mocov3_ds.distributed import ranks
from mocov3_ds.model.backbones import shape_name
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.settings.wording import count_noun
from mocov3_ds.training.run import Run
from mocov3_ds.training.schedule import describe_rules


def describe_start(run: Run) -> str:
    """One paragraph on what is about to run."""
    config, order, world_size = run.config, run.loader.order, ranks.world_size()
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in run.base.parameters())
    return (
        f"run {config.folder}: {shape_name(config.backbone)} "
        f"({weights / 1e6:.1f} M weights with heads), {order.samples} samples, "
        f"global batch {config.batch} on {count_noun(world_size, 'rank')}, "
        f"{order.batches_per_epoch} steps an epoch "
        f"({order.remainder} samples left over each time), "
        f"{type(run.optimizer).__name__} at {describe_rules(config, run.peak_rate)}, "
        f"ZeRO-{run.engine.zero_optimization_stage()}, "
        f"{str(run.dtype).removeprefix('torch.')} on {run.device}, "
        f"{describe_chunks(run.model.chunks)}, views by {decode.describe_decoder()}, "
        f"steps {run.step} to {run.total_steps}{describe_idle_devices(world_size)}"
    )


def describe_idle_devices(world_size: int) -> str:
    """How to use the other GPUs of this machine, where a run of one rank leaves them idle.

    Args:
        world_size: number of ranks of the run.
    """
    devices = torch.cuda.device_count()
    if world_size > 1 or devices < 2:
        return ""
    return (
        f"; {devices - 1} of {devices} GPUs stay idle: deepspeed --module mocov3_ds.train "
        "and the same flags start a rank on each"
    )


def describe_chunks(chunks: Chunks) -> str:
    """How a rank's batch goes through the backbone, in words."""
    if not chunks.size:
        return "each view in one pass"
    return f"chunks of {chunks.size} images ({chunks.keep} kept)"


def describe_end(run: Run, troubles: Sequence[str] = ()) -> str:
    """How far the run came, where things lie and what can be done with them.

    Args:
        run: the run, whose last checkpoint is complete.
        troubles: what is wrong with it, one line each.
    """
    folder, finished = run.config.folder, run.step >= run.total_steps
    state = "finished" if finished else f"stopped at step {run.step} of {run.total_steps}"
    curves = ["mocov3", "report", str(folder)]
    if "tensorboard" in run.config.log:
        curves = ["tensorboard", "--logdir", str(folder / "tensorboard")]
    return "\n".join(
        [
            f"{state}; checkpoint in {checkpoint_folder(folder, run.step)}",
            f"longer:   --extend {shlex.quote(str(folder))} --epochs MORE"
            if finished
            else "resume:   the same command again",
            f"k-NN:     {shlex.join(['mocov3', 'knn', str(folder)])}",
            f"export:   {shlex.join(['mocov3', 'export', str(folder)])}",
            f"curves:   {shlex.join(curves)}   (or read {folder / 'metrics.jsonl'})",
            *(f"warning:  {trouble}" for trouble in troubles),
        ]
    )
