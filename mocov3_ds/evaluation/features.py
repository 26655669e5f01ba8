"""What features does a backbone give for the images of a split? Computed on all ranks, then joined.

Shape suffixes: B = images of a batch, C H W = image, D = features, N = samples of this rank,
G = samples of all ranks.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mocov3_ds.data.evaluation_batches import evaluation_batches
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.views.photometric import normalise_crops
from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.distributed import ranks

Batch = tuple[Tensor, Tensor, Tensor]
"""images or crops (B, C, H, W), labels (B,) and sample ids (B,)"""
Colour = tuple[float, ...]
InputTransform = Callable[[Tensor], Tensor]
"""uint8 crops (B, C, H, W) on the CPU -> normalised images on the device in the network's dtype"""


@torch.no_grad()
def extract_features(
    backbone: nn.Module, batches: Iterable[Batch], transform: InputTransform
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D) fp32, labels (N,) and sample ids (N,) of this rank's batches.

    Ranks may hold different numbers of batches, although ZeRO-3 needs each forward pass on all of
    them: a rank that has no more batches repeats its last one and throws the result away.

    Args:
        backbone: runs in eval mode and is left in the mode it was in.
        batches: batches of this rank, at least one; crops are uint8.
        transform: turns crops into what the backbone takes, on its device.
    """
    was_training = backbone.training
    backbone.eval()
    device = next(backbone.parameters()).device
    features, labels, ids = [], [], []
    source = iter(batches)
    crops_BCHW: Tensor | None = None
    while True:
        batch = next(source, None)
        has_batch = torch.tensor(int(batch is not None), device=device)
        if not int(ranks.all_reduce_max(has_batch)):
            break
        if batch is not None:
            crops_BCHW = batch[0]
        assert crops_BCHW is not None, "each rank needs one batch at least"
        features_BD = backbone(transform(crops_BCHW))
        if batch is not None:
            features.append(features_BD.float())
            labels.append(batch[1].to(features_BD.device))
            ids.append(batch[2].to(features_BD.device))
    backbone.train(was_training)
    return torch.cat(features), torch.cat(labels), torch.cat(ids)


def join_ranks(
    features_ND: Tensor, labels_N: Tensor, ids_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The samples of all ranks sorted by id, the same on each rank.

    Args:
        features_ND: features of this rank; ranks may hold different numbers of rows.
        labels_N: label of each row, int64.
        ids_N: sample id of each row, int64.

    Returns:
        (G, D) features, (G,) labels and (G,) sample ids.
    """
    counts = ranks.gather_objects(len(ids_N))
    longest = max(counts)

    def gather_rows(x_N: Tensor) -> Tensor:
        padded = torch.cat([x_N, x_N.new_zeros(longest - len(x_N), *x_N.shape[1:])])
        stacked = ranks.all_gather_stack(padded)
        return torch.cat([rows[:count] for rows, count in zip(stacked, counts, strict=True)])

    features_GD, labels_G, ids_G = map(gather_rows, (features_ND, labels_N, ids_N))
    order = ids_G.argsort()
    return features_GD[order], labels_G[order], ids_G[order]


def split_features(
    backbone: nn.Module,
    manifest: Manifest,
    *,
    image_size: int | tuple[int, int],
    batch: int = 256,
    threads: int = 4,
    limit: int | None = None,
    mean: Colour = ViewSpec.mean,
    std: Colour = ViewSpec.std,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the centre crops of a whole split, the same on each rank.

    Args:
        backbone: network in eval mode; the features are computed on its device.
        manifest: index of the shards of the split.
        image_size: side of a crop, or its height and width, pixels; the image is resized until it
            covers 256/224 of them before.
        batch: images per forward pass of a rank.
        threads: number of decoding threads of a rank.
        limit: number of samples in a fixed subset, spread evenly over the set; None = all samples.
        mean: what the backbone's owner subtracts from pixels in [0, 1], for each channel.
        std: what they are divided by after that.

    Returns:
        (G, D) features fp32, (G,) labels and (G,) sample ids, in the order of the ids.

    Raises:
        ValueError: fewer samples than ranks, or an unreadable sample.
    """
    world, samples = ranks.world_size(), min(limit or manifest.samples, manifest.samples)
    if samples < world:
        raise ValueError(
            f"{manifest.url} gives {samples} samples to {world} ranks; use fewer ranks."
        )
    batches = evaluation_batches(
        manifest,
        image_size=image_size,
        channels=len(mean),
        batch=batch,
        rank=ranks.rank(),
        world_size=world,
        threads=threads,
        limit=limit,
    )
    device = next(backbone.parameters()).device
    total = math.ceil(math.ceil(samples / world) / batch)
    batches = show_progress(batches, total, f"features of {samples} images")
    transform = partial(make_inputs, device=device, mean=mean, std=std)
    return join_ranks(*extract_features(backbone, batches, transform))


def show_progress(batches: Iterable[Batch], total: int, title: str) -> Iterator[Batch]:
    """The same batches, `total` of them, with a progress bar on the first rank."""
    hidden = not ranks.is_first()
    return iter(tqdm(batches, title, total, unit="batch", disable=hidden, leave=False))


def make_inputs(
    crops_BCHW: Tensor,
    device: torch.device | str = "cpu",
    mean: Colour = ViewSpec.mean,
    std: Colour = ViewSpec.std,
) -> Tensor:
    """uint8 crops (B, C, H, W) as fp32 network inputs on a device, by default ImageNet's.

    Args:
        crops_BCHW: crops on the CPU.
        device: where the inputs are made.
        mean: what is subtracted from pixels in [0, 1], for each channel.
        std: what they are divided by after that.
    """
    crops_BCHW = crops_BCHW.to(device, non_blocking=True)
    return normalise_crops(crops_BCHW, mean, std, torch.float32)


def compute_tokens(backbone: nn.Module, images_BCHW: Tensor) -> Tensor:
    """All tokens (B, N, D) of a backbone, or all places of its last map, before any pooling.

    Args:
        backbone: a network of timm.
        images_BCHW: normalised images, as the network takes them.
    """
    network: Any = backbone
    x: Tensor = network.forward_features(images_BCHW)
    if x.dim() == 4:  # Swin and its kin put the features last
        is_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        x = x.flatten(1, 2) if is_last else x.flatten(2).transpose(1, 2)
    return x
