"""How extreme a Vision Transformer's attention is: largest logit and entropy of a few blocks.

Attention logits that grow past about 1e3, and entropies that collapse, go before slow divergence
(arXiv 2309.14322, 2303.06296). Fused attention hides both, so queries and keys are caught on their
way into it (after the query-key norm, where there is one) and their logits written out.

Shape suffixes: B = images, H = heads, N = tokens, d = width of a head, C H W = image.
"""

import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mocov3_ds.model.vit import as_written


@torch.no_grad()
def attention_extremes(
    backbone: VisionTransformer, x_BCHW: Tensor, blocks: tuple[int, ...]
) -> dict[int, tuple[float, float]]:
    """Largest |logit| and mean entropy in nats of the attention of some blocks.

    Runs one forward pass without gradient; where ZeRO-3 partitions the weights all ranks must call.

    Args:
        backbone: the encoder, in whatever mode it is.
        x_BCHW: a few images.
        blocks: indices of the blocks.

    Returns:
        block -> (largest |logit|, entropy); entropy is between 0 and ln N.
    """
    caught: dict[tuple[int, str], Tensor] = {}
    handles = []
    for index in blocks:
        for which in ("q_norm", "k_norm"):
            norm = getattr(backbone.blocks[index].attn, which)
            handles.append(norm.register_forward_hook(_keep(caught, (index, which))))
    try:
        with as_written(backbone):
            backbone(x_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    return {index: _extremes(caught[index, "q_norm"], caught[index, "k_norm"]) for index in blocks}


def middle_and_ends(depth: int) -> tuple[int, ...]:
    """First, middle and last block."""
    return tuple(sorted({0, depth // 2, depth - 1}))


def _keep(caught: dict[tuple[int, str], Tensor], place: tuple[int, str]) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        caught[place] = output

    return hook


def _extremes(q_BHNd: Tensor, k_BHNd: Tensor) -> tuple[float, float]:
    logits_BHNN = q_BHNd.float() @ k_BHNd.float().transpose(-2, -1) / math.sqrt(q_BHNd.shape[-1])
    log_p_BHNN = logits_BHNN.log_softmax(dim=-1)
    entropy = -(log_p_BHNN.exp() * log_p_BHNN).sum(dim=-1).mean()
    return float(logits_BHNN.abs().max()), float(entropy)
