"""What did reading from object storage cost this process? Bytes, retries, cache hits."""

import threading
from collections import Counter

_lock = threading.Lock()
_counts: Counter[str] = Counter()


def add_count(name: str, number: int = 1) -> None:
    """Add to a counter, from any thread."""
    with _lock:
        _counts[name] += number


def take_counts() -> dict[str, int]:
    """Return the counters of this process since the last call, by name, and set them to zero.

    `store_bytes` were read from stores, `store_retries` counts reads and writes that failed,
    `cache_hits` and `cache_misses` count blocks. A counter that stands at zero is left out.
    """
    with _lock:
        counts = dict(_counts)
        _counts.clear()
    return counts
