"""What holds for one tensor of a run: is it trained, at which rate, does it decay and adapt?"""

from collections.abc import Callable
from functools import partial

from torch import nn

from mocov3_ds.config import Config, group_rates
from mocov3_ds.model.layer_groups import layer_group
from mocov3_ds.optim.rules import Rule


def freeze_tensors(base: nn.Module, config: Config) -> None:
    """Take the layer groups whose rate is 0 out of the training.

    Args:
        base: the base encoder, changed in place.
        config: settings of the run, of which `--model.group_lr` counts.
    """
    rates = group_rates(config.model)
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
    matrix = len(shape) > 1 and not name.endswith("cls_token")
    group = layer_group(name)
    patch_rate = config.model.patch_lr if group == "patch_embed" else 1.0
    return Rule(
        decay=matrix or config.decay == "all",
        lr_multiplier=patch_rate * rates.get(group, 1.0),  # what the loss trains is in no group
        adapt=matrix,
    )
