"""One pass over an index finds what a second, plainer writing of it finds."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mocov3_ds.data import shard_index
from mocov3_ds.data.shard_index import ROW, blocks_of_rows, join_rows, map_rows, survey_rows
from mocov3_ds.data.shard_table import Shard, ShardTable


def random_index(counts, seed, shard_bytes=1 << 20):
    rng, total = np.random.default_rng(seed), sum(counts)
    index_N = np.zeros(total, ROW)
    index_N["offset"] = rng.integers(512, shard_bytes // 2, total)
    index_N["size"] = rng.integers(1, shard_bytes // 2, total)
    index_N["label"] = rng.integers(-1, 9, total)
    shards = [Shard(f"{n}.tar", shard_bytes, count, f"{n:064x}") for n, count in enumerate(counts)]
    return index_N, ShardTable(shards)


def old_digest(index_N, shards):
    """As runs of earlier versions have written it into their folders."""
    digest = hashlib.sha256(index_N.tobytes())
    for shard in shards:
        digest.update(f"{shard.name} {shard.bytes} {shard.sha256}\n".encode())
    return digest.hexdigest()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 99))
def test_facts_are_those_of_the_whole(counts, block, seed):
    if not sum(counts):
        return
    index_N, shards = random_index(counts, seed)
    blocks = (index_N[begin : begin + block] for begin in range(0, len(index_N), block))
    facts = survey_rows(blocks, shards)
    assert facts.image_bytes == int(index_N["size"].astype(np.int64).sum())
    assert facts.unlabelled == int((index_N["label"] < 0).sum())
    assert facts.top_label == int(index_N["label"].max()) and not facts.problem
    assert facts.sha256 == hashlib.sha256(index_N.tobytes()).hexdigest()
    assert facts.digest == old_digest(index_N, shards)


@pytest.mark.parametrize("row", range(9))
@pytest.mark.parametrize("offset, size", [(511, 1), (2**64 - 1, 1), ((1 << 20) - 5, 6)])
def test_each_row_is_held_against_its_own_shard(row, offset, size):
    index_N, shards = random_index([4, 0, 3, 2], 1)
    assert not survey_rows([index_N[:5], index_N[5:]], shards).problem
    index_N[row]["offset"], index_N[row]["size"] = offset, size
    facts = survey_rows([index_N[:5], index_N[5:]], shards)
    assert facts.problem == "its index points outside the shards"


def test_a_row_fits_its_own_shard_not_the_largest():
    index_N, shards = random_index([2, 2], 1)
    small = ShardTable([shards[0], Shard("small.tar", 2048, 2, "0" * 64)])
    index_N["offset"], index_N["size"] = 512, 1000
    assert not survey_rows([index_N], small).problem
    index_N[2]["size"] = 1600
    assert survey_rows([index_N], small).problem
    assert not survey_rows([index_N[[2, 0, 1, 3]]], small).problem


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.lists(st.integers(1, 99), max_size=9), st.integers(0, 31))
def test_rows_come_whole_from_blocks_of_any_length(count, cuts, extra):
    index_N, _ = random_index([count], 3)
    stored = index_N.tobytes() + b"x" * extra
    places = [0, *sorted(min(cut * 37, len(stored)) for cut in cuts), len(stored)]
    blocks = [stored[a:b] for a, b in itertools.pairwise(places) if a < b]
    np.testing.assert_array_equal(np.concatenate(list(join_rows(blocks))), index_N)


def test_mapped_rows_are_the_files(tmp_path, monkeypatch):
    index_N, _ = random_index([100], 4)
    path = tmp_path / "index.bin"
    path.write_bytes(index_N.tobytes())
    mapped_N = map_rows(path, 60)
    np.testing.assert_array_equal(mapped_N, index_N[:60])
    assert not mapped_N.flags.writeable
    with pytest.raises(ValueError):
        map_rows(path, 101)
    monkeypatch.setattr(shard_index, "_BLOCK_ROWS", 7)
    blocks = list(blocks_of_rows(mapped_N))
    assert [len(rows) for rows in blocks] == [7] * 8 + [4]
