"""Which networks can work on a part of their patches, and that they are given back as they were."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from mocov3_ds.model.sequence_length import (
    allow_shorter,
    count_patches,
    scalable_patch_size,
    shortened,
)


class OwnWay(VisionTransformer):
    """A network that is no longer timm's in how it makes features."""

    def forward_features(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        return super().forward_features(x, attn_mask)


def build(kind: type[VisionTransformer] = VisionTransformer) -> VisionTransformer:
    torch.manual_seed(0)
    return kind(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0)


def test_names_weights_and_whole_passes_stay() -> None:
    network, plain = build(), build()
    allow_shorter(network)
    assert (count_patches(network), scalable_patch_size(network)) == (16, 4)
    assert [*network.state_dict()] == [*plain.state_dict()]
    x_BCHW = torch.randn(2, 3, 16, 16)
    assert torch.equal(network(x_BCHW), plain(x_BCHW))
    allow_shorter(network)  # a second time changes nothing
    assert torch.equal(network(x_BCHW), plain(x_BCHW))


def test_other_networks_stay_as_they_are() -> None:
    own = build(OwnWay)
    swin = SwinTransformer(
        img_size=16, patch_size=4, embed_dim=8, depths=(1,), num_heads=(1,), window_size=2
    )
    for network in (own, swin, torch.nn.Linear(2, 2)):
        allow_shorter(network)
        assert (count_patches(network), scalable_patch_size(network)) == (0, 0)
    with shortened(own):  # nothing is asked for
        own(torch.randn(1, 3, 16, 16))


def test_after_a_failed_pass_the_sequence_is_whole_again() -> None:
    network = build()
    allow_shorter(network)
    x_BCHW = torch.randn(2, 3, 16, 16)
    whole_BD = network(x_BCHW)
    kept_BK = torch.tensor([[0, 3], [1, 2]])
    with shortened(network, kept_BK, 2.0):
        assert not torch.allclose(network(x_BCHW), whole_BD)
    with pytest.raises(RuntimeError, match="on purpose"), shortened(network, kept_BK, 2.0):
        raise RuntimeError("on purpose")
    assert torch.equal(network(x_BCHW), whole_BD)
