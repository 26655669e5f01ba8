"""A timm Vision Transformer made MoCo v3's (arXiv 2104.02057).

What the paper changes: fixed 2-D sin-cos positions, a patch projection that stays at its random
initialisation (Sec. 4.3), its own initialisation, and 12 heads in ViT-S. Weights keep timm's names,
so `timm.create_model(...).load_state_dict(...)` takes them.

Shape suffixes: B = images, C H W = image, N = tokens (class token first), D = embedding,
H = heads, d = width of a head.
"""

import math
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mocov3_ds.model.conv_stem import ConvStem
from mocov3_ds.model.cpu_ops import attend
from mocov3_ds.model.shapes import PAPER_SHAPES as PAPER_SHAPES
from mocov3_ds.model.shapes import Positions as Positions
from mocov3_ds.model.shapes import VitShape as VitShape
from mocov3_ds.model.shapes import write_size
from mocov3_ds.model.sigma_reparam import reparametrise_blocks

_NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def build_vit(
    shape: VitShape,
    *,
    positions: Positions = "sincos",
    train_patch_projection: bool = False,
    drop_path: float = 0.0,
    qk_norm: bool = False,
    layer_scale: float = 0.0,
    sigma_reparam: bool = False,
    norm_eps: float = 1e-6,
    class_token_only: bool = False,
) -> VisionTransformer:
    """Make the backbone; `backbone(x_BCHW)` gives class-token features (B, D) after the last norm.

    Args:
        shape: sizes; both sides of an image must be multiples of `patch_size`, `dim` of 4 and of
            `heads`.
        positions: fixed 2-D sin-cos, or none (ablation of Sec. 6.2).
        train_patch_projection: False keeps the random patch projection, the paper's cure for
            instability; convolutions are always trained.
        drop_path: stochastic depth rate of the last block (0 in the paper's pretraining).
        qk_norm: LayerNorm on the queries and keys of each attention head (arXiv 2302.05442), which
            bounds the attention logits; another architecture than the paper's.
        layer_scale: first value of LayerScale's factors (arXiv 2103.17239); 0 = none, as there.
        sigma_reparam: the linear layers of the blocks are those of `sigma_reparam`.
        norm_eps: epsilon of all norms (1e-6 in the paper's code, 1e-12 in transformers).
        class_token_only: the last block computes the class token alone, which is all that MoCo v3
            uses; `backbone(x)` and its gradients stay the same, the other tokens are not there.

    Raises:
        ValueError: sizes that do not divide.
    """
    _check_shape(shape)
    vit = VisionTransformer(
        img_size=shape.size,
        in_chans=shape.channels,
        patch_size=shape.patch_size,
        embed_layer=ConvStem if shape.stem == "conv" else PatchEmbed,
        embed_dim=shape.dim,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=0,
        global_pool="token",
        pos_embed="learn" if positions == "sincos" else "none",
        drop_path_rate=drop_path,
        qk_norm=qk_norm,
        init_values=layer_scale or None,
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        weight_init="skip",
        block_fn=partial(_build_block, shape.depth - 1) if class_token_only else Block,  # type: ignore[arg-type]
    )
    _initialise_weights(vit)
    if sigma_reparam:
        reparametrise_blocks(vit.blocks)
    if positions == "sincos":
        assert vit.pos_embed is not None
        vit.pos_embed.data.copy_(sincos_positions(shape.grid, shape.dim))
        vit.pos_embed.requires_grad_(False)
    vit.patch_embed.proj.requires_grad_(train_patch_projection or shape.stem == "conv")
    return vit


def _build_block(last: int, *, depth: int, **arguments: Any) -> Block:
    """Block number `depth`, as timm's constructor asks for it."""
    if depth == last:
        return ClassTokenBlock(depth=depth, **{**arguments, "attn_layer": ClassTokenAttention})
    return Block(depth=depth, **arguments)


class ClassTokenBlock(Block):
    """A block whose output is the class token's alone: (B, N, D) -> (B, 1, D).

    Nobody reads the other rows of the last block, and they need most of its time: attention from
    each token, output projection and MLP. One block of depth 12 costs 8 % of the network.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """See the class; timm's masks have no use here."""
        assert attn_mask is None and not is_causal
        token_B1D = x[:, :1] + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return token_B1D + self.drop_path2(self.ls2(self.mlp(self.norm2(token_B1D))))


class ClassTokenAttention(Attention):
    """Attention from the class token to all: (B, N, D) -> (B, 1, D); weights and names are timm's.

    The query of each token is computed with its key and value, in one product of one weight, which
    ZeRO-3 gathers when `qkv` is called.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """See the class."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        values_BH1d = attend_from_one(q[:, :, :1], k, v)
        return self.proj(values_BH1d.transpose(1, 2).reshape(batch, 1, self.attn_dim))


def attend_from_one(q_BH1d: Tensor, k_BHNd: Tensor, v_BHNd: Tensor) -> Tensor:
    """Attention from one token to all, (B, H, 1, d), on a GPU never by cuDNN.

    torch takes cuDNN's kernels for it on compute capability 9.0 (H100, H200), which are those for
    the decoding of text: torch itself keeps away from them on 10.0, and a backward pass of this
    shape has failed there (pytorch#138529). The other kernels are those of other cards.
    """
    if q_BH1d.device.type == "cpu":
        return attend(q_BH1d, k_BHNd, v_BHNd)
    with sdpa_kernel(_NOT_CUDNN):
        return F.scaled_dot_product_attention(q_BH1d, k_BHNd, v_BHNd)


def compile_blocks(vit: VisionTransformer) -> None:
    """Compile the blocks with torch.compile at their first pass; one code serves all of them.

    Raises:
        ValueError: there is no C++ compiler, without which nothing can be compiled.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise ValueError("compiling the blocks needs a C++ compiler: install g++ or set CXX.")
    for block in vit.blocks:
        block.compile()


def has_compiled_blocks(vit: VisionTransformer) -> bool:
    """Whether `compile_blocks` was called for it."""
    return any(block._compiled_call_impl is not None for block in vit.blocks)


def as_written(vit: VisionTransformer) -> AbstractContextManager[Any]:
    """Context in which compiled blocks run line by line, which hooks inside of them need."""
    if has_compiled_blocks(vit):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D positions (1, 1 + rows * columns, dim), fp32; the class token's row is zero.

    The token in row h and column w holds [sin h, cos h, sin w, cos w] over dim / 4 frequencies
    10000^(-i / (dim / 4)). The reference names the axes the other way round (old `ij` meshgrid);
    the numbers are its own, so that published weights mean the same here.

    Args:
        grid: rows and columns of patches.
        dim: width of the embedding, a multiple of 4.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(max(grid), dtype=torch.float64)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)  # (longer side, dim / 2)
    rows, columns = grid
    slow = waves[:rows, None].expand(rows, columns, dim // 2)
    fast = waves[None, :columns].expand(rows, columns, dim // 2)
    tokens = torch.cat([slow, fast], dim=2).reshape(1, rows * columns, dim)
    return torch.cat([torch.zeros(1, 1, dim), tokens.float()], dim=1)


def _check_shape(shape: VitShape) -> None:
    patch = shape.patch_size
    if any(side % patch for side in shape.size):
        height, width = (math.ceil(side / patch) * patch for side in shape.size)
        raise ValueError(
            f"image size {write_size(shape.size)} is not a multiple of the patch size {patch}; "
            f"choose e.g. {write_size((height, width))}."
        )
    if shape.dim % shape.heads or shape.dim % 4:
        raise ValueError(
            f"embedding {shape.dim} must be a multiple of the {shape.heads} heads and of 4 "
            "(two sines and two cosines per frequency)."
        )


def _initialise_weights(vit: VisionTransformer) -> None:
    """Xavier-uniform linears, q, k and v each on their own; zero biases; class token N(0, 1e-6)."""
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            fan_out, fan_in = module.weight.shape
            _fill_uniform(module, fan_in + (fan_out // 3 if name.endswith("qkv") else fan_out))
    projection: nn.Module = vit.patch_embed.proj
    if isinstance(projection, nn.Conv2d):  # convolutions of a stem start as torch has them
        _fill_uniform(projection, projection.weight[0].numel() + projection.out_channels)
    assert vit.cls_token is not None
    nn.init.normal_(vit.cls_token, std=1e-6)


def _fill_uniform(layer: nn.Linear | nn.Conv2d, fans: int) -> None:
    """Xavier-uniform weight for `fans` inputs and outputs together, zero bias."""
    bound = math.sqrt(6.0 / fans)
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
