"""How does an evaluation see every sample of a set once? Centre crops, shared among the ranks.

Shape suffixes: B = rank batch, C H W = image.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocov3_ds.data.bad_samples import BadSamples
from mocov3_ds.data.fetch import Unreadable, read_samples
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.sample_order import Ids, spread_ids
from mocov3_ds.data.storage.cache import Cache
from mocov3_ds.data.views import decode
from mocov3_ds.data.views.decode import Sides, UnreadableImage


def evaluation_batches(
    manifest: Manifest,
    *,
    image_size: int | Sides,
    batch: int,
    rank: int,
    world_size: int,
    threads: int,
    channels: int = 3,
    limit: int | None = None,
    bad_sample_budget: int = 0,
    cache: Cache | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield centre crops of all samples, each on one rank, once.

    Args:
        manifest: Manifest of the set that is read.
        image_size: Side of the crop in pixels, or its height and width; the image is resized until
            it covers 256/224 of them before.
        batch: Most samples of a rank's batch.
        rank: Number of this rank; the ranks' batches differ by one sample at most.
        world_size: Number of ranks that share the samples.
        threads: Number of decoding threads; 0 = the caller decodes.
        channels: Channels of the crops.
        limit: Samples of a fixed subset, spread evenly over the set; None = all.
        bad_sample_budget: Unreadable samples that are left out with a warning.
        cache: Cache that keeps on the local disk what comes from a store.

    Yields:
        crops_BCHW uint8, labels_B int64 and sample_ids_B int64; the tensors are the caller's.

    Raises:
        ValueError: There are more unreadable samples than the budget.
        OSError: The store cannot be read.
    """
    batches = spread_ids(manifest.samples, limit, rank, world_size, batch)
    bad = BadSamples(manifest, budget=bad_sample_budget, rank=rank)
    make_crop = partial(_make_crop, bad, image_size, channels)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(max(threads, 1)) as decoders:
        run = decoders.map if threads else map
        try:
            for ids_B, image_bytes in _read_one_ahead(manifest, batches, reader, cache, stop):
                crops = list(run(make_crop, ids_B.tolist(), image_bytes))
                readable_B = ids_B[[crop is not None for crop in crops]]
                if len(readable_B):
                    yield (
                        torch.from_numpy(np.stack([crop for crop in crops if crop is not None])),
                        torch.from_numpy(manifest.index_N["label"][readable_B].astype(np.int64)),
                        torch.from_numpy(readable_B),
                    )
        finally:
            stop.set()


def _make_crop(
    bad_samples: BadSamples,
    image_size: int | Sides,
    channels: int,
    sample_id: int,
    image_bytes: bytes | Unreadable,
) -> NDArray[np.uint8] | None:
    """Decode the centre crop (C, H, W) of a sample; None where it is unreadable."""
    try:
        if isinstance(image_bytes, Unreadable):
            raise UnreadableImage(image_bytes.reason)
        return decode.centre_crop(image_bytes, image_size, channels=channels)
    except UnreadableImage as error:
        bad_samples.record_sample(sample_id, 0, str(error))
        return None


def _read_one_ahead(
    manifest: Manifest,
    batches: Iterator[Ids],
    reader: ThreadPoolExecutor,
    cache: Cache | None,
    stop: threading.Event,
) -> Iterator[tuple[Ids, list[bytes | Unreadable]]]:
    """Yield the ids and the bytes of each batch, while a thread reads the one behind it."""

    def read_batch(ids_B: Ids) -> list[bytes | Unreadable]:
        image_bytes: list[bytes | Unreadable] = [b""] * len(ids_B)
        for index, sample in read_samples(manifest, ids_B, cache=cache, stop=stop):
            image_bytes[index] = sample
        return image_bytes

    ids_B, following = next(batches, None), None
    pending = reader.submit(read_batch, ids_B) if ids_B is not None else None
    while ids_B is not None:
        assert pending is not None
        image_bytes = pending.result()
        if (following := next(batches, None)) is not None:
            pending = reader.submit(read_batch, following)
        yield ids_B, image_bytes
        ids_B = following
