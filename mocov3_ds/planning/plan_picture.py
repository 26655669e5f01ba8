"""What fills a card? A picture with one bar for the best option of each ZeRO stage."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mocov3_ds.planning.hardware import GIB, Cluster
from mocov3_ds.planning.memory import Memory
from mocov3_ds.planning.options import Option
from mocov3_ds.planning.plan_text import Plan, headline

_WIDTH, _BAR_START, _BAR_HEIGHT, _TOP, _ROW = 1180, 300, 34, 80, 60
"""pixels: of the picture, left of the bars, of a bar, above the bars, from bar to bar"""
_REST = "the rest"
"""one name for all items that are too small to be seen"""
_FONT_SIZE = 15
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
    cluster = plan.cluster
    best_of_stage: dict[int, Option] = {}
    for option in plan.options:
        best_of_stage.setdefault(option.setup.stage, option)
    names = _visible_items(list(best_of_stage.values()), cluster)
    colours = dict(zip(names, _COLOURS, strict=False))
    height = _TOP + _ROW * len(best_of_stage) + 22 * ((len(names) + 2) // 2) + 30
    image = Image.new("RGB", (_WIDTH, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT_SIZE)
    draw.text((20, 16), headline(plan.planned, cluster).partition(", global")[0], "black", font)
    draw.text((20, 38), f"global batch {plan.planned.batch} on {cluster.title}", "black", font)
    largest = [option.memory.peak_bytes for option in best_of_stage.values()]
    scale = (_WIDTH - _BAR_START - 90) / max([cluster.card.memory_bytes, *largest])
    for row, (_, option) in enumerate(sorted(best_of_stage.items())):
        _draw_bar(draw, option, cluster, colours, top=_TOP + _ROW * row, scale=scale)
    _draw_legend(draw, colours, top=_TOP + _ROW * len(best_of_stage))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _draw_bar(
    draw: ImageDraw.ImageDraw,
    option: Option,
    cluster: Cluster,
    colours: Mapping[str, str],
    *,
    top: int,
    scale: float,
) -> None:
    """One option: its name, its items side by side, and lines at what may be filled and what is.

    Args:
        draw: the picture to draw on.
        option: the option that is drawn.
        cluster: tells the memory of a card.
        colours: colour of each item that is drawn, by name.
        top: pixels above the bar.
        scale: pixels for each byte.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    passes = option.passes if option.fits else "does not fit"
    draw.text((20, top), f"ZeRO-{option.setup.stage}", "black", font)
    draw.text((20, top + 18), passes, "gray", font)
    x = float(_BAR_START)
    for name, size in _bytes_at_peak(option.memory, colours).items():
        draw.rectangle((x, top, x + size * scale, top + _BAR_HEIGHT), fill=colours[name])
        x += size * scale
    draw.text((20, top + 36), f"{option.memory.peak_bytes / GIB:.1f} GiB", "black", font)
    for limit, colour in ((cluster.usable_bytes, "gray"), (cluster.card.memory_bytes, "black")):
        x = _BAR_START + limit * scale
        draw.line((x, top - 5, x, top + _BAR_HEIGHT + 5), fill=colour, width=2)


def _draw_legend(draw: ImageDraw.ImageDraw, colours: Mapping[str, str], *, top: int) -> None:
    font = ImageFont.load_default(_FONT_SIZE)
    for index, (name, colour) in enumerate(colours.items()):
        x, y = 20 + 520 * (index % 2), top + 22 * (index // 2)
        draw.rectangle((x, y + 3, x + 14, y + 15), fill=colour)
        draw.text((x + 22, y), name, "black", font)


def _visible_items(options: list[Option], cluster: Cluster) -> list[str]:
    """Names of the items large enough to be seen, in the order of memory, then `the rest`."""
    largest: dict[str, float] = {}
    for option in options:
        for item in option.memory.items:
            if option.memory.peak_phase in item.alive:
                largest[item.name] = max(largest.get(item.name, 0.0), item.bytes)
    smallest = 0.004 * cluster.card.memory_bytes
    names = [name for name, size in largest.items() if size > smallest]
    return [*names[: len(_COLOURS) - 1], _REST]


def _bytes_at_peak(memory: Memory, names: Mapping[str, str]) -> dict[str, float]:
    """Bytes of each item of `names` in the peak phase; all others are summed up as the rest."""
    sizes = dict.fromkeys(names, 0.0)
    for item in memory.items:
        if memory.peak_phase in item.alive:
            sizes[item.name if item.name in sizes else _REST] += item.bytes
    return sizes
