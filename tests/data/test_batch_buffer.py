"""Rows of a batch are handed out once each, and its memory is as the loader's settings say."""

import numpy as np
import torch

from mocov3_ds.data.batch_buffer import BatchBuffer, DecodingBatch
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.read_ahead import EncodedBatch
from mocov3_ds.data.views.spec import ViewSpec


def test_memory_is_seen_alike_by_caller_and_decoder() -> None:
    buffer = BatchBuffer(5, ViewSpec(), (4, 6), None)
    assert buffer.crops_VBCHW.shape == (2, 5, 3, 4, 6)
    assert buffer.crops_VBCHW.dtype == torch.uint8 and not buffer.crops_VBCHW.is_pinned()
    buffer.crops[1, 4] = 7
    buffer.params[0, 2] = 3
    assert int(buffer.crops_VBCHW[1, 4].sum()) == 7 * 72 and (buffer.params_VBP[0, 2] == 3).all()
    buffer.start_copy()
    assert buffer.copy is None  # there is no GPU
    buffer.end_copy()


def test_each_row_is_handed_out_once(small: Manifest) -> None:
    ids_B = np.arange(20)
    encoded = EncodedBatch(20)
    encoded.sample_ids_B[:] = ids_B
    batch = DecodingBatch(0, encoded, BatchBuffer(20, ViewSpec(), 4, None), small)
    taken = [batch.take_rows() for _ in range(4)]
    assert [row for rows in taken for row in rows] == list(range(20)) and not taken[-1]
    sizes = [batch.encoded_bytes(rows) for rows in taken]
    assert sum(sizes) == int(small.index_N["size"][ids_B].sum()) and sizes[-1] == 0
    assert batch.missing == 20 and not batch.is_ready
