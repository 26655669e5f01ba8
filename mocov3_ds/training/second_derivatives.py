"""Heads that can be differentiated twice, over all ranks.

The kernels that train are written for one backward pass. Here batch norm over ranks is put together
from sums over ranks, whose derivative is such a sum again, and linear layers are torch's own.

Shape suffixes: B = rows of this rank, D = features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.model.cpu_ops import Linear
from mocov3_ds.model.heads import BatchNormOverRanks
from mocov3_ds.model.loss import PairLoss


class SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks; the gradient is that of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Each rank's tensor of one shape -> their sum."""
        return ranks.all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The sum of all ranks' gradients, which can be differentiated again."""
        summed: Tensor = SumOverRanks.apply(gradient)
        return summed


class TwiceDifferentiableNorm(BatchNormOverRanks):
    """Batch norm by the statistics of the global batch; the running ones stay as they are."""

    def forward(self, x_BD: Tensor) -> Tensor:
        """Normalise (B, D) over the rows of all ranks."""
        rows = len(x_BD) * ranks.world_size()
        centred_BD = x_BD - SumOverRanks.apply(x_BD.sum(0)) / rows
        var_D = SumOverRanks.apply(centred_BD.square().sum(0)) / rows
        y_BD = centred_BD * (var_D + self.eps).rsqrt()
        return y_BD if self.weight is None else y_BD * self.weight + self.bias


def differentiate_twice(heads: nn.Module, loss: PairLoss) -> None:
    """Change heads and loss in place so that a second backward pass goes through them.

    Args:
        heads: projector and predictor, each rank with as many rows.
        loss: the loss behind them, whose logits are written out as a whole from now on.
    """
    for module in heads.modules():
        if type(module) is BatchNormOverRanks:
            module.__class__ = TwiceDifferentiableNorm
        elif type(module) is Linear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    loss.key_block = 0
