"""Buffers that are state, beside tables that a constructor makes again."""

import torch
from torch import nn

from mocov3_ds.distributed.buffers import persistent_buffers


def test_tables_are_left_out() -> None:
    inner = nn.Module()
    inner.register_buffer("state", torch.ones(2))
    inner.register_buffer("table", torch.ones(3), persistent=False)
    outer = nn.Module()
    outer.inner, outer.norm = inner, nn.BatchNorm1d(4)
    outer.register_buffer("own", torch.ones(1))
    names = [name for name, _ in persistent_buffers(outer)]
    parameters = {name for name, _ in outer.named_parameters()}
    assert {*names} == {*outer.state_dict()} - parameters
    assert "inner.state" in names and "inner.table" not in names
