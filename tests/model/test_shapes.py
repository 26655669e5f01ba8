"""Shapes are plain values: who needs no network needs no torch."""

import subprocess
import sys

import pytest

from mocov3_ds.config.compression import Patches, check_patches
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.shapes import PAPER_SHAPES, VitShape, scaled_grid, snap_scale
from mocov3_ds.recipes import RECIPES


def test_the_papers_shapes() -> None:
    """Table 2; ViT-S has 12 heads."""
    sizes = {name: (s.patch_size, s.dim, s.depth, s.heads) for name, s in PAPER_SHAPES.items()}
    assert sizes == {
        "vit_s16": (16, 384, 12, 12),
        "vit_b16": (16, 768, 12, 12),
        "vit_l16": (16, 1024, 24, 16),
        "vit_h14": (14, 1280, 32, 16),
    }
    assert EncoderShape(backbone=VitShape()).vit == RECIPES["vit_b16"].config.vit


def test_settings_are_read_without_torch() -> None:
    code = (
        "import sys, mocov3_ds.recipes, mocov3_ds.launch.kit, mocov3_ds.planning.flags; "
        "print(sorted({'torch', 'timm', 'numpy', 'deepspeed'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("size", "patch_size"), [((224, 224), 14), ((224, 224), 16), ((16384, 16384), 2), ((48, 36), 6)]
)
def test_scales_are_suggested_as_they_may_be_written(
    size: tuple[int, int], patch_size: int
) -> None:
    with pytest.raises(ValueError, match="possible scales are ") as error:
        scaled_grid(size, patch_size, 1.0123)
    suggested = str(error.value).rpartition("are ")[2].rstrip(".").split(", ")
    assert len(suggested) > 1
    patches = Patches(network="any", image_size=size, count=9, side=patch_size)
    for written in suggested:
        rows, columns = scaled_grid(size, patch_size, float(written))
        exact = snap_scale(patch_size, float(written))
        assert (size[0] / rows, size[1] / columns) == (patch_size * exact,) * 2
        assert f"{exact:g}" == written
        if exact > 1:
            check_patches(f"0:p{written} 0.5:p1", patches)


def test_a_scale_that_is_no_whole_number_of_pixels_stays() -> None:
    assert snap_scale(14, 1.14286) == snap_scale(14, 8 / 7) == 8 / 7
    assert snap_scale(14, 1.143) == 1.143
    with pytest.raises(ValueError, match="do not divide"):
        scaled_grid((224, 224), 14, 1.143)
