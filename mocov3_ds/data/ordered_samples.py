"""How does any WebDataset pipeline get the exact order? By a first stage that gives whole samples.

    samples = OrderedSamples("shards/train", batch=4096)
    webdataset.DataPipeline(samples, webdataset.decode("pil"), webdataset.to_tuple("jpg", "cls"))
    torch.utils.data.DataLoader(samples, batch_size=samples.rank_batch, num_workers=8)

Rank r takes its rows of each global batch, as `sample_order` draws them. Of the rank's batches
worker w of W takes those numbered w, w + W, w + 2 W, ...: that is the order in which a `DataLoader`
asks its workers, so batches of `rank_batch` come out of it as those of training do, whatever the
number of workers.

Shape suffix: M = samples of a piece.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.sample_order import Ids, Order
from mocov3_ds.data.whole_samples import read_whole_samples
from mocov3_ds.distributed import ranks

Sample = dict[str, Any]

BATCHES_AHEAD = 2
"""Batches of a worker that are read before they are asked for."""

_READERS = 4  # threads of a worker


class _Consumer(NamedTuple):
    """Which part of a rank's batches a process takes."""

    rank: int
    world_size: int
    worker: int
    workers: int


class OrderedSamples(IterableDataset[Sample]):
    """Plain WebDataset samples in an exact order, for any pipeline and any `DataLoader`.

    An iteration begins where the object stands (`set_epoch`, `load_state_dict`) and goes on to the
    end of an epoch. Each epoch leaves out the samples that do not fill a global batch, other ones
    each time, so that every sample is left out once before any is left out twice.

    Args:
        shards: Folder or URL of a sharded set, or its manifest.
        batch: Samples of a global batch, over all ranks. The order depends on it.
        seed: With the epoch, decides the order.
        epochs: Passes of one iteration; None = without end.
        lanes: See `sample_order.Order`.
        pool: See `sample_order.Order`.
        rank: Number of this rank; None = of the process group, or of the variable RANK.
        world_size: Number of ranks; None = of the process group, or of the variable WORLD_SIZE.

    Raises:
        ValueError: The set cannot be used, or the ranks cannot share a batch equally.
    """

    def __init__(
        self,
        shards: str | Manifest,
        *,
        batch: int,
        seed: int = 0,
        epochs: int | None = 1,
        lanes: int = 1024,
        pool: int = 32768,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        self.manifest = manifests.load(shards) if isinstance(shards, str) else shards
        self.order = Order(self.manifest.table.samples_S, batch, seed, lanes, pool)
        self.epochs = epochs
        self.rank, self.world_size = _find_rank(rank, world_size)
        if batch % self.world_size or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank {self.rank} of {self.world_size} cannot take an equal share of a batch of "
                f"{batch}; choose a batch that the number of ranks divides."
            )
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs={epochs} gives no samples; choose 1 or more, or None.")
        self._position = 0  # global batch that an iteration begins with
        self._handed = 0  # samples that this process has handed out from there on
        self._resumed: _Consumer | None = None  # who alone may go on in the middle
        # set by worker processes, which iterate over copies
        self._is_copied = torch.zeros(1, dtype=torch.bool)
        self._is_copied.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def rank_batch(self) -> int:
        """Samples of this rank in a global batch."""
        return self.order.global_batch // self.world_size

    @property
    def epoch(self) -> int:
        """Epoch in which an iteration begins."""
        return self._position // self.order.batches_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin at the start of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self._begin_at(epoch * self.order.batches_per_epoch)

    def _begin_at(self, position: int) -> None:
        self._position, self._handed, self._resumed = position, 0, None
        self._is_copied.zero_()

    def __len__(self) -> int:
        """Samples of this rank in an iteration, over all its workers."""
        end = self._end_position()
        if end is None:
            raise TypeError("epochs=None has no length")
        return (end - self._position) * self.rank_batch - (self._handed if self._resumed else 0)

    def _end_position(self) -> int | None:
        if self.epochs is None:
            return None
        return (self.epoch + self.epochs) * self.order.batches_per_epoch

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        consumer = _Consumer(self.rank, self.world_size, worker, workers)
        if info is not None:
            self._is_copied.fill_(True)
        if self._resumed not in (None, consumer):
            raise ValueError(
                f"this state was taken in the middle of a batch, by {self._resumed}, and cannot go "
                f"on as {consumer}; take states between batches, with "
                "state_dict(batches=BATCHES TAKEN)."
            )
        self._handed = self._handed if self._resumed else 0
        self._resumed = None
        finished, row = divmod(self._handed, self.rank_batch)
        first = self._position + worker + finished * workers
        stop = threading.Event()
        try:
            for samples in self._read_batches(first, workers, stop):
                for sample in samples[row:]:
                    self._handed += 1
                    yield sample
                row = 0
        finally:
            stop.set()

    def _read_batches(
        self, first: int, stride: int, stop: threading.Event
    ) -> Iterator[list[Sample]]:
        """Yield the rank's batches `first`, `first + stride`, ..., and read ahead meanwhile."""
        end, position = self._end_position(), first
        pieces = self.order.pieces_for_rank(first, self.rank, self.world_size)
        piece = next(pieces)
        reads: deque[tuple[int, Ids, Ids, Future[list[Sample]]]] = deque()
        batches: dict[int, list[Sample]] = {}
        threads = ThreadPoolExecutor(_READERS)
        try:
            while end is None or position < end:
                horizon = position + BATCHES_AHEAD * stride
                while piece.first_position <= horizon and (
                    end is None or piece.first_position < end
                ):
                    is_mine_M = (piece.positions_M - first) % stride == 0
                    is_mine_M &= piece.positions_M < (end or np.iinfo(np.int64).max)
                    if is_mine_M.any():
                        ids_M = piece.sample_ids_M[is_mine_M]
                        read = threads.submit(self._read_samples, ids_M, stop)
                        places = piece.positions_M[is_mine_M], piece.rows_M[is_mine_M]
                        reads.append((piece.first_position, *places, read))
                    piece = next(pieces)
                while reads and reads[0][0] <= position:
                    _, positions_M, rows_M, read = reads.popleft()
                    self._place_samples(batches, positions_M, rows_M, read.result())
                yield batches.pop(position)
                position += stride
        finally:
            stop.set()
            threads.shutdown(cancel_futures=True)

    def _read_samples(self, sample_ids_M: Ids, stop: threading.Event) -> list[Sample]:
        samples: list[Sample] = [{}] * len(sample_ids_M)
        for index, sample in read_whole_samples(self.manifest, sample_ids_M, stop):
            samples[index] = sample
        return samples

    def _place_samples(
        self,
        batches: dict[int, list[Sample]],
        positions_M: Ids,
        rows_M: Ids,
        samples: list[Sample],
    ) -> None:
        """Put samples into their rows of coming batches."""
        for position, row, sample in zip(
            positions_M.tolist(), rows_M.tolist(), samples, strict=True
        ):
            batch = batches.setdefault(position, [{}] * self.rank_batch)
            batch[row] = sample

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Return where to go on, as JSON values.

        A state between two global batches goes on with any number of ranks and workers. One in the
        middle of a batch, or of one worker of several, goes on in the same place alone.

        Args:
            batches: Batches that the caller's loop has taken since the iteration began; None = all
                that this process has handed out. A `DataLoader` with workers reads ahead of its
                loop, so only the loop can say.

        Raises:
            ValueError: Worker processes have iterated over copies, so this object cannot know.
        """
        consumer = [self.rank, self.world_size, 0, 1]
        info = get_worker_info()
        if info is not None:
            consumer[2:] = [info.id, info.num_workers]
        if batches is None and info is None and bool(self._is_copied):
            raise ValueError(
                "worker processes hand out the samples, ahead of the loop; say how many batches "
                "it has taken since the iteration began: state_dict(batches=N)."
            )
        position, handed = self._position, self._handed
        if batches is not None:
            position, handed = position + batches, 0
        elif consumer[3] == 1:
            position, handed = position + handed // self.rank_batch, handed % self.rank_batch
        return {
            **self._identity(),
            "position": position,
            "handed": handed,
            "consumer": consumer if handed else None,
        }

    def _identity(self) -> dict[str, Any]:
        """All that the order depends on."""
        order = self.order
        return {
            "set": self.manifest.digest,
            "batch": order.global_batch,
            "seed": order.seed,
            "lanes": order.lanes,
            "pool": order.pool,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where another one stood.

        Args:
            state: What `state_dict` gave, here or on another number of ranks and workers.

        Raises:
            ValueError: The state is of another set or order.
        """
        identity = self._identity()
        deviations = [
            f"{key} {state.get(key)!r} there, {value!r} here"
            for key, value in identity.items()
            if state.get(key) != value
        ]
        if deviations:
            raise ValueError(
                f"the state is of other samples or another order: {'; '.join(deviations)}."
            )
        self._begin_at(int(state["position"]))
        if state["handed"]:
            self._handed, self._resumed = int(state["handed"]), _Consumer(*state["consumer"])


def _find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and number of ranks: as given, of the process group, or as a launcher has set them."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"give both rank ({rank}) and world_size ({world_size}), or neither.")
    if rank is not None and world_size is not None:
        return rank, world_size
    if ranks.world_size() > 1:
        return ranks.rank(), ranks.world_size()
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
