"""AdamW without an engine beside torch's, and its update clip beside StableAdamW's formula."""

import pytest
import torch

from mocov3_ds.optim import AdamW
from mocov3_ds.optim.build import build_optimizer
from tests.optim import plain
from tests.optim.one_process import decay_groups, make_model, movement_error, run_steps, train_ours


@pytest.mark.parametrize("backend", ["blocks", "plain"])
def test_adamw_is_torch_adamw(backend: str) -> None:
    net = make_model()
    want = run_steps(torch.optim.AdamW(decay_groups(net, 0.1), lr=0.1, foreach=False), net)
    assert movement_error(train_ours(AdamW, lr=0.1, weight_decay=0.1, backend=backend), want) < 2e-6


def test_update_clip_can_be_switched_between_steps() -> None:
    """Against the same steps by formula: clipped in the middle one only."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(5, 7, generator=generator)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    parameter = torch.nn.Parameter(w.clone())
    optimizer = AdamW([("w", parameter)], lr=0.1, weight_decay=0.1, betas=(0.9, 0.95))
    optimizer.attach()
    for t, clipped in ((1, False), (2, True), (3, False)):
        g = t**3 * torch.randn(5, 7, generator=generator)
        ratio = plain.update_clip(g, v, t, b2=0.95)
        assert ratio < 1 or t == 1
        w, m, v = plain.stable_adamw_step(w, g, m, v, t, lr=0.1, wd=0.1, b2=0.95, clip=clipped)
        optimizer.set_update_clip(clipped)
        parameter.grad = g
        optimizer.step()
        assert float(optimizer.signals().trust_ratio_S) == pytest.approx(ratio if clipped else 1.0)
        assert torch.allclose(parameter.detach(), w, atol=2e-6)


@pytest.mark.parametrize("kind", ["Lamb", "Lars"])
def test_update_clip_is_refused_where_a_ratio_sets_the_length(kind: str) -> None:
    block = {"type": kind, "params": {"lr": 1.0, "update_clip": True}}
    with pytest.raises(ValueError, match="'update_clip' has no effect here; the trust ratio sets"):
        build_optimizer(block, [("w", torch.nn.Parameter(torch.ones(2, 2)))])


def test_update_clip_is_refused_without_a_second_moment() -> None:
    params = {"lr": 1.0, "update_clip": True, "betas": [0.9, 0.0]}
    with pytest.raises(ValueError, match=r"no effect with betas\[1\] = 0"):
        build_optimizer(
            {"type": "AdamW", "params": params}, [("w", torch.nn.Parameter(torch.ones(2, 2)))]
        )
