"""How extreme a Vision Transformer's attention is: largest logit and entropy of a few blocks.

Attention logits that grow past about 1e3, and entropies that collapse, come before slow divergence
(arXiv 2309.14322, 2303.06296). Fused attention hides both. Therefore queries and keys are recorded
on their way into it (after the query-key norm, where there is one), and the logits are computed
from them.

Shape suffixes: B = images, H = heads, N = tokens, d = width of a head, C H W = image.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mocov3_ds.model.vit import as_written

_Recorded = dict[tuple[int, str], Tensor]
"""(index of a block, name of a norm) -> its output, (B, H, N, d)"""


@torch.no_grad()
def attention_extremes(
    backbone: VisionTransformer, x_BCHW: Tensor, blocks: tuple[int, ...]
) -> dict[int, tuple[float, float]]:
    """Measure the largest |logit| and the mean entropy of the attention of some blocks.

    Runs one forward pass without gradient. Where ZeRO-3 partitions the weights, all ranks must
    call.

    Args:
        backbone: The Vision Transformer, in training or evaluation mode.
        x_BCHW: A few images, as the network takes them.
        blocks: Indices of the blocks to measure, from 0.

    Returns:
        Index of a block -> (largest |logit|, mean entropy in nats, between 0 and ln N).
    """
    recorded: _Recorded = {}
    handles = []
    for index in blocks:
        for name in ("q_norm", "k_norm"):
            norm = getattr(backbone.blocks[index].attn, name)
            handles.append(norm.register_forward_hook(_record_output(recorded, (index, name))))
    try:
        with as_written(backbone):
            backbone(x_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    return {i: _extremes_of_block(recorded[i, "q_norm"], recorded[i, "k_norm"]) for i in blocks}


def middle_and_ends(depth: int) -> tuple[int, ...]:
    """Return the indices of the first, the middle and the last block.

    Args:
        depth: Number of blocks in the network.
    """
    return tuple(sorted({0, depth // 2, depth - 1}))


def _record_output(recorded: _Recorded, key: tuple[int, str]) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        recorded[key] = output

    return hook


def _extremes_of_block(q_BHNd: Tensor, k_BHNd: Tensor) -> tuple[float, float]:
    logits_BHNN = q_BHNd.float() @ k_BHNd.float().transpose(-2, -1) / math.sqrt(q_BHNd.shape[-1])
    log_p_BHNN = logits_BHNN.log_softmax(dim=-1)
    entropy = -(log_p_BHNN.exp() * log_p_BHNN).sum(dim=-1).mean()
    return float(logits_BHNN.abs().max()), float(entropy)
