"""The order of samples: pure arithmetic on ids, from seed, epoch and shard sizes alone.

    shards, permuted     [ c c c c c ][ a a a ][ d d d d ][ b b b b ]     one row of N samples
    lanes                |---- 0 ----|---- 1 ----|---- 2 ----|            equal parts of that row
    windows of a lane    |--|----|---|                                    each permuted by itself
    global batch t       the next B / L samples of every lane, lane after lane

    rank r of W          slots [r B / W, (r + 1) B / W) of each global batch

No step knows the number of ranks or threads, so the concatenation of the ranks' batches is the same
for every W that divides B. Shards on lane borders are shared and read by range. The position of the
whole pipeline is one number, the global batches done; any window can be computed without the ones
before it, so a resumed run reads nothing that was used before it stopped.

Each epoch leaves out N mod B samples: the next run of ids each time, so that every sample has been
left out once before any is left out twice.

Random numbers are SplitMix64 hashes of counters (as in `views`), not a generator of a library whose
stream may change between versions.

Shape suffixes: N = samples, S = shards, K = runs of consecutive ids, B = global batch, L = lanes,
M = samples of a piece, T = global batches of an epoch.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

_SHARDS, _LEFT_OUT, _WINDOWS, _SUBSTITUTE = range(1, 5)  # purposes of random numbers
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Piece:
    """What one rank needs of one window, in the order in which it is needed; all (M,)."""

    batch_M: Ids
    """global batches, counted from the start of training"""
    row_M: Ids
    """rows in the rank's batch"""
    id_M: Ids
    """samples"""

    @property
    def first(self) -> int:
        """Global batch that needs the piece first."""
        return int(self.batch_M[0])


@dataclass(frozen=True)
class Order:
    """Which samples each global batch holds.

    Raises:
        ValueError: no full global batch in an epoch, or sizes that cannot be.
    """

    shard_samples: tuple[int, ...]
    """samples of each shard; the ids of a shard are consecutive"""
    global_batch: int
    seed: int
    lanes: int = 1024
    """upper bound; the largest number up to it that divides the global batch is used. More lanes
    mix a batch better and give more ranks lanes of their own, with shorter reads"""
    pool: int = 32768
    """samples in all open windows together, the reach of the shuffle inside an epoch"""

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.lanes < 1 or self.pool < 1:
            raise ValueError(
                f"batch {self.global_batch}, lanes {self.lanes} and pool {self.pool} must be 1 at "
                "least."
            )
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"{self.samples} samples do not fill one global batch of {self.global_batch}."
            )

    @cached_property
    def samples(self) -> int:
        """N."""
        return sum(self.shard_samples)

    @property
    def batches_per_epoch(self) -> int:
        """Full global batches of an epoch."""
        return self.samples // self.global_batch

    @property
    def remainder(self) -> int:
        """Samples that an epoch leaves out."""
        return self.samples % self.global_batch

    @cached_property
    def lane_count(self) -> int:
        """L."""
        below = range(min(self.lanes, self.global_batch), 0, -1)
        return next(lanes for lanes in below if self.global_batch % lanes == 0)

    @property
    def lane_step(self) -> int:
        """Samples of a lane in a global batch."""
        return self.global_batch // self.lane_count

    @property
    def lane_length(self) -> int:
        """Samples of a lane in an epoch."""
        return self.batches_per_epoch * self.lane_step

    @cached_property
    def window(self) -> int:
        """Samples that are permuted together in a lane."""
        return min(max(1, self.pool // self.lane_count), self.lane_length)

    def epoch(self, epoch: int) -> "Epoch":
        """The order of one epoch."""
        return Epoch(self, epoch)

    def batch_ids(self, position: int) -> Ids:
        """Ids (B,) of a global batch: the definition that everything else has to agree with."""
        epoch, batch = divmod(position, self.batches_per_epoch)
        plan, step = self.epoch(epoch), self.lane_step
        lanes = range(self.lane_count)
        return np.concatenate(
            [plan.lane_ids(lane, batch * step, (batch + 1) * step) for lane in lanes]
        )

    def epoch_ids(self, epoch: int) -> Ids:
        """Ids (T, B) of the T global batches of an epoch."""
        first, batches = epoch * self.batches_per_epoch, self.batches_per_epoch
        ids_TB = np.empty((batches, self.global_batch), dtype=np.int64)
        for piece in self.pieces(first, 0, 1):
            if piece.first >= first + batches:
                break
            ids_TB[piece.batch_M - first, piece.row_M] = piece.id_M
        return ids_TB

    def pieces(self, position: int, rank: int, world_size: int) -> Iterator[Piece]:
        """All that a rank needs from a position on, for ever, in the order of first need.

        Raises:
            ValueError: the world size does not divide the global batch.
        """
        if self.global_batch % world_size:
            raise ValueError(
                f"global batch {self.global_batch} cannot be shared equally by {world_size} ranks."
            )
        epoch, batch = divmod(position, self.batches_per_epoch)
        while True:
            plan = self.epoch(epoch)
            lanes = (plan.lane_pieces(*part, batch) for part in self._parts(rank, world_size))
            yield from heapq.merge(*lanes, key=lambda piece: piece.first)
            epoch, batch = epoch + 1, 0

    def _parts(self, rank: int, world_size: int) -> Iterator[tuple[int, int, int, int]]:
        """Lanes of a rank: lane, its first and last + 1 sample of a step, and their first row."""
        rank_batch, step = self.global_batch // world_size, self.lane_step
        begin, end = rank * rank_batch, (rank + 1) * rank_batch
        for lane in range(begin // step, -(-end // step)):
            low, high = max(begin, lane * step), min(end, (lane + 1) * step)
            yield lane, low - lane * step, high - lane * step, low - begin

    def substitute(self, epoch: int, sample_id: int, attempt: int) -> int:
        """Id of the sample that stands in for an unreadable one, whichever rank meets it."""
        key = _key(self.seed, _SUBSTITUTE, epoch, sample_id, attempt)
        return key % self.samples


@dataclass(frozen=True)
class Epoch:
    """The order of one epoch: lanes over the permuted shards, windows inside the lanes."""

    order: Order
    epoch: int

    @cached_property
    def _runs(self) -> tuple[Ids, Ids]:
        """The row: first ids (K,) of runs of consecutive ids, and where they start in it (K + 1,).

        A run is a shard, or what is left of it where samples are left out.
        """
        order = self.order
        borders = np.concatenate([[0], np.cumsum(order.shard_samples, dtype=np.int64)])
        shift = _key(order.seed, _LEFT_OUT) % order.samples
        begin = (shift + self.epoch * order.remainder) % order.samples
        end = begin + order.remainder
        if order.remainder:
            out = [(begin, min(end, order.samples)), (0, max(0, end - order.samples))]
            borders = np.concatenate([borders, *map(np.array, out)])
        else:
            out = []
        borders = np.unique(borders)
        low_K, high_K = borders[:-1], borders[1:]
        for first, last in out:
            kept_K = (low_K < first) | (high_K > last)
            low_K, high_K = low_K[kept_K], high_K[kept_K]
        drawn_K = _permutation(len(low_K), _key(order.seed, _SHARDS, self.epoch))
        low_K, high_K = low_K[drawn_K], high_K[drawn_K]
        return low_K, np.concatenate([[0], np.cumsum(high_K - low_K)])

    def _row_ids(self, begin: int, end: int) -> Ids:
        """Ids at places `begin` to `end` of the row."""
        low_K, start_K = self._runs
        place = np.arange(begin, end)
        run = np.searchsorted(start_K, place, side="right") - 1
        ids: Ids = low_K[run] + place - start_K[run]
        return ids

    def _phase(self, lane: int) -> int:
        """Samples by which the first window of a lane is cut short: 0 to window - 1."""
        order = self.order
        return _key(order.seed, _WINDOWS, self.epoch, lane) % order.window

    def window_ids(self, lane: int, number: int) -> tuple[int, Ids]:
        """Place in the lane where a window begins, and its ids in drawn order."""
        order = self.order
        border = number * order.window - self._phase(lane)
        begin, end = max(0, border), min(border + order.window, order.lane_length)
        offset = lane * order.lane_length
        key = _key(order.seed, _WINDOWS, self.epoch, lane, number)
        ids = self._row_ids(offset + begin, offset + end)[_permutation(end - begin, key)]
        return begin, ids

    def window_at(self, lane: int, place: int) -> int:
        """Number of the window that holds a place of a lane."""
        return (place + self._phase(lane)) // self.order.window

    def lane_ids(self, lane: int, begin: int, end: int) -> Ids:
        """Ids that a lane delivers from place `begin` to `end`."""
        first, last = self.window_at(lane, begin), self.window_at(lane, end - 1)
        windows = [self.window_ids(lane, number) for number in range(first, last + 1)]
        start = windows[0][0]
        return np.concatenate([ids for _, ids in windows])[begin - start : end - start]

    def lane_pieces(self, lane: int, low: int, high: int, row: int, batch: int) -> Iterator[Piece]:
        """Pieces of a lane for the rank that takes its samples `low` to `high` of each step.

        Args:
            lane: number of the lane.
            low: first sample of a step.
            high: last sample of a step, plus one.
            row: row of sample `low` in the rank's batch.
            batch: first batch of the epoch that is needed.
        """
        order, step = self.order, self.order.lane_step
        start = self.epoch * order.batches_per_epoch
        number, done = self.window_at(lane, batch * step), batch * step
        while done < order.lane_length:
            begin, ids = self.window_ids(lane, number)
            place = np.arange(begin, begin + len(ids))
            of_step = place % step
            wanted = (place >= done) & (of_step >= low) & (of_step < high)
            if wanted.any():
                batch_M = start + place[wanted] // step
                yield Piece(batch_M, of_step[wanted] - low + row, ids[wanted])
            number, done = number + 1, begin + len(ids)


def travel(order: Order, epoch: int = 0) -> float:
    """How far samples travel: mean distance from the stored to the delivered place, as a share.

    1 is the mean distance under a permutation drawn from all (a third of the samples).
    """
    ids = order.epoch_ids(epoch).ravel()
    distance = np.abs(ids - np.arange(len(ids)) * (order.samples / len(ids)))
    return float(distance.mean() / (order.samples / 3))


def _key(seed: int, *counters: int) -> int:
    key = _mix_one(seed)
    for counter in counters:
        key = _mix_one(key + counter)
    return key


def _mix_one(word: int) -> int:
    """SplitMix64 (Steele et al., 2014) of one word."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def _permutation(count: int, key: int) -> Ids:
    """Order of 0 .. count - 1 by the hashes of their counters."""
    word = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    word += np.uint64(key)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order: Ids = np.argsort(word ^ (word >> np.uint64(31)), kind="stable")
    return order


def spread(samples: int, limit: int | None, rank: int, world_size: int, batch: int) -> list[Ids]:
    """Batches of ids of one rank for a pass without order: each id on one rank, once.

    Args:
        samples: N.
        limit: only so many ids, evenly spread over all; None = all.
        rank: of `world_size`.
        world_size: ranks; their shares differ by one sample a batch at most.
        batch: most samples of a batch.
    """
    count = samples if limit is None else min(limit, samples)
    ids = np.arange(count, dtype=np.int64) * samples // count
    rounds = range(0, count, batch * world_size)
    parts: Sequence[Ids] = [
        np.array_split(ids[begin : begin + batch * world_size], world_size)[rank]
        for begin in rounds
    ]
    return [part for part in parts if len(part)]
