"""The same training step as a short PyTorch script would write it: the yardstick of `step.py`.

It has neither engine nor chunks, but torch's AdamW, autocast for bf16, DDP on several ranks, and
torch's own choice of matrix products and attention.

Shape suffixes: B = rank batch, P = output of the heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.heads import BatchNormOverRanks
from mocov3_ds.model.vit import build_vit


def build_script_step(
    shape: EncoderShape, dtype: torch.dtype, device: torch.device, x1: Tensor, x2: Tensor
) -> Callable[[], float]:
    """A function that runs one step, two query and two key passes, and returns its loss.

    Args:
        shape: architecture of the encoders.
        dtype: bfloat16 = under autocast; float32 = without.
        device: the device of this rank.
        x1: first views (B, C, H, W) of this rank.
        x2: second views (B, C, H, W) of this rank.
    """
    torch.manual_seed(0)
    base, key = build_encoder(shape).to(device), build_encoder(shape).to(device)
    key.load_state_dict(base.state_dict())
    key.requires_grad_(False)
    trained = [p for p in base.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    half = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    query: nn.Module = TwoViews(base)
    if ranks.world_size() > 1:
        query = nn.parallel.DistributedDataParallel(query)

    def contrastive_loss(q: Tensor, k: Tensor) -> Tensor:
        k = ranks.all_gather_cat(F.normalize(k.float(), dim=1))
        logits = F.normalize(q.float(), dim=1) @ k.T / 0.2
        target = torch.arange(len(q), device=q.device) + ranks.rank() * len(q)
        return 0.4 * F.cross_entropy(logits, target)

    def step() -> float:
        with half:
            q1, q2 = query(x1, x2)
            with torch.no_grad():
                for k, q in zip(key.parameters(), base.parameters(), strict=True):
                    k.mul_(0.99).add_(q, alpha=0.01)
                k1 = key.projector(key.backbone(x1))
                k2 = key.projector(key.backbone(x2))
            loss = contrastive_loss(q1, k2) + contrastive_loss(q2, k1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        return float(ranks.all_reduce_sum(loss.detach())) / ranks.world_size()

    return step


def build_encoder(shape: EncoderShape) -> BaseEncoder:
    """Our encoder's weights in timm's own blocks, with torch's batch norm.

    On several CPU ranks the batch norm is ours, since torch's SyncBatchNorm runs on GPUs only.
    """
    encoder = BaseEncoder(shape)
    backbone = build_vit(shape.vit)
    backbone.load_state_dict(encoder.backbone.state_dict())
    encoder.backbone = backbone
    one_rank = ranks.world_size() == 1
    if one_rank or ranks.this_device().type == "cuda":
        norm = nn.BatchNorm1d if one_rank else nn.SyncBatchNorm
        for head in (encoder.projector, encoder.predictor):
            for name, child in list(head.named_children()):
                if isinstance(child, BatchNormOverRanks):
                    setattr(head, name, norm(len(child.running_mean)))
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear  # as torch computes it on a CPU
    return encoder


class TwoViews(nn.Module):
    """Queries of both views in one forward, as DDP needs it."""

    def __init__(self, base: BaseEncoder) -> None:
        super().__init__()
        self.base = base

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, P) of two views."""
        return self.base(x1), self.base(x2)
