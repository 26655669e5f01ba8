"""Larger patches of the same image: a patch projection and positions resized as they are used.

A projection for patches whose side is `scale` times as long answers an enlarged patch as the stored
one answers the patch itself (FlexiViT's pseudo-inverse, arXiv 2212.08013): with A the linear resize
of a side from p to P pixels and w a filter (p, p), the filter (P, P) is pinv(A^T) w pinv(A^T)^T, so
that <resized w, A x A^T> = <w, x> for every patch x. It is linear in w, so gradients reach the
stored weights; nothing is stored at another size. A position is the mean of the positions that its
patch covers.

Shape suffixes: b = images, C H W = image, D = embedding, N = stored patches, n = patches at the
scale, T = tokens, p = side of a stored patch, s = side of a patch at the scale, R = rows or columns
of stored patches, r = of patches at the scale.
"""

from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mocov3_ds.model.autocast import autocast_off
from mocov3_ds.model.shapes import scaled_grid


class PatchProjection(nn.Conv2d):
    """A patch projection whose filters can be used at another size than they are stored at."""

    scale = 1.0
    """side of a patch in the present pass over that of a stored filter"""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name is nn.Conv2d's)
        """Images (b, C, H, W) -> (b, D, rows, columns) of patches."""
        if self.scale == 1:
            return super().forward(input)
        side = round(self.kernel_size[0] * self.scale)
        weight = resize_filters(self.weight, side)
        return F.conv2d(input, weight, self.bias, stride=side)


class ScalableVit(VisionTransformer):
    """timm's, with positions for larger patches where its `PatchProjection` has a scale."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Tokens (b, T, D) of projected patches (b, n, D): first the others, then the patches."""
        scale = _projection(self).scale
        if scale == 1 or self.pos_embed is None:
            return super()._pos_embed(x)
        embed: PatchEmbed = self.patch_embed
        size, side = embed.img_size, embed.patch_size[0]
        grid, smaller = scaled_grid(size, side), scaled_grid(size, side, scale)
        prefix_tokens = [
            t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None
        ]
        count = self.pos_embed.shape[1] - prod(grid)
        positions = resize_positions(self.pos_embed[:, count:], grid, smaller)
        if self.no_embed_class:
            return torch.cat([*prefix_tokens, x + positions], dim=1)
        positions = torch.cat([self.pos_embed[:, :count], positions], dim=1)
        return torch.cat([*prefix_tokens, x], dim=1) + positions


def _projection(network: VisionTransformer) -> PatchProjection:
    projection: nn.Module = network.patch_embed.proj
    assert isinstance(projection, PatchProjection)
    return projection


def make_scalable(network: nn.Module) -> bool:
    """Let a Vision Transformer be run with larger patches; False where it cannot.

    It must be timm's as timm writes it: square patches by one convolution, positions that are
    added. Names, weights and results without a scale stay.

    Args:
        network: backbone that is changed in place.
    """
    if type(network) is not VisionTransformer or network.dynamic_img_size:
        return False
    embed = network.patch_embed
    projection: nn.Module = embed.proj
    plain = type(embed) is PatchEmbed and type(projection) is nn.Conv2d
    if not plain or not projection.kernel_size == projection.stride == embed.patch_size:
        return False
    if len(set(embed.patch_size)) > 1 or embed.img_size is None:
        return False
    projection.__class__, network.__class__ = PatchProjection, ScalableVit
    return True


def set_scale(network: nn.Module, scale: float) -> None:
    """Use patches whose side is so many times as long from now on.

    Args:
        network: as `make_scalable` changed it.
        scale: one that `shapes.scaled_grid` allows for its images.
    """
    assert isinstance(network, ScalableVit)
    _projection(network).scale = scale


def resize_filters(weight_DCpp: Tensor, side: int) -> Tensor:
    """Filters (D, C, s, s) for larger patches, in the dtype of the stored ones.

    Args:
        weight_DCpp: filters for patches of the stored side p.
        side: side s of the larger patches, pixels.
    """
    exact = torch.promote_types(weight_DCpp.dtype, torch.float32)
    matrix_sp = _filter_matrix(weight_DCpp.shape[3], side).to(weight_DCpp.device, exact)
    with autocast_off(weight_DCpp.device):
        resized = matrix_sp @ weight_DCpp.to(exact) @ matrix_sp.T
    return resized.to(weight_DCpp.dtype)


def resize_positions(
    positions_1ND: Tensor, grid: tuple[int, int], smaller: tuple[int, int]
) -> Tensor:
    """Positions (1, n, D) of larger patches: the mean of what each covers, by its area.

    Args:
        positions_1ND: positions of the stored patches.
        grid: rows and columns of the stored patches.
        smaller: rows and columns of the larger patches.
    """
    exact = torch.promote_types(positions_1ND.dtype, torch.float32)
    rows_rR, columns_rR = (
        _mean_matrix(side, smaller_side).to(positions_1ND.device, exact)
        for side, smaller_side in zip(grid, smaller, strict=True)
    )
    with autocast_off(positions_1ND.device):
        table_DRR = positions_1ND[0].to(exact).T.reshape(-1, *grid)
        resized_Dn = (rows_rR @ table_DRR @ columns_rR.T).flatten(1)
    return resized_Dn.T[None].to(positions_1ND.dtype)


@lru_cache
def _filter_matrix(stored: int, side: int) -> Tensor:
    """pinv(A^T) (s, p) of the linear resize A (s, p) of a side."""
    identity = torch.eye(stored, dtype=torch.float64)[None]  # one signal for each pixel
    resize_ps = F.interpolate(identity, size=side, mode="linear", align_corners=False)[0]
    return torch.linalg.pinv(resize_ps)


@lru_cache
def _mean_matrix(many: int, few: int) -> Tensor:
    """Shares (few, many) of many equal intervals in each of few, which cover the same length."""
    width = many / few
    start = torch.arange(few, dtype=torch.float64)[:, None] * width
    cell_start = torch.arange(many, dtype=torch.float64)[None]
    overlap = torch.minimum(start + width, cell_start + 1) - torch.maximum(start, cell_start)
    return overlap.clamp(min=0) / width
