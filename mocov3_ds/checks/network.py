"""What carries the collectives: are their sums right, and how fast are they.

Bandwidth is the bus bandwidth of NVIDIA's nccl-tests, so the numbers compare with its tables: bytes
that must cross the slowest link over the time, 2 (n - 1) / n of the buffer for all_reduce and
(n - 1) / n for the other two.
"""

import statistics
import time
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from mocov3_ds.checks.finding import Finding, sound
from mocov3_ds.distributed import ranks

_MB = 10**6
_SIZES_MB = (1, 16, 256)
_REPEATS = {1: 8, 16: 4, 256: 2}
_COPIES = 4  # of the buffer that must fit beside each other
_CLOCK_LIMIT_S = 1.0
_REMEDY = (
    "the network changes numbers: find the faulty node or link with nccl-tests (all_reduce_perf "
    "-c 1), and try NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1."
)


def check_collectives(device: torch.device) -> list[Finding]:
    """Result and bandwidth of all_reduce, all_gather and reduce_scatter at three sizes."""
    world = ranks.world_size()
    if world == 1:
        return [Finding("collectives", "skip", "one rank, nothing to exchange")]
    findings = []
    room = _smallest_free(device)
    for name, collective, share, wanted in _collectives(world):
        speeds, wrong = {}, 0
        for size in _SIZES_MB:
            if _COPIES * size * _MB * ranks.local_world_size() > room:
                continue
            seconds, off = _timed(collective, size, device, wanted)
            wrong += off
            speeds[size] = share * size * _MB / 1e9 / seconds
        of_ranks = ranks.gather_objects(speeds)
        findings.append(_bandwidth(name, of_ranks, wrong))
    return findings


def _collectives(world: int) -> list[tuple[str, Callable[[Tensor], Tensor], float, float]]:
    """Name, call, share of the buffer that crosses a link, mean of the result of rank + 1."""
    total = world * (world + 1) / 2
    around = (world - 1) / world
    return [
        ("all_reduce", ranks.all_reduce_sum, 2 * around, total),
        ("reduce_scatter", ranks.reduce_scatter_sum, around, total),
        ("all_gather", _gathered, around, total / world),
    ]


def _gathered(x: Tensor) -> Tensor:
    """All parts; `x` is as large as the result, so that the sizes of all three compare."""
    return ranks.all_gather_flat(x[: len(x) // ranks.world_size()])


def _timed(
    collective: Callable[[Tensor], Tensor], size: int, device: torch.device, wanted: float
) -> tuple[float, int]:
    """Median seconds of a call, and whether a result was wrong."""
    world = ranks.world_size()
    numbers = size * _MB // 4 // world * world
    own = torch.full((numbers,), float(ranks.rank() + 1), device=device)
    times, wrong = [], 0
    for number in range(_REPEATS[size] + 1):
        x = own.clone()
        ranks.barrier()
        _wait_for(device)
        began = time.perf_counter()
        result = collective(x)
        _wait_for(device)
        if number:  # the first one makes connections
            times.append(time.perf_counter() - began)
        # rank + 1 and its sums are whole numbers, so nothing rounds
        wrong |= int(abs(float(result.double().mean()) - wanted) > 1e-9 * wanted)
    return statistics.median(times), wrong


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _smallest_free(device: torch.device) -> float:
    """Bytes of memory that the fullest rank has left; all ranks must call."""
    free = (
        torch.cuda.mem_get_info(device)[0] * ranks.local_world_size()
        if device.type == "cuda"
        else psutil.virtual_memory().available / 2
    )
    of_ranks: list[float] = ranks.gather_objects(float(free))
    return min(of_ranks)


def _bandwidth(name: str, of_ranks: list[dict[int, float]], wrong: int) -> Finding:
    sizes = list(of_ranks[0])
    numbers = {f"{s} MB, GB/s": statistics.median(speeds[s] for speeds in of_ranks) for s in sizes}
    spread = [
        f"{min(r[s] for r in of_ranks):.2f}-{max(r[s] for r in of_ranks):.2f} at {s} MB"
        for s in sizes
    ]
    left_out = [f"{s}" for s in _SIZES_MB if s not in sizes]
    return sound(
        name,
        ("WRONG numbers; " if wrong else "")
        + f"GB/s {', '.join(spread)}"
        + (f"; no memory for {' and '.join(left_out)} MB" if left_out else ""),
        "right sums",
        trouble=wrong,
        remedy=_REMEDY,
        numbers=numbers,
    )


def check_clock() -> Finding:
    """How far the ranks' clocks are apart: smallest spread of five readings behind a barrier."""
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
