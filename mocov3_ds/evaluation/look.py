"""Pictures of what an encoder sees: attention, nearest neighbours, similarities.

    attention.png    where the class token looks in the last block: all heads' mean, then each head
    neighbours.png   held-out images and the training images whose features are most alike
    similarity.png   cosines between held-out images of one class and of different classes; features
                     that have collapsed stand at 1, features that say nothing show one heap

Shape suffixes: B = images, H = heads, G = side of the patch grid, N = tokens, D = features,
P = probes, K = neighbours, C H W = image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.views.photometric import ViewSpec, normalise
from mocov3_ds.encoders.load import Which, build, read_weights
from mocov3_ds.evaluation.features import split_features
from mocov3_ds.evaluation.knn import nearest
from mocov3_ds.evaluation.samples import centre_crop, labelled_splits, reader, split_urls

TILE = 112
"""Side of an image in a picture, pixels."""
_GAP, _FRAME, _TEXT = 6, 4, 18
_INK, _PAPER = (30, 30, 30), (255, 255, 255)
_RIGHT, _WRONG = (34, 139, 94), (214, 69, 65)
_SAME, _OTHER = (34, 139, 94), (91, 110, 225)
# dark blue over teal to yellow, readable in grey as well
_SCALE = np.array([(13, 22, 60), (26, 93, 122), (54, 158, 116), (172, 205, 66), (253, 236, 92)])


@torch.no_grad()
def class_attention(vit: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """Attention of the class token to the patches in the last block, (B, H, G, G).

    Rows sum to less than one: what the class token gives to itself is left out.
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
    weight_BHGG: Tensor = score_BHN.softmax(2)[:, :, 1:].reshape(batch, heads, grid, grid)
    return weight_BHGG


def look(
    run: Path,
    out: Path,
    *,
    which: Which = "base",
    train: str = "",
    val: str = "",
    images: int = 8,
    neighbours: int = 8,
    bank: int = 10000,
    heads: int = 0,
    threads: int = 4,
) -> list[Path]:
    """Draw the three pictures.

    Args:
        run: run folder, or anything else that holds an encoder.
        out: folder of the pictures, made if it is not there.
        which: base or momentum encoder.
        train: training shards; empty = those of the run.
        val: held-out shards; empty = the run's probe shards.
        images: held-out images that are shown, spread evenly over their set.
        neighbours: training images beside each.
        bank: training images that are searched, spread evenly over their set.
        heads: attention heads where the weights cannot tell.
        threads: decode threads.

    Returns:
        the files.

    Raises:
        ValueError: no encoder, no labelled shards, fewer than one image.
    """
    if min(images, neighbours, bank) < 1:
        raise ValueError(f"images {images}, neighbours {neighbours}, bank {bank}: 1 at least each.")
    weights = read_weights(run, which, heads=heads)
    vit, size = build(weights), weights.shape.image_size
    splits = labelled_splits(*split_urls(weights, train, val))
    bank_ND, bank_labels_N, bank_ids_N = split_features(
        vit, splits.train, image_size=size, threads=threads, limit=min(bank, splits.train.samples)
    )
    probes_PD, labels_P, ids_P = split_features(
        vit, splits.val, image_size=size, threads=threads, limit=min(2000, splits.val.samples)
    )
    rows = np.linspace(0, len(ids_P) - 1, min(images, len(ids_P))).round().astype(int).tolist()
    shown_BCHW = crops(splits.val, ids_P[rows], size)
    spec = ViewSpec()
    attention_BHGG = class_attention(vit, normalise(shown_BCHW, spec.mean, spec.std, torch.float32))
    bank_ND, probes_PD = F.normalize(bank_ND, dim=1), F.normalize(probes_PD, dim=1)
    count = min(neighbours, len(bank_ND))
    place_N = torch.arange(len(bank_ND))  # carried in the place of the labels
    near_BK, place_BK = nearest(bank_ND, place_N, probes_PD[rows], count)
    found_KCHW = crops(splits.train, bank_ids_N[place_BK.flatten()], size)
    pictures = {
        "attention.png": attention_picture(shown_BCHW, attention_BHGG),
        "neighbours.png": neighbours_picture(
            shown_BCHW,
            found_KCHW.view(len(rows), count, *found_KCHW.shape[1:]),
            near_BK,
            bank_labels_N[place_BK] == labels_P[rows][:, None],
        ),
        "similarity.png": similarity_picture(probes_PD, labels_P),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(out / name)
    return [out / name for name in pictures]


def crops(manifest: Manifest, ids_B: Tensor, size: int) -> Tensor:
    """Centre crops (B, C, H, W) uint8 of the given samples."""
    order_N = ids_B.cpu().numpy().astype(np.int64)
    passes = [[place] for place in range(len(order_N))]
    return torch.cat([x for x, _, _ in reader(manifest, centre_crop(size), order_N, passes)])


def attention_picture(images_BCHW: Tensor, attention_BHGG: Tensor) -> Image.Image:
    """A row for each image: the image, the mean over heads, and up to eight heads."""
    heads = min(attention_BHGG.shape[1], 8)
    columns = ["image", "mean", *(f"head {h + 1}" for h in range(heads))]
    sheet, _ = _sheet(len(images_BCHW), columns)
    for row, (image_CHW, attention_HGG) in enumerate(zip(images_BCHW, attention_BHGG, strict=True)):
        tiles = [_tile(image_CHW), _heat(attention_HGG.mean(0))]
        tiles += [_heat(attention_HGG[h]) for h in range(heads)]
        for column, tile in enumerate(tiles):
            sheet.paste(tile, _corner(row, column))
    return sheet


def neighbours_picture(
    images_BCHW: Tensor, found_BKCHW: Tensor, near_BK: Tensor, same_BK: Tensor
) -> Image.Image:
    """A row for each image: the image, then its neighbours framed by whether the class is the same.

    Args:
        images_BCHW: uint8.
        found_BKCHW: uint8, the most alike first.
        near_BK: cosines.
        same_BK: whether the labels are equal.
    """
    columns = ["image", *("nearest" if k == 0 else f"{k + 1}." for k in range(near_BK.shape[1]))]
    sheet, draw = _sheet(len(images_BCHW), columns)
    for row, image_CHW in enumerate(images_BCHW):
        sheet.paste(_tile(image_CHW), _corner(row, 0))
        for column in range(near_BK.shape[1]):
            left, top = _corner(row, column + 1)
            sheet.paste(_tile(found_BKCHW[row, column]), (left, top))
            colour = _RIGHT if same_BK[row, column] else _WRONG
            box = (left - 1, top - 1, left + TILE, top + TILE)
            draw.rectangle(box, outline=colour, width=_FRAME)
            label = f"{float(near_BK[row, column]):.2f}"
            draw.rectangle((left + 3, top + TILE - 19, left + 40, top + TILE - 4), fill=colour)
            draw.text((left + 6, top + TILE - 19), label, fill=_PAPER, font=_font(13))
    return sheet


def similarity_picture(features_PD: Tensor, labels_P: Tensor) -> Image.Image:
    """Histograms of the cosines of all pairs, same class and different classes apart."""
    features_PD = F.normalize(features_PD, dim=1)
    upper = torch.ones(len(labels_P), len(labels_P), dtype=torch.bool).triu(1)
    cosines = (features_PD @ features_PD.T)[upper].cpu().numpy()
    same = (labels_P[:, None] == labels_P)[upper].cpu().numpy()
    groups = [("different classes", cosines[~same], _OTHER), ("same class", cosines[same], _SAME)]
    low = min(float(cosines.min()), 0.0) if len(cosines) else 0.0
    edges = np.linspace(np.floor(low * 5) / 5, 1.0, 81)
    return _histogram(edges, [group for group in groups if len(group[1])])


def _histogram(
    edges: NDArray[np.float64],
    groups: Sequence[tuple[str, NDArray[np.float32], tuple[int, int, int]]],
) -> Image.Image:
    width, height, margin = 900, 420, 56
    sheet = Image.new("RGB", (width, height), _PAPER)
    shares = [np.histogram(values, edges)[0] / len(values) for _, values, _ in groups]
    highest = max((float(share.max()) for share in shares), default=1.0)
    left, bottom, room = margin, height - margin, height - 2 * margin
    step = (width - 2 * margin) / (len(edges) - 1)
    for share, (_, _, colour) in zip(shares, groups, strict=True):
        bars = Image.new("RGBA", sheet.size)
        brush = ImageDraw.Draw(bars)
        for number, value in enumerate(share):
            x = left + number * step
            top = bottom - room * float(value) / highest
            brush.rectangle((x, top, x + step, bottom), fill=(*colour, 130))
        sheet.paste(bars, (0, 0), bars)
    draw = ImageDraw.Draw(sheet)
    draw.line((left, bottom, width - margin, bottom), fill=_INK)
    for mark in np.arange(round(edges[0] * 10), 11, 2) / 10:
        x = left + (mark - edges[0]) / (1 - edges[0]) * (width - 2 * margin)
        draw.line((x, bottom, x, bottom + 5), fill=_INK)
        draw.text((x, bottom + 8), f"{mark:.1f}", fill=_INK, font=_font(14), anchor="ma")
    draw.text((width / 2, height - 22), "cosine", fill=_INK, font=_font(14), anchor="ma")
    draw.text((left, 14), f"share of pairs (highest bar {highest:.1%})", fill=_INK, font=_font(14))
    for number, (name, values, colour) in enumerate(groups):
        y = 40 + 22 * number
        draw.rectangle((left, y, left + 14, y + 14), fill=colour)
        text = f"{name}: mean {values.mean():.3f}, {len(values)} pairs"
        draw.text((left + 22, y - 2), text, fill=_INK, font=_font(14))
    return sheet


def _sheet(rows: int, columns: Sequence[str]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    side = TILE + _GAP
    size = (len(columns) * side + _GAP, rows * side + _GAP + _TEXT)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        x = _GAP + column * side + TILE / 2
        draw.text((x, 4), name, fill=_INK, font=_font(13), anchor="ma")
    return sheet, draw


def _corner(row: int, column: int) -> tuple[int, int]:
    side = TILE + _GAP
    return _GAP + column * side, _TEXT + _GAP + row * side


def _tile(image_CHW: Tensor) -> Image.Image:
    image = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())
    return image.resize((TILE, TILE), Image.Resampling.BICUBIC)


def _heat(map_GG: Tensor) -> Image.Image:
    """A map in colours, its lowest value dark and its highest bright."""
    values = map_GG.float().numpy()
    span = float(values.max() - values.min())
    values = (values - values.min()) / span if span > 0 else np.zeros_like(values)
    at = np.linspace(0, 1, len(_SCALE))
    colours = np.stack([np.interp(values, at, _SCALE[:, c]) for c in range(3)], axis=-1)
    small = Image.fromarray(colours.round().astype(np.uint8))
    return small.resize((TILE, TILE), Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
