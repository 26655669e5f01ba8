"""Does a long run keep its memory, open files and threads over a hundred thousand tiny steps?

    python -m mocov3_ds.bench soak --steps 100000

It is the real command (`train.py` in a separate process: drawn sample images, loader, views,
engine, LAMB under ZeRO-1, momentum encoder, log, k-NN, checkpoints), at the smallest shape that
still has every component. It is observed from outside, so that observing changes nothing in it:
every `--every` steps one row of resident set, open files and threads of the process. The slope is
that of a line through the rows after the first tenth. A run that `--minutes` ends early is asked to
stop by SIGTERM, as Slurm does it, and the table says how far it came.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

MIB_PER_100K = 32.0
"""Growth of the resident set that still counts as flat: some 300 bytes a step."""
_BATCH, _IMAGES = 8, 4096  # images of a step; sample images that training draws
_POLL_S = 0.1

_SHAPE = [
    *("--recipe", "tiny", "--batch", str(_BATCH), "--views.image_size", "16"),
    *("--model.patch_size", "8", "--model.dim", "16", "--model.depth", "1", "--model.heads", "2"),
    *("--model.hidden", "16", "--model.out", "8", "--data.threads", "1", "--data.pool", "512"),
    *("--warmup_epochs", "0", "--knn.bank", "128", "--knn.probes", "64"),
    *("--ds", "optimizer.type=Lamb"),
]


@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    """Observe memory, open files and threads of a long run of tiny steps."""

    steps: int = 100_000
    """number of optimizer steps"""
    every: int = 1000
    """steps between rows of the table; checkpoints and k-NN come as often"""
    minutes: float = 0.0
    """end earlier, after this many minutes; 0 = when the steps are done"""
    folder: Path | None = None
    """new folder for the run; empty = a temporary one"""


@dataclass(frozen=True)
class Row:
    """What the process holds after a step."""

    step: int
    seconds: float
    """since the start"""
    rss_mib: float
    files: int
    threads: int


@dataclass(frozen=True)
class Growth:
    """How much grew over the rows."""

    mib_per_100k: float
    """slope of the resident set, MiB in 100,000 steps"""
    more_files: int
    """fewest open files in the last quarter less fewest in the first"""
    more_threads: int
    """the same of threads"""

    @property
    def is_flat(self) -> bool:
        """Whether nothing grew."""
        return self.mib_per_100k <= MIB_PER_100K and self.more_files <= 0 and self.more_threads <= 0

    def __str__(self) -> str:
        answer = "flat" if self.is_flat else "NOT flat"
        return (
            f"{answer}: resident set {self.mib_per_100k:+.1f} MiB in 100,000 steps "
            f"(up to {MIB_PER_100K:g} is flat), open files {self.more_files:+d}, "
            f"threads {self.more_threads:+d}"
        )


def measure_growth(rows: Sequence[Row]) -> Growth:
    """Growth over the rows after the first tenth, in which caches fill.

    A checkpoint that is being written has a file and a thread open, so counts are compared by their
    smallest value.

    Raises:
        ValueError: fewer than four rows remain.
    """
    settled = rows[max(1, len(rows) // 10) :]
    if len(settled) < 4:
        raise ValueError(f"{len(rows)} rows are too few to judge; take more --steps.")
    steps, sizes = (np.array([getattr(r, k) for r in settled]) for k in ("step", "rss_mib"))
    slope = float(np.polyfit(steps - steps[0], sizes, 1)[0])
    quarter = max(1, len(settled) // 4)
    first, last = settled[:quarter], settled[-quarter:]
    return Growth(
        mib_per_100k=slope * 100_000,
        more_files=min(r.files for r in last) - min(r.files for r in first),
        more_threads=min(r.threads for r in last) - min(r.threads for r in first),
    )


def run_training(options: SoakOptions, runs: Path) -> Iterator[Row]:
    """Start the run in `runs` and yield its rows.

    Raises:
        ValueError: the run ended with an error, or the folder holds a run already.
    """
    metrics = runs / "soak" / "metrics.jsonl"
    if metrics.exists():
        raise ValueError(f"{runs} holds a soak run already; give --folder another one.")
    every = str(options.every)
    command = [
        *(sys.executable, str(Path(__file__).parents[1] / "train.py"), *_SHAPE),
        *("--runs", str(runs), "--name", "soak"),
        *("--epochs", str(options.steps * _BATCH / _IMAGES)),
        *("--save.every_steps", every, "--knn.every_steps", every),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / "soak.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield from _observe_process(process, metrics, options)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            status = process.wait()
    if status:
        ending = (runs / "soak.log").read_text(errors="replace").strip().splitlines()[-3:]
        raise ValueError(f"the run ended with status {status}: {' '.join(ending)}")


def _observe_process(
    process: "subprocess.Popen[bytes]", metrics: Path, options: SoakOptions
) -> Iterator[Row]:
    start, observed = time.monotonic(), psutil.Process(process.pid)
    step, due, offset = -1, options.every, 0  # the file's first line is step 0
    while process.poll() is None:
        time.sleep(_POLL_S)
        if metrics.exists():
            with metrics.open("rb") as file:
                file.seek(offset)
                lines = file.read()
            offset += len(lines)
            step += lines.count(b"\n")
        seconds = time.monotonic() - start
        if step >= due:
            try:
                row = _read_row(observed, step, seconds)
            except psutil.Error:  # it has just ended
                return
            due = step - step % options.every + options.every
            yield row
        if options.minutes and seconds > 60 * options.minutes:
            return


def _read_row(process: psutil.Process, step: int, seconds: float) -> Row:
    with process.oneshot():
        mib = process.memory_info().rss / 2**20
        return Row(step, seconds, mib, process.num_fds(), process.num_threads())


def run_bench(options: SoakOptions) -> None:
    """Print the table and whether the run stays flat.

    Raises:
        ValueError: the run failed, or something grew.
    """
    rows: list[Row] = []
    with TemporaryDirectory() as temporary:
        print(
            "| step | steps/s | resident set, MiB | open files | threads |\n|---|---|---|---|---|"
        )
        for row in run_training(options, options.folder or Path(temporary)):
            previous = rows[-1] if rows else Row(0, 0.0, 0.0, 0, 0)
            speed = (row.step - previous.step) / (row.seconds - previous.seconds)
            print(
                f"| {row.step} | {speed:.1f} | {row.rss_mib:.1f} | {row.files} | {row.threads} |",
                flush=True,
            )
            rows.append(row)
    growth = measure_growth(rows)
    minutes = rows[-1].seconds / 60
    print(f"\n{rows[-1].step} of {options.steps} steps in {minutes:.1f} min. {growth}")
    if not growth.is_flat:
        raise ValueError("the run does not stay flat; the table shows from which step on.")
