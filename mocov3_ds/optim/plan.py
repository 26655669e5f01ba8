"""What one call of `step` updates, as tables; and what it measured on the way.

Legend: S = tensors that one call of `step` updates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mocov3_ds.optim.rules import Rule
from mocov3_ds.optim.segments import Flat, Segment

WEIGHT, UPDATE, GRADIENT = 0, 1, 2  # rows of the square sums


@dataclass(frozen=True, eq=False)
class Share:
    """One flat tensor of a plan.

    Attributes:
        flat: what lies in it.
        first: row of its first tensor among the S of the plan.
        rules: of the tensors of the flat.
    """

    flat: Flat
    first: int
    rules: tuple[Rule, ...]

    def row(self, segment: Segment) -> int:
        """Row of a segment's tensor among the S of the plan."""
        return self.first + segment.index

    def decay(self, segment: Segment) -> float:
        """Multiple of the weight decay that holds for a segment's tensor."""
        return float(self.rules[segment.index].decay)

    @property
    def rows(self) -> slice:
        """Rows of the flat's tensors among the S of the plan."""
        return slice(self.first, self.first + len(self.flat.names))


@dataclass(eq=False)
class Plan:
    """Tables of one call of `step`, on the device of the flats, and what it measured last.

    Attributes:
        shares: the flats.
        names: S tensors, in the order of the rows.
        adapt_S: whether a tensor is scaled by the trust ratio; bool.
        decay_S: multiple of the weight decay.
        multiplier_S: multiple of the learning rate.
        norms_3S: of weight, direction and gradient, over all ranks; of the last step.
        ratio_S: trust ratios of the last step.
        rate_S: learning rates of the last step.
    """

    shares: tuple[Share, ...]
    names: tuple[str, ...]
    adapt_S: Tensor
    decay_S: Tensor
    multiplier_S: Tensor
    norms_3S: Tensor
    ratio_S: Tensor
    rate_S: Tensor

    @property
    def device(self) -> torch.device:
        """Where the flats are."""
        return self.adapt_S.device


def plan_of(flats: list[Flat], rules: dict[str, Rule]) -> Plan:
    """Tables of a step over `flats`; `rules` holds each of their tensors' by name."""
    shares: list[Share] = []
    names: list[str] = []
    for flat in flats:
        shares.append(Share(flat, len(names), tuple(rules[name] for name in flat.names)))
        names += flat.names
    rules_S = [rules[name] for name in names]
    device = flats[0].tensor.device
    return Plan(
        shares=tuple(shares),
        names=tuple(names),
        adapt_S=torch.tensor([rule.adapt for rule in rules_S], device=device),
        decay_S=torch.tensor([float(rule.decay) for rule in rules_S], device=device),
        multiplier_S=torch.tensor([float(rule.lr_multiplier) for rule in rules_S], device=device),
        norms_3S=torch.zeros(3, len(names), device=device),
        ratio_S=torch.ones(len(names), device=device),
        rate_S=torch.zeros(len(names), device=device),
    )


@dataclass(frozen=True, eq=False)
class Signals:
    """What the last step measured on the way, per tensor and over all ranks.

    Attributes:
        names: the tensors, in the optimizer's order.
        grad_norm_S: of the gradient that the optimizer was given (after clipping, unscaled).
        update_norm_S: of the direction before learning rate and trust ratio; decay is in it.
        weight_norm_S: of the fp32 weight before the step.
        trust_ratio_S: factor on the direction; 1 where a tensor does not adapt.
        rate_S: learning rate that applied to each tensor.
    """

    names: tuple[str, ...]
    grad_norm_S: Tensor
    update_norm_S: Tensor
    weight_norm_S: Tensor
    trust_ratio_S: Tensor
    rate_S: Tensor

    def rows(self) -> dict[str, dict[str, float]]:
        """Tensor name -> value of each signal; waits for the device once."""
        keys = ("grad_norm", "update_norm", "weight_norm", "trust_ratio", "rate")
        table = torch.stack([getattr(self, f"{key}_S") for key in keys]).T.tolist()
        return {
            name: dict(zip(keys, values, strict=True))
            for name, values in zip(self.names, table, strict=True)
        }


def signals_of(plans: list[Plan], order: list[str]) -> Signals:
    """What the last step of each plan measured, its tensors in the given order."""
    place = {name: row for row, name in enumerate(n for plan in plans for n in plan.names)}
    names = tuple(name for name in order if name in place)
    rows = torch.tensor([place[name] for name in names], device=plans[0].device)
    norms_3S = torch.cat([plan.norms_3S for plan in plans], dim=1)[:, rows]
    return Signals(
        names=names,
        grad_norm_S=norms_3S[GRADIENT],
        update_norm_S=norms_3S[UPDATE],
        weight_norm_S=norms_3S[WEIGHT],
        trust_ratio_S=torch.cat([plan.ratio_S for plan in plans])[rows],
        rate_S=torch.cat([plan.rate_S for plan in plans])[rows],
    )
