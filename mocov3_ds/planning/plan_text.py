"""A plan for people: text, JSON and a picture of what fills a card."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mocov3_ds.planning.hardware import GIB, MARGIN, MOVES, Cluster
from mocov3_ds.planning.memory import Memory, Part
from mocov3_ds.planning.options import Option, Wish, weights_in_millions
from mocov3_ds.planning.pace import DECODE_CPU_S, IMAGE_BYTES, IMAGENET, STORAGE_CPU_S, Pace

_BAR = 60
"""characters of the bar of a full card"""


def text(wish: Wish, cluster: Cluster, options: list[Option], price: float, launch: str) -> str:
    """The whole plan; `options` as `fitting_options` gave them, `price` per card and hour."""
    best = options[0]
    assert best.pace is not None
    parts = [
        headline(wish, cluster),
        "\nAll options, best first:\n",
        table_of_options(options),
        f"\nMemory of a card at its peak ({best.memory.peak}: {_MOMENTS[best.memory.peak]}):\n",
        memory_lines(best.memory, cluster),
        "\nTime of a step:\n",
        time_lines(wish, cluster, best.pace),
        f"\nData: {data_line(best.pace, cluster)}",
        f"\n{hours_lines(wish, cluster, best.pace, price)}",
        f"\nStart it:\n\n    {launch}",
    ]
    return "\n".join(parts)


_MOMENTS = {
    "keys": "a chunk of keys passes while the queries wait",
    "loss": "queries meet keys",
    "heads": "the backward leaves the heads",
    "turn": "the backward reaches the backbone",
    "middle": "the whole gradient has gathered",
    "reduce": "a bucket of gradients is copied to be reduced",
    "update": "the optimizer is given its gradient",
}


def headline(wish: Wish, cluster: Cluster) -> str:
    """What is planned."""
    vit = wish.shape.vit
    return (
        f"{wish.recipe}: ViT {vit.dim} x {vit.depth} blocks ({weights_in_millions(wish):.1f} M "
        f"weights with heads), global batch {wish.batch} on {cluster.words}, "
        f"{wish.batch // cluster.cards} images a rank, {wish.precision}, {wish.optimizer}, "
        f"{wish.epochs:g} epochs. Computed, not measured."
    )


def table_of_options(options: list[Option]) -> str:
    """One line an option, as markdown."""
    lines = [
        "| ZeRO | passes | GiB a card | images/s | MFU, % | s a step | why, why not |",
        "|---|---|---|---|---|---|---|",
    ]
    for option in options:
        speed = "- | - | -"
        if option.pace is not None:
            pace = option.pace
            speed = f"{pace.images_per_s:.0f} | {100 * pace.mfu:.1f} | {pace.step:.3g}"
        lines.append(
            f"| {option.stage} | {option.passes} | {option.memory.total / GIB:.2f} | {speed} "
            f"| {option.why} |"
        )
    return "\n".join(lines)


def memory_lines(memory: Memory, cluster: Cluster) -> str:
    """Each part with its bar; what is not alive at the peak in brackets."""
    lines = []
    for part in memory.parts:
        if part.bytes < 1:
            continue
        gib = part.bytes / GIB
        there = memory.peak in part.alive
        number = f"{gib:9.3f}" if there else f"({gib:.3f})".rjust(10)[-10:]
        bar = "#" * round(_BAR * part.bytes / cluster.card.memory) if there else ""
        lines.append(f"  {part.name:<30}{number:>11}  {bar}".rstrip())
    margin = cluster.card.memory - cluster.card.reserved - cluster.usable
    lines += [
        f"  {'sum at the peak':<30}{memory.total / GIB:>11.3f}  of {cluster.usable / GIB:.1f} GiB "
        "that may be filled",
        f"  {'context, collectives (assumed)':<30}{cluster.card.reserved / GIB:>11.3f}",
        f"  {f'margin ({1 - MARGIN:.0%})':<30}{margin / GIB:>11.3f}",
        f"  {'card':<30}{cluster.card.memory / GIB:>11.3f}",
    ]
    return "\n".join(lines)


def time_lines(wish: Wish, cluster: Cluster, pace: Pace) -> str:
    """Where the time goes, and what the rates rest on."""
    card = cluster.card
    rate = card.full if wish.precision == "fp32" else card.low
    lines = [
        f"  {'matrix products':<30}{pace.compute:>11.4f} s  "
        f"{card.reach:.0%} of {rate / 1e12:g} TFLOP/s ({card.reach_source})",
        f"  {'norms, GELU, residuals':<30}{pace.memory:>11.4f} s  "
        f"{MOVES:.0%} of {card.bandwidth / 1e9:g} GB/s (assumed)"
        if not card.moves
        else f"  {'norms, GELU, residuals':<30}{pace.memory:>11.4f} s  "
        f"{card.moves / 1e9:.1f} GB/s (measured)",
        f"  {'optimizer, momentum encoder':<30}{pace.update:>11.4f} s",
    ]
    ranks = cluster.cards
    for collective, seconds in pace.wire:
        megabytes = collective.wire_bytes(ranks) / 1e6
        calls = f"{collective.calls} x {collective.operation}"
        lines.append(
            f"  {collective.purpose:<30}{seconds:>11.4f} s  {megabytes:.3f} MB a link, {calls}"
        )
    lines.append(
        f"  {'step':<30}{pace.step:>11.4f} s  {pace.images_per_s:.0f} images/s, MFU "
        f"{100 * pace.mfu:.1f} %, {100 * pace.communication / pace.step:.1f} % communication "
        "(nothing overlaps)"
    )
    return "\n".join(lines)


def data_line(pace: Pace, cluster: Cluster) -> str:
    """What the loaders of all machines must give."""
    a_node = f" ({pace.loader_cores / cluster.nodes:.1f} a machine)" * (cluster.nodes > 1)
    return (
        f"{pace.read_mb_per_s:.0f} MB/s of JPEG ({IMAGE_BYTES / 1e3:.0f} kB an image) and "
        f"{pace.loader_cores:.1f} CPU cores{a_node} to read and decode "
        f"({(DECODE_CPU_S + STORAGE_CPU_S) * 1e3:.2f} ms of CPU an image, BENCHMARKS.md)"
    )


def hours_lines(wish: Wish, cluster: Cluster, pace: Pace, price: float) -> str:
    """Hours of 100 epochs and of the recipe's, and what they cost."""
    lines = []
    for epochs in dict.fromkeys((100.0, wish.epochs)):
        hours = pace.hours(epochs)
        cost = f", {hours * cluster.cards * price:,.0f} at {price:g} a card and hour" * bool(price)
        lines.append(
            f"{epochs:g} epochs of {IMAGENET:,} images: {hours:.1f} hours, "
            f"{hours * cluster.cards:,.0f} card hours{cost}"
        )
    return "\n".join(lines)


def as_json(wish: Wish, cluster: Cluster, options: list[Option], price: float, launch: str) -> Any:
    """The same as plain values; bytes, seconds, bytes a second."""
    return {
        "recipe": wish.recipe,
        "batch": wish.batch,
        "epochs": wish.epochs,
        "precision": wish.precision,
        "optimizer": wish.optimizer,
        "hardware": {
            "card": cluster.card.name,
            "cards": cluster.cards,
            "nodes": cluster.nodes,
            "memory": cluster.card.memory,
            "usable": cluster.usable,
            "reach": cluster.card.reach,
            "reach_source": cluster.card.reach_source,
            "link": cluster.link,
        },
        "options": [_option(wish, cluster, option, price) for option in options],
        "launch": launch,
    }


def _option(wish: Wish, cluster: Cluster, option: Option, price: float) -> dict[str, Any]:
    memory, pace = option.memory, option.pace
    found: dict[str, Any] = {
        "stage": option.stage,
        "fits": option.fits,
        "recompute_blocks": option.recompute_blocks,
        "chunk": option.chunks.size,
        "keep_chunks": option.chunks.kept,
        "why": option.why,
        "memory": {
            "total": memory.total,
            "peak": memory.peak,
            "parts": {part.name: part.bytes for part in memory.parts},
        },
    }
    if pace is not None:
        found |= {
            "step_s": pace.step,
            "images_per_s": pace.images_per_s,
            "mfu": pace.mfu,
            "communication": {
                collective.purpose: {
                    "operation": collective.operation,
                    "calls": collective.calls,
                    "payload": collective.payload,
                    "wire": collective.wire_bytes(cluster.cards),
                    "seconds": seconds,
                }
                for collective, seconds in pace.wire
            },
            "read_mb_per_s": pace.read_mb_per_s,
            "loader_cores": pace.loader_cores,
            "hours_of_100_epochs": pace.hours(100),
            "hours": pace.hours(wish.epochs),
            "cost": pace.hours(wish.epochs) * cluster.cards * price,
        }
    return found


_COLOURS = (
    "#31688e",
    "#26828e",
    "#35b779",
    "#6ece58",
    "#b5de2b",
    "#fde725",
    "#e6a93a",
    "#d8633b",
    "#b63679",
    "#721f81",
    "#3b528b",
    "#443983",
)


def picture(path: Path, wish: Wish, cluster: Cluster, options: list[Option]) -> None:
    """A bar for the best option of each stage: what fills a card at the peak."""
    chosen: dict[int, Option] = {}
    for option in options:
        chosen.setdefault(option.stage, option)
    parts = _large_parts(list(chosen.values()), cluster)
    colours = dict(zip(parts, _COLOURS, strict=False))
    width, bar, left = 1180, 34, 300
    height = 90 + 60 * len(chosen) + 22 * ((len(parts) + 2) // 2) + 20
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    draw.text((20, 16), headline(wish, cluster).partition(", global")[0], "black", font)
    draw.text((20, 38), f"global batch {wish.batch} on {cluster.words}", "black", font)
    longest = max([cluster.card.memory, *(option.memory.total for option in chosen.values())])
    scale = (width - left - 90) / longest
    for row, (stage, option) in enumerate(sorted(chosen.items())):
        top, x = 80 + 60 * row, float(left)
        draw.text((20, top), f"ZeRO-{stage}", "black", font)
        draw.text((20, top + 18), option.passes if option.fits else "does not fit", "gray", font)
        for name, size in _at_peak(option.memory, parts).items():
            draw.rectangle((x, top, x + size * scale, top + bar), fill=colours[name])
            x += size * scale
        draw.text((20, top + 36), f"{option.memory.total / GIB:.1f} GiB", "black", font)
        for line, colour in ((cluster.usable, "gray"), (cluster.card.memory, "black")):
            at = left + line * scale
            draw.line((at, top - 5, at, top + bar + 5), fill=colour, width=2)
    top = 80 + 60 * len(chosen)
    for index, (name, colour) in enumerate(colours.items()):
        x, y = 20 + 520 * (index % 2), top + 22 * (index // 2)
        draw.rectangle((x, y + 3, x + 14, y + 15), fill=colour)
        draw.text((x + 22, y), name, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _large_parts(options: list[Option], cluster: Cluster) -> list[str]:
    """The parts that can be seen, in the order of memory, then the rest as one."""
    largest: dict[str, float] = {}
    for option in options:
        for part in option.memory.parts:
            if option.memory.peak in part.alive:
                largest[part.name] = max(largest.get(part.name, 0.0), part.bytes)
    seen = [name for name, size in largest.items() if size > 0.004 * cluster.card.memory]
    return [*seen[: len(_COLOURS) - 1], "the rest"]


def _at_peak(memory: Memory, parts: list[str]) -> dict[str, float]:
    sizes = dict.fromkeys(parts, 0.0)

    def name_of(part: Part) -> str:
        return part.name if part.name in sizes else "the rest"

    for part in memory.parts:
        if memory.peak in part.alive:
            sizes[name_of(part)] += part.bytes
    return sizes
