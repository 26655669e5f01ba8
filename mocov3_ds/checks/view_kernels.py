"""Do the colour kernels of a device give torch's pixels on the CPU, bit for bit?

Shape suffixes: B = views, C H W = image, P = parameters of a view.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mocov3_ds.checks.finding import Finding, judge_problem
from mocov3_ds.data.views import photometric
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.spec import ViewSpec

SPEC = ViewSpec()
WIDE = ViewSpec(
    hue=0.5, saturation=1.0, blur_sigma=(0.0, 6.0), blur_p=(1.0, 0.5), solarise_p=(0.5, 0.5)
)


def draw_cases(*, large: bool = False) -> Iterator[tuple[Tensor, Tensor, torch.dtype]]:
    """Crops and rows of all operations; shapes that fill no block and one of a single pixel.

    Args:
        large: whether views of 224 pixels, as they are trained on, come as well.

    Yields:
        Crops (B, C, H, W) uint8, their rows (B, P) and the dtype of the views.
    """
    rng = np.random.default_rng(0)
    every = (torch.float32, torch.bfloat16, torch.float16)
    shapes = [(SPEC, 2, (13, 9), every), (WIDE, 9, (33, 40), every[:1]), (WIDE, 2, (1, 1), every)]
    if large:
        shapes.append((WIDE, 2, (224, 224), every[1:2]))
    for spec, samples, (height, width), dtypes in shapes:
        rows = np.concatenate([draw_views(spec, 0, 0, i, 90, 90)[2] for i in range(samples)])
        crops = rng.integers(0, 256, (len(rows), 3, height, width), dtype=np.uint8)
        crops[::4] //= 16
        crops[1::4] = crops[1::4, :, :1, :1]
        for dtype in dtypes:
            yield torch.from_numpy(crops), torch.from_numpy(rows), dtype


def check_views(device: torch.device) -> Finding:
    """Compare `photometric.make_views` on the device with torch's operations on the CPU.

    Args:
        device: the device of this rank.
    """
    cases, wrong = 0, []
    for crops_BCHW, rows_BP, dtype in draw_cases(large=True):
        expected_BCHW = torch.empty(crops_BCHW.shape, dtype=dtype)
        normalisation = photometric.scale_and_shift(SPEC.mean, SPEC.std)
        photometric.make_views_torch(crops_BCHW, rows_BP, *normalisation, expected_BCHW)
        crops = crops_BCHW.to(device)
        views_BCHW = photometric.make_views(crops, rows_BP, SPEC.mean, SPEC.std, dtype)
        differ = int((views_BCHW.cpu() != expected_BCHW).sum())
        cases += 1
        if differ or not torch.equal(crops.cpu(), crops_BCHW):
            height, width = crops_BCHW.shape[2:]
            wrong.append(f"{height} x {width} {str(dtype)[6:]}: {differ} of {views_BCHW.numel()}")
    return judge_problem(
        "views = Pillow's pixels",
        f"{cases} cases bit-equal",
        "bit-equal",
        problem=", ".join(wrong),
        remedy="views differ on this card: uninstall triton, and torch makes them; report it.",
        numbers={"cases": cases, "wrong": len(wrong)},
    )
