"""The matrix that an optimizer's step multiplies its averaged gradient with, beside the rate.

A step of Adam moves a weight by lr m / (sqrt(v) + eps), so what its steps see of the loss is not
the Hessian H but P^-1 H with the diagonal P = sqrt(v) + eps, v corrected for its start at 0 (arXiv
2207.14484). LAMB's direction is Adam's; the trust ratio on it is not in P. Optimizers without such
a root have P = 1: LARS, and Muon, whose matrices have no diagonal one. A tensor's own multiple of
the learning rate is in P^-1.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mocov3_ds.optim.adamw import AdamW
from mocov3_ds.optim.lamb import Lamb
from mocov3_ds.optim.sharded import ShardedOptimizer

_ROUNDING = 1e-5
"""root of a second moment, relative to that of all weights together, that may be rounding: fp32
sums of gradients that cancel were at 2e-6"""


def has_preconditioner(optimizer: ShardedOptimizer) -> bool:
    """Tell whether the steps of an optimizer divide by the root of a second moment."""
    return isinstance(optimizer, AdamW | Lamb)


def inverse_preconditioner(optimizer: ShardedOptimizer) -> Iterator[tuple[str, Tensor]]:
    """Name and P^-1 of each trained tensor, whole, fp32, in the optimizer's order.

    All ranks must iterate. A weight whose root is not above eps, or below 1e-5 of the roots' mean
    square, has had no gradient but rounding (a bias that a softmax or a batch norm takes out
    again): the loss does not depend on it, and P^-1 is 0 there instead of near 1 / eps, which would
    make a curvature of the rounding.

    Args:
        optimizer: Attached, after its first step; P^-1 of a tensor without one is 0.
    """
    group = optimizer.param_groups[0]
    if not has_preconditioner(optimizer):
        for name, state in optimizer.full_state("weight"):
            yield name, torch.full_like(state["weight"], optimizer.rules[name].lr_multiplier)
        return
    updates, square, numbers = optimizer.update_counts(), 0.0, 0
    biases = {
        name: 1 - group["betas"][1] ** count if group["bias_correction"] and count else 1.0
        for name, count in updates.items()
    }
    for name, state in optimizer.full_state("exp_avg_sq"):
        square += float(state["exp_avg_sq"].sum()) / biases[name]
        numbers += state["exp_avg_sq"].numel()
    smallest_root = max(group["eps"], _ROUNDING * math.sqrt(square / numbers))
    for name, state in optimizer.full_state("exp_avg_sq"):
        root = (state["exp_avg_sq"] / biases[name]).sqrt_()
        scale = optimizer.rules[name].lr_multiplier / (root + group["eps"])
        yield name, torch.where(root > smallest_root, scale, 0.0)


def sharpness_limit(optimizer: ShardedOptimizer, lr: float) -> float:
    """Largest eigenvalue of P^-1 H at which steps of one rate on a quadratic loss stay bounded.

    2 (1 + beta1) / ((1 - beta1) lr), 38 / lr for Adam at beta1 0.9 (arXiv 2207.14484); weight decay
    is left out. NaN for an optimizer whose trust ratios are not in P, or that has no P; infinite at
    lr 0.

    Args:
        optimizer: What makes the steps.
        lr: Learning rate, above or equal to 0.
    """
    group = optimizer.param_groups[0]
    if optimizer.has_trust_ratio or not has_preconditioner(optimizer):
        return float("nan")
    beta = group["betas"][0]
    return 2 * (1 + beta) / ((1 - beta) * lr) if lr else float("inf")
