"""Backbones, and all that the rest of the program may know of one, whatever network it is.

A backbone is a module that maps images (B, C, H, W) to features (B, D). `build_backbone` makes it
from its shape and `describe_backbone` says what else counts; code outside of this room asks these
facts and never for patches, class tokens or blocks:

    shape = encoder_shape(config)                      # shapes.EncoderShape
    backbone = build_backbone(shape)                   # also BaseEncoder(shape).backbone
    facts = describe_backbone(backbone, shape.backbone)   # also BaseEncoder(shape).facts
    facts.width, facts.groups, facts.rows_know_each_other, ...

A backbone whose rows know each other (batch norm) takes a rank's batch in one pass; its batch norm
is that of all ranks (`body_norm`). Names of tensors stay those of the network's own library.

Shape suffixes: B = images, C H W = image, D = features.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mocov3_ds.model import vit
from mocov3_ds.model.body_norm import BodyBatchNorm, spread_batch_norms
from mocov3_ds.model.fp8 import compute_in_fp8
from mocov3_ds.model.layer_groups import order_groups, vit_groups
from mocov3_ds.model.sequence_length import allow_shorter, count_patches, scalable_patch_size
from mocov3_ds.model.shapes import BackboneShape, EncoderShape, TimmShape, VitShape, write_size
from mocov3_ds.model.stochastic_depth import find_branches, replace_drop_paths
from mocov3_ds.model.timm_backbone import build_timm


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """What counts of a backbone outside of it."""

    width: int
    """numbers D of an image's features"""
    groups: tuple[str, ...]
    """layer groups from input to output, see `layer_groups.layer_group`; the first is the first
    layer"""
    rows_know_each_other: bool
    """whether an image's features depend on the other images (batch norm): no chunks then"""
    attention_blocks: int = 0
    """blocks whose attention can be measured, `backbone.blocks[i].attn`; 0 where there are none"""
    has_tokens: bool = False
    """whether `backbone.forward_features` gives tokens (B, N, D) and not a map (B, D, H, W)"""
    unused: tuple[str, ...] = ()
    """names of tensors that no feature depends on; they stay as they are"""
    patches: int = 0
    """patches of an image, of which a pass may leave some out; 0 where it cannot"""
    patch_size: int = 0
    """side of a patch, pixels, where a pass may use larger ones; 0 where it cannot"""


def build_backbone(shape: EncoderShape, drop_path: float = 0.0) -> nn.Module:
    """Backbone of the base or the momentum encoder, with batch norm over all ranks.

    Args:
        shape: architecture of the encoder.
        drop_path: stochastic depth rate of the last block.

    Raises:
        ValueError: it cannot be built, or would not be exact; the sentence says why.
    """
    match shape.backbone:
        case VitShape() as ours:
            backbone: nn.Module = vit.build_vit(
                ours,
                positions=shape.positions,
                train_patch_projection=shape.train_patch_projection,
                drop_path=drop_path,
                qk_norm=shape.qk_norm,
                layer_scale=shape.layer_scale,
                sigma_reparam=shape.sigma_reparam,
                class_token_only=True,
            )
            if shape.fp8:
                compute_in_fp8(backbone.get_submodule("blocks"))
        case TimmShape() as named:
            backbone = build_timm(named, drop_path)
        case own:
            backbone = own.make()
    replace_drop_paths(backbone)
    if drop_path and not isinstance(shape.backbone, VitShape) and not find_branches(backbone):
        raise ValueError(
            f"--model.drop_path {drop_path:g} has no effect on {shape_name(shape.backbone)}, which "
            "has no branch of timm's DropPath."
        )
    spread_batch_norms(backbone)
    allow_shorter(backbone)
    return backbone


def describe_backbone(backbone: nn.Module, shape: BackboneShape) -> BackboneFacts:
    """The facts of a backbone; one that is no ViT of ours is run once, without memory or time.

    Args:
        backbone: as `build_backbone` made it.
        shape: what it was built from.

    Raises:
        ValueError: it does not take the images, or gives something else than features (B, D).
    """
    batch_norm = any(isinstance(module, BodyBatchNorm) for module in backbone.modules())
    if isinstance(shape, VitShape):
        return BackboneFacts(
            width=shape.dim,
            groups=vit_groups(shape.depth),
            rows_know_each_other=batch_norm,
            attention_blocks=shape.depth,
            has_tokens=True,
            patches=count_patches(backbone),
            patch_size=scalable_patch_size(backbone),
        )
    facts = BackboneFacts(
        width=0,
        groups=order_groups([name for name, _ in backbone.named_parameters()]),
        rows_know_each_other=batch_norm,
        attention_blocks=_count_attention_blocks(backbone),
        patches=count_patches(backbone),
        patch_size=scalable_patch_size(backbone),
    )
    return _probe(backbone, shape, facts)


def _count_attention_blocks(backbone: nn.Module) -> int:
    """Blocks of a timm ViT whose attention is the plain one."""
    if not isinstance(backbone, VisionTransformer):
        return 0
    plain = all(isinstance(getattr(block, "attn", None), Attention) for block in backbone.blocks)
    return len(backbone.blocks) if plain else 0


def _probe(backbone: nn.Module, shape: BackboneShape, facts: BackboneFacts) -> BackboneFacts:
    """Add what a pass over two images of zeros shows.

    It runs on the meta device, where nothing is computed, or in earnest where that cannot be.
    """
    name = shape_name(shape)
    try:
        probed = _run_once(_on_meta(backbone), shape, "meta")
    except Exception:  # what a foreign network may raise there has no bounds
        try:
            probed = _run_once(backbone, shape, next(backbone.parameters()).device)
        except Exception as error:
            raise ValueError(
                f"{name} does not take images of {shape.channels} channels and "
                f"{write_size(shape.size)} pixels: {str(error).strip() or type(error).__name__}"
            ) from None
    features_BD, tokens, unused = probed
    if not isinstance(features_BD, Tensor) or features_BD.dim() != 2 or len(features_BD) != 2:
        output = (
            f"a tensor of the shape {tuple(features_BD.shape)}"
            if isinstance(features_BD, Tensor)
            else f"a {type(features_BD).__name__}"
        )
        raise ValueError(
            f"{name} gives {output} for two images and not one row of features for each: it has no "
            "pooling here (--model.timm global_pool=avg), or is no classification network."
        )
    return replace(
        facts,
        width=features_BD.shape[1],
        has_tokens=isinstance(tokens, Tensor) and tokens.dim() == 3,
        unused=unused,
    )


def _on_meta(backbone: nn.Module) -> nn.Module:
    """A copy of a network with weights that have shapes alone."""
    memo: dict[int, object] = {}
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        empty = tensor.detach().to("meta")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty) if is_weight else empty
    return copy.deepcopy(backbone, memo)


def _run_once(
    network: nn.Module, shape: BackboneShape, device: torch.device | str
) -> tuple[object, object, tuple[str, ...]]:
    """Features, what comes before the pooling, and names of tensors that no feature depends on."""
    tensors = dict(network.named_parameters())
    images_BCHW = torch.zeros(2, shape.channels, *shape.size, device=device)
    with evaluating(network), torch.device(device), torch.enable_grad():
        features_BD: object = network(images_BCHW)
        make_tokens = getattr(network, "forward_features", None)
        tokens = make_tokens(images_BCHW) if callable(make_tokens) else None
    if not isinstance(features_BD, Tensor) or not features_BD.requires_grad:
        return features_BD, tokens, ()
    gradients = torch.autograd.grad(features_BD.sum(), [*tensors.values()], allow_unused=True)
    unused = [n for n, gradient in zip(tensors, gradients, strict=True) if gradient is None]
    return features_BD, tokens, tuple(unused)


def recompute_blocks(backbone: nn.Module, on: bool = True) -> None:
    """Let the backbone recompute each of its blocks in the backward pass, or keep activations.

    Raises:
        ValueError: the network cannot do that.
    """
    switch: object = getattr(backbone, "set_grad_checkpointing", None)
    try:
        assert callable(switch)
        switch(on)
    except (AssertionError, NotImplementedError):
        raise ValueError(
            f"the backbone, a {type(backbone).__name__}, cannot recompute its blocks; leave out "
            "--recompute_blocks."
        ) from None


def compile_blocks(backbone: nn.Module) -> None:
    """Compile the blocks of a Vision Transformer with torch.compile at their first pass.

    Raises:
        ValueError: it is another network, or there is no C++ compiler.
    """
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(
            f"--compile_blocks is for the blocks of Vision Transformers, and the backbone is a "
            f"{type(backbone).__name__}; leave it out."
        )
    vit.compile_blocks(backbone)


def has_compiled_blocks(backbone: nn.Module) -> bool:
    """Whether `compile_blocks` was called for it."""
    return isinstance(backbone, VisionTransformer) and vit.has_compiled_blocks(backbone)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within, batch norm takes its running statistics: nothing is exchanged between ranks."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def shape_name(shape: BackboneShape) -> str:
    """A backbone in a few words: its name, or the sizes of a Vision Transformer."""
    match shape:
        case VitShape():
            stem = " on convolutions" if shape.stem == "conv" else ""
            return f"ViT {shape.dim} x {shape.depth} blocks{stem}"
        case TimmShape():
            return f"timm:{shape.name}"
        case own:
            return own.name
