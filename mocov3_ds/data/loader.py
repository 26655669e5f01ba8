"""The loader: shards in, batches of two uint8 crops out, in the order that `lanes` defines.

    lanes.Order ---> reading threads -----> decoding threads ---> ring of batch buffers ---> next()
    (pieces, by      (one ranged read a     (size, draw, two      (pinned; written in
     first need)      run, crc32 checked)    crops, colour         place, never copied)
                                             if asked for)

Threads, not worker processes: reading and decoding release the interpreter's lock, and nothing is
copied between processes. Which thread does what changes nothing that comes out.

Memory of a rank: encoded bytes of its share of the shuffle pool plus `READ_AHEAD`, and `RING` batch
buffers. Open files: one a reading thread.

Shape suffixes: V = the two views, B = rank batch, C H W = image, P = parameters, N = samples.
"""

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocov3_ds.data.fetch import Unreadable, fetch, fetch_one, key_of
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.sample_order import Order, Piece, spread
from mocov3_ds.data.storage.cache import Cache
from mocov3_ds.data.views import decode
from mocov3_ds.data.views.decode import UnreadableImage
from mocov3_ds.data.views.pairs import make_pair
from mocov3_ds.data.views.photometric import PARAMETERS, ViewSpec

READ_AHEAD = 256 << 20
"""Encoded bytes that a rank may hold beyond its share of the shuffle pool."""
BATCHES_AHEAD = 8
"""Batches whose bytes are fetched before they are decoded."""
READERS = 8
"""Reading threads of a rank; they wait more than they work."""
RING = 3
"""Batch buffers: two with the caller, one being filled."""

_ROWS = 8  # rows that a decoding thread takes at a time
_SUBSTITUTES = 32  # unreadable stand-ins in a row that end the run

_log = logging.getLogger("mocov3_ds")


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch. The tensors are reused after the second `next` from here."""

    crops_VBCHW: Tensor
    """(2, B, 3, S, S) uint8, pinned if asked for; with colour work done if the stream augments"""
    params_VBP: Tensor
    """(2, B, P) float32 rows of `views.draw`, in CPU memory"""
    labels_B: Tensor
    """int64, -1 = none"""
    ids_B: Tensor
    """int64, of the samples in the manifest"""
    stand_ins: int
    """samples that stand in for unreadable ones"""
    wait_s: float
    """seconds that the caller waited for it"""


class Stream:
    """Endless iterator over a rank's batches, from any position on.

    Threads start at the first `next`; `close` ends them.

    Args:
        manifest: of the set.
        views: distribution of the two views.
        image_size: side of a view, pixels.
        global_batch: samples of a batch over all ranks.
        rank: of `world_size`.
        world_size: ranks that share each global batch equally.
        seed: with the epoch, decides the order and the views.
        position: global batches done already.
        lanes: see `lanes.Order`.
        pool: see `lanes.Order`.
        threads: that decode; 0 = the caller decodes inside `next`.
        augment: the threads do the colour work, too, and the caller has only to normalise.
        bad_sample_budget: unreadable samples that this rank may meet from here on; the next one
            stops the run.
        fixed_views: draw the views of each epoch as in the first.
        bad_samples: file that gets a JSON line for each of them; None = none.
        bad_before: unreadable samples that all ranks met in earlier sittings, id -> reason; the
            budget counts this rank's share of them, and none is listed again.
        cache: keeps what comes from a store on the local disk.
        pin: page-locked buffers, for copies to a CUDA device.

    Raises:
        ValueError: an order that cannot be, or, from `next`, more unreadable samples than the
            budget, and anything about the store that the user can mend.
        OSError: from `next`, a store that cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        views: ViewSpec,
        image_size: int,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        position: int = 0,
        lanes: int = 1024,
        pool: int = 32768,
        threads: int = 4,
        augment: bool = False,
        fixed_views: bool = False,
        bad_sample_budget: int = 0,
        bad_samples: Path | None = None,
        bad_before: Mapping[int, str] | None = None,
        cache: Cache | None = None,
        pin: bool = False,
    ) -> None:
        sizes = tuple(shard.samples for shard in manifest.shards)
        self.order = Order(sizes, global_batch, seed, lanes, pool)
        self.skipped: Counter[str] = Counter()
        """distinct unreadable samples met by this rank, by reason"""
        self._manifest, self._views, self._rank = manifest, views, rank
        self._image_size, self._pin, self._cache = image_size, pin, cache
        self._augment = augment
        self._fixed_views = fixed_views
        self._rank_batch = global_batch // world_size
        self._pieces = self.order.pieces(position, rank, world_size)
        self._look_ahead()
        self._bad = _BadSamples(manifest, rank, bad_sample_budget, bad_samples, self.skipped)
        self._bad.remember(bad_before or {}, world_size)
        mean_bytes = float(manifest.index_N["size"].mean())
        share = min(self.order.pool, self.order.samples) / world_size
        self._room = int(share * mean_bytes) + READ_AHEAD

        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards everything below; what the threads wait for:
        self._room_made = threading.Condition(self._lock)  # a piece may be read
        self._rows_ready = threading.Condition(self._lock)  # a batch may be decoded
        self._batch_done = threading.Condition(self._lock)  # a batch is decoded
        self._error: BaseException | None = None
        self._held = 0  # encoded bytes, read or being read
        self._gathering: dict[int, _Gathered] = {}  # batches whose bytes are coming in
        self._decoding: deque[_Decoding] = deque()  # batches with a buffer, oldest first
        self._to_decode = position  # next batch that gets a buffer
        self._free: list[_Buffer] = []
        self._lent: deque[_Buffer] = deque()  # with the caller
        self._thread_count = threads
        self._threads: list[threading.Thread] = []

    @property
    def samples(self) -> int:
        """Samples of the set."""
        return self.order.samples

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return self.order.batches_per_epoch

    @property
    def remainder(self) -> int:
        """Samples that an epoch leaves out, others each time."""
        return self.order.remainder

    @property
    def bad(self) -> dict[int, str]:
        """Unreadable samples, id -> reason: of this rank, and of all ranks in earlier sittings."""
        return self._bad.known()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        if not self._threads:
            self._start()
        with self._lock:
            while len(self._lent) > 1:
                self._free.append(self._lent.popleft())
                self._rows_ready.notify_all()
        while (batch := self._take_done()) is None:
            rows = self._take_rows(until_done=True)
            if rows is not None:
                self._decode(*rows)
        return Batch(
            batch.buffer.crops_VBCHW,
            batch.buffer.params_VBP,
            torch.from_numpy(self._manifest.index_N["label"][batch.ids_B].astype(np.int64)),
            torch.from_numpy(batch.ids_B),
            batch.stand_ins,
            time.perf_counter() - started,
        )

    def close(self) -> None:
        """End the threads; what they hold is dropped."""
        self._stop.set()
        self._wake_all()
        for thread in self._threads:
            thread.join()
        self._gathering.clear()
        self._decoding.clear()
        self._free.clear()
        self._lent.clear()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------- threads

    def _start(self) -> None:
        if self._stop.is_set():
            raise ValueError("the stream is closed.")
        buffer = partial(_Buffer, self._rank_batch, self._image_size, self._pin)
        self._free = [buffer() for _ in range(RING)]
        jobs = [self._read_ahead] * READERS + [self._decode_ahead] * self._thread_count
        self._threads = [
            threading.Thread(target=self._guarded, args=(job,), daemon=True, name=job.__name__)
            for job in jobs
        ]
        for thread in self._threads:
            thread.start()

    def _guarded(self, job: Callable[[], None]) -> None:
        """Run a thread's job; what it raises is raised by `next`."""
        try:
            job()
        except BaseException as error:
            self._error = self._error or error
            self._wake_all()

    def _wake_all(self) -> None:
        with self._lock:
            for condition in (self._room_made, self._rows_ready, self._batch_done):
                condition.notify_all()

    def _ended(self) -> bool:
        return self._error is not None or self._stop.is_set()

    # ----------------------------------------------------------------------------------- reading

    def _read_ahead(self) -> None:
        while (piece := self._take_piece()) is not None:
            batches, rows = piece.batch_M.tolist(), piece.row_M.tolist()
            for place, data in fetch(
                self._manifest, piece.id_M, cache=self._cache, stop=self._stop
            ):
                if self._ended():
                    return
                with self._lock:
                    gathered = self._gathering[batches[place]]
                    gathered.data[rows[place]] = data
                    gathered.missing -= 1
                    if not gathered.missing:
                        self._rows_ready.notify_all()

    def _take_piece(self) -> Piece | None:
        """The next piece, once there is room for it or nothing can go on without it."""
        with self._lock:
            while not self._ended():
                piece, size = self._next_piece, self._next_size
                ahead, room = piece.first - self._to_decode, self._room - self._held
                if ahead <= 0 or (ahead <= BATCHES_AHEAD and size <= room):
                    self._held += size
                    self._announce(piece)
                    self._look_ahead()
                    return piece
                self._room_made.wait()
        return None

    def _look_ahead(self) -> None:
        """The piece after this one, and the encoded bytes it will take."""
        self._next_piece = next(self._pieces)
        self._next_size = int(self._manifest.index_N["size"][self._next_piece.id_M].sum())

    def _announce(self, piece: Piece) -> None:
        """Write down which samples the rows of coming batches hold."""
        borders = np.flatnonzero(np.diff(piece.batch_M)) + 1
        for batch_M, row_M, id_M in zip(
            np.split(piece.batch_M, borders),
            np.split(piece.row_M, borders),
            np.split(piece.id_M, borders),
            strict=True,
        ):
            batch = int(batch_M[0])
            if batch not in self._gathering:
                self._gathering[batch] = _Gathered(self._rank_batch)
            self._gathering[batch].ids_B[row_M] = id_M

    # ---------------------------------------------------------------------------------- decoding

    def _decode_ahead(self) -> None:
        while (rows := self._take_rows()) is not None:
            self._decode(*rows)

    def _take_rows(self, until_done: bool = False) -> "tuple[_Decoding, range] | None":
        """Rows to decode; None at the end, or (`until_done`) when the oldest batch is decoded."""
        with self._lock:
            while not self._ended():
                if until_done and self._decoding and not self._decoding[0].left:
                    return None
                if until_done and self._thread_count:  # others decode
                    self._batch_done.wait()
                    continue
                if not self._decoding or self._decoding[-1].taken == self._rank_batch:
                    self._open_batch()
                if self._decoding and (rows := self._decoding[-1].take()):
                    return self._decoding[-1], rows
                self._rows_ready.wait()
        return None

    def _open_batch(self) -> None:
        """Give the next batch a buffer if all its bytes are here and a buffer is free."""
        gathered = self._gathering.get(self._to_decode)
        if gathered is None or gathered.missing or not self._free:
            return
        epoch = self._to_decode // self.batches_per_epoch
        del self._gathering[self._to_decode]
        self._decoding.append(_Decoding(epoch, gathered, self._free.pop(), self._manifest))
        self._to_decode += 1
        self._rows_ready.notify_all()
        self._room_made.notify_all()  # what the next batch needs is read whatever is held

    def _decode(self, batch: "_Decoding", rows: range) -> None:
        stand_ins = sum(self._decode_row(batch, row) for row in rows)
        with self._lock:
            batch.stand_ins += stand_ins
            self._held -= batch.bytes_of(rows)
            self._room_made.notify()
            batch.left -= len(rows)
            if not batch.left:
                self._batch_done.notify_all()

    def _decode_row(self, batch: "_Decoding", row: int) -> bool:
        """Fill a row with its sample, or with one that stands in where it is unreadable: which."""
        planned = sample_id = int(batch.ids_B[row])
        data, batch.data[row] = batch.data[row], None
        buffer = batch.buffer
        for attempt in range(_SUBSTITUTES):
            assert data is not None
            if isinstance(data, Unreadable):
                reason = data.reason
            else:
                try:
                    make_pair(
                        data,
                        self._views,
                        self.order.seed,
                        0 if self._fixed_views else batch.epoch,
                        sample_id,
                        buffer.crops[:, row],
                        buffer.params[:, row],
                        augment=self._augment,
                    )
                    batch.ids_B[row] = sample_id
                    return attempt > 0
                except UnreadableImage as error:
                    reason = str(error)
            self._bad.add(sample_id, batch.epoch, reason)
            sample_id = self.order.substitute(batch.epoch, planned, attempt)
            data = fetch_one(self._manifest, sample_id, self._stop)
        raise ValueError(
            f"sample {planned} and {_SUBSTITUTES - 1} that were to stand in for it are all "
            f"unreadable; python -m data_prep verify {self._manifest.url} lists the damage."
        )

    def _take_done(self) -> "_Decoding | None":
        """The oldest batch if it is decoded; raises what a thread raised."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._stop.is_set():
                raise ValueError("the stream is closed.")
            if not self._decoding or self._decoding[0].left:
                return None
            batch = self._decoding.popleft()
            self._lent.append(batch.buffer)
            return batch


class _Gathered:
    """Encoded bytes of a batch as they come in."""

    def __init__(self, rows: int) -> None:
        self.ids_B = np.zeros(rows, dtype=np.int64)
        self.data: list[bytes | Unreadable | None] = [None] * rows
        self.missing = rows


class _Buffer:
    """A batch's memory, seen as tensors by the caller and as arrays by the decoder."""

    def __init__(self, rows: int, size: int, pin: bool) -> None:
        shape = (2, rows, 3, size, size)
        self.crops_VBCHW = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        self.params_VBP = torch.empty(2, rows, PARAMETERS)
        self.crops: NDArray[np.uint8] = self.crops_VBCHW.numpy()
        self.params: NDArray[np.float32] = self.params_VBP.numpy()


class _Decoding:
    """A batch whose rows are being handed out to decoding threads."""

    def __init__(self, epoch: int, gathered: _Gathered, buffer: _Buffer, manifest: Manifest):
        self.epoch, self.buffer = epoch, buffer
        self.ids_B, self.data = gathered.ids_B, gathered.data
        self._bytes_B = manifest.index_N["size"][self.ids_B]
        self.taken, self.left = 0, len(self.ids_B)
        self.stand_ins = 0

    def take(self) -> range:
        """The next rows to decode; empty when all are taken."""
        rows = range(self.taken, min(self.taken + _ROWS, len(self.ids_B)))
        self.taken = rows.stop if rows else self.taken
        return rows

    def bytes_of(self, rows: range) -> int:
        """Encoded bytes that the rows had planned."""
        return int(self._bytes_B[rows.start : rows.stop].sum())


class _BadSamples:
    """Unreadable samples of a rank: counted by reason, listed, and bounded."""

    def __init__(
        self,
        manifest: Manifest,
        rank: int,
        budget: int,
        file: Path | None,
        counts: Counter[str],
    ) -> None:
        self._manifest, self._rank, self._budget, self._file = manifest, rank, budget, file
        self._counts = counts
        self._known: dict[int, str] = {}
        self._of_others: dict[int, str] = {}
        self._lock = threading.Lock()

    def remember(self, before: Mapping[int, str], world_size: int) -> None:
        """Take over what was met in earlier sittings, whichever rank met it."""
        for place, (sample_id, reason) in enumerate(sorted(before.items())):
            if place % world_size == self._rank:
                self._known[sample_id] = reason
                self._counts[reason] += 1
            else:
                self._of_others[sample_id] = reason

    def known(self) -> dict[int, str]:
        """Sample id -> reason."""
        with self._lock:
            return self._of_others | self._known

    def add(self, sample_id: int, epoch: int, reason: str) -> None:
        """Take note of a sample, once however often it is met.

        Raises:
            ValueError: there are more than the budget.
        """
        with self._lock:
            if sample_id in self._known or sample_id in self._of_others:
                return
            self._known[sample_id] = kind = reason.split(":")[0]
            self._counts[kind] += 1
            shard, key = key_of(self._manifest, sample_id)
            _log.warning("unreadable sample %d, %s in %s: %s", sample_id, key, shard, reason)
            if self._file is not None:
                line: dict[str, Any] = {
                    "id": sample_id,
                    "shard": shard,
                    "key": key,
                    "reason": reason,
                    "epoch": epoch,
                    "rank": self._rank,
                }
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with self._file.open("a") as file:  # one short write: ranks do not mix lines
                    file.write(json.dumps(line) + "\n")
            if len(self._known) > self._budget:
                reasons = ", ".join(f"{n} x {r}" for r, n in self._counts.most_common())
                count = len(self._known)
                raise ValueError(
                    f"{count} unreadable sample{'s' * (count > 1)} in {self._manifest.url}, more "
                    f"than --data.max_bad_samples {self._budget} ({reasons}); the last one is "
                    f"{key} in {shard}. python -m data_prep verify finds all of them."
                )


def evaluation_batches(
    manifest: Manifest,
    *,
    image_size: int,
    resize: int,
    batch: int,
    rank: int,
    world_size: int,
    threads: int,
    limit: int | None = None,
    bad_sample_budget: int = 0,
    cache: Cache | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Centre crops of all samples, each on one rank, once.

    Args:
        manifest: of the set.
        image_size: side of the crop, pixels.
        resize: shorter side before the crop, pixels.
        batch: most samples of a batch.
        rank: of `world_size`; the ranks' batches differ by one sample at most.
        world_size: ranks.
        threads: that decode; 0 = the caller decodes.
        limit: a fixed subset of this many samples, spread evenly over the set.
        bad_sample_budget: unreadable samples that are left out with a warning.
        cache: keeps what comes from a store on the local disk.

    Yields:
        crops_BCHW uint8, labels_B int64 and ids_B int64; the tensors are the caller's.

    Raises:
        ValueError: more unreadable samples than the budget.
        OSError: the store cannot be read.
    """
    parts = spread(manifest.samples, limit, rank, world_size, batch)
    bad = _BadSamples(manifest, rank, bad_sample_budget, None, Counter())
    stop = threading.Event()

    def crop(sample_id: int, data: bytes | Unreadable) -> NDArray[np.uint8] | None:
        try:
            if isinstance(data, Unreadable):
                raise UnreadableImage(data.reason)
            return decode.centre_crop(data, image_size, resize)
        except UnreadableImage as error:
            bad.add(sample_id, 0, str(error))
            return None

    def read(ids: NDArray[np.int64]) -> list[bytes | Unreadable]:
        data: list[bytes | Unreadable] = [b""] * len(ids)
        for place, sample in fetch(manifest, ids, cache=cache, stop=stop):
            data[place] = sample
        return data

    reader, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(max(threads, 1))
    try:
        coming = reader.submit(read, parts[0]) if parts else None
        for number, ids in enumerate(parts):
            assert coming is not None
            data = coming.result()
            if number + 1 < len(parts):
                coming = reader.submit(read, parts[number + 1])
            run = decoders.map if threads else map
            crops = list(run(crop, ids.tolist(), data))
            kept = ids[[place for place, x in enumerate(crops) if x is not None]]
            if len(kept):
                yield (
                    torch.from_numpy(np.stack([x for x in crops if x is not None])),
                    torch.from_numpy(manifest.index_N["label"][kept].astype(np.int64)),
                    torch.from_numpy(kept),
                )
    finally:
        stop.set()
        reader.shutdown(cancel_futures=True)
        decoders.shutdown(cancel_futures=True)
