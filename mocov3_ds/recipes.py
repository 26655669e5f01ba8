"""The recipes, and the one parser of a training command line.

A recipe is a named starting point: our settings, DeepSpeed's, and what the paper reports for them.
Precedence, low to high: recipe, the file of `--deepspeed_config`, flags.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from mocov3_ds.config.checks import (
    check_backbone_flags,
    check_batch,
    check_config,
    check_view_flags,
)
from mocov3_ds.config.parts import KnnConfig, MocoConfig, ModelConfig, SaveConfig, ViewConfig
from mocov3_ds.config.run_config import Config, Settings
from mocov3_ds.config.stored import from_json
from mocov3_ds.data import storage
from mocov3_ds.distributed.engine_keys import read_settings
from mocov3_ds.distributed.engine_values import check_depth
from mocov3_ds.model.shapes import CONV_STEM_SHAPES, PAPER_SHAPES
from mocov3_ds.settings.paths import check_text, expand_home
from mocov3_ds.settings.spelling import did_you_mean


@dataclass(frozen=True)
class Recipe:
    """A named starting point: our settings, DeepSpeed's, and what the paper reports."""

    config: Config
    engine: Mapping[str, Any]
    """the DeepSpeed JSON"""
    paper: str = ""
    """accuracy that the paper reports, in words"""


def engine_defaults(
    optimizer: str, stage: int, precision: str, **parameters: Any
) -> dict[str, Any]:
    """A DeepSpeed JSON as a dict; the files of `ds_configs/` have the same form.

    Args:
        optimizer: value of the optimizer block's "type", such as "AdamW".
        stage: ZeRO stage, 0 to 3.
        precision: "fp32", "bf16" or "fp16".
        parameters: values of the optimizer block's "params".
    """
    config: dict[str, Any] = {
        "optimizer": {"type": optimizer, "params": parameters},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return config


def _paper_config(shape: str, **changes: Any) -> Config:
    """The paper's settings for one of its networks; the defaults of `Config` are the paper's."""
    vit = PAPER_SHAPES[shape]
    model = ModelConfig(patch_size=vit.patch_size, dim=vit.dim, depth=vit.depth, heads=vit.heads)
    return dataclasses.replace(Config(recipe=shape, model=model), **changes)


def _conv_config(backbone: str) -> Config:
    """The same for a Vision Transformer on a stem of convolutions."""
    shape = CONV_STEM_SHAPES[backbone]
    model = ModelConfig(backbone=backbone, dim=shape.dim, depth=shape.depth, heads=shape.heads)
    return Config(recipe=backbone, model=model)


_ADAMW = engine_defaults("AdamW", 1, "bf16", lr=1.5e-4, betas=[0.9, 0.999], weight_decay=0.1)
# CONFIG.md and moco/optimizer.py of the authors' code: SGD momentum 0.9, trust coefficient 1e-3
_LARS = engine_defaults(
    "Lars", 1, "bf16", lr=0.6, momentum=0.9, weight_decay=1e-6, trust_coeff=1e-3, moco_v3=True
)
_LAMB = engine_defaults("Lamb", 1, "bf16", lr=5e-4, betas=[0.9, 0.999], weight_decay=1e-3)

# main_moco.py and CONFIG.md of the authors' code, 100 epochs: defaults, --moco-m-cos --crop-min=.2
_RESNET = Config(
    recipe="r50",
    epochs=100,
    warmup_epochs=10,
    decay="matrices",
    views=ViewConfig(crop_min=0.2),
    model=ModelConfig(backbone="resnet50", projector_layers=2, predictor_norm=False),
    moco=MocoConfig(temperature=1.0),
)


# arXiv 2104.02057: Sec. 5 (recipe), Tables 1-3 (accuracy); base rate and decay from CONFIG.md of
# the authors' code; LAMB values from Sec. 4.1, Fig. 3 (100 epochs). All at 224 px, batch 4096.
RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        Config(
            recipe="tiny",
            batch=256,
            epochs=12,
            warmup_epochs=2,
            views=ViewConfig(image_size=32, crop_min=0.3, blur_p=(0.5, 0.1)),
            model=ModelConfig(patch_size=8, dim=128, depth=4, heads=4, hidden=512, out=128),
            save=SaveConfig(every_steps=50),
            knn=KnnConfig(every_steps=20, bank=2048, probes=1000),
        ),
        engine_defaults("AdamW", 1, "fp32", lr=1.5e-3, betas=[0.9, 0.999], weight_decay=0.1),
    ),
    "cifar10": Recipe(
        Config(
            recipe="cifar10",
            batch=256,
            epochs=20,
            warmup_epochs=1,
            views=ViewConfig(image_size=32, crop_min=0.2, blur_p=(0.0, 0.0)),
            model=ModelConfig(patch_size=4, dim=192, depth=4, heads=3, hidden=512, out=128),
            save=SaveConfig(every_steps=100),
            knn=KnnConfig(every_steps=50, bank=5120, probes=10000),
        ),
        engine_defaults("AdamW", 1, "bf16", lr=1e-3, betas=[0.9, 0.999], weight_decay=0.1),
    ),
    "vit_s16": Recipe(_paper_config("vit_s16"), _ADAMW, "linear probe 72.5 %"),
    "vit_b16": Recipe(_paper_config("vit_b16"), _ADAMW, "linear probe 76.5 %"),
    "vit_l16": Recipe(_paper_config("vit_l16"), _ADAMW, "linear probe 77.6 %"),
    "vit_h14": Recipe(_paper_config("vit_h14"), _ADAMW, "linear probe 78.1 %"),
    "vit_conv_s16": Recipe(_conv_config("vit_conv_s16"), _ADAMW, "not in the paper"),
    "vit_conv_b16": Recipe(_conv_config("vit_conv_b16"), _ADAMW, "not in the paper"),
    "r50": Recipe(_RESNET, _LARS, "linear probe 68.9 % after 100 epochs"),
    "r50_1000": Recipe(
        dataclasses.replace(
            _RESNET,
            recipe="r50_1000",
            epochs=1000,
            moco=MocoConfig(temperature=1.0, momentum=0.996),
        ),
        engine_defaults(
            "Lars",
            1,
            "bf16",
            lr=0.3,
            momentum=0.9,
            weight_decay=1.5e-6,
            trust_coeff=1e-3,
            moco_v3=True,
        ),
        "linear probe 74.6 % after 1000 epochs",
    ),
    "vit_b16_lamb": Recipe(
        _paper_config("vit_b16", recipe="vit_b16_lamb", epochs=100),
        _LAMB,
        "linear probe 72.5 % after 100 epochs, trained patch projection",
    ),
    "vit_l16_lamb": Recipe(
        _paper_config("vit_l16", recipe="vit_l16_lamb"), _LAMB, "not in the paper"
    ),
    "vit_h14_lamb": Recipe(
        _paper_config("vit_h14", recipe="vit_h14_lamb"), _LAMB, "not in the paper"
    ),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: no recipe has it.
    """
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise ValueError(f"no recipe {name!r}{hint}; there are {', '.join(RECIPES)}.")
    return RECIPES[name]


# ------------------------------------------------------------------------------- the command line


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Read the command line of a training run; `--recipe X --help` shows the defaults of recipe X.

    Args:
        argv: flags and their values; None = those of this process.

    Raises:
        ValueError: an unknown recipe, a number out of its bounds, an unreadable JSON file, a
            malformed `--ds`, or a key or value that DeepSpeed's settings cannot have.
        SystemExit: tyro has printed a message of its own (unknown flag, wrong type, --help).
    """
    arguments = expand_home(without_launcher_flags(list(sys.argv[1:] if argv is None else argv)))
    check_text(arguments)
    recipe = choose_defaults(last_value(arguments, "recipe"), last_value(arguments, "extend"))
    config = tyro.cli(Config, default=recipe.config, args=arguments, prog="train.py")
    return resolve(config, recipe.engine)


def choose_defaults(recipe: str | None, extend: str | None) -> Recipe:
    """The settings that flags and keywords change: those of a recipe, or of a run to go on from.

    Args:
        recipe: name of a recipe; None = not given.
        extend: folder of a finished run; None = not given.

    Raises:
        ValueError: there is no such recipe or run, or the run has another recipe.
    """
    if not extend:
        return find_recipe(recipe or "tiny")
    folder = Path(extend)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--extend {folder} is no run folder: it holds no config.json.")
    tree = read_json(folder / "config.json")
    parent = from_json(tree)
    if recipe not in (None, parent.recipe):
        raise ValueError(
            f"--recipe {recipe} does not go with --extend {folder}, whose settings (recipe "
            f"{parent.recipe}) are the defaults; leave --recipe out."
        )
    config = dataclasses.replace(
        parent,
        name=f"{folder.resolve().name}-extended",
        runs=folder.parent,
        init="",
        init_which="base",
        extend=extend,
        extend_schedule="longer",
        stop_after_steps=0,
        profile=0,
        save=dataclasses.replace(parent.save, mirror=""),
    )
    return Recipe(config, tree["deepspeed"])


def resolve(config: Config, engine: Mapping[str, Any]) -> Settings:
    """Check settings and join them with DeepSpeed's.

    Args:
        config: our settings, with paths as a user gives them.
        engine: the DeepSpeed JSON that `deepspeed_config` and `ds` of the settings change.

    Raises:
        ValueError: numbers out of their bounds, settings that contradict one another, or keys and
            values that DeepSpeed's settings cannot have.
    """
    config = _anchor_paths(config)
    check_config(config)
    if config.recipe in RECIPES:
        recipe = RECIPES[config.recipe].config
        check_backbone_flags(config.model, recipe.model)
        check_view_flags(config.views, recipe.views)
    if config.extend and Path(config.extend).resolve() == config.folder.resolve():
        raise ValueError(f"--extend {config.extend} is the run's own folder; give another --name.")
    check_batch(config.batch)
    engine = dict(engine)
    if config.deepspeed_config is not None:
        engine = {"optimizer": engine["optimizer"]} | read_json(config.deepspeed_config)
    return Settings(config, read_settings(with_overrides(engine, config.ds)))


def without_launcher_flags(arguments: list[str]) -> list[str]:
    """Drop `--local_rank N`, which the deepspeed launcher appends; LOCAL_RANK says the same."""
    remaining, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            remaining.append(argument)
    return remaining


def _anchor_paths(config: Config) -> Config:
    """The settings with absolute paths to data, which config.json keeps for any working folder."""
    data, save = config.data, config.save
    shards, images, probes, cache, mirror, init, extend = (
        str(storage.local_path(url).absolute()) if url and storage.is_local(url) else url
        for url in (
            *(data.shards, data.images, data.probe_shards, data.cache, save.mirror),
            *(config.init, config.extend),
        )
    )
    data = dataclasses.replace(data, shards=shards, images=images, probe_shards=probes, cache=cache)
    save = dataclasses.replace(save, mirror=mirror)
    return dataclasses.replace(config, data=data, save=save, init=init, extend=extend)


def last_value(arguments: list[str], flag: str) -> str | None:
    """Value of a flag that decides the defaults of the others, so is needed before tyro reads."""
    value = None
    for position, argument in enumerate(arguments):
        if argument == f"--{flag}" and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(f"--{flag}="):
            value = argument.partition("=")[2]
    return value


# ------------------------------------------------------------------------------- the DeepSpeed JSON


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is missing, is not JSON, or does not hold an object.
    """
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=partial(_unique_keys, path))
    except FileNotFoundError:
        raise ValueError(f"there is no DeepSpeed config {path}; see ds_configs/.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except _TwiceError as error:
        raise ValueError(f"{error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object.")
    return value


class _TwiceError(Exception):
    """A key that an object has twice, of which JSON readers take either."""


def _unique_keys(path: str | Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
        raise _TwiceError(f"{path} has the key {twice!r} twice in one object; keep one of them.")
    return unique


def with_overrides(engine: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a DeepSpeed JSON in which `a.b=value` settings are applied.

    Args:
        engine: the JSON object, which stays as it is.
        overrides: settings as `--ds` takes them; a value is read as JSON, else taken as text.

    Raises:
        ValueError: a setting has no `=`, or its path leads through something that is not an object.
    """
    check_depth(engine)
    result: dict[str, Any] = json.loads(json.dumps(engine))
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise ValueError(f"--ds {override!r} is not of the form key.sub=value.")
        *path, leaf = dotted.split(".")
        node = result
        for key in path:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"--ds {override!r}: {key!r} holds {node!r}, not an object.")
        try:
            hook = partial(_unique_keys, f"--ds {dotted}")
            node[leaf] = json.loads(text, object_pairs_hook=hook)
        except _TwiceError as error:
            raise ValueError(f"{error}") from None
        except (ValueError, RecursionError):
            node[leaf] = text
    return result
