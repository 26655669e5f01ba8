"""How queries and keys lie on the unit sphere, over the global batch: a collapse shows here first.

All values follow from sums over the samples. The ranks add their sums in one all-reduce of about
P * P numbers, so the result depends on the global batch alone.

Shape suffixes: B = rank batch, P = head output.
"""

import torch
from torch import Tensor

from mocov3_ds.distributed import ranks


@torch.no_grad()
def feature_signals(q_BP: Tensor, k_BP: Tensor) -> dict[str, float]:
    """Measure the spread of the queries and their mean cosines with the keys; all ranks must call.

    Args:
        q_BP: Queries of this rank, of any length.
        k_BP: Keys of the same samples, of any length.

    Returns:
        `features_std`, `features_rank`, `positive` and `negative`, as `signal_file.SCALARS`
        explains them; the same on each rank.
    """
    q_BP, k_BP = (torch.nn.functional.normalize(x.detach().float(), dim=1) for x in (q_BP, k_BP))
    width = q_BP.shape[1]
    local_sums = [
        (q_BP.T @ q_BP).flatten(),
        q_BP.sum(dim=0),
        k_BP.sum(dim=0),
        (q_BP * k_BP).sum().view(1),
    ]
    sums = ranks.all_reduce_sum(torch.cat(local_sums)).double()
    second_PP, q_P, k_P, positive = torch.split(sums, [width * width, width, width, 1])
    count = len(q_BP) * ranks.world_size()
    second_PP = second_PP.view(width, width) / count
    variance_P = (second_PP.diagonal() - (q_P / count).square()).clamp_min(0.0)
    share_P = torch.linalg.eigvalsh(second_PP.cpu()).clamp_min(0.0)
    share_P = share_P / share_P.sum()
    rank = torch.exp(-torch.special.xlogy(share_P, share_P).sum())
    negative_pairs = count * (count - 1)
    negative = float(q_P @ k_P - positive) / negative_pairs if negative_pairs else float("nan")
    return {
        "features_std": float(variance_P.sqrt().mean()),
        "features_rank": float(rank),
        "positive": float(positive) / count,
        "negative": negative,
    }
