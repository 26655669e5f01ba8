"""From the flags of `mocov3 plan` to a plan."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from mocov3_ds.config.checks import check_batch
from mocov3_ds.config.compression import OFF, check_last_step, check_patches, read_schedule
from mocov3_ds.config.run_config import encoder_shape
from mocov3_ds.distributed.engine_config import engine_config
from mocov3_ds.distributed.engine_keys import read_settings
from mocov3_ds.optim.arguments import check_number
from mocov3_ds.optim.build import check_block
from mocov3_ds.planning import plan_text, tables
from mocov3_ds.planning.architecture import patches_of
from mocov3_ds.planning.calibrate import calibrate
from mocov3_ds.planning.cards import PRESETS, Card, describe_own_card, format_presets
from mocov3_ds.planning.critical_batch import describe_critical_batch, find_noise_scale
from mocov3_ds.planning.flags import PlanOptions
from mocov3_ds.planning.hardware import Cluster, read_cluster
from mocov3_ds.planning.measured_card import is_gpu_file, read_rates
from mocov3_ds.planning.options import STAGES, Option, PlannedRun
from mocov3_ds.planning.pace import IMAGENET
from mocov3_ds.planning.plan_picture import draw_plan
from mocov3_ds.planning.plan_text import Plan
from mocov3_ds.planning.remedies import fitting_options
from mocov3_ds.planning.run_time import count_steps
from mocov3_ds.recipes import find_recipe, read_json, with_overrides

_TABLE_RECIPES = ("vit_b16", "vit_l16", "vit_h14")
_TABLE_BATCHES = (4096, 8192, 16384)


def run_plan(options: Annotated[PlanOptions, tyro.conf.arg(name="")]) -> None:
    """Print what the flags ask for.

    Args:
        options: run and cluster, and what to tell of them.

    Raises:
        ValueError: flags that cannot be, or not together.
    """
    if options.calibrate is not None and is_gpu_file(options.calibrate):
        options = replace(options, rates=options.calibrate, calibrate=None)
    _check_alone(options)
    if options.calibrate is not None:
        print(json.dumps(calibrate(options.calibrate), indent=2))
    elif options.presets:
        print(format_presets())
    elif options.what_fits:
        print(
            tables.tabulate_fits(
                [plan_run(name, batch=b) for name in _TABLE_RECIPES for b in _TABLE_BATCHES]
            )
        )
    elif options.critical_batch:
        noise = find_noise_scale(options.critical_batch)
        if noise.batch and options.recipe != PlanOptions.recipe:
            raise ValueError(
                f"--recipe {options.recipe} would have no effect beside --critical_batch "
                f"{options.critical_batch}: the run tells its own batch, {noise.batch}."
            )
        recipe_batch = find_recipe(options.recipe).config.batch
        batch = options.batch or noise.batch or recipe_batch
        check_batch(batch)
        print(describe_critical_batch(noise, batch))
    elif options.recipes:
        print(tables.tabulate_recipes(plan_run))
    else:
        _print_plan(options)


def _check_alone(options: PlanOptions) -> None:
    """Refuse what has no effect beside a flag that has its own answer.

    Raises:
        ValueError: such a flag is not alone.
    """
    renamed = {"as_json": "json", "presets": "list"}
    flags = {
        entry.name: f"--{renamed.get(entry.name, entry.name)}"
        for entry in dataclasses.fields(options)
        if getattr(options, entry.name) != entry.default
    }
    for name in ("calibrate", "presets", "what_fits", "recipes", "critical_batch"):
        companions = {name, *(("recipe", "batch") if name == "critical_batch" else ())}
        useless = [flag for field, flag in flags.items() if field not in companions]
        if name in flags and useless:
            raise ValueError(f"{', '.join(useless)} would have no effect beside {flags[name]}.")


def _print_plan(options: PlanOptions) -> None:
    _check_counts(options)
    planned = plan_run(
        options.recipe,
        batch=options.batch,
        epochs=options.epochs,
        deepspeed_config=options.deepspeed_config,
        overrides=options.ds,
        tf32=options.tf32,
        compress=options.compress,
    )
    images = options.images or IMAGENET
    check_last_step(planned.compress, count_steps(planned, planned.epochs, images))
    cluster = _read_cluster(options)
    stages = _choose_stages(planned, cluster, options)
    check_number("--price_per_gpu_hour", options.price_per_gpu_hour, 0)
    ways = fitting_options(planned, cluster, stages)
    launch = launch_command(planned, cluster, ways[0], options.deepspeed_config, options.ds)
    if options.write_json is not None:
        engine = engine_json(planned, ways[0])
        options.write_json.parent.mkdir(parents=True, exist_ok=True)
        options.write_json.write_text(json.dumps(engine, indent=4) + "\n")
        same_run = replace(planned, engine=engine)
        launch = launch_command(same_run, cluster, ways[0], options.write_json)
    plan = Plan(
        planned=planned,
        cluster=cluster,
        options=ways,
        price=options.price_per_gpu_hour,
        images=images,
        cores=options.cores,
        launch=launch,
    )
    # files first: the reader of the text may close the pipe early
    if options.picture is not None:
        draw_plan(options.picture, plan)
    if options.as_json:
        print(json.dumps(plan_text.as_json(plan), indent=2, allow_nan=False))
        return
    print(plan_text.format_plan(plan))
    if options.picture is not None:
        print(options.picture)


def plan_run(
    recipe_name: str,
    *,
    batch: int = 0,
    epochs: float = 0.0,
    deepspeed_config: Path | None = None,
    overrides: tuple[str, ...] = (),
    tf32: bool = False,
    compress: str = OFF,
) -> PlannedRun:
    """What a recipe trains, with what a command line changes.

    Args:
        recipe_name: name of the recipe.
        batch: global batch; 0 = the recipe's.
        epochs: length of the run; 0 = the recipe's.
        deepspeed_config: DeepSpeed JSON; None = the recipe's. The recipe's optimizer block stays
            where the file has none.
        overrides: values of that JSON as `KEY.KEY=VALUE`.
        tf32: whether products of an fp32 run may round their inputs to TF32.
        compress: schedule of the sequences' length, see `--compress`.

    Raises:
        ValueError: the recipe is unknown, numbers are impossible, or the JSON cannot be read.
    """
    recipe = find_recipe(recipe_name)
    if batch < 0:
        raise ValueError(f"--batch {batch} must be positive.")
    check_batch(batch or recipe.config.batch)
    check_number("--epochs", epochs, 0)
    engine = dict(recipe.engine)
    if deepspeed_config is not None:
        engine = {"optimizer": engine["optimizer"]} | read_json(deepspeed_config)
    engine = read_settings(with_overrides(engine, overrides))
    if deepspeed_config is not None or overrides:
        check_block(engine["optimizer"])
    config = recipe.config
    shape = encoder_shape(config)
    read_schedule(compress)
    if compress != OFF:
        check_patches(compress, patches_of(shape))
    return PlannedRun(
        recipe=recipe_name,
        shape=shape,
        batch=batch or config.batch,
        epochs=epochs or config.epochs,
        engine=engine,
        tf32=tf32,
        compress=compress,
    )


def _read_cluster(options: PlanOptions) -> Cluster:
    if not options.gpus:
        raise ValueError("--gpus is missing; give e.g. --gpus 16x24GB (--list shows all cards).")
    cluster = read_cluster(
        options.gpus,
        nodes=options.nodes,
        interconnect=options.interconnect,
        network=options.network,
        presets=_known_cards(options),
    )
    if options.rates is not None and cluster.card.name != (
        measured := read_rates(options.rates).name
    ):
        raise ValueError(
            f"--rates {options.rates} has no effect on {cluster.card.name}: it holds what was "
            f"measured of one {measured}; plan with --gpus 1x{measured}, or more of them."
        )
    reach = options.reach
    if reach:
        if not 0 < reach <= 1:
            raise ValueError(f"--reach {reach} cannot be; it is a share of the peak, 0 to 1.")
        source = "given by --reach"
        asked_for = replace(cluster.card.reach, products=reach, source=source, spread=1.0)
        card = replace(cluster.card, reach=asked_for)
        cluster = replace(cluster, card=card)
    return cluster


def _check_counts(options: PlanOptions) -> None:
    """Refuse counts of images and cores that cannot be.

    Raises:
        ValueError: one of them is negative, or the set is smaller than a batch.
    """
    check_number("--images", options.images, 0)
    check_number("--cores", options.cores, 0)


def _known_cards(options: PlanOptions) -> Mapping[str, Card]:
    """The presets, a card as it was measured, and a card of the user's own."""
    cards = dict(PRESETS)
    if options.rates is not None:
        measured = read_rates(options.rates)
        cards[measured.name] = measured
    numbers = {"memory": options.memory, "tflops": options.tflops, "bandwidth": options.bandwidth}
    if options.card:
        return {**cards, options.card: describe_own_card(options.card, **numbers)}
    if useless := [f"--{flag}" for flag, number in numbers.items() if number]:
        raise ValueError(f"{', '.join(useless)} without --card NAME would have no effect.")
    return cards


def _choose_stages(planned: PlannedRun, cluster: Cluster, options: PlanOptions) -> tuple[int, ...]:
    """The stages to compare: all, or the one that the JSON or --stage names.

    Raises:
        ValueError: JSON and flags contradict each other, or training would refuse the JSON.
    """
    stage, own_json = options.stage, options.deepspeed_config is not None
    zero = planned.engine.get("zero_optimization") or {}
    if own_json or options.ds:
        engine_config(planned.engine, global_batch=planned.batch, world_size=cluster.cards)
    if any(zero.get(key) for key in ("offload_optimizer", "offload_param")):
        raise ValueError(
            "offload to the CPU is not planned for; plan without it (it takes the masters and "
            "moments off the card and slows the optimizer down to the CPU's memory)."
        )
    keys = {entry.partition("=")[0] for entry in options.ds}
    is_fixed = own_json or keys & {"zero_optimization", "zero_optimization.stage"}
    fixed = zero.get("stage") if is_fixed else None
    if stage is not None and stage not in STAGES:
        raise ValueError(f"--stage {stage} cannot be; ZeRO has stages 0, 1, 2 and 3.")
    if None not in (stage, fixed) and stage != fixed:
        raise ValueError(
            f"--stage {stage} contradicts zero_optimization.stage = {fixed} of the DeepSpeed "
            "config; remove one of them."
        )
    single = fixed if stage is None else stage
    return STAGES if single is None else (int(single),)


def engine_json(planned: PlannedRun, option: Option) -> dict[str, Any]:
    """DeepSpeed JSON of an option."""
    engine: dict[str, Any] = json.loads(json.dumps(planned.engine))
    engine.setdefault("zero_optimization", {})["stage"] = option.setup.stage
    return engine


def launch_command(
    planned: PlannedRun,
    cluster: Cluster,
    option: Option,
    file: Path | None = None,
    overrides: tuple[str, ...] = (),
) -> str:
    """Command line that starts the planned run.

    Args:
        planned: the run; `planned.engine` is what file and overrides come to.
        cluster: the machines that the run starts on.
        option: stage, chunks and recomputation.
        file: DeepSpeed JSON for `--deepspeed_config`; None = the recipe's.
        overrides: values for `--ds`, as `KEY.KEY=VALUE`.
    """
    chunks = option.setup.chunks
    hosts = f" --hostfile hosts --num_nodes {cluster.nodes}" * (cluster.nodes > 1)
    flags = [
        f"deepspeed{hosts} --num_gpus {min(cluster.per_node, cluster.cards)} mocov3_ds/train.py",
        f"--recipe {planned.recipe} --batch {planned.batch} --epochs {planned.epochs:.15g}",
        f"--chunk {chunks.size or planned.batch // cluster.cards}",
    ]
    if chunks.keep:
        flags.append(f"--keep_chunks {chunks.keep}")
    if option.setup.recompute_blocks:
        flags.append("--recompute_blocks")
    if planned.tf32:
        flags.append("--tf32")
    if planned.compress != OFF:
        flags.append(f"--compress {shlex.quote(planned.compress)}")
    if planned.epochs < find_recipe(planned.recipe).config.warmup_epochs:
        flags.append("--warmup_epochs WARMUP")  # the recipe's is longer than the run
    if file is not None:
        flags.append(f"--deepspeed_config {shlex.quote(str(file))}")
    flags += [f"--ds {shlex.quote(entry)}" for entry in overrides]
    if option.setup.stage != (planned.engine.get("zero_optimization") or {}).get("stage"):
        flags.append(f"--ds zero_optimization.stage={option.setup.stage}")
    return " ".join([*flags, "--data.shards SHARDS"])
