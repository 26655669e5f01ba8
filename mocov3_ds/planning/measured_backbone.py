"""What does a backbone cost for which no formula is written? Counted in a pass without numbers.

The network runs forward and backward on torch's meta device, where tensors have shapes and nothing
is computed: what the forward keeps for the backward and the operations of both are counted there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mocov3_ds.model.backbones import shape_name
from mocov3_ds.model.sequence_length import (
    allow_shorter,
    count_patches,
    scalable_patch_size,
    shortened,
)
from mocov3_ds.model.shapes import BackboneShape, EncoderShape, TimmShape, VitShape
from mocov3_ds.model.timm_backbone import build_timm
from mocov3_ds.model.vit import build_vit

_IMAGES = 2  # of the pass; batch norm in train mode needs two


@dataclass(frozen=True)
class TensorSize:
    """A parameter of the base encoder: its name, how many numbers it has, whether it is trained."""

    name: str
    numbers: int
    trained: bool = True


@dataclass(frozen=True, kw_only=True)
class MeasuredBackbone:
    """Counts of a backbone, those of passes for one view of one image."""

    tensors: tuple[TensorSize, ...]
    """its parameters, below `backbone.`, in the order of the module"""
    width: int
    """numbers of an image's features"""
    norm_channels: tuple[int, ...]
    """channels of each batch norm, whose statistics the ranks exchange"""
    kept_numbers: float
    """numbers that the forward keeps for the backward"""
    largest: float
    """numbers of the largest tensor that it keeps"""
    forward_operations: float
    """floating-point operations of matrix products and convolutions, forward"""
    backward_operations: float
    """the same of the backward"""
    patches: int = 0
    """patches of an image, of which a pass may leave some out; 0 = it cannot"""
    patch_size: int = 0
    """side of a patch, pixels, where a pass may use larger ones; 0 = it cannot"""


@lru_cache
def measure_backbone(
    shape: EncoderShape, patches: int = 0, patch_scale: float = 1.0
) -> MeasuredBackbone:
    """Count a backbone that is no Vision Transformer of plain patches.

    Args:
        shape: architecture of the encoder.
        patches: patches of an image that the passes keep; 0 = all.
        patch_scale: side of a patch over that of a whole sequence.

    Raises:
        ValueError: its passes cannot be counted, because it does not run without numbers.
    """
    network = _build(shape)
    height, width = shape.backbone.size
    images_BCHW = torch.zeros(_IMAGES, shape.backbone.channels, height, width, device="meta")
    kept_BK = torch.zeros(_IMAGES, patches, dtype=torch.int64, device="meta") if patches else None
    try:
        tensors_by_storage: dict[int, Tensor] = {}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda x: _note(x, tensors_by_storage), lambda x: x
            ),
            FlopCounterMode(display=False) as forward,
            shortened(network, kept_BK, patch_scale),
        ):
            features_BD = network(images_BCHW)
        width = features_BD.shape[1]
        with FlopCounterMode(display=False) as backward:
            features_BD.sum().backward()
    except Exception as error:  # what a foreign network may raise there has no bounds
        raise ValueError(
            f"the backbone {shape_name(shape.backbone)} cannot be planned: it does not run without "
            f"numbers ({(str(error).strip().splitlines() or [''])[0][:120]})."
        ) from None
    sizes = _list_sizes(network, images_BCHW, tensors_by_storage)
    return MeasuredBackbone(
        tensors=tuple(
            TensorSize(f"backbone.{name}", prod(parameter.shape), parameter.requires_grad)
            for name, parameter in network.named_parameters()
        ),
        width=width,
        norm_channels=tuple(
            module.num_features
            for module in network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ),
        kept_numbers=sum(sizes) / _IMAGES,
        largest=max(sizes, default=0.0) / _IMAGES,
        forward_operations=forward.get_total_flops() / _IMAGES,
        # torch counts a grouped convolution's backward as that of a dense one
        backward_operations=min(backward.get_total_flops(), 2 * forward.get_total_flops())
        / _IMAGES,
        patches=count_patches(network),
        patch_size=scalable_patch_size(network),
    )


def _list_sizes(
    network: nn.Module, images_BCHW: Tensor, tensors_by_storage: Mapping[int, Tensor]
) -> list[float]:
    """Numbers in each storage that is kept for the backward; not those of weights and views."""
    by_themselves = (*network.parameters(), *network.buffers(), images_BCHW)  # counted elsewhere
    counted = {tensor.untyped_storage()._cdata for tensor in by_themselves}
    return [
        tensor.untyped_storage().nbytes() / tensor.element_size()
        for storage, tensor in tensors_by_storage.items()
        if storage not in counted
    ]


def _note(tensor: Tensor, kept: dict[int, Tensor]) -> Tensor:
    """Remember a tensor by its storage, of which views are no copies."""
    kept.setdefault(tensor.untyped_storage()._cdata, tensor)
    return tensor


def _build(shape: EncoderShape) -> nn.Module:
    """The network on the meta device, in train mode, its batch norm that of one rank."""
    backbone: BackboneShape = shape.backbone
    match backbone:
        case VitShape():
            network: nn.Module = build_vit(
                backbone,
                positions=shape.positions,
                train_patch_projection=shape.train_patch_projection,
                qk_norm=shape.qk_norm,
                layer_scale=shape.layer_scale,
                sigma_reparam=shape.sigma_reparam,
                class_token_only=True,
            )
        case TimmShape():
            network = build_timm(backbone)
        case _:
            network = backbone.make()
    allow_shorter(network)
    return network.to("meta").train()
