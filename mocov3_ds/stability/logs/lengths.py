"""How long was a run of another program to be, and has it come to its end?"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mocov3_ds.monitoring.run_facts import flatten_facts
from mocov3_ds.stability.findings import Series
from mocov3_ds.stability.same_step import last_step
from mocov3_ds.stability.trailing import row_spacing

STEP_SETTINGS = ("total_steps", "max_steps", "num_steps", "steps", "max_iters", "total_iters")
"""settings beside a log that tell a run's steps, the surest first"""
EPOCH_SETTINGS = ("total_epochs", "num_train_epochs", "max_epochs", "num_epochs", "epochs")
"""those that tell its epochs"""


def find_length(facts: Mapping[str, Any], unit: str, epochs_per_step: float) -> tuple[int, str]:
    """Planned steps of a run by the settings beside its log, and the setting; 0 where none tells.

    Args:
        facts: settings as they were read, objects within among them.
        unit: what the log's steps count: "step", "epoch" or "row".
        epochs_per_step: epochs that a step goes on; NaN if unknown.
    """
    settings = flatten_facts({"config": facts})
    if unit == "step":
        steps, name = _find_setting(settings, STEP_SETTINGS)
        if steps:
            return round(steps), name
        epochs, name = _find_setting(settings, EPOCH_SETTINGS)
        if epochs and epochs_per_step > 0:
            return round(epochs / epochs_per_step), name
    if unit == "epoch":
        epochs, name = _find_setting(settings, EPOCH_SETTINGS)
        return round(epochs), name
    return 0, ""


def _find_setting(settings: Mapping[str, Any], names: tuple[str, ...]) -> tuple[float, str]:
    """The surest setting above 0; 0 where there is none, or two of one name differ."""
    for name in names:
        values = {
            float(value)
            for key, value in settings.items()
            if key.rpartition(".")[2] == name
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and 0 < value < 1 << 53
        }
        if values:
            return (values.pop(), name) if len(values) == 1 else (0.0, "")
    return 0.0, ""


def has_come_to(series: Series, steps: int) -> bool:
    """Whether the last row of anything is within one logging interval of so many steps."""
    spacings = [
        row_spacing(steps_M) for steps_M in (series.steps_T, series.knn_steps_K) if len(steps_M) > 1
    ]
    return last_step(series) + min(spacings, default=0) >= steps


def total_of_ended(series: Series) -> int:
    """`Series.total_steps` of a run that has ended: the step of its last loss.

    An evaluation may follow that loss before the next one is due. Where losses end long before the
    evaluations, the run is as long as these.
    """
    last_loss = int(series.steps_T[-1]) if len(series.steps_T) else 0
    widest = max(row_spacing(series.steps_T), row_spacing(series.knn_steps_K))
    end = last_step(series)
    return max(1, last_loss if end - last_loss <= widest else end)


def total_of(series: Series, planned: int) -> tuple[int, bool]:
    """`Series.total_steps` of a run, and whether it has come to its end.

    Args:
        series: what the run logged so far.
        planned: steps that it was to make; 0 = unknown, so that it ends where its log does.
    """
    is_ended = has_come_to(series, planned or last_step(series))
    return (total_of_ended(series) if is_ended else planned), is_ended


def is_below_its_end(series: Series, planned: int) -> bool:
    """Whether a length that a setting tells cannot be the run's: it has made more steps."""
    return bool(np.any(series.steps_T > planned) or np.any(series.knn_steps_K > planned))
