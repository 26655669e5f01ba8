"""What does each of the paper's recipes take on eight cards, with sequences compressed or not?

Computed by the planner, as `mocov3 plan --recipe NAME --gpus 8xCARD --compress SCHEDULE` prints it;
nothing is trained.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from mocov3_ds.config.compression import READY
from mocov3_ds.planning.cards import PRESETS
from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.hardware import read_cluster
from mocov3_ds.planning.options import rank_options
from mocov3_ds.planning.pace import DECODE_CPU_S, IMAGENET, STORAGE_CPU_S
from mocov3_ds.planning.run_time import plan_run_time

_IN_FP16 = ("bf16.enabled=false", "fp16.enabled=true")
_CARDS = "V100-32GB", "RTX3090", "RTX4090", "L40S", "A100-80GB", "H100-80GB", "H200", "RTX5090"


@dataclass(frozen=True, kw_only=True)
class RecipeHours:
    """What is computed."""

    recipes: tuple[str, ...] = ("vit_s16", "vit_b16", "vit_l16", "vit_h14")
    """recipes, at their own batch and epochs of ImageNet-1k"""
    cards: tuple[str, ...] = _CARDS
    """kinds of cards, eight of each in one machine (mocov3 plan --list); fp16 where no bf16"""
    schedules: tuple[str, ...] = tuple(READY)
    """values of --compress"""


def run_bench(options: RecipeHours) -> None:
    """Print the table, row by row."""
    for row in tabulate_hours(options):
        print(row, flush=True)


def tabulate_hours(options: RecipeHours) -> Iterator[str]:
    """Rows of a table of hours (low to high), card hours, and CPU cores that feed the cards.

    Args:
        options: recipes, cards and schedules.
    """
    heads = [f"{schedule}: hours | card hours | cores" for schedule in options.schedules]
    yield f"| recipe | eight | {' | '.join(heads)} |"
    yield "|---|---|" + "---|---|---|" * len(heads)
    for recipe in options.recipes:
        for card in options.cards:
            cells = [plan_cells(recipe, card, schedule) for schedule in options.schedules]
            yield f"| {recipe} | {card} | {' | '.join(cells)} |"


def plan_cells(recipe: str, card: str, schedule: str) -> str:
    """Hours of the fastest option that fits, card hours, and cores that read and decode in time.

    Args:
        recipe: name of the recipe.
        card: name of a preset.
        schedule: value of `--compress`, a name or points.
    """
    cluster = read_cluster(f"8x{card}")
    overrides = () if PRESETS[card].bf16 else _IN_FP16
    planned = plan_run(recipe, overrides=overrides, compress=schedule)
    pace = rank_options(planned, cluster)[0].pace
    if pace is None:
        return "does not fit | - | -"
    time = plan_run_time(planned, pace, cluster, epochs=planned.epochs, images=IMAGENET, cores=0)
    cores = ceil(planned.batch * (DECODE_CPU_S + STORAGE_CPU_S) / time.shortest_step_s)
    middle, low, high = map(_round, (time.hours, time.low_hours, time.high_hours))
    return f"{middle} ({low} to {high}) | {cluster.cards * time.hours:,.0f} | {cores}"


def _round(hours: float) -> str:
    return f"{hours:.1f}" if hours < 10 else f"{hours:,.0f}"
