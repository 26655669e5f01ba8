"""Settings that cannot be, or that contradict one another, are refused in a sentence."""

import math
from collections.abc import Sequence
from dataclasses import fields

from mocov3_ds.config.compression import read_schedule
from mocov3_ds.config.parts import RESNETS, TIMM, VIT_BACKBONES, ModelConfig, ViewConfig
from mocov3_ds.config.run_config import Config
from mocov3_ds.model.layer_groups import group_names
from mocov3_ds.model.own_backbones import OWN_BACKBONE
from mocov3_ds.model.shapes import (
    CONV_STEM_SHAPES,
    parse_size,
)
from mocov3_ds.settings.bounds import (
    Bounds,
    check_bounds,
)
from mocov3_ds.settings.spelling import did_you_mean

_OF_VITS = ("positions", "qk_norm", "layer_scale", "sigma_reparam", "fp8")
"""settings of the model that all Vision Transformers of ours have, and nothing else"""
_OF_OWN_VIEWS = {
    *("image_size", "channels", "mean", "std", "function", "fixed", "colour", "colour_ops"),
}
"""settings of views that hold whoever makes them"""


def check_config(config: Config) -> None:
    """Refuse numbers outside of their bounds and settings that contradict one another.

    Raises:
        ValueError: names the first such flag, its value and what is allowed.
    """
    check_bounds(config)
    Bounds(0, config.epochs).check_value("warmup_epochs", config.warmup_epochs)
    if config.keep_chunks and not config.chunk:
        raise ValueError(
            f"--keep_chunks {config.keep_chunks} has no effect without --chunk: both are chosen "
            "from the free memory then."
        )
    if config.init and config.extend:
        raise ValueError(
            f"--init {config.init} and --extend {config.extend} are two beginnings; give one of "
            "them: --extend goes on with optimizer and schedule, --init takes weights alone."
        )
    if config.init_which != "base" and not config.init:
        raise ValueError(f"--init_which {config.init_which} has no effect without --init.")
    if config.extend_schedule != "longer" and not config.extend:
        raise ValueError(
            f"--extend_schedule {config.extend_schedule} has no effect without --extend."
        )
    if config.moco.momentum_batch and config.moco.momentum in (0, 1):
        raise ValueError(
            f"--moco.momentum_batch {config.moco.momentum_batch} has no effect beside --moco."
            f"momentum {config.moco.momentum:g}, which is the same at any power."
        )
    _check_backbone(config)
    read_schedule(config.compress)
    _check_views(config.views)
    if config.alarm.response != "none" and config.signals.every != 1:
        raise ValueError(
            f"--alarm.response {config.alarm.response} needs the signals of each step; give "
            "--signals.every 1."
        )


def _check_backbone(config: Config) -> None:
    """Refuse a backbone that is not known, and settings of the model that name nothing."""
    model = config.model
    names = (*VIT_BACKBONES, *RESNETS)
    if model.backbone not in names and not model.backbone.startswith((TIMM, OWN_BACKBONE)):
        hint = did_you_mean(model.backbone, names)
        raise ValueError(
            f"--model.backbone {model.backbone} is not known{hint}; there are {', '.join(names)}, "
            f"{TIMM}NAME for a model of timm, and {OWN_BACKBONE}PACKAGE.MODULE:FUNCTION for yours."
        )
    if model.backbone in VIT_BACKBONES:
        if model.timm:
            raise ValueError(
                f"--model.timm {model.timm[0]} has no effect on --model.backbone "
                f"{model.backbone}; it is for {TIMM}NAME."
            )
        group_rates(model, group_names(config.vit.depth))
    if model.fp8 and model.sigma_reparam:
        raise ValueError(
            "--model.fp8 and --model.sigma_reparam are two kinds of the same layers; leave one of "
            "them out."
        )


def check_backbone_flags(model: ModelConfig, recipe: ModelConfig) -> None:
    """Refuse flags of the paper's Vision Transformer that were given for another backbone.

    Args:
        model: settings of the run.
        recipe: the recipe's, from which a given flag differs.

    Raises:
        ValueError: names the first flag that would have no effect.
    """
    sizes = ("patch_size", "dim", "depth", "heads")
    only_patches = ("patch_lr",)
    without_effect = {
        "vit": (),
        "vit_conv": only_patches,
        **dict.fromkeys(CONV_STEM_SHAPES, (*sizes, *only_patches)),
    }.get(model.backbone, (*sizes, *only_patches, *_OF_VITS))
    for name in without_effect:
        if getattr(model, name) != getattr(recipe, name):
            raise ValueError(
                f"--model.{name} {getattr(model, name)} has no effect on --model.backbone "
                f"{model.backbone}, which has its own."
            )


def check_view_flags(views: ViewConfig, recipe: ViewConfig) -> None:
    """Refuse strengths of the paper's views that were given beside functions of one's own.

    Args:
        views: settings of the run.
        recipe: the recipe's, from which a given flag differs.

    Raises:
        ValueError: names the first flag that would have no effect.
    """
    if not views.function:
        return
    for field in fields(views):
        is_free = field.name in _OF_OWN_VIEWS
        if not is_free and getattr(views, field.name) != getattr(recipe, field.name):
            raise ValueError(
                f"--views.{field.name} has no effect beside --views.function, which makes the "
                "views by itself; leave it out."
            )


def _check_views(views: ViewConfig) -> None:
    """Refuse views that images of so many channels cannot have."""
    parse_size(views.image_size)
    for name, numbers in (("mean", views.mean), ("std", views.std)):
        if len(numbers) != views.channels:
            raise ValueError(
                f"--views.{name} has {len(numbers)} numbers for --views.channels {views.channels}; "
                f"python -m data_prep stats SHARDS --channels {views.channels} prints those of "
                "your images."
            )
    if views.channels != 3 and views.colour_ops == "on" and not views.function:
        raise ValueError(
            f"--views.channels {views.channels}: saturation, hue and grey are of RGB alone; give "
            "--views.colour_ops off to train without them."
        )
    if len(views.function) > 2:
        raise ValueError(
            f"--views.function names {len(views.function)} functions; give one for both views, or "
            "two."
        )


def check_batch(batch: int) -> None:
    """Refuse a global batch in which an image has no other one to be told from.

    Args:
        batch: images of a step over all ranks.

    Raises:
        ValueError: there are fewer than two.
    """
    if batch < 2:
        raise ValueError(
            f"--batch {batch} has nothing to contrast: the negatives of an image are the keys of "
            "the others, so loss and gradient would be 0 in every step; choose 2 or more."
        )


def group_rates(model: ModelConfig, groups: Sequence[str] | None = None) -> dict[str, float]:
    """Learning rate of layer groups relative to the others, from input to output.

    Args:
        model: settings of the model, of which `group_lr` counts.
        groups: all layer groups of the encoder; None = those that `group_lr` names, unchecked.

    Raises:
        ValueError: `group_lr` has an unknown group, a group twice, a rate that is not a number from
            0 on, or a rate without effect.
    """
    rates = dict.fromkeys(groups or (), 1.0)
    assigned: set[str] = set()
    for entry in model.group_lr:
        group, _, value = entry.partition("=")
        if (groups is not None and group not in rates) or group in assigned:
            problem = "is there twice" if group in assigned else "names no layer group"
            raise ValueError(
                f"--model.group_lr {entry} {problem}; groups are {', '.join(groups or assigned)}."
            )
        assigned.add(group)
        try:
            rates[group] = float(value)
        except ValueError:
            rates[group] = math.nan
        if not 0 <= rates[group] < math.inf:
            raise ValueError(
                f"--model.group_lr {entry} gives no rate; write GROUP=NUMBER with a number from 0 "
                "on, e.g. patch_embed=0.2."
            )
        frozen = model.backbone == "vit" and group == "patch_embed" and model.patch_lr == 0
        if frozen and rates[group] > 0:
            raise ValueError(
                f"--model.group_lr {entry} has no effect on a frozen patch projection; give "
                "--model.patch_lr 1 as well."
            )
    return rates
