"""Clipping a gradient by what gradients have been: AdaGC per tensor, ZClip of the whole.

    "optimizer": {"type": "AdamW", "params": {...}, "clip": "adagc"}
    "optimizer": {"type": "Lamb", "params": {...}, "clip": {"type": "zclip", "z": 3.0}}

DeepSpeed's `gradient_clipping` knows one limit for the whole run and all tensors; these two follow
the run. They clip what the optimizer is given, before its moments see it, and so go with each
optimizer here; one of the three is chosen. The norms are those of whole tensors, summed in fp64
over the segments of all ranks, so that each ZeRO stage and number of ranks clips alike; the state
is a few numbers a tensor, the same on all ranks.

Legend: S = tensors that one call of `step` updates; K = numbers that a clip keeps of each tensor.
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.segments import Flat
from mocov3_ds.optim.arguments import check_number
from mocov3_ds.optim.kernel_types import FlatStep
from mocov3_ds.optim.step_tables import StepTables
from mocov3_ds.settings.spelling import did_you_mean

if TYPE_CHECKING:
    from mocov3_ds.distributed.engine import Engine

State = MutableMapping[str, Any]
CLIP_KEY = "clip"
"""name of the state, beside the moments of a flat: (K, S)"""


@dataclass(frozen=True, kw_only=True)
class AdaGC:
    """Each tensor's gradient is no longer than a little above its trailing mean (arXiv 2502.11034).

    While a tensor has had fewer than `warmup_steps` gradients, the whole gradient is clipped at
    `lambda_abs` (0 = not at all) and the smallest norm of the tensor is kept; from then on it is at
    most `lambda_rel` times the mean, which is moved by the clipped norm. Two things differ from the
    paper. It has `lambda_abs` 1, the usual limit of language models; here norms fall from 30 or 100
    to about 1 in the first steps, and a mean that begins below what gradients are, and grows by 0.1
    % a step at most, would clip each tensor in each step. And a gradient of zeros says nothing: the
    paper's mean would hold a tensor that begins with one for ever.
    """

    lambda_rel: float = 1.05
    lambda_abs: float = 0.0
    beta: float = 0.98
    warmup_steps: int = 100

    numbers: ClassVar[int] = 2
    """count of gradients as far as it matters, mean of clipped norms"""

    def clip(self, norm_S: Tensor, whole: Tensor, state_KS: Tensor) -> tuple[Tensor, Tensor]:
        """Factor of each gradient, and the state after this step.

        Args:
            norm_S: Norm of each whole tensor's gradient.
            whole: Norm of the gradient of all tensors together, a scalar.
            state_KS: State before the step; zeros before the first.
        """
        count_S, mean_S = state_KS
        is_new_S, warms_S = mean_S == 0, count_S < self.warmup_steps
        own_S = (self.lambda_rel * mean_S / norm_S).clamp(max=1.0)
        shared = ((self.lambda_abs or math.inf) / whole).clamp(max=1.0)
        factor_S = torch.where(warms_S, shared, torch.where(is_new_S, 1.0, own_S))
        clipped_S = factor_S * norm_S
        smallest_S = torch.minimum(mean_S, clipped_S)
        moved_S = self.beta * mean_S + (1 - self.beta) * clipped_S
        after_S = torch.where(is_new_S, clipped_S, torch.where(warms_S, smallest_S, moved_S))
        counted_S = (count_S + 1).clamp(max=self.warmup_steps)
        says_something_S = (norm_S > 0) & norm_S.isfinite() & whole.isfinite()
        state_KS = torch.where(says_something_S, torch.stack([counted_S, after_S]), state_KS)
        return torch.where(norm_S > 0, factor_S, 1.0), state_KS


@dataclass(frozen=True, kw_only=True)
class ZClip:
    """A whole gradient that is an outlier of its own history is shortened (arXiv 2504.02507).

    Mean and variance of the norm are those of the first `warmup_steps` steps, then trailing ones.
    A norm whose z-score is above the limit `z` becomes mean + z^2 / z-score standard deviations:
    the further out, the shorter. The clipped norm moves mean and variance.
    """

    z: float = 2.5
    alpha: float = 0.97
    warmup_steps: int = 25

    numbers: ClassVar[int] = 3
    """count of steps as far as it matters, mean and variance of the norm; equal for all tensors"""

    def clip(self, norm_S: Tensor, whole: Tensor, state_KS: Tensor) -> tuple[Tensor, Tensor]:
        """See `AdaGC.clip`; the factor is the same for all tensors."""
        count_S, mean_S, variance_S = state_KS
        warms_S = count_S < self.warmup_steps
        deviation_S = variance_S.sqrt()
        score_S = (whole - mean_S) / (deviation_S + 1e-6)
        is_outlier_S = ~warms_S & (score_S > self.z)
        clipped_S = torch.where(is_outlier_S, mean_S + self.z**2 / score_S * deviation_S, whole)
        # until the end of the warm-up, exact mean and variance of all so far
        share_S = torch.where(warms_S, 1 / (count_S + 1), 1 - self.alpha)
        moved_S = mean_S + share_S * (clipped_S - mean_S)
        before_S = torch.where(warms_S, mean_S, moved_S)
        square_S = (clipped_S - before_S) * (clipped_S - moved_S)
        spread_S = variance_S + share_S * (square_S - variance_S)
        counted_S = (count_S + 1).clamp(max=self.warmup_steps)
        after_KS = torch.stack([counted_S, moved_S, spread_S])
        factor_S = torch.where(is_outlier_S, clipped_S / whole, 1.0)
        return factor_S, torch.where((whole > 0) & whole.isfinite(), after_KS, state_KS)


GradientClip = AdaGC | ZClip
_KINDS: dict[str, type[AdaGC] | type[ZClip]] = {"adagc": AdaGC, "zclip": ZClip}


def read_clip(value: Any) -> GradientClip | None:
    """The clip that an optimizer block asks for; None where it asks for none.

    Args:
        value: null, "adagc", "zclip", or an object with the type and some of its numbers.

    Raises:
        ValueError: An unknown type or number, or one that cannot be.
    """
    if value is None:
        return None
    tree = {"type": value} if isinstance(value, str) else value
    if not isinstance(tree, Mapping) or not isinstance(tree.get("type"), str):
        raise ValueError(
            f"the optimizer block's clip is {value!r}; it is one of {', '.join(_KINDS)}, or an "
            'object such as {"type": "adagc", "lambda_rel": 1.05}.'
        )
    kind = _KINDS.get(tree["type"].lower())
    if kind is None:
        raise ValueError(
            f"the optimizer block's clip {tree['type']!r} is unknown"
            f"{did_you_mean(tree['type'].lower(), _KINDS)}; there are {', '.join(_KINDS)}."
        )
    names = [entry.name for entry in fields(kind)]
    numbers: dict[str, Any] = {}
    for name, number in tree.items():
        if name == "type":
            continue
        if name not in names:
            raise ValueError(
                f"clip {tree['type']} has no number {name!r}{did_you_mean(name, names)}; known: "
                f"{', '.join(names)}."
            )
        low, high = _BOUNDS[name]
        numbers[name] = check_number(f"clip.{name}", number, low, high)
        if name == "warmup_steps":
            numbers[name] = int(numbers[name])
    return kind(**numbers)


_BOUNDS = {
    "lambda_rel": (1.0, 1e6),
    "lambda_abs": (0.0, 1e12),
    "beta": (0.0, 1.0),
    "alpha": (0.0, 1.0),
    "z": (1e-3, 1e6),
    "warmup_steps": (1, 1e6),
}


def refuse_two_clips(clipper: "Clipper | None", limit: float) -> None:
    """Refuse a clip beside DeepSpeed's own: each would judge what the other has left.

    Args:
        clipper: Clip of the optimizer; None = it has none.
        limit: DeepSpeed's `gradient_clipping`; 0 = none.

    Raises:
        ValueError: Both are there.
    """
    if clipper is not None and limit > 0:
        raise ValueError(
            f"gradient_clipping {limit:g} and the optimizer block's clip "
            f"{type(clipper.clip).__name__.lower()} would both clip the gradient; keep one of them "
            "(gradient_clipping 0, which must be written as DeepSpeed's default is 1.0)."
        )


# --------------------------------------------------------------------------------- in a step


class Clipper:
    """A clip at work: clips the gradients of each step in place, and keeps its state with theirs.

    Args:
        clip: What decides.
    """

    def __init__(self, clip: GradientClip) -> None:
        self.clip = clip
        self._factors: dict[tuple[str, ...], Tensor] = {}

    def clip_step(
        self,
        tables: StepTables,
        flats: Sequence[FlatStep],
        states: Mapping[Tensor, State],
        exchange_device: torch.device | None,
        engine: "Engine[nn.Module] | None",
    ) -> None:
        """Clip the gradients of a step in place; all ranks must call.

        Args:
            tables: Tables of the step.
            flats: Flats that have a gradient on this rank.
            states: State of each flat tensor, in which the clip keeps its own.
            exchange_device: Device on which the ranks exchange tensors; None for the tables'.
            engine: Who knows the norm of the whole gradient, of which other calls of `step` see
                other parts; None = this one sees all.
        """
        pieces = [
            (step.share.row(segment), segment.of(step.gradient))
            for step in flats
            for segment in step.share.flat.segments
        ]
        norm_S = _sum_squares(tables, flats, exchange_device).sqrt()
        if engine is None:
            whole_norm = norm_S.norm()
        else:
            from mocov3_ds.distributed import zero

            told_norm = zero.whole_gradient_norm(engine)
            whole_norm = torch.as_tensor(told_norm, dtype=torch.float64, device=tables.device)
        old_states = [self._state(share.flat, states[share.flat.tensor]) for share in tables.shares]
        factor_S, state_KS = self.clip.clip(
            norm_S, whole_norm, torch.cat(old_states, dim=1).double()
        )
        for share, own_KS in zip(tables.shares, old_states, strict=True):
            own_KS.copy_(state_KS[:, share.rows])
        self._factors[tables.names] = factor_S = factor_S.float()
        factors = factor_S.tolist() if factor_S.device.type == "cpu" else None  # no wait on a GPU
        for row, piece in pieces:
            if factors is None or factors[row] != 1:
                piece.mul_(factor_S[row])

    def last_values(self) -> dict[str, float]:
        """Smallest factor of the last step, and the share of tensors that it clipped."""
        if not self._factors:
            return {}
        factor_S = torch.cat(list(self._factors.values()))
        smallest, share = torch.stack([factor_S.min(), (factor_S < 1).float().mean()]).tolist()
        return {"clip_factor": smallest, "clipped_share": share}

    def state_of(self, flat: Flat, index: int, state: State) -> Tensor:
        """What is known of one tensor of a flat, (K,); the same on all ranks."""
        return self._state(flat, state)[:, index].clone()

    def restore(self, flat: Flat, state: State, saved: Mapping[str, Tensor | None]) -> None:
        """Take the state back; all ranks of a sharded flat must call.

        Args:
            flat: Flat tensor whose state it is.
            state: Its state, which is changed.
            saved: Name -> what `state_of` gave, of those of its tensors that this rank knows of;
                that of another kind of clip is not taken, and this one begins anew.
        """
        state.pop(CLIP_KEY, None)
        own_KS = self._state(flat, state)
        for index, name in enumerate(flat.names):
            saved_K = saved.get(name)
            if saved_K is not None and len(saved_K) == len(own_KS):
                own_KS[:, index] = saved_K.to(own_KS.device)
        if flat.sharded:  # a rank knows the tensors of which it has a part; no number is below 0
            there_KS = own_KS.to(ranks.this_device(), copy=True)
            own_KS.copy_(ranks.all_reduce_max(there_KS, flat.group))

    def _state(self, flat: Flat, state: State) -> Tensor:
        """What is known of the tensors of a flat, (K, S); zeros where the clip begins."""
        if CLIP_KEY not in state or len(state[CLIP_KEY]) != self.clip.numbers:
            shape = (self.clip.numbers, len(flat.names))
            state[CLIP_KEY] = torch.zeros(shape, device=flat.tensor.device)
        own_KS: Tensor = state[CLIP_KEY]
        return own_KS


def _sum_squares(
    tables: StepTables, flats: Sequence[FlatStep], exchange_device: torch.device | None
) -> Tensor:
    """Square sum of each whole tensor's gradient over all ranks, fp64, (S,)."""
    squares_S = torch.zeros(len(tables.names), dtype=torch.float64, device=tables.device)
    pieces = [segment.of(step.gradient) for step in flats for segment in step.share.flat.segments]
    if pieces:
        rows = torch.cat([step.share.segment_rows for step in flats])
        norms = torch._foreach_norm(pieces, 2.0, torch.float64)
        squares_S.index_add_(0, rows, torch.stack(list(norms)).square())
    sharded = [share.flat for share in tables.shares if share.flat.sharded]
    if not sharded:
        return squares_S
    everywhere_S = squares_S.to(exchange_device or squares_S.device)
    return ranks.all_reduce_sum(everywhere_S, sharded[0].group).to(tables.device)
