"""What holds for one tensor of a run: is it trained, at which rate, does it decay and adapt?"""

from collections.abc import Callable
from functools import partial

from mocov3_ds.config.checks import group_rates
from mocov3_ds.config.run_config import Config, encoder_shape
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.layer_groups import layer_group
from mocov3_ds.model.shapes import VitShape
from mocov3_ds.optim.rules import Rule, vit_rule


def freeze_tensors(base: BaseEncoder, config: Config) -> None:
    """Take the layer groups whose rate is 0 out of the training.

    Args:
        base: the base encoder, changed in place.
        config: settings of the run, of which `--model.group_lr` counts.

    Raises:
        ValueError: `--model.group_lr` names a group that the encoder does not have.
    """
    rates = group_rates(config.model, base.groups)
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and rates[layer_group(name)] == 0:
            parameter.requires_grad_(False)


def tensor_rules(config: Config) -> Callable[[str, tuple[int, ...]], Rule]:
    """Rule of each trained tensor by name and full shape, as the optimizer asks for it.

    Args:
        config: settings of the run: `--decay`, `--model.patch_lr` and `--model.group_lr` count.
    """
    return partial(_tensor_rule, config, group_rates(config.model))


def _tensor_rule(
    config: Config, rates: dict[str, float], name: str, shape: tuple[int, ...]
) -> Rule:
    matrix = vit_rule(name, shape).adapt
    group = layer_group(name)
    is_projection = config.model.backbone == "vit" and group == "patch_embed"
    patch_rate = config.model.patch_lr if is_projection else 1.0
    return Rule(
        decay=matrix or config.decay == "all",
        lr_multiplier=patch_rate * rates.get(group, 1.0),  # what the loss trains is in no group
        adapt=matrix,
        heads=_heads(config) if name.endswith(".attn.qkv.weight") else 0,
    )


def _heads(config: Config) -> int:
    """Heads of each attention; 0 = the backbone's are not known here."""
    backbone = encoder_shape(config).backbone
    return backbone.heads if isinstance(backbone, VitShape) else 0
