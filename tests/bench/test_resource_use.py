"""Meters of time and memory: they see work, and what a process holds."""

import hashlib
import mmap
import time

import torch

from mocov3_ds.bench.resource_use import (
    peak_resident_bytes,
    resident_bytes,
    time_call,
    used_cpu_seconds,
)


def work() -> None:
    hashlib.sha256(bytes(20_000_000)).digest()


def test_time_of_a_call_is_work_not_waiting() -> None:
    cpu = torch.device("cpu")
    busy = time_call(work, cpu)
    waiting = time_call(lambda: time.sleep(0.2), cpu)
    assert busy > 0
    assert waiting < 0.1


def test_cpu_seconds_grow_with_work() -> None:
    start = used_cpu_seconds()
    work()
    assert used_cpu_seconds() > start


def test_memory_that_is_written_is_held() -> None:
    start = resident_bytes()
    with mmap.mmap(-1, 50_000_000) as block:  # pages of its own, not those that were freed before
        block.write(b"x" * len(block))
        assert resident_bytes() - start > 40_000_000
        assert peak_resident_bytes() >= start + len(block) // 2
