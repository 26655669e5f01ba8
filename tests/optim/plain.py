"""LAMB, LARS, StableAdamW, Muon and a small odd-sized model, written plainly: whole tensors.

LAMB: arXiv 1904.00962, Algorithm 2, with bias-corrected moments and decay inside the direction.
LARS: arXiv 1708.03888, Algorithm 1.
Muon: kellerjordan.github.io/posts/muon, with the scale and the decay of arXiv 2502.16982.
"""

import torch
from torch import Tensor, nn

from tests.reference import adamw_step


def lamb_step(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    *,
    lr: float,
    wd: float,
    adapt: bool,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    low: float = 0.0,
    high: float = float("inf"),
) -> tuple[Tensor, Tensor, Tensor]:
    """One step, t counted from 1; returns (w, m, v)."""
    m = b1 * m + ((1 - b1) if grad_averaging else 1.0) * g
    v = b2 * v + (1 - b2) * g * g
    c1, c2 = (1 - b1**t, 1 - b2**t) if bias_correction else (1.0, 1.0)
    u = (m / c1) / ((v / c2).sqrt() + eps) + wd * w
    ratio = torch.ones(())
    if adapt and w.norm() > 0 and u.norm() > 0:
        ratio = (w.norm() / u.norm()).clamp(low, high)
    return w - lr * ratio * u, m, v


def lars_step(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    *,
    lr: float,
    wd: float,
    adapt: bool,
    momentum: float = 0.9,
    coefficient: float = 1e-3,
    eps: float = 1e-8,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step; returns (w, m)."""
    ratio = torch.ones(())
    if adapt and w.norm() > 0 and g.norm() > 0:
        ratio = coefficient * w.norm() / (g.norm() + wd * w.norm() + eps)
    d = ratio * (g + wd * w)
    m = momentum * m + d
    return w - lr * (d + momentum * m if nesterov else m), m


def update_clip(g: Tensor, v: Tensor, t: int, *, b2: float, eps: float = 1e-8) -> float:
    """StableAdamW's factor on the rate of step t, 1 / max(1, RMS); v from before the step."""
    v_hat = (b2 * v + (1 - b2) * g * g) / (1 - b2**t)
    rms = (g * g / v_hat.clamp_min(eps * eps)).mean().sqrt()
    return 1 / max(1.0, float(rms))


def stable_adamw_step(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    *,
    lr: float,
    b2: float,
    wd: float,
    clip: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """arXiv 2304.13013, Algorithm 2, with Adam's own bias corrections; returns (w, m, v)."""
    lr = lr * update_clip(g, v, t, b2=b2) if clip else lr
    return adamw_step(w, g, m, v, t, lr=lr, wd=wd, b2=b2)


def muon_step(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    *,
    lr: float,
    wd: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    dtype: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of a matrix; returns (w, m)."""
    m = torch.lerp(m, g, 1 - momentum)
    d = torch.lerp(g, m, momentum) if nesterov else m
    x = newton_schulz(d.bfloat16() if dtype == "bf16" else d).float()
    return w - lr * (0.2 * max(w.shape) ** 0.5 * x + wd * w), m


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Five rounds of X <- a X + b (X X') X + c (X X')^2 X, always by the rows."""
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        poly = -4.7750 * gram + 2.0315 * (gram @ gram)
        x = 3.4445 * x + (poly @ x if x.shape[0] <= x.shape[1] else x @ poly)
    return x


class OddModel(nn.Module):
    """Sizes that no partition boundary respects, tensors over several ranks, scales far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(11, 7)
        self.token = nn.Parameter(torch.empty(1, 1, 7))
        self.wide = nn.Linear(7, 301)
        self.norm = nn.LayerNorm(301)
        self.narrow = nn.Linear(301, 3)
        self.scale = nn.Parameter(torch.empty(1))
        self.out = nn.Linear(3, 5, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.frozen(x)[:, None] + self.token
        h = torch.tanh(self.norm(self.wide(torch.tanh(h[:, 0]))))
        return self.out(torch.tanh(self.narrow(h)) * self.scale)


_STD = {"wide.weight": 0.3, "narrow.weight": 0.01, "out.weight": 3.0, "norm.weight": 1.0}


def odd_values(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights whose deviations differ by up to 300, so that true trust ratios do, too."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(shape, generator=generator) * _STD.get(name, 0.1)
        for name, shape in shapes.items()
    }


def odd_model() -> OddModel:
    """The model with its odd weights."""
    model = OddModel()
    values = odd_values({name: tuple(p.shape) for name, p in model.named_parameters()})
    model.load_state_dict(values)
    return model
