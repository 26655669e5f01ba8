"""`mocov3 plan`: from a command line to a plan."""

import inspect
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from mocov3_ds.config import Config, find_recipe, read_json, with_overrides
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.optim.arguments import number
from mocov3_ds.planning import plan_text, tables
from mocov3_ds.planning.calibrate import calibrate as measure_rates
from mocov3_ds.planning.hardware import Cluster, list_of_presets, read_cluster, with_rates
from mocov3_ds.planning.options import Option, Wish, fitting_options

_BATCHES = (4096, 8192, 16384)


def plan(
    *,
    recipe: str = "vit_b16",
    gpus: str = "",
    batch: int = 0,
    epochs: float = 0.0,
    nodes: int = 0,
    interconnect: float = 0.0,
    network: float = 0.0,
    reach: float = 0.0,
    stage: int | None = None,
    deepspeed_config: Path | None = None,
    ds: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    price_per_gpu_hour: float = 0.0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    picture: Path | None = None,
    write_json: Path | None = None,
    rates: Path | None = None,
    calibrate: Path | None = None,
    presets: Annotated[bool, tyro.conf.arg(name="list")] = False,
    what_fits: bool = False,
    recipes: bool = False,
) -> None:
    """Say what fits, how fast it runs and what it costs. Arithmetic alone: nothing is trained.

        mocov3 plan --recipe vit_l16 --batch 4096 --gpus 16x24GB
        mocov3 plan --recipe vit_h14 --gpus 64xH100-80GB --price_per_gpu_hour 2.5 --picture plan.png

    Args:
        recipe: what to train.
        gpus: COUNTxCARD: a preset (--list) or a memory, e.g. 8xH100-80GB, 16x24GB; 1 to 1024 cards.
        batch: global batch; 0 = the recipe's.
        epochs: length of the run; 0 = the recipe's.
        nodes: machines; 0 = as few as hold the cards, the same number each.
        interconnect: GB/s each way between two cards of a machine; 0 = the preset's.
        network: Gbit/s each way of a machine; 0 = the preset's.
        reach: share of the peak that matrix products reach; 0 = the preset's, see --list.
        stage: ZeRO stage; without it all are compared.
        deepspeed_config: DeepSpeed JSON of the run; without it the recipe's, with each stage.
        ds: one value of that JSON, as in training, e.g. --ds optimizer.type=Lamb (repeatable).
        price_per_gpu_hour: in any currency.
        as_json: print JSON.
        picture: PNG of what fills a card.
        write_json: write the DeepSpeed JSON of the best option.
        rates: rates of this machine, for the card cpu (--gpus 1xcpu) and no other.
        calibrate: measure those rates in some seconds (products, attention, copies) to a file.
        presets: list the cards that are known, with the source of each number.
        what_fits: table of what fits where, for ViT-B, L and H.
        recipes: table of the recipes with command, hours and the paper's accuracy.
    """
    _check_alone(locals())
    if calibrate is not None:
        print(json.dumps(measure_rates(calibrate), indent=2))
    elif presets:
        print(list_of_presets())
    elif what_fits:
        wishes = [wish_of(n, batch=b) for n in ("vit_b16", "vit_l16", "vit_h14") for b in _BATCHES]
        print(tables.what_fits(wishes))
    elif recipes:
        print(tables.recipes(wish_of))
    else:
        wish = wish_of(
            recipe, batch=batch, epochs=epochs, deepspeed_config=deepspeed_config, overrides=ds
        )
        cluster = _cluster(gpus, nodes, interconnect, network, reach, rates)
        stages = _stages(wish, cluster, stage, deepspeed_config is not None, ds)
        number("--price_per_gpu_hour", price_per_gpu_hour, 0)
        options = fitting_options(wish, cluster, stages)
        # files first: whoever reads the text may close the pipe early
        if picture is not None:
            plan_text.picture(picture, wish, cluster, options)
        if write_json is not None:
            own = engine_json(wish, options[0])
            write_json.parent.mkdir(parents=True, exist_ok=True)
            write_json.write_text(json.dumps(own, indent=4) + "\n")
            launch = launch_command(replace(wish, engine=own), cluster, options[0], write_json)
        else:
            launch = launch_command(wish, cluster, options[0], deepspeed_config, ds)
        say = _json if as_json else plan_text.text
        print(say(wish, cluster, options, price_per_gpu_hour, launch))
        if picture is not None and not as_json:
            print(picture)


def _check_alone(given: dict[str, object]) -> None:
    """Refuse what has no effect beside a flag that has its own answer.

    Raises:
        ValueError: such a flag is not alone.
    """
    parameters = inspect.signature(plan).parameters
    renamed = {"as_json": "json", "presets": "list"}
    flags = {
        name: f"--{renamed.get(name, name)}"
        for name, value in given.items()
        if value != parameters[name].default
    }
    for name in ("calibrate", "presets", "what_fits", "recipes"):
        others = [flag for other, flag in flags.items() if other != name]
        if name in flags and others:
            raise ValueError(f"{', '.join(others)} would have no effect beside {flags[name]}.")


def _json(wish: Wish, cluster: Cluster, options: list[Option], price: float, launch: str) -> str:
    plain = plan_text.as_json(wish, cluster, options, price, launch)
    return json.dumps(plain, indent=2, allow_nan=False)


def wish_of(
    name: str,
    *,
    batch: int = 0,
    epochs: float = 0.0,
    deepspeed_config: Path | None = None,
    overrides: tuple[str, ...] = (),
) -> Wish:
    """What a recipe wants, with what a command line changes; 0 keeps the recipe's.

    Raises:
        ValueError: unknown recipe, impossible numbers, an unreadable JSON.
    """
    recipe = find_recipe(name)
    if batch < 0:
        raise ValueError(f"--batch {batch} must be positive.")
    number("--epochs", epochs, 0)
    engine = dict(recipe.engine)
    if deepspeed_config is not None:
        engine = {"optimizer": engine["optimizer"]} | read_json(deepspeed_config)
    engine = with_overrides(engine, overrides)
    if deepspeed_config is not None or overrides:
        _check_optimizer(engine["optimizer"])
    config = recipe.config
    return Wish(
        recipe=name,
        shape=shape_of(config),
        batch=batch or config.batch,
        epochs=epochs or config.epochs,
        engine=engine,
    )


def _check_optimizer(block: Any) -> None:
    """Read the block as training does.

    Raises:
        ValueError: what training would refuse.
    """
    import torch  # with the optimizers, seconds that a recipe's own block need not cost

    from mocov3_ds.optim.build import base_rate, build_optimizer

    base_rate(block)
    build_optimizer(block, [("weight", torch.nn.Parameter(torch.zeros(1)))])


def shape_of(config: Config) -> EncoderShape:
    """Architecture that the settings describe."""
    from mocov3_ds.training.run import encoder_shape  # brings the loader with it

    return encoder_shape(config)


def _cluster(
    gpus: str, nodes: int, interconnect: float, network: float, reach: float, rates: Path | None
) -> Cluster:
    if not gpus:
        raise ValueError("--gpus is missing; give e.g. --gpus 16x24GB (--list shows all cards).")
    presets = with_rates(rates) if rates is not None else None
    cluster = read_cluster(
        gpus, nodes=nodes, interconnect=interconnect, network=network, presets=presets
    )
    if rates is not None and cluster.card.name != "cpu":
        raise ValueError(
            f"--rates {rates} has no effect on {cluster.card.name}: it holds what this machine's "
            "processor does, for --gpus 1xcpu."
        )
    if reach:
        if not 0 < reach <= 1:
            raise ValueError(f"--reach {reach} cannot be; it is a share of the peak, 0 to 1.")
        card = replace(cluster.card, reach=reach, reach_source="given by --reach")
        cluster = replace(cluster, card=card)
    return cluster


def _stages(
    wish: Wish, cluster: Cluster, stage: int | None, own_json: bool, ds: tuple[str, ...]
) -> tuple[int, ...]:
    """The stages to compare: all, or the one that the JSON or --stage names.

    Raises:
        ValueError: a contradiction, or what training would refuse.
    """
    zero = wish.engine.get("zero_optimization") or {}
    if own_json or ds:
        from mocov3_ds.distributed.engine import engine_config  # brings DeepSpeed with it

        engine_config(wish.engine, global_batch=wish.batch, world_size=cluster.cards)
    if any(zero.get(key) for key in ("offload_optimizer", "offload_param")):
        raise ValueError(
            "offload to the CPU is not planned for; plan without it (it takes the masters and "
            "moments off the card and slows the optimizer down to the CPU's memory)."
        )
    keys = {entry.partition("=")[0] for entry in ds}
    given = own_json or keys & {"zero_optimization", "zero_optimization.stage"}
    fixed = zero.get("stage") if given else None
    if stage is not None and stage not in (0, 1, 2, 3):
        raise ValueError(f"--stage {stage} cannot be; ZeRO has stages 0, 1, 2 and 3.")
    if None not in (stage, fixed) and stage != fixed:
        raise ValueError(
            f"--stage {stage} contradicts zero_optimization.stage = {fixed} of the DeepSpeed "
            "config; remove one of them."
        )
    only = fixed if stage is None else stage
    return (0, 1, 2, 3) if only is None else (int(only),)


def engine_json(wish: Wish, option: Option) -> dict[str, Any]:
    """DeepSpeed JSON of an option."""
    engine: dict[str, Any] = json.loads(json.dumps(wish.engine))
    engine.setdefault("zero_optimization", {})["stage"] = option.stage
    return engine


def launch_command(
    wish: Wish,
    cluster: Cluster,
    option: Option,
    file: Path | None = None,
    overrides: tuple[str, ...] = (),
) -> str:
    """What starts the planned run; `wish.engine` is what file and overrides come to."""
    size = option.chunks.size or wish.batch // cluster.cards
    hosts = f" --hostfile hosts --num_nodes {cluster.nodes}" * (cluster.nodes > 1)
    flags = [
        f"deepspeed{hosts} --num_gpus {min(cluster.per_node, cluster.cards)} mocov3_ds/train.py",
        f"--recipe {wish.recipe} --batch {wish.batch} --epochs {wish.epochs:.15g}",
        f"--chunk {size}",
    ]
    if option.chunks.kept:
        flags.append(f"--keep_chunks {option.chunks.kept}")
    if option.recompute_blocks:
        flags.append("--recompute_blocks")
    if wish.epochs < find_recipe(wish.recipe).config.warmup_epochs:
        flags.append("--warmup_epochs WARMUP")  # the recipe's is longer than the run
    if file is not None:
        flags.append(f"--deepspeed_config {shlex.quote(str(file))}")
    flags += [f"--ds {shlex.quote(entry)}" for entry in overrides]
    if option.stage != (wish.engine.get("zero_optimization") or {}).get("stage"):
        flags.append(f"--ds zero_optimization.stage={option.stage}")
    return " ".join([*flags, "--data.shards SHARDS"])
