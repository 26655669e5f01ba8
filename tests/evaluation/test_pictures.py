"""The pictures show what was computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocov3_ds.encoders.load import load_encoder
from mocov3_ds.evaluation.flags import LookOptions
from mocov3_ds.evaluation.pictures import (
    RIGHT,
    TILE,
    WRONG,
    class_attention,
    colour_map,
    draw_pictures,
    neighbours_picture,
    similarity_picture,
    tile_corner,
)
from tests.evaluation.runs import HEADS, make_run, make_splits


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_what_the_block_uses(tmp_path: Path, qk_norm: bool) -> None:
    vit = load_encoder(make_run(tmp_path / "run", qk_norm=qk_norm))
    if qk_norm:
        vit.blocks[-1].attn.q_norm.weight.data *= 3  # so that its absence would be seen
    images = torch.randn(3, 3, 16, 16)
    attention = class_attention(vit, images)
    assert attention.shape == (3, HEADS, 4, 4)
    # timm's own path with explicit weights, read where they are dropped out (which does nothing)
    block, seen = vit.blocks[-1].attn, []
    block.fused_attn = False
    block.attn_drop.register_forward_hook(lambda _m, _i, out: seen.append(out))
    vit(images)
    torch.testing.assert_close(attention.flatten(2), seen[0][:, :, 0, 1:].detach())
    assert (attention.sum((2, 3)) < 1).all()


def test_three_pictures(tmp_path: Path) -> None:
    train, val = make_splits(tmp_path)
    run = make_run(tmp_path / "run", train=train, val=val)
    options = LookOptions(images=5, neighbours=4, bank=40)
    files = draw_pictures(run, tmp_path / "out", options)
    assert [f.name for f in files] == ["attention.png", "neighbours.png", "similarity.png"]
    sizes = []
    for file in files:
        with Image.open(file) as picture:
            sizes.append(picture.size)
    assert sizes[0] == (6 * (TILE + 6) + 6, 5 * (TILE + 6) + 6 + 18)  # image, mean, 4 heads
    assert sizes[1] == (5 * (TILE + 6) + 6, 5 * (TILE + 6) + 6 + 18)
    before = [f.read_bytes() for f in files]
    files = draw_pictures(run, tmp_path / "out", options)
    assert [f.read_bytes() for f in files] == before
    assert draw_pictures(run, tmp_path / "few", LookOptions(images=99, neighbours=99, bank=3))
    with pytest.raises(ValueError, match="images 0, neighbours 8"):
        draw_pictures(run, tmp_path / "none", LookOptions(images=0))


def test_frames_tell_right_from_wrong() -> None:
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    found = torch.full((2, 2, 3, 16, 16), 255, dtype=torch.uint8)
    same = torch.tensor([[True, False], [False, True]])
    picture = neighbours_picture(images, found, torch.tensor([[0.9, 0.5], [0.8, 0.1]]), same)
    for row in range(2):
        assert picture.getpixel(tuple(x + 50 for x in tile_corner(row, 0))) == (0, 0, 0)
        for column in range(2):
            expected = RIGHT if same[row, column] else WRONG
            assert picture.getpixel(tile_corner(row, column + 1)) == expected


def test_a_map_is_dark_where_low_and_bright_where_high() -> None:
    heat = np.asarray(colour_map(torch.tensor([[0.0, 0.1], [0.2, 0.3]]))).astype(int).sum(2)
    corners = heat[5, 5], heat[5, -5], heat[-5, 5], heat[-5, -5]
    assert list(corners) == sorted(corners)
    assert corners[0] < 100 < 500 < corners[-1]
    flat = np.asarray(colour_map(torch.ones(2, 2)))
    assert (flat == flat[0, 0]).all()


def test_a_collapse_shows() -> None:
    labels = torch.arange(20) % 2
    collapsed = similarity_picture(torch.ones(20, 4), labels)
    spread = similarity_picture(torch.randn(20, 4, generator=torch.manual_seed(0)), labels)

    def bars(picture: Image.Image) -> np.ndarray:
        """Columns of the plot that hold a bar."""
        part = np.asarray(picture)[100:360, 92:862].astype(int)
        return np.flatnonzero((part.sum(2) < 700).any(0))

    assert bars(collapsed).min() > 760  # the last bin alone
    assert bars(spread).min() < 300
