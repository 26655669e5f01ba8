"""A step that was dropped: look at it, write it down, and go on as the user wants.

    RUN/trouble/step-00001234.json       what was found, and the samples of the step
    RUN/trouble/step-00001234-1240.json  the same of an earlier time: the run was rewound and met
                                         the step again; it had global batch 1240 before
    RUN/trouble/step-00001200-1206/      the checkpoint before it, whose next global batch is 1206;
                                         it stays for `replay` when the run removes old ones

`--trouble.policy stop` ends the run; `skip` goes on with the next batch, the weights as before;
`rewind` returns to the newest checkpoint and goes on after the bad batch, so that the batches in
between teach nothing either. If the same checkpoint leads to a bad step once more although all
views are finite, the checkpoint itself is doubted, and the run returns to the one before it. A run
with more bad steps than `--trouble.limit` ends.
"""

import contextlib
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.checkpoints.checkpoint_writer import remove_checkpoints_after
from mocov3_ds.data.fetch import locate_sample
from mocov3_ds.data.storage import atomic
from mocov3_ds.distributed import heartbeat, ranks
from mocov3_ds.faults.diagnosis import Diagnosis, diagnose_step
from mocov3_ds.monitoring.run_log import RunLog
from mocov3_ds.training.advance import AdvancedStep
from mocov3_ds.training.run import Run

RECORDS = "trouble"
"""folder within the run folder"""

_NAMED_SAMPLES = 3


def handle_bad_step(run: Run, log: RunLog, bad_step: AdvancedStep) -> bool:
    """Deal with the step that was just dropped; all ranks must call.

    Args:
        run: The run, at the step before the bad one.
        log: Where the user is told.
        bad_step: What the step was made of, and why it was dropped.

    Returns:
        True where the step counts as done without its update, False where the run was rewound.

    Raises:
        FloatingPointError: The run must end.
    """
    step, policy, reason = run.step + 1, run.config.trouble.policy, bad_step.result.bad_reason
    heartbeat.enter_stage(step, "look")
    diagnosis = diagnose_step(run, bad_step.x1_BCHW, bad_step.x2_BCHW, bad_step.batch.sample_ids_B)
    run.saver.wait()
    path: Path = ranks.run_on_first(lambda: _write_record(run, step, reason, diagnosis))
    sentence = f"step {step}: {reason}; {_summarise(run, diagnosis)}. {path} tells more"
    replay = shlex.join(["mocov3", "replay", str(run.config.folder), str(step)])
    hint = f"{replay} looks at it again"
    if policy == "stop":
        raise FloatingPointError(
            f"{sentence}, {hint}, --trouble.policy skip (or rewind) goes on without that batch."
        )
    saved = _choose_checkpoint(run, diagnosis) if policy == "rewind" else None
    limits = run.limits
    limits.note_bad_step(run.position if saved is None else saved.position, run.position)
    if limits.exhausted:
        raise FloatingPointError(
            f"{sentence}, {hint}. That was bad step {limits.count} of this run, more than "
            f"--trouble.limit {limits.config.limit}."
        )
    count = f"bad step {limits.count} of at most {limits.config.limit}"
    if saved is None:
        log.print_line(f"{sentence}; skipped ({count})")
        run.count_step()
        return True
    log.print_line(
        f"{sentence}; back to step {saved.step}, going on behind global batch {run.position} "
        f"({count})"
    )
    if not diagnosis.is_of_the_input:
        limits.returned_to = saved.step
    _rewind(run, log, saved)
    return False


def _rewind(run: Run, log: RunLog, saved: Checkpoint) -> None:
    ranks.run_on_first(lambda: remove_checkpoints_after(run.config.folder, saved.step))
    if ranks.is_first():
        heartbeat.note_saved(saved.folder.name)
    run.rewind_to(saved)
    log.drop_steps_after(run.step)


def _choose_checkpoint(run: Run, diagnosis: Diagnosis) -> Checkpoint:
    """Return the newest checkpoint; the one before it if the run has come back from it already."""
    newest = checkpoint.find_newest_on_all_ranks(run.config.folder)
    assert newest is not None, "a run that may rewind saves before its first step"
    if newest.step != run.limits.returned_to or diagnosis.is_of_the_input:
        return newest
    return checkpoint.find_newest_on_all_ranks(run.config.folder, newest.step) or newest


def _summarise(run: Run, diagnosis: Diagnosis) -> str:
    """Name the first thing that is not finite, and the samples to look at."""
    first, suspects = diagnosis.first, diagnosis.suspects
    if first is None:
        finding = "all stages are finite"
    else:
        where = f" on rank {', '.join(map(str, first.ranks))}" if first.ranks else ""
        kind = "the gradient of " if first in diagnosis.gradients else ""
        finding = f"the first that is not finite: {kind}{first.name}{where}"
    named = ", ".join(sample_name(run, suspect.id) for suspect in suspects[:_NAMED_SAMPLES])
    unnamed = len(suspects) - _NAMED_SAMPLES
    certain = any(suspect.certain for suspect in suspects)
    samples = "bad samples" if certain else "samples whose features stand out"
    return f"{finding}; {samples}: {named}" + (f" and {unnamed} more" if unnamed > 0 else "")


def sample_name(run: Run, sample_id: int) -> str:
    """Return key and shard of a sample, for people who look for it.

    Args:
        run: The run, for its training shards.
        sample_id: Number of the sample in the manifest.
    """
    shard, key = locate_sample(run.manifest, sample_id)
    return f"{key} in {shard}"


# ---------------------------------------------------------------------------------------- records


def record_path(run_folder: Path, step: int) -> Path:
    """Return the path of the record of the last time that a step was bad.

    Args:
        run_folder: Folder of the run, which need not exist.
        step: Number of the step, from 1.
    """
    return run_folder / RECORDS / f"step-{step:08d}.json"


def recorded_batch(record: Path) -> int | None:
    """Return the global batch that a record is about, from 0; None where there is no record.

    Args:
        record: Path of the record, see `record_path`.
    """
    return int(json.loads(record.read_text())["batch"]) if record.exists() else None


def step_and_position(saved: Path) -> tuple[int, int]:
    """Return the steps done and the next global batch of a checkpoint.

    Args:
        saved: Folder of a checkpoint in `checkpoints`, or of one that stays for `replay`.
    """
    step, _, position = saved.name.removeprefix("step-").partition("-")
    if not position:
        with contextlib.suppress(OSError, ValueError):  # a damaged one is found when it is read
            position = checkpoint.read_state(saved).get("position", "")
    return int(step), int(position or step)


def _write_record(run: Run, step: int, reason: str, diagnosis: Diagnosis) -> Path:
    folder = run.config.folder / RECORDS
    folder.mkdir(exist_ok=True)
    newest = checkpoint.list_checkpoints(run.config.folder)[-1:]
    content: dict[str, Any] = {
        "step": step,
        "batch": run.position,
        "reason": reason,
        "policy": run.config.trouble.policy,
        "world_size": ranks.world_size(),
        "checkpoint": newest[0].name if newest else None,
        "first": None if diagnosis.first is None else diagnosis.first.name,
        **diagnosis.as_json(),
    }
    for suspect in content["suspects"]:
        suspect["shard"], suspect["key"] = locate_sample(run.manifest, suspect["id"])
    path = record_path(run.config.folder, step)
    earlier_batch = recorded_batch(path)
    if earlier_batch not in (None, run.position):
        path.replace(path.with_stem(f"{path.stem}-{earlier_batch}"))
    atomic.write_text(path, json.dumps(content, indent=1))
    if newest:
        _, position = step_and_position(newest[0])
        _link_checkpoint(newest[0], folder / f"{newest[0].name}-{position}")
    return path


def _link_checkpoint(source: Path, target: Path) -> None:
    """Make hard links to a checkpoint's files: they cost nothing until the original is removed."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(OSError):  # a file system without links: `replay` says what it lacks
        temporary.mkdir()
        for file in source.iterdir():
            os.link(file, temporary / file.name)
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
