"""Train the odd model without an engine, whole tensors, with gradients that are given."""

from typing import Any

import torch
from torch import Tensor, nn

from mocov3_ds.optim.rules import vit_rule
from tests.optim import plain

STEPS = 8


def make_model() -> nn.Module:
    return plain.odd_model()


def make_gradients(net: nn.Module, steps: int = STEPS) -> list[dict[str, Tensor]]:
    """Real ones would follow the weights; these differ by step and tensor, and suffice here."""
    generator = torch.Generator().manual_seed(2)
    return [
        {
            name: torch.randn(p.shape, generator=generator) * 10.0 ** (index % 3 - 2)
            for index, (name, p) in enumerate(net.named_parameters())
            if p.requires_grad
        }
        for _ in range(steps)
    ]


def run_steps(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    named = dict(net.named_parameters())
    for step in make_gradients(net):
        for name, gradient in step.items():
            named[name].grad = gradient.clone()
        optimizer.step()
    return {name: p.detach().clone() for name, p in named.items() if p.requires_grad}


def train_ours(kind: Any, **options: Any) -> dict[str, Tensor]:
    net = make_model()
    optimizer = kind(net.named_parameters(), **options)
    optimizer.attach()
    return run_steps(optimizer, net)


def decay_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    matrix = [p for n, p in trained.items() if vit_rule(n, tuple(p.shape)).adapt]
    rest = [p for n, p in trained.items() if not vit_rule(n, tuple(p.shape)).adapt]
    return [{"params": matrix, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def movement_error(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    first = {n: p.detach() for n, p in make_model().named_parameters()}
    return max(
        float((one[n] - other[n]).norm() / (other[n] - first[n]).norm().clamp_min(1e-30))
        for n in other
    )
