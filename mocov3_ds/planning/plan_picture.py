"""What fills a card? A picture with one bar for the best option of each ZeRO stage."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mocov3_ds.planning.cards import GIB
from mocov3_ds.planning.memory import Memory
from mocov3_ds.planning.options import Option
from mocov3_ds.planning.plan_text import Plan, headline

_REST = "the rest"
"""one name for all items that are too small to be seen"""
_SEEN, _NUMBERED = 0.004, 0.05
"""shares of a card from which on an item has a colour, and its GiB stand in the bar"""
_COLOURS = (
    *("#31688e", "#26828e", "#35b779", "#6ece58", "#b5de2b", "#fde725"),
    *("#e6a93a", "#d8633b", "#b63679", "#721f81", "#3b528b", "#443983"),
)


def draw_plan(path: Path, plan: Plan) -> None:
    """Write the picture as a PNG.

    Args:
        path: the file to write; its folder is made if it does not exist.
        plan: run, cluster and options.
    """
    figure = picture_plan(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def picture_plan(plan: Plan) -> Figure:
    """The picture: GiB to the right, a bar a stage, lines at what a card has and may hold."""
    best_of_stage: dict[int, Option] = {}
    for option in plan.options:
        best_of_stage.setdefault(option.setup.stage, option)
    options = [option for _, option in sorted(best_of_stage.items())]
    card = plan.cluster.card.memory_bytes
    names = _visible_items(options, card)
    colours = dict(zip(names, _COLOURS, strict=False))
    figure = Figure(figsize=(11, 2.2 + 0.62 * len(options)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for row, option in enumerate(options):
        _draw_bar(axes, row, option.memory, colours, card)
    title = headline(plan.planned, plan.cluster).partition(", global")[0]
    batch = f"global batch {plan.planned.batch} on {plan.cluster.title}"
    axes.set_title(f"{title}\n{batch}", loc="left")
    axes.set_yticks(range(len(options)), [_name_bar(option) for option in options])
    axes.invert_yaxis()
    axes.set_xlabel("GiB of a card at the peak of a step")
    limits = {"card": card, "may be filled": plan.cluster.usable_bytes}
    for name, limit in limits.items():
        axes.axvline(limit / GIB, color="black", linestyle="-" if name == "card" else "--")
        axes.annotate(
            f"{name}: {limit / GIB:.1f}",
            (limit / GIB, 0.99),
            xycoords=("data", "axes fraction"),
            xytext=(3 if name == "card" else -3, 0),
            textcoords="offset points",
            ha="left" if name == "card" else "right",
            va="top",
            fontsize=8,
        )
    largest = max([card, *(option.memory.peak_bytes for option in options)])
    axes.set_xlim(0, 1.12 * largest / GIB)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_bar(
    axes: Axes, row: int, memory: Memory, colours: Mapping[str, str], card: float
) -> None:
    """One option: its items side by side, then its sum.

    Args:
        axes: the picture to draw on.
        row: number of the bar, from the top.
        memory: what the option needs.
        colours: colour of each item that is drawn, by name.
        card: bytes of a card.
    """
    filled = 0.0
    for name, size in _bytes_at_peak(memory, colours).items():
        # an item's name stands in the legend once
        label = name if row == 0 else f"_{name}"
        axes.barh(row, size / GIB, 0.55, left=filled / GIB, color=colours[name], label=label)
        if size > _NUMBERED * card:
            middle = (filled + size / 2) / GIB
            axes.text(middle, row, f"{size / GIB:.1f}", ha="center", va="center", fontsize=8)
        filled += size
    axes.text(filled / GIB, row, f" {memory.peak_bytes / GIB:.1f}", va="center", fontweight="bold")


def _name_bar(option: Option) -> str:
    passes = option.passes if option.fits else "does not fit"
    return f"ZeRO-{option.setup.stage}\n{passes}"


def _visible_items(options: list[Option], card: float) -> list[str]:
    """Names of the items large enough to be seen, in the order of memory, then `the rest`."""
    largest: dict[str, float] = {}
    for option in options:
        for item in option.memory.items:
            if option.memory.peak_phase in item.alive:
                largest[item.name] = max(largest.get(item.name, 0.0), item.bytes)
    names = [name for name, size in largest.items() if size > _SEEN * card]
    return [*names[: len(_COLOURS) - 1], _REST]


def _bytes_at_peak(memory: Memory, names: Mapping[str, str]) -> dict[str, float]:
    """Bytes of each item of `names` in the peak phase; all others are summed up as the rest."""
    sizes = dict.fromkeys(names, 0.0)
    for item in memory.items:
        if memory.peak_phase in item.alive:
            sizes[item.name if item.name in sizes else _REST] += item.bytes
    return sizes
