"""What a run shows while it goes: a progress bar, `metrics.jsonl`, TensorBoard files.

One JSON line a step, written on rank 0 only. A resumed run first drops the lines of steps that it
will do again, so the file reads like that of an unbroken run.
"""

import json
import resource
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


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
        self._path = folder / "metrics.jsonl"
        keep_rows_until(self._path, steps_done)
        self._rows = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)
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

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.speaks:
            self._bar.write(text)

    def _write(self, row: dict[str, Any]) -> None:
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Finish the bar and the files."""
        if self.speaks:
            self._bar.close()
            self._rows.close()
            self._board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows after `step` (all of them for a run that starts afresh)."""
    rows = [row for row in read_rows(path) if row["step"] <= step] if step > 0 else []
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(path)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the accelerator where there is one, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
