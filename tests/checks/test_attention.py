"""The check of attention passes this machine's, and finds a wrong gradient."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mocov3_ds.checks import attention
from mocov3_ds.model import vit

CPU = torch.device("cpu")


def test_this_machine_passes() -> None:
    findings = attention.check_attention(CPU, "vit_s16", ("as torch chooses", "math", "cuDNN"))
    assert [(f.name, f.status) for f in findings] == [
        ("attention, vit_s16, block", "pass"),
        ("attention, vit_s16, last block", "pass"),
    ]
    assert {*findings[0].numbers} == {"as torch chooses", "math"}  # cuDNN needs a GPU


class _Halved(torch.autograd.Function):
    """The values as they are, half of their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = vit.attend

    def attend_wrongly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wrong = _Halved.apply(k)
        return attend(q, wrong if k.dtype == torch.bfloat16 else k, v)

    with mock.patch.object(vit, "attend", attend_wrongly):
        block, last = attention.check_attention(CPU, "vit_s16", ("as torch chooses",))
    assert (block.status, last.status) == ("pass", "fail")
