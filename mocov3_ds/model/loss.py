"""The contrastive loss of MoCo v3 (arXiv 2104.02057, Sec. 3), and what another loss must offer.

A loss is a small module: forward on the queries of this rank and the keys of all ranks, the value
of pure chance, and parameters if it has any. Whatever it holds is trained, saved and resumed with
the base encoder (`training.trained_state`).

Shape suffixes: B = queries of this rank, G = keys of all ranks, K = keys of one block,
P = output of the predictor.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mocov3_ds.model.autocast import autocast_off


class PairLoss(nn.Module, ABC):
    """Loss of one view's queries against the other view's keys; a step adds up both directions.

    A learnable number is a parameter of shape (1,): DeepSpeed takes no tensor without a dimension.
    """

    key_block: int = 0
    """keys whose logits exist at once; 0 = those of all ranks"""

    @abstractmethod
    def forward(self, q_BP: Tensor, k_GP: Tensor, first_key: int) -> Tensor:
        """Mean loss of this rank's queries, a scalar.

        Args:
            q_BP: queries of this rank, in any float dtype.
            k_GP: keys of all ranks in rank order, without gradient.
            first_key: row of `k_GP` that holds the key of `q_BP[0]`.
        """

    @abstractmethod
    def chance_level(self, global_batch: int) -> float:
        """Loss of a step, both directions together, whose network cannot tell keys apart.

        Args:
            global_batch: images of all ranks.
        """


class ContrastiveLoss(PairLoss):
    """The paper's loss, see `contrastive_loss`; it has no parameters.

    Args:
        temperature: softmax temperature T, 0.2 in the paper.
        key_block: keys whose logits exist at once; 0 = those of all ranks.
    """

    def __init__(self, temperature: float, key_block: int = 0) -> None:
        super().__init__()
        self.temperature, self.key_block = temperature, key_block

    def forward(self, q_BP: Tensor, k_GP: Tensor, first_key: int) -> Tensor:
        """InfoNCE times 2T, fp32."""
        return contrastive_loss(q_BP, k_GP, first_key, self.temperature, self.key_block)

    def chance_level(self, global_batch: int) -> float:
        """Two views times 2T ln G."""
        return 4 * self.temperature * math.log(global_batch)


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
    with autocast_off(q_BP.device):
        q_BP, k_GP = _unit_rows(q_BP), _unit_rows(k_GP).detach()
        if key_block <= 0 or key_block >= len(k_GP):
            logits_BG = q_BP @ k_GP.T / temperature
            target_B = torch.arange(first_key, first_key + len(q_BP), device=q_BP.device)
            return 2 * temperature * F.cross_entropy(logits_BG, target_B)
        log_sum_B: Tensor = _LogSumExpOverKeys.apply(q_BP, k_GP, temperature, key_block)
        positive_B = (q_BP * k_GP[first_key : first_key + len(q_BP)]).sum(1) / temperature
        return 2 * temperature * (log_sum_B - positive_B).mean()


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
        with autocast_off(q_BP.device):
            for k_KP in torch.split(k_GP, key_block):
                weight_BK = torch.exp(q_BP @ k_KP.T / temperature - log_sum_B[:, None])
                grad_BP.addmm_(weight_BK, k_KP)
        return grad_BP * (grad_B / temperature)[:, None], None, None, None
