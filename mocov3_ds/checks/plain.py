"""One MoCo v3 step as the paper writes it: one process, whole batch, fp64, no engine, no chunks.

What the real step is held against. Nothing of `model.heads`, `model.loss`, `model.momentum` or
`optim` is used; the backbone alone is timm's module, run in fp64 with the given weights.

Shape suffixes: G = global batch, C H W = image, D = features, P = head output.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-5  # of batch norm

Tensors = Mapping[str, Tensor]


def head(tensors: Tensors, prefix: str, x_GD: Tensor) -> Tensor:
    """Linear layers, each with batch norm over all rows and, but for the last, a softplus."""
    numbers = sorted({int(n.split(".")[1]) for n in tensors if n.startswith(f"{prefix}.")})
    for number in numbers:
        own = f"{prefix}.{number}"
        if f"{own}.running_mean" not in tensors:
            x_GD = x_GD @ tensors[f"{own}.weight"].T
            continue
        x_GD = (x_GD - x_GD.mean(0)) / (x_GD.var(0, unbiased=False) + _EPS).sqrt()
        if f"{own}.weight" in tensors:
            x_GD = x_GD * tensors[f"{own}.weight"] + tensors[f"{own}.bias"]
        if number != numbers[-1]:
            x_GD = F.softplus(x_GD)
    return x_GD


def loss(
    backbone: nn.Module,
    base: Tensors,
    momentum: Tensors,
    x1_GCHW: Tensor,
    x2_GCHW: Tensor,
    temperature: float,
) -> Tensor:
    """Symmetrised contrastive loss of a whole batch.

    Args:
        backbone: module to run with weights of either encoder, fp64.
        base: fp64 tensors of the base encoder by name; gradients reach them.
        momentum: those of the momentum encoder, moved already.
        x1_GCHW: first views.
        x2_GCHW: second views.
        temperature: of the softmax.
    """
    q1_GP, q2_GP = (
        head(base, "predictor", head(base, "projector", _features(backbone, base, x_GCHW)))
        for x_GCHW in (x1_GCHW, x2_GCHW)
    )
    with torch.no_grad():
        k1_GP, k2_GP = (
            head(momentum, "projector", _features(backbone, momentum, x_GCHW))
            for x_GCHW in (x1_GCHW, x2_GCHW)
        )
    return _contrast(q1_GP, k2_GP, temperature) + _contrast(q2_GP, k1_GP, temperature)


def _features(backbone: nn.Module, tensors: Tensors, x_GCHW: Tensor) -> Tensor:
    own = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    features_GD: Tensor = torch.func.functional_call(backbone, own, (x_GCHW,))
    return features_GD


def _contrast(q_GP: Tensor, k_GP: Tensor, temperature: float) -> Tensor:
    q_GP, k_GP = (x / x.norm(dim=1, keepdim=True) for x in (q_GP, k_GP))
    logits_GG = q_GP @ k_GP.T / temperature
    return 2 * temperature * (logits_GG.logsumexp(1) - logits_GG.diagonal()).mean()


def moved(momentum: Tensors, base: Tensors, trained: set[str], m: float) -> dict[str, Tensor]:
    """Trained tensors become m k + (1 - m) q; the others stay."""
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
        """New weights by name."""
        self.t += 1
        return {n: self._tensor(n, weights[n], g, n in matrices) for n, g in gradients.items()}

    def _tensor(self, name: str, w: Tensor, g: Tensor, matrix: bool) -> Tensor:
        zero = torch.zeros_like(w)
        m = self.m[name] = self.b1 * self.m.get(name, zero) + (1 - self.b1) * g
        v = self.v[name] = self.b2 * self.v.get(name, zero) + (1 - self.b2) * g * g
        u = (m / (1 - self.b1**self.t)) / ((v / (1 - self.b2**self.t)).sqrt() + self.eps)
        if not matrix:
            return w - self.lr * u
        u = u + self.weight_decay * w
        ratio = w.norm() / u.norm() if w.norm() > 0 and u.norm() > 0 else 1.0
        return w - self.lr * ratio * u
