"""How queries and keys lie on the sphere, over the whole global batch: collapse shows here first.

All of it follows from sums over the samples, so the ranks add theirs in one all-reduce of P * P
numbers and the result depends on the global batch alone.

Shape suffixes: B = rank batch, P = head output.
"""

import torch
from torch import Tensor

from mocov3_ds.distributed import ranks


@torch.no_grad()
def feature_signals(q_BP: Tensor, k_BP: Tensor) -> dict[str, float]:
    """Spread of the queries, and mean cosines with their own and the other keys.

    Args:
        q_BP: queries of this rank, any scale.
        k_BP: keys of the same samples.

    Returns:
        `features_std`, `features_rank`, `positive`, `negative` as `signals.SCALARS` tells; all
        ranks must call, each gets the same.
    """
    q_BP, k_BP = (torch.nn.functional.normalize(x.detach().float(), dim=1) for x in (q_BP, k_BP))
    width = q_BP.shape[1]
    parts = [
        (q_BP.T @ q_BP).flatten(),
        q_BP.sum(dim=0),
        k_BP.sum(dim=0),
        (q_BP * k_BP).sum().view(1),
    ]
    sums = ranks.all_reduce_sum(torch.cat(parts)).double()
    second_PP, q_P, k_P, own = torch.split(sums, [width * width, width, width, 1])
    count = len(q_BP) * ranks.world_size()
    second_PP = second_PP.view(width, width) / count
    variance_P = (second_PP.diagonal() - (q_P / count).square()).clamp_min(0.0)
    share_P = torch.linalg.eigvalsh(second_PP.cpu()).clamp_min(0.0)
    share_P = share_P / share_P.sum()
    rank = torch.exp(-torch.special.xlogy(share_P, share_P).sum())
    others = count * (count - 1)
    return {
        "features_std": float(variance_P.sqrt().mean()),
        "features_rank": float(rank),
        "positive": float(own) / count,
        "negative": float(q_P @ k_P - own) / others if others else float("nan"),
    }
