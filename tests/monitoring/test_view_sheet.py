"""The picture of views: the pixels that the network got, normalisation undone."""

import numpy as np
import torch

from mocov3_ds.monitoring.view_sheet import draw_view_sheet


def test_pixels_are_those_of_the_views() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    bytes_VBCHW = torch.randint(0, 256, (2, 9, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    shift, scale = (torch.tensor(v)[:, None, None] for v in (mean, std))
    views_VBCHW = (bytes_VBCHW / 255 - shift) / scale
    sheet = np.asarray(draw_view_sheet(*views_VBCHW, mean, std))
    assert sheet.shape == (12, 8 * 7, 3)  # eight images, two pixels between them
    for view in (0, 1):
        shown = sheet[6 * view : 6 * view + 4, 7 : 7 + 5]
        assert np.array_equal(shown, bytes_VBCHW[view, 1].permute(1, 2, 0).numpy())


def test_other_channels_stand_beside_one_another() -> None:
    bytes_BCHW = torch.randint(0, 256, (2, 5, 4, 6), generator=torch.Generator().manual_seed(0))
    x_BCHW = bytes_BCHW / 255 - 0.5
    sheet = np.asarray(draw_view_sheet(x_BCHW, x_BCHW, (0.5,) * 5, (1.0,) * 5))
    assert sheet.shape == (2 * 6, 2 * (5 * 7 - 1 + 2), 3)
    for image, channel in [(0, 0), (0, 4), (1, 2)]:
        left = image * 36 + channel * 7
        for top in (0, 6):
            shown = sheet[top : top + 4, left : left + 6]
            assert np.array_equal(shown[:, :, 1], bytes_BCHW[image, channel].numpy())
