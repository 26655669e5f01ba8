"""What does the page of a large study cost: `mocov3 stability report` over many long runs?

    python -m mocov3_ds.bench report --runs 100 --steps 100000

Runs are written without any training, in arms of ten seeds: the log's rows and the signals of a
small ViT, with bursts of gradients and a dip in each. A few are written and the others linked to
them, so the disk holds those few; each folder is read as one of its own. Times are CPU seconds of
this process, all threads together.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mocov3_ds.bench.resource_use import peak_resident_bytes, used_cpu_seconds
from mocov3_ds.model.layer_groups import group_names
from mocov3_ds.monitoring.signal_file import SignalFile
from mocov3_ds.recipes import parse
from mocov3_ds.stability import ordinary_runs, study
from mocov3_ds.stability.findings import Array, Steps
from mocov3_ds.stability.kept_memory import freed_memory_at_hand
from mocov3_ds.stability.study_page import write_study
from mocov3_ds.stability.verdict import judge

_SEEDS = 10  # runs of an arm
_STEPS_PER_EPOCH = 312
_EVALUATE_EVERY = 200
_DEPTH = 4  # blocks of the network
_LINKED = ("metrics.jsonl", "signals.f32", "signals.json")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Cost of a page over many runs."""

    runs: int = 100
    """number of run folders"""
    steps: int = 100_000
    """logged steps of each"""
    written: int = 4
    """different logs; the other runs share them"""


def write_runs(folder: Path, options: ReportOptions) -> list[Path]:
    """Run folders in arms of ten seeds, each with a log of its own or a link to one.

    Args:
        folder: folder of the runs; it must not exist.
        options: how many, and how long.
    """
    folders: list[Path] = []
    for index in range(options.runs):
        arm, seed = divmod(index, _SEEDS)
        run = folder / f"rate_{arm}_seed_{seed}"
        run.mkdir(parents=True)
        epochs = options.steps / _STEPS_PER_EPOCH
        flags = (
            f"--model.depth {_DEPTH} --ds optimizer.params.lr={1e-4 * (1 + arm):.1e} --seed {seed}"
        )
        tree = {**parse([*flags.split(), "--epochs", f"{epochs}"]).as_json(), "version": "0"}
        (run / "config.json").write_text(json.dumps(tree))
        if index < options.written:
            write_log(run, options.steps, index)
        else:
            for name in _LINKED:
                os.link(folders[index % options.written] / name, run / name)
        folders.append(run)
    return folders


def write_log(run: Path, steps: int, seed: int) -> None:
    """`metrics.jsonl` and the signals of a run with five bursts and a dip.

    Args:
        run: folder that is made for the run.
        steps: logged steps.
        seed: of the noise.
    """
    random = np.random.default_rng(seed)
    t_T = np.arange(1, steps + 1)
    size_T = np.ones(steps)
    for peak in random.integers(steps // 5, steps, 5):
        size_T += 12 * np.exp(-np.abs(t_T - peak) / 3)
    loss_T = (3 + 3 * np.exp(-5 * t_T / steps)) * (1 + 0.002 * random.standard_normal(steps))
    loss_T *= 1 + 0.02 * (size_T - 1)
    knn_T = 60 - 40 * np.exp(-8 * t_T / steps) + 0.3 * random.standard_normal(steps)
    knn_T[steps // 2 : steps // 2 + steps // 20] -= 8
    lr_T = 1e-4 * (1 - t_T / (2 * steps))
    _write_signals(run, {"step": t_T, "loss": loss_T, "lr": lr_T}, size_T, random)
    with (run / "metrics.jsonl").open("w") as file:
        beginning = {"step": 0, "knn_full": 12.0, "knn_chance": 10.0, "knn_probes": 5000}
        file.write(json.dumps(beginning) + "\n")
        for step, loss, knn in zip(t_T.tolist(), loss_T.tolist(), knn_T.tolist(), strict=True):
            row = {
                "step": step,
                "epoch": step / _STEPS_PER_EPOCH,
                "samples": step * 4096,
                "loss": loss,
                "lr": float(lr_T[step - 1]),
                "momentum": 0.99 + 0.01 * step / steps,
                "applied": True,
                "data_wait_s": 1.5e-4 + 1e-7 * knn,
                "chance_loss": 6.654,
                "images_per_s": 3000.0 + knn,
                "cpu_s": 1.3 + 1e-3 * knn,
                "save_s": 0.0,
                "memory_gib": 31.25,
                "memory_reserved_gib": 40.125,
                "stand_ins": 0,
                "grad_norm": 0.1 * loss,
            }
            if step % _EVALUATE_EVERY == 0:
                row |= {"knn": knn, "knn_momentum": knn + 0.5}
            file.write(json.dumps(row) + "\n")


def _write_signals(
    run: Path, scalars: Mapping[str, Array | Steps], size_T: Array, random: np.random.Generator
) -> None:
    """All signals of each layer group: noise around a level, the gradients and RMS with bursts."""
    groups = group_names(_DEPTH)
    file = SignalFile(run, groups, steps_done=0)
    columns = file.columns
    file.close()
    values_TC = np.exp(0.1 * random.standard_normal((len(size_T), len(columns)), np.float32))
    for index, name in enumerate(columns):
        if name.endswith(("/grad_linf", "/grad_l2", "/rms", "/rms_before")):
            values_TC[:, index] *= 0.1 * size_T
    for name, values_T in scalars.items():
        values_TC[:, columns.index(name)] = values_T
    values_TC.astype("<f4").tofile(run / "signals.f32")


@contextmanager
def _timed(what: str, share: int) -> Iterator[None]:
    """Print a line with the CPU seconds of a block."""
    cpu, wall = used_cpu_seconds(), time.perf_counter()
    yield
    cpu, wall = used_cpu_seconds() - cpu, time.perf_counter() - wall
    print(f"| {what} | {cpu:.2f} | {cpu / share:.3f} | {wall:.1f} |", flush=True)


def run_bench(options: ReportOptions) -> None:
    """Print the table for BENCHMARKS.md."""
    if min(options.runs, options.steps, options.written) < 1 or options.steps < 1000:
        raise ValueError("--runs and --written must be at least 1, --steps at least 1000.")
    with tempfile.TemporaryDirectory() as temporary:
        folders = write_runs(Path(temporary) / "runs", options)
        print("| what | CPU s | CPU s a run | s |")
        print("|---|---|---|---|")
        with freed_memory_at_hand():  # as the page does
            with _timed("read one run", 1):
                logged = study.read_logged(folders[0])
            assert logged is not None
            with _timed("judge one run", 1):
                judge(logged.series)
            with _timed("read and judge all", options.runs):
                ordinary_runs.read_ordinary_runs(folders)
        with _timed("the whole page", options.runs):
            write_study(folders, Path(temporary) / "page")
    print(f"\nmost memory {peak_resident_bytes() / 2**30:.2f} GiB")
