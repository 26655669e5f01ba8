"""Gradients and sums of the flat tensors of a step, and which tensors are refused."""

import pytest
import torch
from torch import nn

from mocov3_ds.distributed.segments import whole_flat
from mocov3_ds.optim import Lamb, Rule
from mocov3_ds.optim.flat_step import (
    describe_flats,
    flat_gradient,
    measure_absent,
    start_sums,
    sum_over_ranks,
)
from mocov3_ds.optim.kernel_types import EVERYTHING, NORMS
from mocov3_ds.optim.step_tables import build_tables


def test_a_transposed_gradient_is_read_in_order() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.arange(6.0).view(3, 2).T
    assert flat_gradient(whole_flat("w", weight)).tolist() == [0, 2, 4, 1, 3, 5]


def test_sums_of_whole_tensors_are_a_copy() -> None:
    tables = build_tables([whole_flat("w", torch.ones(2))], {"w": Rule()})
    block_QS = start_sums(tables, EVERYTHING, {})
    assert block_QS[0].tolist() == [1] and not block_QS[1:].any()
    block_QS[1:] = torch.arange(float(EVERYTHING)).view(EVERYTHING, 1)
    sums_QS = sum_over_ranks(tables, block_QS, None)
    assert torch.equal(sums_QS, block_QS[1:])
    sums_QS += 1
    assert block_QS[1] == 0


def test_the_head_of_the_sums_says_which_tensors_have_a_gradient() -> None:
    flats = [whole_flat(name, torch.ones(2)) for name in "abc"]
    tables = build_tables(flats, dict.fromkeys("abc", Rule()), absent=frozenset("b"))
    assert start_sums(tables, NORMS, {"c": 2})[0].tolist() == [1, 0, 3]
    sums_QS = torch.zeros(NORMS, 3)
    for share, flat in zip(tables.shares, flats, strict=True):
        measure_absent(share, flat, tables.absent, sums_QS)
    assert sums_QS.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 0]]


def test_without_an_engine_each_tensor_is_a_flat_of_its_own() -> None:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = Lamb([("one", one), ("other", other)])
    flats = describe_flats(optimizer, None, {one: "one", other: "other"})
    assert [flat.names for flat in flats] == [("one",), ("other",)]
    assert not any(flat.sharded for flat in flats)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = Lamb(table.named_parameters())
    optimizer.attach()
    table(torch.tensor([1, 1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of 'weight' is sparse; .* sparse=False"):
        optimizer.step()
    assert optimizer.step_count == 0


def test_low_precision_weights_without_an_engine_are_refused() -> None:
    optimizer = Lamb([("a", nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))])
    with pytest.raises(ValueError, match=r"'a' is torch\.bfloat16; .* must be fp32"):
        optimizer.attach()
