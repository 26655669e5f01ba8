"""Backbones: what is known of them, what is refused, and names that stay the libraries' own."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from mocov3_ds.model.backbones import build_backbone, describe_backbone, shape_name
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.layer_groups import layer_group
from mocov3_ds.model.shapes import EncoderShape, OwnShape, TimmShape, VitShape
from mocov3_ds.model.stochastic_depth import find_branches
from mocov3_ds.model.timm_backbone import read_keywords

CONV = VitShape(image_size=32, patch_size=8, dim=24, depth=2, heads=3, stem="conv")


def timm_shape(name: str, *arguments: str, side: int = 32, channels: int = 3) -> TimmShape:
    return TimmShape(name=name, size=(side, side), channels=channels, arguments=arguments)


def describe(shape: TimmShape | OwnShape | VitShape) -> tuple[nn.Module, object]:
    backbone = build_backbone(EncoderShape(backbone=shape))
    return backbone, describe_backbone(backbone, shape)


def test_a_resnet() -> None:
    backbone, facts = describe(timm_shape("resnet18"))
    assert facts.width == 512 and facts.rows_know_each_other and not facts.unused
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert facts.groups == ("conv1", "bn1", *blocks)
    assert not facts.attention_blocks and not facts.has_tokens
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 512)


def test_resnet_50_has_the_names_of_torchvision() -> None:
    with torch.device("meta"):
        ours = BaseEncoder(
            EncoderShape(
                backbone=TimmShape(name="resnet50"), projector_layers=2, predictor_norm=False
            )
        )
        theirs = torchvision.models.resnet50()
    shapes = {n: t.shape for n, t in ours.backbone.state_dict().items()}
    del theirs.fc
    assert shapes == {n: t.shape for n, t in theirs.state_dict().items()}
    heads = [m for head in (ours.projector, ours.predictor) for m in head]
    sizes = [tuple(m.weight.shape) for m in heads if isinstance(m, nn.Linear)]
    assert sizes == [(4096, 2048), (256, 4096), (4096, 256), (256, 4096)]
    assert len(ours.projector) == 5 and len(ours.predictor) == 4
    assert ours.projector[4].weight is None


@pytest.mark.parametrize(
    ("shape", "width", "first", "last", "batch_norm", "attention"),
    [
        (timm_shape("convnext_atto", "depths=[1,1,1,1]", "dims=[8,16,24,32]"), 32,
         "stem.0", "head", False, 0),
        (timm_shape("vit_tiny_patch16_224", "patch_size=8", "depth=2", "reg_tokens=4"), 192,
         "patch_embed", "norm", False, 2),
        (timm_shape("swin_tiny_patch4_window7_224", "embed_dim=24", "depths=[1,1]",
                    "num_heads=[2,2]", "window_size=4"), 48, "patch_embed", "norm", False, 0),
        (timm_shape("mixer_s32_224", side=64), 512,
         "stem", "norm", False, 0),
        (timm_shape("regnetx_002"), 368, "stem", "s4", True, 0),
    ],
)  # fmt: skip
def test_timm_models(
    shape: TimmShape, width: int, first: str, last: str, batch_norm: bool, attention: int
) -> None:
    backbone, facts = describe(shape)
    assert facts.width == width and (facts.groups[0], facts.groups[-1]) == (first, last)
    assert facts.rows_know_each_other == batch_norm and facts.attention_blocks == attention
    names = [name for name, _ in backbone.named_parameters()]
    assert {layer_group(f"base.backbone.{name}") for name in names} == {*facts.groups}
    kept = {n: tuple(t.shape) for n, t in backbone.state_dict().items()}
    sized = {"img_size": shape.size} if first in ("patch_embed", "stem") and not batch_norm else {}
    given = sized | read_keywords(shape.arguments)
    theirs = timm.create_model(shape.name, num_classes=0, **given)
    assert kept == {n: tuple(t.shape) for n, t in theirs.state_dict().items()}


def test_tensors_that_no_feature_depends_on_stay_as_they_are() -> None:
    shape = timm_shape("vit_tiny_patch16_224", "patch_size=8", "depth=1", "global_pool=avg")
    base = BaseEncoder(EncoderShape(backbone=OwnShape(name="mine", make=Unused, size=(8, 8))))
    assert base.facts.unused == ("spare",)
    assert not base.backbone.get_parameter("spare").requires_grad
    assert base.backbone.get_parameter("layer.weight").requires_grad
    assert describe(shape)[1].unused == ()


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.mean((2, 3)))


def test_stochastic_depth_of_a_convolution_network() -> None:
    backbone = build_backbone(EncoderShape(backbone=timm_shape("resnet18")), drop_path=0.5)
    branches = find_branches(backbone)
    assert len(branches) == 7 and branches[-1].rate == 0.5  # none at rate 0
    x = torch.randn(2, 3, 32, 32)
    for branch in branches:
        branch.factors_b = torch.tensor([0.0, 1.0])
    assert backbone(x).isfinite().all()
    own = EncoderShape(backbone=OwnShape(name="mine", make=Unused, size=(8, 8)))
    with pytest.raises(ValueError, match=r"--model\.drop_path 0\.5 has no effect on mine"):
        build_backbone(own, drop_path=0.5)
    branches[0].factors_b = torch.ones(3)
    with pytest.raises(ValueError, match="holds 2 rows for 3 images"):
        backbone(x)


def test_channels_and_names() -> None:
    assert describe(timm_shape("resnet18", channels=5))[1].width == 512
    assert shape_name(CONV) == "ViT 24 x 2 blocks on convolutions"
    assert shape_name(timm_shape("resnet18")) == "timm:resnet18"
