"""Steps that a tensor was without a gradient are counted beside its optimizer's."""

from typing import Any

import torch

from mocov3_ds.distributed.segments import Flat, Segment
from mocov3_ds.optim import Rule
from mocov3_ds.optim.step_tables import build_tables
from mocov3_ds.optim.update_counts import (
    count_step,
    find_first_updates,
    restore_counts,
    split_by_updates,
    updates_of,
)

FLAT = Flat(
    torch.ones(6),
    tuple("abc"),
    ((2,),) * 3,
    tuple(Segment(n, i, 0, 2, 2 * i) for i, n in enumerate("abc")),
)


def test_counts_and_parts() -> None:
    tables = build_tables([FLAT], dict.fromkeys("abc", Rule()), frozenset("b"))
    whole = build_tables([FLAT], dict.fromkeys("abc", Rule()))
    (share,), (everything,) = tables.shares, whole.shares
    state: dict[str, Any] = {"step": 0}
    count_step(share, state, tables.absent)
    assert state == {"step": 1, "skipped": {"b": 1}}
    assert find_first_updates(tables, {FLAT.tensor: state}) == [True, True, True]
    count_step(everything, state, frozenset())
    assert find_first_updates(tables, {FLAT.tensor: state}) == [False, True, False]
    assert [updates_of(name, state) for name in "abc"] == [2, 1, 2]
    parts: dict[Any, Any] = {}
    split = split_by_updates(everything, state, parts)
    assert [("".join(s.name for s in p.flat.segments), n) for p, n in split] == [
        ("ac", 2),
        ("b", 1),
    ]
    again = split_by_updates(everything, state, parts)  # the same objects: kernels know them
    assert all(one[0] is other[0] for one, other in zip(split, again, strict=True))


def test_a_usual_run_has_one_part_and_no_count() -> None:
    (share,) = build_tables([FLAT], dict.fromkeys("abc", Rule())).shares
    state: dict[str, Any] = {"step": 4}
    count_step(share, state, frozenset())
    assert state == {"step": 5}
    assert split_by_updates(share, state, {}) == [(share, 5)]


def test_counts_come_back() -> None:
    state: dict[str, Any] = {"step": 1, "skipped": {"c": 1}}
    restore_counts(FLAT, state, 9, {"a": 2, "b": 0})
    assert state == {"step": 9, "skipped": {"a": 2}}
    restore_counts(FLAT, state, 9, {})
    assert state == {"step": 9}
