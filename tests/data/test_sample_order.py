"""The order of samples: exact, elastic, resumable, well mixed, and the same for ever."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mocov3_ds.data.sample_order import Order, mean_travel, spread_ids

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda x: sum(x) > 0)


@st.composite
def orders(draw):
    sizes = draw(SIZES)
    return Order(
        tuple(sizes),
        draw(st.integers(1, sum(sizes))),
        seed=draw(st.integers(0, 2**40)),
        lanes=draw(st.integers(1, 20)),
        pool=draw(st.integers(1, 200)),
    )


def epoch_ids(order, epoch):
    start = epoch * order.batches_per_epoch
    return np.concatenate([order.batch_ids(start + t) for t in range(order.batches_per_epoch)])


def divisors(number):
    return [w for w in range(1, number + 1) if number % w == 0]


def delivered(order, world_size, position, batches):
    """Global batches put together from what the ranks' pieces say."""
    rows = order.global_batch // world_size
    found = np.full((batches, order.global_batch), -1)
    for rank in range(world_size):
        firsts = []
        for piece in order.pieces_for_rank(position, rank, world_size):
            firsts.append(piece.first_position)
            if piece.first_position >= position + batches:
                break
            for batch, row, sample_id in zip(
                piece.positions_M, piece.rows_M, piece.sample_ids_M, strict=True
            ):
                if batch < position + batches:
                    assert found[batch - position, rank * rows + row] == -1, "delivered twice"
                    found[batch - position, rank * rows + row] = sample_id
        assert firsts == sorted(firsts)
    return found


@given(orders(), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_an_epoch_holds_each_sample_once_but_for_the_remainder(order, epoch):
    ids = epoch_ids(order, epoch)
    assert len(ids) == order.samples - order.remainder
    assert len(np.unique(ids)) == len(ids)
    assert ids.min() >= 0 and ids.max() < order.samples


@given(orders(), st.data())
@settings(max_examples=60, deadline=None)
def test_any_world_size_delivers_the_same_batches_from_any_position(order, data):
    position = data.draw(st.integers(0, 3 * order.batches_per_epoch))
    world_size = data.draw(st.sampled_from(divisors(order.global_batch)))
    batches = 2 * order.batches_per_epoch + 1 if order.samples < 100 else 5
    found = delivered(order, world_size, position, batches)
    expected = [order.batch_ids(position + t) for t in range(batches)]
    np.testing.assert_array_equal(found, expected)


@given(orders())
@settings(max_examples=50, deadline=None)
def test_no_sample_is_left_out_twice_before_each_was_left_out(order):
    if not order.remainder:
        return
    epochs = order.samples // order.remainder
    left_out = np.zeros(order.samples, int)
    for epoch in range(min(epochs, 30)):
        left_out += 1
        left_out[epoch_ids(order, epoch)] -= 1
    assert left_out.max() <= 1
    assert left_out.sum() == min(epochs, 30) * order.remainder


def test_lanes_are_the_most_that_divide_the_batch():
    for batch, lanes, expected in [(4096, 64, 64), (96, 64, 48), (7, 64, 7), (13, 12, 1)]:
        assert Order((5000,), batch, 0, lanes).lane_count == expected


def test_epochs_and_seeds_differ_and_repeat():
    order = Order((50,) * 4, 16, seed=3, lanes=4, pool=64)
    first, second = epoch_ids(order, 0), epoch_ids(order, 1)
    assert (first != second).mean() > 0.9
    assert (first != epoch_ids(Order((50,) * 4, 16, 4, 4, 64), 0)).mean() > 0.9
    np.testing.assert_array_equal(first, epoch_ids(Order((50,) * 4, 16, 3, 4, 64), 0))


def mix(word):
    """SplitMix64 on Python's integers."""
    mask = (1 << 64) - 1
    word = (word + 0x9E3779B97F4A7C15) & mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)


def key(*words):
    state = 0
    for word in words:
        state = mix((state + word) & ((1 << 64) - 1))
    return state


def shuffled(items, state):
    """Items by the numbers of a SplitMix64 generator in that state."""
    step = 0x9E3779B97F4A7C15
    drawn = [mix((state + place * step) & ((1 << 64) - 1)) for place in range(len(items))]
    return [items[place] for place in sorted(range(len(items)), key=drawn.__getitem__)]


def plain_epoch(order, epoch):
    """Global batches of an epoch, with lists and loops."""
    samples, batch = order.samples, order.global_batch
    remainder = samples % batch
    begin = key(order.seed, 2) % samples + epoch * remainder
    left_out = {(begin + i) % samples for i in range(remainder)}
    runs, first = [], 0
    for size in order.shard_samples:  # shards, cut where samples are left out
        kept = [None if i in left_out else i for i in range(first, first + size)]
        first += size
        run = []
        for i in [*kept, None]:
            if i is not None:
                run.append(i)
            elif run:
                runs.append(run)
                run = []
    row = [i for run in shuffled(runs, key(order.seed, 1, epoch)) for i in run]
    lanes = max(n for n in range(1, order.lanes + 1) if batch % n == 0)
    length, step = len(row) // lanes, batch // lanes
    window = min(max(1, order.pool // lanes), length)
    out = []
    for lane in range(lanes):
        todo, done = row[lane * length : (lane + 1) * length], []
        size = window - key(order.seed, 3, epoch, lane) % window  # the first window is cut short
        number = 0
        while todo:
            done += shuffled(todo[:size], key(order.seed, 3, epoch, lane, number))
            todo, size, number = todo[size:], window, number + 1
        out.append(done)
    batches = range(samples // batch)
    return [[i for done in out for i in done[t * step : (t + 1) * step]] for t in batches]


@given(orders(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_order_is_that_of_the_plain_writing(order, epoch):
    found = epoch_ids(order, epoch).reshape(-1, order.global_batch).tolist()
    assert found == plain_epoch(order, epoch)


def test_the_order_stays():
    """No version of numpy or of this program may change the order of a job that runs."""
    order = Order((7, 3, 9), 6, seed=1, lanes=4, pool=9)
    assert [order.batch_ids(t).tolist() for t in range(4)] == [
        [0, 2, 7, 6, 15, 14],
        [1, 3, 10, 11, 13, 16],
        [4, 5, 8, 12, 18, 17],
        [13, 11, 17, 18, 5, 4],
    ]


@pytest.mark.parametrize("sizes", [(1000,) * 50, (50_000,)])
def test_samples_travel_as_under_a_full_permutation(sizes):
    order = Order(sizes, 256, seed=0, lanes=64, pool=8192)
    assert mean_travel(order) == pytest.approx(1, abs=0.08)


def test_batches_hold_many_shards_and_neighbours_part():
    order = Order((1000,) * 100, 512, seed=0, lanes=64, pool=32768)
    shards = [len(np.unique(order.batch_ids(t) // 1000)) for t in range(10)]
    assert np.mean(shards) >= 50
    together = []
    for epoch in (0, 1):
        batch_of = np.empty(order.samples, int)
        batch_of[:] = -1
        start = epoch * order.batches_per_epoch
        for t in range(order.batches_per_epoch):
            batch_of[order.batch_ids(start + t)] = t
        together.append((batch_of[:-1] == batch_of[1:]) & (batch_of[1:] >= 0))
    # stored neighbours share a batch far more seldom than never parted ones would, and not again
    assert together[0].mean() < 0.1
    assert (together[0] & together[1]).mean() < 0.02


def test_substitutes_depend_on_the_plan_alone():
    order = Order((30, 40), 8, seed=5)
    drawn = {order.substitute_id(epoch, 3, attempt) for epoch in range(20) for attempt in range(3)}
    assert len(drawn) > 20 and all(0 <= i < 70 for i in drawn)
    assert order.substitute_id(2, 3, 1) == Order((30, 40), 8, 5).substitute_id(2, 3, 1)


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40), st.none() | st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_spread_covers_each_id_once_with_equal_shares(samples, world_size, batch, limit):
    parts = [
        list(spread_ids(samples, limit, rank, world_size, batch)) for rank in range(world_size)
    ]
    ids = np.concatenate([ids for part in parts for ids in part])
    assert len(ids) == len(set(ids)) == min(samples, limit or samples)
    counts = [sum(map(len, part)) for part in parts]
    assert max(counts) - min(counts) <= 1
    wanted = np.arange(len(ids)) * samples // len(ids)
    np.testing.assert_array_equal(np.sort(ids), wanted)
    if limit and limit < samples:
        gaps = np.diff(np.sort(ids))
        assert gaps.max(initial=1) - gaps.min(initial=gaps.max(initial=1)) <= 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"global_batch": 71}, "70 samples do not fill"),
        ({"global_batch": 0}, "must be 1"),
        ({"lanes": 0}, "must be 1"),
        ({"pool": 0}, "must be 1"),
    ],
)
def test_impossible_orders_are_refused(change, words):
    settings = {"shard_samples": (30, 40), "global_batch": 8, "seed": 5} | change
    with pytest.raises(ValueError, match=words):
        Order(**settings)


def test_a_world_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="8 cannot be shared equally by 3 ranks"):
        next(Order((30,), 8, 0).pieces_for_rank(0, 0, 3))


def test_the_order_of_ten_thousand_million_samples_starts_at_once():
    """A rank holds columns of shards and windows, nothing of N; an id is drawn for each row."""
    order = Order(np.full(10_000, 1_000_000), 4096, seed=7)
    assert order.samples == 10**10
    position = 5 * order.batches_per_epoch + 123_456
    tracemalloc.start()
    piece = next(order.pieces_for_rank(position, 5, 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    wanted = order.batch_ids(int(piece.positions_M[0]))[5 * 512 + piece.rows_M[0]]
    assert piece.sample_ids_M[0] == wanted
    assert next(spread_ids(10**10, 10**9, 0, 8, 100))[-1] == 990
