"""Train a Vision Transformer: shards -> views -> queries, keys -> loss -> step -> checkpoint, k-NN.

    deepspeed mocov3_ds/train.py                                     two minutes, any machine
    deepspeed mocov3_ds/train.py --recipe vit_b16 --data.shards DIR  the paper's run
    torchrun, accelerate launch, srun and plain python start it as well; --help lists all flags.

The same command again continues where the run folder ends.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

# run as a file by a launcher: the repository root, not this folder, on the path
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# first: it notes the launchers above this rank, before torch, which takes seconds, is imported
import mocov3_ds.distributed.processes  # noqa: F401

# isort: split
from mocov3_ds.checkpoints import run_status
from mocov3_ds.checkpoints.checkpoint import checkpoint_folder
from mocov3_ds.config.run_config import Settings
from mocov3_ds.data.storage import counters
from mocov3_ds.distributed import heartbeat, ranks, zero
from mocov3_ds.faults import bad_step_policy, exit_status
from mocov3_ds.faults.preemption import Preemption, Stop, repeated_signals_ignored
from mocov3_ds.model.loss import PairLoss
from mocov3_ds.monitoring.background_sink import leave_hanging_sinks
from mocov3_ds.monitoring.profiler import Profile
from mocov3_ds.monitoring.run_log import RunLog, peak_memory
from mocov3_ds.monitoring.trackers import check_loggers, sink_openers
from mocov3_ds.monitoring.view_sheet import draw_view_sheet
from mocov3_ds.planning.drift import Drift
from mocov3_ds.recipes import parse
from mocov3_ds.settings.environment import check_environment
from mocov3_ds.training.advance import AdvancedStep, advance_run
from mocov3_ds.training.build import build_run
from mocov3_ds.training.planned import drift_line
from mocov3_ds.training.run import Run
from mocov3_ds.training.run_text import describe_end, describe_start

_COLLECTIVES_S = 7200.0
"""seconds that ranks may wait for one that reads from a store or fetches a checkpoint; `heartbeat`
sees those that are dead or hang long before"""

_HASTY_CLOSE_S = 5.0
"""seconds that loggers have to finish where a run has failed or was asked to stop"""
_SHORTEST_WITH_PAGE = 50
"""steps of a run that has a page at its end; `mocov3 report` makes one of any run"""


StepWatcher = Callable[[Run, Mapping[str, Any]], object]
"""is called after each step with the run and the step's row of the log, on all ranks"""


def train(
    settings: Settings, loss: PairLoss | None = None, *, on_step: StepWatcher | None = None
) -> Run:
    """Start a pretraining run, continue it, or confirm that it is finished; returns it closed.

    Args:
        settings: resolved command line of the run.
        loss: loss to train with; None = the paper's at `--moco.temperature`.
        on_step: what is called after each step; None = nothing.

    Raises:
        SystemExit: a signal has ended the run early, and its checkpoint is written.
    """
    config, device = settings.config, ranks.start(_COLLECTIVES_S, settings.config.device)
    heartbeat.start(config.hang_timeout)
    with contextlib.closing(Preemption(config.stopped_status)) as preemption:
        drift = Drift(device)
        if ranks.is_first():
            check_loggers(config.log)
        run = build_run(settings, device, loss)
        log = start_log(run)
        last = min(run.total_steps, config.stop_after_steps or run.total_steps)
        try:
            if run.step == run.start.step:
                evaluate_start(run, log)
                if config.trouble.policy == "rewind" or run.start.parent is not None:
                    run.save_checkpoint()  # there is always something to return to
            stop = train_until(last, run, log, drift, preemption, on_step)
        except BaseException:
            run.abandon()
            log.close(_HASTY_CLOSE_S)
            tell_end(log.describe_troubles())
            raise
        heartbeat.enter_stage(run.step, "close")
        run.close()
    heartbeat.stop()
    finish_log(run, log, in_haste=stop is not None)
    if ranks.is_first():
        tell_end([describe_end(run, log.describe_troubles())])
    if stop is not None and run.step < last:
        saved = checkpoint_folder(config.folder, run.step).name
        sys.exit(exit_status.report_stop(stop, config.stopped_status, saved))
    return run


def start_log(run: Run) -> RunLog:
    """The log of a run that begins or goes on; what it says first."""
    folder, is_first = run.config.folder, ranks.is_first()
    if is_first:
        heartbeat.note_saved(checkpoint_folder(folder, run.step).name if run.step else "")
        if run.step < run.total_steps:
            run_status.clear_finished(folder)
    heartbeat.explain_data(lambda: run.loader.describe_work())  # a rewound run has another loader
    log = RunLog(
        folder,
        steps_done=run.step,
        total_steps=run.total_steps,
        speaks=is_first,
        begins_at=run.start.step,
        sinks=sink_openers(run.config.log) if run.step < run.total_steps else {},
        device=run.device,
    )
    log.print_line(describe_start(run))
    if run.start.line:
        log.print_line(run.start.line)
    return log


def finish_log(run: Run, log: RunLog, *, in_haste: bool) -> None:
    """Write the page of a run that has come to its end, and let its loggers finish."""
    if not ranks.is_first():
        return
    is_news = run.step == run.total_steps and run.step >= log.first_step
    if is_news and run.total_steps - run.start.step >= _SHORTEST_WITH_PAGE:
        from mocov3_ds.stability.run_page import write_in_time  # matplotlib takes a while

        for name, picture in write_in_time(run.config.folder).items():
            log.show_picture(run.step, name, picture.copy)
    log.close(*[_HASTY_CLOSE_S] * in_haste)


def tell_end(lines: list[str]) -> None:
    """Print the last lines of a run, if there is still somebody to read them."""
    with contextlib.suppress(OSError):  # the terminal may have gone with the launcher
        for line in lines:
            print(line, flush=True)  # noqa: T201


def train_until(
    last: int,
    run: Run,
    log: RunLog,
    drift: Drift,
    preemption: Preemption,
    on_step: StepWatcher | None,
) -> Stop | None:
    """All steps up to `last`, with their checkpoints; why it ended early, where it did."""
    config, stop = run.config, None
    with contextlib.ExitStack() as closing:
        profile = Profile(config.folder, config.profile, run.device, log.print_line)
        closing.callback(profile.close)
        preemption.enter_loop()
        while run.step < last and stop is None:
            with profile.step():
                row = train_one_step(last, run, log)
            drift.record_step()
            if on_step is not None and row is not None:
                on_step(run, row)
            stop = preemption.find_stop()
            ends = stop is not None or run.step == last
            if drift.is_due(ends):
                log.tell_plan(drift_line(drift, run))
            if ends or run.step % config.save.every_steps == 0:
                heartbeat.enter_stage(run.step, "save")
                log.sync()
                run.save_checkpoint(last=ends)
        if stop is not None:
            saved = checkpoint_folder(config.folder, run.step)
            log.print_line(f"{stop.sentence.rstrip('.')}: checkpoint {saved} is complete")
    return stop


def train_one_step(last: int, run: Run, log: RunLog) -> dict[str, Any] | None:
    """The exact step, what is measured of it, and its line in the log; None where it is undone."""
    started, cpu_started = time.perf_counter(), time.process_time()
    step = advance_run(run)
    bad = bool(step.result.bad_reason)
    if bad and not bad_step_policy.handle_bad_step(run, log, step):
        return None  # rewound: the steps since the checkpoint come again, with other batches
    seconds = time.perf_counter() - started - step.look_s
    cpu_seconds = time.process_time() - cpu_started - step.look_cpu_s
    heartbeat.enter_stage(run.step, "look")
    row: dict[str, Any] = {
        "step": run.step,
        "epoch": run.step / run.loader.order.batches_per_epoch,
        "samples": run.step * run.config.batch,
        **step.measured_values(),
        "chance_loss": run.chance_loss,
        "images_per_s": run.config.batch / seconds,
        "cpu_s": cpu_seconds,
        "save_s": run.take_save_seconds(),
        **peak_memory(run.device),
        "stand_ins": step.batch.stand_ins,
        **step_scale(run),
        **counters.take_counts(),
    }
    if not bad:
        update_knn_monitor(run, step)
    row |= measure_knn(run, last=run.step == last)
    if step.result.applied:  # else it would be that of the step before
        row["grad_norm"] = run.optimizer.grad_norm()
        if run.optimizer.clipper is not None:
            row |= run.optimizer.clipper.last_values()
    if run.step == log.first_step:
        log.show_picture(
            run.step,
            "train/views",
            partial(
                draw_view_sheet, step.x1_BCHW, step.x2_BCHW, run.view_spec.mean, run.view_spec.std
            ),
        )
    if not bad:
        row |= run.recorder.record(
            run.step,
            row,
            sample_ids_B=step.batch.sample_ids_B,
            x1_BCHW=step.x1_BCHW,
            pair=step.result.pair,
            backbone=run.base.backbone,
        )
    heartbeat.enter_stage(run.step, "log")
    log.log_step(row, {} if bad else run.recorder.layer_values)
    if "knn_full" in row:
        log.print_line(f"k-NN after step {run.step}: {row['knn_full']:.2f} %")
    return row


def step_scale(run: Run) -> dict[str, float]:
    """Loss scale after the step, of fp16 alone."""
    scale = zero.read_loss_scale(run.engine)
    return {"loss_scale": scale["cur_scale"]} if scale else {}


def evaluate_start(run: Run, log: RunLog) -> None:
    """Log the k-NN accuracy of what the run begins with, and of guessing."""
    monitor = run.knn_monitor
    if monitor is None:
        log.print_line("no labelled probe images (--data.probe_shards), so no k-NN monitor")
        return
    accuracy, chance = monitor.full_accuracy(run.base.backbone), monitor.chance_accuracy()
    counts = {"knn_chance": chance, "knn_probes": monitor.count_probes()}
    log.log_values(run.step, knn_full=accuracy, **counts)
    beginning = "weights it begins with" if run.start.ancestry else "random initialisation"
    log.print_line(f"k-NN of the {beginning}: {accuracy:.2f} % (chance {chance:.2f} %)")


def update_knn_monitor(run: Run, step: AdvancedStep) -> None:
    """Give the k-NN monitor the step's features of view 1, by both encoders."""
    if run.knn_monitor is not None:
        result = step.result
        run.knn_monitor.push_features(
            result.features_BD, step.batch.labels_B, result.momentum_features_BD
        )


def measure_knn(run: Run, *, last: bool) -> dict[str, float]:
    """k-NN accuracies that are due after this step, every few tens of steps and at the end."""
    monitor, every = run.knn_monitor, run.config.knn.every_steps
    if monitor is None:
        return {}
    values = {}
    if every and run.step % every == 0:
        values["knn"] = monitor.dense_accuracy(run.base.backbone)
        if run.config.knn.momentum_encoder:
            values["knn_momentum"] = monitor.dense_momentum_accuracy(run.momentum_encoder.backbone)
    if last:
        values["knn_full"] = monitor.full_accuracy(run.base.backbone)
    return values


def main() -> int:
    """Command line; a failure ends with one sentence and a status, see `faults.exit_status`."""
    try:
        check_environment()
        train(parse())
        status = 0
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            leave_hanging_sinks(error.code)
        with repeated_signals_ignored():
            status = exit_status.report_failure(error)
    leave_hanging_sinks(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
