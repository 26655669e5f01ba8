"""What are the features of all images of a set? Computed on all ranks, written by the first.

The images of a block, one batch of each rank, are joined and written before the next, so that
memory does not grow with the set (a parquet file does not; see `feature_file`).

Shape suffixes: B = rank batch, C H W = image, D = features.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.evaluation_batches import evaluation_batches
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.storage.atomic import replace_when_whole
from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.load import build_encoder, read_weights
from mocov3_ds.encoders.owner_settings import OwnerSettings
from mocov3_ds.evaluation.feature_file import FeatureFile, check_format
from mocov3_ds.evaluation.features import Batch, join_ranks, make_inputs
from mocov3_ds.evaluation.flags import EmbedOptions, FeatureType
from mocov3_ds.evaluation.image_folder import ImageFolder
from mocov3_ds.model.shapes import write_size
from mocov3_ds.settings.paths import expand_user


def embed_images(run: Path, images: str, out: Path, options: EmbedOptions) -> str:
    """Write the class-token features of all images of a set; each rank calls it.

    Args:
        run: run folder, or anything else that holds an encoder.
        images: folder or URL of shards, or a folder of images.
        out: file to write, `.parquet`, `.npz` or `.safetensors`; must not exist.
        options: encoder, type and size.

    Returns:
        A line that says what was written and what was left out.

    Raises:
        ValueError: no encoder, no images, `out` exists, an unreadable image, or features that are
            not finite.
    """
    if options.batch < 1 or min(options.image_size, options.threads, options.max_unreadable) < 0:
        raise ValueError("batch must be 1 at least, image_size, threads and max_unreadable 0.")
    ranks.run_on_first(lambda: _check_target(out))
    device = ranks.this_device()
    weights = read_weights(run, options.which, heads=options.heads)
    size = weights.size_for(options.image_size)
    source = _open_source(images)
    encoder = build_encoder(weights, image_size=options.image_size).to(device)
    batches = _read_batches(source, options, size, weights.backbone.channels)
    blocks = math.ceil(_count_images(source) / (options.batch * ranks.world_size()))
    about = {
        "encoder": weights.title,
        "images": images,
        "image_size": write_size(size),
        "classes": source.classes,
        "mean": weights.settings.mean,
        "std": weights.settings.std,
    }
    title = f"features of {_count_images(source)} images"
    with tqdm(
        total=blocks, desc=title, unit="block", disable=not ranks.is_first(), leave=False
    ) as bar:
        rows = _write_blocks(
            encoder,
            batches,
            source,
            weights.settings,
            _Target(out, options.dtype, weights.width, about),
            bar,
        )
    left_out = _count_images(source) - rows
    return (
        f"{out}: {rows} rows of {weights.width} features ({options.dtype}) of {weights.title}; "
        f"{left_out} unreadable images"
        + (f" and {source.left_out} other files" if isinstance(source, ImageFolder) else "")
        + " left out"
    )


@dataclass(frozen=True)
class _Target:
    path: Path
    kind: FeatureType
    width: int
    about: dict[str, Any]


def _check_target(out: Path) -> None:
    check_format(out.suffix)
    if out.exists():
        raise ValueError(f"{out} exists; give another --out, or remove it.")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {out.absolute().parent} for --out.")


def _open_source(images: str) -> Manifest | ImageFolder:
    """Shards where there is a manifest, else the images of a folder of this machine."""
    folder = expand_user(images)
    if "://" in images or (folder / manifests.NAME).is_file() or folder.name == manifests.NAME:
        return manifests.load(images)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {images} with images or shards.")
    return ImageFolder(folder)


def _count_images(source: Manifest | ImageFolder) -> int:
    return len(source.paths) if isinstance(source, ImageFolder) else source.samples


def _name_images(source: Manifest | ImageFolder, ids: Sequence[int]) -> list[str]:
    """Path of each image in its folder, or shard and number in the shard."""
    if isinstance(source, ImageFolder):
        return [source.paths[number] for number in ids]
    shards = np.searchsorted(source.first_S, np.asarray(ids), side="right") - 1
    return [
        f"{source.shards[shard].name}/{number - int(source.first_S[shard])}"
        for number, shard in zip(ids, shards.tolist(), strict=True)
    ]


def _read_batches(
    source: Manifest | ImageFolder, options: EmbedOptions, size: tuple[int, int], channels: int
) -> Iterator[Batch]:
    rank, world = ranks.rank(), ranks.world_size()
    if isinstance(source, ImageFolder):
        return source.read_batches(
            image_size=size,
            channels=channels,
            batch=options.batch,
            rank=rank,
            world_size=world,
            threads=options.threads,
            max_unreadable=options.max_unreadable,
        )
    return evaluation_batches(
        source,
        image_size=size,
        channels=channels,
        batch=options.batch,
        rank=rank,
        world_size=world,
        threads=options.threads,
        bad_sample_budget=options.max_unreadable,
    )


def _write_blocks(
    encoder: nn.Module,
    batches: Iterator[Batch],
    source: Manifest | ImageFolder,
    settings: OwnerSettings,
    target: _Target,
    bar: Any,
) -> int:
    """Compute, join and write block by block until no rank has images left; number of rows."""
    device = ranks.this_device()
    none = torch.zeros(0, target.width, device=device)
    no_ids = torch.zeros(0, dtype=torch.int64, device=device)
    rows = 0
    writing = replace_when_whole(target.path) if ranks.is_first() else nullcontext(target.path)
    with writing as temporary:
        file = FeatureFile(temporary, target.path.suffix, target.kind, target.about)
        while True:
            batch, problem = _next_batch(batches)
            states = ranks.gather_objects((batch is not None, problem))
            if problems := [text for _, text in states if text]:
                raise ValueError(problems[0])
            if not any(has_batch for has_batch, _ in states):
                break
            features_BD, labels_B, ids_B = none, no_ids, no_ids
            if batch is not None:
                with torch.no_grad():
                    inputs_BCHW = make_inputs(batch[0], device, settings.mean, settings.std)
                    features_BD = encoder(inputs_BCHW).float()
                labels_B, ids_B = batch[1].to(device), batch[2].to(device)
            block = join_ranks(features_BD, labels_B, ids_B)
            rows += len(block[2])
            ranks.run_on_first(lambda block=block: _append_block(file, source, *block))  # type: ignore[misc]
            bar.update()
        ranks.run_on_first(file.finish)
    return rows


def _append_block(
    file: FeatureFile,
    source: Manifest | ImageFolder,
    features_ND: torch.Tensor,
    labels_N: torch.Tensor,
    ids_N: torch.Tensor,
) -> None:
    file.append(ids_N, _name_images(source, ids_N.tolist()), labels_N, features_ND)


def _next_batch(batches: Iterator[Batch]) -> tuple[Batch | None, str]:
    """This rank's next batch (None = no more), or what is wrong with it, for all ranks to raise."""
    try:
        return next(batches, None), ""
    except (ValueError, OSError) as error:
        return None, f"{error}".replace("--data.max_bad_samples", "--max_unreadable")
