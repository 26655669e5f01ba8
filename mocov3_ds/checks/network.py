"""Does the network give right sums to the collectives, how fast, and do the clocks agree?

Bandwidth is the bus bandwidth of NVIDIA's nccl-tests, so that the numbers compare with its tables:
bytes that must cross the slowest link over the time, 2 (n - 1) / n of the buffer for all_reduce and
(n - 1) / n for the other two, on n ranks.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from mocov3_ds.checks.finding import Finding, judge_problem
from mocov3_ds.distributed import ranks

_MB = 10**6
SIZES_MB = (1, 16, 256)
_REPEATS = {1: 8, 16: 4, 256: 2}
_COPIES = 4  # buffers that must fit into memory at the same time
_CLOCK_LIMIT_S = 1.0
_REMEDY = (
    "the network changes numbers: find the faulty node or link with nccl-tests (all_reduce_perf "
    "-c 1), and try NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1."
)


def check_collectives(device: torch.device, sizes_mb: Sequence[int] = SIZES_MB) -> list[Finding]:
    """Check results and measure bandwidth of all_reduce, all_gather and reduce_scatter.

    Args:
        device: the device of this rank.
        sizes_mb: buffer sizes in 10^6 bytes; those without room in memory are left out.
    """
    world = ranks.world_size()
    if world == 1:
        return [Finding("collectives", "skip", "one rank, nothing to exchange")]
    findings = []
    room = _smallest_free_bytes(device)
    sizes = [s for s in sizes_mb if _COPIES * s * _MB * ranks.local_world_size() <= room]
    for collective in _collectives(world):
        speeds, wrong = {}, 0
        for size in sizes:
            seconds, is_wrong = _time_collective(collective, size, device)
            wrong += is_wrong
            speeds[size] = collective.traffic * size * _MB / 1e9 / seconds
        omitted = [size for size in sizes_mb if size not in sizes]
        findings.append(
            _describe_bandwidth(collective.name, ranks.gather_objects(speeds), wrong, omitted)
        )
    return findings


@dataclass(frozen=True)
class _Collective:
    name: str
    call: Callable[[Tensor], Tensor]
    traffic: float
    """share of the buffer that crosses the slowest link"""
    expected_mean: float
    """mean of the result if each rank gives a buffer full of rank + 1"""


def _collectives(world: int) -> list[_Collective]:
    total = world * (world + 1) / 2
    ring = (world - 1) / world
    return [
        _Collective("all_reduce", ranks.all_reduce_sum, 2 * ring, total),
        _Collective("reduce_scatter", ranks.reduce_scatter_sum, ring, total),
        _Collective("all_gather", _gather_parts, ring, total / world),
    ]


def _gather_parts(x: Tensor) -> Tensor:
    """All-gather of an equal part of `x` from each rank, so that the result is as large as `x`."""
    return ranks.all_gather_flat(x[: len(x) // ranks.world_size()])


def _time_collective(
    collective: _Collective, size: int, device: torch.device
) -> tuple[float, bool]:
    """Median seconds of a call on `size` MB, and whether any result was wrong."""
    world = ranks.world_size()
    numbers = size * _MB // 4 // world * world
    source = torch.full((numbers,), float(ranks.rank() + 1), device=device)
    expected = collective.expected_mean
    times, wrong = [], False
    for repeat in range(_REPEATS[size] + 1):
        x = source.clone()
        ranks.barrier()
        _wait_for(device)
        start = time.perf_counter()
        result = collective.call(x)
        _wait_for(device)
        if repeat:  # the first one makes connections
            times.append(time.perf_counter() - start)
        # rank + 1 and its sums are whole numbers, so nothing rounds
        wrong |= abs(float(result.double().mean()) - expected) > 1e-9 * expected
    return statistics.median(times), wrong


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _smallest_free_bytes(device: torch.device) -> float:
    """Free memory of the rank that has least; all ranks must call."""
    free = (
        torch.cuda.mem_get_info(device)[0] * ranks.local_world_size()
        if device.type == "cuda"
        else psutil.virtual_memory().available / 2
    )
    return min(ranks.gather_objects(float(free)))


def _describe_bandwidth(
    name: str, by_rank: list[dict[int, float]], wrong: int, omitted: Sequence[int]
) -> Finding:
    """The finding about one collective.

    Args:
        name: the name of the collective.
        by_rank: GB/s by size in MB, of each rank.
        wrong: number of sizes at which this rank got a wrong result.
        omitted: sizes in MB for which there is no memory.
    """
    sizes = list(by_rank[0])
    numbers = {f"{s} MB, GB/s": statistics.median(speeds[s] for speeds in by_rank) for s in sizes}
    spread = [
        f"{min(r[s] for r in by_rank):.2f}-{max(r[s] for r in by_rank):.2f} at {s} MB"
        for s in sizes
    ]
    return judge_problem(
        name,
        ("WRONG numbers; " if wrong else "")
        + f"GB/s {', '.join(spread)}"
        + (f"; no memory for {' and '.join(map(str, omitted))} MB" if omitted else ""),
        "right sums",
        problem=wrong,
        remedy=_REMEDY,
        numbers=numbers,
    )


def check_clock() -> Finding:
    """How far are the ranks' clocks apart: smallest spread of five readings after a barrier."""
    spreads = []
    for _ in range(5):
        ranks.barrier()
        times = ranks.gather_objects(time.time())
        spreads.append(max(times) - min(times))
    skew = min(spreads)
    good = skew <= _CLOCK_LIMIT_S
    return Finding(
        "clocks of the ranks",
        "pass" if good else "fail",
        f"{skew * 1e3:.1f} ms apart",
        f"<= {_CLOCK_LIMIT_S:g} s",
        ""
        if good
        else "start a time service on all machines (chronyc makestep, timedatectl set-ntp true): "
        "object stores refuse requests from a wrong clock, and logs do not line up.",
        {"seconds": skew},
    )
