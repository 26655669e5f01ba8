"""Gradients and sums of the flat tensors of a step, and which tensors are refused."""

import pytest
import torch
from torch import nn

from mocov3_ds.distributed.segments import whole_flat
from mocov3_ds.optim import Lamb, Rule
from mocov3_ds.optim.flat_step import describe_flats, flat_gradient, sum_over_ranks
from mocov3_ds.optim.kernel_types import EVERYTHING
from mocov3_ds.optim.step_tables import build_tables


def test_a_tensor_without_a_gradient_counts_as_one_of_zeros() -> None:
    flat = whole_flat("w", torch.ones(2, 3))
    gradient = flat_gradient(flat)
    assert gradient.shape == (6,) and not gradient.any()
    assert flat.tensor.grad is not None and flat.tensor.grad.shape == (2, 3)


def test_a_transposed_gradient_is_read_in_order() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.arange(6.0).view(3, 2).T
    assert flat_gradient(whole_flat("w", weight)).tolist() == [0, 2, 4, 1, 3, 5]


def test_sums_of_whole_tensors_are_a_copy() -> None:
    tables = build_tables([whole_flat("w", torch.ones(2))], {"w": Rule()})
    local_QS = torch.arange(float(EVERYTHING)).view(EVERYTHING, 1)
    sums_QS = sum_over_ranks(tables.shares, local_QS, None)
    assert torch.equal(sums_QS, local_QS) and sums_QS is not local_QS


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
