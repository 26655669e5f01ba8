"""Small sharded sets for tests, written with the standard library's tarfile."""

import hashlib
import io
import tarfile
import zlib

import numpy as np
from PIL import Image

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data import storage
from mocov3_ds.data.manifest import ROW, Shard
from mocov3_ds.data.views import decode


def picture(number, size=12):
    """A small JPEG that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 255, (size, size + number % 3, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def make_tar(members):
    """Bytes of a tar, and where the data of each member begins in it."""
    buffer, begins = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            begins.append(buffer.tell() + 512)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue(), begins


def make_set(url, sizes, image=picture, classes=10):
    """Write a set with shards of the given numbers of samples; returns its manifest, loaded."""
    shards, rows = [], []
    for shard, count in enumerate(sizes):
        members = []
        first = sum(sizes[:shard])
        for number in range(first, first + count):
            members += [(f"img{number}.jpg", image(number)), (f"img{number}.cls", b"%d" % number)]
        tar, begins = make_tar(members)
        name = f"t-{shard:03d}.tar"
        storage.write(storage.join_url(url, name), tar)
        shards.append(Shard(name, len(tar), count, hashlib.sha256(tar).hexdigest()))
        for place, number in enumerate(range(first, first + count)):
            data = members[2 * place][1]
            height, width = decode.read_size(data)
            crc = zlib.crc32(data)
            row = (begins[2 * place], len(data), crc, number % classes, width, height, 0)
            rows.append(row)
    manifests.write(url, shards, np.array(rows, dtype=ROW))
    return manifests.load(url)
