"""Batch norm and loss behind it, differentiated twice, against torch's own batch norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocov3_ds.model.cpu_ops import Linear
from mocov3_ds.model.heads import BatchNormOverRanks
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.training.second_derivatives import (
    TwiceDifferentiableNorm,
    differentiate_twice,
)


def test_heads_can_be_differentiated_twice() -> None:
    torch.manual_seed(0)
    heads = nn.Sequential(nn.Linear(3, 4, bias=False), BatchNormOverRanks(4)).double()
    heads[0].__class__ = Linear
    running, loss = heads[1].running_mean.clone(), ContrastiveLoss(0.2, key_block=2)
    differentiate_twice(heads, loss)
    assert type(heads[0]) is nn.Linear and type(heads[1]) is TwiceDifferentiableNorm
    assert loss.key_block == 0
    x, u = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    keys = torch.randn(6, 4).double()

    def plain(x_BD: Tensor) -> Tensor:
        y = F.batch_norm(x_BD @ heads[0].weight.T, None, None, training=True)
        scores = F.normalize(y, dim=1) @ F.normalize(keys, dim=1).T / 0.2
        return -0.4 * scores.log_softmax(1).diagonal().mean()

    expected = torch.autograd.functional.hvp(plain, x, u)[1]
    found = torch.autograd.functional.hvp(lambda x_BD: loss(heads(x_BD), keys, 0), x, u)[1]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(heads[1].running_mean, running)
