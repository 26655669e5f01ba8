"""Labelled samples for training a classifier on an encoder: which, in what order, as what pixels.

    labelled_splits -> plan (ids of each step, exact on any world size) -> reader -> batches

An epoch's order and each sample's random crop follow from the seed alone, so they are the same on
any number of ranks and workers and after a resume. Samples are read one by one, by range: worker
processes hide the latency, more of them where the shards lie in object storage.

Shape suffixes: B = images of a batch, C H W = image, N = samples.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data import storage
from mocov3_ds.data.fetch import Unreadable, fetch_one, key_of
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.views import decode, photometric
from mocov3_ds.data.views.decode import UnreadableImage
from mocov3_ds.data.views.photometric import ViewSpec
from mocov3_ds.encoders.load import Weights

Ids = NDArray[np.int64]
Pixels = Callable[[bytes, int, int, int], Tensor]
"""(bytes, sample id, epoch, place in the epoch) -> one image, (C, H, W)"""


class UnreadableSample(ValueError):  # noqa: N818 - it says what the sample is
    """A sample cannot be read; only the rank that met it knows, so that rank must say so."""


@dataclass(frozen=True)
class Splits:
    """Labelled shards to learn from and to be judged by."""

    train: Manifest
    val: Manifest

    @property
    def classes(self) -> int:
        """Classes of the training shards."""
        return len(self.train.classes) or 1 + int(self.train.index_N["label"].max())


def split_urls(weights: Weights, train: str, val: str) -> tuple[str, str]:
    """The shards that were asked for, else those of the run.

    Raises:
        ValueError: one of them is not known.
    """
    config = weights.config
    if config is not None and not config.data.shards and not train and not val:
        folder = weights.path.parent / "sample-images"
        return str(folder / "train"), str(folder / "test")
    if config is not None:
        train, val = train or config.data.shards, val or config.data.probe_shards
    for url, name in ((train, "training"), (val, "held-out")):
        if not url:
            raise ValueError(
                f"{weights.path} names no {name} shards; give --train FOLDER and --val FOLDER "
                "(made with python -m data_prep shard IMAGES FOLDER)."
            )
    return train, val


def labelled_splits(train: str, val: str) -> Splits:
    """Open both splits.

    Raises:
        ValueError: no shards there, samples without labels, or labels that do not mean the same.
    """
    splits = Splits(manifests.load(train), manifests.load(val))
    for manifest in (splits.train, splits.val):
        if not manifest.labelled:
            missing = int((manifest.index_N["label"] < 0).sum())
            raise ValueError(
                f"{missing} of {manifest.samples} samples in {manifest.url} have no label, so "
                "nothing can be classified by them; shard them from class folders."
            )
    ours, theirs = splits.train.classes, splits.val.classes
    if ours and theirs and ours != theirs:
        if len(ours) != len(theirs):
            raise ValueError(
                f"{train} has {len(ours)} classes and {val} has {len(theirs)}; both must come "
                "from the same set of class folders."
            )
        label = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise ValueError(
            f"class {label} is {ours[label]!r} in {train} and {theirs[label]!r} in {val}; both "
            "must come from the same set of class folders."
        )
    highest = max(int(m.index_N["label"].max()) for m in (splits.train, splits.val))
    if highest >= splits.classes:
        raise ValueError(
            f"label {highest} is beyond the {splits.classes} classes of {train}; the two sets do "
            "not belong together."
        )
    return splits


def epoch_order(samples: int, seed: int, epoch: int, repeats: int = 1) -> Ids:
    """Ids of an epoch, (N,); with `repeats`, copies of fewer samples stand side by side.

    Repeated augmentation (Hoffer et al., arXiv 1901.09335) as DeiT uses it: an epoch keeps its
    length and holds N / repeats samples, so neighbouring ranks see other crops of the same image.
    """
    drawn_N = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(samples)
    return np.repeat(drawn_N, repeats)[:samples].astype(np.int64)


def plan(
    order_N: Ids, *, batch: int, micro_batch: int, rank: int, world_size: int, drop_last: bool
) -> list[list[list[int]]]:
    """A rank's places in `order_N`, by step and by pass through the network.

    Step t takes places t * batch to (t + 1) * batch; rank r of W takes each W-th of them. The last
    step is short (and perhaps empty on some ranks) or dropped; no place comes twice.
    """
    steps = []
    for start in range(0, len(order_N), batch):
        end = min(start + batch, len(order_N))
        if end - start < batch and drop_last:
            break
        mine = list(range(start + rank, end, world_size))
        steps.append([mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)])
    return steps


def reader(
    manifest: Manifest,
    pixels: Pixels,
    order_N: Ids,
    passes: Sequence[Sequence[int]],
    *,
    epoch: int = 0,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images (B, C, H, W), labels (B,) and sample ids (B,) of the given places, pass by pass.

    Args:
        manifest: of the set.
        pixels: bytes to an image.
        order_N: sample at each place.
        passes: places of each pass.
        epoch: decides random crops.
        workers: processes that read and decode; 0 = the caller does.
        pin: page-locked memory, for copies to a CUDA device.

    Raises:
        UnreadableSample: with its place and the reason.
    """
    apart = workers > 0 and not storage.is_local(manifest.url)  # network clients do not survive
    loader: DataLoader[Any] = DataLoader(  # a fork
        _Samples(manifest, pixels, order_N, epoch),
        batch_sampler=[list(places) for places in passes],
        num_workers=min(workers, len(passes)),
        multiprocessing_context="spawn" if apart else None,
        pin_memory=pin,
    )
    try:
        yield from loader
    except UnreadableSample as error:  # from a worker it comes with the worker's traceback
        sentence = str(error).strip().splitlines()[-1].rpartition("UnreadableSample: ")[2]
        raise UnreadableSample(sentence) from None


def random_crop(size: int, crop_min: float, seed: int) -> Pixels:
    """Random resized crop and flip, uint8: what a linear probe is trained on."""
    spec = ViewSpec(crop_min=crop_min)
    return _RandomCrop(spec, size, seed)


def centre_crop(size: int) -> Pixels:
    """Shorter side to 256/224 of the size, then the centre, uint8."""
    return _CentreCrop(size, round(size * 256 / 224))


def through(transform: Callable[[Image.Image], Tensor], seed: int) -> Pixels:
    """Any transform of a Pillow image, its random draws tied to seed, epoch, sample and place."""
    return _Through(transform, seed)


def seed_all(*words: int) -> None:
    """Seed each generator that augmentations and networks draw from."""
    sequence = np.random.SeedSequence([word % 2**32 for word in words])
    first, second, third = (int(word) for word in sequence.generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(third)


# ------------------------------------------------------------ classes, so that workers can be sent


@dataclass(frozen=True)
class _RandomCrop:
    spec: ViewSpec
    size: int
    seed: int

    def __call__(self, data: bytes, sample_id: int, epoch: int, place: int) -> Tensor:
        height, width = decode.size_of(data)
        boxes, flips, _ = photometric.draw(self.spec, self.seed, epoch, sample_id, height, width)
        out = np.empty((1, 3, self.size, self.size), dtype=np.uint8)
        decode.two_crops(data, boxes[:1], flips[:1], out)
        return torch.from_numpy(out[0])


@dataclass(frozen=True)
class _CentreCrop:
    size: int
    resize: int

    def __call__(self, data: bytes, sample_id: int, epoch: int, place: int) -> Tensor:
        return torch.from_numpy(decode.centre_crop(data, self.size, self.resize))


@dataclass(frozen=True)
class _Through:
    transform: Callable[[Image.Image], Tensor]
    seed: int

    def __call__(self, data: bytes, sample_id: int, epoch: int, place: int) -> Tensor:
        image = decode.rgb(data)
        seed_all(self.seed, epoch, sample_id, place)
        return self.transform(image)


class _Samples(Dataset[tuple[Tensor, int, int]]):
    def __init__(self, manifest: Manifest, pixels: Pixels, order_N: Ids, epoch: int) -> None:
        self.manifest, self.pixels, self.order_N, self.epoch = manifest, pixels, order_N, epoch

    def __getitem__(self, place: int) -> tuple[Tensor, int, int]:
        sample = int(self.order_N[place])
        data = fetch_one(self.manifest, sample)
        try:
            if isinstance(data, Unreadable):
                raise UnreadableImage(data.reason)
            image_CHW = self.pixels(data, sample, self.epoch, place)
        except UnreadableImage as error:
            shard, key = key_of(self.manifest, sample)
            raise UnreadableSample(
                f"sample {key} in {shard} of {self.manifest.url} is unreadable ({error}); "
                "python -m data_prep verify lists the damage."
            ) from None
        return image_CHW, int(self.manifest.index_N["label"][sample]), sample
