"""What do the arms of a grid cost? Accuracy against CPU seconds, and what it takes to be as good.

    python -m mocov3_ds.bench cost runs/stability/grid-tiny --reference off
    python -m mocov3_ds.bench cost runs/stability/grid-tiny --picture cost.png

Read from the runs of `mocov3 stability run`. CPU seconds are those of all steps (`cpu_s`), without
evaluation and start. The last two columns say when a run's k-NN curve first reaches what the
reference's curve has at its end, at the same seed: straight lines lie between evaluations, a run
that is there at its first one counts with that, and one that never is does not count.

Shape suffix: K = evaluations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
import numpy.typing as npt
import tyro
from matplotlib.figure import Figure

from mocov3_ds.monitoring.metrics_file import read_rows
from mocov3_ds.settings.spelling import did_you_mean
from mocov3_ds.stability import drawing
from mocov3_ds.stability.cells import list_cells, read_grid_json, read_outcome

Costs = Mapping[str, Mapping[int, "RunCost"]]
"""label of an arm -> seed -> its run"""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """Accuracy of a grid's arms against what they cost."""

    grid: tyro.conf.Positional[Path]
    """folder of a grid, which `mocov3 stability run` made"""
    reference: str = ""
    """label of the arm that the others are held against; empty = the first one"""
    picture: Path | None = None
    """PNG file that gets the curves"""


@dataclass(frozen=True, eq=False)
class RunCost:
    """What a run took, and how its accuracy grew.

    Attributes:
        steps: optimizer steps.
        cpu_s: CPU seconds of these.
        accuracy: k-NN accuracy after the last step by a bank of its own, percent.
        cpu_s_K: CPU seconds until each evaluation on the way.
        knn_K: its k-NN accuracy, percent.
    """

    steps: int
    cpu_s: float
    accuracy: float
    cpu_s_K: Array
    knn_K: Array


def run_bench(options: CostOptions) -> None:
    """Print a row an arm, and draw the curves.

    Raises:
        ValueError: no run has ended, or there is no such arm.
    """
    costs = read_costs(options.grid)
    reference = options.reference or next(iter(costs))
    if reference not in costs:
        hint = did_you_mean(reference, [*costs])
        raise ValueError(f"--reference {reference}: no such arm{hint}; there are {[*costs]}.")
    print("| arm | seeds | steps | CPU s | share | k-NN, % (least to largest) ", end="")
    print(f"| CPU s to {reference}'s end | share |\n|{'---|' * 8}")
    print("\n".join(describe_arms(costs, reference)))
    if options.picture is not None:
        drawing.write_png(options.picture, drawing.as_png(draw_costs(costs)))


def read_costs(grid: Path) -> Costs:
    """The runs of a grid that have ended.

    Args:
        grid: folder of the grid.

    Raises:
        ValueError: it holds no grid, or none has ended.
    """
    costs: dict[str, dict[int, RunCost]] = {}
    for cell in list_cells(read_grid_json(grid)):
        outcome = read_outcome(grid, cell.name)
        if outcome is not None and outcome.status == "done":
            run = read_cost(grid / "cells" / cell.name / "metrics.jsonl")
            costs.setdefault(cell.label, {})[cell.seed] = run
    if not costs:
        raise ValueError(f"no run of {grid} has ended yet.")
    return costs


def read_cost(metrics: Path) -> RunCost:
    """What a run took; a step that was made again after a resume counts once.

    Args:
        metrics: the run's `metrics.jsonl`, to its last step.

    Raises:
        ValueError: it lacks CPU seconds or an evaluation at its end.
    """
    by_step = {row["step"]: row for row in read_rows(metrics) if "lr" in row}
    rows = [by_step[step] for step in sorted(by_step)]
    if not rows or "knn_full" not in rows[-1] or any("cpu_s" not in row for row in rows):
        raise ValueError(
            f"{metrics} has no k-NN accuracy after its last step, or no cpu_s; the grid's runs "
            "need probe images (--probes)."
        )
    cpu_s = np.cumsum([row["cpu_s"] for row in rows])
    evaluated = [index for index, row in enumerate(rows) if "knn" in row]
    return RunCost(
        steps=rows[-1]["step"],
        cpu_s=float(cpu_s[-1]),
        accuracy=float(rows[-1]["knn_full"]),
        cpu_s_K=cpu_s[evaluated],
        knn_K=np.array([rows[index]["knn"] for index in evaluated], float),
    )


def cpu_s_to_reach(run: RunCost, accuracy: float) -> float | None:
    """CPU seconds until a run's curve is at an accuracy in percent; None if it never is."""
    reached = np.flatnonzero(run.knn_K >= accuracy)
    if not len(reached):
        return None
    first = int(reached[0])
    if not first:
        return float(run.cpu_s_K[0])
    segment = slice(first - 1, first + 1)
    return float(np.interp(accuracy, run.knn_K[segment], run.cpu_s_K[segment]))


def describe_arms(costs: Costs, reference: str) -> list[str]:
    """A row of the table for each arm.

    Args:
        costs: runs that have ended.
        reference: label of the arm that the others are held against.
    """
    basis = costs[reference]
    lines = []
    for label, runs in costs.items():
        seeds = [seed for seed in runs if seed in basis]
        accuracies = [run.accuracy for run in runs.values()]
        span = f"{fmean(accuracies):.1f}"
        if len(accuracies) > 1:
            span += f" ({min(accuracies):.1f} to {max(accuracies):.1f})"
        cpu_s = fmean(run.cpu_s for run in runs.values())
        share = _describe_share([(runs[seed].cpu_s, basis[seed].cpu_s) for seed in seeds])
        reached = {
            seed: cpu_s_to_reach(runs[seed], float(basis[seed].knn_K[-1]))
            for seed in seeds
            if len(basis[seed].knn_K)
        }
        ways = {seed: value for seed, value in reached.items() if value is not None}
        cells = [label, str(len(runs)), f"{fmean(run.steps for run in runs.values()):.0f}"]
        cells += [f"{cpu_s:.0f}", share, span]
        cells.append(f"{fmean(ways.values()):.0f}" if ways else "never")
        if len(ways) < len(reached) and ways:
            cells[-1] += f" ({len(ways)} of {len(reached)} seeds)"
        cells.append(_describe_share([(value, basis[s].cpu_s) for s, value in ways.items()]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _describe_share(pairs: Sequence[tuple[float, float]]) -> str:
    """Mean share over the seeds, percent."""
    return f"{100 * fmean(spent / basis for spent, basis in pairs):.0f} %" if pairs else "-"


def draw_costs(costs: Costs) -> Figure:
    """k-NN accuracy on the way against CPU seconds: bold the mean of an arm's seeds, thin each.

    Diamonds are the ends, by a bank of the network's own features, which is the better one.
    """
    colours = drawing.assign_colours(costs)
    with matplotlib.rc_context(drawing.STYLE):
        figure = Figure((drawing.WIDTH, 3.2), layout="constrained")
        axes = figure.subplots()
        for label, runs in costs.items():
            curves = [run for run in runs.values() if len(run.knn_K)]
            for run in curves:
                axes.plot(run.cpu_s_K, run.knn_K, color=colours[label], lw=0.4, alpha=0.4)
            count = min((len(run.knn_K) for run in curves), default=0)
            if count:
                cpu_s_K, knn_K = (
                    np.mean([curve[:count] for curve in values], axis=0)
                    for values in ([r.cpu_s_K for r in curves], [r.knn_K for r in curves])
                )
                name = drawing.plain_text(label, 48)
                axes.plot(cpu_s_K, knn_K, "o-", ms=2.5, color=colours[label], lw=1.4, label=name)
            cpu_s = np.mean([run.cpu_s for run in runs.values()])
            accuracy = np.mean([run.accuracy for run in runs.values()])
            axes.plot(cpu_s, accuracy, "D", ms=6, color=colours[label], markeredgecolor="white")
        axes.set_xlabel("CPU seconds of steps; diamonds: after the last one")
        axes.set_ylabel("k-NN accuracy, %")
        drawing.legend_below(figure, axes)
    return figure
