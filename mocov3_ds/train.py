"""The main job: shards -> views -> queries and keys -> loss -> step -> checkpoint -> k-NN.

    deepspeed mocov3_ds/train.py                                     two minutes, any machine
    deepspeed mocov3_ds/train.py --recipe vit_b16 --data.shards DIR  the paper's run
    torchrun, accelerate launch, srun and plain python start it as well; --help teaches the rest.

The same command again continues where the run folder ends.
"""

import sys
import time
from pathlib import Path

if (
    not __package__
):  # run as a file by a launcher: the repository root, not this folder, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from mocov3_ds.config import Run, parse
from mocov3_ds.data.stream import Batch
from mocov3_ds.distributed import ranks
from mocov3_ds.job import Job, build_job
from mocov3_ds.monitor.report import Report, memory_gib
from mocov3_ds.optim.schedule import encoder_momentum, learning_rate
from mocov3_ds.preemption import Preemption
from mocov3_ds.step import train_step


def train(run: Run) -> None:
    """Run (or continue, or merely confirm as finished) one pretraining run."""
    device = ranks.start()
    job = build_job(run, device)
    report = Report(
        run.config.folder,
        steps_done=job.step,
        total_steps=job.total_steps,
        speaks=ranks.is_first(),
    )
    report.say(job.summary())
    if job.step == 0:
        first_look(job, report)
    last = job.total_steps
    if run.config.stop_after_steps:
        last = min(last, run.config.stop_after_steps)
    preemption = Preemption()
    try:
        while job.step < last:
            one_step(job, report, last)
            asked = preemption.on_any_rank()
            if asked or job.step == last or job.step % run.config.save.every_steps == 0:
                job.save()
            if asked:
                report.say("asked to stop by a signal: the state is saved")
                break
    finally:
        preemption.close()
        report.close()
        job.stream.close()
    if ranks.is_first():
        print(job.what_next())  # noqa: T201


def one_step(job: Job, report: Report, last: int) -> None:
    """Data, schedules, the exact step, and its line in the log."""
    config, started = job.config, time.perf_counter()
    batch = next_batch(job)
    x1_BCHW, x2_BCHW = job.views(batch)
    lr = learning_rate(
        job.step,
        peak=job.peak_rate,
        warmup_steps=job.warmup_steps,
        total_steps=job.total_steps,
    )
    momentum = encoder_momentum(
        job.step,
        start=config.moco.momentum,
        total_steps=job.total_steps,
        cosine=config.moco.momentum_schedule == "cosine",
    )
    job.optimizer.set_lr(lr)
    # stochastic depth draws from the step's own seed, so a resumed run repeats an unbroken one
    torch.manual_seed(hash((config.seed, job.step, ranks.rank())) % 2**63)
    result = train_step(job.engine, job.momentum_encoder, x1_BCHW, x2_BCHW, momentum=momentum)
    job.step += 1
    seconds = time.perf_counter() - started
    row = {
        "step": job.step,
        "epoch": job.step / job.stream.batches_per_epoch,
        "samples": job.step * config.batch,
        "loss": result.loss,
        "chance_loss": job.chance_loss,
        "lr": lr,
        "momentum": momentum,
        "grad_norm": job.optimizer.grad_norm(),
        "applied": result.applied,
        "images_per_s": config.batch / seconds,
        "data_wait_s": batch.wait_s,
        "memory_gib": memory_gib(job.device),
        "skipped_samples": sum(job.stream.skipped.values()),
        **watch(job, batch, result.features_BD, job.step == last),
    }
    report.step(row)
    if "knn_full" in row:
        report.say(f"k-NN after step {job.step}: {row['knn_full']:.2f} %")


def next_batch(job: Job) -> Batch:
    """This rank's part of the next global batch; trouble with the data is this rank's own to say.

    Raises:
        SystemExit: too many unreadable samples, or a store that cannot be read.
    """
    try:
        return next(job.stream)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: rank {ranks.rank()}, step {job.step + 1}: {error}")


def first_look(job: Job, report: Report) -> None:
    """k-NN accuracy of the random initialisation, and of guessing."""
    if job.monitor is None:
        report.say("no labelled probe images (--data.probe_shards), so no k-NN monitor")
        return
    accuracy, chance = job.monitor.full(job.backbone), job.monitor.chance()
    report.values(0, knn_full=accuracy, knn_chance=chance)
    report.say(f"k-NN of the random initialisation: {accuracy:.2f} % (chance {chance:.2f} %)")


def watch(job: Job, batch: Batch, features_BD: torch.Tensor, last: bool) -> dict[str, float]:
    """Feed the k-NN monitor; every few tens of steps, and at the end, ask it."""
    if job.monitor is None:
        return {}
    job.monitor.push(features_BD, batch.labels_B)
    every = job.config.knn.every_steps
    values = {}
    if every and job.step % every == 0:
        values["knn"] = job.monitor.dense(job.backbone)
    if last:
        values["knn_full"] = job.monitor.full(job.backbone)
    return values


def main() -> int:
    """Command line; bad input ends with one sentence and status 2, a diverged run with 3."""
    try:
        train(parse())
    except (ValueError, OSError) as error:
        return _end(2, str(error))
    except FloatingPointError as error:
        return _end(3, str(error))
    except KeyboardInterrupt:
        return _end(130, "interrupted; the same command continues from the newest checkpoint")
    return 0


def _end(status: int, sentence: str) -> int:
    if ranks.is_first():
        print(f"train.py: error: {sentence}", file=sys.stderr)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main())
