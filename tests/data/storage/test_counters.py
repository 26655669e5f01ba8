"""Counters of what reading cost."""

from concurrent.futures import ThreadPoolExecutor

from mocov3_ds.data.storage import counters


def test_counts_are_taken_once():
    counters.take_counts()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: counters.add_count("cache_hits"), range(400)))
    counters.add_count("store_bytes", 7)
    assert counters.take_counts() == {"cache_hits": 400, "store_bytes": 7}
    assert counters.take_counts() == {}
