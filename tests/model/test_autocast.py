"""Arithmetic without autocast, on each kind of device."""

import torch

from mocov3_ds.model.autocast import autocast_off


def test_autocast_is_off_within() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with autocast_off(x.device):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_a_device_without_autocast_needs_none() -> None:
    x = torch.ones(2, 2, device="meta")
    with autocast_off(x.device):
        assert (x @ x).is_meta
