"""Rules of tensors by name and shape, and what a rate of 0 takes out of the training."""

import pytest
from torch import nn

from mocov3_ds.config.run_config import encoder_shape
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.recipes import parse
from mocov3_ds.training.tensor_rules import freeze_tensors, tensor_rules


def test_rates_of_groups() -> None:
    flags = ["--model.patch_lr", "0.2", "--model.group_lr", "patch_embed=10"]
    rule = tensor_rules(parse([*flags, "--model.group_lr", "block_3=0.5"]).config)
    for name, rate in (
        ("base.backbone.patch_embed.proj.weight", 2.0),
        ("base.backbone.blocks.3.mlp.fc1.weight", 0.5),
        ("base.backbone.blocks.0.mlp.fc1.weight", 1.0),
        ("base.predictor.0.weight", 1.0),
        ("loss.scale", 1.0),
    ):
        assert rule(name, (3, 3)).lr_multiplier == pytest.approx(rate)


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_decay_and_trust_ratio(decay: str) -> None:
    rule = tensor_rules(parse(["--decay", decay]).config)
    for name, shape, matrix in (
        ("base.backbone.blocks.0.mlp.fc1.weight", (8, 4), True),
        ("base.backbone.blocks.0.mlp.fc1.bias", (8,), False),
        ("base.backbone.norm.weight", (8,), False),
        ("base.backbone.cls_token", (1, 1, 8), False),
        ("loss.scale", (1,), False),
    ):
        found = rule(name, shape)
        assert found.adapt == matrix, name
        assert found.decay == (matrix or decay == "all"), name


def test_a_rate_of_zero_freezes_its_group() -> None:
    flags = ["--model.group_lr", "block_1=0", "--model.group_lr", "predictor=0"]
    config = parse(flags).config
    base = BaseEncoder(encoder_shape(config))
    before = trained(base)
    freeze_tensors(base, config)
    gone = before - trained(base)
    assert gone and all(n.startswith(("backbone.blocks.1.", "predictor.")) for n in gone)
    assert not any(n.startswith(("backbone.blocks.1.", "predictor.")) for n in trained(base))


def test_an_unknown_tensor_has_no_rule() -> None:
    rule = tensor_rules(parse([]).config)
    with pytest.raises(ValueError, match=r"'base\.other' belongs to no layer group"):
        rule("base.other", (2, 2))


def test_groups_of_another_backbone() -> None:
    flags = ["--model.backbone", "timm:resnet18", "--views.image_size", "32"]
    config = parse([*flags, "--model.group_lr", "conv1=0"]).config
    base = BaseEncoder(encoder_shape(config))
    before = trained(base)
    freeze_tensors(base, config)
    assert before - trained(base) == {"backbone.conv1.weight"}
    config = parse([*flags, "--model.group_lr", "layer9=0"]).config
    with pytest.raises(ValueError, match=r"names no layer group; groups are conv1, bn1, layer1\.0"):
        freeze_tensors(base, config)


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}
