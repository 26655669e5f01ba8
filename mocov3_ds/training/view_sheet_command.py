"""What `mocov3 views` does: a sheet of the views that a training command line, or a run, would get.

Its flags on views are those of train.py, read by the same rules.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mocov3_ds.checkpoints.run_paths import anchor_to_run
from mocov3_ds.config.checks import check_config, check_view_flags
from mocov3_ds.config.parts import ViewConfig
from mocov3_ds.config.run_config import Config
from mocov3_ds.config.stored import from_json
from mocov3_ds.data.views.contact_sheet import draw_contact_sheet
from mocov3_ds.evaluation.labelled_images import shards_of_run
from mocov3_ds.model.shapes import parse_size
from mocov3_ds.recipes import RECIPES, find_recipe, last_value, read_json
from mocov3_ds.settings.bounds import PositiveCount, Seed, check_bounds
from mocov3_ds.settings.paths import expand_home
from mocov3_ds.training.run_data import view_spec


@dataclass(frozen=True, kw_only=True)
class SheetOptions:
    """Draw a sheet of views as training sees them, beside the same draws by Pillow."""

    shards: Annotated[str, tyro.conf.Positional] = ""
    """folder or URL of a sharded set; may be left out with --run, whose own is shown then"""
    run: Path | None = None
    """run folder whose settings are the defaults of all flags below, in the place of a recipe's"""
    recipe: str = "tiny"
    """recipe whose settings are the defaults of the flags on views"""
    seed: Seed = 0
    """seed of the run, which decides the views"""
    out: Path = Path("views.png")
    """PNG file to write"""
    rows: PositiveCount = 8
    """number of samples that are shown, spread evenly over the set"""
    epoch: tuple[int, ...] = (0,)
    """numbers of the passes over the data whose views are shown, from 0"""
    views: ViewConfig = field(default_factory=ViewConfig)


def main() -> int:
    """Run the command; its exit status: 0, or 2 after one error sentence."""
    try:
        options, config = read_flags(sys.argv[1:])
        print(draw_sheet(options, config))  # noqa: T201
    except (ValueError, OSError) as error:
        print(f"mocov3: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def read_flags(arguments: list[str]) -> tuple[SheetOptions, Config]:
    """What is drawn, and the settings of a training run that would see it.

    Args:
        arguments: flags and their values.

    Raises:
        ValueError: no such recipe or run, no shards, or settings of views that cannot be.
        SystemExit: tyro has printed a message of its own (unknown flag, wrong type, --help).
    """
    arguments = expand_home(arguments)
    run, recipe = last_value(arguments, "run"), last_value(arguments, "recipe")
    if run and recipe:
        raise ValueError(
            f"--recipe {recipe} and --run {run} are two beginnings of the settings; give one."
        )
    config = _read_run(Path(run)) if run else find_recipe(recipe or "tiny").config
    defaults = SheetOptions(recipe=config.recipe, seed=config.seed, views=config.views)
    options = tyro.cli(SheetOptions, default=defaults, args=arguments, prog="mocov3 views")
    check_bounds(options)
    if min(options.epoch, default=0) < 0:
        raise ValueError(f"--epoch {min(options.epoch)} is below 0, the number of the first pass.")
    config = dataclasses.replace(config, seed=options.seed, views=options.views)
    check_config(config)
    if config.recipe in RECIPES:
        check_view_flags(config.views, RECIPES[config.recipe].config.views)
    return options, config


def _read_run(run: Path) -> Config:
    """Settings of a run, with the folder in which it lies now."""
    if not (run / "config.json").is_file():
        raise ValueError(f"--run {run} is no run folder: it holds no config.json.")
    config = anchor_to_run(from_json(read_json(run / "config.json")), run)
    return dataclasses.replace(config, runs=run.absolute().parent)


def draw_sheet(options: SheetOptions, config: Config) -> str:
    """Draw the sheet; returns what is to be said of it.

    Args:
        options: flags that say what is drawn.
        config: settings of the run.

    Raises:
        ValueError: no shards are named, a sample cannot be read, or a function fails.
    """
    shards = options.shards
    if not shards and options.run:
        shards, _ = shards_of_run(config, config.runs)
    if not shards:
        raise ValueError("mocov3 views needs SHARDS, a folder or URL of a sharded set, or --run.")
    epochs = [0] if config.views.fixed else [*dict.fromkeys(options.epoch)]
    size, channels = parse_size(config.views.image_size), config.views.channels
    largest = draw_contact_sheet(
        shards,
        options.out,
        rows=options.rows,
        size=size,
        seed=config.seed,
        epochs=epochs,
        spec=view_spec(config),
    )
    origin = f"run {options.run}" if options.run else f"recipe {config.recipe}"
    compared = (
        "the views are those of --views.function, so there is nothing to compare them with"
        if largest is None
        else f"ours differs from the same draws by Pillow by at most {largest} of 255"
    )
    return (
        f"{options.out}: views of {origin}, {size[0]} x {size[1]} pixels, {channels} channels; "
        f"{compared}"
    )
