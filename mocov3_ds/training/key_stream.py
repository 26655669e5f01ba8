"""Keys computed beside the queries, on a stream of the GPU of their own.

Keys need the momentum encoder after its move and the views, and nobody needs them before the loss.
Where kernels are too small to fill a GPU (ViT-S), two streams of them may share it; large networks
fill it alone and gain nothing. The numbers are the same: kernels and their order within a stream
are. At ZeRO-3 the momentum encoder moves while the queries are computed, so that keys cannot begin.
"""

from collections.abc import Callable
from functools import cache

import torch

from mocov3_ds.data.device_copy import new_stream
from mocov3_ds.model.momentum_encoder import ViewKeys

KeyMaker = Callable[[], tuple[ViewKeys, ViewKeys]]
"""makes the keys of view 1 and of view 2"""


@cache
def stream_of_keys(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which keys are computed, always the same: its memory is kept for it.

    Args:
        device: the GPU of this rank.
    """
    stream: torch.cuda.Stream = new_stream(device)
    return stream


def begin_keys(make_keys: KeyMaker, device: torch.device) -> KeyMaker:
    """Start to compute the keys behind all that is on the current stream so far.

    Args:
        make_keys: makes them; it is called at once.
        device: the GPU of this rank.

    Returns:
        What hands them out; the current stream waits for them from then on, the host does not.
    """
    stream = stream_of_keys(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        keys = make_keys()

    def take_keys() -> tuple[ViewKeys, ViewKeys]:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for view in keys:
            for tensor in view:
                tensor.record_stream(current)  # their memory is not used again before that
        return keys

    return take_keys
