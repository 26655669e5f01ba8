"""The pictures of a stability report: one PNG each, narrow enough for a phone.

Shape suffixes: T = steps logged, G = layer groups, K = k-NN evaluations, W = steps around an event.
"""

import io
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mocov3_ds.monitoring.signal_file import Table
from mocov3_ds.stability import events
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.verdict import Judgement, LossEvent, Series

Array = npt.NDArray[np.float64]

WIDTH = 4.7  # inches: text of 9 points stays readable on a phone
PANELS = 8
"""Most panels of a picture; the arms with the most trouble come first."""
RMS_LINE = 2.3
"""RMS_t that 28 of 30 spikes of CLIP ViT-H followed (arXiv 2304.13013)."""
_DOTS = 140
_COLOURS = ("#2a6fb0", "#c8553d", "#3a8f5c", "#8a5fb5", "#b07d12", "#4f6475", "#c2528b", "#0f8b8d")
_FAINT, _SHADE = "#9aa3ad", "#c8553d"
_BEFORE, _AFTER = 40, 20  # steps around an event
_CELLS = 620  # columns of a heat map

_STYLE: Any = {
    "figure.facecolor": "white",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
}


@dataclass(frozen=True, eq=False)
class Seen:
    """A run and what was made of it."""

    cell: Cell
    series: Series
    judgement: Judgement
    signals: Table | None
    optimizer: str = ""
    """its type in the run's DeepSpeed config, in lower case"""

    @property
    def label(self) -> str:
        """Of its arm."""
        return self.cell.label


Arms = Mapping[str, Sequence[Seen]]
"""label -> the runs of all seeds"""


def trailing_ratio(values_T: Array, window: int) -> Array:
    """Each value over the median of the `window` values before it; NaN where there are fewer."""
    ratio_T = np.full(len(values_T), np.nan)
    if len(values_T) > window:
        before = np.lib.stride_tricks.sliding_window_view(values_T[:-1], window)
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)  # a window without a value stays NaN
            ratio_T[window:] = values_T[window:] / np.nanmedian(before, axis=1)
    return ratio_T


SCORED_FROM = 100
"""Steps of the first fall of the loss, in which no jump is counted."""


def jumps(series: Series) -> list[LossEvent]:
    """Every rise of the loss more than 1 % above the median of the 30 logged steps before.

    A plainer test than the verdict's, which also asks how far the loss wanders otherwise.
    """
    found = events.loss_jumps(series.steps_T, series.loss_T, deviations=0.0)
    return [
        LossEvent(first=jump.first, last=jump.last, peak=jump.peak, excess=jump.size)
        for jump in found
        if jump.peak > SCORED_FROM
    ]


def excess_of(series: Series) -> Array:
    """Loss above the median of the 30 logged steps before, percent, (T,); NaN until step 100."""
    excess_T = 100 * (trailing_ratio(series.loss_T, events.LOSS_WINDOW) - 1)
    excess_T[series.steps_T <= SCORED_FROM] = np.nan
    return excess_T


def window_of(run: Seen) -> int:
    """Steps of the trailing median: 30, or 1 % of a long run."""
    return max(30, len(run.series.steps_T) // 100)


def colours(arms: Arms) -> dict[str, str]:
    """A colour for each arm."""
    return {label: _COLOURS[place % len(_COLOURS)] for place, label in enumerate(arms)}


def knn_curves(arms: Arms) -> Figure | None:
    """k-NN accuracy of each seed, its dips shaded."""
    shown = {a: [r for r in runs if len(r.series.knn_K)] for a, runs in arms.items()}
    shown = {label: runs for label, runs in shown.items() if runs}
    if not shown:
        return None
    tint = colours(arms)
    figure, panels = _stack(shown, "k-NN accuracy, %", share_y=True)
    for axes, (label, runs) in zip(panels, shown.items(), strict=True):
        for place, run in enumerate(runs):
            axes.plot(
                run.series.knn_steps_K, run.series.knn_K, color=tint[label], alpha=_fade(place)
            )
            for dip in run.judgement.dips:
                axes.axvspan(dip.first, dip.last, color=_SHADE, alpha=0.16, lw=0)
        dips = [len(run.judgement.dips) for run in runs]
        _title(axes, f"{label}: {_counted(dips, 'dip')}")
    return figure


def losses(arms: Arms) -> Figure | None:
    """How far the loss is above its trailing median; loss events are marked."""
    shown = {label: runs for label, runs in arms.items() if any(len(r.series.loss_T) for r in runs)}
    if not shown:
        return None
    tint = colours(arms)
    figure, panels = _stack(shown, "loss above its median, %", share_y=True)
    top = 1.0
    for axes, (label, runs) in zip(panels, shown.items(), strict=True):
        for place, run in enumerate(runs):
            excess_T = excess_of(run.series)
            axes.plot(run.series.steps_T, excess_T, color=tint[label], alpha=_fade(place), lw=0.9)
            top = max(top, float(np.nanmax(excess_T, initial=1.0)))
            for event in jumps(run.series):
                axes.plot(event.peak, 100 * event.excess, ".", color=_SHADE, ms=5, zorder=3)
        _title(axes, f"{label}: {_counted([len(jumps(r.series)) for r in runs], 'jump')}")
    for axes in panels:
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_ylim(-0.5, top * 1.3)
        axes.set_yticks([v for v in (0, 1, 3, 10, 30, 100, 300, 1000) if v <= top * 1.3])
        axes.set_yticklabels([f"{v:g}" for v in axes.get_yticks()])
    return figure


def heat_map(arms: Arms) -> Figure | None:
    """log10 of each group's largest gradient over its trailing median, layer by step.

    Of each arm the run with the most gradient events. Columns hold the largest value of their
    steps, so that no spike is lost.
    """
    shown = {label: [max(runs, key=_events)] for label, runs in arms.items()}
    shown = {a: runs for a, runs in shown.items() if np.isfinite(runs[0].series.grad_linf_GT).any()}
    if not shown:
        return None
    groups = max(len(runs[0].series.groups) for runs in shown.values())
    figure, panels = _stack(shown, "", height=0.5 + 0.13 * groups, grid=False)
    image = None
    for axes, (label, (run,)) in zip(panels, shown.items(), strict=True):
        series = run.series
        ratios = [trailing_ratio(row_T, window_of(run)) for row_T in series.grad_linf_GT]
        with np.errstate(divide="ignore"):
            heat_GT = np.log10(np.stack(ratios))
        image = axes.imshow(
            _pooled(heat_GT),
            aspect="auto",
            cmap=matplotlib.colormaps["OrRd"].with_extremes(bad="#eceff1"),
            vmin=0,
            vmax=1.5,
            extent=(int(series.steps_T[0]), int(series.steps_T[-1]), len(heat_GT) - 0.5, -0.5),
            interpolation="nearest",
        )
        axes.set_yticks(*_some_groups(series.groups), fontsize=7)
        _title(axes, f"{label} (seed {run.cell.seed})")
    assert image is not None
    panels[-1].set_xlim(0, max(int(runs[0].series.steps_T[-1]) for runs in shown.values()))
    bar = figure.colorbar(image, ax=panels, orientation="horizontal", aspect=40, pad=0.01)
    bar.set_ticks([0, 0.5, 1, 1.5], labels=["1x", "3x", "10x", "32x or more"])
    bar.set_label("largest gradient over its trailing median (grey: not measured)", fontsize=8)
    return figure


def aligned(arms: Arms) -> Figure | None:
    """First and last group around the events; step 0 is where one begins."""
    shown: dict[str, list[tuple[str, Array, Array]]] = {}
    for label, runs in arms.items():
        traces = [trace for run in runs for trace in _around_events(run)]
        if traces:
            shown[label] = traces
    if not shown:
        return None
    figure, panels = _stack(shown, "gradient over its median", x="steps from the start of an event")
    for axes, (label, traces) in zip(panels, shown.items(), strict=True):
        steps_W = np.arange(-_BEFORE, _AFTER + 1)
        leads = [run.judgement.lead for run in arms[label] if run.judgement.lead is not None]
        names = (leads[0].first_group, leads[0].last_group)
        for name, colour, place in zip(names, _COLOURS, (1, 2), strict=False):
            traces_EW = np.stack([trace[place] for trace in traces])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a column without a value
                low_W, middle_W, high_W = np.nanpercentile(traces_EW, [25, 50, 75], axis=0)
            axes.fill_between(steps_W, low_W, high_W, color=colour, alpha=0.2, lw=0)
            axes.plot(steps_W, middle_W, color=colour, label=name)
        axes.axvline(0, color=_FAINT, lw=0.8)
        axes.set_yscale("log")
        axes.legend(loc="upper left", ncols=2)
        _title(axes, f"{label}: {len(traces)} events, {lag_words(arms[label])}")
    return figure


def lag_words(runs: Sequence[Seen]) -> str:
    """Measured lag of the arm's runs, one word each: median [interval]."""
    leads = [run.judgement.lead for run in runs if run.judgement.lead is not None]
    if not leads:
        return "no lag measured"
    return "lag " + "; ".join(
        f"{lead.lag} [{lead.lag_interval[0]:.0f}, {lead.lag_interval[1]:.0f}]" for lead in leads
    )


def _around_events(run: Seen) -> list[tuple[str, Array, Array]]:
    """Ratios of first and last group around each gradient event, or each jump where none is."""
    lead = run.judgement.lead
    if lead is None:
        return []
    series, out = run.series, []
    rows = [
        series.grad_linf_GT[series.groups.index(g)] for g in (lead.first_group, lead.last_group)
    ]
    ratios = [trailing_ratio(row_T, window_of(run)) for row_T in rows]
    firsts = [e.first for e in run.judgement.gradient_events if e.group == lead.first_group]
    for first in firsts or [jump.first for jump in jumps(series)]:
        at = int(np.searchsorted(series.steps_T, first))
        cut = [np.full(_BEFORE + _AFTER + 1, np.nan) for _ in ratios]
        low, high = max(at - _BEFORE, 0), min(at + _AFTER + 1, len(ratios[0]))
        for target, ratio_T in zip(cut, ratios, strict=True):
            target[low - at + _BEFORE : high - at + _BEFORE] = ratio_T[low:high]
        out.append((run.label, cut[0], cut[1]))
    return out


def rms(arms: Arms, alarm_steps: Callable[[Seen], npt.NDArray[np.int64]]) -> Figure | None:
    """RMS of g / sqrt(v) of the first trained group, alarms and loss events marked."""
    shown = {label: [max(runs, key=_events)] for label, runs in arms.items()}
    shown = {a: runs for a, runs in shown.items() if np.isfinite(runs[0].series.rms_GT).any()}
    if not shown:
        return None
    tint = colours(arms)
    figure, panels = _stack(shown, "RMS of g/√v", share_y=True)
    for axes, (label, (run,)) in zip(panels, shown.items(), strict=True):
        series = run.series
        group = first_trained(series)
        rms_T = series.rms_GT[series.groups.index(group)]
        rows = events.measured(rms_T)
        axes.plot(series.steps_T[rows], rms_T[rows], color=tint[label], lw=0.9)
        axes.axhline(RMS_LINE, color=_FAINT, lw=0.8, ls="--")
        axes.set_yscale("log")
        for event in jumps(series):
            axes.axvspan(event.first, event.last, color=_SHADE, alpha=0.2, lw=0)
        alarms = alarm_steps(run)
        low = axes.get_ylim()[0]
        axes.plot(alarms, np.full(len(alarms), low), "|", color="#1b1f24", ms=8, mew=0.8)
        _title(axes, f"{label}: {group}, seed {run.cell.seed}, {len(alarms)} alarms")
    return figure


def rates(arms: Arms) -> Figure | None:
    """Final accuracy against the learning rate, trained and frozen."""
    points: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for runs in arms.values():
        for run in runs:
            lr, final = run.cell.settings.get("lr"), run.judgement.final_knn
            if lr is not None and np.isfinite(final):
                name = _without_rate(run.cell)
                points.setdefault((name, run.cell.frozen), []).append((float(lr), final))
    points = {key: found for key, found in points.items() if len({lr for lr, _ in found}) > 1}
    if not points:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure((WIDTH, 3.0), layout="constrained")
        axes = figure.subplots()
        names = list(dict.fromkeys(name for name, _ in points))
        for (name, frozen), found in points.items():
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            lrs = sorted({lr for lr, _ in found})
            means = [np.mean([a for lr, a in found if lr == at]) for at in lrs]
            what = "frozen" if frozen else "trained"
            axes.plot(
                lrs,
                means,
                "--" if frozen else "-",
                color=colour,
                label=f"{name}, {what}" if name else f"patch projection {what}",
            )
            axes.plot(
                *zip(*found, strict=True), "o", color=colour, ms=3, mfc="none" * frozen or None
            )
        axes.set_xscale("log")
        axes.set_xlabel("base learning rate")
        axes.set_ylabel("final k-NN accuracy, %")
        _title(axes, "Rate against accuracy; points are seeds")
        axes.legend()
    return figure


def trust_fan(arms: Arms) -> Figure | None:
    """Spread of the trust ratios over the groups at each step, for LAMB and LARS."""
    shown = {
        label: [runs[0]]
        for label, runs in arms.items()
        if runs[0].signals is not None and runs[0].optimizer in ("lamb", "fusedlamb", "lars")
    }
    if not shown:
        return None
    tint = colours(arms)
    figure, panels = _stack(shown, "trust ratio")
    for axes, (label, (run,)) in zip(panels, shown.items(), strict=True):
        assert run.signals is not None
        trust_GT = run.signals.grid("trust").astype(float)
        least_GT = run.signals.grid("trust_min").astype(float)
        both_GT = np.concatenate([trust_GT, least_GT])
        both_GT = both_GT[np.isfinite(both_GT).any(1)]
        if not len(both_GT):
            continue
        rows = np.isfinite(both_GT).any(0)
        both_GT, steps_T = both_GT[:, rows], run.signals.steps[rows]
        bands = np.nanpercentile(both_GT, [0, 25, 50, 75, 100], axis=0)
        axes.fill_between(steps_T, bands[0], bands[4], color=tint[label], alpha=0.15, lw=0)
        axes.fill_between(steps_T, bands[1], bands[3], color=tint[label], alpha=0.3, lw=0)
        axes.plot(steps_T, bands[2], color=tint[label])
        axes.set_yscale("log")
        _title(axes, f"{label}: least to largest, quartiles, median of all groups")
    return figure


def replayed(
    labels: Sequence[str], lines: Sequence[Series], start: int, stop: int, peak: int
) -> Figure:
    """Loss of each fork through the event; the control is grey in every panel."""
    shown = {label: [line] for label, line in zip(labels[1:], lines[1:], strict=True)}
    figure, panels = _stack(shown, "loss", height=0.9, share_y=True)
    control = lines[0]
    for place, (axes, (label, (line,))) in enumerate(zip(panels, shown.items(), strict=True)):
        axes.plot(control.steps_T, control.loss_T, color=_FAINT, lw=1.6)
        axes.plot(line.steps_T, line.loss_T, color=_COLOURS[place % len(_COLOURS)])
        axes.axvline(peak, color=_SHADE, lw=0.7, ls=":")
        axes.set_xlim(start - 20, stop)
        _title(axes, label)
    there_T = (control.steps_T > start - 20) & (control.steps_T <= stop)
    seen = [line.loss_T[(line.steps_T > start - 20) & (line.steps_T <= stop)] for line in lines]
    low = min(float(np.nanmin(loss_T)) for loss_T in seen if len(loss_T))
    high = float(np.nanmax(control.loss_T[there_T]))
    for axes in panels:
        axes.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))
    return figure


def png(figure: Figure) -> bytes:
    """A picture of few colours, small enough to be part of a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS)
    buffer.seek(0)
    with Image.open(buffer) as image:
        small = image.convert("RGB").quantize(
            64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return out.getvalue()


def first_trained(series: Series) -> str:
    """The layer nearest to the input whose gradient was measured."""
    for group, row_T in zip(series.groups, series.grad_linf_GT, strict=True):
        if group != "cls" and np.isfinite(row_T).any():
            return group
    return series.groups[0]


# ---------------------------------------------------------------------------------------- drawing


def _stack(
    shown: Mapping[str, Sequence[Any]],
    y: str,
    *,
    x: str = "step",
    height: float = 1.35,
    share_y: bool = False,
    grid: bool = True,
) -> tuple[Figure, list[Axes]]:
    """One panel below the other with a common x axis."""
    count = len(shown)
    with matplotlib.rc_context({**_STYLE, "axes.grid": grid}):
        figure = Figure((WIDTH, 0.35 + height * count), layout="constrained")
        panels = figure.subplots(count, 1, sharex=True, sharey=share_y, squeeze=False)[:, 0]
        for axes in panels:
            axes.margins(x=0.01)
        panels[-1].set_xlabel(x)
        if y:
            figure.supylabel(y, fontsize=8.5)
    return figure, list(panels)


def _title(axes: Axes, text: str) -> None:
    """A panel's title, smaller where it is long."""
    axes.set_title(text, loc="left", fontweight="bold", fontsize=8.5 if len(text) < 60 else 7.2)


def _fade(place: int) -> float:
    return max(0.35, 0.95 - 0.25 * place)


def _counted(counts: Sequence[int], what: str) -> str:
    """E.g. `5, 6, 4 events in its 3 seeds`."""
    if not any(counts):
        return f"no {what}"
    listed = ", ".join(map(str, counts))
    plural = "s" * (sum(counts) != 1)
    return f"{listed} {what}{plural}" + f" in {len(counts)} seeds" * (len(counts) > 1)


def _events(run: Seen) -> float:
    return run.judgement.events_per_1000 if np.isfinite(run.judgement.events_per_1000) else 0.0


def _without_rate(cell: Cell) -> str:
    return ", ".join(
        part
        for part in cell.label.split(", ")
        if not part.startswith("lr ") and part not in ("frozen", "as it is")
    )


def _pooled(heat_GT: Array) -> Array:
    """At most `_CELLS` columns, each the largest of its steps."""
    steps = heat_GT.shape[1]
    if steps <= _CELLS:
        return heat_GT
    edges = np.linspace(0, steps, _CELLS + 1).astype(int)
    parts = [heat_GT[:, a:b] for a, b in itertools.pairwise(edges)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a part without a value stays NaN
        return np.stack([np.nanmax(part_GT, axis=1) for part_GT in parts], axis=1)


def _some_groups(groups: Sequence[str]) -> tuple[list[int], list[str]]:
    """Labels of at most a dozen groups, both ends among them."""
    every = max(1, len(groups) // 10)
    places = [p for p in range(len(groups)) if p % every == 0 or p == len(groups) - 1]
    return places, [groups[p].replace("_", " ") for p in places]
