"""Bookkeeping of what is read: pieces wait for room, unless nothing goes on without them."""

import numpy as np

from mocov3_ds.data.read_ahead import BATCHES_AHEAD, ReadAhead
from mocov3_ds.data.sample_order import Order
from tests.data.loading import SIZES


def read_ahead_of(manifest, byte_limit):
    order = Order(SIZES, 12, seed=3, lanes=4, pool=24)
    return order, ReadAhead(manifest, order.pieces_for_rank(0, 0, 1), 12, byte_limit)


def fill(reading, piece):
    """Give a piece's samples their ids as bytes; returns the positions that are complete now."""
    rows = zip(piece.positions_M, piece.rows_M, piece.sample_ids_M, strict=True)
    return [int(t) for t, row, i in rows if reading.add_sample(int(t), int(row), b"%d" % i)]


def test_batches_are_handed_over_when_complete(small):
    order, reading = read_ahead_of(small, 1 << 30)
    assert reading.take_batch(0) is None
    complete = []
    while 3 not in complete:
        complete += fill(reading, reading.take_piece(0))
    for position in range(4):
        batch = reading.take_batch(position)
        assert batch.sample_ids_B.tolist() == order.batch_ids(position).tolist()
        assert [int(data) for data in batch.image_bytes] == batch.sample_ids_B.tolist()
        assert reading.take_batch(position) is None


def test_without_room_only_what_the_next_batch_needs_is_read(small):
    _, reading = read_ahead_of(small, 0)
    pieces = []
    while (piece := reading.take_piece(0)) is not None:
        pieces.append(piece)
    assert pieces and all(piece.first_position == 0 for piece in pieces)
    ids = np.concatenate([piece.sample_ids_M for piece in pieces])
    assert reading.held_bytes == small.index_N["size"][ids].sum()
    assert reading.take_piece(1) is not None


def test_reading_stops_some_batches_ahead_however_much_room_there_is(small):
    _, reading = read_ahead_of(small, 1 << 30)
    last = None
    while (piece := reading.take_piece(0)) is not None:
        last = piece
    assert last.first_position <= BATCHES_AHEAD
