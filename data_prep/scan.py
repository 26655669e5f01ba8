"""What lies in a shard? One pass from its first byte to its last, from any URL.

`verify` holds the result against a manifest; `index` makes a manifest of it.
"""

import hashlib
import zlib
from typing import NamedTuple

from data_prep import images, labels, tar, tar_listing
from data_prep.labels import Label
from mocov3_ds.data import storage
from mocov3_ds.data.views import decode


class HashingStream:
    """A forward-only `tar.ByteSource` over a URL that hashes every byte that passes.

    Args:
        url: URL of the file, which is read in blocks.
    """

    def __init__(self, url: str) -> None:
        self._blocks = storage.read_blocks(url)
        self._unread = memoryview(b"")  # rest of the newest block
        self._digest = hashlib.sha256()
        self.position = 0
        """bytes that have passed"""

    def read(self, size: int, /) -> bytes:
        """Read the next bytes, fewer than `size` only at the end."""
        chunks = []
        while size > 0 and self._has_more():
            chunk = self._unread[:size]
            self._unread = self._unread[len(chunk) :]
            self.position += len(chunk)
            size -= len(chunk)
            chunks.append(chunk)
        return chunks[0].tobytes() if len(chunks) == 1 else b"".join(chunks)

    def seek(self, position: int, /) -> None:
        """Pass bytes up to a later one; stops at the end."""
        assert position >= self.position, "a stream goes forward only"
        while self.position < position and self._has_more():
            step = min(len(self._unread), position - self.position)
            self._unread = self._unread[step:]
            self.position += step

    def hash_all(self) -> str:
        """Read to the end and return the SHA-256 of everything, hexadecimal."""
        while self._has_more():
            self.position += len(self._unread)
            self._unread = memoryview(b"")
        return self._digest.hexdigest()

    def _has_more(self) -> bool:
        if not self._unread:
            block = next(self._blocks, b"")
            self._digest.update(block)
            self._unread = memoryview(block)
        return bool(self._unread)


class ImageFacts(NamedTuple):
    """What the bytes of an image say."""

    crc32: int
    height: int
    """pixels; 0 where the image cannot be read"""
    width: int
    digest: int
    """first 8 bytes of the image's SHA-256"""
    reason: str
    """why it cannot be read; empty = it can"""


class Sample(NamedTuple):
    """What a scan finds out about one sample."""

    key: str
    offset: int
    """position of the image's first byte in the shard"""
    size: int
    """bytes of the image"""
    crc32: int
    label: Label
    height: int
    width: int
    digest: int
    """first 8 bytes of the image's SHA-256"""
    reason: str
    """why image or label cannot be read; empty = they can"""


class Scan(NamedTuple):
    """What a scan finds out about one shard."""

    name: str
    bytes: int
    sha256: str
    samples: list[Sample]
    damage: str
    """why the rest of the shard could not be read; empty = it could"""


def scan_shard(name: str, *, url: str, decode_all: bool) -> Scan:
    """Read one shard to its last byte.

    Args:
        name: File name of the shard.
        url: URL of the folder of the set.
        decode_all: Decode every image, not only its header and end.

    Raises:
        FileNotFoundError: There is no such shard.
        OSError: The shard cannot be read.
    """
    shard_url = storage.join_url(url, name)
    size = storage.file_size(shard_url)
    stream = HashingStream(shard_url)
    members: list[tar.Member] = []
    facts: dict[int, ImageFacts] = {}  # by the member's offset
    label_bytes: dict[int, bytes] = {}
    damage = ""
    try:
        for member in tar.read_members(stream, shard_url, size):
            members.append(member)
            suffix = member.name.rpartition(".")[2].lower()
            if suffix in images.SUFFIXES and member.size <= images.MAX_BYTES:
                facts[member.offset] = _image_facts(stream.read(member.size), decode_all)
            elif suffix in ("cls", "json") and member.size <= labels.LONGEST_JSON:
                label_bytes[member.offset] = stream.read(member.size)
    except tar.DamagedTar as error:
        damage = str(error)
    samples = [
        _describe_sample(sample, facts, label_bytes, shard_url)
        for sample in tar_listing.group_samples(members)
    ]
    return Scan(name, size, stream.hash_all(), samples, damage)


def _image_facts(image_bytes: bytes, decode_all: bool) -> ImageFacts:
    height = width = 0
    reason = ""
    try:
        height, width = images.checked_size(image_bytes, "decode" if decode_all else "header")
    except decode.UnreadableImage as error:
        reason = str(error)
    digest = int.from_bytes(hashlib.sha256(image_bytes).digest()[:8], "little")
    return ImageFacts(zlib.crc32(image_bytes), height, width, digest, reason)


def _describe_sample(
    sample: tar_listing.TarSample,
    facts: dict[int, ImageFacts],
    label_bytes: dict[int, bytes],
    shard_url: str,
) -> Sample:
    """Put together what was read of a sample's members."""
    label: Label = None
    reason = ""
    try:
        label = tar_listing.read_label(sample, lambda m: label_bytes[m.offset], shard_url)
    except ValueError as error:
        reason = str(error)
    image = sample.image
    unread = ImageFacts(0, 0, 0, 0, f"{image.size} bytes are no image")
    crc32, height, width, digest, unreadable = facts.get(image.offset, unread)
    reason = unreadable or reason
    return Sample(sample.key, image.offset, image.size, crc32, label, height, width, digest, reason)
