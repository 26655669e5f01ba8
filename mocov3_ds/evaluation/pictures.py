"""What does an encoder see? Pictures of its attention, nearest neighbours and similarities.

    attention.png    where the class token looks in the last block: the mean of the heads, then each
    neighbours.png   held-out images, and the training images whose features are most alike
    similarity.png   cosines between held-out images of one class and of different classes; features
                     that have collapsed stand at 1, features that say nothing show one heap

Shape suffixes: B = images, H = heads, G = side of the patch grid, N = tokens, D = features,
P = probes, K = neighbours, C H W = image.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mocov3_ds.data.manifest import Manifest
from mocov3_ds.encoders.foreign_names import EncoderRole
from mocov3_ds.encoders.load import build_encoder, read_weights
from mocov3_ds.evaluation.features import make_inputs, split_features
from mocov3_ds.evaluation.knn import find_nearest
from mocov3_ds.evaluation.labelled_images import (
    CentreCrop,
    choose_split_urls,
    open_splits,
    read_batches,
)

TILE = 112
"""Side of an image in a picture, pixels."""
_PROBES = 2000  # held-out images whose cosines are drawn
_GAP, _FRAME, _TEXT = 6, 4, 18
_INK, _PAPER = (30, 30, 30), (255, 255, 255)
RIGHT, WRONG = (34, 139, 94), (214, 69, 65)
_SAME, _OTHER = (34, 139, 94), (91, 110, 225)
# dark blue over teal to yellow, readable in grey as well
_SCALE = np.array([(13, 22, 60), (26, 93, 122), (54, 158, 116), (172, 205, 66), (253, 236, 92)])


@torch.no_grad()
def class_attention(vit: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """Attention of the class token to the patches in the last block, (B, H, G, G).

    A map sums to less than one, as the class token's attention to itself is left out.

    Args:
        vit: encoder in eval mode.
        images_BCHW: network inputs, normalised, fp32.
    """
    inputs: list[Tensor] = []
    attention: Any = vit.blocks[-1].attn
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        vit(images_BCHW)
    finally:
        hook.remove()
    x_BND = inputs[0]
    batch, tokens, dim = x_BND.shape
    heads = attention.num_heads
    q, k, _ = attention.qkv(x_BND).view(batch, tokens, 3, heads, dim // heads).unbind(2)
    q_BHD, k_BHND = q[:, 0], k.transpose(1, 2)
    score_BHN = torch.einsum("bhd,bhnd->bhn", q_BHD, k_BHND) * (dim // heads) ** -0.5
    grid = round((tokens - 1) ** 0.5)
    return score_BHN.softmax(2)[:, :, 1:].reshape(batch, heads, grid, grid)


def draw_pictures(
    run: Path,
    out: Path,
    *,
    role: EncoderRole = "base",
    train: str = "",
    val: str = "",
    images: int = 8,
    neighbours: int = 8,
    bank: int = 10000,
    heads: int = 0,
    threads: int = 4,
) -> list[Path]:
    """Draw the three pictures; returns their paths.

    Args:
        run: run folder, or anything else that holds an encoder.
        out: folder of the pictures, made if it is missing.
        role: base or momentum encoder.
        train: training shards; empty = those of the run.
        val: held-out shards; empty = the run's probe shards.
        images: number of held-out images that are shown, spread evenly over their set.
        neighbours: number of training images beside each of them.
        bank: number of training images that are searched, spread evenly over their set.
        heads: attention heads where the weights cannot tell; 0 = the paper's for their width.
        threads: number of decoding threads.

    Raises:
        ValueError: no encoder, no labelled shards, fewer than one image.
    """
    if min(images, neighbours, bank) < 1:
        raise ValueError(f"images {images}, neighbours {neighbours}, bank {bank}: 1 at least each.")
    weights = read_weights(run, role, heads=heads)
    vit, size = build_encoder(weights), weights.shape.image_size
    splits = open_splits(*choose_split_urls(weights, train, val))
    extract = partial(split_features, vit, image_size=size, threads=threads)
    bank_split = extract(splits.train, limit=bank)
    probes_PD, labels_P, ids_P = extract(splits.val, limit=_PROBES)
    rows = np.linspace(0, len(ids_P) - 1, min(images, len(ids_P))).round().astype(int).tolist()
    shown_BCHW = read_crops(splits.val, ids_P[rows], size)
    pictures = {
        "attention.png": attention_picture(
            shown_BCHW, class_attention(vit, make_inputs(shown_BCHW))
        ),
        "neighbours.png": _draw_neighbours(
            splits.train, bank_split, shown_BCHW, probes_PD[rows], labels_P[rows], neighbours
        ),
        "similarity.png": similarity_picture(probes_PD, labels_P),
    }
    return [_save_picture(picture, out / name) for name, picture in pictures.items()]


def _save_picture(picture: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def read_crops(manifest: Manifest, ids_B: Tensor, size: int) -> Tensor:
    """Centre crops (B, C, H, W) uint8 of the samples with these ids.

    Args:
        manifest: index of the shards that hold the samples.
        ids_B: ids of the samples, int64.
        size: side of a crop, pixels.
    """
    order_B = ids_B.cpu().numpy().astype(np.int64)
    passes = [[position] for position in range(len(order_B))]
    return torch.cat([x for x, _, _ in read_batches(manifest, CentreCrop(size), order_B, passes)])


def _draw_neighbours(
    manifest: Manifest,
    bank: tuple[Tensor, Tensor, Tensor],
    shown_BCHW: Tensor,
    features_BD: Tensor,
    labels_B: Tensor,
    neighbours: int,
) -> Image.Image:
    bank_ND, bank_labels_N, bank_ids_N = bank
    cosine_BK, index_BK = find_nearest(
        F.normalize(bank_ND, dim=1),
        torch.arange(len(bank_ND)),  # row numbers in the place of the labels
        F.normalize(features_BD, dim=1),
        min(neighbours, len(bank_ND)),
    )
    crops_XCHW = read_crops(manifest, bank_ids_N[index_BK.flatten()], shown_BCHW.shape[-1])
    near_BKCHW = crops_XCHW.view(*index_BK.shape, *crops_XCHW.shape[1:])
    same_class_BK = bank_labels_N[index_BK] == labels_B[:, None]
    return neighbours_picture(shown_BCHW, near_BKCHW, cosine_BK, same_class_BK)


def attention_picture(images_BCHW: Tensor, attention_BHGG: Tensor) -> Image.Image:
    """A row for each image: the image, the mean over the heads, and up to eight heads.

    Args:
        images_BCHW: crops to show, uint8.
        attention_BHGG: attention of each head to the patches.
    """
    heads = min(attention_BHGG.shape[1], 8)
    columns = ["image", "mean", *(f"head {h + 1}" for h in range(heads))]
    sheet, _ = start_sheet(len(images_BCHW), columns)
    for row, (image_CHW, attention_HGG) in enumerate(zip(images_BCHW, attention_BHGG, strict=True)):
        tiles = [_tile(image_CHW), colour_map(attention_HGG.mean(0))]
        tiles += [colour_map(attention_HGG[h]) for h in range(heads)]
        for column, tile in enumerate(tiles):
            sheet.paste(tile, tile_corner(row, column))
    return sheet


def neighbours_picture(
    images_BCHW: Tensor, near_BKCHW: Tensor, cosine_BK: Tensor, same_class_BK: Tensor
) -> Image.Image:
    """A row for each image: the image, then its neighbours, framed green where the class is equal.

    Args:
        images_BCHW: crops of held-out images, uint8.
        near_BKCHW: crops of training images, uint8, the most alike first.
        cosine_BK: cosine between the features of a neighbour and of the image.
        same_class_BK: whether a neighbour has the label of the image.
    """
    neighbours = cosine_BK.shape[1]
    columns = ["image", "nearest", *(f"{k + 1}." for k in range(1, neighbours))]
    sheet, draw = start_sheet(len(images_BCHW), columns)
    for row, image_CHW in enumerate(images_BCHW):
        sheet.paste(_tile(image_CHW), tile_corner(row, 0))
        for k in range(neighbours):
            x, y = tile_corner(row, k + 1)
            sheet.paste(_tile(near_BKCHW[row, k]), (x, y))
            colour = RIGHT if same_class_BK[row, k] else WRONG
            draw.rectangle((x - 1, y - 1, x + TILE, y + TILE), outline=colour, width=_FRAME)
            draw.rectangle((x + 3, y + TILE - 19, x + 40, y + TILE - 4), fill=colour)
            label = f"{float(cosine_BK[row, k]):.2f}"
            draw.text((x + 6, y + TILE - 19), label, fill=_PAPER, font=_font(13))
    return sheet


def similarity_picture(features_PD: Tensor, labels_P: Tensor) -> Image.Image:
    """Histograms of the cosines of all pairs, for equal classes and for different classes.

    Args:
        features_PD: features of any length.
        labels_P: class of each, int64.
    """
    features_PD = F.normalize(features_PD, dim=1)
    upper = torch.ones(len(labels_P), len(labels_P), dtype=torch.bool).triu(1)
    cosines = (features_PD @ features_PD.T)[upper].cpu().numpy()
    same_class = (labels_P[:, None] == labels_P)[upper].cpu().numpy()
    groups = [
        _Group("different classes", cosines[~same_class], _OTHER),
        _Group("same class", cosines[same_class], _SAME),
    ]
    low = min(float(cosines.min()), 0.0) if len(cosines) else 0.0
    edges = np.linspace(np.floor(low * 5) / 5, 1.0, 81)
    return _draw_histogram(edges, [group for group in groups if len(group.values)])


class _Group(NamedTuple):
    name: str
    values: NDArray[np.float32]
    colour: tuple[int, int, int]


def _draw_histogram(edges: NDArray[np.float64], groups: Sequence[_Group]) -> Image.Image:
    width, height, margin = 900, 420, 56
    sheet = Image.new("RGB", (width, height), _PAPER)
    shares = [np.histogram(group.values, edges)[0] / len(group.values) for group in groups]
    highest = max((float(share.max()) for share in shares), default=1.0)
    bottom, plot_width, plot_height = height - margin, width - 2 * margin, height - 2 * margin
    step = plot_width / (len(edges) - 1)
    for share, group in zip(shares, groups, strict=True):
        bars = Image.new("RGBA", sheet.size)
        brush = ImageDraw.Draw(bars)
        for number, value in enumerate(share):
            x = margin + number * step
            top = bottom - plot_height * float(value) / highest
            brush.rectangle((x, top, x + step, bottom), fill=(*group.colour, 130))
        sheet.paste(bars, (0, 0), bars)
    draw = ImageDraw.Draw(sheet)
    draw.line((margin, bottom, width - margin, bottom), fill=_INK)
    for mark in np.arange(round(edges[0] * 10), 11, 2) / 10:
        x = margin + (mark - edges[0]) / (1 - edges[0]) * plot_width
        draw.line((x, bottom, x, bottom + 5), fill=_INK)
        draw.text((x, bottom + 8), f"{mark:.1f}", fill=_INK, font=_font(14), anchor="ma")
    draw.text((width / 2, height - 22), "cosine", fill=_INK, font=_font(14), anchor="ma")
    title = f"share of pairs (highest bar {highest:.1%})"
    draw.text((margin, 14), title, fill=_INK, font=_font(14))
    for number, (name, values, colour) in enumerate(groups):
        y = 40 + 22 * number
        draw.rectangle((margin, y, margin + 14, y + 14), fill=colour)
        text = f"{name}: mean {values.mean():.3f}, {len(values)} pairs"
        draw.text((margin + 22, y - 2), text, fill=_INK, font=_font(14))
    return sheet


def start_sheet(rows: int, columns: Sequence[str]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty sheet of tiles with a title above each column, and a brush for it.

    Args:
        rows: number of tiles below each other.
        columns: title of each column.
    """
    side = TILE + _GAP
    size = (len(columns) * side + _GAP, rows * side + _GAP + _TEXT)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        x = _GAP + column * side + TILE / 2
        draw.text((x, 4), title, fill=_INK, font=_font(13), anchor="ma")
    return sheet, draw


def tile_corner(row: int, column: int) -> tuple[int, int]:
    """Position (x, y) of a tile's upper left pixel in a sheet."""
    side = TILE + _GAP
    return _GAP + column * side, _TEXT + _GAP + row * side


def _tile(image_CHW: Tensor) -> Image.Image:
    image = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())
    return image.resize((TILE, TILE), Image.Resampling.BICUBIC)


def colour_map(map_GG: Tensor) -> Image.Image:
    """A tile with the colours of a map: its lowest value is dark and its highest bright."""
    values = map_GG.float().numpy()
    span = float(values.max() - values.min())
    values = (values - values.min()) / span if span > 0 else np.zeros_like(values)
    stops = np.linspace(0, 1, len(_SCALE))
    colours = np.stack([np.interp(values, stops, _SCALE[:, c]) for c in range(3)], axis=-1)
    small = Image.fromarray(colours.round().astype(np.uint8))
    return small.resize((TILE, TILE), Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
