"""P^-1 against the formula, and the limit at which Adam's steps grow on a quadratic loss."""

import math

import pytest
import torch
from torch import nn

from mocov3_ds.optim import AdamW, Lamb, Lars
from mocov3_ds.optim.preconditioner import inverse_preconditioner, sharpness_limit
from mocov3_ds.optim.rules import Rule
from mocov3_ds.optim.sharded import ShardedOptimizer

GRADIENTS = torch.tensor([[0.1, -2.0, 1e-9], [0.3, 1.0, -1e-9]])


def rule(name: str, shape: tuple[int, ...]) -> Rule:
    return Rule(lr_multiplier=0.2 if name == "slow" else 1.0)


def after_two_steps(optimizer: ShardedOptimizer) -> dict[str, torch.Tensor]:
    optimizer.attach()
    for gradient in GRADIENTS:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = gradient.clone()
        optimizer.step()
    return dict(inverse_preconditioner(optimizer))


def named() -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.ones(3))) for name in ("fast", "slow")]


@pytest.mark.parametrize("make", [AdamW, Lamb])
def test_adams_is_the_root_of_the_corrected_second_moment(make: type[ShardedOptimizer]) -> None:
    found = after_two_steps(make(named(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, rule=rule))
    for index in range(2):
        first, second = GRADIENTS[:, index].double().square().tolist()
        v = 0.01 * (0.99 * first + second) / (1 - 0.99**2)
        expected = 1 / (math.sqrt(v) + 1e-8)
        assert float(found["fast"][index]) == pytest.approx(expected, rel=1e-5)
        assert float(found["slow"][index]) == pytest.approx(0.2 * expected, rel=1e-5)
    assert found["fast"][2] == found["slow"][2] == 0  # nothing but rounding


def test_an_optimizer_without_second_moments_has_the_rates_alone() -> None:
    found = after_two_steps(Lars(named(), lr=1e-3, rule=rule))
    assert found["fast"].tolist() == [1.0] * 3
    assert found["slow"].tolist() == pytest.approx([0.2] * 3)


def test_the_limit_is_where_steps_with_momentum_grow() -> None:
    optimizer = AdamW(named(), betas=(0.9, 0.999))
    assert sharpness_limit(optimizer, 0.01) == pytest.approx(3800.0)
    assert sharpness_limit(optimizer, 0.0) == math.inf
    assert math.isnan(sharpness_limit(Lamb(named()), 0.01))
    assert math.isnan(sharpness_limit(Lars(named()), 0.01))
    for share, grows in ((0.98, False), (1.02, True)):
        x, m, eigenvalue = 1.0, 0.0, share * 3800.0
        for _ in range(2000):
            m = 0.9 * m + 0.1 * eigenvalue * x
            x -= 0.01 * m
        assert (abs(x) > 1) == grows
