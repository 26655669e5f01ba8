"""Token dropout: a Vision Transformer that computes some of an image's patches alone.

Which ones is a hash of (seed, step, sample, view): the same however the batch is cut into chunks
and ranks, in a second pass that recomputes activations, and after a resume. All images of a pass
keep the same number, and what stands before the patches (class token, registers) stays. Positions
are added before, so a patch knows its place.

Shape suffixes: V = the two views, B = images of a rank's batch, b = images of a pass, N = patches,
K = patches that are kept, T = tokens (class token first), D = features of a token.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mocov3_ds.data.splitmix import hash_counters, hash_words

_STREAM = 0x746F6B656E732B03
"""sets these draws apart from those of views, order and depth, which have the same seed"""


class TokenDropout(nn.Module):
    """Lets the kept patches through; all of them where none are named.

    Args:
        before: tokens before the patches, which always stay.
    """

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before = before
        self.kept_bK: Tensor | None = None
        """places of the patches that each image of the present pass keeps"""

    def forward(self, x_bTD: Tensor) -> Tensor:
        """Tokens (b, T, D) -> (b, tokens before the patches + K, D)."""
        if self.kept_bK is None:
            return x_bTD
        return keep_tokens(x_bTD, self.kept_bK, self.before)


def keep_tokens(x_bTD: Tensor, kept_bK: Tensor, before: int) -> Tensor:
    """The first `before` tokens of each image, then those of its patches that are named.

    Args:
        x_bTD: tokens of each image.
        kept_bK: places of its patches, int64, counted from 0 behind the first `before` tokens.
        before: tokens that stay whatever is named.
    """
    images, tokens, _ = x_bTD.shape
    first = torch.arange(before, device=kept_bK.device).expand(images, before)
    places = torch.cat([first, kept_bK + before], dim=1)
    rows = places + tokens * torch.arange(images, device=kept_bK.device)[:, None]
    # whole rows at a time: several times faster than `gather`, which moves number by number
    return x_bTD.flatten(0, 1).index_select(0, rows.flatten()).view(images, places.shape[1], -1)


def draw_patch_order(
    patches: int, sample_ids_B: NDArray[np.int64], *, seed: int, step: int
) -> Tensor:
    """For each view of each image its patches in a drawn order, (V, B, N), int64.

    Args:
        patches: patches N of an image.
        sample_ids_B: number of each image in the manifest.
        seed: seed of the run.
        step: steps done before this one.
    """
    images_B = hash_words(hash_counters(seed, _STREAM, step), sample_ids_B)
    places_VN = np.arange(2 * patches, dtype=np.uint64).reshape(2, 1, patches)
    words_VBN = hash_words(0, images_B[None, :, None] + places_VN)
    # the hash is one-to-one, so no two words of an image are equal and any kind of sort agrees
    return torch.from_numpy(np.argsort(words_VBN, axis=2))


def keep_first(order_VBN: Tensor, kept: int) -> Tensor | None:
    """The first patches of a drawn order, in the order of the image; None = all of them.

    Args:
        order_VBN: as `draw_patch_order` gave it.
        kept: number of patches to keep.
    """
    if kept == order_VBN.shape[2]:
        return None
    return torch.from_numpy(np.sort(order_VBN[:, :, :kept].numpy(), axis=2))
