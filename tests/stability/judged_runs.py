"""Judged runs of small series, without files."""

from dataclasses import replace

import numpy as np

from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.same_step import cut_series
from mocov3_ds.stability.study import JudgedRun
from mocov3_ds.stability.verdict import judge
from tests.stability.synthetic import healthy

STEPS = 200
JUDGEMENT = judge(healthy(0, STEPS).series)


def judged_run(
    arm: str, seed: int, knn: float, *, upto: int = STEPS, stopped: bool = False, twin: str = ""
) -> JudgedRun:
    """A run whose accuracy is `knn` from half way on, and half of that before.

    Args:
        arm: label of its arm.
        seed: its seed.
        knn: final accuracy in percent.
        upto: last logged step.
        stopped: whether it stopped there at a value that was not finite.
        twin: arm of its frozen twin.
    """
    series = healthy(seed, STEPS).series
    series = replace(
        series, knn_K=np.where(series.knn_steps_K <= STEPS // 2, knn / 2, knn), knn_chance=10.0
    )
    series = replace(cut_series(series, upto), stopped_non_finite=stopped)
    final = float(series.knn_K[-1])
    cell = Cell(f"{arm}_seed-{seed}", arm, {"seed": seed}, {}, twin and f"{twin}_seed-{seed}")
    return JudgedRun(cell, series, replace(JUDGEMENT, final_knn=final), None)
