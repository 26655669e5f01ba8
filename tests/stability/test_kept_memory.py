"""Freed memory stays in the process while work goes on, and leaves it afterwards."""

import ctypes
import resource
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from mocov3_ds.stability.kept_memory import freed_memory_at_hand


def count_page_faults() -> int:
    """Pages that 50 rounds of arrays of 8 MiB in all took from the system, after a first round."""
    faults = []
    for _ in range(51):
        arrays = [np.full(2**17, 1.0) for _ in range(8)]
        del arrays
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return faults[-1] - faults[0]


def test_arrays_are_made_of_freed_memory() -> None:
    with freed_memory_at_hand():
        assert count_page_faults() < 2**11  # one round has as many pages


def test_what_was_kept_is_given_back() -> None:
    with freed_memory_at_hand():
        arrays = [np.full(2**17, 1.0) for _ in range(200)]
        del arrays
        kept = psutil.Process().memory_info().rss
    assert kept - psutil.Process().memory_info().rss > 100 * 2**20


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    with freed_memory_at_hand():
        pass
