"""What the blocks of a Vision Transformer hold: attention of each head, and size of activations.

One forward pass over a few images, without gradient, measures all blocks. Fused attention hides
logits and entropies; therefore queries and keys are recorded on their way into it, and its logits
computed from them. Outputs of the layers qkv, proj and fc2 grow before training diverges (arXiv
2410.16682).

Shape suffixes: B = images, H = heads, N = tokens, d = width of a head, C H W = image.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mocov3_ds.model.vit import ClassTokenAttention, as_written
from mocov3_ds.monitoring.attention import attention_of_heads

_LAYERS = {"block_rms": "", "qkv_rms": "attn.qkv", "proj_rms": "attn.proj", "fc2_rms": "mlp.fc2"}
"""signal -> module inside of a block whose output it is the RMS of; other MLPs may have no fc2"""


@torch.no_grad()
def block_signals(backbone: VisionTransformer, x_BCHW: Tensor) -> dict[str, float]:
    """Measure attention and activations of all blocks in one forward pass without gradient.

    Where ZeRO-3 partitions the weights, all ranks must call.

    Args:
        backbone: The Vision Transformer, in training or evaluation mode, whose blocks have plain
            attention.
        x_BCHW: A few images, as the network takes them.

    Returns:
        "block_I/SIGNAL" -> value, for the signals that `signal_file.BLOCK_SIGNALS` explains.
    """
    measured: dict[str, Tensor] = {}
    handles = []
    for index, block in enumerate(backbone.blocks):
        handles += _watch_attention(block.get_submodule("attn"), f"block_{index}", measured)
        for signal, path in _LAYERS.items():
            if _has_module(block, path):
                note = _note_rms(measured, f"block_{index}/{signal}")
                handles.append(block.get_submodule(path).register_forward_hook(note))
    try:
        with as_written(backbone):
            backbone(x_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    values = torch.stack([*measured.values()]).tolist()  # the host waits once
    return dict(zip(measured, values, strict=True))


def _has_module(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def _note_rms(measured: dict[str, Tensor], name: str) -> Callable[..., None]:
    def note(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        measured[name] = output.float().square().mean().sqrt()

    return note


def _watch_attention(attn: nn.Module, group: str, measured: dict[str, Tensor]) -> list[Any]:
    """Hooks that measure the heads of one block, on its norms and behind its attention."""
    recorded: dict[str, Tensor] = {}
    # the last block looks from the class token alone; its other queries nobody reads
    rows = slice(1) if isinstance(attn, ClassTokenAttention) else slice(None)

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            recorded[name] = output

        return hook

    def measure(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        q_BHNd, k_BHNd = recorded.pop("q_norm"), recorded.pop("k_norm")
        logit_H, entropy_H = attention_of_heads(q_BHNd[:, :, rows], k_BHNd)
        measured[f"{group}/max_logit"] = logit_H.max()
        measured[f"{group}/entropy"] = entropy_H.mean()
        measured[f"{group}/entropy_min"] = entropy_H.min()

    handles = [
        getattr(attn, name).register_forward_hook(record(name)) for name in ("q_norm", "k_norm")
    ]
    return [*handles, attn.register_forward_hook(measure)]
