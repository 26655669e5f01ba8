"""Which tensors one call of `step` updates, and with what rule each: tables on the flats' device.

Legend: S = tensors that one call of `step` updates; K = segments of a flat on this rank.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mocov3_ds.distributed.segments import Flat, Segment
from mocov3_ds.optim.rules import Rule


@dataclass(frozen=True, eq=False)
class Share:
    """One flat tensor among those of a step.

    Attributes:
        flat: The flat tensor and the segments that lie in it on this rank.
        first: Row of its first tensor among the S of the step.
        rules: Rules of the tensors of the flat, in the order of its names.
    """

    flat: Flat
    first: int
    rules: tuple[Rule, ...]

    def row(self, segment: Segment) -> int:
        """Row of a segment's tensor among the S of the step."""
        return self.first + segment.index

    def decay(self, segment: Segment) -> float:
        """Multiple of the weight decay that holds for a segment's tensor."""
        return float(self.rules[segment.index].decay)

    def only(self, segments: Iterable[Segment]) -> "Share":
        """The same share with some of its segments alone."""
        return replace(self, flat=replace(self.flat, segments=tuple(segments)))

    @cached_property
    def segment_rows(self) -> Tensor:
        """Row of the tensor of each of the K segments here, int64, on the flat's device."""
        rows = [self.row(segment) for segment in self.flat.segments]
        return torch.tensor(rows, dtype=torch.int64, device=self.flat.tensor.device)

    @property
    def rows(self) -> slice:
        """Rows of the flat's tensors among the S of the step."""
        return slice(self.first, self.first + len(self.flat.names))


@dataclass(frozen=True, eq=False)
class StepTables:
    """What is known of the tensors of one call of `step` before it is made.

    Attributes:
        shares: The flats in which the tensors lie.
        names: Names of the S tensors, in the order of the rows.
        adapt_S: Whether the rule lets a tensor's step be scaled by a trust ratio; bool.
        decay_S: Multiple of the weight decay of each tensor, fp32.
        multiplier_S: Multiple of the learning rate of each tensor, fp32.
        counts_S: Elements of each whole tensor, fp32.
        absent: Tensors without a gradient, which stay as they are: their rows are there, but no
            segment of theirs is in the shares.
    """

    shares: tuple[Share, ...]
    names: tuple[str, ...]
    adapt_S: Tensor
    decay_S: Tensor
    multiplier_S: Tensor
    counts_S: Tensor
    absent: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        """Device on which the flats lie."""
        return self.adapt_S.device


def build_tables(
    flats: Sequence[Flat], rules: Mapping[str, Rule], absent: frozenset[str] = frozenset()
) -> StepTables:
    """Make the tables of a step.

    Args:
        flats: Flat tensors that the step updates, on one device.
        rules: Name of each of their tensors -> its rule.
        absent: Tensors without a gradient in this step.
    """
    shares: list[Share] = []
    names: list[str] = []
    for flat in flats:
        share = Share(flat, len(names), tuple(rules[name] for name in flat.names))
        present = [segment for segment in flat.segments if segment.name not in absent]
        shares.append(share if len(present) == len(flat.segments) else share.only(present))
        names += flat.names
    rules_S = [rules[name] for name in names]
    sizes = [float(math.prod(shape)) for flat in flats for shape in flat.shapes]
    device = flats[0].tensor.device
    return StepTables(
        shares=tuple(shares),
        names=tuple(names),
        adapt_S=torch.tensor([rule.adapt for rule in rules_S], device=device),
        decay_S=torch.tensor([float(rule.decay) for rule in rules_S], device=device),
        multiplier_S=torch.tensor([float(rule.lr_multiplier) for rule in rules_S], device=device),
        counts_S=torch.tensor(sizes, device=device),
        absent=absent & {*names},
    )
