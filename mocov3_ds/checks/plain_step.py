"""One MoCo v3 step as the paper writes it: one process, whole batch, fp64, no engine, no chunks.

The real step is compared with this one. It uses nothing of `model.heads`, `model.loss`,
`model.momentum_encoder` or `optim`; only the backbone is timm's module, run in fp64.

Shape suffixes: G = global batch, C H W = image, D = features, P = head output.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BATCH_NORM_EPS = 1e-5

Tensors = Mapping[str, Tensor]


def apply_head(tensors: Tensors, prefix: str, x_GD: Tensor) -> Tensor:
    """Linear layers, each with batch norm over all rows, and a softplus after all but the last.

    Args:
        tensors: fp64 weights by name.
        prefix: name of the head, such as "projector".
        x_GD: input of the head, fp64.
    """
    numbers = sorted({int(n.split(".")[1]) for n in tensors if n.startswith(f"{prefix}.")})
    for number in numbers:
        layer = f"{prefix}.{number}"
        if f"{layer}.running_mean" not in tensors:
            x_GD = x_GD @ tensors[f"{layer}.weight"].T
            continue
        x_GD = (x_GD - x_GD.mean(0)) / (x_GD.var(0, unbiased=False) + _BATCH_NORM_EPS).sqrt()
        if f"{layer}.weight" in tensors:
            x_GD = x_GD * tensors[f"{layer}.weight"] + tensors[f"{layer}.bias"]
        if number != numbers[-1]:
            x_GD = F.softplus(x_GD)
    return x_GD


def batch_loss(
    backbone: nn.Module,
    base: Tensors,
    momentum: Tensors,
    x1_GCHW: Tensor,
    x2_GCHW: Tensor,
    temperature: float,
) -> Tensor:
    """Symmetrised contrastive loss of the global batch, a scalar in fp64.

    Args:
        backbone: module to run with the weights of either encoder, fp64.
        base: fp64 tensors of the base encoder by name; they get gradients.
        momentum: fp64 tensors of the momentum encoder, after its move.
        x1_GCHW: first views of all images, fp64.
        x2_GCHW: second views of all images, fp64.
        temperature: temperature T of the softmax.
    """
    q1_GP, q2_GP = (
        apply_head(
            base, "predictor", apply_head(base, "projector", _run_backbone(backbone, base, x_GCHW))
        )
        for x_GCHW in (x1_GCHW, x2_GCHW)
    )
    with torch.no_grad():
        k1_GP, k2_GP = (
            apply_head(momentum, "projector", _run_backbone(backbone, momentum, x_GCHW))
            for x_GCHW in (x1_GCHW, x2_GCHW)
        )
    return _contrastive_loss(q1_GP, k2_GP, temperature) + _contrastive_loss(
        q2_GP, k1_GP, temperature
    )


def _run_backbone(backbone: nn.Module, tensors: Tensors, x_GCHW: Tensor) -> Tensor:
    """Features (G, D) of images under the weights called "backbone." + name."""
    prefix = "backbone."
    weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return torch.func.functional_call(backbone, weights, (x_GCHW,))


def _contrastive_loss(q_GP: Tensor, k_GP: Tensor, temperature: float) -> Tensor:
    q_GP, k_GP = (x / x.norm(dim=1, keepdim=True) for x in (q_GP, k_GP))
    logits_GG = q_GP @ k_GP.T / temperature
    return 2 * temperature * (logits_GG.logsumexp(1) - logits_GG.diagonal()).mean()


def move_encoder(
    momentum: Tensors, base: Tensors, trained: set[str], m: float
) -> dict[str, Tensor]:
    """Move the momentum encoder: trained tensors become m k + (1 - m) q, the others stay."""
    return {n: m * k + (1 - m) * base[n] if n in trained else k for n, k in momentum.items()}


@dataclass
class Lamb:
    """Whole-tensor LAMB (arXiv 1904.00962, Alg. 2) in fp64; matrices decay and adapt."""

    lr: float
    weight_decay: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    t: int = 0
    m: dict[str, Tensor] = field(default_factory=dict)
    v: dict[str, Tensor] = field(default_factory=dict)

    def step(self, weights: Tensors, gradients: Tensors, matrices: set[str]) -> dict[str, Tensor]:
        """New weights by name.

        Args:
            weights: weights before the step, fp64.
            gradients: gradient of each trained tensor.
            matrices: names of the tensors that decay and adapt.
        """
        self.t += 1
        return {n: self._step_tensor(n, weights[n], g, n in matrices) for n, g in gradients.items()}

    def _step_tensor(self, name: str, w: Tensor, g: Tensor, matrix: bool) -> Tensor:
        zero = torch.zeros_like(w)
        m = self.m[name] = self.b1 * self.m.get(name, zero) + (1 - self.b1) * g
        v = self.v[name] = self.b2 * self.v.get(name, zero) + (1 - self.b2) * g * g
        u = (m / (1 - self.b1**self.t)) / ((v / (1 - self.b2**self.t)).sqrt() + self.eps)
        if not matrix:
            return w - self.lr * u
        u = u + self.weight_decay * w
        ratio = w.norm() / u.norm() if w.norm() > 0 and u.norm() > 0 else 1.0
        return w - self.lr * ratio * u
