"""What a run shows while it goes: a progress bar, `metrics.jsonl`, TensorBoard files.

One JSON line a step, written on rank 0 only. A resumed run first drops the lines of steps that it
will do again, so the file reads like that of an unbroken run.
"""

import contextlib
import json
import resource
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mocov3_ds.data.storage.atomic import Appender


class Report:
    """Speaks for the run on the first rank; on the others each call does nothing.

    Args:
        folder: run folder; `metrics.jsonl` and `tensorboard/` go there.
        steps_done: optimizer steps of earlier sittings.
        total_steps: length of the whole run.
        speaks: True on the first rank.
    """

    def __init__(self, folder: Path, *, steps_done: int, total_steps: int, speaks: bool) -> None:
        self.speaks = speaks
        self._shown: dict[str, str] = {}
        if not speaks:
            return
        self._path, self._curves = folder / "metrics.jsonl", str(folder / "tensorboard")
        keep_rows_until(self._path, steps_done or -1)  # afresh: row 0 comes again, too
        self._rows = Appender(self._path)
        self._board: SummaryWriter | None = SummaryWriter(self._curves, purge_step=steps_done + 1)
        self._bar = tqdm(
            total=total_steps, initial=steps_done, unit="step", dynamic_ncols=True, mininterval=0.5
        )

    def step(self, row: dict[str, Any]) -> None:
        """Log one step; `row["step"]` counts the optimizer steps done, from 1."""
        if not self.speaks:
            return
        self._write(row)
        shown = {"loss": "loss", "lr": "lr", "momentum": "m", "images_per_s": "img/s", "knn": "knn"}
        for key, name in shown.items():
            if row.get(key) is not None:
                self._shown[name] = f"{row[key]:.4g}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(1)

    def values(self, step: int, **values: float) -> None:
        """Log values that belong to no training step, such as an accuracy before the first."""
        if self.speaks:
            self._write({"step": step, **values})

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`: they will be done again, otherwise."""
        if not self.speaks:
            return
        self._rows.close()
        keep_rows_until(self._path, step)
        self._rows = Appender(self._path)
        self._close_board()
        self._board = SummaryWriter(self._curves, purge_step=step + 1)
        self._bar.n = step
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.speaks:
            self._bar.write(text)

    def _write(self, row: dict[str, Any]) -> None:
        self._rows.append((json.dumps(row) + "\n").encode())
        if self._board is None:
            return
        try:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, row["step"])
        except OSError as error:  # its thread has ended, and it writes no more
            self._board = None
            self.say(f"no more curves for TensorBoard until the next start: {error.strerror}")

    def close(self) -> None:
        """Finish the bar and the files."""
        if self.speaks:
            self._bar.close()
            self._rows.close()
            self._close_board()

    def _close_board(self) -> None:
        if self._board is not None:
            with contextlib.suppress(OSError):  # a full disk; the rows say all that it would
                self._board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; one that a kill cut short or a disk damaged is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows after `step`."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(path)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the accelerator where there is one, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
