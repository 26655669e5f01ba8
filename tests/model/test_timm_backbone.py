"""Models of timm by name: keywords as they are read, and what is refused with which sentence."""

import dataclasses

import pytest
from timm.layers.drop import DropPath

from mocov3_ds.model.backbones import build_backbone, describe_backbone
from mocov3_ds.model.shapes import EncoderShape, TimmShape
from mocov3_ds.model.timm_backbone import build_timm, read_keywords
from tests.model.test_backbones import timm_shape


def test_keywords_are_json_python_or_text() -> None:
    found = read_keywords(("a=3", "b=[1, 2.5]", "c=true", "d=None", "e=(1, 2)", "f=avg", "g=x=y"))
    assert found == {
        "a": 3, "b": [1, 2.5], "c": True, "d": None, "e": (1, 2), "f": "avg", "g": "x=y"
    }  # fmt: skip


def test_keywords_reach_the_model() -> None:
    network = build_timm(timm_shape("resnet18", "layers=[1,1,1,1]", channels=5))
    weights = dict(network.named_parameters())
    assert weights["conv1.weight"].shape == (64, 5, 7, 7) and "layer1.1.conv1.weight" not in weights


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (timm_shape("resnet5O"), r"timm has no model 'resnet5O' \(did you mean resnet50\?\)"),
        (timm_shape("hf-hub:some/thing"), "timm has no model"),
        (timm_shape("resnet18", "widht=3"), "timm:resnet18 knows no keyword 'widht'"),
        (timm_shape("resnet18", "num_classes=3"), "use nothing: a backbone has no classifier"),
        (timm_shape("resnet18", "pretrained=true"), "use --init"),
        (timm_shape("resnet18", "block"), "not of the form key=value"),
        (timm_shape("resnet18", "stem_width=8", "stem_width=9"), "stem_width is there twice"),
        (timm_shape("resnet18", "global_pool="), r"a tensor of the shape \(2, 512, 1, 1\)"),
        (timm_shape("resnet18", "drop_rate=0.5"), r"has dropout \(ResNet '', rate 0.5\)"),
        (timm_shape("vit_tiny_patch16_224", "pos_drop_rate=0.1"), "has dropout"),
        (timm_shape("mixer_s32_224", "patch_size=8"), "fixes 'patch_size' by its name"),
        (timm_shape("vit_tiny_patch16_224", "depth=1", side=8), "of 3 channels and 8 pixels"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(shape: TimmShape, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        describe_backbone(build_backbone(EncoderShape(backbone=shape)), shape)


def test_a_models_own_rate_of_stochastic_depth_is_not_taken_unasked() -> None:
    """Swin's is 0.1 in timm; what the flag says holds, and for the momentum encoder it is 0."""
    swin = TimmShape(name="swin_tiny_patch4_window7_224", size=(64, 64))
    arguments = ("depths=[1,1]", "embed_dim=24", "num_heads=[2,2]", "window_size=4")
    swin = dataclasses.replace(swin, arguments=arguments)
    for rate, wanted in ((0.0, 0), (0.2, 2)):
        drops = [m for m in build_timm(swin, rate).modules() if isinstance(m, DropPath)]
        assert sum(drop.drop_prob > 0 for drop in drops) == wanted
