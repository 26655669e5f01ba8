"""How a rank's batch goes through the backbone in pieces, and how large the pieces should be.

The step is exact at any chunk size, so the size is a question of memory alone. A batch that fits
runs in one pass. Otherwise half of the room goes to the chunk at work and the rest buys back
recomputation: chunks at the end of the batch keep their activations.

Shape suffixes: B = images of a rank's batch, b = images of a chunk, C H W = image, D = features,
G = images of the global batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MEMORY_MARGIN = 0.9
"""share of the free memory that is planned with: allocators fragment"""
LARGEST_CHUNK = 64
"""images that keep a device busy; beyond this, room is better spent on kept chunks"""
LOGITS_BYTES = 512 * 2**20
"""the logits of a view are streamed over blocks of keys where they would need more than this"""
LOGITS_ALIVE = 4
"""fp32 tensors of the size of a view's logits (B, G) that are alive at the peak of the loss: one
kept for each view, two in the making"""
LOGITS_RESERVED = 6
"""the same number as it is reserved before a run: two more than are alive"""


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How a rank's batch goes through the backbone."""

    size: int = 0
    """images per pass; 0 or >= the rank's batch is one pass that keeps its activations"""
    keep: int = 0
    """chunks, counted from the end of the second view, that keep their activations for the backward
    instead of computing them again; the very last chunk always does, which costs no memory"""


def chunked_features(
    backbone: Callable[..., Tensor],
    x_BCHW: Tensor,
    chunk: int = 0,
    keep: int = 0,
    *beside_B: Tensor | None,
    fill: bool = False,
) -> Tensor:
    """Class-token features (B, D) of a whole rank batch, activations of one chunk at a time.

    A ViT body has LayerNorm only, so its rows do not know each other and the backbone may see the
    batch in pieces; projector, batch norm and loss must not. With gradients on, each chunk is a
    non-reentrant checkpoint region: its activations are recomputed when the backward reaches it,
    with the same random draws. Exact at each ZeRO stage, unlike hand-cached feature gradients.

    Args:
        backbone: maps (b, C, H, W), and the same rows of each tensor of `beside_B`, to (b, D) row
            by row.
        x_BCHW: the rank's whole batch of one view.
        chunk: images per piece; 0 or >= B runs one plain pass.
        keep: chunks at the end that keep their activations. The backward starts there, so one of
            them in the last view costs no memory at the peak and saves the forward of a chunk.
        beside_B: what belongs to the images row by row, such as draws; None stays None.
        fill: make all pieces equally large, at most `chunk`, by repeating the last image; what
            comes of the repeated ones is cut off, so that they add exact zeros to the gradient.
            For a compiled backbone, which would be compiled once more for a smaller last piece.
    """

    def class_tokens(*rows: Tensor | None) -> Tensor:
        # the network returns a view of its last layer's output; a copy lets go of the other tokens
        return backbone(*rows).contiguous()

    if chunk <= 0 or chunk >= len(x_BCHW):
        return class_tokens(x_BCHW, *beside_B)
    count = math.ceil(len(x_BCHW) / chunk)
    all_rows = (x_BCHW, *beside_B)
    if fill:
        chunk = math.ceil(len(x_BCHW) / count)
        all_rows = tuple(rows if rows is None else _fill(rows, count * chunk) for rows in all_rows)
    columns = [[None] * count if rows is None else torch.split(rows, chunk) for rows in all_rows]
    pieces = list(zip(*columns, strict=True))
    features = []
    for index, piece in enumerate(pieces):
        if torch.is_grad_enabled() and index < len(pieces) - keep:
            features.append(checkpoint(class_tokens, *piece, use_reentrant=False))
        else:
            features.append(class_tokens(*piece))
        # chunks must not share one autocast cast of a weight: their gradients would be summed in
        # the low precision (error growing with the square root of the number of chunks)
        torch.clear_autocast_cache()
    return torch.cat(features)[: len(x_BCHW)] if fill else torch.cat(features)


def _fill(rows_B: Tensor, count: int) -> Tensor:
    """As many rows, the last one repeated."""
    missing = count - len(rows_B)
    if not missing:
        return rows_B
    return torch.cat([rows_B, rows_B[-1:].expand(missing, *rows_B.shape[1:])])


def count_kept_chunks(chunks: Chunks, batch: int) -> tuple[int, int]:
    """Chunks of view 1 and of view 2 that keep their activations, counted from the end of each.

    Args:
        chunks: how the batch is cut.
        batch: images of the rank's batch.
    """
    chunks_per_view = math.ceil(batch / chunks.size) if chunks.size else 1
    chunk_count = min(chunks.keep + 1, 2 * chunks_per_view)
    return max(chunk_count - chunks_per_view, 0), min(chunk_count, chunks_per_view)


def choose_chunks(images: int, batch: int, busy: int = LARGEST_CHUNK) -> Chunks:
    """Chunks for the memory of a rank.

    Args:
        images: images of one view whose activations fit at once, 1 or more.
        batch: images of the rank's batch.
        busy: images that keep the device busy, beyond which chunks do not grow.
    """
    if images >= 2 * batch:
        return Chunks()
    largest = min(max(images // 2, 1), busy, batch)
    size = _even_size(largest, batch)
    return Chunks(size=size, keep=max(images // size - 1, 0))


def _even_size(largest: int, batch: int) -> int:
    """Images of as many chunks of nearly the same size: a small last one would keep less."""
    return math.ceil(batch / math.ceil(batch / largest))


def shorter_chunks(chunks: Chunks, batch: int, share: float) -> Chunks:
    """Chunks that take the memory of `chunks` where each image takes a share of it.

    They are never smaller. Where no chunk is kept, none will be: the chunk at work gets all room.

    Args:
        chunks: those for whole images, given or as `choose_chunks` chose them.
        batch: images of the rank's batch.
        share: memory of an image over that of a whole one, above 0 and up to 1.
    """
    if not 0 < chunks.size < batch or share >= 1:
        return chunks
    images = int(chunks.size * (chunks.keep + 1) / share)
    busy = int(LARGEST_CHUNK / share)
    if chunks.keep or images >= 2 * batch:
        shorter = choose_chunks(images, batch, busy)
    else:  # a chunk of the whole batch would keep both views
        shorter = Chunks(size=_even_size(min(images, busy, batch - 1), batch))
    if not shorter.size or shorter.size >= chunks.size:
        return shorter
    keep = max(images // chunks.size - 1, 0) if chunks.keep else 0
    return Chunks(size=chunks.size, keep=keep)


def choose_key_block(batch: int, global_batch: int) -> int:
    """Keys per block of the loss: 0 (all at once) where the logits are small enough.

    Args:
        batch: images of the rank's batch, which are the queries of a view.
        global_batch: images of all ranks, which are the keys of a view.
    """
    key_bytes = LOGITS_RESERVED * 4 * batch
    return 0 if key_bytes * global_batch <= LOGITS_BYTES else max(LOGITS_BYTES // key_bytes, 1)


def reserved_logits_bytes(batch: int, global_batch: int) -> int:
    """Memory that the logits of a view are given beside everything else, in blocks or whole.

    Args:
        batch: images of the rank's batch.
        global_batch: images of all ranks.
    """
    return min(LOGITS_RESERVED * 4 * batch * global_batch, 2 * LOGITS_BYTES)
