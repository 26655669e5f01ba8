"""Stored bytes to the crops of the two views: find the size, draw, decode and cut, in one call.

The C++ library does all of it in one pass over the bytes, without the interpreter. Where it cannot,
`draw.draw_views` and `decode.cut_crops` do; the result is the same.

Shape suffixes: V = the two views, C H W = crop, P = parameters of a view.
"""

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data.views import decode, native, photometric
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.spec import ViewSpec


def make_crops(
    image_bytes: bytes,
    spec: ViewSpec,
    seed: int,
    epoch: int,
    sample_id: int,
    crops_VCHW: NDArray[np.uint8],
    params_VP: NDArray[np.float32],
    *,
    augment: bool = False,
) -> None:
    """Draw the two views of a sample and write their crops and parameter rows.

    Args:
        image_bytes: Bytes of the stored image.
        spec: Distribution of the views.
        seed: Seed of the run.
        epoch: Number of the pass over the data.
        sample_id: Number of the sample in its manifest.
        crops_VCHW: (2, C, H, W) uint8 that is written; any strides.
        params_VP: (2, P) float32 that is written; any strides.
        augment: Whether to change the colours here as well, so that the device only normalises.

    Raises:
        decode.UnreadableImage: The image cannot be read; the outputs may be partly written.
    """
    is_plain = crops_VCHW.shape[1] in (1, 3) and crops_VCHW[0].flags.c_contiguous
    if is_plain and decode.current_decoder() == "native":
        sample, written_VP = (seed, epoch, sample_id), np.empty(params_VP.shape, np.float32)
        outputs = (crops_VCHW, written_VP)
        verdict = native.make_crops(image_bytes, spec, sample, *outputs, decode.MAX_PIXELS, augment)
        if verdict == native.READ:
            params_VP[:] = written_VP
            return
    height, width = decode.read_size(image_bytes)
    boxes, flips, params_VP[:] = draw_views(spec, seed, epoch, sample_id, height, width)
    decode.cut_crops(image_bytes, boxes, flips, crops_VCHW)
    if augment:
        photometric.augment_crops(crops_VCHW, params_VP)
