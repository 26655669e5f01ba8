"""Which pictures show one run? One function a picture; None where the run gives nothing to draw.

Shape suffixes as in `run_curves`.
"""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mocov3_ds.stability import drawing
from mocov3_ds.stability.figures import group_ticks
from mocov3_ds.stability.findings import Array
from mocov3_ds.stability.run_curves import RunCurves, gradient_heat, shorten_curve

_HEIGHT = 2.2  # inches of a picture with one panel


def draw_loss(curves: RunCurves) -> Figure | None:
    """Loss with its chance level; ticks below are early alarms."""
    figure, axes = _one_panel("loss")
    if not _draw_curve(axes, curves, "loss", 0):
        return None
    chance = curves.last("chance_loss")
    if np.isfinite(chance):
        axes.axhline(chance, color=drawing.FAINT, lw=0.8, ls="--", label="chance level")
    alarms = [steps for steps in curves.alarms.values() if len(steps)]
    if alarms:
        steps = np.unique(np.concatenate(alarms))
        bottom = np.full(len(steps), axes.get_ylim()[0])
        axes.plot(steps, bottom, "|", color=drawing.SHADE, ms=9, label="early alarm")
    axes.legend(loc="best")
    return figure


def draw_knn(curves: RunCurves) -> Figure | None:
    """k-NN accuracy of both encoders while the run trained, at its start, and by chance."""
    figure, axes = _one_panel("k-NN accuracy, %")
    names = {"knn": "base encoder", "knn_momentum": "momentum encoder"}
    drawn = [
        _draw_curve(axes, curves, name, index, label)
        for index, (name, label) in enumerate(names.items())
    ]
    steps_M, full_M = curves.curve("knn_full")
    axes.plot(steps_M, full_M, "o", color=drawing.INK, ms=4, label="fixed bank")
    if not any(drawn) and not len(full_M):
        return None
    chance = curves.first("knn_chance")
    if np.isfinite(chance):
        axes.axhline(chance, color=drawing.FAINT, lw=0.8, ls="--", label="chance")
    axes.legend(loc="best")
    return figure


def draw_rates(curves: RunCurves) -> Figure | None:
    """Learning rate, and the momentum of the momentum encoder."""
    return _draw_stack(curves, {"lr": "learning rate", "momentum": "momentum encoder's momentum"})


def draw_speed(curves: RunCurves) -> Figure | None:
    """Images a second, and seconds that a step waited for its data and for checkpoints."""
    return _draw_stack(
        curves,
        {
            "images_per_s": "images/s",
            "data_wait_s": "waiting for data, s a step",
            "save_s": "waiting for checkpoints, s a step",
            "cpu_s": "CPU time of the first rank, s a step",
        },
    )


def draw_memory(curves: RunCurves) -> Figure | None:
    """Peak memory of the first rank."""
    return _draw_stack(
        curves,
        {"memory_gib": "peak memory, GiB", "memory_reserved_gib": "peak reserved memory, GiB"},
    )


def draw_gradients(curves: RunCurves) -> Figure | None:
    """Norm of the whole gradient, what clipped it, and the spread of the queries on the sphere."""
    names = {
        "grad_norm": "gradient norm",
        "clip_factor": "smallest factor of the gradient clip (1 = unclipped)",
        "clipped_share": "share of the tensors that were clipped",
        "spread": "spread of the queries (1 = even)",
    }
    return _draw_stack(curves, names, log=("grad_norm",))


def draw_curvature(curves: RunCurves) -> Figure | None:
    """Curvature of the loss beside the limits above which steps are unstable, and its noise."""
    names = {
        "sharpness": "preconditioned sharpness; dashed: limit of Adam",
        "curvature": "curvature along the gradient's step; dashed: limit",
        "noise_scale": "gradient noise scale, images",
    }
    figure = _draw_stack(curves, names)
    if figure is None:
        return None
    drawn = [name for name in names if curves.curve(name)[1].any()]
    for axes, name in zip(figure.axes, drawn, strict=True):
        steps_M, limit_M = curves.curve(f"{name}_limit")
        if len(steps_M):
            axes.plot(steps_M, limit_M, "--", color=drawing.FAINT, lw=0.9)
            axes.set_yscale("log")
    return figure


def draw_sequence(curves: RunCurves) -> Figure | None:
    """Patches that a step's queries and keys were made of, and its operations."""
    names = {
        "query_patches": "patches of a query",
        "key_patches": "patches of a key",
        "operations": "floating-point operations a step",
    }
    return _draw_stack(curves, names)


def draw_layers(curves: RunCurves) -> Figure | None:
    """Largest gradient of each layer group over its usual one, layer by step."""
    if curves.signals is None:
        return None
    groups, heat_GC = gradient_heat(curves.signals)
    if not np.isfinite(heat_GC).any():
        return None
    steps_T = curves.signals.steps
    height = 0.7 + 0.14 * len(groups)
    figure, (axes,) = drawing.stack_panels(1, "", height=height, grid=False)
    image = axes.imshow(
        heat_GC,
        aspect="auto",
        cmap=matplotlib.colormaps["OrRd"].with_extremes(bad="#eceff1"),
        vmin=0,
        vmax=1.5,
        extent=(int(steps_T[0]), int(steps_T[-1]), len(groups) - 0.5, -0.5),
        interpolation="nearest",
    )
    axes.set_yticks(*group_ticks(groups), fontsize=7)
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", aspect=40, pad=0.02)
    bar.set_ticks([0, 0.5, 1, 1.5], labels=["1x", "3x", "10x", "32x or more"])
    return figure


def _one_panel(y: str) -> tuple[Figure, Axes]:
    figure, (axes,) = drawing.stack_panels(1, y, height=_HEIGHT)
    return figure, axes


def _draw_stack(
    curves: RunCurves, names: dict[str, str], log: tuple[str, ...] = ()
) -> Figure | None:
    """A panel for each of the curves that the run has and that are not zero throughout."""
    labels = {name: label for name, label in names.items() if curves.curve(name)[1].any()}
    if not labels:
        return None
    figure, panels = drawing.stack_panels(len(labels), "")
    for index, (axes, (name, label)) in enumerate(zip(panels, labels.items(), strict=True)):
        _draw_curve(axes, curves, name, index)
        drawing.set_title(axes, label)
        if name in log:
            axes.set_yscale("log")
    return figure


def _draw_curve(axes: Axes, curves: RunCurves, name: str, colour: int, label: str = "") -> bool:
    """Draw a curve; a long one as the median of each stretch in its range."""
    steps_M, values_M = curves.curve(name)
    if not len(steps_M):
        return False
    steps_C, low_C, middle_C, high_C = shorten_curve(steps_M, values_M)
    shade = drawing.COLOURS[colour]
    if _differ(low_C, high_C):
        axes.fill_between(steps_C, low_C, high_C, color=shade, alpha=0.25, lw=0)
    mark = "o" if len(steps_C) == 1 else None
    axes.plot(steps_C, middle_C, color=shade, label=label or None, marker=mark)
    return True


def _differ(low_C: Array, high_C: Array) -> bool:
    return bool(np.any(low_C != high_C))
