"""Rows, rules and sizes of the tensors of a step, over more than one flat."""

import torch

from mocov3_ds.distributed.segments import Flat, Segment, whole_flat
from mocov3_ds.optim import Rule
from mocov3_ds.optim.step_tables import build_tables

RULES = {
    "a": Rule(decay=True, lr_multiplier=1, adapt=True),
    "b": Rule(decay=0.5, lr_multiplier=2, adapt=False),
    "c": Rule(decay=False, lr_multiplier=3, adapt=True),
}


def test_rows_go_on_from_flat_to_flat() -> None:
    first = whole_flat("a", torch.zeros(2, 3))
    segment = Segment("c", index=1, start=4, length=2, offset=0)
    second = Flat(torch.zeros(2), ("b", "c"), ((4,), (2, 5)), (segment,), sharded=True)
    tables = build_tables([first, second], RULES)
    assert tables.names == ("a", "b", "c")
    assert tables.adapt_S.tolist() == [True, False, True]
    assert tables.decay_S.tolist() == [1.0, 0.5, 0.0]
    assert tables.multiplier_S.tolist() == [1.0, 2.0, 3.0]
    assert tables.counts_S.tolist() == [6.0, 4.0, 10.0]
    assert tables.device == torch.device("cpu")
    one, other = tables.shares
    assert (one.rows, other.rows) == (slice(0, 1), slice(1, 3))
    assert (other.row(segment), other.decay(segment)) == (2, 0.0)
    assert (one.segment_rows.tolist(), other.segment_rows.tolist()) == ([0], [2])
    assert not len(other.only([]).segment_rows)
