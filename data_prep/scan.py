"""What lies in a shard? One pass from its first byte to its last, from any URL.

`verify` holds the result against a manifest; `index` makes a manifest of it.
"""

import hashlib
import zlib
from typing import NamedTuple

from data_prep import images, labels, tar
from data_prep.balance import BEHIND_END, HIDDEN, UNREAD_FORMATS, Balance, ending_reason
from data_prep.labels import Label
from data_prep.listing import is_image_name
from data_prep.member_names import is_hidden, name_ending, quote_name
from data_prep.wds_samples import (
    NO_PICK,
    Choices,
    MemberPick,
    TarSample,
    group_samples,
    read_label,
)
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
    is_faint: bool
    """whether it is nearly of one colour; False where it was not decoded"""


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
    """why the image cannot be read; empty = it can"""
    is_faint: bool
    """whether the image is nearly of one colour; False where it was not decoded"""
    label_reason: str
    """why the label cannot be read; empty = it can, or there is none"""


class Scan(NamedTuple):
    """What a scan finds out about one shard."""

    name: str
    bytes: int
    sha256: str
    samples: list[Sample]
    damage: str
    """why the rest of the shard could not be read; empty = it could"""
    balance: Balance
    """what became of each member"""
    choices: Choices
    """samples in which several members may be the image or the label"""


def scan_shard(name: str, *, url: str, decode_all: bool, pick: MemberPick = NO_PICK) -> Scan:
    """Read one shard to its last byte.

    Args:
        name: File name of the shard.
        url: URL of the folder of the set.
        decode_all: Decode every image, not only its header and end.
        pick: Members that the user wants for images and labels.

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
    balance, choices = Balance(), Choices()
    try:
        for member in tar.read_members(stream, quote_name(shard_url), size):
            balance.see()
            if is_hidden(member.name):
                balance.leave_out(f"{name}/{member.name}", HIDDEN)
                continue
            members.append(member)
            may_be_image = is_image_name(member.name) or name_ending(member.name) == images.ARRAY
            if may_be_image and member.size <= images.MAX_BYTES:
                facts[member.offset] = _image_facts(stream.read(member.size), decode_all)
            elif pick.is_label(member.name) and member.size <= labels.LONGEST_JSON:
                label_bytes[member.offset] = stream.read(member.size)
        if tar.has_rest(stream):
            balance.see()
            balance.leave_out(name, BEHIND_END)
    except tar.DamagedTar as error:
        damage = str(error)
    groups = group_samples(members, pick, balance=balance, choices=choices)
    samples = [_describe_sample(sample, facts, label_bytes, shard_url, pick) for sample in groups]
    balance.images += len(samples)
    return Scan(name, size, stream.hash_all(), samples, damage, balance, choices)


def _image_facts(image_bytes: bytes, decode_all: bool) -> ImageFacts:
    height = width = 0
    reason, is_faint = "", False
    try:
        if decode_all:
            decoded = images.decode_stored(image_bytes)
            height, width = decoded[0].height, decoded[0].width
            is_faint = images.is_faint(decoded)
        else:
            height, width = images.checked_size(image_bytes, "header")
    except decode.UnreadableImage as error:
        reason = str(error)
    digest = int.from_bytes(hashlib.sha256(image_bytes).digest()[:8], "little")
    return ImageFacts(zlib.crc32(image_bytes), height, width, digest, reason, is_faint)


def _describe_sample(
    sample: TarSample,
    facts: dict[int, ImageFacts],
    label_bytes: dict[int, bytes],
    shard_url: str,
    pick: MemberPick,
) -> Sample:
    """Put together what was read of a sample's members."""
    label: Label = None
    label_reason = ""
    try:
        label = read_label(sample, lambda m: label_bytes[m.offset], quote_name(shard_url), pick)
    except ValueError as error:
        label_reason = str(error)
    image = sample.image
    is_unread = name_ending(image.name) in UNREAD_FORMATS
    reason = ending_reason(image.name) if is_unread else f"{image.size} bytes are no image"
    unread = ImageFacts(0, 0, 0, 0, reason, is_faint=False)
    crc32, height, width, digest, reason, is_faint = facts.get(image.offset, unread)
    where = image.offset, image.size, crc32
    sides = height, width
    return Sample(sample.key, *where, label, *sides, digest, reason, is_faint, label_reason)
