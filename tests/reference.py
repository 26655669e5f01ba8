"""The paper's equations written plainly and slowly, to test the real code against.

One process, whole batch, no chunks, no engine: arXiv 2104.02057, Alg. 1 and Sec. 3-5.
"""

import math

import torch
from torch import Tensor, nn


def contrastive_loss(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """2T times the mean of -log(exp(q.k+ / T) / sum_j exp(q.k_j / T)), one query at a time."""
    total = q.new_zeros(())
    for i in range(len(q)):
        qi = q[i] / q[i].norm()
        similarities = torch.stack([(qi * (kj / kj.norm())).sum() for kj in k]) / temperature
        total = total - (similarities[i] - torch.log(torch.exp(similarities).sum()))
    return 2 * temperature * total / len(q)


def position(h: int, w: int, dim: int) -> Tensor:
    """Sin-cos position of the token at row h, column w (row = slow axis)."""
    quarter = dim // 4
    out = torch.zeros(dim, dtype=torch.float64)
    for i in range(quarter):
        omega = 1.0 / 10000 ** (i / quarter)
        out[i] = math.sin(h * omega)
        out[quarter + i] = math.cos(h * omega)
        out[2 * quarter + i] = math.sin(w * omega)
        out[3 * quarter + i] = math.cos(w * omega)
    return out


def as_plain_batch_norm(module: nn.Module) -> nn.Module:
    """The same heads, sharing their parameters, with torch's own one-process BatchNorm1d."""
    plain = nn.Sequential()
    for name, child in module.named_children():
        if hasattr(child, "running_mean"):
            norm = nn.BatchNorm1d(len(child.running_mean), affine=child.weight is not None)
            norm = norm.to(child.running_mean.dtype)
            norm.weight, norm.bias = child.weight, child.bias
            plain.add_module(name, norm)
        else:
            plain.add_module(name, child)
    return plain


def adamw_step(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    *,
    lr: float,
    wd: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decoupled weight decay (Loshchilov & Hutter), t counted from 1; returns (w, m, v)."""
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
    return w - lr * wd * w - lr * m_hat / (v_hat.sqrt() + eps), m, v


def moco_step(
    base: nn.Module, momentum: nn.Module, x1: Tensor, x2: Tensor, *, m: float, temperature: float
) -> Tensor:
    """One pass of Alg. 1 on one process up to the loss; moves `momentum` in the paper's order.

    `base` has backbone, projector, predictor; `momentum` backbone and projector. Heads are run
    with one-process batch norm in train mode.
    """
    project, predict = as_plain_batch_norm(base.projector), as_plain_batch_norm(base.predictor)
    q1 = predict(project(base.backbone(x1)))
    q2 = predict(project(base.backbone(x2)))
    with torch.no_grad():
        for name, k in momentum.named_parameters():
            q = base.get_parameter(name)
            if q.requires_grad:
                k.copy_(m * k + (1 - m) * q)
        key_project = as_plain_batch_norm(momentum.projector)
        k1 = key_project(momentum.backbone(x1))
        k2 = key_project(momentum.backbone(x2))
    return contrastive_loss(q1, k2, temperature) + contrastive_loss(q2, k1, temperature)
