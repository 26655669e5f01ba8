"""The momentum encoder by hand: formula, order, frozen tensors, low-precision copy."""

import pytest
import torch

from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape, chunked_features
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import VitShape

SHAPE = EncoderShape(
    vit=VitShape(image_size=16, patch_size=8, dim=16, depth=2, heads=2), hidden=24, out=8
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
        momentum.begin(m)
        momentum.finish()
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
        momentum.begin(0.99)
        momentum.finish()
    for name, before in frozen.items():
        assert torch.equal(momentum.get_parameter(name), before)
    assert not any(name.startswith("predictor") for name, _ in momentum.named_parameters())


def test_buffers_are_not_averaged() -> None:
    base, momentum = pair()
    base.projector(torch.randn(8, 16) + 3)
    momentum.begin(0.5)
    momentum.finish()
    assert not momentum.projector[1].running_mean.any()


def test_keys_use_the_moved_weights_and_batch_statistics() -> None:
    base, momentum = pair()
    momentum.train()
    images = torch.randn(6, 3, 16, 16)
    jolt(base)
    momentum.begin(0.0)  # become the base encoder
    momentum.finish()
    expected = base.projector(base.backbone(images)).detach()
    torch.testing.assert_close(momentum.keys(images), expected)
    torch.testing.assert_close(momentum.keys(images, chunk=4), expected)
    assert not momentum.keys(images).requires_grad


def test_state_round_trip_and_foreign_state() -> None:
    base, momentum = pair()
    jolt(base)
    momentum.begin(0.3)
    momentum.finish()
    state = {n: t.clone() for n, t in momentum.full_state()}
    _, fresh = pair()
    fresh.load_full_state(state)
    for name, tensor in fresh.full_state():
        assert torch.equal(tensor, state[name])
    state.pop("cls", None)
    state["backbone.other"] = state.pop("backbone.cls_token")
    with pytest.raises(ValueError, match="another model"):
        fresh.load_full_state(state)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_chunked_gradients_equal_the_plain_pass(chunk: int, drop_path: float, kept: int) -> None:
    torch.manual_seed(0)
    shape = EncoderShape(vit=SHAPE.vit, hidden=24, out=8, drop_path=drop_path)
    base = BaseEncoder(shape).double().train()
    images = torch.randn(7, 3, 16, 16, dtype=torch.float64)

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        if checkpointed:
            features = chunked_features(base.backbone, images, chunk, kept=kept)
        else:  # the same pieces, so the same draws, with all activations kept
            pieces = torch.split(images, chunk)
            features = torch.cat([base.backbone(piece) for piece in pieces])
        loss = base.predictor(base.projector(features)).square().mul(torch.arange(8)).sum()
        trained = [p for p in base.parameters() if p.requires_grad]
        return list(torch.autograd.grad(loss, trained))

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)  # fp64


@pytest.mark.parametrize("gradients", [True, False])
def test_a_chunk_leaves_class_tokens_behind_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, gradients: bool
) -> None:
    backbone = BaseEncoder(SHAPE).backbone
    kept: list[torch.Tensor] = []
    join = torch.cat

    def spy(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        kept.extend(tensors)
        return join(tensors, dim)

    monkeypatch.setattr("mocov3_ds.model.base_encoder.torch.cat", spy)
    with torch.set_grad_enabled(gradients):
        chunked_features(backbone, torch.randn(6, 3, 16, 16), chunk=2)
    features = [tensor for tensor in kept if tensor.shape == (2, SHAPE.vit.dim)]
    assert len(features) == 3
    for tensor in features:  # a view would hold the tokens of all patches as well
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
