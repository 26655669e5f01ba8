"""Frozen backbone -> features of a split, on all ranks.

Shape suffixes: B = images, C H W = image, D = features, N = samples of this rank, G = of all ranks.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks

Prepare = Callable[[Tensor], Tensor]
"""uint8 crops (B, C, H, W) on the CPU -> normalised images on the device in the network's dtype"""


@torch.no_grad()
def extract(
    backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor]], prepare: Prepare
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D) fp32, labels (N,) and sample ids (N,) of this rank's batches.

    Ranks may hold different numbers of batches (ZeRO-3 needs each forward on all of them): a rank
    that ran out repeats its last batch and throws the result away.

    Args:
        backbone: left in the mode it was in; runs in eval mode.
        batches: (crops_BCHW uint8, labels_B, ids_B) of this rank, at least one.
        prepare: see `Prepare`.
    """
    was_training = backbone.training
    backbone.eval()
    features, labels, ids = [], [], []
    source = iter(batches)
    crops_BCHW: Tensor | None = None
    while True:
        batch = next(source, None)
        more = ranks.all_reduce_max(torch.tensor(int(batch is not None), device=_device(backbone)))
        if not int(more):
            break
        if batch is not None:
            crops_BCHW = batch[0]
        assert crops_BCHW is not None, "each rank needs one batch at least"
        features_BD = backbone(prepare(crops_BCHW))
        if batch is not None:
            features.append(features_BD.float())
            labels.append(batch[1].to(features_BD.device))
            ids.append(batch[2].to(features_BD.device))
    backbone.train(was_training)
    return torch.cat(features), torch.cat(labels), torch.cat(ids)


def join(features_ND: Tensor, labels_N: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The samples of all ranks sorted by id, the same on each rank (uneven parts allowed)."""
    counts = ranks.gather_objects(len(ids_N))
    longest = max(counts)

    def gather(x: Tensor) -> Tensor:
        padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
        parts = ranks.all_gather_stack(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    features_GD, labels_G, ids_G = gather(features_ND), gather(labels_N), gather(ids_N)
    order = ids_G.argsort()
    return features_GD[order], labels_G[order], ids_G[order]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
