"""A picture of a few images' views, as the network got them."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mocov3_ds.data.views import layers

_IMAGES, _GAP = 8, 2  # images shown, pixels between them


def draw_view_sheet(
    x1_BCHW: Tensor, x2_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Image.Image:
    """Draw the first images of a batch: view 1 above view 2.

    The channels of images that are neither RGB nor grey stand beside one another, in grey.

    Args:
        x1_BCHW: First views of this rank, normalised.
        x2_BCHW: Second views of the same images.
        mean: Mean of each channel that was subtracted.
        std: Deviation of each channel that was divided by.
    """
    count, channels, height, width = min(len(x1_BCHW), _IMAGES), *x1_BCHW.shape[1:]
    tile = layers.strip_width(channels, width) + _GAP
    sheet = Image.new("RGB", (count * tile, 2 * (height + _GAP)), "white")
    shift_CHW, scale_CHW = (torch.tensor(values)[:, None, None] for values in (mean, std))
    for row, x_BCHW in enumerate((x1_BCHW, x2_BCHW)):
        pixels_BCHW = x_BCHW[:count].detach().float().cpu() * scale_CHW + shift_CHW
        bytes_BCHW = (pixels_BCHW.clamp(0, 1) * 255).round().byte().numpy()
        for column, bytes_CHW in enumerate(bytes_BCHW):
            sheet.paste(layers.as_strip(bytes_CHW), (column * tile, row * (height + _GAP)))
    return sheet
