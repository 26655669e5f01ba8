"""The contrastive loss against the paper's equation written one query at a time."""

import math

import pytest
import torch

from mocov3_ds.model.loss import ContrastiveLoss, contrastive_loss
from tests import reference


def rows(seed: int, n: int = 12, dim: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("key_block", [0, 1, 5, 12, 100])
def test_value_and_gradient_equal_the_equation(key_block: int) -> None:
    q, k = rows(0).requires_grad_(), rows(1)
    ours = contrastive_loss(q, k, 0, 0.2, key_block)
    (gradient,) = torch.autograd.grad(ours, q)
    plain = reference.contrastive_loss(q, k, 0.2)
    (plain_gradient,) = torch.autograd.grad(plain, q)
    # fp64: only the order of sums differs
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-10, atol=1e-12)


def test_first_key_points_at_the_own_rows() -> None:
    q, k = rows(2, n=4), rows(3, n=12)
    whole = torch.cat([rows(4, n=4), q, rows(5, n=4)])
    joined = [reference.contrastive_loss(whole, k, 0.2)]  # mean over 12 queries
    parts = [contrastive_loss(whole[i : i + 4], k, i, 0.2) for i in (0, 4, 8)]
    torch.testing.assert_close(torch.stack(parts).mean(), joined[0])


def test_keys_get_no_gradient_and_low_precision_is_widened() -> None:
    q = rows(0, dtype=torch.bfloat16).requires_grad_()
    k = rows(1, dtype=torch.bfloat16).requires_grad_()
    loss = contrastive_loss(q, k, 0, 0.2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert k.grad is None


# torch's own backward (no blocks) follows its caller
@pytest.mark.parametrize(("key_block", "backward_inside"), [(0, False), (5, False), (5, True)])
def test_autocast_does_not_reach_the_logits(key_block: int, backward_inside: bool) -> None:
    found = []
    for enabled in (False, True):
        q = rows(0, dtype=torch.float32).requires_grad_()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        with autocast:
            loss = contrastive_loss(q, rows(1, dtype=torch.float32), 0, 0.2, key_block)
        with autocast if backward_inside else torch.autocast("cpu", enabled=False):
            (gradient,) = torch.autograd.grad(loss, q)
        found.append((loss, gradient))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_chance_is_the_loss_of_equal_keys() -> None:
    q, loss = rows(0), ContrastiveLoss(0.2)
    k = rows(1, n=1).expand(12, -1)
    both_views = 2 * loss(q, k, 0)
    assert math.isclose(float(both_views), loss.chance_level(12), rel_tol=1e-12)
    assert math.isclose(loss.chance_level(4096), 6.654, abs_tol=1e-3)


@pytest.mark.parametrize("key_block", [0, 5])
def test_the_module_is_the_function_and_has_nothing_to_save(key_block: int) -> None:
    q, k, loss = rows(0, n=4), rows(1), ContrastiveLoss(0.3, key_block)
    assert torch.equal(loss(q, k, 4), contrastive_loss(q, k, 4, 0.3, key_block))
    assert not loss.state_dict() and not list(loss.parameters())
