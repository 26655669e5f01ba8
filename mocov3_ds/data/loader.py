"""How do shards become batches of two uint8 crops a sample? In three stages.

    order              read                    make views
    sample_order ----> reading threads ------> decoding threads ----> ring of buffers ----> next()
    (pieces, by        (`fetch`: one ranged    (`views`: size, draw,  (pinned; written in
     first need)        read a run, crc32)      two crops, colour      place, never copied)
                                                if asked for)

Threads, not worker processes: reading and decoding release the interpreter's lock, and nothing is
copied between processes. Which thread does what changes nothing that comes out.

Where the batches go to a GPU, the thread that decodes the last row of one starts its copy there
(`device_copy`), and the buffer is written again only after that copy.

Memory of a rank: encoded bytes of its share of the shuffle pool plus `READ_AHEAD_BYTES`, and `RING`
batch buffers. Open files: one a reading thread.

Shape suffixes: V = the two views, B = rank batch, C H W = image, P = parameters, N = samples.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mocov3_ds.data.bad_samples import BadSamples
from mocov3_ds.data.batch_buffer import BatchBuffer, DecodingBatch
from mocov3_ds.data.device_copy import DeviceCopy, new_stream
from mocov3_ds.data.fetch import read_samples
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.read_ahead import ReadAhead
from mocov3_ds.data.sample_order import Order, Piece
from mocov3_ds.data.storage.cache import Cache
from mocov3_ds.data.views.crops import make_crops
from mocov3_ds.data.views.own_views import make_own_views
from mocov3_ds.data.views.spec import ViewSpec

READ_AHEAD_BYTES = 256 << 20
"""Encoded bytes that a rank may hold beyond its share of the shuffle pool."""
READERS = 8
"""Reading threads of a rank; they wait more than they work."""
RING = 3
"""Batch buffers: two with the caller, one being filled."""

_NAMED = 4  # samples in a message


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """What a loader delivers, from where, and with how many threads."""

    views: ViewSpec
    """distribution of the two views"""
    image_size: int | tuple[int, int]
    """side of a view, or its height and width, pixels"""
    global_batch: int
    """samples of a batch over all ranks"""
    rank: int
    """number of this rank, below `world_size`"""
    world_size: int
    """ranks that share each global batch equally"""
    seed: int
    """with the epoch, decides the order and the views"""
    lanes: int = 1024
    """see `sample_order.Order`"""
    pool: int = 32768
    """see `sample_order.Order`"""
    threads: int = 4
    """decoding threads; 0 = the caller decodes inside `next`"""
    augment: bool = False
    """the threads do the colour work, too, and the caller has only to normalise"""
    fixed_views: bool = False
    """draw the views of each epoch as in the first"""
    bad_sample_budget: int = 0
    """unreadable samples that this rank may meet; the next one stops the run"""
    bad_sample_listing: Path | None = None
    """file that gets a JSON line for each of them; None = no file"""
    cache: Cache | None = None
    """keeps what comes from a store on the local disk"""
    device: torch.device | None = None
    """where the batches go; to a CUDA device they are copied ahead, from page-locked buffers"""
    readers: int = READERS
    """reading threads"""
    read_ahead_bytes: int = READ_AHEAD_BYTES
    """encoded bytes that the rank may hold beyond its share of the shuffle pool"""


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch. The tensors are reused after the second `next` from here."""

    crops_VBCHW: Tensor
    """(2, B, C, H, W) uint8 in CPU memory, with colour work done if the loader augments; float32
    and normalised where a user's functions make the views"""
    params_VBP: Tensor
    """(2, B, P) float32 rows that were drawn for the views, in CPU memory"""
    labels_B: Tensor
    """int64, -1 = none"""
    sample_ids_B: Tensor
    """int64, numbers of the samples in the manifest"""
    stand_ins: int
    """samples that stand in for unreadable ones"""
    wait_s: float
    """seconds that the caller waited for it"""
    copy: DeviceCopy | None = None
    """the crops on their way to a GPU; None where they stay"""


class Loader:
    """Endless iterator over a rank's batches, from any position on.

    Threads start at the first `next`; `close` ends them.

    Args:
        manifest: Manifest of the set that is read.
        settings: All that the batches depend on besides the position.
        position: Number of global batches done already.
        earlier_bad: Reason by id of the unreadable samples that all ranks met before; see
            `bad_samples.BadSamples`.

    Raises:
        ValueError: The order is impossible; or, from `next`, there are more unreadable samples than
            the budget, or something about the store that the user can mend.
        OSError: From `next`: the store cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        settings: LoaderSettings,
        *,
        position: int = 0,
        earlier_bad: Mapping[int, str] | None = None,
    ) -> None:
        rank, world_size = settings.rank, settings.world_size
        self.order = Order(
            manifest.table.samples_S,
            settings.global_batch,
            settings.seed,
            settings.lanes,
            settings.pool,
        )
        self.bad_samples = BadSamples(
            manifest,
            budget=settings.bad_sample_budget,
            rank=rank,
            world_size=world_size,
            listing=settings.bad_sample_listing,
            earlier=earlier_bad,
        )
        self._manifest, self._settings = manifest, settings
        self._rank_batch = settings.global_batch // world_size

        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards all below, which the threads wait for
        self._may_read = threading.Condition(self._lock)  # a piece
        self._may_decode = threading.Condition(self._lock)  # a batch
        self._is_decoded = threading.Condition(self._lock)  # a batch
        self._error: BaseException | None = None
        self._read_ahead = ReadAhead(
            manifest,
            self.order.pieces_for_rank(position, rank, world_size),
            self._rank_batch,
            self._pool_bytes() + settings.read_ahead_bytes,
        )
        self._batches: deque[DecodingBatch] = deque()  # with a buffer, oldest first
        self._next_position = position  # of the batch that gets the next buffer
        self._free: list[BatchBuffer] = []
        self._lent: deque[BatchBuffer] = deque()  # with the caller
        self._threads: list[threading.Thread] = []
        self._at_work: dict[int, int] = {}  # decoding thread -> sample_id

    def _pool_bytes(self) -> int:
        """Encoded bytes of this rank's share of the shuffle pool, at the set's mean size."""
        samples = min(self.order.pool, self.order.samples) / self._settings.world_size
        return int(samples * self._manifest.mean_bytes)

    def describe_work(self) -> str:
        """Name the samples that are being decoded right now; empty where none is. Any thread."""
        sample_ids = sorted({*self._at_work.copy().values()})
        named = ", ".join(self._describe_place(sample_id) for sample_id in sample_ids[:_NAMED])
        unnamed = len(sample_ids) - _NAMED
        return f"decoding {named}{f' and {unnamed} more' if unnamed > 0 else ''}" if named else ""

    def _describe_place(self, sample_id: int) -> str:
        """Where a sample lies, from memory alone: its key would have to be read."""
        shard = int(np.searchsorted(self._manifest.first_S, sample_id, side="right")) - 1
        offset = int(self._manifest.index_N["offset"][sample_id])
        return f"sample {sample_id} (byte {offset} of {self._manifest.shards[shard].name!r})"

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        if not self._threads:
            self._start_threads()
        while len(self._lent) > 1:
            buffer = self._lent.popleft()
            buffer.end_copy()
            with self._lock:
                self._free.append(buffer)
                self._may_decode.notify_all()
        while (batch := self._take_decoded()) is None:
            rows = self._take_rows(until_decoded=True)
            if rows is not None:
                self._make_rows(*rows)
        labels_B = self._manifest.index_N["label"][batch.sample_ids_B].astype(np.int64)
        return Batch(
            batch.buffer.crops_VBCHW,
            batch.buffer.params_VBP,
            torch.from_numpy(labels_B),
            torch.from_numpy(batch.sample_ids_B),
            batch.stand_ins,
            time.perf_counter() - started,
            batch.buffer.copy,
        )

    def close(self) -> None:
        """End the threads and drop what they hold."""
        self._stop.set()
        self._wake_all()
        for thread in self._threads:
            thread.join()
        self._read_ahead.batches.clear()
        self._batches.clear()
        self._free.clear()
        self._lent.clear()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------- threads

    def _start_threads(self) -> None:
        if self._stop.is_set():
            raise ValueError("the loader is closed.")
        settings = self._settings
        device = settings.device
        stream = new_stream(device) if device is not None and device.type == "cuda" else None
        self._free = [
            BatchBuffer(self._rank_batch, settings.views, settings.image_size, stream)
            for _ in range(RING)
        ]
        stages = [self._read_stage] * settings.readers + [self._views_stage] * settings.threads
        for stage in stages:
            thread = threading.Thread(target=self._run_stage, args=(stage,), daemon=True)
            thread.start()  # may raise; only those that run are waited for at the end
            self._threads.append(thread)

    def _run_stage(self, stage: Callable[[], None]) -> None:
        """Run a thread's stage; what it raises is raised by `next`."""
        try:
            stage()
        except BaseException as error:  # whatever ends a thread must end the loop
            self._error = self._error or error
            self._wake_all()

    def _wake_all(self) -> None:
        with self._lock:
            for condition in (self._may_read, self._may_decode, self._is_decoded):
                condition.notify_all()

    def _has_ended(self) -> bool:
        return self._error is not None or self._stop.is_set()

    # -------------------------------------------------------------------------------- stage 2: read

    def _read_stage(self) -> None:
        """Read piece after piece and put the bytes of its samples into their batches."""
        cache, stop = self._settings.cache, self._stop
        while (piece := self._take_piece()) is not None:
            positions, rows = piece.positions_M.tolist(), piece.rows_M.tolist()
            samples = read_samples(self._manifest, piece.sample_ids_M, cache=cache, stop=stop)
            for index, image_bytes in samples:
                if self._has_ended():
                    return
                with self._lock:
                    if self._read_ahead.add_sample(positions[index], rows[index], image_bytes):
                        self._may_decode.notify_all()

    def _take_piece(self) -> Piece | None:
        """Wait for a piece that may be read; None at the end."""
        with self._lock:
            while not self._has_ended():
                piece = self._read_ahead.take_piece(self._next_position)
                if piece is not None:
                    return piece
                self._may_read.wait()
        return None

    # -------------------------------------------------------------------------- stage 3: make views

    def _views_stage(self) -> None:
        """Decode rows after rows of the batches whose bytes have come."""
        while (rows := self._take_rows()) is not None:
            self._make_rows(*rows)

    def _take_rows(self, until_decoded: bool = False) -> tuple[DecodingBatch, range] | None:
        """Wait for rows to decode; None at the end.

        Args:
            until_decoded: Return None, too, when the oldest batch is decoded.
        """
        with self._lock:
            while not self._has_ended():
                if until_decoded and self._batches and self._batches[0].is_ready:
                    return None
                if until_decoded and self._settings.threads:  # others decode
                    self._is_decoded.wait()
                    continue
                if not self._batches or self._batches[-1].next_row == self._rank_batch:
                    self._open_batch()
                if self._batches and (rows := self._batches[-1].take_rows()):
                    return self._batches[-1], rows
                self._may_decode.wait()
        return None

    def _open_batch(self) -> None:
        """Give the next batch a buffer if all its bytes have come and a buffer is free."""
        if not self._free:
            return
        encoded = self._read_ahead.take_batch(self._next_position)
        if encoded is None:
            return
        epoch = self._next_position // self.order.batches_per_epoch
        self._batches.append(DecodingBatch(epoch, encoded, self._free.pop(), self._manifest))
        self._next_position += 1
        self._may_decode.notify_all()
        self._may_read.notify_all()  # what the next batch needs is read however much is held

    def _make_rows(self, batch: "DecodingBatch", rows: range) -> None:
        stand_ins = sum(self._make_row(batch, row) for row in rows)
        with self._lock:
            batch.stand_ins += stand_ins
            self._read_ahead.held_bytes -= batch.encoded_bytes(rows)
            self._may_read.notify()
            batch.missing -= len(rows)
            if batch.missing:
                return
        batch.buffer.start_copy()
        with self._lock:
            batch.is_ready = True
            self._is_decoded.notify_all()

    def _make_row(self, batch: "DecodingBatch", row: int) -> bool:
        """Write the two crops of a row; returns whether another sample had to stand in."""
        settings, buffer = self._settings, batch.buffer
        epoch = 0 if settings.fixed_views else batch.epoch

        def decode(sample_id: int, image_bytes: bytes) -> None:
            self._at_work[threading.get_ident()] = sample_id
            key = settings.seed, epoch, sample_id
            crops_VCHW, params_VP = buffer.crops[:, row], buffer.params[:, row]
            if settings.views.functions is not None:
                make_own_views(image_bytes, settings.views, key, crops_VCHW)
                return
            make_crops(
                image_bytes, settings.views, *key, crops_VCHW, params_VP, augment=settings.augment
            )

        planned_id = int(batch.sample_ids_B[row])
        image_bytes, batch.image_bytes[row] = batch.image_bytes[row], None
        assert image_bytes is not None
        batch.sample_ids_B[row] = sample_id = self.bad_samples.decode_or_replace(
            planned_id, image_bytes, decode, order=self.order, epoch=batch.epoch, stop=self._stop
        )
        self._at_work.pop(threading.get_ident(), None)
        return sample_id != planned_id

    def _take_decoded(self) -> DecodingBatch | None:
        """Take the oldest batch if it is decoded; raises what a thread raised."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._stop.is_set():
                raise ValueError("the loader is closed.")
            if not self._batches or not self._batches[0].is_ready:
                return None
            batch = self._batches.popleft()
            self._lent.append(batch.buffer)
            return batch
