"""How extreme a Vision Transformer's attention is: largest logit and entropy of each head.

Attention logits that grow past about 1e3, and entropies that collapse, come before slow divergence
(arXiv 2309.14322, 2303.06296). It is single heads that collapse, so a mean over heads shows it
late.

Shape suffixes: B = images, H = heads, M = tokens that look, N = tokens that are looked at,
d = width of a head.
"""

import math

from torch import Tensor


def attention_of_heads(q_BHMd: Tensor, k_BHNd: Tensor) -> tuple[Tensor, Tensor]:
    """Measure the attention of one block, head by head.

    Args:
        q_BHMd: Queries as the attention takes them, after the query-key norm if there is one.
        k_BHNd: Keys, after that norm as well.

    Returns:
        The largest |logit| of each head (H,), and its mean entropy over images and tokens that
        look (H,), in nats between 0 and ln N; both fp32.
    """
    logits_BHMN = q_BHMd.float() @ k_BHNd.float().transpose(-2, -1) / math.sqrt(q_BHMd.shape[-1])
    log_p_BHMN = logits_BHMN.log_softmax(dim=-1)
    entropy_BHM = -(log_p_BHMN.exp() * log_p_BHMN).sum(dim=-1)
    return logits_BHMN.abs().amax(dim=(0, 2, 3)), entropy_BHM.mean(dim=(0, 2))
