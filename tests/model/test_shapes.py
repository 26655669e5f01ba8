"""Shapes are plain values: who needs no network needs no torch."""

import subprocess
import sys

from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.shapes import PAPER_SHAPES, VitShape
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
