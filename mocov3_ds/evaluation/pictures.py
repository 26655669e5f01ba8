"""What does an encoder see? Pictures of its attention, nearest neighbours and similarities.

    attention.png    where the class token looks in the last block: the mean of the heads, then each
                     (not of networks without a class token and plain attention)
    neighbours.png   held-out images, and the training images whose features are most alike
    similarity.png   cosines between held-out images of one class and of different classes; features
                     that have collapsed stand at 1, features that say nothing show one heap

Shape suffixes: B = images, H = heads, G = side of the patch grid, N = tokens, D = features,
P = probes, K = neighbours, C H W = image.
"""

import io
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.views import layers
from mocov3_ds.encoders.load import build_encoder, read_weights
from mocov3_ds.evaluation.features import make_inputs, split_features
from mocov3_ds.evaluation.flags import LookOptions
from mocov3_ds.evaluation.knn import find_nearest
from mocov3_ds.evaluation.labelled_images import (
    CentreCrop,
    choose_split_urls,
    open_splits,
    read_batches,
)
from mocov3_ds.model.backbones import shape_name

_log = logging.getLogger("mocov3_ds")

TILE = 112
"""Side of an image in a picture, pixels."""
_PROBES = 2000  # held-out images whose cosines are drawn
_GAP, _FRAME, _TEXT = 6, 4, 18
_INK, _PAPER = (30, 30, 30), (255, 255, 255)
RIGHT, WRONG = (34, 139, 94), (214, 69, 65)
_SAME, _OTHER = "#228b5e", "#5b6ee1"
# dark blue over teal to yellow, readable in grey as well
_SCALE = np.array([(13, 22, 60), (26, 93, 122), (54, 158, 116), (172, 205, 66), (253, 236, 92)])


@torch.no_grad()
def class_attention(vit: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """Attention of the class token to the patches in the last block, (B, H, G, G).

    A map sums to less than one, as the class token's attention to itself (and to registers) is left
    out.

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
    q, k = attention.q_norm(q), attention.k_norm(k)
    q_BHD, k_BHND = q[:, 0], k.transpose(1, 2)
    score_BHN = torch.einsum("bhd,bhnd->bhn", q_BHD, k_BHND) * (dim // heads) ** -0.5
    patch_BHN = score_BHN.softmax(2)[:, :, vit.num_prefix_tokens :]
    return patch_BHN.reshape(batch, heads, *vit.patch_embed.grid_size)


def has_class_attention(network: nn.Module) -> bool:
    """Whether `class_attention` can draw it: a ViT of timm with class token and plain attention.

    Args:
        network: backbone of any encoder, timm's or another.
    """
    return (
        isinstance(network, VisionTransformer)
        and network.cls_token is not None
        and isinstance(getattr(network.blocks[-1], "attn", None), Attention)
    )


def draw_pictures(run: Path, out: Path, options: LookOptions) -> list[Path]:
    """Draw the three pictures, or two of a network without attention; returns their paths.

    Args:
        run: run folder, or anything else that holds an encoder.
        out: folder of the pictures, made if it is missing.
        options: encoder, shards and numbers of images.

    Raises:
        ValueError: no encoder, no labelled shards, fewer than one image.
    """
    images, neighbours, bank = options.images, options.neighbours, options.bank
    if min(images, neighbours, bank) < 1:
        raise ValueError(f"images {images}, neighbours {neighbours}, bank {bank}: 1 at least each.")
    weights = read_weights(run, options.which, heads=options.heads)
    encoder, size = build_encoder(weights), weights.backbone.size
    splits = open_splits(*choose_split_urls(weights, options.train, options.val))
    mean, std = weights.settings.mean, weights.settings.std
    extract = partial(
        split_features, encoder, image_size=size, threads=options.threads, mean=mean, std=std
    )
    bank_split = extract(splits.train, limit=bank)
    probes_PD, labels_P, ids_P = extract(splits.val, limit=_PROBES)
    rows = np.linspace(0, len(ids_P) - 1, min(images, len(ids_P))).round().astype(int).tolist()
    shown_BCHW = read_crops(splits.val, ids_P[rows], size, len(mean))
    pictures = {}
    if has_class_attention(encoder):
        assert isinstance(encoder, VisionTransformer)
        attention_BHGG = class_attention(encoder, make_inputs(shown_BCHW, mean=mean, std=std))
        pictures["attention.png"] = attention_picture(shown_BCHW, attention_BHGG)
    else:
        _log.warning(
            "no attention.png: %s has no class token with plain attention to draw.",
            shape_name(weights.backbone),
        )
    pictures |= {
        "neighbours.png": _draw_neighbours(
            splits.train, bank_split, shown_BCHW, probes_PD[rows], labels_P[rows], neighbours
        ),
        "similarity.png": similarity_picture(probes_PD, labels_P),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(out / name)
    return [out / name for name in pictures]


def read_crops(
    manifest: Manifest, ids_B: Tensor, size: int | tuple[int, int], channels: int = 3
) -> Tensor:
    """Centre crops (B, C, H, W) uint8 of the samples with these ids.

    Args:
        manifest: index of the shards that hold the samples.
        ids_B: ids of the samples, int64.
        size: side of a crop, or its height and width, pixels.
        channels: channels of a crop.
    """
    order_B = ids_B.cpu().numpy().astype(np.int64)
    passes = [[position] for position in range(len(order_B))]
    make_crop = CentreCrop(size, channels)
    return torch.cat([x for x, _, _ in read_batches(manifest, make_crop, order_B, passes)])


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
    crops_XCHW = read_crops(
        manifest,
        bank_ids_N[index_BK.flatten()],
        (shown_BCHW.shape[2], shown_BCHW.shape[3]),
        shown_BCHW.shape[1],
    )
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
    from matplotlib.figure import Figure  # takes a while to import

    features_PD = F.normalize(features_PD, dim=1)
    upper = torch.ones(len(labels_P), len(labels_P), dtype=torch.bool).triu(1)
    cosines = (features_PD @ features_PD.T)[upper].cpu().numpy()
    is_same = (labels_P[:, None] == labels_P)[upper].cpu().numpy()
    low = min(float(cosines.min()), 0.0) if len(cosines) else 0.0
    edges = np.linspace(np.floor(low * 5) / 5, 1.0, 81)
    figure = Figure((9, 4.2))
    axes = figure.add_axes((0.1, 0.13, 0.86, 0.74), xlabel="cosine", ylabel="share of pairs")
    axes.set_xlim(float(edges[0]), 1.0)
    axes.spines[["top", "right"]].set_visible(False)
    groups = (("different classes", ~is_same, _OTHER), ("same class", is_same, _SAME))
    for name, rows, colour in groups:
        if count := int(rows.sum()):
            label = f"{name}: mean {cosines[rows].mean():.3f}, {count} pairs"
            shares = np.histogram(cosines[rows], edges)[0] / count
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.5, label=label)
    figure.legend(handles=[*axes.patches], loc="upper center", ncols=2, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer).convert("RGB")


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
    image = layers.as_picture(image_CHW.numpy())
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
