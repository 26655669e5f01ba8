"""Which sample comes when? Stage 1 of the data path: order, pure arithmetic on sample numbers.

    shards, permuted     [ c c c c c ][ a a a ][ d d d d ][ b b b b ]     one row of N samples
    lanes                |---- 0 ----|---- 1 ----|---- 2 ----|            equal parts of that row
    windows of a lane    |--|----|---|                                    each permuted by itself
    global batch t       the next B / L samples of every lane, lane after lane

    rank r of W          rows [r B / W, (r + 1) B / W) of each global batch

The order follows from seed, epoch and shard sizes alone. No step knows the number of ranks or
threads, so the concatenation of the ranks' batches is the same for every W that divides B. Shards
on lane borders are shared and read by range. The position of the whole pipeline is one number, the
global batches done; any window can be computed without the ones before it, so a resumed run reads
nothing that was used before it stopped.

Each epoch leaves out N mod B samples: the next run of ids each time, so that every sample has been
left out once before any is left out twice.

Random numbers are hashes of counters (`data.splitmix`).

Shape suffixes: N = samples, S = shards, K = runs of consecutive ids, B = global batch, L = lanes,
M = samples of a piece, T = global batches of an epoch, I = any number of ids.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data import splitmix

Ids = NDArray[np.int64]

_SHARDS, _LEFT_OUT, _WINDOWS, _SUBSTITUTE = range(1, 5)  # purposes of random numbers


@dataclass(frozen=True)
class Piece:
    """What one rank needs of one window, in the order in which it is needed; all (M,)."""

    positions_M: Ids
    """global batches, counted from the start of training"""
    rows_M: Ids
    """rows in the rank's batch"""
    sample_ids_M: Ids
    """numbers of the samples in the manifest"""

    @property
    def first_position(self) -> int:
        """Global batch that needs the piece first."""
        return int(self.positions_M[0])


@dataclass(frozen=True, eq=False)
class Order:
    """Which samples each global batch holds.

    Raises:
        ValueError: An epoch holds no full global batch, or a size is below 1.
    """

    shard_samples: Sequence[int] | Ids
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
        """Number of samples of the set, N."""
        return int(np.sum(self.shard_samples))

    @property
    def batches_per_epoch(self) -> int:
        """Number of full global batches of an epoch, T."""
        return self.samples // self.global_batch

    @property
    def remainder(self) -> int:
        """Number of samples that an epoch leaves out."""
        return self.samples % self.global_batch

    @cached_property
    def lane_count(self) -> int:
        """Number of lanes that are used, L."""
        counts = range(min(self.lanes, self.global_batch), 0, -1)
        return next(count for count in counts if self.global_batch % count == 0)

    @property
    def lane_step(self) -> int:
        """Samples of a lane in a global batch."""
        return self.global_batch // self.lane_count

    @property
    def lane_length(self) -> int:
        """Samples of a lane in an epoch."""
        return self.batches_per_epoch * self.lane_step

    @cached_property
    def window_length(self) -> int:
        """Samples that are permuted together in a lane."""
        return min(max(1, self.pool // self.lane_count), self.lane_length)

    def epoch_order(self, epoch: int) -> "EpochOrder":
        """Return the order of one epoch."""
        return EpochOrder(self, epoch)

    def batch_ids(self, position: int) -> Ids:
        """Ids (B,) of a global batch: the definition that everything else has to agree with."""
        epoch, batch = divmod(position, self.batches_per_epoch)
        order, step = self.epoch_order(epoch), self.lane_step
        lanes = range(self.lane_count)
        return np.concatenate(
            [order.lane_ids(lane, batch * step, (batch + 1) * step) for lane in lanes]
        )

    def epoch_ids(self, epoch: int) -> Ids:
        """Ids (T, B) of the T global batches of an epoch."""
        first, batches = epoch * self.batches_per_epoch, self.batches_per_epoch
        ids_TB = np.empty((batches, self.global_batch), dtype=np.int64)
        for piece in self.pieces_for_rank(first, 0, 1):
            if piece.first_position >= first + batches:
                break
            ids_TB[piece.positions_M - first, piece.rows_M] = piece.sample_ids_M
        return ids_TB

    def pieces_for_rank(self, position: int, rank: int, world_size: int) -> Iterator[Piece]:
        """Yield all that a rank needs from a position on, without end, in the order of first need.

        Raises:
            ValueError: The world size does not divide the global batch.
        """
        if self.global_batch % world_size:
            raise ValueError(
                f"global batch {self.global_batch} cannot be shared equally by {world_size} ranks."
            )
        epoch, batch = divmod(position, self.batches_per_epoch)
        while True:
            order = self.epoch_order(epoch)
            shares = self._lane_shares(rank, world_size)
            lanes = (order.lane_pieces(*share, batch) for share in shares)
            yield from heapq.merge(*lanes, key=lambda piece: piece.first_position)
            epoch, batch = epoch + 1, 0

    def _lane_shares(self, rank: int, world_size: int) -> Iterator[tuple[int, int, int, int]]:
        """Lanes of a rank: lane, its first and last + 1 sample of a step, and their first row."""
        rank_batch, step = self.global_batch // world_size, self.lane_step
        begin, end = rank * rank_batch, (rank + 1) * rank_batch
        for lane in range(begin // step, -(-end // step)):
            low, high = max(begin, lane * step), min(end, (lane + 1) * step)
            yield lane, low - lane * step, high - lane * step, low - begin

    def substitute_id(self, epoch: int, sample_id: int, attempt: int) -> int:
        """Id of the sample that stands in for an unreadable one, whichever rank meets it."""
        key = splitmix.hash_counters(self.seed, _SUBSTITUTE, epoch, sample_id, attempt)
        return key % self.samples


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The order of one epoch: lanes over the permuted shards, windows inside the lanes."""

    order: Order
    epoch: int

    @cached_property
    def _shard_runs(self) -> tuple[Ids, Ids]:
        """The row: first ids (K,) of runs of consecutive ids, and where they start in it (K + 1,).

        A run is a shard, or what remains of it where samples are left out.
        """
        order = self.order
        borders = np.concatenate([[0], np.cumsum(order.shard_samples, dtype=np.int64)])
        shift = splitmix.hash_counters(order.seed, _LEFT_OUT) % order.samples
        begin = (shift + self.epoch * order.remainder) % order.samples
        end = begin + order.remainder
        if order.remainder:
            left_out = [(begin, min(end, order.samples)), (0, max(0, end - order.samples))]
            borders = np.concatenate([borders, *map(np.array, left_out)])
        else:
            left_out = []
        borders = np.unique(borders)
        low_K, high_K = borders[:-1], borders[1:]
        for first, last in left_out:
            remains_K = (low_K < first) | (high_K > last)
            low_K, high_K = low_K[remains_K], high_K[remains_K]
        drawn_K = splitmix.draw_permutation(
            len(low_K), splitmix.hash_counters(order.seed, _SHARDS, self.epoch)
        )
        low_K, high_K = low_K[drawn_K], high_K[drawn_K]
        return low_K, np.concatenate([[0], np.cumsum(high_K - low_K)])

    def _row_ids(self, begin: int, end: int) -> Ids:
        """Ids of the slots `begin` to `end` of the row."""
        low_K, start_K = self._shard_runs
        slot_I = np.arange(begin, end)
        run_I = np.searchsorted(start_K, slot_I, side="right") - 1
        return low_K[run_I] + slot_I - start_K[run_I]

    def _window_shift(self, lane: int) -> int:
        """Samples by which the first window of a lane is cut short: 0 to its length - 1."""
        order = self.order
        return splitmix.hash_counters(order.seed, _WINDOWS, self.epoch, lane) % order.window_length

    def window_ids(self, lane: int, number: int) -> tuple[int, Ids]:
        """Slot of the lane where a window begins, and the ids of the window in drawn order."""
        order = self.order
        border = number * order.window_length - self._window_shift(lane)
        begin, end = max(0, border), min(border + order.window_length, order.lane_length)
        offset = lane * order.lane_length
        key = splitmix.hash_counters(order.seed, _WINDOWS, self.epoch, lane, number)
        drawn_I = splitmix.draw_permutation(end - begin, key)
        return begin, self._row_ids(offset + begin, offset + end)[drawn_I]

    def window_number(self, lane: int, slot: int) -> int:
        """Number of the window that holds a slot of a lane."""
        return (slot + self._window_shift(lane)) // self.order.window_length

    def lane_ids(self, lane: int, begin: int, end: int) -> Ids:
        """Ids that a lane delivers from slot `begin` to `end`."""
        first, last = self.window_number(lane, begin), self.window_number(lane, end - 1)
        windows = [self.window_ids(lane, number) for number in range(first, last + 1)]
        start = windows[0][0]
        return np.concatenate([ids for _, ids in windows])[begin - start : end - start]

    def lane_pieces(self, lane: int, low: int, high: int, row: int, batch: int) -> Iterator[Piece]:
        """Yield the pieces of a lane for the rank that takes samples `low` to `high` of each step.

        Args:
            lane: Number of the lane in the epoch.
            low: First sample of a step that the rank takes.
            high: Sample of a step behind the last one that the rank takes.
            row: Row of sample `low` in the rank's batch.
            batch: First batch of the epoch that is needed.
        """
        order, step = self.order, self.order.lane_step
        first_position = self.epoch * order.batches_per_epoch
        first_slot = batch * step
        number, next_slot = self.window_number(lane, first_slot), first_slot
        while next_slot < order.lane_length:
            begin, ids_I = self.window_ids(lane, number)
            slot_I = np.arange(begin, begin + len(ids_I))
            of_step_I = slot_I % step
            needed_I = (slot_I >= next_slot) & (of_step_I >= low) & (of_step_I < high)
            if needed_I.any():
                positions_M = first_position + slot_I[needed_I] // step
                yield Piece(positions_M, of_step_I[needed_I] - low + row, ids_I[needed_I])
            number, next_slot = number + 1, begin + len(ids_I)


def mean_travel(order: Order, epoch: int = 0) -> float:
    """How far samples travel: mean distance from the stored to the delivered slot, as a share.

    1 is the mean distance under a permutation drawn from all (a third of the samples).
    """
    ids = order.epoch_ids(epoch).ravel()
    distance = np.abs(ids - np.arange(len(ids)) * (order.samples / len(ids)))
    return float(distance.mean() / (order.samples / 3))


def spread_ids(
    samples: int, limit: int | None, rank: int, world_size: int, batch: int
) -> Iterator[Ids]:
    """Yield batches of ids of one rank for a pass without order: each id on one rank, once.

    Args:
        samples: Number of samples of the set.
        limit: Number of ids that are used, evenly spread over the set; None = all.
        rank: Number of this rank, below `world_size`.
        world_size: Number of ranks; their shares differ by one sample a batch at most.
        batch: Most samples of a rank's batch.
    """
    count = samples if limit is None else min(limit, samples)
    stride, excess = divmod(samples, count)
    for begin in range(0, count, batch * world_size):
        place_I = np.arange(begin, min(begin + batch * world_size, count), dtype=np.int64)
        # place * samples // count, which could outgrow 64 bits
        share = np.array_split(place_I * stride + place_I * excess // count, world_size)[rank]
        if len(share):
            yield share
