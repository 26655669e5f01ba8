"""What the tests of the loader share: a small set, loaders over it, and damage to it."""

import zlib
from pathlib import Path

import numpy as np
import torch

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.loader import Loader, LoaderSettings
from mocov3_ds.data.views.spec import ViewSpec

SIZES = (5, 9, 1, 0, 30, 7)
"""samples of the shards of the small set"""


def open_loader(manifest, *, position=0, earlier_bad=None, **changes):
    settings = {
        "views": ViewSpec(),
        "image_size": 8,
        "global_batch": 12,
        "rank": 0,
        "world_size": 1,
        "seed": 3,
        "lanes": 4,
        "pool": 24,
        "threads": 2,
    }
    settings = LoaderSettings(**(settings | changes))
    return Loader(manifest, settings, position=position, earlier_bad=earlier_bad)


def copied(batch):
    """A batch whose tensors stay."""
    return batch.sample_ids_B.tolist(), batch.crops_VBCHW.clone(), batch.params_VBP.clone()


def run(manifest, world_size, batches, **changes):
    """Global batches put together from all ranks: ids, crops, parameters."""
    ranks = [
        open_loader(manifest, rank=rank, world_size=world_size, **changes)
        for rank in range(world_size)
    ]
    out = []
    try:
        for _ in range(batches):
            parts = [copied(next(loader)) for loader in ranks]
            ids = [i for part in parts for i in part[0]]
            out.append((ids, *(torch.cat([p[k] for p in parts], 1) for k in (1, 2))))
    finally:
        for loader in ranks:
            loader.close()
    return out


def same(a, b):
    return all(
        x[0] == y[0] and torch.equal(x[1], y[1]) and torch.equal(x[2], y[2])
        for x, y in zip(a, b, strict=True)
    )


def damage(manifest, sample_id, at=200, new=b"\0\xff\0\xff\0\xff", mend_crc=False):
    """Overwrite bytes of a sample in its shard; returns the manifest to use."""
    shard = int(np.searchsorted(manifest.first_S, sample_id, side="right")) - 1
    row = manifest.index_N[sample_id]
    offset, size = int(row["offset"]), int(row["size"])
    path = Path(manifest.shard_url(shard))
    tar = bytearray(path.read_bytes())
    tar[offset + at : offset + at + len(new)] = new
    path.write_bytes(tar)
    if not mend_crc:
        return manifest
    index_N = manifest.index_N.copy()
    index_N["crc32"][sample_id] = zlib.crc32(tar[offset : offset + size])
    manifests.write(manifest.url, manifest.shards, index_N)
    return manifests.load(manifest.url)
