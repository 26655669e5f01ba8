"""Batch norm inside of a backbone, over all ranks: the rows of a batch know each other.

`heads.BatchNormOverRanks` made fit for images and for depth: what is kept for the backward is the
layer's input, in its own precision, and the two statistics. `nn.SyncBatchNorm` refuses CPUs.

Shape suffixes: C = channels, R = ranks; x is (B, C), (B, C, L) or (B, C, H, W).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mocov3_ds.distributed import ranks
from mocov3_ds.model.heads import BatchNormOverRanks

_Original = nn.BatchNorm1d | nn.BatchNorm2d
_KNOWN_FORWARDS = (nn.BatchNorm1d.forward, BatchNormAct2d.forward)


class BodyBatchNorm(BatchNormOverRanks):
    """Takes the place of a batch norm of torch or timm, with its weights, names and activation.

    Running statistics stay fp32 whatever the network is cast to, as evaluation rests on them. A
    pass that recomputes activations in the backward leaves them alone.

    Args:
        original: layer whose tensors it takes over.
    """

    def __init__(self, original: _Original) -> None:
        assert original.momentum is not None
        super().__init__(
            original.num_features,
            affine=original.affine,
            eps=original.eps,
            momentum=original.momentum,
        )
        for name, tensor in (*original.named_parameters(recurse=False), *original.named_buffers()):
            setattr(self, name, tensor)
        self.act = original.act if isinstance(original, BatchNormAct2d) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel over the images and places of all ranks (train)."""
        if self.training:
            y, mean_C, var_C, count = _NormaliseOverRanks.apply(x, self.weight, self.bias, self.eps)
            if torch._C._current_graph_task_id() < 0:  # -1 outside of a backward pass
                self._update_running(mean_C, var_C, count)
        else:
            wide = _wide(x)
            statistics = (self.running_mean.to(wide), self.running_var.to(wide))
            affine = _affine(self._parameters["weight"], self._parameters["bias"], wide)
            y = F.batch_norm(x, *statistics, *affine, eps=self.eps)
        activated: Tensor = self.act(y)
        return activated

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BodyBatchNorm":
        """Move as any module does, but keep the running statistics in fp32."""
        fp32_statistics = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in fp32_statistics.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, tensor.to(moved.device))
        return self


def _wide(x: Tensor) -> torch.dtype:
    """Precision of the statistics."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _affine(
    weight_C: Tensor | None, bias_C: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if weight_C is None else weight_C.to(dtype),
        None if bias_C is None else bias_C.to(dtype),
    )


class _NormaliseOverRanks(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, statistics over all but the channels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = _wide(x)
        places = [dim for dim in range(x.dim()) if dim != 1]
        var_C, mean_C = torch.var_mean(x.to(wide), places, correction=0)
        count = mean_C.new_full((1,), float(x.numel() // x.shape[1]))
        all_RX = ranks.all_gather_stack(torch.cat([count, mean_C, var_C]))
        count_R1 = all_RX[:, :1]
        mean_RC, var_RC = all_RX[:, 1:].chunk(2, dim=1)
        total = count_R1.sum()
        mean_C = (count_R1 * mean_RC).sum(0) / total
        var_C = (count_R1 * (var_RC + (mean_RC - mean_C).square())).sum(0) / total
        ctx.save_for_backward(x, weight_C, mean_C, (var_C + eps).rsqrt(), total)
        ctx.has_bias = bias_C is not None
        y = F.batch_norm(x, mean_C, var_C, *_affine(weight_C, bias_C, wide), eps=eps)
        ctx.mark_non_differentiable(mean_C, var_C, total)
        return y, mean_C, var_C, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, mean_C, scale_C, total = ctx.saved_tensors
        places = [dim for dim in range(x.dim()) if dim != 1]
        as_channels = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        grad_wide = grad.to(mean_C.dtype)
        normal = (x.to(mean_C.dtype) - mean_C.view(as_channels)) * scale_C.view(as_channels)
        grad_sum_C = grad_wide.sum(places)
        grad_normal_sum_C = (grad_wide * normal).sum(places)
        grad_weight_C = grad_bias_C = None
        factor_C = scale_C
        if weight_C is not None:
            # these are sums over this rank's rows; the engine adds up the ranks
            grad_weight_C = grad_normal_sum_C.to(weight_C.dtype)
            grad_bias_C = grad_sum_C.to(weight_C.dtype) if ctx.has_bias else None
            factor_C = scale_C * weight_C.to(scale_C.dtype)
        sums_2C = ranks.all_reduce_sum(torch.stack([grad_sum_C, grad_normal_sum_C])) / total
        shift, slope = (sum_C.view(as_channels) for sum_C in sums_2C)
        grad_x = (grad_wide - shift - normal.mul_(slope)) * factor_C.view(as_channels)
        return grad_x.to(x.dtype), grad_weight_C, grad_bias_C, None


def spread_batch_norms(network: nn.Module) -> bool:
    """Replace each batch norm inside of `network` by `BodyBatchNorm`; whether there was any.

    Raises:
        ValueError: a norm over the batch that is of another kind, or keeps no running statistics.
    """
    replaced: dict[nn.Module, BodyBatchNorm] = {}
    for parent in list(network.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                if child not in replaced:
                    replaced[child] = BodyBatchNorm(_check_kind(child))
                setattr(parent, child_name, replaced[child])
    for name, module in network.named_modules():
        has_statistics = getattr(module, "running_var", None) is not None
        if has_statistics and not isinstance(module, BodyBatchNorm) and _trains_statistics(module):
            raise ValueError(
                f"the layer {name!r} is a {type(module).__name__}, which has statistics of a batch "
                "that this program cannot take over all ranks; choose a network with batch norm, "
                "layer norm or group norm."
            )
    return bool(replaced)


def _trains_statistics(module: nn.Module) -> bool:
    return "Frozen" not in type(module).__name__


def _check_kind(norm: nn.Module) -> _Original:
    is_plain = type(norm).forward in _KNOWN_FORWARDS
    drops = not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity)
    assert isinstance(norm, _Original)
    if not is_plain or drops or norm.running_mean is None or norm.momentum is None:
        raise ValueError(
            f"a {type(norm).__name__} of the network is no plain batch norm with running averages, "
            "which is what this program can take over all ranks."
        )
    return norm
