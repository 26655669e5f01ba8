"""Sigma-reparametrisation: against its formula under autograd, and step by step."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mocov3_ds.model.sigma_reparam import (
    SigmaLinear,
    bake_weights,
    move_all_vectors,
    move_vectors,
    sigma_layers,
)
from mocov3_ds.model.vit import VitShape, build_vit

TINY = VitShape(image_size=16, patch_size=8, dim=24, depth=2, heads=3)


def make_layer(dtype: torch.dtype = torch.float64) -> SigmaLinear:
    torch.manual_seed(0)
    layer = SigmaLinear(7, 5).to(dtype)
    move_vectors(layer, 50)
    with torch.no_grad():
        layer.gain.fill_(0.7)
    return layer


def test_sigma_is_the_largest_singular_value() -> None:
    layer = make_layer()
    x = torch.eye(7, dtype=torch.float64)
    matrix = (layer(x) - layer.bias).detach()
    # u and v are kept in fp32, whose error counts twice over: 1e-7 squared
    assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(0.7, rel=1e-6)


def test_outputs_and_gradients_are_the_formulas() -> None:
    layer = make_layer()
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, 5, dtype=torch.float64)
    (layer(x) * y).sum().backward()
    assert layer.gain.grad is not None
    ours = [layer.weight.grad, layer.bias.grad, layer.gain.grad, x.grad]
    weight, bias, gain, again = (
        t.detach().clone().requires_grad_() for t in (layer.weight, layer.bias, layer.gain, x)
    )
    sigma = layer.u.double() @ weight @ layer.v.double()
    out = again @ (gain / sigma * weight).T + bias
    torch.testing.assert_close(layer(x), out)
    (out * y).sum().backward()
    for got, want in zip(ours, (weight.grad, bias.grad, gain.grad, again.grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_low_precision_casts_weights_alone() -> None:
    layer = make_layer(torch.float32)
    before = layer.u.clone()
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.u, before)
    x = torch.randn(64, 7)
    reference = make_layer(torch.float32)
    torch.testing.assert_close(layer(x.bfloat16()).float(), reference(x), atol=0.03, rtol=0.03)


def test_one_iteration_a_step_follows_a_moving_weight() -> None:
    layer = make_layer()
    torch.manual_seed(1)
    way = torch.randn(5, 7, dtype=torch.float64)
    for _ in range(60):
        with torch.no_grad():
            layer.weight += 0.01 * way
        move_all_vectors(layer)
    weight = layer.weight.detach()
    sigma = float(layer.u.double() @ weight @ layer.v.double())
    assert sigma == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-3)


def test_a_vit_has_four_such_layers_a_block_and_bakes_into_an_ordinary_one() -> None:
    torch.manual_seed(0)
    vit = build_vit(TINY, sigma_reparam=True, class_token_only=True).eval()
    assert len([*sigma_layers(vit)]) == 4 * TINY.depth
    for layer in sigma_layers(vit):
        weight = layer.weight.detach()
        sigma = float(layer.u @ weight @ layer.v)
        assert sigma == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=0.02)
        with torch.no_grad():
            layer.gain.uniform_(0.5, 2.0)
    plain = build_vit(TINY, class_token_only=True).eval()
    plain.load_state_dict(bake_weights(vit.state_dict()))
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(plain(x), vit(x), rtol=1e-5, atol=1e-6)
    assert bake_weights(plain.state_dict()).keys() == plain.state_dict().keys()


def test_a_copy_on_meta_costs_nothing() -> None:
    vit: Any = build_vit(TINY, sigma_reparam=True)
    meta: nn.Module = copy.deepcopy(vit).to("meta")
    features: Tensor = meta(torch.empty(2, 3, 16, 16, device="meta"))
    assert features.is_meta and features.shape == (2, 24)
