"""The trained network: its parts, their names, and what of it is frozen."""

import torch

from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.vit import VitShape

VIT = VitShape(image_size=16, patch_size=8, dim=24, depth=2, heads=3)


def test_a_query_goes_through_backbone_projector_and_predictor() -> None:
    torch.manual_seed(0)
    base = BaseEncoder(EncoderShape(backbone=VIT, hidden=20, out=12)).eval()
    images = torch.randn(5, 3, 16, 16)
    queries = base(images)
    assert queries.shape == (5, 12)
    features = base.backbone(images)
    assert features.shape == (5, 24)
    torch.testing.assert_close(queries, base.predictor(base.projector(features)))
    assert {name.partition(".")[0] for name in base.state_dict()} == {
        "backbone",
        "projector",
        "predictor",
    }


def test_the_patch_projection_and_the_positions_are_frozen() -> None:
    for train_patch_projection in (False, True):
        shape = EncoderShape(
            backbone=VIT, hidden=20, out=12, train_patch_projection=train_patch_projection
        )
        frozen = {n for n, p in BaseEncoder(shape).named_parameters() if not p.requires_grad}
        patches = {f"backbone.patch_embed.proj.{kind}" for kind in ("weight", "bias")}
        assert frozen == {"backbone.pos_embed"} | (set() if train_patch_projection else patches)
