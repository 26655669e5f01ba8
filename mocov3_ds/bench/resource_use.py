"""How much time does a call take, and how much memory does this process hold?"""

import resource
import time
from collections.abc import Callable

import psutil
import torch


def time_call(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: CPU time of all threads on a CPU, wall time of the work on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def used_cpu_seconds() -> float:
    """CPU seconds of this process, its threads, and its children that have ended."""
    owners = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(owner) for owner in owners]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def resident_bytes() -> int:
    """Bytes of physical memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Most bytes of physical memory that this process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
