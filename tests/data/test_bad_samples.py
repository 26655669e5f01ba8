"""Unreadable samples: caught, counted, listed, replaced, bounded, and remembered."""

import json
from collections import Counter
from pathlib import Path

import pytest

from mocov3_ds.data.sample_order import Order
from tests.data.loading import SIZES, damage, open_loader, run, same


def test_bad_samples_are_remembered_when_a_run_goes_on(writable, tmp_path):
    for sample in (4, 20, 33):
        damage(writable, sample)
    listing = tmp_path / "bad_samples.jsonl"
    options = {"bad_sample_budget": 3, "bad_sample_listing": listing, "threads": 1}
    with open_loader(writable, **options) as loader:
        for _ in range(6):
            next(loader)
        before = loader.bad_samples.reasons()
    assert before and set(before.values()) == {"crc32 mismatch"}
    again = dict(options, earlier_bad=before)
    with open_loader(writable, **again) as loader:
        assert loader.bad_samples.reasons() == before
        for _ in range(12):
            next(loader)
        assert set(loader.bad_samples.reasons()) == {4, 20, 33}
        assert loader.bad_samples.counts == {"crc32 mismatch": 3}
    lines = [json.loads(line)["id"] for line in listing.read_text().splitlines()]
    assert sorted(lines) == [4, 20, 33]
    # two ranks share what was met before, and what they meet counts against the same budgets
    ranks = [
        open_loader(writable, world_size=2, rank=rank, earlier_bad=loader.bad_samples.reasons())
        for rank in (0, 1)
    ]
    assert sorted(sum(each.bad_samples.counts.values()) for each in ranks) == [1, 2]
    assert all(each.bad_samples.reasons() == loader.bad_samples.reasons() for each in ranks)
    for each in ranks:
        each.close()
    with (
        open_loader(writable, bad_sample_budget=2, earlier_bad={90: "not an image"}) as loader,
        pytest.raises(ValueError, match=r"3 unreadable samples in .*, more than"),
    ):
        for _ in range(12):
            next(loader)


def test_wrong_bytes_are_caught_counted_listed_and_replaced(writable, tmp_path):
    damage(writable, 4)
    damage(writable, 20)
    good = damage(writable, 33, at=0, new=b"not a JPEG", mend_crc=True)
    listing = tmp_path / "run" / "bad_samples.jsonl"
    results = []
    for world_size, threads in ((1, 0), (1, 3), (2, 1), (4, 2)):
        listing.unlink(missing_ok=True)
        options = {"threads": threads, "bad_sample_budget": 3, "bad_sample_listing": listing}
        results.append(run(good, world_size, 12, **options))
    assert all(same(result, results[0]) for result in results)
    ids = Counter(i for batch in results[0] for i in batch[0])
    assert sum(ids.values()) == 144 and not {4, 20, 33} & set(ids)
    order = Order(SIZES, 12, 3, 4, 24)
    for t, (found, _, _) in enumerate(results[0]):
        differs = [
            planned
            for planned, got in zip(order.batch_ids(t).tolist(), found, strict=True)
            if planned != got
        ]
        assert set(differs) <= {4, 20, 33}
    with open_loader(good, bad_sample_budget=3, bad_sample_listing=listing) as loader:
        listing.unlink()
        for _ in range(12):
            next(loader)
        assert loader.bad_samples.counts == {"crc32 mismatch": 2, "not an image": 1}
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    assert {line["id"]: (line["shard"], line["key"]) for line in lines} == {
        4: ("t-000.tar", "img4.jpg"),
        20: ("t-004.tar", "img20.jpg"),
        33: ("t-004.tar", "img33.jpg"),
    }
    assert all(line["rank"] == 0 and line["reason"] for line in lines)


@pytest.mark.parametrize("threads", [0, 2])
def test_over_the_budget_the_run_stops_and_says_which(writable, threads):
    damage(writable, 4)
    damage(writable, 20)
    with (
        open_loader(writable, threads=threads, bad_sample_budget=1) as loader,
        pytest.raises(
            ValueError,
            match=r"2 unreadable samples in .* more than --data.max_bad_samples 1 "
            r"\(2 x crc32 mismatch\); the last one is img(4|20)\.jpg in t-00[04]\.tar",
        ),
    ):
        for _ in range(8):
            next(loader)


def test_a_truncated_shard_is_bad_samples_not_silence(writable):
    path = Path(writable.shard_url(4))
    path.write_bytes(path.read_bytes()[: int(writable.index_N["offset"][30]) - 512])
    with open_loader(writable, bad_sample_budget=50) as loader:
        for _ in range(8):
            assert len(next(loader).sample_ids_B) == 12
        assert sum(loader.bad_samples.counts.values()) >= 10
        assert set(loader.bad_samples.counts) == {"shard ends early"}


def test_a_missing_shard_stops_the_run(writable):
    Path(writable.shard_url(1)).unlink()
    with open_loader(writable) as loader, pytest.raises(FileNotFoundError, match=r"t-001\.tar"):
        for _ in range(8):
            next(loader)


def test_a_set_of_rubbish_ends(writable):
    for sample_id in range(52):
        damage(writable, sample_id)
    with (
        open_loader(writable, bad_sample_budget=1000) as loader,
        pytest.raises(ValueError, match="stand in for it are all unreadable"),
    ):
        next(loader)
