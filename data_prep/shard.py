"""How do images become shards? By a plan of images and options alone, then one task a shard.

    DST/plan.json                     what is being made, written first; another plan is refused
    DST/shard-000000.tar              KEY.jpg, KEY.cls (KEY.json where the source has one), ...
    DST/receipts/shard-000000.json    this shard is finished: its digest, its rows of the index
    DST/rejects.jsonl                 images left out and why, where there are any
    DST/index.bin, DST/manifest.json  the set is complete; written last

A killed run leaves finished shards with receipts and no manifest. The same command checks the
finished ones against their receipts and makes the others; the result has the same bytes.

Shape suffixes: N = images of the source, S = shards.
"""

import contextlib
import hashlib
import itertools
import json
import os
import resource
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from data_prep import engines, images, tar
from data_prep.balance import UNREAD_FORMATS, Balance, ending_reason
from data_prep.destination import (
    check_apart,
    check_arrivals,
    claim_folder,
    lock_folder,
    remove_leftovers,
)
from data_prep.listing import FileIdentity, Item, Listing, identify_file
from data_prep.member_names import quote_name
from data_prep.progress import Progress
from data_prep.receipts import REJECTS, Receipt, Reject, find_finished, write_receipt, write_rejects
from data_prep.shard_options import ShardOptions, check_options, parse_shard_size
from mocov3_ds.data import manifest, splitmix, storage
from mocov3_ds.data.class_names import labels_in_use
from mocov3_ds.data.manifest import Manifest, Shard
from mocov3_ds.data.storage import Writer
from mocov3_ds.data.views.decode import UnreadableImage
from mocov3_ds.version import __version__

_MOST_OPEN = 64
"""Archives that a worker keeps open at most, and a quarter of the files that it may open."""


class Task(NamedTuple):
    """All that making one shard takes."""

    url: str
    """folder of the set"""
    name: str
    """file name of the shard"""
    plan: str
    """digest of the plan the shard belongs to"""
    items: list[Item]
    options: ShardOptions
    archives: dict[str, FileIdentity]
    """what the archives that hold the images were when they were listed"""


@dataclass(frozen=True)
class Summary:
    """What a run of the sharder did."""

    manifest: Manifest
    rejects: tuple[Reject, ...]
    earlier_shards: int
    """shards that were finished before"""
    balance: Balance
    """what became of all files of the source"""
    seconds: float

    def __str__(self) -> str:
        shards = self.manifest
        lines = [
            f"{shards.url}: {shards.samples} samples of "
            f"{len(shards.classes or labels_in_use(shards))} classes in "
            f"{len(shards.shards)} shards, {shards.bytes / 1e6:.1f} MB"
        ]
        if self.earlier_shards:
            lines.append(f"{self.earlier_shards} shards were finished before and are whole; kept")
        if self.rejects:
            reasons = Counter(reject.reason for reject in self.rejects).most_common(3)
            lines.append(
                f"{len(self.rejects)} images rejected (all in {REJECTS}): "
                + ", ".join(f"{count} x {quote_name(reason)}" for reason, count in reasons)
            )
        lines.append(self.balance.lines(len(self.rejects))[0])
        seconds = max(self.seconds, 1e-9)
        lines.append(
            f"{self.seconds:.1f} s, {shards.samples / seconds:.0f} images/s, "
            f"{shards.bytes / 1e6 / seconds:.1f} MB/s"
        )
        return "\n".join(lines)


def make_shards(
    listing: Listing,
    url: str,
    options: ShardOptions,
    *,
    workers: int,
    source: str = "",
    engine: engines.Engine = engines.process_pool,
    quiet: bool = False,
) -> Summary:
    """Make (or finish making) a sharded data set.

    Args:
        listing: The images of the source.
        url: Folder or object-store prefix of the set.
        options: All that the shards depend on besides the images.
        workers: Number of processes; 1 = this one alone.
        source: Name of the source in the manifest.
        engine: Function that runs the tasks.
        quiet: Show no progress on standard error.

    Raises:
        ValueError: Bad options, another set in the folder, a changed source, no readable image.
        OSError: A file cannot be read or written.
    """
    check_options(options)
    check_apart(url, listing.root)
    plan = _describe_plan(listing, options)
    with lock_folder(url):
        claim_folder(url, plan)
        tasks = _make_tasks(listing, url, plan, options)
        receipts: list[Receipt] = []
        with Progress("shard", len(listing), quiet=quiet) as progress:
            for receipt in engine(write_shard, tasks, workers):
                receipts.append(receipt)
                progress.update(len(receipt.rows) + len(receipt.rejects), receipt.shard.bytes)
            seconds = progress.seconds
        receipts.sort(key=lambda receipt: receipt.shard.name)
        check_arrivals(receipts, url)
        rejects = _collect_rejects(receipts)
        write_rejects(rejects, url)
        remove_leftovers(url)
        finished = manifest.write(
            url,
            [receipt.shard for receipt in receipts if len(receipt.rows)],
            np.concatenate([receipt.rows for receipt in receipts]),
            classes=listing.classes,
            provenance={
                **plan,
                "source": source,
                "rejected": len(rejects),
                "balance": listing.balance.as_json(len(rejects)),
            },
        )
    earlier = sum(receipt.is_earlier for receipt in receipts)
    return Summary(finished, rejects, earlier, listing.balance, seconds)


def _describe_plan(listing: Listing, options: ShardOptions) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on, as JSON values."""
    return {
        "program": f"mocov3-ds {__version__}",
        **({"pillow": PIL.__version__} if options.resize else {}),
        **vars(options),
        "images": len(listing),
        "listing": listing.digest(),
    }


def draw_order(count: int, seed: int) -> NDArray[np.int64]:
    """Draw a permutation (N,) from the seed alone, the same with any version of NumPy."""
    state = int(hashlib.sha256(b"%d" % seed).hexdigest()[:16], 16)
    return splitmix.draw_permutation(count, state)


def _cut_order(listing: Listing, order_N: NDArray[np.int64], shard_size: str) -> NDArray[np.int64]:
    """First image of each shard in the order, and the number of images behind the last."""
    limit, in_bytes = parse_shard_size(shard_size)
    if not in_bytes:
        return np.append(np.arange(0, len(listing), limit), len(listing))
    size_N = listing.size_N + -listing.size_N % tar.BLOCK + tar.BLOCK
    size_N += np.where(listing.label_N >= 0, 2 * tar.BLOCK, 0)
    json_N = listing.json_N2[:, 1]
    size_N += np.where(json_N > 0, json_N + -json_N % tar.BLOCK + tar.BLOCK, 0)
    begin_N = np.concatenate([[0], np.cumsum(size_N[order_N])[:-1]])
    _, first_S = np.unique(begin_N // limit, return_index=True)
    return np.append(first_S, len(listing))


def _make_tasks(
    listing: Listing, url: str, plan: Mapping[str, Any], options: ShardOptions
) -> Iterator[Task]:
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    order_N = draw_order(len(listing), options.seed)
    bounds_S = _cut_order(listing, order_N, options.shard_size)
    identities = dict(zip(listing.files, listing.archives, strict=False))
    for number, (first, last) in enumerate(itertools.pairwise(bounds_S.tolist())):
        name = f"{options.split or 'shard'}-{number:06d}.tar"
        items = listing.select_items(order_N[first:last])
        archives = {item.path: identities[item.path] for item in items if item.path in identities}
        yield Task(url, name, digest, items, options, archives)


def _collect_rejects(receipts: Sequence[Receipt]) -> tuple[Reject, ...]:
    """Images that were left out; an error if these are all."""
    rejects = tuple(reject for receipt in receipts for reject in receipt.rejects)
    if not any(len(receipt.rows) for receipt in receipts):
        raise ValueError(
            f"none of the {len(rejects)} images can be read, e.g. {quote_name(rejects[0].name)}: "
            f"{rejects[0].reason}."
        )
    return rejects


def write_shard(task: Task) -> Receipt:
    """Make one shard, unless a receipt says that it is finished and its bytes agree.

    Raises:
        ValueError: A file of the source is not as long as it was when it was listed.
        OSError: A file cannot be read or written.
    """
    earlier = find_finished(task.url, task.name, task.plan)
    if earlier is not None:
        return earlier
    url = storage.join_url(task.url, task.name)
    rejects: list[Reject] = []
    with storage.open_write(url) as out, _SourceFiles(task.archives) as files:
        shard = _ShardWriter(out, len(task.items))
        for item in task.items:
            try:
                if item.size > images.MAX_BYTES:
                    raise UnreadableImage(f"{item.size} bytes, at most {images.MAX_BYTES} are read")
                if item.suffix in UNREAD_FORMATS:
                    raise UnreadableImage(ending_reason(item.name))
                image = _prepare_image(item, files.read_image(item), task.options)
                json_bytes = files.read_json(item)
            except UnreadableImage as error:
                rejects.append(Reject(item.name, str(error)))
                continue
            except OSError as error:  # a failed read names no file; the shard is not the culprit
                error.filename = error.filename or item.path
                raise
            shard.add_sample(item, image, json_bytes)
        shard.finish()
    if not shard.samples:
        storage.remove_file(url)
    receipt = Receipt(shard.describe(task.name), shard.rows[: shard.samples], tuple(rejects))
    write_receipt(receipt, task.url, task.plan)
    return receipt


class _Image(NamedTuple):
    """An image as it is stored."""

    data: bytes
    suffix: str
    """ending of its member"""
    height: int
    width: int


def _prepare_image(item: Item, image_bytes: bytes, options: ShardOptions) -> _Image:
    """Check an image, and shrink it if that is asked for."""
    height, width = images.checked_size(image_bytes, options.check)
    if options.resize:
        smaller = images.shrink_image(
            image_bytes, options.resize, options.quality, always=options.reencode
        )
        if smaller is not None:
            return _Image(smaller, "jpg", *images.checked_size(smaller, "header"))
    return _Image(image_bytes, item.suffix, height, width)


class _ShardWriter:
    """Writes the members of a shard, hashes them, and notes where they lie."""

    def __init__(self, out: Writer, capacity: int) -> None:
        self._out, self._digest, self._position = out, hashlib.sha256(), 0
        self.rows = np.zeros(capacity, dtype=manifest.ROW)
        self.samples = 0

    def add_sample(self, item: Item, image: _Image, json_bytes: bytes) -> None:
        """Write an image, its label if it has one, and its JSON if that is not empty."""
        size = len(image.data)
        head = tar.make_header(f"{item.key}.{image.suffix}", size)
        tail = tar.padding_after(size)
        if item.label >= 0:
            tail += _make_member(f"{item.key}.cls", b"%d" % item.label)
        if json_bytes:
            tail += _make_member(f"{item.key}.json", json_bytes)
        self.rows[self.samples] = (
            self._position + tar.BLOCK,
            size,
            zlib.crc32(image.data),
            item.label,
            image.width if image.width < 1 << 16 else 0,
            image.height if image.height < 1 << 16 else 0,
            0,
        )
        self.samples += 1
        for block in (head, image.data, tail):
            self._write(block)

    def _write(self, block: bytes) -> None:
        self._digest.update(block)
        self._out.write(block)
        self._position += len(block)

    def finish(self) -> None:
        """Write the end mark."""
        self._write(tar.END)

    def describe(self, name: str) -> Shard:
        """Return the shard's entry of the manifest."""
        return Shard(name, self._position, self.samples, self._digest.hexdigest())


def _make_member(name: str, data: bytes) -> bytes:
    """Bytes of a small member: header, data, padding."""
    return tar.make_header(name, len(data)) + data + tar.padding_after(len(data))


class _SourceFiles(contextlib.ExitStack):
    """Reads images of a source; the archives that were read last stay open until the block ends.

    Args:
        archives: What the archives were when they were listed.
    """

    def __init__(self, archives: Mapping[str, FileIdentity]) -> None:
        super().__init__()
        self._archives = archives
        self._descriptors: dict[str, int] = {}  # the one read last at the end
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_open = max(1, min(_MOST_OPEN, limit // 4)) if limit > 0 else _MOST_OPEN
        self.callback(self._close_all)

    def read_image(self, item: Item) -> bytes:
        """Read the bytes of an image: a file of its own, or a range of an archive.

        Raises:
            ValueError: The image is not as long as it was when it was listed.
        """
        if item.offset == 0:  # in an archive a header comes first
            with open(item.path, "rb", buffering=0) as file:  # noqa: PTH123 - half the cost of Path
                data = file.read()
        else:
            data = os.pread(self._open_archive(item.path), item.size, item.offset)
        if len(data) != item.size:
            raise ValueError(
                f"{quote_name(item.name)} ({quote_name(item.path)}) has {len(data)} bytes and had "
                f"{item.size} when it was listed; the source must not change while it is sharded."
            )
        return data

    def read_json(self, item: Item) -> bytes:
        """Read the bytes of an image's KEY.json; none where it has no such member."""
        if not item.json_size:
            return b""
        return os.pread(self._open_archive(item.path), item.json_size, item.json_offset)

    def _open_archive(self, path: str) -> int:
        descriptor = self._descriptors.pop(path, None)
        if descriptor is None:
            if len(self._descriptors) >= self._most_open:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._check_identity(path)
            descriptor = os.open(path, os.O_RDONLY)
        self._descriptors[path] = descriptor
        return descriptor

    def _check_identity(self, path: str) -> None:
        """Refuse an archive that is not the one that was listed."""
        listed = self._archives.get(path)
        if listed is not None and identify_file(path) != listed:
            raise ValueError(
                f"{quote_name(path)} has changed since it was listed; the source must not change "
                "while it is sharded."
            )

    def _close_all(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
