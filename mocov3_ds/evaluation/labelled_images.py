"""Which labelled images does a classifier on an encoder see, in what order, as what tensors?

    choose_split_urls -> open_splits -> draw_epoch_order -> split_into_passes -> read_batches

An epoch's order and the random crop of each sample follow from the seed alone. They are the same on
any number of ranks and of reading processes, and after a resume. Samples are read one by one, by
range; several processes hide the latency of object storage.

Shape suffixes: B = images of a batch, C H W = image, N = samples of an epoch.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mocov3_ds.config.run_config import Config
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data import storage
from mocov3_ds.data.class_names import labels_in_use, pair_classes, renumber_labels
from mocov3_ds.data.fetch import Unreadable, locate_sample, read_sample
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.own_space import folder_of_images, shards_of
from mocov3_ds.data.views import decode
from mocov3_ds.data.views.decode import Sides, UnreadableImage
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.weights import Weights

_log = logging.getLogger("mocov3_ds")

_DENSE = 1000  # class numbers below this may have gaps
Ids = NDArray[np.int64]
ImageMaker = Callable[[bytes, int, int, int], Tensor]
"""(image bytes, sample id, epoch, position in the epoch) -> one image, (C, H, W)"""


class UnreadableSample(ValueError):  # noqa: N818 - it says what the sample is
    """A sample cannot be read; only the rank that met it knows, so that rank must say so."""


@dataclass(frozen=True)
class Splits:
    """Labelled images to learn from and held-out images to be judged by."""

    train: Manifest
    val: Manifest

    @property
    def classes(self) -> int:
        """Number of classes in the training shards."""
        return len(self.train.classes) or 1 + self.train.top_label


def shards_of_run(config: Config, runs: Path, *, with_probes: bool = True) -> tuple[str, str]:
    """Training shards and probe shards of a run, also those that it made; empty = none.

    Args:
        config: settings of the run.
        runs: folder in which the run's own lies.
        with_probes: whether the drawn sample images count, which are training and probes together.
    """
    probes = shards_of(config.data.probe_shards, runs)
    if config.data.images:
        return str(folder_of_images(config.data.images, runs)), probes
    if not config.data.shards and with_probes:
        return str(runs / "sample-images" / "train"), str(runs / "sample-images" / "test")
    return config.data.shards, probes


def choose_split_urls(weights: Weights, train: str, val: str) -> tuple[str, str]:
    """The shards that the user named, or else those of the run.

    Args:
        weights: the encoder; its run's settings name shards, a bare weights file names none.
        train: folder or URL of the training shards; empty = those of the run.
        val: folder or URL of the held-out shards; empty = the probe shards of the run.

    Raises:
        ValueError: neither the user nor the run names them.
    """
    if weights.config is not None:
        own_train, own_val = shards_of_run(
            weights.config, weights.path.parent, with_probes=not train and not val
        )
        train, val = train or own_train, val or own_val
    for url, name in ((train, "training"), (val, "held-out")):
        if not url:
            raise ValueError(
                f"{weights.path} names no {name} shards; give --train FOLDER and --val FOLDER "
                "(made with python -m data_prep shard IMAGES FOLDER)."
            )
    return train, val


def open_splits(train: str, val: str) -> Splits:
    """Open the training shards and the held-out shards, and pair their classes by name.

    The held-out labels get the numbers that the same classes have in training. Numbers without
    names that are far beyond the count of classes (ids) are closed up, and are then the names.

    Args:
        train: folder or URL of the training shards.
        val: folder or URL of the held-out shards.

    Raises:
        ValueError: no shards there, samples without labels, or held-out classes that training has
            not.
    """
    train_set, val_set = manifests.load(train), manifests.load(val)
    for manifest in (train_set, val_set):
        if not manifest.has_labels:
            missing = int((manifest.index_N["label"] < 0).sum())
            raise ValueError(
                f"{missing} of {manifest.samples} samples in {manifest.url} have no label, so "
                "nothing can be classified by them; shard them from class folders."
            )
    train_set = _close_up(train_set)
    val_set, notes = pair_classes(train_set, val_set)
    for note in notes if ranks.is_first() else ():
        _log.warning(note)
    return Splits(train_set, val_set)


def _close_up(train: Manifest) -> Manifest:
    """The set with class numbers whose largest is in proportion to how many there are."""
    if train.classes or train.top_label < _DENSE:
        return train
    labels = labels_in_use(train)
    if train.top_label < 4 * len(labels):
        return train
    closed = renumber_labels(train, labels, range(len(labels)))
    return replace(closed, classes=tuple(map(str, labels)))


def draw_epoch_order(samples: int, seed: int, epoch: int, repeats: int = 1) -> Ids:
    """Sample ids of an epoch in random order, (N,) int64.

    With `repeats`, each drawn sample stands several times in a row. This is repeated augmentation
    (Hoffer et al., arXiv 1901.09335) as DeiT uses it: an epoch keeps its length and holds
    N / repeats samples, and neighbouring ranks see different crops of the same image.
    """
    drawn_N = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(samples)
    return np.repeat(drawn_N, repeats)[:samples].astype(np.int64)


def split_into_passes(
    order_N: Ids, *, batch: int, micro_batch: int, rank: int, world_size: int, drop_last: bool
) -> list[list[list[int]]]:
    """Positions in `order_N` that a rank reads: a list of steps, each a list of forward passes.

    Step t takes positions t * batch to (t + 1) * batch, and rank r of W takes every W-th of them.
    No position comes twice. A short last step may be empty on some ranks.

    Args:
        order_N: sample ids of the epoch.
        batch: global batch, images per step over all ranks.
        micro_batch: most images in one forward pass of a rank.
        rank: number of this rank, from 0.
        world_size: number of ranks that share a step.
        drop_last: whether a last step with fewer than `batch` images is left out.
    """
    steps = []
    for start in range(0, len(order_N), batch):
        end = min(start + batch, len(order_N))
        if end - start < batch and drop_last:
            break
        positions = list(range(start + rank, end, world_size))
        passes = range(0, len(positions), micro_batch)
        steps.append([positions[first : first + micro_batch] for first in passes])
    return steps


def read_batches(
    manifest: Manifest,
    make_image: ImageMaker,
    order_N: Ids,
    passes: Sequence[Sequence[int]],
    *,
    epoch: int = 0,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images (B, C, H, W), labels (B,) and sample ids (B,) of each pass.

    Args:
        manifest: index of the shards to read from.
        make_image: turns the bytes of a sample into an image tensor.
        order_N: sample ids of the epoch.
        passes: positions in `order_N` that each pass consists of.
        epoch: number of the epoch, from 0; random crops depend on it.
        workers: processes that read and decode; 0 = the caller does.
        pin: whether to use page-locked memory, for copies to a CUDA device.

    Raises:
        UnreadableSample: with the sample's shard and the reason.
    """
    remote = workers > 0 and not storage.is_local(manifest.shards_url)
    loader: DataLoader[Any] = DataLoader(
        _LabelledImages(manifest, make_image, order_N, epoch),
        batch_sampler=[list(positions) for positions in passes],
        num_workers=min(workers, len(passes)),
        multiprocessing_context="spawn" if remote else None,  # network clients do not survive fork
        pin_memory=pin,
    )
    try:
        yield from loader
    except UnreadableSample as error:  # from a worker it comes with the worker's traceback
        sentence = str(error).strip().splitlines()[-1].rpartition("UnreadableSample: ")[2]
        raise UnreadableSample(sentence) from None


def seed_generators(*numbers: int) -> None:
    """Seed every generator that augmentations and networks draw from, by all the numbers given."""
    sequence = np.random.SeedSequence([number % 2**32 for number in numbers])
    first, second, third = (int(word) for word in sequence.generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(third)


# ------------------------------- makers of images; classes, so that they can be sent to workers


@dataclass(frozen=True)
class RandomCrop:
    """Random resized crop and flip, uint8: what a linear probe is trained on."""

    size: int | Sides
    """side of the crop, or its height and width, pixels"""
    spec: ViewSpec
    """distribution of the crops and flips, and the channels"""
    seed: int

    def __call__(self, image_bytes: bytes, sample_id: int, epoch: int, position: int) -> Tensor:
        """The crop (C, H, W) that the seed, the epoch and the sample id decide."""
        height, width = decode.read_size(image_bytes)
        boxes, flips, _ = draw_views(self.spec, self.seed, epoch, sample_id, height, width)
        crops_1CHW = np.empty((1, self.spec.channels, *decode.as_sides(self.size)), np.uint8)
        decode.cut_crops(image_bytes, boxes[:1], flips[:1], crops_1CHW)
        return torch.from_numpy(crops_1CHW[0])


@dataclass(frozen=True)
class CentreCrop:
    """The image resized until it covers 256/224 of the size, then the centre, uint8."""

    size: int | Sides
    """side of the crop, or its height and width, pixels"""
    channels: int = 3

    def __call__(self, image_bytes: bytes, sample_id: int, epoch: int, position: int) -> Tensor:
        """The crop (C, H, W) at the centre, the same in each epoch."""
        crop_CHW = decode.centre_crop(image_bytes, self.size, channels=self.channels)
        return torch.from_numpy(crop_CHW)


@dataclass(frozen=True)
class SeededTransform:
    """Any transform of a Pillow image, seeded by seed, epoch, sample and position."""

    transform: Callable[[Image.Image], Tensor]
    seed: int

    def __call__(self, image_bytes: bytes, sample_id: int, epoch: int, position: int) -> Tensor:
        """The transformed image (C, H, W)."""
        image = decode.decode_rgb(image_bytes)
        seed_generators(self.seed, epoch, sample_id, position)
        return self.transform(image)


@dataclass(frozen=True)
class _LabelledImages(Dataset[tuple[Tensor, int, int]]):
    """(image, label, sample id) at each position of an epoch."""

    manifest: Manifest
    make_image: ImageMaker
    order_N: Ids
    epoch: int

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        sample_id = int(self.order_N[position])
        try:
            image_bytes = read_sample(self.manifest, sample_id)
        except FileNotFoundError as error:
            raise UnreadableSample(f"sample {sample_id}: {error}") from None
        try:
            if isinstance(image_bytes, Unreadable):
                raise UnreadableImage(image_bytes.reason)
            image_CHW = self.make_image(image_bytes, sample_id, self.epoch, position)
        except UnreadableImage as error:
            shard, key = locate_sample(self.manifest, sample_id)
            raise UnreadableSample(
                f"sample {key} in {shard} of {self.manifest.url} is unreadable ({error}); "
                "python -m data_prep verify lists the damage."
            ) from None
        return image_CHW, int(self.manifest.index_N["label"][sample_id]), sample_id
