"""How does a network of one's own get a name that settings, checkpoints and evaluations know?

own:package.module:function   imported where it is needed; the function makes the network
own:NAME                      given to this process by `register_backbone`
"""

import copy
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings know such names without torch
    from torch import nn

OWN_BACKBONE = "own:"

_makers: dict[str, Callable[[], "nn.Module"]] = {}


def register_backbone(network: "nn.Module | Callable[[], nn.Module]", name: str = "") -> str:
    """Let this process know a backbone, and return its name for `--model.backbone`.

    Args:
        network: maps images (B, C, H, W) to features (B, D); a module stays as it is, and its
            copies are trained from its weights; a function makes a network each time.
        name: what it is called; empty = as its class or function.
    """
    from torch import nn

    if isinstance(network, nn.Module):
        original = copy.deepcopy(network)
        name, make = name or type(network).__name__, lambda: copy.deepcopy(original)
    else:
        name, make = name or getattr(network, "__name__", "network"), network
    _makers[name] = make
    return f"{OWN_BACKBONE}{name}"


def make_own_backbone(name: str) -> "nn.Module":
    """Make the backbone of a name.

    Args:
        name: what stands behind `own:`.

    Raises:
        ValueError: this process does not know it, and it names no function that can be imported.
    """
    if name in _makers:
        return _makers[name]()
    module, separator, function = name.partition(":")
    if not separator:
        raise ValueError(
            f"--model.backbone {OWN_BACKBONE}{name} was a network in the memory of a program; give "
            "it again (mocov3_ds.pretrain, mocov3_ds.register_backbone), or name a function that "
            f"makes it: {OWN_BACKBONE}package.module:function."
        )
    try:
        make: Callable[[], nn.Module] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--model.backbone {OWN_BACKBONE}{name} names no function that can be imported "
            f"({error}); its folder must be on the Python path."
        ) from None
    return make()
