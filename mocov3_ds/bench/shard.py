"""What does sharding cost, beside webdataset's example; and listing nested tars, and resizing?

    python -m mocov3_ds.bench shard SRC

SRC is a folder of class folders or a tar of them. Its images are copied to a temporary tree, from
which every variant reads, in this process, in turn; CPU time (user and system) counts, the median
of the rounds. The example is the one of webdataset's documentation: torchvision's `ImageFolder` for
the list, `ShardWriter` for the tars. Ours also makes digests (SHA-256 of the shard, crc32 of each
image), checks each image's header and end, writes the index and syncs to disk. For the list of a
nested tar, an archive like ILSVRC2012_img_train.tar is made of small files.
"""

import hashlib
import io
import shutil
import statistics
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from data_prep import tar
from data_prep.listing import Listing
from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images
from data_prep.tar_listing import FileWindow


@dataclass(frozen=True, kw_only=True)
class ShardBenchOptions:
    """CPU time of sharding, of listing a nested tar, and of resizing."""

    source: tyro.conf.Positional[str]
    """folder of class folders, or a tar of them"""
    under: str = ""
    """take only what lies in this folder of the source"""
    images: int = 2000
    """images copied to the tree; those of the source are repeated"""
    resized: int = 200
    """images that the slow variants work on"""
    nested: int = 100_000
    """images in the nested tar"""
    rounds: int = 5
    """times that each variant runs"""


def run_bench(options: ShardBenchOptions) -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listing = list_images(options.source, under=options.under, scratch_folder=folder)
        tree = copy_images(listing, folder / "tree", options.images)
        small_tree = copy_images(listing, folder / "small", min(options.resized, options.images))
        size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
        print(f"{options.images} images of {size / options.images / 1e3:.1f} kB on average\n")
        print_table(
            "copy, ms of CPU an image",
            options.images,
            options.rounds,
            {
                "webdataset's example (ImageFolder, ShardWriter)": partial(_write_example, tree),
                "the same, then SHA-256 of shards, crc32 of images": partial(_write_digested, tree),
                "ours (with digests, check, index)": partial(_write_ours, tree),
            },
        )
        print_table(
            "check or resize, ms of CPU an image",
            len([*small_tree.rglob("*.*")]),
            options.rounds,
            {
                "webdataset's writer given Pillow images": partial(_write_encoded, small_tree),
                "--check decode": partial(_write_ours, small_tree, check="decode"),
                "--resize 384": partial(_write_ours, small_tree, resize=384),
                "--resize 384 --reencode": partial(
                    _write_ours, small_tree, resize=384, reencode=True
                ),
                "--resize 256": partial(_write_ours, small_tree, resize=256),
            },
        )
        archive = write_nested_tar(folder / "nested.tar", options.nested)
        print_table(
            f"list of a nested tar of {options.nested} images, ms of CPU an image",
            options.nested,
            min(options.rounds, 3),
            {
                "tarfile, archive in archive: names, offsets, sizes": partial(
                    _list_by_tarfile, archive
                ),
                "ours: the same, headers alone": partial(_read_headers, archive),
                "ours: the whole list with keys and labels, sorted": partial(_list_sorted, archive),
            },
        )


def print_table(
    title: str, images: int, rounds: int, variants: dict[str, Callable[[Path], None]]
) -> None:
    """Run the variants in turns; print their medians, and how many times slower the first is."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            with tempfile.TemporaryDirectory() as out:
                start = time.process_time()
                variant(Path(out))
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(times) / images * 1e3 for name, times in seconds.items()}
    first = next(iter(medians.values()))
    width = max(map(len, variants))
    print(f"| {title:<{width}} | ms     | range           | first / this |")
    print(f"| {'-' * width} | ------ | --------------- | ------------ |")
    for name, median in medians.items():
        low, high = min(seconds[name]) / images * 1e3, max(seconds[name]) / images * 1e3
        span = f"{low:.4f} - {high:.4f}"
        print(f"| {name:<{width}} | {median:6.4f} | {span:<15} | {first / median:12.2f} |")
    print()


def copy_images(listing: Listing, root: Path, count: int) -> Path:
    """Write `count` images of a source as a tree of ten class folders; returns `root`."""
    for number in range(count):
        suffix, image_bytes = read_image(listing, number % len(listing))
        label = f"{number * 10 // count:05d}"
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{label}_{number}.{suffix}").write_bytes(image_bytes)
    return root


def read_image(listing: Listing, row: int) -> tuple[str, bytes]:
    """Name ending and bytes of an image of the source."""
    (item,) = listing.select_items(np.array([row]))
    with Path(item.path).open("rb") as file:
        file.seek(item.offset)
        return item.suffix, file.read(item.size)


# ---------------------------------------------------------------------------------------- variants


def _write_example(tree: Path, out: Path) -> None:
    from torchvision.datasets import ImageFolder
    from webdataset import ShardWriter

    with ShardWriter(f"{out}/shard-%06d.tar", maxcount=1000, verbose=0) as writer:
        for number, (path, label) in enumerate(ImageFolder(str(tree)).imgs):
            data = Path(path).read_bytes()
            writer.write({"__key__": f"{number:07d}", "jpg": data, "cls": label})


def _write_digested(tree: Path, out: Path) -> None:
    """The example, and then the digests that ours makes while it writes."""
    _write_example(tree, out)
    for path in sorted(out.glob("*.tar")):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    content = archive.extractfile(member)
                    assert content is not None
                    zlib.crc32(content.read())


def _write_encoded(tree: Path, out: Path) -> None:
    """As converters do that give decoded images to the writer, which encodes them again."""
    from torchvision.datasets import ImageFolder
    from webdataset import ShardWriter

    with ShardWriter(f"{out}/shard-%06d.tar", maxcount=1000, verbose=0) as writer:
        for number, (path, label) in enumerate(ImageFolder(str(tree)).imgs):
            with Image.open(path) as image:
                writer.write(
                    {"__key__": f"{number:07d}", "jpg": image.convert("RGB"), "cls": label}
                )


def _write_ours(tree: Path, out: Path, **options: Any) -> None:
    make_shards(list_images(str(tree)), str(out), ShardOptions(**options), workers=1, quiet=True)


def write_nested_tar(path: Path, images: int) -> Path:
    """Write an archive of 100 archives of small members with names like ImageNet's."""
    per_archive = max(1, images // 100)
    with path.open("wb") as out:
        for label in range(images // per_archive):
            inner = io.BytesIO()
            for number in range(per_archive):
                inner.write(tar.make_header(f"n{label:08d}_{number}.JPEG", 600))
                inner.write(bytes(1024))
            inner.write(tar.END)
            out.write(tar.make_header(f"n{label:08d}.tar", inner.tell()))
            inner.seek(0)
            shutil.copyfileobj(inner, out)
        out.write(tar.END)
    return path


def _list_sorted(archive: Path, out: Path) -> None:
    list_images(str(archive))


def _read_headers(archive: Path, out: Path) -> None:
    with archive.open("rb", buffering=0) as file:
        outer = FileWindow(file.fileno(), 0, archive.stat().st_size)
        for member in list(tar.read_members(outer, "outer")):
            window = FileWindow(file.fileno(), member.offset, member.offset + member.size)
            _ = [(m.name, m.offset, m.size) for m in tar.read_members(window, "inner", member.size)]


def _list_by_tarfile(archive: Path, out: Path) -> None:
    with tarfile.open(archive) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                _ = [(entry.name, entry.offset_data, entry.size) for entry in inner]
