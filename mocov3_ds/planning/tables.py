"""Tables over many plans: what fits where, and each recipe with its command and hours."""

from collections.abc import Callable

from mocov3_ds.config import RECIPES
from mocov3_ds.planning.hardware import GIB, read_cluster
from mocov3_ds.planning.options import Option, Wish, all_options

_MACHINES = ("8xRTX4090", "8xA100-80GB", "8xH100-80GB")


def what_fits(wishes: list[Wish]) -> str:
    """Chunk, stage and GiB of the fastest option for 8 to 64 cards of 24, 40 and 80 GB."""
    lines = [
        "| recipe | batch | cards | 24 GB | 40 GB | 80 GB |",
        "|---|---|---|---|---|---|",
    ]
    for wish in wishes:
        for cards in (8, 16, 32, 64):
            cells = []
            for memory in (24, 40, 80):
                cluster = read_cluster(f"{cards}x{memory}GB")
                cells.append(_cell(all_options(wish, cluster)[0]))
            lines.append(f"| {wish.recipe} | {wish.batch} | {cards} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(best: Option) -> str:
    if not best.fits:
        return "does not fit"
    return f"ZeRO-{best.stage}, {best.passes}: {best.memory.total / GIB:.1f}"


def recipes(wish_of: Callable[[str], Wish]) -> str:
    """Each paper recipe: command, hours on eight cards of three kinds, the paper's accuracy."""
    lines = [
        f"| recipe | command | hours on {', on '.join(_MACHINES)} | the paper's accuracy |",
        "|---|---|---|---|",
    ]
    for name, recipe in RECIPES.items():
        if not name.startswith("vit_"):
            continue
        wish = wish_of(name)
        hours = []
        for machine in _MACHINES:
            pace = all_options(wish, read_cluster(machine))[0].pace
            hours.append("-" if pace is None else f"{pace.hours(wish.epochs):.0f}")
        lines.append(
            f"| {name}, {wish.epochs:g} epochs | `deepspeed mocov3_ds/train.py --recipe {name} "
            f"--data.shards SHARDS` | {', '.join(hours)} | {recipe.paper} |"
        )
    return "\n".join(lines)
