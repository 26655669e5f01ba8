"""`mocov3 replay RUN STEP`: run one step of a run again, exactly, and look at each of its stages.

A copy of the run starts from the nearest checkpoint before the step (or from the seed) and trains
up to it with the same samples, views and numbers. It is equal bit for bit on the same number of
ranks where the device reproduces its results (the CPU does), otherwise up to rounding. The copy has
a folder of its own, which is removed at the end. In the run's folder only `trouble/` changes: it
gets the views of the samples that stand out. No other place that the run's settings name is written
to (mirror, cache, swap files): they may be a stranger's.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tyro
from PIL import Image
from torch import Tensor

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.checkpoints.run_paths import anchor_to_run
from mocov3_ds.config.run_config import Config, Settings
from mocov3_ds.config.stored import from_json
from mocov3_ds.data.storage.atomic import replace_when_whole
from mocov3_ds.data.views import layers
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine_keys import drop_idle_keys
from mocov3_ds.faults.bad_step_policy import (
    RECORDS,
    record_path,
    recorded_batch,
    sample_name,
    step_and_position,
)
from mocov3_ds.faults.diagnosis import Diagnosis, diagnose_step
from mocov3_ds.recipes import read_json
from mocov3_ds.training.advance import advance_run
from mocov3_ds.training.build import build_run
from mocov3_ds.training.run import Run

_GRADIENTS = 10  # rows of the table
_GAP = 4  # pixels between the two views of a picture

Picture = npt.NDArray[np.uint8]


def replay_step(folder: Path, step: int) -> list[str]:
    """Run a step again; all ranks must call.

    Args:
        folder: Folder of the run to look at.
        step: Number of the step from 1, as the log counts.

    Returns:
        Lines to print: where it started, a table of the stages, the samples, their pictures.

    Raises:
        ValueError: There is no such run or step, there is no checkpoint from which it can be
            reached, or the run was rewound and went another way.
    """
    device = ranks.start()
    tree = read_json(folder / "config.json")
    start = ranks.run_on_first(partial(nearest_checkpoint, folder, step))
    copy: Path = ranks.run_on_first(partial(_copy_run, folder, step, start))
    try:
        config = anchor_to_run(from_json(tree), folder)
        engine = _engine_of_copy(drop_idle_keys(tree["deepspeed"]), copy)
        run = build_run(Settings(_config_of_copy(config, copy), engine), device)
        try:
            return [f"from {start or 'the seed'}", *_replay_in(run, folder, step)]
        finally:
            run.close()
    finally:
        ranks.barrier()
        if ranks.is_first():
            shutil.rmtree(copy)


def _config_of_copy(config: Config, copy: Path) -> Config:
    return dataclasses.replace(
        config,
        runs=copy.parent,
        name=copy.name,
        data=dataclasses.replace(config.data, cache=""),
        save=dataclasses.replace(config.save, mirror=""),
        knn=dataclasses.replace(config.knn, probes=0),
    )


def _engine_of_copy(engine: Mapping[str, Any], copy: Path) -> dict[str, Any]:
    """Return DeepSpeed's settings in which each place that is written to lies in the copy."""
    copied_engine: dict[str, Any] = deepcopy(dict(engine))
    for kind in ("offload_optimizer", "offload_param"):
        block = copied_engine.get("zero_optimization", {}).get(kind)
        if isinstance(block, dict) and "nvme_path" in block:
            block["nvme_path"] = str(copy / "swap")
    if isinstance(copied_engine.get("flops_profiler"), dict):
        copied_engine["flops_profiler"].pop("output_file", None)
    return copied_engine


class _Start(NamedTuple):
    """A checkpoint that a replay may start from."""

    step: int
    position: int
    """next global batch, from 0"""
    folder: Path


def nearest_checkpoint(folder: Path, step: int) -> Path | None:
    """Find the newest checkpoint from which a step can be reached; None = only from the seed.

    Where the run was rewound, steps of the same number have had several batches. The one that
    counts is the one in the record of the bad step, or else the last.

    Args:
        folder: Folder of the run to look at.
        step: Number of the step from 1, as the log counts.
    """
    linked = (folder / RECORDS).glob("step-*-*[0-9]")
    saved = [*linked, *checkpoint.list_checkpoints(folder)]
    starts = [_Start(*step_and_position(path), path) for path in saved]
    starts = [start for start in starts if start.step < step]
    batch = recorded_batch(record_path(folder, step))
    if batch is not None:
        # from there the step has the batch of the record
        starts = [s for s in starts if s.position + step - 1 - s.step == batch] or starts
    return max(starts, key=lambda start: start[:2]).folder if starts else None


def _copy_run(folder: Path, step: int, start: Path | None) -> Path:
    copy = folder / RECORDS / f"replay-{step}"
    for path in (folder / RECORDS, copy):
        if path.is_symlink():  # what lies behind it is not this run's
            raise ValueError(f"{path} is a link; remove it, or put a folder in its place.")
    shutil.rmtree(copy, ignore_errors=True)
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "config.json", copy)
    if start is not None:
        link = checkpoint.checkpoint_folder(copy, step_and_position(start)[0])
        link.symlink_to(start.resolve(), target_is_directory=True)
    return copy


def _replay_in(run: Run, folder: Path, step: int) -> Iterator[str]:
    if step > run.total_steps:
        raise ValueError(f"{folder} has {run.total_steps} steps, so there is no step {step}.")
    while run.step < step - 1:
        if advance_run(run).result.bad_reason:
            run.count_step()
    _check_batch(run, folder, step)
    dropped = advance_run(run, dropped=True)  # moves the momentum encoder as the step does
    views = dropped.x1_BCHW, dropped.x2_BCHW
    diagnosis = diagnose_step(run, *views, dropped.batch.sample_ids_B)
    yield from stage_table(diagnosis)
    for suspect in diagnosis.suspects:
        reason = "not finite" if suspect.certain else "stands out"
        yield (
            f"sample {suspect.id}, {sample_name(run, suspect.id)} (rank {suspect.rank}, row "
            f"{suspect.row}): {reason}, features' norms {suspect.norms[0]:.4g} "
            f"{suspect.norms[1]:.4g}"
        )
    for path in _write_pictures(run, views, diagnosis, folder / RECORDS, step):
        yield str(path)


def _check_batch(run: Run, folder: Path, step: int) -> None:
    """Check that the step has the global batch that the run met there."""
    record = record_path(folder, step)
    if recorded_batch(record) not in (None, run.position):
        raise ValueError(
            f"{record} is of another global batch than {run.position}, which this step has when it "
            "is reached from there: the run was rewound in between."
        )


def stage_table(diagnosis: Diagnosis) -> list[str]:
    """Return a table of the stages, and of the gradients that are not finite or the largest.

    Args:
        diagnosis: What was measured of the step.
    """
    bad = [g for g in diagnosis.gradients if g.not_finite]
    largest = sorted(diagnosis.gradients, key=lambda gradient: -gradient.largest)
    gradients = (bad or largest)[:_GRADIENTS]
    rows = [
        *diagnosis.stages,
        *(dataclasses.replace(g, name=f"gradient {g.name}") for g in gradients),
    ]
    width = max(len(row.name) for row in rows)
    lines = [f"{'stage':{width}}  {'largest |x|':>12}  {'not finite':>10}"]
    lines += [f"{r.name:{width}}  {r.largest:12.5g}  {r.not_finite:10d}" for r in rows]
    omitted = len(bad or largest) - len(gradients)
    if omitted:
        kind = "not finite" if bad else "smaller"
        lines.append(f"... and {omitted} gradients more, {kind}")
    return lines


def _write_pictures(
    run: Run, views: tuple[Tensor, Tensor], diagnosis: Diagnosis, folder: Path, step: int
) -> list[Path]:
    """Write both views of each suspect side by side, on the rank that has it."""
    mean, std, paths = run.view_spec.mean, run.view_spec.std, []
    for suspect in diagnosis.suspects:
        path = folder / f"step-{step:08d}-sample-{suspect.id}.png"
        paths.append(path)
        if suspect.rank == ranks.rank():
            first, second = (_make_picture(view[suspect.row], mean, std) for view in views)
            gap = np.full((len(first), _GAP, 3), 255, np.uint8)
            picture = Image.fromarray(np.concatenate([first, gap, second], axis=1))
            with replace_when_whole(path) as temporary:
                picture.save(temporary, "PNG")
    return paths


def _make_picture(x_CHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Picture:
    """Return a view as people see it, (H, W, 3) uint8; black where it is not finite."""
    scale, shift = (x_CHW.new_tensor(values)[:, None, None].float() for values in (std, mean))
    pixels = (x_CHW.float() * scale + shift).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * 255
    return np.asarray(layers.as_picture(pixels.round().byte().cpu().numpy()))


def repeat_step(
    run: Annotated[Path, tyro.conf.Positional], step: Annotated[int, tyro.conf.Positional], /
) -> None:
    """Run one step of a run again, exactly, and show each stage of it and the samples to blame.

    For a step that RUN/trouble/step-N.json describes, or any other. The run continues from the
    nearest checkpoint before the step: bit for bit on as many ranks as it had (CPU), e.g.
    `torchrun --nproc-per-node 8 -m mocov3_ds.cli replay RUN STEP`; else up to rounding.

    Args:
        run: run folder; its trouble/ gets the views of the samples as PNG.
        step: number of the step, counted from 1 as in metrics.jsonl.
    """
    for line in replay_step(run, step):
        if ranks.is_first():
            print(line)  # noqa: T201
