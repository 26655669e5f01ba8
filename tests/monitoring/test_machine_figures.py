"""Figures of the machine: there at once, then every ten seconds."""

import time
from unittest import mock

import torch

from mocov3_ds.monitoring.machine_figures import MachineFigures


def test_figures_come_every_ten_seconds() -> None:
    figures = MachineFigures(torch.device("cpu"))
    first = figures.read()
    assert 0 < first["system/machine_memory_percent"] < 100
    assert 0.01 < first["system/machine_process_gib"] < 64
    assert figures.read() == {}
    with mock.patch.object(time, "monotonic", return_value=time.monotonic() + 10):
        assert set(figures.read()) == set(first)
