"""What weights say of themselves, and what an export of them lacks."""

from pathlib import Path

import pytest

from mocov3_ds.encoders.weights import Weights
from mocov3_ds.model.shapes import BackboneShape, TimmShape, VitShape


def weights_of(backbone: BackboneShape, **more: str) -> Weights:
    """Weights without tensors."""
    return Weights(
        path=Path("x/file.pth"), kind="a file", role="base", tensors={}, backbone=backbone, width=8,
        **more,
    )  # fmt: skip


def test_sizes_of_a_vit_and_of_another_network() -> None:
    vit = weights_of(
        VitShape(image_size=32, image_width=48, patch_size=8, dim=24, depth=2, heads=3)
    )
    assert vit.is_plain_vit and vit.shape.dim == 24
    assert vit.image_size == 32 and vit.size_for(0) == (32, 48) and vit.size_for(64) == (64, 64)
    assert "24 wide, 2 blocks, 3 heads, patch 8, 32x48 px" in vit.describe()
    other = weights_of(TimmShape(name="resnet18", size=(40, 40)))
    assert not other.is_plain_vit and "timm:resnet18, 8 features, 40 px" in other.describe()
    with pytest.raises(ValueError, match="resnet18"):
        assert other.shape


def test_what_is_left_out_and_guessed_is_said() -> None:
    weights = weights_of(VitShape(), left_out="pooler (2)", guess="12 heads were assumed")
    assert "left out: pooler (2); 12 heads were assumed." in weights.describe()
    assert weights.left_out_of("timm") == "pooler (2)"
    assert weights.title == "file.pth (base encoder)"
