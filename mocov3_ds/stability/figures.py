"""Which pictures show a study? One function a picture; None where the runs give nothing to draw.

Shape suffixes: T = steps logged, G = layer groups, K = k-NN evaluations, W = steps around an event,
E = events.
"""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mocov3_ds.monitoring.alarms import RMS_HIGH
from mocov3_ds.stability import drawing
from mocov3_ds.stability.alarm_quality import alarm_flags
from mocov3_ds.stability.events import LOSS_WINDOW
from mocov3_ds.stability.findings import Array, Series, Steps
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.layer_order import describe_lead, pool_leads
from mocov3_ds.stability.run_curves import heat_of_gradients, shorten_curve
from mocov3_ds.stability.study import Arms, JudgedRun
from mocov3_ds.stability.trailing import (
    is_measured,
    row_spacing,
    trailing_ratio,
    window_length,
)

PANELS = 8
"""most panels of a picture"""
ALARM = "rms_rise"
"""the rule whose alarms are drawn: the one that predicted every event it was tried on"""
_BEFORE, _AFTER = 40, 20  # rows around an event, at least
_ASIDE = 10  # rows beyond the longest lead
_LEAST_SPAN = 1.0  # points of an accuracy axis
_LONGEST_NAME, _LONGEST_LABEL = 26, 60  # letters of a layer's name, and of a curve's
_SHORT_NAME = 20  # letters of a name, of which two fit side by side into a panel
_HEAT_COLUMNS = 620
_LONG = 5000  # steps from which on curves and heat maps are reduced before they are drawn


def draw_knn(arms: Arms) -> Figure | None:
    """k-NN accuracy of each seed, its dips shaded."""
    curves = {label: [r for r in runs if len(r.series.knn_K)] for label, runs in arms.items()}
    curves = {label: runs for label, runs in curves.items() if runs}
    if not curves:
        return None
    colours = drawing.assign_colours(arms)
    figure, panels = drawing.stack_panels(len(curves), "k-NN accuracy, %", share_y=True)
    for axes, (label, runs) in zip(panels, curves.items(), strict=True):
        for index, run in enumerate(runs):
            steps_K, knn_K = run.series.knn_steps_K, run.series.knn_K
            axes.plot(steps_K, knn_K, color=colours[label], alpha=_opacity(index))
            for dip in run.judgement.dips:
                axes.axvspan(dip.first, dip.last, color=drawing.SHADE, alpha=0.16, lw=0)
        drawing.set_title(
            axes, f"{label}: {_list_counts([len(r.judgement.dips) for r in runs], 'dip')}"
        )
    return figure


def draw_losses(arms: Arms) -> Figure | None:
    """How far the loss is above its trailing median; plain jumps are marked."""
    curves = {
        arm: runs
        for arm, runs in arms.items()
        if any(run.series.has_loss and len(run.series.loss_T) for run in runs)
    }
    if not curves:
        return None
    colours = drawing.assign_colours(arms)
    figure, panels = drawing.stack_panels(len(curves), "loss above its median, %", share_y=True)
    top = 1.0
    for axes, (label, runs) in zip(panels, curves.items(), strict=True):
        jumps = [run.jumps for run in runs]
        for index, run in enumerate(runs):
            excess_T = run.loss_excess
            rows = np.isfinite(excess_T)
            steps_C, _, _, high_C = shorten_curve(run.series.steps_T[rows], excess_T[rows])
            axes.plot(steps_C, high_C, color=colours[label], alpha=_opacity(index), lw=0.9)
            top = max(top, float(np.max(high_C, initial=1.0)))
            for jump in jumps[index]:
                axes.plot(jump.peak, 100 * jump.excess, ".", color=drawing.SHADE, ms=5, zorder=3)
        drawing.set_title(
            axes, f"{label}: {_list_counts([len(events) for events in jumps], 'jump')}"
        )
    for axes in panels:
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_ylim(-0.5, top * 1.3)
        axes.set_yticks([v for v in (0, 1, 3, 10, 30, 100, 300, 1000) if v <= top * 1.3])
        axes.set_yticklabels([f"{v:g}" for v in axes.get_yticks()])
    return figure


def draw_heat_map(arms: Arms) -> Figure | None:
    """log10 of each group's largest gradient over its trailing median, layer by step.

    Of each arm the run with the most gradient events. Columns hold the largest value of their
    steps, so that no spike is lost.
    """
    runs = {a: _most_eventful(arm) for a, arm in arms.items()}
    runs = {a: run for a, run in runs.items() if np.isfinite(run.series.grad_linf_GT).any()}
    if not runs:
        return None
    groups = max(len(run.series.groups) for run in runs.values())
    figure, panels = drawing.stack_panels(len(runs), "", height=0.5 + 0.13 * groups, grid=False)
    for axes, (label, run) in zip(panels, runs.items(), strict=True):
        series = run.series
        names, heat_GT = _gradient_heat(series)
        image = axes.imshow(
            _reduce_columns(heat_GT),
            aspect="auto",
            cmap=matplotlib.colormaps["OrRd"].with_extremes(bad="#eceff1"),
            vmin=0,
            vmax=1.5,
            extent=(int(series.steps_T[0]), int(series.steps_T[-1]), len(heat_GT) - 0.5, -0.5),
            interpolation="nearest",
        )
        axes.set_yticks(*group_ticks(names), fontsize=7)
        drawing.set_title(axes, f"{label} (seed {run.cell.seed})")
    panels[-1].set_xlim(0, max(int(run.series.steps_T[-1]) for run in runs.values()))
    bar = figure.colorbar(image, ax=panels, orientation="horizontal", aspect=40, pad=0.01)
    bar.set_ticks([0, 0.5, 1, 1.5], labels=["1x", "3x", "10x", "32x or more"])
    bar.set_label("largest gradient over its trailing median (grey: not measured)", fontsize=8)
    return figure


def _gradient_heat(series: Series) -> tuple[Sequence[str], Array]:
    """Groups, and log10 of each one's gradient over its usual one; of a long run in columns."""
    if len(series.steps_T) > _LONG:
        return heat_of_gradients(series.groups, series.grad_linf_GT, _HEAT_COLUMNS)
    window = window_length(len(series.steps_T), LOSS_WINDOW)
    ratio_GT = np.stack([trailing_ratio(row_T, window) for row_T in series.grad_linf_GT])
    with np.errstate(divide="ignore"):
        heat_GT: Array = np.log10(ratio_GT)
    return series.groups, heat_GT


def draw_events(arms: Arms) -> Figure | None:
    """Gradients of first and last group around the events; step 0 is where one begins."""
    traces: dict[str, list[tuple[Array, Array]]] = {}
    span = _span_of_leads([run for runs in arms.values() for run in runs])
    for label, runs in arms.items():
        arm_traces = [trace for run in runs for trace in _traces_of_events(run, span)]
        if arm_traces:
            traces[label] = arm_traces
    if not traces:
        return None
    x = "steps from the start of an event"
    figure, panels = drawing.stack_panels(len(traces), "gradient over its median", x=x)
    for axes, (label, arm_traces) in zip(panels, traces.items(), strict=True):
        leads = [run.judgement.lead for run in arms[label] if run.judgement.lead is not None]
        names = (leads[0].first_group, leads[0].last_group)
        for name, colour, trace_EW in zip(
            names, drawing.COLOURS, map(np.stack, zip(*arm_traces, strict=True)), strict=False
        ):
            steps_W = np.arange(-span[0], span[1] + 1)
            name = drawing.plain_text(name, _LONGEST_NAME)
            _draw_quartiles(axes, steps_W, trace_EW, name, colour)
        axes.axvline(0, color=drawing.FAINT, lw=0.8)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend above the curves
        axes.legend(loc="upper left", ncols=1 if max(map(len, names)) > _SHORT_NAME else 2)
        drawing.set_title(axes, f"{label}: {_describe_order(arms[label])}")
    return figure


def _span_of_leads(runs: Sequence[JudgedRun]) -> tuple[int, int]:
    """Rows before and after the start of an event that hold every lead that was measured."""
    rows = [
        lag / max(row_spacing(run.series.steps_T), 1)
        for run in runs
        if run.judgement.lead is not None
        for lag in run.judgement.lead.per_event
    ]
    if not rows:
        return _BEFORE, _AFTER
    earliest, latest = math.floor(min(rows)), math.ceil(max(rows))
    return max(_BEFORE, _ASIDE - earliest), max(_AFTER, latest + _ASIDE)


def _draw_quartiles(axes: Axes, steps_W: Steps, traces_EW: Array, name: str, colour: str) -> None:
    """Median and quartiles over events at each step around them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column without a value
        low_W, middle_W, high_W = np.nanpercentile(traces_EW, [25, 50, 75], axis=0)
    axes.fill_between(steps_W, low_W, high_W, color=colour, alpha=0.2, lw=0)
    axes.plot(steps_W, middle_W, color=colour, label=name)


def _describe_order(runs: Sequence[JudgedRun]) -> str:
    """Which layer leads in the gradient events of an arm's runs."""
    return describe_lead(pool_leads([run.judgement.lead for run in runs]))


def _traces_of_events(run: JudgedRun, span: tuple[int, int]) -> list[tuple[Array, Array]]:
    """Ratios of first and last group around each gradient event of the first.

    `span` are rows before and after.
    """
    lead, series = run.judgement.lead, run.series
    if lead is None:
        return []
    gradients = [series.gradient_of(group) for group in (lead.first_group, lead.last_group)]
    onsets = [e.first for e in run.judgement.gradient_events if e.group == lead.first_group]
    traces = []
    for onset in onsets:
        row = int(np.searchsorted(series.steps_T, onset))
        first, last = (_ratio_around(grad_T, row, span) for grad_T in gradients)
        traces.append((first, last))
    return traces


def _ratio_around(grad_T: Array, row: int, span: tuple[int, int]) -> Array:
    """Gradient over its trailing median around a row, (W,), of the rows that this takes alone."""
    window = window_length(len(grad_T), LOSS_WINDOW)
    first = max(row - span[0] - window, 0)
    return _cut_around(trailing_ratio(grad_T[first : row + span[1] + 1], window), row - first, span)


def _cut_around(values_T: Array, row: int, span: tuple[int, int]) -> Array:
    """Values around a row, (W,); NaN beyond the ends of the series."""
    cut_W = np.full(span[0] + span[1] + 1, np.nan)
    low, high = max(row - span[0], 0), min(row + span[1] + 1, len(values_T))
    cut_W[low - row + span[0] : high - row + span[0]] = values_T[low:high]
    return cut_W


def draw_rms(arms: Arms) -> Figure | None:
    """RMS of g / sqrt(v) of the first trained group, alarms and plain jumps marked."""
    runs = {a: _most_eventful(arm) for a, arm in arms.items()}
    runs = {a: run for a, run in runs.items() if np.isfinite(run.series.rms_GT).any()}
    if not runs:
        return None
    colours = drawing.assign_colours(arms)
    figure, panels = drawing.stack_panels(len(runs), "RMS of g/√v", share_y=True)
    for axes, (label, run) in zip(panels, runs.items(), strict=True):
        series = run.series
        group = series.first_trained_layer() or series.groups[0]
        rms_T = series.rms_of(group)
        rows = is_measured(rms_T)
        steps_C, _, _, high_C = shorten_curve(series.steps_T[rows], rms_T[rows])
        axes.plot(steps_C, high_C, color=colours[label], lw=0.9)
        axes.axhline(RMS_HIGH, color=drawing.FAINT, lw=0.8, ls="--")
        axes.set_yscale("log")
        for jump in run.jumps:
            axes.axvspan(jump.first, jump.last, color=drawing.SHADE, alpha=0.2, lw=0)
        alarms = _alarm_starts(series, group)
        bottom = axes.get_ylim()[0]
        axes.plot(alarms, np.full(len(alarms), bottom), "|", color=drawing.INK, ms=8, mew=0.8)
        drawing.set_title(axes, f"{label}: {group}, seed {run.cell.seed}, {len(alarms)} alarms")
    return figure


def _alarm_starts(series: Series, group: str) -> Steps:
    """Steps at which the alarm on a group begins."""
    steps_T, flags_T = alarm_flags(series, group, ALARM)
    return steps_T[flags_T & ~np.concatenate([[False], flags_T[:-1]])]


def draw_rates(arms: Arms) -> Figure | None:
    """Final accuracy against the learning rate, trained and frozen."""
    points: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for run in itertools.chain(*arms.values()):
        lr, final = run.cell.settings.get("lr"), run.judgement.final_knn
        if lr is not None and np.isfinite(final):
            key = (_label_without_rate(run.cell), run.cell.frozen)
            points.setdefault(key, []).append((float(lr), final))
    points = {key: pairs for key, pairs in points.items() if len({lr for lr, _ in pairs}) > 1}
    if not points:
        return None
    colours = drawing.assign_colours(list(dict.fromkeys(name for name, _ in points)))
    with matplotlib.rc_context(drawing.STYLE):
        figure = Figure((drawing.WIDTH, 3.0), layout="constrained")
        axes = figure.subplots()
        for (name, frozen), pairs in points.items():
            colour = colours[name]
            lrs = sorted({lr for lr, _ in pairs})
            means = [np.mean([a for lr, a in pairs if lr == rate]) for rate in lrs]
            state = "frozen" if frozen else "trained"
            label = f"{name}, {state}" if name else f"patch projection {state}"
            label = drawing.plain_text(label, _LONGEST_LABEL)
            axes.plot(lrs, means, "--" if frozen else "-", color=colour, label=label)
            fill = "none" if frozen else None
            axes.plot(*zip(*pairs, strict=True), "o", color=colour, ms=3, mfc=fill)
        axes.set_xscale("log")
        axes.ticklabel_format(axis="y", useOffset=False)
        low, high = axes.get_ylim()
        if high - low < _LEAST_SPAN:
            middle = (low + high) / 2
            axes.set_ylim(middle - _LEAST_SPAN / 2, middle + _LEAST_SPAN / 2)
        axes.set_xlabel("base learning rate")
        axes.set_ylabel("final k-NN accuracy, %")
        drawing.set_title(axes, "Rate against accuracy; points are seeds")
        drawing.legend_below(figure, axes)
    return figure


def draw_trust_ratios(arms: Arms) -> Figure | None:
    """Spread of the trust ratios over the groups at each step, for optimizers with such ratios."""
    signals = {
        label: runs[0].signals
        for label, runs in arms.items()
        if runs[0].signals is not None and runs[0].has_trust_ratio
    }
    if not signals:
        return None
    colours = drawing.assign_colours(arms)
    figure, panels = drawing.stack_panels(len(signals), "trust ratio")
    for axes, (label, table) in zip(panels, signals.items(), strict=True):
        trust_GT = np.concatenate([table.grid("trust"), table.grid("trust_min")]).astype(float)
        trust_GT = trust_GT[np.isfinite(trust_GT).any(1)]
        if not len(trust_GT):
            continue
        rows = np.isfinite(trust_GT).any(0)
        steps_T, colour = table.steps[rows], colours[label]
        bands = np.nanpercentile(trust_GT[:, rows], [0, 25, 50, 75, 100], axis=0)
        if len(steps_T) > _LONG:
            shortened = [shorten_curve(steps_T, band_T) for band_T in bands]
            steps_T = shortened[0][0].astype(np.int64)
            # the least of the lowest band, the largest of the highest, the medians between
            bands = np.stack(
                [short[row] for short, row in zip(shortened, (1, 2, 2, 2, 3), strict=True)]
            )
        axes.fill_between(steps_T, bands[0], bands[4], color=colour, alpha=0.15, lw=0)
        axes.fill_between(steps_T, bands[1], bands[3], color=colour, alpha=0.3, lw=0)
        axes.plot(steps_T, bands[2], color=colour)
        axes.set_yscale("log")
        drawing.set_title(axes, f"{label}: least to largest, quartiles, median of all groups")
    return figure


def draw_forks(lines: Mapping[str, Series], start: int, stop: int, peak: int) -> Figure:
    """Loss of each fork through an event; the control is grey in every panel.

    Args:
        lines: name of a fork -> its series; the control comes first.
        start: step of the checkpoint that the forks go on from.
        stop: last step of the forks.
        peak: step of the event's peak.
    """
    (_, control), *forks = lines.items()
    figure, panels = drawing.stack_panels(len(forks), "loss", height=0.9, share_y=True)
    for axes, colour, (name, line) in zip(
        panels, itertools.cycle(drawing.COLOURS), forks, strict=False
    ):
        axes.plot(control.steps_T, control.loss_T, color=drawing.FAINT, lw=1.6)
        axes.plot(line.steps_T, line.loss_T, color=colour)
        axes.axvline(peak, color=drawing.SHADE, lw=0.7, ls=":")
        axes.set_xlim(start - 20, stop)
        drawing.set_title(axes, name)
    losses = [_loss_between(line, start - 20, stop) for line in lines.values()]
    low = min(float(np.nanmin(loss_T)) for loss_T in losses if len(loss_T))
    high = float(np.nanmax(losses[0]))
    for axes in panels:
        axes.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))
    return figure


def _loss_between(series: Series, start: int, stop: int) -> Array:
    return series.loss_T[(series.steps_T > start) & (series.steps_T <= stop)]


def _most_eventful(runs: Sequence[JudgedRun]) -> JudgedRun:
    """The run with the most gradient events."""
    return max(runs, key=lambda run: np.nan_to_num(run.judgement.events_per_1000))


def _opacity(index: int) -> float:
    """Opacity of the curve of a seed: later ones are fainter."""
    return max(0.35, 0.95 - 0.25 * index)


def _list_counts(counts: Sequence[int], noun: str) -> str:
    """E.g. `5, 6, 4 events in 3 seeds`."""
    if not any(counts):
        return f"no {noun}"
    listed = ", ".join(map(str, counts))
    plural = "s" * (sum(counts) != 1)
    return f"{listed} {noun}{plural}" + f" in {len(counts)} seeds" * (len(counts) > 1)


def _label_without_rate(cell: Cell) -> str:
    return ", ".join(
        term
        for term in cell.label.split(", ")
        if not term.startswith("lr ") and term not in ("frozen", "as it is")
    )


def _reduce_columns(heat_GT: Array) -> Array:
    """At most `_HEAT_COLUMNS` columns, each the largest of its steps."""
    steps = heat_GT.shape[1]
    if steps <= _HEAT_COLUMNS:
        return heat_GT
    edges = np.linspace(0, steps, _HEAT_COLUMNS + 1).astype(int)
    slices = [heat_GT[:, a:b] for a, b in itertools.pairwise(edges)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a slice without a value stays NaN
        return np.stack([np.nanmax(slice_GT, axis=1) for slice_GT in slices], axis=1)


def group_ticks(groups: Sequence[str]) -> tuple[list[int], list[str]]:
    """Rows and labels of at most a dozen groups, both ends among them."""
    every = max(1, len(groups) // 10)
    rows = [row for row in range(len(groups)) if row % every == 0 or row == len(groups) - 1]
    names = [groups[row].replace("_", " ") for row in rows]
    return rows, [drawing.plain_text(name, _LONGEST_NAME) for name in names]
