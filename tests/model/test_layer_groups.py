"""Which layer group a trained tensor belongs to."""

import pytest

from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.layer_groups import LOSS_GROUP, group_names, layer_group
from mocov3_ds.model.vit import VitShape

SHAPE = VitShape(image_size=16, patch_size=8, dim=24, depth=3, heads=4)


def test_each_tensor_belongs_to_a_group() -> None:
    base = BaseEncoder(EncoderShape(backbone=SHAPE, hidden=8, out=4, train_patch_projection=True))
    found = [layer_group(f"base.{n}") for n, p in base.named_parameters() if p.requires_grad]
    assert list(dict.fromkeys(found)) == ["cls", *[g for g in group_names(3) if g != "cls"]]
    with pytest.raises(ValueError, match=r"'base\.other\.weight' belongs to no layer group"):
        layer_group("base.other.weight")


def test_what_the_loss_trains_is_no_layer() -> None:
    assert layer_group("loss.scale") == LOSS_GROUP
    assert LOSS_GROUP not in group_names(3)
