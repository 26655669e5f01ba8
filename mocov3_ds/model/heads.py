"""Projector and predictor, and the batch norm over all ranks that they need (Sec. 3, Sec. 5).

`torch.nn.SyncBatchNorm` refuses CPU tensors even on one rank, so the exchange is written here: one
all-gather of (count, mean, sum of squared deviations) forward, merged by Chan's formula, and one
all-reduce backward. It runs alike on gloo and NCCL.

Shape suffixes: B = rows of this rank, D = features, R = ranks.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mocov3_ds.distributed import ranks
from mocov3_ds.model.autocast import autocast_off


class BatchNormOverRanks(nn.Module):
    """Batch norm whose statistics are those of the global batch; equals one-process BatchNorm1d.

    Statistics and normalisation run in fp32 (fp64 for fp64 input) whatever the input's dtype; the
    output has the input's dtype. Running statistics follow `nn.BatchNorm1d` (momentum 0.1,
    unbiased variance) and skip a batch that is not finite, so that one bad batch cannot poison
    them.

    Args:
        features: width D of the rows.
        affine: whether a learnable weight and bias follow the normalisation.
        eps: number that is added to the variance under the root.
        momentum: share of the new batch in the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, features: int, *, affine: bool = True, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_parameter("weight", nn.Parameter(torch.ones(features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(features)) if affine else None)
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Normalise (B, D) over the rows of all ranks (train) or by running statistics (eval)."""
        wide = torch.float64 if x_BD.dtype == torch.float64 else torch.float32
        with autocast_off(x_BD.device):
            if self.training:
                y_BD, mean_D, var_D, rows = _NormaliseOverRanks.apply(x_BD.to(wide), self.eps)
                self._update_running(mean_D, var_D, rows)
            else:
                y_BD = (x_BD.to(wide) - self.running_mean) * (self.running_var + self.eps).rsqrt()
            if self.weight is not None:
                y_BD = y_BD * self.weight.to(wide) + self.bias.to(wide)
        return y_BD.to(x_BD.dtype)

    @torch.no_grad()
    def _update_running(self, mean_D: Tensor, var_D: Tensor, rows: Tensor) -> None:
        unbiased_D = var_D * (rows / (rows - 1).clamp(min=1))
        finite = mean_D.isfinite().all() & var_D.isfinite().all()
        for running, batch in ((self.running_mean, mean_D), (self.running_var, unbiased_D)):
            moved = running.lerp(batch.to(running.dtype), self.momentum)
            running.copy_(torch.where(finite, moved, running))
        self.num_batches_tracked += 1


class _NormaliseOverRanks(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) with mean and biased variance over the rows of all ranks."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean_D = x_BD.mean(0)
        deviation_D = (x_BD - mean_D).square().sum(0)
        rows = x_BD.new_full((1,), float(len(x_BD)))  # `new_tensor` would wait for a GPU
        all_RX = ranks.all_gather_stack(torch.cat([rows, mean_D, deviation_D]))
        rows_R1 = all_RX[:, :1]
        mean_RD, deviation_RD = all_RX[:, 1:].chunk(2, dim=1)
        total = rows_R1.sum()
        mean_D = (rows_R1 * mean_RD).sum(0) / total
        between_D = (rows_R1 * (mean_RD - mean_D).square()).sum(0)
        var_D = (deviation_RD.sum(0) + between_D) / total
        scale_D = (var_D + eps).rsqrt()
        y_BD = (x_BD - mean_D) * scale_D
        ctx.save_for_backward(y_BD, scale_D, total)
        ctx.mark_non_differentiable(mean_D, var_D, total)
        return y_BD, mean_D, var_D, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        y_BD, scale_D, total = ctx.saved_tensors
        sums = torch.stack([grad_BD.sum(0), (grad_BD * y_BD).sum(0)])
        grad_sum_D, grad_y_sum_D = ranks.all_reduce_sum(sums)
        return (grad_BD - grad_sum_D / total - y_BD * (grad_y_sum_D / total)) * scale_D, None


def build_projector(dim: int, hidden: int = 4096, out: int = 256, layers: int = 3) -> nn.Sequential:
    """Linear layers with batch norm after each, the last one without affine.

    Args:
        dim: width of the backbone's features.
        hidden: width of the hidden layers.
        out: width of keys and of what the predictor is given.
        layers: linear layers; the paper's Vision Transformers have three, its ResNets two.
    """
    return _build_mlp([dim, *[hidden] * (layers - 1), out])


def build_predictor(out: int = 256, hidden: int = 4096, *, last_norm: bool = True) -> nn.Sequential:
    """Two linear layers, batch norm after each, the last one without affine.

    Args:
        out: width of what it is given and of the queries.
        hidden: width of the hidden layer.
        last_norm: whether a batch norm follows the last layer; not so with the paper's ResNets.
    """
    return _build_mlp([out, hidden, out], last_norm)


def _build_mlp(sizes: list[int], last_norm: bool = True) -> nn.Sequential:
    """Linear (no bias), batch norm, ReLU; the last layer is linear and batch norm alone.

    Sequential indices equal those of the published MoCo v3 weights (0, 1, 3, 4, 6, 7).
    """
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        last = index == len(sizes) - 2
        layers.append(nn.Linear(fan_in, fan_out, bias=False))
        if last_norm or not last:
            layers.append(BatchNormOverRanks(fan_out, affine=not last))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
