"""A picture of a few images' views, as the network got them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_IMAGES, _GAP = 8, 2  # images shown, pixels between them


def draw_view_sheet(
    x1_BCHW: Tensor, x2_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Image.Image:
    """Draw the first images of a batch: view 1 above view 2.

    Of images that are not RGB the first channel is shown, in grey.

    Args:
        x1_BCHW: First views of this rank, normalised.
        x2_BCHW: Second views of the same images.
        mean: Mean of each channel that was subtracted.
        std: Deviation of each channel that was divided by.
    """
    count, channels, height, width = min(len(x1_BCHW), _IMAGES), *x1_BCHW.shape[1:]
    sheet_HWC = np.full((2 * (height + _GAP), count * (width + _GAP), 3), 255, np.uint8)
    shift_CHW, scale_CHW = (torch.tensor(values)[:, None, None] for values in (mean, std))
    for row, x_BCHW in enumerate((x1_BCHW, x2_BCHW)):
        pixels_BCHW = x_BCHW[:count].detach().float().cpu() * scale_CHW + shift_CHW
        if channels != 3:
            pixels_BCHW = pixels_BCHW[:, :1].expand(-1, 3, -1, -1)
        bytes_BHWC = (pixels_BCHW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for column, image_HWC in enumerate(bytes_BHWC):
            y, x = row * (height + _GAP), column * (width + _GAP)
            sheet_HWC[y : y + height, x : x + width] = image_HWC
    return Image.fromarray(sheet_HWC)
