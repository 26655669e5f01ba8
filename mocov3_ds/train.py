"""The main job: shards -> views -> queries and keys -> loss -> step -> checkpoint -> k-NN.

    deepspeed mocov3_ds/train.py                                     two minutes, any machine
    deepspeed mocov3_ds/train.py --recipe vit_b16 --data.shards DIR  the paper's run
    torchrun, accelerate launch, srun and plain python start it as well; --help teaches the rest.

The same command again continues where the run folder ends.
"""

import contextlib
import sys
import time
from pathlib import Path

# run as a file by a launcher: the repository root, not this folder, on the path
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mocov3_ds.config import Settings, parse
from mocov3_ds.data.storage import counters
from mocov3_ds.distributed import heartbeat, ranks
from mocov3_ds.faults import bad_step_policy, exit_status
from mocov3_ds.faults.preemption import Preemption
from mocov3_ds.monitoring.profiler import Profile
from mocov3_ds.monitoring.run_log import Report, memory_gib
from mocov3_ds.planning.drift import Drift
from mocov3_ds.training.advance import Advance, advance
from mocov3_ds.training.run import Run, build_job

_COLLECTIVES_S = 7200.0
"""Ranks may wait for one that reads from a store, or fetches a checkpoint; `heartbeat` sees those
that are dead or hang long before."""


def train(settings: Settings) -> None:
    """Run (or continue, or merely confirm as finished) one pretraining run."""
    device = ranks.start(timeout_s=_COLLECTIVES_S)
    heartbeat.start(settings.config.hang_timeout)
    drift = Drift(device)
    job = build_job(settings, device)
    report = Report(
        settings.config.folder,
        steps_done=job.step,
        total_steps=job.total_steps,
        speaks=ranks.is_first(),
    )
    report.say(job.summary())
    if job.step == 0:
        first_look(job, report)
        if settings.config.trouble.policy == "rewind":
            job.save()  # there is always something to return to
    last = job.total_steps
    if settings.config.stop_after_steps:
        last = min(last, settings.config.stop_after_steps)
    try:
        steps(job, report, drift, last)
    except BaseException:
        job.abandon()
        raise
    heartbeat.at(job.step, "close")
    job.close()
    heartbeat.stop()
    if ranks.is_first():
        print(job.what_next())  # noqa: T201
    if job.step < last and settings.config.stopped_status:
        sys.exit(settings.config.stopped_status)


def steps(job: Run, report: Report, drift: Drift, last: int) -> None:
    """All steps up to `last`, with their checkpoints; ends early where a signal asks for it."""
    config, device = job.config, job.device
    with contextlib.ExitStack() as closing:
        closing.callback(report.close)
        profile = Profile(config.folder, config.profile, device, report.say)
        closing.callback(profile.close)
        preemption = Preemption()
        closing.callback(preemption.close)
        while job.step < last:
            with profile.step():
                one_step(job, report, last)
            asked = preemption.on_any_rank()
            ends = asked or job.step == last
            if drift.due(ends):
                report.say(drift.line(job.plan(), memory_gib(device), job.pace()))
            if ends or job.step % config.save.every_steps == 0:
                heartbeat.at(job.step, "save")
                job.save(last=ends)
            if asked:
                report.say("asked to stop by a signal: the state is saved")
                break


def one_step(job: Run, report: Report, last: int) -> None:
    """The exact step, what is seen of it, and its line in the log."""
    started = time.perf_counter()
    taken = advance(job)
    if taken.result.trouble and not bad_step_policy.answer(job, report, taken):
        return  # rewound: the steps since the checkpoint come again, with other batches
    seconds = time.perf_counter() - started
    heartbeat.at(job.step, "look")
    row = {
        "step": job.step,
        "epoch": job.step / job.stream.batches_per_epoch,
        "samples": job.step * job.config.batch,
        **taken.measured(),
        "chance_loss": job.chance_loss,
        "images_per_s": job.config.batch / seconds,
        "save_s": job.stall_s(),
        "memory_gib": memory_gib(job.device),
        "stand_ins": taken.batch.stand_ins,
        **counters.since_last_asked(),
        **watch(job, taken, job.step == last),
    }
    if taken.result.applied:  # else they are those of the step before
        row["grad_norm"] = job.optimizer.grad_norm()
    if not taken.result.trouble:
        row |= job.watch.record(job, taken.batch, taken.x1_BCHW, row)
    heartbeat.at(job.step, "log")
    report.step(row)
    if "knn_full" in row:
        report.say(f"k-NN after step {job.step}: {row['knn_full']:.2f} %")


def first_look(job: Run, report: Report) -> None:
    """k-NN accuracy of the random initialisation, and of guessing."""
    if job.monitor is None:
        report.say("no labelled probe images (--data.probe_shards), so no k-NN monitor")
        return
    accuracy, chance = job.monitor.full(job.backbone), job.monitor.chance()
    report.values(0, knn_full=accuracy, knn_chance=chance, knn_probes=job.monitor.probes())
    report.say(f"k-NN of the random initialisation: {accuracy:.2f} % (chance {chance:.2f} %)")


def watch(job: Run, taken: Advance, last: bool) -> dict[str, float]:
    """Feed the k-NN monitor; every few tens of steps, and at the end, ask it."""
    if job.monitor is None:
        return {}
    if not taken.result.trouble:
        features_BD, momentum_BD = taken.result.features_BD, job.momentum_encoder.features_BD
        job.monitor.push(features_BD, taken.batch.labels_B, momentum_BD)
    every = job.config.knn.every_steps
    values = {}
    if every and job.step % every == 0:
        values["knn"] = job.monitor.dense(job.backbone)
        if job.config.knn.momentum_encoder:
            values["knn_momentum"] = job.monitor.dense_momentum(job.momentum_encoder.backbone)
    if last:
        values["knn_full"] = job.monitor.full(job.backbone)
    return values


def main() -> int:
    """Command line; what goes wrong ends with one sentence and a status, see `exit_status.end`."""
    try:
        train(parse())
    except BaseException as error:
        return exit_status.end(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
