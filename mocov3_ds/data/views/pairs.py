"""One stored sample to its two views' crops and parameter rows: size, draw and decode in one call.

The extension does all three in one pass over the bytes, without the interpreter; other decoders go
through `decode.size_of`, `views.draw` and `decode.two_crops`. The result is the same.

Shape suffixes: V = the two views, C H W = crop, P = parameters of a view.
"""

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data.views import decode, native, photometric


def make_pair(
    data: bytes,
    spec: photometric.ViewSpec,
    seed: int,
    epoch: int,
    sample_id: int,
    crops_VCHW: NDArray[np.uint8],
    params_VP: NDArray[np.float32],
    *,
    augment: bool = False,
) -> None:
    """Write the crops and the parameter rows of a sample.

    Args:
        data: bytes of the stored image.
        spec: distribution of the views.
        seed: of the run.
        epoch: pass over the data.
        sample_id: of the sample in its manifest.
        crops_VCHW: (2, 3, S, S) uint8, written; any strides.
        params_VP: (2, P) float32, written; any strides.
        augment: also do the colour work here, so that the device only normalises.

    Raises:
        decode.UnreadableImage: with the reason; the outputs may be partly written.
    """
    if decode.backend() == "native" and crops_VCHW[0].flags.c_contiguous:
        key, rows_VP = (seed, epoch, sample_id), np.empty(params_VP.shape, np.float32)
        verdict = native.pair(data, spec, key, crops_VCHW, rows_VP, decode.MAX_PIXELS, augment)
        if verdict == native.READ:
            params_VP[:] = rows_VP
            return
    height, width = decode.size_of(data)
    boxes, flips, params_VP[:] = photometric.draw(spec, seed, epoch, sample_id, height, width)
    decode.two_crops(data, boxes, flips, crops_VCHW)
    if augment:
        photometric.augment(crops_VCHW, params_VP)
