"""Frozen backbone -> features of a split, on all ranks.

Shape suffixes: B = images, C H W = image, D = features, N = samples of this rank, G = of all ranks.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mocov3_ds.data.loader import evaluation_batches
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.views.photometric import ViewSpec, normalise
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


def split_features(
    backbone: nn.Module,
    manifest: Manifest,
    *,
    image_size: int,
    batch: int = 256,
    threads: int = 4,
    limit: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D), labels and ids of the centre crops of a whole split, the same on each rank.

    Args:
        backbone: its device is used.
        manifest: of the split.
        image_size: side of a crop, pixels; the shorter side is resized to 256/224 of it before.
        batch: images per forward pass of a rank.
        threads: decode threads of a rank.
        limit: a fixed subset of this many samples, spread evenly over the set.

    Raises:
        ValueError: fewer samples than ranks, an unreadable sample.
    """
    world, samples = ranks.world_size(), min(limit or manifest.samples, manifest.samples)
    if samples < world:
        raise ValueError(
            f"{manifest.url} gives {samples} samples to {world} ranks; use fewer ranks."
        )
    batches = evaluation_batches(
        manifest,
        image_size=image_size,
        resize=round(image_size * 256 / 224),
        batch=batch,
        rank=ranks.rank(),
        world_size=world,
        threads=threads,
        limit=limit,
    )
    prepare = partial(_prepare, device=_device(backbone), spec=ViewSpec())
    bar = tqdm(
        batches,
        total=math.ceil(math.ceil(samples / world) / batch),
        desc=f"features of {samples} images",
        disable=not ranks.is_first(),
        leave=False,
    )
    return join(*extract(backbone, bar, prepare))


def _prepare(crops_BCHW: Tensor, device: torch.device, spec: ViewSpec) -> Tensor:
    return normalise(crops_BCHW.to(device), spec.mean, spec.std, torch.float32)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
