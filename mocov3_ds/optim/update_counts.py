"""How many updates each tensor has had: those of its optimizer but the steps without a gradient.

A flat's state counts the optimizer's steps as `step`; where a tensor was ever without a gradient,
`skipped` beside it holds name -> number of such steps, so that the state of a usual run has one
number more than its moments.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.segments import Flat, Segment
from mocov3_ds.optim.step_tables import Share, StepTables

State = MutableMapping[str, Any]
Parts = dict[tuple[Share, tuple[Segment, ...]], Share]

KEPT = 64
"""Tables of absent tensors that are kept for the steps to come"""


def count_step(share: Share, state: State, absent: frozenset[str]) -> None:
    """Count a step in the state of a flat.

    Args:
        share: The flat in the step.
        state: The flat's state, which is changed.
        absent: Tensors without a gradient in this step.
    """
    state["step"] += 1
    for name in absent & {*share.flat.names} if absent else ():
        skipped = state.setdefault("skipped", {})
        skipped[name] = skipped.get(name, 0) + 1


def updates_of(name: str, state: Mapping[str, Any]) -> int:
    """Number of steps in which a tensor had a gradient."""
    return int(state["step"]) - int(state.get("skipped", {}).get(name, 0))


def split_by_updates(
    share: Share, state: Mapping[str, Any], parts: Parts
) -> list[tuple[Share, int]]:
    """Parts of a share whose tensors have had the same number of updates, with that number.

    Args:
        share: The flat in the step.
        state: State of the flat, with this step in it.
        parts: Parts of earlier steps, which are kept as kernels keep tables of each share.
    """
    if not state.get("skipped"):
        return [(share, int(state["step"]))]
    by_number: dict[int, list[Segment]] = {}
    for segment in share.flat.segments:
        by_number.setdefault(updates_of(segment.name, state), []).append(segment)
    split = []
    for number, segments in by_number.items():
        key = (share, tuple(segments))
        if key not in parts:
            if len(parts) >= KEPT:
                parts.clear()
            parts[key] = share.only(segments)
        split.append((parts[key], number))
    return split


def find_first_updates(tables: StepTables, states: Mapping[Tensor, State]) -> list[bool]:
    """Whether each of the S tensors had had no update before this step."""
    return [
        updates_of(name, states[share.flat.tensor]) <= 1
        for share in tables.shares
        for name in share.flat.names
    ]


def restore_counts(flat: Flat, state: State, step: int, skipped: Mapping[str, int]) -> None:
    """Take counts back; all ranks of a sharded flat must call.

    Args:
        flat: Flat tensor whose state it is.
        state: Its state, which is changed.
        step: Optimizer steps done until then.
        skipped: Steps without a gradient of those of its tensors that this rank knows of.
    """
    state["step"] = step
    state.pop("skipped", None)
    counts_S = torch.tensor([skipped.get(name, 0) for name in flat.names], dtype=torch.int64)
    if flat.sharded:
        counts_S = ranks.all_reduce_max(counts_S.to(ranks.this_device()), flat.group)
    skipped_counts = {n: c for n, c in zip(flat.names, counts_S.tolist(), strict=True) if c}
    if skipped_counts:
        state["skipped"] = skipped_counts
