"""Shards as columns: the same as a tuple of them, in a tenth of its memory."""

import tracemalloc

import numpy as np
import pytest

from mocov3_ds.data.shard_table import Shard, ShardTable

SHARDS = (
    Shard("a-é.tar", 4096, 3, "0" * 63 + "1"),
    Shard("b\udcff.tar", 1024, 0, "a" * 64),
    Shard("c.tar", 9 << 40, 5, "f" * 64),
)


def test_a_table_is_the_sequence_of_its_shards():
    table = ShardTable(SHARDS)
    assert tuple(table) == SHARDS and table == SHARDS and table[:2] != SHARDS and len(table) == 3
    assert (table[-1], table[1:]) == (SHARDS[2], SHARDS[1:])
    assert table.first_S.tolist() == [0, 3, 3, 8] and table.bytes_S.tolist()[2] == 9 << 40
    with pytest.raises(IndexError):
        table[3]
    assert len(ShardTable([])) == 0 and ShardTable([]).first_S.tolist() == [0]


def test_a_repeated_name_is_found():
    table = ShardTable(SHARDS)
    assert table.repeated_name() is None
    assert ShardTable([*SHARDS, SHARDS[2]]).repeated_name() == "c.tar"


@pytest.mark.parametrize("digest", ["0" * 62, "g" * 64, ""])
def test_a_digest_that_is_none_is_refused(digest):
    with pytest.raises(ValueError):
        ShardTable([Shard("a.tar", 1024, 1, digest)])


def test_many_shards_take_columns_not_objects():
    count = 20_000
    tracemalloc.start()
    table = ShardTable(Shard(f"train-{n:08}.tar", 1 << 30, 1000, f"{n:064x}") for n in range(count))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100 * count and peak < 250 * count
    assert table[12_345].name == "train-00012345.tar"
    np.testing.assert_array_equal(table.first_S, np.arange(count + 1) * 1000)
