"""Which bytes does a loader hold before they are decoded, and when may it read more?

Shape suffixes: B = rank batch, M = samples of a piece.
"""

from collections.abc import Iterator

import numpy as np

from mocov3_ds.data.fetch import Unreadable
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.sample_order import Piece

BATCHES_AHEAD = 8
"""Batches whose bytes are read before they are decoded."""


class EncodedBatch:
    """Image bytes of a rank's batch as they come in, in any order.

    Args:
        rows: Number of samples in the batch.
    """

    def __init__(self, rows: int) -> None:
        self.sample_ids_B = np.zeros(rows, dtype=np.int64)
        self.image_bytes: list[bytes | Unreadable | None] = [None] * rows
        self.missing = rows
        """rows whose bytes have not come"""


class ReadAhead:
    """Bookkeeping of reading: which piece is next, and what has come in.

    It has no lock; the loader calls it under its own.

    Args:
        manifest: Manifest of the set that is read.
        pieces: All that the rank needs, in the order of first need, without end.
        rank_batch: Number of samples in the rank's batch.
        byte_limit: Encoded bytes that may be held, read or being read.
    """

    def __init__(
        self, manifest: Manifest, pieces: Iterator[Piece], rank_batch: int, byte_limit: int
    ) -> None:
        self._size_N = manifest.index_N["size"]
        self._pieces, self._rank_batch = pieces, rank_batch
        self.byte_limit, self.held_bytes = byte_limit, 0
        self.batches: dict[int, EncodedBatch] = {}
        """batches whose bytes are coming in, by position"""
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Draw the piece after this one, and sum the encoded bytes that it will take."""
        self._next_piece = next(self._pieces)
        self._next_bytes = int(self._size_N[self._next_piece.sample_ids_M].sum())

    def take_piece(self, position: int) -> Piece | None:
        """Return the next piece if it may be read now, and count its bytes as held.

        That is once there is room for it, or when nothing can go on without it.

        Args:
            position: Global batch that is decoded next.
        """
        piece = self._next_piece
        ahead, room = piece.first_position - position, self.byte_limit - self.held_bytes
        if ahead > 0 and (ahead > BATCHES_AHEAD or self._next_bytes > room):
            return None
        self.held_bytes += self._next_bytes
        self._announce_piece(piece)
        self._look_ahead()
        return piece

    def _announce_piece(self, piece: Piece) -> None:
        """Write down which samples the rows of coming batches hold."""
        borders = np.flatnonzero(np.diff(piece.positions_M)) + 1
        for positions_M, rows_M, sample_ids_M in zip(
            np.split(piece.positions_M, borders),
            np.split(piece.rows_M, borders),
            np.split(piece.sample_ids_M, borders),
            strict=True,
        ):
            position = int(positions_M[0])
            if position not in self.batches:
                self.batches[position] = EncodedBatch(self._rank_batch)
            self.batches[position].sample_ids_B[rows_M] = sample_ids_M

    def add_sample(self, position: int, row: int, image_bytes: bytes | Unreadable) -> bool:
        """Put the bytes of a sample into its batch; returns whether that is complete now."""
        batch = self.batches[position]
        batch.image_bytes[row] = image_bytes
        batch.missing -= 1
        return not batch.missing

    def take_batch(self, position: int) -> EncodedBatch | None:
        """Hand a batch over if all its bytes have come."""
        batch = self.batches.get(position)
        if batch is None or batch.missing:
            return None
        return self.batches.pop(position)
