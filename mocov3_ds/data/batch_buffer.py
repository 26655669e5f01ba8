"""The memory of a batch on its way from bytes to crops, and to a GPU.

Shape suffixes: V = the two views, B = rank batch, C H W = image, P = parameters.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mocov3_ds.data.device_copy import DeviceCopy
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.read_ahead import EncodedBatch
from mocov3_ds.data.views.spec import PLAIN_PARAMS, ViewSpec

_ROWS = 8  # rows that a decoding thread takes at a time


class BatchBuffer:
    """A batch's memory, seen as tensors by the caller and as arrays by the decoder.

    Args:
        rows: samples of a batch.
        views: distribution of the views, of which channels and functions count here.
        size: side of a crop, or its height and width, pixels.
        stream: stream of the GPU that the crops are copied to; None = they stay.
    """

    def __init__(
        self,
        rows: int,
        views: ViewSpec,
        size: int | tuple[int, int],
        stream: torch.cuda.Stream | None,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, rows, views.channels, height, width)
        dtype = torch.uint8 if views.functions is None else torch.float32
        pin = stream is not None
        self.crops_VBCHW = torch.empty(shape, dtype=dtype, pin_memory=pin)
        self.copy: DeviceCopy | None = None
        self._stream = stream
        self.params_VBP = torch.tensor(PLAIN_PARAMS).repeat(2, rows, 1)
        self.crops: NDArray[Any] = self.crops_VBCHW.numpy()
        self.params: NDArray[np.float32] = self.params_VBP.numpy()

    def start_copy(self) -> None:
        """Start the copy to a GPU, where there is one."""
        if self._stream is not None:
            self.copy = DeviceCopy(self.crops_VBCHW, self._stream)

    def end_copy(self) -> None:
        """Wait until the memory may be written again, and let go of the crops on the GPU."""
        if self.copy is not None:
            self.copy.wait()
            self.copy = None


class DecodingBatch:
    """A batch whose rows are being handed out to decoding threads."""

    def __init__(self, epoch: int, encoded: EncodedBatch, buffer: BatchBuffer, manifest: Manifest):
        self.epoch, self.buffer = epoch, buffer
        self.sample_ids_B, self.image_bytes = encoded.sample_ids_B, encoded.image_bytes
        self._size_B = manifest.index_N["size"][self.sample_ids_B]
        self.next_row, self.missing = 0, len(self.sample_ids_B)  # rows not decoded
        self.stand_ins = 0
        self.is_ready = False  # decoded, and on its way to a GPU

    def take_rows(self) -> range:
        """Return the next rows to decode; none when all are taken."""
        rows = range(self.next_row, min(self.next_row + _ROWS, len(self.sample_ids_B)))
        self.next_row = rows.stop if rows else self.next_row
        return rows

    def encoded_bytes(self, rows: range) -> int:
        """Sum the encoded bytes of the samples that were planned for these rows."""
        return int(self._size_B[rows.start : rows.stop].sum())
