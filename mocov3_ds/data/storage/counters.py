"""What reading from object storage cost this process: bytes, retries, cache hits."""

import threading
from collections import Counter

_lock = threading.Lock()
_counts: Counter[str] = Counter()


def count(name: str, number: int = 1) -> None:
    """Add to a counter, from any thread."""
    with _lock:
        _counts[name] += number


def since_last_asked() -> dict[str, int]:
    """Counters of this rank since the last call, by name; those that stood still are left out.

    `store_bytes` read from stores, `store_retries` of reads and writes that failed, `cache_hits`
    and `cache_misses` of blocks.
    """
    with _lock:
        found = dict(_counts)
        _counts.clear()
    return found
