"""What one call of `step` updates, as tables; and what it measured on the way.

Legend: S = tensors that one call of `step` updates; Q = quantities measured of each: the first 3, 4
or all 8 of the list below, so that nothing is computed that nobody asked for.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mocov3_ds.distributed.segments import Flat, Segment
from mocov3_ds.optim.rules import Rule

# Rows of what the first pass measures. Sums of squares of weight, direction and gradient; of
# g / sqrt(v) with v after and before this step; sum of gradient times momentum before this step;
# sum of squares of that momentum; and, the only one that is no sum, the largest |gradient|.
WEIGHT, UPDATE, GRADIENT, AFTER, BEFORE, PRODUCT, MOMENTUM, PEAK = range(8)
NORMS, NORMS_AND_RMS, EVERYTHING = 3, 4, 8  # values of Q


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
        counts_S: elements of each whole tensor.
        measures_QS: what the last step measured, over all ranks.
        ratio_S: trust ratios of the last step.
        rate_S: learning rates of the last step.
    """

    shares: tuple[Share, ...]
    names: tuple[str, ...]
    adapt_S: Tensor
    decay_S: Tensor
    multiplier_S: Tensor
    counts_S: Tensor
    measures_QS: Tensor
    ratio_S: Tensor
    rate_S: Tensor

    @property
    def norms(self) -> Tensor:
        """Norms of weight, direction and gradient of the last step, (3, S)."""
        return self.measures_QS[:NORMS].sqrt()

    @property
    def rms(self) -> Tensor:
        """RMS of g / sqrt(v) of the last step, v with this step's gradient in it, (S,)."""
        return (self.measures_QS[AFTER] / self.counts_S).sqrt()

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
        counts_S=torch.tensor(
            [float(math.prod(shape)) for flat in flats for shape in flat.shapes], device=device
        ),
        measures_QS=torch.zeros(NORMS, len(names), device=device),
        ratio_S=torch.ones(len(names), device=device),
        rate_S=torch.zeros(len(names), device=device),
    )


NORM_KEYS = ("grad_norm", "update_norm", "weight_norm", "trust_ratio", "rate", "adapts")
WATCH_KEYS = ("grad_peak", "rms", "rms_before", "cosine")


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
        adapts_S: whether a tensor has such a factor of its own; bool.
        watched: whether the rest was measured; NaN otherwise.
        grad_peak_S: largest |gradient|.
        rms_S: RMS of g / max(sqrt(v), eps), v corrected for its start at 0 and with this step's g
            in it, which bounds it by sqrt(1 / (1 - beta2)); NaN without a second moment.
        rms_before_S: the same with v as it was before this step; NaN at the first one.
        cosine_S: of the gradient and the momentum before this step; NaN where either is 0.
    """

    names: tuple[str, ...]
    grad_norm_S: Tensor
    update_norm_S: Tensor
    weight_norm_S: Tensor
    trust_ratio_S: Tensor
    rate_S: Tensor
    adapts_S: Tensor
    watched: bool
    grad_peak_S: Tensor
    rms_S: Tensor
    rms_before_S: Tensor
    cosine_S: Tensor

    @property
    def keys(self) -> tuple[str, ...]:
        """What was measured."""
        return NORM_KEYS + WATCH_KEYS * self.watched

    def table(self) -> dict[str, npt.NDArray[np.float32]]:
        """Key -> values (S,) in the order of `names`; waits for the device once."""
        table_KS = torch.stack([getattr(self, f"{key}_S").float() for key in self.keys])
        return dict(zip(self.keys, table_KS.cpu().numpy(), strict=True))

    def rows(self) -> dict[str, dict[str, float]]:
        """Tensor name -> value of each key; waits for the device once."""
        table = self.table()
        return {
            name: {key: float(values_S[row]) for key, values_S in table.items()}
            for row, name in enumerate(self.names)
        }


def signals_of(plans: list[Plan], order: list[str], adapts: list[Tensor]) -> Signals:
    """What the last step of each plan measured, its tensors in the given order.

    Args:
        plans: of the step.
        order: names of all tensors.
        adapts: of each plan, which of its tensors have a factor of their own.
    """
    place = {name: row for row, name in enumerate(n for plan in plans for n in plan.names)}
    names = tuple(name for name in order if name in place)
    rows = torch.tensor([place[name] for name in names], device=plans[0].device)

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors, dim=-1)[..., rows]

    measures_QS = joined([plan.measures_QS for plan in plans])
    norms_3S, watched = measures_QS[:NORMS].sqrt(), len(measures_QS) == EVERYTHING
    nothing_S = torch.full_like(norms_3S[0], torch.nan)
    rest = [nothing_S] * 4
    if watched:
        counts_S = joined([plan.counts_S for plan in plans])
        product_S = measures_QS[PRODUCT] / norms_3S[GRADIENT]
        rest = [
            # a maximum over ranks may lose a NaN, a sum does not
            torch.where(norms_3S[GRADIENT].isnan(), nothing_S, measures_QS[PEAK]),
            (measures_QS[AFTER] / counts_S).sqrt(),
            (measures_QS[BEFORE] / counts_S).sqrt(),
            product_S / measures_QS[MOMENTUM].sqrt(),
        ]
    return Signals(
        names,
        norms_3S[GRADIENT],
        norms_3S[UPDATE],
        norms_3S[WEIGHT],
        joined([plan.ratio_S for plan in plans]),
        joined([plan.rate_S for plan in plans]),
        joined(adapts),
        watched,
        *rest,
    )
