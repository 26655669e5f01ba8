"""A step that was dropped: look at it, write it down, and go on as the user wants.

    RUN/trouble/step-00001234.json       what was found, and the samples of the step
    RUN/trouble/step-00001234-1240.json  the same of an earlier time, where the run was rewound and
                                         met the step again; it had global batch 1240 then
    RUN/trouble/step-00001200-1206/      the checkpoint before it, whose next global batch is 1206,
                                         kept from pruning for `replay`

`--trouble.policy stop` ends the run; `skip` goes on with the next batch, the weights as before;
`rewind` returns to the newest checkpoint and goes on behind the bad batch, so that the batches in
between teach nothing either. Where finite views lead from the same checkpoint to a bad step once
more, that was not as good as it looked, and the run returns to the one before it. A run in which
that happens oftener than `--trouble.limit` ends.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.data.fetch import key_of
from mocov3_ds.data.storage import atomic
from mocov3_ds.distributed import heartbeat, ranks
from mocov3_ds.faults.diagnosis import Diagnosis, examine
from mocov3_ds.monitoring.run_log import Report
from mocov3_ds.training.advance import Advance
from mocov3_ds.training.run import Run

FOLDER = "trouble"


def answer(job: Run, report: Report, taken: Advance) -> bool:
    """Deal with the step that was just dropped; all ranks must call.

    Returns:
        True where the step counts as done without its update, False where the run was rewound.

    Raises:
        FloatingPointError: the run is to end.
    """
    heartbeat.at(job.step + 1, "look")
    found = examine(job, taken.x1_BCHW, taken.x2_BCHW, taken.batch.ids_B)
    job.saver.wait()
    step, policy, reason = job.step + 1, job.config.trouble.policy, taken.result.trouble
    path: Path = ranks.first_does(lambda: _write_down(job, step, reason, found))
    sentence = f"step {step}: {reason}; {_summary(job, found)}. {path} tells more"
    look = f"mocov3 replay {job.config.folder} {step} looks at it again"
    if policy == "stop":
        raise FloatingPointError(
            f"{sentence}, {look}, --trouble.policy skip (or rewind) goes on without that batch."
        )
    first = job.position
    if policy == "rewind":
        saved = _last_good(job, found)
        first = saved.position
    job.guard.failed(first, job.position)
    if job.guard.exhausted:
        raise FloatingPointError(
            f"{sentence}, {look}. That was bad step {job.guard.count} of this run, more than "
            f"--trouble.limit {job.guard.config.limit}."
        )
    count = f"bad step {job.guard.count} of at most {job.guard.config.limit}"
    if policy == "skip":
        report.say(f"{sentence}; skipped ({count})")
        job.count_step()
        return True
    report.say(
        f"{sentence}; back to step {saved.step}, going on behind global batch {job.position} "
        f"({count})"
    )
    if not found.of_the_input:
        job.guard.returned_to = saved.step
    ranks.first_does(lambda: checkpoint.drop_after(job.config.folder, saved.step))
    job.return_to(saved)
    report.rewind(job.step)
    return False


def _last_good(job: Run, found: Diagnosis) -> Checkpoint:
    """The newest checkpoint, or the one before it where the run has come back from it already."""
    newest = checkpoint.newest_of_all_ranks(job.config.folder)
    assert newest is not None, "a run that may rewind saves before its first step"
    if newest.step != job.guard.returned_to or found.of_the_input:
        return newest
    return checkpoint.newest_of_all_ranks(job.config.folder, newest.step) or newest


def _summary(job: Run, found: Diagnosis) -> str:
    """The first thing that is not finite, and the samples to look at."""
    first = found.first
    if first is None:
        what = "all stages are finite"
    else:
        where = f" on rank {', '.join(map(str, first.ranks))}" if first.ranks else ""
        kind = "the gradient of " if first in found.gradients else ""
        what = f"the first that is not finite: {kind}{first.name}{where}"
    named = [name_of(job, suspect.id) for suspect in found.suspects[:3]]
    more = f" and {len(found.suspects) - 3} more" if len(found.suspects) > 3 else ""
    certain = any(suspect.certain for suspect in found.suspects)
    which = "bad samples" if certain else "samples whose features stand out"
    return f"{what}; {which}: {', '.join(named)}{more}"


def name_of(job: Run, sample: int) -> str:
    """Key and shard of a sample, for people who look for it."""
    shard, key = key_of(job.manifest, sample)
    return f"{key} in {shard}"


def _write_down(job: Run, step: int, reason: str, found: Diagnosis) -> Path:
    folder = job.config.folder / FOLDER
    folder.mkdir(exist_ok=True)
    newest = checkpoint.folders(job.config.folder)[-1:]
    content: dict[str, Any] = {
        "step": step,
        "batch": job.position,
        "reason": reason,
        "policy": job.config.trouble.policy,
        "world_size": ranks.world_size(),
        "checkpoint": newest[0].name if newest else None,
        "first": None if found.first is None else found.first.name,
        **found.as_json(),
    }
    for suspect in content["suspects"]:
        suspect["shard"], suspect["key"] = key_of(job.manifest, suspect["id"])
    path = record_of(job.config.folder, step)
    before = batch_of(path)
    if before not in (None, job.position):
        path.replace(path.with_stem(f"{path.stem}-{before}"))
    atomic.write_text(path, json.dumps(content, indent=1))
    if newest:
        _keep(newest[0], folder / f"{newest[0].name}-{place_of(newest[0])[1]}")
    return path


def record_of(run: Path, step: int) -> Path:
    """The file on the last time that a step was bad."""
    return run / FOLDER / f"step-{step:08d}.json"


def batch_of(record: Path) -> int | None:
    """Global batch that a record of trouble is about; None where there is none."""
    return int(json.loads(record.read_text())["batch"]) if record.exists() else None


def place_of(saved: Path) -> tuple[int, int]:
    """Steps done and next global batch of a checkpoint, or of one that is kept for `replay`."""
    step, _, position = saved.name.removeprefix("step-").partition("-")
    if not position:
        with contextlib.suppress(OSError, ValueError):  # damaged: whoever reads it says so
            position = checkpoint.read_state(saved).get("position", "")
    return int(step), int(position or step)


def _keep(source: Path, target: Path) -> None:
    """Hard links to a checkpoint's files: they cost nothing until the original is pruned."""
    aside = target.with_name(target.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):  # a file system without them: `replay` says what it lacks
        aside.mkdir()
        for file in source.iterdir():
            os.link(file, aside / file.name)
        shutil.rmtree(target, ignore_errors=True)
        aside.replace(target)
