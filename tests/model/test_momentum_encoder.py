"""The momentum encoder by hand: formula, order, frozen tensors, low-precision copy."""

import pytest
import torch

from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import VitShape

SHAPE = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=8, dim=16, depth=2, heads=2), hidden=24, out=8
)


def pair(dtype: torch.dtype = torch.float32) -> tuple[BaseEncoder, MomentumEncoder]:
    torch.manual_seed(0)
    base = BaseEncoder(SHAPE)
    momentum = MomentumEncoder(SHAPE, dtype=dtype)
    momentum.start_from(base.state_dict())
    momentum.follow(base)
    return base, momentum


def jolt(base: BaseEncoder) -> None:
    with torch.no_grad():
        for p in base.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_by_the_formula(dtype: torch.dtype) -> None:
    base, momentum = pair(dtype)
    expected = {n: p.detach().double() for n, p in base.named_parameters()}
    for m in (0.9, 0.99, 0.5):
        jolt(base)
        momentum.begin_move(m)
        momentum.finish_move()
        for n, p in base.named_parameters():
            expected[n] = m * expected[n] + (1 - m) * p.detach().double()
    state = dict(momentum.full_state())
    for name, parameter in momentum.named_parameters():
        assert state[name].dtype == torch.float32
        # fp32 rounding of three averages, whatever the dtype of the forward copy
        torch.testing.assert_close(state[name].double(), expected[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(parameter, state[name].to(dtype))


def test_frozen_tensors_stay_bit_identical_and_the_predictor_has_no_average() -> None:
    base, momentum = pair()
    frozen = {n: p.detach().clone() for n, p in base.named_parameters() if not p.requires_grad}
    for _ in range(20):
        jolt(base)
        momentum.begin_move(0.99)
        momentum.finish_move()
    for name, before in frozen.items():
        assert torch.equal(momentum.get_parameter(name), before)
    assert not any(name.startswith("predictor") for name, _ in momentum.named_parameters())


def test_buffers_are_not_averaged() -> None:
    base, momentum = pair()
    base.projector(torch.randn(8, 16) + 3)
    momentum.begin_move(0.5)
    momentum.finish_move()
    assert not momentum.projector[1].running_mean.any()


def test_keys_use_the_moved_weights_and_batch_statistics() -> None:
    base, momentum = pair()
    momentum.train()
    images = torch.randn(6, 3, 16, 16)
    jolt(base)
    momentum.begin_move(0.0)  # become the base encoder
    momentum.finish_move()
    expected = base.projector(base.backbone(images)).detach()
    torch.testing.assert_close(momentum.make_keys(images).keys_BP, expected)
    torch.testing.assert_close(momentum.make_keys(images, chunk=4).keys_BP, expected)
    assert not momentum.make_keys(images).keys_BP.requires_grad


def test_state_round_trip_and_foreign_state() -> None:
    base, momentum = pair()
    jolt(base)
    momentum.begin_move(0.3)
    momentum.finish_move()
    state = {n: t.clone() for n, t in momentum.full_state()}
    _, fresh = pair()
    fresh.load_full_state(state)
    for name, tensor in fresh.full_state():
        assert torch.equal(tensor, state[name])
    state.pop("cls", None)
    state["backbone.other"] = state.pop("backbone.cls_token")
    with pytest.raises(ValueError, match="another model"):
        fresh.load_full_state(state)


def test_each_view_has_features_of_its_own() -> None:
    _, momentum = pair()
    images = torch.randn(6, 3, 16, 16)
    first, second = momentum.make_keys(images), momentum.make_keys(images.flip(3))
    torch.testing.assert_close(first.features_BD, momentum.backbone(images))
    torch.testing.assert_close(second.features_BD, momentum.backbone(images.flip(3)))
    assert not torch.equal(first.features_BD, second.features_BD)
