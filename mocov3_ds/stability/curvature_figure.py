"""How sharp is the loss of each arm, and how noisy its gradient? One panel a quantity.

Measured with `--signals.sharpness_every` and `--signals.noise_every`.
"""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mocov3_ds.monitoring.signal_file import SignalTable
from mocov3_ds.stability import drawing
from mocov3_ds.stability.study import Arms

QUANTITIES = {
    "sharpness": "Preconditioned sharpness; dashed: limit of Adam",
    "curvature": "Curvature along the step; dashed: limit",
    "noise_scale": "Gradient noise scale, images",
}
_HEIGHT = 1.9  # inches of a panel
_OTHER_SEEDS = 0.45  # opacity of their lines


def draw_curvature(arms: Arms) -> Figure | None:
    """Sharpness, curvature and noise scale over the steps: one colour an arm, one line a seed."""
    tables = {
        label: [run.signals for run in runs if run.signals is not None]
        for label, runs in arms.items()
    }
    names = [
        name for name in QUANTITIES if any(_has(t, name) for ts in tables.values() for t in ts)
    ]
    if not names:
        return None
    colours = drawing.assign_colours(arms)
    figure, panels = drawing.stack_panels(len(names), "", height=_HEIGHT)
    with matplotlib.rc_context(drawing.STYLE):
        for axes, name in zip(panels, names, strict=True):
            _draw_quantity(axes, name, tables, colours)
            drawing.set_title(axes, QUANTITIES[name])
            axes.set_yscale("log")
        # a quantity may be known of some arms alone
        drawing.legend_below(
            figure, max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[0]))
        )
    return figure


def _draw_quantity(
    axes: Axes,
    name: str,
    tables: Mapping[str, Sequence[SignalTable]],
    colours: Mapping[str, str],
) -> None:
    limit_name = f"{name}_limit"
    for label, arm in tables.items():
        for index, table in enumerate(arm):
            colour, opacity = colours[label], _OTHER_SEEDS if index else 1.0
            text = "" if index else drawing.plain_text(label, 48)
            if _has(table, name):
                axes.plot(
                    *table.measured(name), "o-", ms=2.5, color=colour, alpha=opacity, label=text
                )
            if _has(table, limit_name) and not index:
                axes.plot(*table.measured(limit_name), "--", color=drawing.FAINT, lw=0.9)


def _has(table: SignalTable, name: str) -> bool:
    """Whether a quantity was measured often enough for a line."""
    return name in table.scalars and len(table.measured(name)[0]) > 1
