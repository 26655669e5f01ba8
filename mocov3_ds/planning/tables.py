"""What fits where, and how long does each recipe take? Tables over many plans, as markdown."""

from collections.abc import Callable

from mocov3_ds.planning.cards import GIB
from mocov3_ds.planning.hardware import Cluster, read_cluster
from mocov3_ds.planning.options import Option, PlannedRun, rank_options
from mocov3_ds.planning.pace import IMAGENET
from mocov3_ds.planning.run_time import plan_run_time
from mocov3_ds.recipes import RECIPES

_MACHINES = ("8xRTX4090", "8xA100-80GB", "8xH100-80GB")


def tabulate_fits(runs: list[PlannedRun]) -> str:
    """Chunk, stage and GiB of the fastest option for 8 to 64 cards of 24, 40 and 80 GB."""
    lines = ["| recipe | batch | cards | 24 GB | 40 GB | 80 GB |", "|---|---|---|---|---|---|"]
    for planned in runs:
        for cards in (8, 16, 32, 64):
            cells = []
            for memory in (24, 40, 80):
                cluster = read_cluster(f"{cards}x{memory}GB")
                cells.append(_format_option(rank_options(planned, cluster)[0]))
            lines.append(f"| {planned.recipe} | {planned.batch} | {cards} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _format_option(best: Option) -> str:
    if not best.fits:
        return "does not fit"
    return f"ZeRO-{best.setup.stage}, {best.passes}: {best.memory.peak_bytes / GIB:.1f}"


def tabulate_recipes(plan_recipe: Callable[[str], PlannedRun]) -> str:
    """Each paper recipe: command, hours on eight cards of three kinds, the paper's accuracy.

    Args:
        plan_recipe: gives what a recipe trains, by the recipe's name.
    """
    lines = [
        f"| recipe | command | hours on {', on '.join(_MACHINES)} | the paper's accuracy |",
        "|---|---|---|---|",
    ]
    for name, recipe in RECIPES.items():
        if not name.startswith("vit_"):
            continue
        planned = plan_recipe(name)
        hours = [_format_hours(planned, read_cluster(machine)) for machine in _MACHINES]
        lines.append(
            f"| {name}, {planned.epochs:g} epochs | `deepspeed mocov3_ds/train.py --recipe {name} "
            f"--data.shards SHARDS` | {', '.join(hours)} | {recipe.paper} |"
        )
    return "\n".join(lines)


def _format_hours(planned: PlannedRun, cluster: Cluster) -> str:
    pace = rank_options(planned, cluster)[0].pace
    if pace is None:
        return "-"
    time = plan_run_time(planned, pace, cluster, epochs=planned.epochs, images=IMAGENET, cores=0)
    return f"{time.hours:.0f} ({time.low_hours:.0f} to {time.high_hours:.0f})"
