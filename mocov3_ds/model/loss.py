"""The contrastive loss of MoCo v3 (arXiv 2104.02057, Sec. 3), pure functions of tensors.

Shape suffixes: B = queries of this rank, G = keys of all ranks, K = keys of one block,
P = output of the predictor.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def contrastive_loss(
    q_BP: Tensor, k_GP: Tensor, first_key: int, temperature: float, key_block: int = 0
) -> Tensor:
    """InfoNCE of each query against the keys of the whole global batch, times 2T.

    Autocast is switched off inside.

    `2T * mean_i -log softmax(q_i . k_all / T)[first_key + i]` with q and k l2-normalised. The
    factor 2T and the sum over the two views (made by the caller) are the paper's footnote.

    Args:
        q_BP: queries of this rank, any float dtype; the maths runs in fp32 (fp64 stays fp64).
        k_GP: keys of all ranks in rank order, without gradient.
        first_key: row of `k_GP` that holds the key of `q_BP[0]`.
        temperature: T, 0.2 in the paper.
        key_block: keys per block when the (B, G) logits should not exist at once; 0 = all. The
            value is exact for each block size (streamed log-sum-exp).

    Returns:
        scalar, fp32 (fp64 for fp64 input).
    """
    with torch.autocast(q_BP.device.type, enabled=False):
        q_BP, k_GP = _unit_rows(q_BP), _unit_rows(k_GP).detach()
        if key_block <= 0 or key_block >= len(k_GP):
            logits_BG = q_BP @ k_GP.T / temperature
            target_B = torch.arange(first_key, first_key + len(q_BP), device=q_BP.device)
            return 2 * temperature * F.cross_entropy(logits_BG, target_B)
        log_sum_B: Tensor = _LogSumExpOverKeys.apply(q_BP, k_GP, temperature, key_block)
        positive_B = (q_BP * k_GP[first_key : first_key + len(q_BP)]).sum(1) / temperature
        return 2 * temperature * (log_sum_B - positive_B).mean()


def chance_loss(global_batch: int, temperature: float) -> float:
    """Loss of a network that cannot tell keys apart: two views times 2T ln G."""
    return 4 * temperature * math.log(global_batch)


def _unit_rows(x: Tensor) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return F.normalize(x, dim=1)


class _LogSumExpOverKeys(torch.autograd.Function):
    """`logsumexp(q k^T / T)` over all keys while only (B, K) logits exist at a time.

    Keys carry no gradient, so the backward needs one more pass over the keys:
    d/dq = softmax(q k^T / T) k / T.
    """

    @staticmethod
    def forward(ctx: Any, q_BP: Tensor, k_GP: Tensor, temperature: float, key_block: int) -> Tensor:
        log_sum_B = q_BP.new_full((len(q_BP),), -torch.inf)
        for k_KP in torch.split(k_GP, key_block):
            block_B = torch.logsumexp(q_BP @ k_KP.T / temperature, dim=1)
            log_sum_B = torch.logaddexp(log_sum_B, block_B)
        ctx.save_for_backward(q_BP, k_GP, log_sum_B)
        ctx.temperature, ctx.key_block = temperature, key_block
        return log_sum_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None, None]:
        q_BP, k_GP, log_sum_B = ctx.saved_tensors
        temperature, key_block = ctx.temperature, ctx.key_block
        grad_BP = torch.zeros_like(q_BP)
        # whoever calls the backward may have autocast on
        with torch.autocast(q_BP.device.type, enabled=False):
            for k_KP in torch.split(k_GP, key_block):
                weight_BK = torch.exp(q_BP @ k_KP.T / temperature - log_sum_B[:, None])
                grad_BP.addmm_(weight_BK, k_KP)
        return grad_BP * (grad_B / temperature)[:, None], None, None, None
