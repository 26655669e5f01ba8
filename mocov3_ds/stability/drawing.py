"""How are a study's pictures drawn and saved? Panels with one style, narrow enough for a phone."""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mocov3_ds.data.storage import atomic

WIDTH = 4.7  # inches: text of 9 points stays readable on a phone
COLOURS = ("#2a6fb0", "#c8553d", "#3a8f5c", "#8a5fb5", "#b07d12", "#4f6475", "#c2528b", "#0f8b8d")
FAINT, SHADE, INK = "#9aa3ad", "#c8553d", "#1b1f24"
_DOTS_PER_INCH = 140
_SHORT_LABEL = 26  # letters, of which two columns fit side by side
_LINE = 60  # letters of a line of a title
_LONGEST_TEXT = 110  # letters of a title

STYLE: dict[Any, Any] = {
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


def assign_colours(names: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """A colour for each name, in order; they repeat after eight."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def stack_panels(
    count: int,
    y: str,
    *,
    x: str = "step",
    height: float = 1.35,
    share_y: bool = False,
    grid: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A figure of panels below each other, each `height` inches, with a common x axis."""
    with matplotlib.rc_context({**STYLE, "axes.grid": grid}):
        figure = Figure((WIDTH, 0.35 + height * count), layout="constrained")
        panels = figure.subplots(count, 1, sharex=True, sharey=share_y, squeeze=False)[:, 0]
        for axes in panels:
            axes.margins(x=0.01)
        panels[-1].set_xlabel(x)
        if y:
            figure.supylabel(y, fontsize=8.5)
    return figure, list(panels)


def plain_text(text: str, longest: int = _LONGEST_TEXT) -> str:
    """A name as text of a picture: one line, no mathematics between dollar signs, not too long.

    Matplotlib leaves curves whose names begin with an underscore out of legends, so a space is put
    before it.
    """
    return _escape(_one_line(text, longest))


def _one_line(text: str, longest: int) -> str:
    readable = text.encode("utf-8", "backslashreplace").decode()
    line = "".join(letter if letter.isprintable() else " " for letter in readable)
    line = f" {line}" if line.startswith("_") else line
    return f"{line[: longest - 1]}\N{HORIZONTAL ELLIPSIS}" if len(line) > longest else line


def _escape(text: str) -> str:
    return text.replace("$", r"\$")


def set_title(axes: Axes, text: str) -> None:
    """Give a panel its title, smaller and in lines where it is long."""
    line = _one_line(text, _LONGEST_TEXT)
    lines = textwrap.wrap(line, _LINE) if len(line) > _LINE else [line]
    size = 8.5 if len(line) < _LINE else 7.2
    axes.set_title("\n".join(map(_escape, lines)), loc="left", fontweight="bold", fontsize=size)


def legend_below(figure: Figure, axes: Axes) -> None:
    """Explain the curves of a panel below all panels, where nothing is covered."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 1 if max(map(len, labels)) > _SHORT_LABEL else 2
        figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def as_png(figure: Figure) -> bytes:
    """A PNG of few colours, small enough to be part of a page."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # of a name
        figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    buffer.seek(0)
    with Image.open(buffer) as image:
        small = image.convert("RGB").quantize(
            64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return out.getvalue()


def write_png(path: Path, data: bytes) -> None:
    """Write a picture, whole or not at all."""
    with atomic.replace_when_whole(path) as temporary:
        temporary.write_bytes(data)
