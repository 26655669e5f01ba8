"""Images to shards: a plan that depends on images and options alone, then one task a shard.

    DST/plan.json                     what is being made, written first; another plan is refused
    DST/shard-000000.tar              KEY.jpg, KEY.cls (KEY.json where the source has one), ...
    DST/receipts/shard-000000.json    this shard is finished: its digest, its rows of the index
    DST/rejects.jsonl                 images left out and why, where there are any
    DST/index.bin, DST/manifest.json  the set is complete; written last

A killed run leaves finished shards with receipts and no manifest. The same command checks the
finished ones against their receipts and makes the others; the result has the same bytes.

Shape suffixes: N = images of the source, S = shards.
"""

import base64
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from data_prep import engines, images, tar
from data_prep.progress import Progress
from data_prep.sources import Item, Listing
from mocov3_ds.data import manifest, splitmix, storage
from mocov3_ds.data.manifest import Manifest, Shard
from mocov3_ds.data.views.decode import UnreadableImage
from mocov3_ds.version import __version__

PLAN, RECEIPTS, REJECTS = "plan.json", "receipts", "rejects.jsonl"


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """What the bytes of the shards depend on besides the images."""

    shard_size: str = "1000"
    """samples (1000), or bytes of the source's images (256MB; also kB, GB, MiB, GiB)"""
    seed: int = 0
    """of the order of all images over all shards"""
    resize: int = 0
    """shorter side of larger images, pixels; 0 = original bytes"""
    quality: int = 90
    """JPEG quality of resized images"""
    reencode: bool = False
    """with `resize`: also write smaller images again as JPEG"""
    check: images.Check = "header"
    """what makes an image fit to be kept: its header and end, or decoding it whole"""
    split: str = ""
    """names the shards: SPLIT-000000.tar; empty = shard-000000.tar"""


@dataclass(frozen=True)
class Reject:
    """An image that was left out."""

    name: str
    reason: str


class Task(NamedTuple):
    """All that making one shard takes."""

    url: str
    name: str
    plan: str
    """digest of the plan the shard belongs to"""
    items: list[Item]
    options: ShardOptions


@dataclass(frozen=True, eq=False)
class Receipt:
    """A finished shard."""

    shard: Shard
    rows: NDArray[np.void]
    """of `manifest.ROW`"""
    rejects: tuple[Reject, ...]
    found: bool = False
    """it was finished before"""


@dataclass(frozen=True)
class Summary:
    """What a run of the sharder did."""

    manifest: Manifest
    rejects: tuple[Reject, ...]
    found: int
    """shards that were finished before"""
    left_out: tuple[str, ...]
    """files that are not images by their names"""
    seconds: float

    def __str__(self) -> str:
        made = self.manifest
        lines = [
            f"{made.url}: {made.samples} samples of {len(made.classes)} classes in "
            f"{len(made.shards)} shards, {made.bytes / 1e6:.1f} MB"
        ]
        if self.found:
            lines.append(f"{self.found} shards were finished before and are whole; kept")
        if self.rejects:
            reasons = Counter(reject.reason for reject in self.rejects).most_common(3)
            lines.append(
                f"{len(self.rejects)} images rejected (all in {REJECTS}): "
                + ", ".join(f"{count} x {reason}" for reason, count in reasons)
            )
        if self.left_out:
            lines.append(
                f"{len(self.left_out)} files are not images by their names and were left out, "
                f"e.g. {self.left_out[0]}"
            )
        rate = made.samples / max(self.seconds, 1e-9)
        lines.append(
            f"{self.seconds:.1f} s, {rate:.0f} images/s, "
            f"{made.bytes / 1e6 / max(self.seconds, 1e-9):.1f} MB/s"
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
        listing: the images.
        url: folder or object-store prefix of the set.
        options: all that the result depends on.
        workers: processes; 1 = this one.
        source: what the manifest calls the source.
        engine: who runs the tasks.
        quiet: no progress.

    Raises:
        ValueError: bad options, another set is there, the source changed, no image can be read.
        OSError: a file cannot be read or written.
    """
    _check_options(options)
    made = {
        "program": f"mocov3-ds {__version__}",
        **({"pillow": PIL.__version__} if options.resize else {}),
        **vars(options),
        "images": len(listing),
        "listing": listing.digest(),
    }
    plan = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    order_N = _order(len(listing), options.seed)
    bounds_S = _cut(listing, order_N, options.shard_size)
    with _alone_in(url):
        _claim(url, made)
        tasks = _tasks(listing, order_N, bounds_S, url, plan, options)
        receipts: dict[str, Receipt] = {}
        with Progress("shard", len(listing), quiet=quiet) as progress:
            for receipt in engine(write_shard, tasks, workers):
                receipts[receipt.shard.name] = receipt
                progress.update(len(receipt.rows) + len(receipt.rejects), receipt.shard.bytes)
            seconds = progress.seconds
        done = [receipts[name] for name in sorted(receipts)]
        if storage.is_local(url):
            _check_seen(done, url)
        rejects = tuple(reject for receipt in done for reject in receipt.rejects)
        if not any(len(receipt.rows) for receipt in done):
            raise ValueError(
                f"none of the {len(listing)} images can be read, e.g. {rejects[0].name}: "
                f"{rejects[0].reason}."
            )
        if rejects:
            lines = [json.dumps(vars(reject)) for reject in rejects]
            storage.write(storage.join_url(url, REJECTS), ("\n".join(lines) + "\n").encode())
        if storage.is_local(url):
            _sweep(_local(url))
        whole = manifest.write(
            url,
            [receipt.shard for receipt in done if len(receipt.rows)],
            np.concatenate([receipt.rows for receipt in done]),
            classes=listing.classes,
            made={**made, "source": source, "rejected": len(rejects)},
        )
    found = sum(receipt.found for receipt in done)
    return Summary(whole, rejects, found, tuple(listing.left_out), seconds)


def _check_options(options: ShardOptions) -> None:
    if options.resize < 0:
        raise ValueError(f"--resize {options.resize} is negative; 0 keeps the original bytes.")
    if not 1 <= options.quality <= 100:
        raise ValueError(f"--quality {options.quality} is outside 1 to 100.")
    if options.reencode and not options.resize:
        raise ValueError("--reencode needs --resize N, the shorter side of larger images.")
    if options.split and not re.fullmatch(r"[A-Za-z0-9_-]+", options.split):
        raise ValueError(
            f"--split {options.split!r} names shards and a folder; use letters, digits, _ and -."
        )


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_shard_size(text: str) -> tuple[int, bool]:
    """A size such as `1000` or `256MB`.

    Returns:
        The number, and whether it counts bytes (or else samples).

    Raises:
        ValueError: it is not of that form, or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?(b)?", text.strip().lower())
    number = round(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if match is None or number < 1 or (not match[3] and (match[2] or "." in match[1])):
        raise ValueError(
            f"--shard-size {text!r} is neither samples (1000) nor bytes (256MB, 1GiB)."
        )
    return number, bool(match[3])


def _order(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation from the seed alone, the same with any version of NumPy."""
    state = int(hashlib.sha256(b"%d" % seed).hexdigest()[:16], 16)
    return splitmix.draw_permutation(count, state)


def _cut(listing: Listing, order_N: NDArray[np.int64], shard_size: str) -> NDArray[np.int64]:
    """First image of each shard in the order, and the number of images behind the last."""
    limit, in_bytes = parse_shard_size(shard_size)
    if not in_bytes:
        return np.append(np.arange(0, len(listing), limit), len(listing))
    size_N = listing.size_N + -listing.size_N % tar.BLOCK + tar.BLOCK
    size_N += np.where(listing.label_N >= 0, 2 * tar.BLOCK, 0)
    json_N = listing.json_N2[:, 1]
    size_N += np.where(json_N > 0, json_N + -json_N % tar.BLOCK + tar.BLOCK, 0)
    before_N = np.concatenate([[0], np.cumsum(size_N[order_N])[:-1]])
    _, first_S = np.unique(before_N // limit, return_index=True)
    return np.append(first_S, len(listing))


def _tasks(
    listing: Listing,
    order_N: NDArray[np.int64],
    bounds_S: NDArray[np.int64],
    url: str,
    plan: str,
    options: ShardOptions,
) -> Iterator[Task]:
    for number, (first, last) in enumerate(itertools.pairwise(bounds_S.tolist())):
        name = f"{options.split or 'shard'}-{number:06d}.tar"
        yield Task(url, name, plan, listing.items(order_N[first:last]), options)


def write_shard(task: Task) -> Receipt:
    """Make one shard, unless a receipt says that it is finished and its bytes agree.

    Raises:
        ValueError: a file of the source is not as long as it was when it was listed.
        OSError: a file cannot be read or written.
    """
    url = storage.join_url(task.url, task.name)
    receipt_url = storage.join_url(
        storage.join_url(task.url, RECEIPTS), task.name.removesuffix(".tar") + ".json"
    )
    earlier = _read_receipt(receipt_url, task)
    if earlier is not None and _is_whole(url, earlier.shard):
        return earlier
    rows = np.zeros(len(task.items), dtype=manifest.ROW)
    rejects: list[Reject] = []
    kept = at = 0
    whole = hashlib.sha256()
    with storage.open_write(url) as out, contextlib.ExitStack() as opened:
        files: dict[str, int] = {}
        for item in task.items:
            try:
                if item.size > images.MAX_BYTES:
                    raise UnreadableImage(f"{item.size} bytes, at most {images.MAX_BYTES} are read")
                data = _read(item, files, opened)
                data, suffix, height, width = _prepared(item, data, task.options)
            except UnreadableImage as error:
                rejects.append(Reject(item.name, str(error)))
                continue
            head, tail = _around(item, len(data), suffix, files)
            for part in (head, data, tail):
                whole.update(part)
                out.write(part)
            rows[kept] = (
                at + tar.BLOCK,
                len(data),
                zlib.crc32(data),
                item.label,
                width if width < 1 << 16 else 0,
                height if height < 1 << 16 else 0,
                0,
            )
            kept += 1
            at += len(head) + len(data) + len(tail)
        whole.update(tar.END)
        out.write(tar.END)
    if not kept:
        storage.remove_file(url)
    done = Shard(task.name, at + len(tar.END), kept, whole.hexdigest())
    receipt = Receipt(done, rows[:kept], tuple(rejects))
    storage.write(receipt_url, _receipt_bytes(receipt, task.plan))
    return receipt


def _prepared(item: Item, data: bytes, options: ShardOptions) -> tuple[bytes, str, int, int]:
    """Bytes to store, member ending, height and width."""
    height, width = images.checked_size(data, options.check)
    if options.resize:
        smaller = images.shrunk(data, options.resize, options.quality, always=options.reencode)
        if smaller is not None:
            return smaller, "jpg", *images.checked_size(smaller, "header")
    return data, item.suffix, height, width


def _around(item: Item, size: int, suffix: str, files: Mapping[str, int]) -> tuple[bytes, bytes]:
    """What comes before the bytes of an image in its shard, and what after them."""
    after = tar.padding_after(size)
    if item.label >= 0:
        label = b"%d" % item.label
        after += tar.make_header(f"{item.key}.cls", len(label)) + label + tar.padding_after(len(label))
    if item.json_size:
        beside = os.pread(files[item.path], item.json_size, item.json_offset)
        after += tar.make_header(f"{item.key}.json", len(beside)) + beside + tar.padding_after(len(beside))
    return tar.make_header(f"{item.key}.{suffix}", size), after


def _read(item: Item, files: dict[str, int], opened: contextlib.ExitStack) -> bytes:
    """Bytes of an image: of a file of its own, or a range of an archive that stays open."""
    if item.offset == 0:  # in an archive a header comes first
        with open(item.path, "rb", buffering=0) as file:  # noqa: PTH123 - half the cost of Path
            data = file.read()
    else:
        if item.path not in files:
            files[item.path] = os.open(item.path, os.O_RDONLY)
            opened.callback(os.close, files[item.path])
        data = os.pread(files[item.path], item.size, item.offset)
    if len(data) != item.size:
        raise ValueError(
            f"{item.name} ({item.path}) has {len(data)} bytes and had {item.size} when it was "
            "listed; the source must not change while it is sharded."
        )
    return data


def _receipt_bytes(receipt: Receipt, plan: str) -> bytes:
    tree = {
        "plan": plan,
        "shard": vars(receipt.shard),
        "rejects": [vars(reject) for reject in receipt.rejects],
        "rows": base64.b64encode(receipt.rows.tobytes()).decode(),
    }
    return json.dumps(tree).encode()


def _read_receipt(url: str, task: Task) -> Receipt | None:
    """The receipt of the task's shard, if there is one of this plan that adds up."""
    try:
        tree = json.loads(storage.read(url))
        rows = np.frombuffer(base64.b64decode(tree["rows"]), dtype=manifest.ROW)
        done = Shard(**tree["shard"])
        rejects = tuple(Reject(**reject) for reject in tree["rejects"])
        if tree["plan"] == task.plan and done.name == task.name and done.samples == len(rows):
            return Receipt(done, rows, rejects, found=True)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass  # damaged: the shard is made again
    return None


def _is_whole(url: str, shard: Shard) -> bool:
    if not shard.samples:
        return True
    digest = hashlib.sha256()
    try:
        for block in storage.read_blocks(url):
            digest.update(block)
    except FileNotFoundError:
        return False
    return digest.hexdigest() == shard.sha256


def _check_seen(receipts: Sequence[Receipt], url: str) -> None:
    """Other machines may have written to folders of their own."""
    sizes = {entry.name: entry.size for entry in storage.list_files(url)}
    for receipt in receipts:
        made = receipt.shard
        if made.samples and sizes.get(made.name) != made.bytes:
            raise ValueError(
                f"{made.name} was made and is not in {url}: on several machines the destination "
                "must be object storage or a file system that all of them share."
            )


def _claim(url: str, made: Mapping[str, Any]) -> None:
    """Write the plan, or find the same one there."""
    plan_url = storage.join_url(url, PLAN)
    try:
        there = json.loads(storage.read(plan_url))
    except FileNotFoundError:
        there = None
    except ValueError:
        raise ValueError(f"{plan_url} is damaged; use a new folder, or empty this one.") from None
    if there == made:
        return
    if there is not None:
        other = sorted({*there} | {*made}, key=lambda key: key == "listing")
        differing = [key for key in other if there.get(key) != made.get(key)]
        what = ", ".join(
            "other images (names, sizes or classes)"
            if key == "listing"
            else f"{key} {there.get(key)!r} there, {made.get(key)!r} asked for"
            for key in differing
        )
        raise ValueError(
            f"{url} holds shards of another plan: {what}; use a new folder, or remove that one."
        )
    taken = [entry.name for entry in storage.list_files(url) if entry.name.endswith((".tar", ".json"))]
    if taken:
        raise ValueError(
            f"{url} holds {taken[0]}, which is not of this command (there is no {PLAN}); use an "
            "empty folder."
        )
    storage.write(plan_url, json.dumps(made, indent=1).encode())


def _local(url: str) -> Path:
    return Path(url.removeprefix("file://")).expanduser()


@contextlib.contextmanager
def _alone_in(url: str) -> Iterator[None]:
    """Keep a second run out of a local folder; in object storage it would only waste time."""
    if not storage.is_local(url):
        yield
        return
    folder = _local(url)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {url}; wait for it or stop it.") from None
        yield
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove half-written files of killed runs."""
    for left in [*folder.glob("*.tmp"), *(folder / RECEIPTS).glob("*.tmp")]:
        left.unlink(missing_ok=True)
