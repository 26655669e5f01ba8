"""LARS without an engine, whole tensors, beside timm's Lars and a written-out formula."""

import pytest
import timm.optim
import torch

from mocov3_ds.optim import Lars
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
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("always_adapt", [False, True])
def test_lars_is_timm_lars(nesterov: bool, always_adapt: bool, backend: str) -> None:
    net = make_model()
    options = {"lr": 1.0, "trust_coeff": 0.02, "momentum": 0.9, "nesterov": nesterov}
    options["always_adapt"] = always_adapt
    want = run_steps(timm.optim.Lars(decay_groups(net, 0.1), **options), net)
    got = train_ours(Lars, weight_decay=0.1, backend=backend, **options)
    assert movement_error(got, want) < 2e-6


def test_lars_is_the_formula() -> None:
    net = make_model()
    w = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    m = {n: torch.zeros_like(p) for n, p in w.items()}
    for step in make_gradients(net):
        for n, g in step.items():
            rule = vit_rule(n, tuple(g.shape))
            w[n], m[n] = plain.lars_step(
                w[n], g, m[n], lr=4.0, wd=0.1 * rule.decay, adapt=rule.adapt
            )
    assert movement_error(train_ours(Lars, lr=4.0, weight_decay=0.1), w) < 2e-6


@pytest.mark.parametrize("backend", ["blocks", "plain"])
def test_lars_of_the_published_moco_v3_code(backend: str) -> None:
    """Its ratio is that of the direction; a token of three dimensions adapts and decays."""
    net = make_model()
    w = {n: p.detach().double() for n, p in net.named_parameters() if p.requires_grad}
    m = {n: torch.zeros_like(p) for n, p in w.items()}
    assert w["token"].ndim == 3
    for step in make_gradients(net):
        for n, g in step.items():
            d = g.double()
            if g.ndim > 1:
                d = d + 0.1 * w[n]
                d = d * 1e-3 * w[n].norm() / d.norm()
            m[n] = 0.9 * m[n] + d
            w[n] = w[n] - 4.0 * m[n]
    got = train_ours(Lars, lr=4.0, weight_decay=0.1, moco_v3=True, backend=backend)
    assert movement_error(got, w) < 2e-6
    other = train_ours(Lars, lr=4.0, weight_decay=0.1, backend=backend)
    assert movement_error(other, w) > 0.01
