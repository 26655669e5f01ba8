"""Crops on their way to a GPU, while the step before theirs runs.

A copy from page-locked memory goes on a stream of its own, so that it waits for no kernel and no
kernel waits for it; an event says when it is over. Until then the memory that it reads must stay
as it is, and until then whoever needs the crops has to wait: both ask here.
"""

from typing import Any

import torch
from torch import Tensor

_new_event: Any = torch.cuda.Event  # torch has no types for these two
new_stream: Any = torch.cuda.Stream
"""makes a stream of a device"""


class DeviceCopy:
    """One copy to a GPU, which is under way from now on.

    Args:
        crops_VBCHW: page-locked crops.
        stream: stream of the GPU on which they are copied.
    """

    def __init__(self, crops_VBCHW: Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            self._crops_VBCHW: Tensor | None = crops_VBCHW.to(stream.device, non_blocking=True)
            self._end = _new_event()
            self._end.record(stream)

    def take(self) -> Tensor:
        """The crops on the GPU, once; what the current stream does from now on waits for them."""
        crops_VBCHW, self._crops_VBCHW = self._crops_VBCHW, None
        assert crops_VBCHW is not None, "the crops are taken once"
        stream = torch.cuda.current_stream(crops_VBCHW.device)
        stream.wait_event(self._end)
        crops_VBCHW.record_stream(stream)  # their memory is not used again before that
        return crops_VBCHW

    def wait(self) -> None:
        """Wait until the page-locked memory may be written again."""
        if not self._end.query():
            self._end.synchronize()
