"""LAMB without an engine, whole tensors, beside timm's Lamb and a written-out formula.

timm's Lamb differs in four ways, each met by an option or spelled out here: it clips the global
gradient norm to 1 by default (`max_grad_norm`), adapts where a tensor decays and not where a rule
says so, knows an upper bound of the trust ratio alone, 1, and sums its norms in fp32 without
pairing, off by up to 4e-5 on large matrices.
"""

from typing import Any

import pytest
import timm.optim
import torch
from torch import nn

from mocov3_ds.optim import Lamb, Rule
from mocov3_ds.optim.rules import vit_rule
from tests.optim import plain
from tests.optim.one_process import (
    decay_groups,
    make_gradients,
    make_model,
    movement_error,
    run_steps,
    train_ours,
)


@pytest.mark.parametrize("backend", ["blocks", "plain"])
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"betas": (0.8, 0.95), "eps": 1e-4}, {"betas": (0.8, 0.95), "eps": 1e-4}),
        ({"bias_correction": False}, {"bias_correction": False}),
        ({"grad_averaging": False}, {"grad_averaging": False}),
        ({"always_adapt": True}, {"always_adapt": True}),
        ({"trust_clip": (0.0, 1.0)}, {"trust_clip": True}),
    ],
    ids=str,
)
def test_lamb_is_timm_lamb(options: dict[str, Any], theirs: dict[str, Any], backend: str) -> None:
    net = make_model()
    groups = decay_groups(net, 0.1)
    witness = timm.optim.Lamb(groups, lr=2e-2, max_grad_norm=None, foreach=False, **theirs)
    want = run_steps(witness, net)
    got = train_ours(Lamb, lr=2e-2, weight_decay=0.1, backend=backend, **options)
    assert movement_error(got, want) < 2e-6
    if options:
        assert (
            movement_error(got, train_ours(Lamb, lr=2e-2, weight_decay=0.1)) > 1e-3
        )  # the option does something


def test_both_bounds_of_the_trust_ratio() -> None:
    net = make_model()
    w = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    m = {n: torch.zeros_like(p) for n, p in w.items()}
    v = {n: torch.zeros_like(p) for n, p in w.items()}
    ratios = []
    for t, step in enumerate(make_gradients(net), start=1):
        for n, g in step.items():
            rule = vit_rule(n, tuple(g.shape))
            options = {"lr": 2e-2, "wd": 0.1 * rule.decay, "adapt": rule.adapt}
            w[n], m[n], v[n] = plain.lamb_step(
                w[n], g, m[n], v[n], t, low=0.05, high=0.4, **options
            )
    net = make_model()
    optimizer = Lamb(net.named_parameters(), lr=2e-2, weight_decay=0.1, trust_clip=(0.05, 0.4))
    optimizer.attach()
    assert movement_error(run_steps(optimizer, net), w) < 2e-6
    ratios = [row["trust_ratio"] for row in optimizer.signals().rows().values()]
    assert {0.05, 0.4} <= {round(ratio, 6) for ratio in ratios}


def test_one_element_and_zero_tensors() -> None:
    """A ratio of zero norms is 1: a tensor that starts at zero must be able to leave it."""
    scalar, zero = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.zeros(2, 2))
    optimizer = Lamb(
        [("scalar", scalar), ("zero", zero)], lr=0.1, weight_decay=0.0, always_adapt=True
    )
    optimizer.attach()
    scalar.grad, zero.grad = torch.tensor([5.0]), torch.ones(2, 2)
    optimizer.step()
    assert scalar.item() == pytest.approx(1.8, rel=1e-5)  # w - lr |w| sign(g)
    assert torch.allclose(zero, torch.full((2, 2), -0.1), rtol=1e-5)
    rows = optimizer.signals().rows()
    assert rows["scalar"]["trust_ratio"] == pytest.approx(2.0, rel=1e-5)
    assert rows["zero"]["trust_ratio"] == 1.0


def test_a_zero_gradient_moves_by_decay_alone() -> None:
    w = nn.Parameter(torch.full((2, 2), 3.0))
    optimizer = Lamb([("w", w)], lr=0.1, weight_decay=0.5)
    optimizer.attach()
    w.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.allclose(w, torch.full((2, 2), 2.7))  # u = wd w, ratio = 1 / wd


def test_a_rule_changes_rate_decay_and_ratio_of_one_tensor() -> None:
    def rule(name: str, shape: tuple[int, ...]) -> Rule:
        odd = name == "wide.weight"
        return Rule(decay=0.5, lr_multiplier=3.0, adapt=False) if odd else vit_rule(name, shape)

    net = make_model()
    usual = decay_groups(net, 0.1)
    wide = net.wide.weight
    usual[0]["params"] = [p for p in usual[0]["params"] if p is not wide]
    lamb = timm.optim.Lamb(usual, lr=2e-2, max_grad_norm=None, foreach=False)
    # without a ratio LAMB's step is AdamW's with the decay inside, at LAMB's eps
    adamw = torch.optim.AdamW([wide], lr=6e-2, weight_decay=0.05, eps=1e-6)

    class Both:
        def step(self) -> None:
            lamb.step()
            adamw.step()

    want = run_steps(Both(), net)  # type: ignore[arg-type]
    assert movement_error(train_ours(Lamb, lr=2e-2, weight_decay=0.1, rule=rule), want) < 2e-6


def test_the_plain_writing_is_the_sign_of_the_gradient_at_first() -> None:
    """The writing of LAMB in tests/optim/plain.py, on one tensor."""
    generator = torch.Generator().manual_seed(5)
    w, g = torch.randn(6, 7, generator=generator), torch.randn(6, 7, generator=generator)
    w1, m1, _ = plain.lamb_step(w, g, 0 * w, 0 * w, 1, lr=0.1, wd=0.2, adapt=True)
    u = g / (g.abs() + 1e-6) + 0.2 * w  # at the first step both moments are the gradient's own
    assert torch.allclose(w1, w - 0.1 * w.norm() / u.norm() * u, atol=1e-6)
    assert torch.allclose(m1, 0.1 * g)
