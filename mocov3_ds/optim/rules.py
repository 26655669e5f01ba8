"""What holds for one tensor and not for all: weight decay, learning rate, trust ratio.

DeepSpeed gets a single parameter group, whatever the number of rules: one flat tensor, one kernel
launch, one all-reduce a step, and no rule can be lost when a checkpoint is loaded. Rules are found
by name and *full* shape, since under `deepspeed.zero.Init` each parameter looks one-dimensional.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

_TOKENS = re.compile(
    "(cls|class|reg|register|dist|mask)_token|pos_emb|(patch|pixel)_pos|(height|width)_rel"
    "|logit_scale|temperature"
)
"""in the last part of a name: tokens, positions, and the factor of a head"""
_POSITIONS = re.compile("rel_pos|relative_(position|attention)|attention_bias|cpb_mlp|position_emb")
"""anywhere in a name: tables of relative positions, and what computes or holds one"""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one tensor is updated.

    Attributes:
        decay: Multiple of the optimizer's weight decay; `True` is 1, `False` is 0.
        lr_multiplier: Multiple of the learning rate, above 0 (freeze a tensor instead of 0).
        adapt: Whether a trust ratio may scale the tensor's step, where the optimizer has one, or
            Muon may make it orthogonal.
        heads: Attention heads whose queries, keys and values the rows are, in this order; 0 where
            it is another tensor, or their number is not known.
    """

    decay: float = 1.0
    lr_multiplier: float = 1.0
    adapt: bool = True
    heads: int = 0


RuleFor = Callable[[str, tuple[int, ...]], Rule]


def vit_rule(name: str, shape: tuple[int, ...]) -> Rule:
    """Default: matrices decay and adapt; biases, norms, tokens and position tables do neither.

    Position tables are those of absolute and of relative positions, by the names that timm gives
    them, whose networks list them in `no_weight_decay`.
    """
    is_table = _POSITIONS.search(name) or _TOKENS.search(name.rpartition(".")[2])
    matrix = len(shape) > 1 and not is_table
    return Rule(decay=matrix, adapt=matrix)


def by_dimensions(rule: RuleFor) -> RuleFor:
    """The same as `rule`, but exactly the tensors of two dimensions or more adapt; they decay."""

    def rule_by_dimensions(name: str, shape: tuple[int, ...]) -> Rule:
        base_rule, matrix = rule(name, shape), len(shape) > 1
        return replace(base_rule, decay=base_rule.decay or float(matrix), adapt=matrix)

    return rule_by_dimensions


def check_rule(rule: Rule, name: str) -> Rule:
    """Return the rule of the tensor `name`, if it is a possible one.

    Raises:
        ValueError: A decay below 0, or a learning rate multiple that is not above 0.
    """
    if not (math.isfinite(rule.decay) and rule.decay >= 0):
        raise ValueError(f"the rule of {name!r} has decay {rule.decay}; it must be 0 or above.")
    if not (math.isfinite(rule.lr_multiplier) and rule.lr_multiplier > 0):
        raise ValueError(
            f"the rule of {name!r} has lr_multiplier {rule.lr_multiplier}; it must be above 0. "
            "To keep a tensor as it is, set requires_grad=False before the optimizer is built."
        )
    return rule
