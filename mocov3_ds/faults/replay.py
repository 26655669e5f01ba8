"""`mocov3 replay RUN STEP`: run one step of a run again, exactly, and look at each of its stages.

A copy of the run, in a folder of its own that is removed at the end, starts from the nearest
checkpoint before the step (or from the seed) and lives up to it: the same samples, views and
numbers; bit for bit on the same number of ranks where the device reproduces (the CPU does), else up
to rounding. Nothing in the run's folder changes but `trouble/`, which gets the views of the samples
that stand out.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.config import Settings, from_json, read_json
from mocov3_ds.distributed import ranks
from mocov3_ds.faults import bad_step_policy
from mocov3_ds.faults.diagnosis import Diagnosis, examine
from mocov3_ds.training.advance import advance
from mocov3_ds.training.run import Run, build_job

_GRADIENTS = 10  # that are shown
_GAP = 4  # pixels between the two views of a picture


def replay(folder: Path, step: int) -> list[str]:
    """Run a step again; all ranks must call.

    Args:
        folder: of the run.
        step: from 1, as the log counts.

    Returns:
        lines to print: where it started, a table of the stages, the samples, their pictures.

    Raises:
        ValueError: there is no such run or step, no checkpoint from which it can be reached, or
            the run went another way since.
    """
    device = ranks.start()
    tree = read_json(folder / "config.json")
    start = ranks.first_does(partial(nearest, folder, step))
    copy: Path = ranks.first_does(partial(_copy, folder, step, start))
    config = from_json(tree)
    config = dataclasses.replace(
        config,
        runs=copy.parent,
        name=copy.name,
        save=dataclasses.replace(config.save, mirror=""),
        knn=dataclasses.replace(config.knn, probes=0),
    )
    try:
        job = build_job(Settings(config, tree["deepspeed"]), device)
        try:
            return [f"from {start or 'the seed'}", *_of_step(job, folder, step)]
        finally:
            job.close()
    finally:
        ranks.barrier()
        if ranks.is_first():
            shutil.rmtree(copy)


def nearest(folder: Path, step: int) -> Path | None:
    """The newest checkpoint from which a step can be reached; None = only from the seed.

    Where the run was rewound, a step of the same number has had several batches: it is the one that
    the record of the trouble tells of, or else the last.
    """
    kept = (folder / bad_step_policy.FOLDER).glob("step-*-*[0-9]")
    found = [
        (path, *bad_step_policy.place_of(path)) for path in (*kept, *checkpoint.folders(folder))
    ]
    before = [each for each in found if each[1] < step]
    batch = bad_step_policy.batch_of(bad_step_policy.record_of(folder, step))
    if batch is not None:
        before = [each for each in before if each[2] + step - 1 - each[1] == batch] or before
    return max(before, key=lambda each: each[1:])[0] if before else None


def _copy(folder: Path, step: int, start: Path | None) -> Path:
    copy = folder / bad_step_policy.FOLDER / f"replay-{step}"
    shutil.rmtree(copy, ignore_errors=True)
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "config.json", copy)
    if start is not None:
        link = copy / "checkpoints" / f"step-{bad_step_policy.place_of(start)[0]:08d}"
        link.symlink_to(start.resolve(), target_is_directory=True)
    return copy


def _of_step(job: Run, folder: Path, step: int) -> Iterator[str]:
    if step > job.total_steps:
        raise ValueError(f"{folder} has {job.total_steps} steps, so there is no step {step}.")
    while job.step < step - 1:
        taken = advance(job)
        if taken.result.trouble:
            job.count_step()
    _check_batch(job, folder, step)
    taken = advance(job, dropped=True)  # for its move of the momentum encoder
    found = examine(job, taken.x1_BCHW, taken.x2_BCHW, taken.batch.ids_B)
    yield from table(found)
    for suspect in found.suspects:
        why = "not finite" if suspect.certain else "stands out"
        yield (
            f"sample {suspect.id}, {bad_step_policy.name_of(job, suspect.id)} (rank {suspect.rank}, "
            f"row {suspect.row}): {why}, features' norms {suspect.norms[0]:.4g} {suspect.norms[1]:.4g}"
        )
    for path in _pictures(
        job, (taken.x1_BCHW, taken.x2_BCHW), found, folder / bad_step_policy.FOLDER, step
    ):
        yield str(path)


def _check_batch(job: Run, folder: Path, step: int) -> None:
    """Whether this is the batch that the run met there."""
    record = bad_step_policy.record_of(folder, step)
    if bad_step_policy.batch_of(record) not in (None, job.position):
        raise ValueError(
            f"{record} is of another global batch than {job.position}, which this step has when it "
            "is reached from there: the run was rewound in between."
        )


def table(found: Diagnosis) -> list[str]:
    """Stages in order, then the gradients that are not finite, or the largest ones."""
    bad = [g for g in found.gradients if g.not_finite]
    largest = sorted(found.gradients, key=lambda gradient: -gradient.largest)
    shown = (bad or largest)[:_GRADIENTS]
    rows = [*found.stages, *(dataclasses.replace(g, name=f"gradient {g.name}") for g in shown)]
    width = max(len(row.name) for row in rows)
    lines = [f"{'stage':{width}}  {'largest |x|':>12}  {'not finite':>10}"]
    lines += [f"{r.name:{width}}  {r.largest:12.5g}  {r.not_finite:10d}" for r in rows]
    left = len(bad or largest) - len(shown)
    if left:
        kind = "not finite" if bad else "smaller"
        lines.append(f"... and {left} gradients more, {kind}")
    return lines


def _pictures(
    job: Run, views: tuple[Tensor, Tensor], found: Diagnosis, folder: Path, step: int
) -> list[Path]:
    """Both views of each suspect side by side, written by the rank that holds it."""
    paths = []
    for suspect in found.suspects:
        path = folder / f"step-{step:08d}-sample-{suspect.id}.png"
        paths.append(path)
        if suspect.rank == ranks.rank():
            both = [_picture(view[suspect.row], job.spec.mean, job.spec.std) for view in views]
            gap = np.full((both[0].shape[0], _GAP, 3), 255, np.uint8)
            Image.fromarray(np.concatenate([both[0], gap, both[1]], axis=1)).save(path)
    return paths


def _picture(x_CHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """A view as people see it; black where it is not finite."""
    scale, shift = (x_CHW.new_tensor(each)[:, None, None].float() for each in (std, mean))
    pixels = (x_CHW.float() * scale + shift).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * 255
    picture: np.ndarray = pixels.round().byte().permute(1, 2, 0).cpu().numpy()
    return picture
