"""Which pictures lay a study's settings over one another, as the paper's figures do?

One colour an arm: the mean over its seeds, in its 95 % interval where there are several.
Shape suffixes as in `figures`; C = columns of a drawing.
"""

import itertools
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability import drawing
from mocov3_ds.stability.arm_questions import look_for_dips
from mocov3_ds.stability.findings import Array, Series, Steps
from mocov3_ds.stability.layer_order import outer_layers
from mocov3_ds.stability.paired import band_over_seeds
from mocov3_ds.stability.run_curves import shorten_curve
from mocov3_ds.stability.study import Arms, JudgedRun
from mocov3_ds.stability.trailing import is_measured

_POINTS = 400  # of a drawn curve
_SMOOTHED = 50  # stretches of a loss curve, each its median
_HEIGHT = 2.9  # inches
_MOST_THIN = 4  # arms whose seeds are drawn one by one
_MOST_PAIRS = 4  # arms whose gradient and accuracy stand one below the other
_HALF_DECADE = 10**0.5  # a gradient axis spans a decade at least
_AROUND = 0.08  # of the curves' range, above and below them
_LEAST_SPAN = 1.0  # points of an accuracy axis
_TALL, _PANEL = 1.5, 0.9  # inches of a panel with gradients, and of one with accuracy


def draw_knn_over_epochs(arms: Arms) -> Figure | None:
    """k-NN accuracy of all arms in one panel, as Figs. 1 to 3 of arXiv 2104.02057."""

    def curve(series: Series) -> tuple[Steps, Array]:
        return series.knn_steps_K, series.knn_K

    return _draw_overlay(arms, curve, "k-NN accuracy, %")


def draw_loss_over_epochs(arms: Arms) -> Figure | None:
    """Loss of all arms in one panel; long curves are the medians of stretches."""

    def curve(series: Series) -> tuple[Steps, Array]:
        is_there_T = np.isfinite(series.loss_T)
        steps_T, loss_T = series.steps_T[is_there_T], series.loss_T[is_there_T]
        steps_C, _, middle_C, _ = shorten_curve(steps_T, loss_T, 4 * _SMOOTHED)
        return np.round(steps_C).astype(np.int64), middle_C

    return _draw_overlay(arms, curve, "loss")


def _draw_overlay(
    arms: Arms, curve: Callable[[Series], tuple[Steps, Array]], y: str
) -> Figure | None:
    """The curves of all arms over one another; None where no run has one."""
    found = {label: [(run, *curve(run.series)) for run in arm] for label, arm in arms.items()}
    found = {label: [one for one in arm if len(one[1])] for label, arm in found.items()}
    found = {label: arm for label, arm in found.items() if arm}
    if not found:
        return None
    colours = drawing.assign_colours(arms)
    epochs = [run.series.epochs_per_step for arm in found.values() for run, _, _ in arm]
    in_epochs = bool(np.all(np.isfinite(epochs)))
    with matplotlib.rc_context(drawing.STYLE):
        figure = Figure((drawing.WIDTH, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        drawn: list[Array] = []
        for label, arm in found.items():
            curves = []
            for run, steps_K, values_K in arm:
                scale = run.series.epochs_per_step if in_epochs else 1.0
                curves.append((steps_K.astype(np.float64) * scale, values_K))
            name, thin = drawing.plain_text(label, 48), len(found) <= _MOST_THIN
            drawn += _draw_band(axes, curves, colours[label], name, thin=thin)
        _frame_curves(axes, np.concatenate(drawn))
        axes.set_xlabel("epochs" if in_epochs else "step")
        axes.set_ylabel(y)
        axes.margins(x=0.01)
        drawing.legend_below(figure, axes)
    return figure


def _draw_band(
    axes: Axes, curves: Sequence[tuple[Array, Array]], colour: str, label: str, *, thin: bool
) -> tuple[Array, ...]:
    """Mean over the curves in its 95 % interval over seeds, over the x that all reach.

    Returns:
        Curves that are to be in the frame.
    """
    x_C, values_SC = _on_one_axis(curves)
    places_C = np.arange(len(x_C))
    band = band_over_seeds([(places_C, values_C) for values_C in values_SC])
    x_K = x_C[band.steps_K]
    if len(values_SC) > 1:
        shade = 0.13 if thin else 0.06
        axes.fill_between(x_K, band.low_K, band.high_K, color=colour, alpha=shade, lw=0)
        if thin:
            axes.plot(x_K, values_SC[:, band.steps_K].T, color=colour, lw=0.5, alpha=0.45)
    mark = "o" if len(x_K) == 1 else None
    axes.plot(x_K, band.mean_K, color=colour, label=label, lw=1.5, marker=mark, ms=3)
    return (band.mean_K, *values_SC) if thin else (band.mean_K,)


def _frame_curves(axes: Axes, values: Array) -> None:
    """Fit the axis to curves; of bands, which two seeds make very wide, what lies near them."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    reach = _AROUND * (high - low) or _LEAST_SPAN / 2
    axes.set_ylim(low - reach, high + reach)


def _on_one_axis(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Common x (C,) of curves that begin and end at other places, and their values (S, C)."""
    first = max(x[0] for x, _ in curves)
    last = min(x[-1] for x, _ in curves)
    if last < first:  # nothing in common: the longest alone
        x, values = max(curves, key=lambda curve: len(curve[0]))
        return x, values[None]
    x_C = np.unique(np.concatenate([x[(x >= first) & (x <= last)] for x, _ in curves]))
    if len(x_C) > _POINTS:
        x_C = np.linspace(first, last, _POINTS)
    return x_C, np.stack([np.interp(x_C, x, values) for x, values in curves])


def draw_spikes_and_dips(arms: Arms) -> Figure | None:
    """Gradient of first and last layer above k-NN on one time axis, as Fig. 4 of the paper.

    Of each arm the run with the most gradient events.
    """
    chosen = {label: _most_eventful(arm) for label, arm in arms.items()}
    chosen = {label: run for label, run in chosen.items() if run.series.trained_groups()}
    eventful = sorted(chosen, key=lambda label: -len(chosen[label].judgement.gradient_events))
    chosen = {label: run for label, run in chosen.items() if label in eventful[:_MOST_PAIRS]}
    if not chosen:
        return None
    with matplotlib.rc_context(drawing.STYLE):
        count = len(chosen)
        figure = Figure((drawing.WIDTH, 0.5 + count * (_TALL + _PANEL)), layout="constrained")
        ratios = [_TALL, _PANEL] * count
        panels = figure.subplots(2 * count, 1, height_ratios=ratios, sharex=True)
        for index, (label, run) in enumerate(chosen.items()):
            upper, lower = panels[2 * index], panels[2 * index + 1]
            _draw_gradients(upper, run.series)
            _draw_accuracy(lower, run)
            for event in run.judgement.gradient_events:
                for axes in (upper, lower):
                    axes.axvline(event.peak, color=drawing.SHADE, lw=0.5, alpha=0.35, zorder=0)
            drawing.set_title(upper, f"{label} (seed {run.cell.seed})")
        panels[-1].set_xlabel("step")
        drawing.legend_below(figure, panels[0])
    return figure


def _draw_gradients(axes: Axes, series: Series) -> None:
    """Largest gradient of the first and the last trained layer; spikes of long curves stay."""
    trained = [group for group in series.trained_groups() if group != "cls"] or list(series.groups)
    layers = outer_layers(series) or (trained[0], trained[-1])
    names = dict.fromkeys(layers)
    for name, colour in zip(names, (drawing.COLOURS[1], drawing.COLOURS[0]), strict=False):
        grad_T = series.gradient_of(name)
        rows = is_measured(grad_T)
        steps_C, _, middle_C, high_C = shorten_curve(series.steps_T[rows], grad_T[rows], _POINTS)
        position = "first" if name == layers[0] else "last"
        label = f"gradient of the {position} layer ({drawing.plain_text(name, 30)})"
        if np.any(high_C != middle_C):
            axes.fill_between(steps_C, middle_C, high_C, color=colour, alpha=0.35, lw=0)
        axes.plot(steps_C, middle_C, color=colour, lw=0.9, label=label)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    middle = np.sqrt(low * high)
    axes.set_ylim(min(low, middle / _HALF_DECADE), max(high, middle * _HALF_DECADE))
    axes.set_ylabel("largest gradient", fontsize=7.5)


def _draw_accuracy(axes: Axes, run: JudgedRun) -> None:
    """k-NN accuracy, its dips shaded."""
    steps_K, knn_K = run.series.knn_steps_K, run.series.knn_K
    axes.plot(steps_K, knn_K, color=drawing.INK, lw=1.0)
    for dip in run.judgement.dips:
        axes.axvspan(dip.first, dip.last, color=drawing.SHADE, alpha=0.16, lw=0)
    axes.set_ylabel("k-NN, %", fontsize=7.5)
    if not len(knn_K):
        axes.text(0.5, 0.5, "no k-NN evaluation", transform=axes.transAxes, ha="center")


def _most_eventful(runs: Sequence[JudgedRun]) -> JudgedRun:
    """The run with the most gradient events."""
    return max(runs, key=lambda run: len(run.judgement.gradient_events))


def draw_average_after_spikes(arms: Arms) -> Figure | None:
    """Mean k-NN accuracy around all gradient spikes, in the band of the same spikes shifted."""
    found = look_for_dips(arms)
    if not found.spikes:
        return None
    with matplotlib.rc_context(drawing.STYLE):
        figure = Figure((drawing.WIDTH, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        offsets_W, colour = found.offsets_W, drawing.COLOURS[1]
        axes.fill_between(
            offsets_W,
            found.low_W,
            found.high_W,
            color=drawing.FAINT,
            alpha=0.35,
            lw=0,
            label="95 % of shifted spikes",
        )
        axes.plot(offsets_W, found.average_W, "o-", color=colour, ms=3, label="mean around spikes")
        axes.axhline(0, color=drawing.FAINT, lw=0.8)
        axes.axvline(0, color=drawing.SHADE, lw=0.8, ls=":")
        axes.set_xlabel("k-NN evaluations after a gradient spike")
        axes.set_ylabel("k-NN from its trend, points")
        spikes, runs = count_noun(found.spikes, "spike"), count_noun(found.runs, "run")
        share = f"{100 * found.share:.0f} % with a dip, shifted {100 * found.control:.0f} %"
        drawing.set_title(axes, f"{spikes} in {runs}: {share} (p {found.p:.2g})")
        drawing.legend_below(figure, axes)
    return figure


def draw_paired_arms(arms: Arms) -> Figure | None:
    """Final accuracy of each arm; a line joins the runs of one seed, as Figs. 5 and 6 ask for."""
    finals = {
        label: {
            run.cell.seed: run.judgement.final_knn
            for run in arm
            if np.isfinite(run.judgement.final_knn)
        }
        for label, arm in arms.items()
    }
    finals = {label: by_seed for label, by_seed in finals.items() if by_seed}
    if len(finals) < 2:
        return None
    colours = drawing.assign_colours(arms)
    with matplotlib.rc_context(drawing.STYLE):
        figure = Figure((drawing.WIDTH, 0.75 + 0.34 * len(finals)), layout="constrained")
        axes = figure.subplots()
        for index, (above, below) in enumerate(itertools.pairwise(finals.values())):
            for seed in above.keys() & below.keys():
                x = [above[seed], below[seed]]
                axes.plot(x, [index, index + 1], color=drawing.FAINT, lw=0.7, zorder=1)
        for index, (label, by_seed) in enumerate(finals.items()):
            values = list(by_seed.values())
            axes.plot(values, [index] * len(values), "o", color=colours[label], ms=4, zorder=2)
            axes.plot(np.mean(values), index, "|", color=colours[label], ms=16, mew=2, zorder=3)
        labels = [drawing.plain_text(label, 34) for label in finals]
        axes.set_yticks(range(len(finals)), labels)
        axes.set_ylim(len(finals) - 0.5, -0.5)
        middle = (max(axes.get_xlim()) + min(axes.get_xlim())) / 2
        reach = max(np.ptp(axes.get_xlim()) / 2, _LEAST_SPAN / 2)
        axes.set_xlim(middle - reach, middle + reach)
        axes.set_xlabel("final k-NN accuracy, %")
    return figure
