"""The check of the colour kernels passes the library of this machine, and finds a wrong pixel."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mocov3_ds.checks import view_kernels
from mocov3_ds.data.views import photometric

CPU = torch.device("cpu")


def test_this_machine_passes() -> None:
    finding = view_kernels.check_views(CPU)
    assert finding.status == "pass" and finding.measured == "8 cases bit-equal"


def test_one_wrong_pixel_is_found() -> None:
    make_views = photometric.make_views

    def make_wrong(*arguments: Any) -> Tensor:
        views_BCHW = make_views(*arguments)
        if views_BCHW.shape[2:] == (33, 40):
            views_BCHW[5, 1, 7, 9] += 1
        return views_BCHW

    with mock.patch.object(photometric, "make_views", make_wrong):
        finding = view_kernels.check_views(CPU)
    assert finding.status == "fail"
    assert finding.measured == "33 x 40 float32: 1 of 71280"
